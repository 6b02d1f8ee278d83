"""Directions whose singular values are alike, by products of matrices alone.

A step along P = U Σ Vᵀ is mostly one along the first few singular vectors, where an averaged gradient is
largest; one along U Vᵀ goes along all of them alike, as Shampoo's without averages does (Gupta, Koren and
Singer 2018), and Muon's (Jordan et al. 2024).

U Vᵀ = (P Pᵀ)^(−½) P is approached by four polynomials x ↦ a x + b x³ + c x⁵, applied to all singular values
at once. They bring those from a two-hundredth of the largest on to within 0.917 and 1.083, as in Polar
Express (Amsel et al. 2025). Smaller ones stay smaller: they are noise and rounding. All is done with P Pᵀ,
which is small where P is wide.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfqn.formulas.blocks import Blocks

POLYNOMIALS = (  # (a, b, c); each best for the interval that those before it leave of [1/200, 1]
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
    (2.1895, -1.5672, 0.4079),
)


class _Part(NamedTuple):
    """A direction as the pieces X (b, n, C) that are orthogonalised each for itself, with X Xᵀ or Xᵀ X."""

    pieces: Tensor
    squares: Tensor
    rank: int  # the number of singular values of all pieces together


def orthogonalised(directions: Sequence[Tensor], largest: int | None) -> list[Tensor]:
    """Every P (*g, I, C) with its singular values brought near one another, and ‖P‖ about as it was, (M2).

    The groups *g are diagonal blocks of one matrix. A P with more than ``largest`` rows and columns is cut
    into blocks of at most half as many rows, each for itself: a whole one would cost more than a pass over a
    usual batch. Of rows, so that what multiplies P is symmetric and positive, as H_G is. Directions whose
    squares are alike, of one type and device, are treated in one.
    """
    cuts = [_cut(P, largest) for P in directions]
    parts = [_part(P, cut) for P, cut in zip(directions, cuts, strict=True)]
    alike: dict[Any, list[int]] = {}
    for i, (_, squares, rank) in enumerate(parts):
        alike.setdefault((squares.shape, squares.dtype, squares.device, rank), []).append(i)
    results = [*directions]
    for members in alike.values():
        roots = _roots(torch.stack([parts[i].squares for i in members]), parts[members[0]].rank)
        for i, root in zip(members, roots, strict=True):
            results[i] = _put_together(parts[i], root, cuts[i], directions[i])
    return results


def of_own_layers(parts: Tensor) -> Tensor:
    """P (*g, I, C) of its parts (*g, n, I/n, C), each of them as long as every other, and ‖P‖ as it was.

    So parts of one matrix move as layers of their own do, which all move by the same share.
    """
    others = [dim for dim in range(-parts.ndim, 0) if dim != -3]
    norms = torch.linalg.vector_norm(parts, dim=others, keepdim=True)
    usual = norms.square().mean().sqrt()
    alike: Tensor = parts * (usual / norms.clamp(min=torch.finfo(parts.dtype).tiny))
    return alike.flatten(-3, -2)


def _cut(P: Tensor, largest: int | None) -> Blocks | None:
    """How the rows of P are cut; None where its columns are fewer, and few enough."""
    rows, columns = P.shape[-2:]
    if columns < rows and (largest is None or columns <= largest):
        return None
    return Blocks.of_at_most(rows if largest is None or rows <= largest else max(1, largest // 2), rows)


def _part(P: Tensor, cut: Blocks | None) -> _Part:
    if cut is None:
        pieces = P.reshape(-1, *P.shape[-2:])
        return _Part(pieces, pieces.mT @ pieces, len(pieces) * P.shape[-1])
    pieces = cut.split(P, -2).reshape(-1, cut.size, P.shape[-1])
    return _Part(pieces, pieces @ pieces.mT, P.shape[:-1].numel())


def _put_together(part: _Part, root: Tensor, cut: Blocks | None, P: Tensor) -> Tensor:
    if cut is None:
        return (part.pieces @ root).view(P.shape)
    pieces = root @ part.pieces
    return cut.join(pieces.view(*P.shape[:-2], cut.count, cut.size, P.shape[-1]), -2)


def _roots(squares: Tensor, rank: int) -> Tensor:
    """What to multiply pieces with, given X Xᵀ of the b pieces of each of l directions, (l, b, n, n).

    About (X Xᵀ)^(−½), for eigenvalues not far below the largest, times what gives a direction of so many
    singular values the norm that it has.
    """
    numbers, shape = torch.finfo(squares.dtype), squares.shape
    traces = squares.diagonal(dim1=-2, dim2=-1).sum(-1)
    norms = traces.sum(-1, keepdim=True).sqrt().expand_as(traces) / math.sqrt(rank)  # ‖P‖, (l, b)
    norms, size = norms.reshape(-1, 1, 1), traces.reshape(-1, 1, 1).clamp(min=numbers.tiny)
    left = squares.flatten(0, 1) / size  # the norm of what is not near 1 might leave the range of the type
    of_left = torch.linalg.matrix_norm(left, keepdim=True).clamp(min=numbers.eps)
    root = left = left / of_left
    for k, (a, b, c) in enumerate(POLYNOMIALS):
        factor = torch.baddbmm(left, left, left, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        root = root @ factor if k else factor
        if k + 1 < len(POLYNOMIALS):
            left = factor @ left @ factor
    scaled: Tensor = root * (size.rsqrt() * of_left.rsqrt() * norms)
    return scaled.view(shape)
