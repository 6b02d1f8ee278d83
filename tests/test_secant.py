"""Algorithm 1, BFGS and L-BFGS against their definitions."""

import oracle
import pytest
import torch

from kfqn.formulas.rows import Rows
from kfqn.formulas.secant import bfgs_update_, double_damping, lbfgs_matmul, lbfgs_push_

SEEDS = range(200)
SIZE = 7


def positive_definite(size=SIZE):
    M = torch.randn(size, size, dtype=torch.float64)
    return M @ M.T + 0.1 * torch.eye(size, dtype=torch.float64)


def pair(size=SIZE, scale=1.0):
    return scale * torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize("mu2", [1e-3, 1.0, 30.0])
def test_algorithm_1_as_printed_and_what_it_promises(mu2):
    negative = 0
    for seed in SEEDS:
        torch.manual_seed(seed)
        H, (s, y) = positive_definite(), pair()
        negative += bool(s @ y < 0)
        got = double_damping(s, y, H @ y, mu1=0.2, mu2=mu2)
        torch.testing.assert_close(got, oracle.damped(s, y, H @ y, 0.2, mu2), rtol=1e-12, atol=1e-12)
        s, y_in, y = got[0], y, got[1]
        slack = 1e-10 * s.norm() * y.norm()  # rounding, relative to the size of the product
        assert s @ y >= mu2 * s @ s - slack
        assert s @ y_in >= 0.2 * y_in @ H @ y_in - slack
    assert negative > 50


def test_a_zero_y_is_never_divided_by():
    s, zero = torch.ones(3), torch.zeros(3)
    torch.testing.assert_close(double_damping(s, zero, zero, 0.2, 0.5), (s, 0.5 * s), rtol=0, atol=0)
    for v in double_damping(zero, zero, zero, 0.2, 0.5):
        assert torch.equal(v, zero)


