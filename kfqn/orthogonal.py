"""Directions whose singular values are alike, by products of matrices alone.

A step along P = U Σ Vᵀ is mostly one along the first few singular vectors, where an averaged gradient is
largest; one along U Vᵀ goes along all of them alike, as Shampoo's without averages does (Gupta, Koren and
Singer 2018), and Muon's (Jordan et al. 2024).

U Vᵀ = (P Pᵀ)^(−½) P is approached by polynomials x ↦ a x + b x³ + c x⁵, applied to all singular values at
once: three times Muon's, which lifts those from about a fiftieth of the largest to between 0.7 and 1.2, and
once that of Newton and Schulz, which brings these near 1. Smaller ones stay smaller: they are noise and
rounding. All is done with P Pᵀ, which is small where P is wide.
"""

import math

import torch
from torch import Tensor

from kfqn.inputs import Blocks

_MUON, _NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375)
POLYNOMIALS = _MUON, _MUON, _MUON, _NEWTON_SCHULZ  # (a, b, c)


def orthogonalised(P: Tensor, largest: int | None) -> Tensor:
    """P (*g, I, C) with its singular values brought near one another, and ‖P‖ about as it was.

    The groups *g are diagonal blocks of one matrix. A P with more than ``largest`` rows and columns is cut
    into blocks of at most half as many rows, each for itself: a whole one would cost more than a pass over a
    usual batch. Of rows, so that what multiplies P is symmetric and positive, as H_G is.
    """
    rows, columns = P.shape[-2:]
    if columns < rows and (largest is None or columns <= largest):
        return orthogonalised(P.mT, None).mT.contiguous()
    cut = Blocks.of_at_most(rows if largest is None or rows <= largest else max(1, largest // 2), rows)
    pieces = cut.split(P, -2)
    square = pieces @ pieces.mT
    norm = square.diagonal(dim1=-2, dim2=-1).sum().sqrt()  # ‖P‖
    root = _inverse_root(square) * (norm / math.sqrt(P.shape[:-1].numel()))
    return cut.join(root @ pieces, -2)


def _inverse_root(S: Tensor) -> Tensor:
    """About S^(−½) of positive semidefinite S, (..., n, n), for eigenvalues not far below ‖S‖."""
    numbers = torch.finfo(S.dtype)
    size = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=numbers.tiny)
    left = S / size  # first by the trace: squares of entries may leave the range of the type
    norm = torch.linalg.matrix_norm(left)[..., None, None].clamp(min=numbers.eps)
    root = left = left / norm
    for k, (a, b, c) in enumerate(POLYNOMIALS):
        factor = b * left + c * left @ left
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        root = root @ factor if k else factor
        if k + 1 < len(POLYNOMIALS):
            left = factor @ left @ factor
    scaled: Tensor = root * (size.rsqrt() * norm.rsqrt())
    return scaled
