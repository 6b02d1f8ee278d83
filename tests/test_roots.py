"""Inverse roots against those of eigenvalues."""

import math

import pytest
import torch

from kfqn.formulas import roots
from kfqn.formulas.roots import inverse_root
from kfqn.formulas.statistics import damped_root

LEAST = {2: 1 / 129, 3: 1 / 2200, 4: 1 / 40_000}  # eigenvalue, of the norm, that so many polynomials reach


def evened(root, S):
    """What S has along its eigenvectors once ``root`` is on both sides, and its eigenvalues."""
    values, vectors = torch.linalg.eigh(S.double())
    found = vectors.T @ root.double() @ vectors
    assert (found - found.diagonal().diag()).abs().max() < 1e-4 * found.abs().max()
    return found.diagonal() * values.clamp(min=0).sqrt(), values


def with_values(values):
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.double))[0]
    return vectors @ torch.diag(values) @ vectors.T


def test_the_polynomials_leave_what_they_say():
    x = torch.logspace(math.log10(1 / 200), 0, 10_000, dtype=torch.double)
    for (a, b, c), largest in zip(roots.POLYNOMIALS, roots.LARGEST, strict=True):
        assert x.max().item() == pytest.approx(largest, abs=1e-4)
        x = a * x + b * x**3 + c * x**5
    assert (x.min().item(), x.max().item()) == pytest.approx((0.917, 1.083), abs=1e-3)


@pytest.mark.parametrize("polynomials", LEAST)
def test_within_nine_percent_down_to_the_smallest_that_is_named(polynomials):
    S = with_values(torch.logspace(0, math.log10(LEAST[polynomials]), 12, dtype=torch.double))
    even, values = evened(inverse_root(S, polynomials), S)
    named = values >= LEAST[polynomials] * S.norm()
    assert named.sum() > 8
    assert ((even - 1).abs() < 0.09)[named].all()
    assert even.min() > 0
    assert even.max() < 1.09


def test_smaller_ones_get_less():
    S = with_values(torch.tensor([1.0, 0.5, 1e-6, 1e-9, 0.0], dtype=torch.double))
    root = inverse_root(S)
    assert torch.linalg.eigvalsh(root).max() < 227 / S.norm().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_of_any_scale(dtype, scale):
    x = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    S = x @ x.mT
    got = inverse_root(scale * S) * math.sqrt(scale)
    torch.testing.assert_close(got, inverse_root(S), rtol=1e-4, atol=1e-5)


def test_of_each_matrix_by_itself():
    x = torch.randn(2, 3, 4, 9)
    S = x @ x.mT
    torch.testing.assert_close(inverse_root(S)[1, 2], inverse_root(S[1, 2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_of_singular_matrices_with_a_damping(seed):
    """A of two data most of whose entries are zero, as behind ReLU and dropout: eigh fails on some."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 126, generator=generator).relu() * (torch.rand(2, 126, generator=generator) < 0.5)
    A = x.mT @ x / 2
    damping = 0.01 * A.norm()
    even, _ = evened(damped_root(A, damping[None]), A + damping * torch.eye(126))
    assert (even - 1).abs().max() < 0.09


def test_of_zeros_and_of_what_is_not_finite():
    assert inverse_root(torch.zeros(3, 3)).isfinite().all()
    assert inverse_root(torch.full((3, 3), math.inf)).isnan().all()