def test_bfgs_is_equation_9_keeps_the_secant_and_stays_positive():
    for seed in SEEDS:
        torch.manual_seed(seed)
        H = positive_definite()
        s, y = double_damping(*(p := pair()), H @ p[1], 0.2, 0.1)
        expected = oracle.bfgs(H, s, y)
        assert bfgs_update_([H], s[None], y[None])
        torch.testing.assert_close(H, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
        torch.testing.assert_close(H @ y, s, rtol=1e-9, atol=1e-9 * s.norm().item())
        torch.testing.assert_close(H, H.T, rtol=1e-13, atol=1e-13 * H.abs().max().item())
        assert torch.linalg.eigvalsh(H).min() > 0


def test_float32_stays_symmetric_and_positive_over_thousands_of_updates():
    B = positive_definite().float()
    H = torch.eye(SIZE)
    for _ in range(5000):
        s = torch.randn(SIZE)
        bfgs_update_([H], s[None], (B @ s)[None])
    torch.testing.assert_close(H, H.T, rtol=1e-3, atol=1e-4 * H.abs().max().item())  # float32 drift
    assert torch.linalg.eigvalsh((H + H.T) / 2).min() > 0


@pytest.mark.parametrize("history", [1, 4, 12])
def test_compact_lbfgs_is_equation_14_over_the_pairs_it_keeps(history):
    S, Y = torch.zeros(2, history, SIZE, dtype=torch.float64)
    V, kept = torch.randn(SIZE, 5, dtype=torch.float64), []
    for _ in range(3 * history):
        H = torch.eye(SIZE, dtype=torch.float64)
        for s, y in kept:
            H = oracle.bfgs(H, s, y)
        HV = lbfgs_matmul(S, Y, V)
        torch.testing.assert_close(HV, H @ V, rtol=1e-7, atol=1e-7 * HV.abs().max().item())
        s, y = pair()
        s, y = double_damping(s, y, H @ y, 0.2, 1.0)
        assert lbfgs_push_(S, Y, s, y)
        kept = [*kept, (s, y)][-history:]
        torch.testing.assert_close(lbfgs_matmul(S, Y, y[:, None])[:, 0], s, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("history", [3, 40])
def test_lbfgs_and_bfgs_agree_until_the_first_pair_is_dropped(history):
    S, Y, H = *torch.zeros(2, history, SIZE, dtype=torch.float64), torch.eye(SIZE, dtype=torch.float64)
    for _ in range(history):
        s, y = pair(scale=0.1)
        s, y = double_damping(s, y, H @ y, 0.2, 1.0)
        bfgs_update_([H], s[None], y[None])
        lbfgs_push_(S, Y, s, y)
    eye = torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(lbfgs_matmul(S, Y, eye), H, rtol=1e-6, atol=1e-6 * H.abs().max().item())


BAD = {
    "zero": ([0.0, 0.0], [0.0, 0.0]),
    "no curvature": ([1.0, 0.0], [0.0, 1.0]),
    "negative curvature": ([1.0, 2.0], [-1.0, 0.5]),
    "nan": ([float("nan"), 1.0], [1.0, 1.0]),
    "infinite": ([float("inf"), 1.0], [1.0, 1.0]),
    "infinite y": ([1.0, 1.0], [float("inf"), 1.0]),
    "overflow": ([1e30, 1e30], [1e30, 1e30]),
    "underflow": ([1e-30, 1e-30], [1e-30, 1e-30]),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_pair_that_cannot_be_used_changes_nothing(bad):
    s, y = map(torch.tensor, BAD[bad])
    H, before = torch.eye(2) + 0.5, torch.eye(2) + 0.5
    assert not bfgs_update_([H], s[None], y[None])
    assert torch.equal(H, before)
    S, Y = torch.ones(2, 3, 2)
    assert not lbfgs_push_(S, Y, s, y)
    assert torch.equal(S, torch.ones(3, 2))
    assert torch.equal(Y, torch.ones(3, 2))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_float32_never_forms_rho_squared(scale):
    """ρ² = (scale² sᵀy)⁻² is out of float32's range on one side; the update does not depend on scale."""
    torch.manual_seed(1)
    s, y = torch.randn(2, 5)
    y = y if s @ y > 0 else -y
    H, H_scaled = torch.eye(5), torch.eye(5)
    assert bfgs_update_([H], s[None], y[None])
    assert bfgs_update_([H_scaled], scale * s[None], scale * y[None])
    torch.testing.assert_close(H_scaled, H, rtol=1e-5, atol=1e-5)


def test_vectors_of_layers_as_rows():
    """Layers with groups and of different lengths; what is done to the rows is done to the vectors."""
    vectors = [torch.randn(3), torch.randn(2, 5), torch.randn(2, 3, 1)]
    rows = Rows.of(vectors)
    matrix = rows.join(vectors)
    assert matrix.shape == (1 + 2 + 6, 5)
    for vector, same in zip(vectors, rows.part(matrix), strict=True):
        assert torch.equal(vector, same)
    flat = torch.cat([x.reshape(-1, x.shape[-1]).square().sum(-1) for x in vectors])
    torch.testing.assert_close((matrix * matrix).sum(-1), flat)
    assert [len(of_layer) for of_layer in rows.by_layer(matrix)] == rows.counts == [1, 2, 6]
    rows.part(matrix)[1].fill_(7.0)
    assert (matrix[1:3] == 7).all()  # views


def test_each_of_several_H_is_updated_by_itself():
    torch.manual_seed(0)
    Hs = [positive_definite(3), torch.stack([positive_definite(5), positive_definite(5)])]
    pairs = [double_damping(s, y, y, 0.2, 1.0) for s, y in (pair(3), (torch.randn(2, 5), torch.randn(2, 5)))]
    pairs = [(s.double(), y.double()) for s, y in pairs]
    pairs[1][0][1] = 0.0  # no curvature in the last problem
    (s, y), (_, untouched) = pairs[1], Hs[1].clone()
    expected = [oracle.bfgs(Hs[0], *pairs[0]), oracle.bfgs(Hs[1][0], s[0], y[0]), untouched]
    rows = Rows.of([s for s, _ in pairs])
    s, y = (rows.join(of_layers) for of_layers in zip(*pairs, strict=True))
    assert bfgs_update_(Hs, s, y).flatten().tolist() == [True, True, False]
    for H, wanted in zip((Hs[0], *Hs[1]), expected, strict=True):
        torch.testing.assert_close(H, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(Hs[1][1], untouched)
