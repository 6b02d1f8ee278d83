"""Directions with singular values that are alike, against a singular value decomposition."""

import math

import pytest
import torch
import torch.nn.functional as F

import kfqn
from kfqn.formulas import orthogonal
from kfqn.parameters.shards import Cut

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (40, 300)]


def orthogonalised(P, largest):
    """One direction alone."""
    return orthogonal.orthogonalised([P], largest)[0]


def with_values(rows, columns, values, seed=0):
    """A matrix with these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    of = [torch.randn(size, len(values), generator=generator, dtype=torch.double) for size in (rows, columns)]
    U, V = (torch.linalg.qr(x).Q for x in of)
    return (U * torch.tensor(values, dtype=torch.double)) @ V.mT, U, V


@pytest.mark.parametrize("least", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polar_factor_and_keeps_the_norm(shape, least):
    """Within 9 %, which is what the polynomials leave of their mean; the singular vectors to rounding."""
    rank = min(shape)
    P, U, V = with_values(*shape, [least ** (k / rank) for k in range(rank)])
    got = orthogonalised(P, None)
    values = U.mT @ got @ V
    assert (values - values.diagonal().diag()).norm() < 1e-10 * values.norm()
    even = values.diagonal() * math.sqrt(rank) / P.norm()
    assert (even - 1).abs().max() < 0.09
    torch.testing.assert_close(U @ values @ V.mT, got)


def test_what_is_far_below_stays_below():
    """Noise and rounding are not blown up to the size of the rest."""
    P, U, V = with_values(8, 20, [1.0, 0.5, 0.3, 0.2, 0.1, 1e-4, 1e-6, 0.0])
    values = (U.mT @ orthogonalised(P, None) @ V).diagonal()
    assert values[:5].min() > 0.9 * values[0]
    assert values[5:].max() < 0.025 * values[0]  # by 226, what the polynomials make of the smallest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_scale_goes_through(dtype, scale):
    P = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted, got = orthogonalised(P, 4), orthogonalised(scale * P, 4) / scale
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_groups_are_blocks_of_one_matrix():
    """All end with the same singular values, however long their gradients are against each other."""
    P = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2)).double()
    P *= torch.tensor([1.0, 1e-3, 30.0])[:, None, None]
    values = torch.linalg.svdvals(orthogonalised(P, None)) * math.sqrt(12) / P.norm()
    assert (values - 1).abs().max() < 0.09


@pytest.mark.parametrize("shape", [(10, 23), (23, 10)])
def test_large_matrices_are_cut_into_blocks(shape):
    """Blocks of at most four rows: those of one become orthogonal, each block for itself."""
    P = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
    got = orthogonalised(P, 9)
    for rows, of in zip(got.split(4), P.split(4), strict=True):
        alone = orthogonalised(of, None)
        torch.testing.assert_close(rows / rows.norm(), alone / alone.norm())
        values = torch.linalg.svdvals(rows) * math.sqrt(shape[0]) / P.norm()
        assert (values - 1).abs().max() < 0.09
    assert not torch.allclose(got, orthogonalised(P, 10), rtol=0.01)


@pytest.mark.parametrize("largest", [None, 20, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_stays_a_direction_of_descent(shape, largest):
    """⟨P, D̂W⟩ > 0 for P = D̂W H_A with any positive H_A, here of condition 10⁸, whole or in blocks."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        DW, basis = (
            torch.randn(rows, shape[1], generator=generator).double() for rows in (shape[0], shape[1])
        )
        Q = torch.linalg.qr(basis).Q
        H_A = (Q * torch.logspace(-4, 4, shape[1], dtype=torch.double)) @ Q.mT
        assert (orthogonalised(DW @ H_A, largest) * DW).sum() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_comes_of_nothing_and_what_is_not_finite_shows(shape):
    assert torch.equal(orthogonalised(torch.zeros(shape), 3), torch.zeros(shape))
    for bad in (math.nan, math.inf):
        assert not orthogonalised(torch.full(shape, bad), 3).isfinite().any()


def test_it_is_contiguous_and_leaves_P_as_it_is():
    for shape in SHAPES:
        P = torch.randn(shape)
        before = P.clone()
        assert orthogonalised(P, None).is_contiguous()
        assert torch.equal(P, before)


def test_columns_in_blocks_would_go_uphill():
    """Two columns of one gradient, and an H_A that sets them against each other."""
    DW = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 0.5]))
    P = DW @ torch.tensor([[1.0, -4.0], [-4.0, 16.1]])
    assert (P * DW).sum() > 0
    assert (P / P.norm(dim=0) * DW).sum() < 0
    assert (orthogonalised(P, 1) * DW).sum() > 0


@pytest.mark.parametrize("largest", [None, 20, 4])
def test_directions_together_are_as_each_is_alone(largest):
    """Of equal and of other shapes, of groups, and of another type."""
    generator = torch.Generator().manual_seed(4)
    shapes = [*SHAPES, (6, 6), (6, 9), (3, 6, 6), (5, 9), (2, 5, 9)]
    directions = [torch.randn(shape, generator=generator).double() for shape in shapes]
    directions += [torch.randn(6, 6, generator=generator)]
    for P, got in zip(directions, orthogonal.orthogonalised(directions, largest), strict=True):
        assert (got.shape, got.dtype) == (P.shape, P.dtype)
        torch.testing.assert_close(got, orthogonalised(P, largest))
    assert orthogonal.orthogonalised([], largest) == []


SHARED_OUT = [((9, 4), None, 2), ((9, 4), None, 5), ((3, 2), None, 5), ((12, 5), 4, 3), ((8, 5), 4, 5)]


@pytest.mark.parametrize(("shape", "largest", "processes"), SHARED_OUT)
def test_processes_that_have_some_rows_each_find_the_same(shape, largest, processes):
    """Some have fewer rows, or none. Each is asked twice, the second time with what all have told."""
    P = torch.randn(shape, dtype=torch.float64)
    cuts = [Cut(len(P), processes, rank, None) for rank in range(processes)]
    told = []

    def tell(tensors):
        told.append(tensors)
        return tensors

    def sums(tensors):
        return [sum(of_all) for of_all in zip(*told, strict=True)]

    def found(own, add):
        return orthogonal.orthogonalised([own], largest, orthogonal.Shared([len(P)], add))[0]

    shares = [cut.own(P) for cut in cuts]
    for own in shares:
        found(own, tell)
    torch.testing.assert_close(torch.cat([found(own, sums) for own in shares]), orthogonalised(P, largest))


@pytest.mark.parametrize(("largest", "whole"), [("auto", True), (260, True), (None, True), (200, False)])
def test_a_step_is_whole_where_a_thousand_rows_or_columns_are_not_exceeded(largest, whole):
    """Beyond 256, that is, unless a number says less: then blocks of rows are alike only among themselves."""
    torch.manual_seed(0)
    model = torch.nn.Linear(700, 260, bias=False)
    before = model.weight.detach().clone()
    optimizer = kfqn.KFBFGS(model, max_factor_size=largest, weight_decay=0.0)
    optimizer.step(kfqn.closure(model, torch.randn(900, 700), torch.randn(900, 260), F.mse_loss))
    values = torch.linalg.svdvals(model.weight.detach() - before)
    assert (values.max() / values.min() < 1.2) == whole
