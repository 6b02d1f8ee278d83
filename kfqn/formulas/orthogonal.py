"""Directions whose singular values are alike, by products of matrices alone.

A step along P = U Σ Vᵀ is mostly one along the first few singular vectors, where an averaged gradient is
largest; one along U Vᵀ goes along all of them alike, as Shampoo's without averages does (Gupta, Koren and
Singer 2018), and Muon's (Jordan et al. 2024).

U Vᵀ = (P Pᵀ)^(−½) P is approached by `kfqn.formulas.roots`. Singular values below a two-hundredth of the
largest stay smaller: they are noise and rounding. All is done with P Pᵀ, which is small where P is wide.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from kfqn.formulas.blocks import Blocks
from kfqn.formulas.roots import inverse_root, traces


class _Part(NamedTuple):
    """A direction as the pieces X (b, n, C) that are orthogonalised each for itself, with X Xᵀ or Xᵀ X."""

    pieces: Tensor
    squares: Tensor
    rank: int  # the number of singular values of all pieces together


@final
class Shared(NamedTuple):
    """Directions of which several processes have some rows each.

    ``rows`` says how many all have, None where P is whole; ``add`` makes tensors their sums over processes.
    """

    rows: Sequence[int | None]
    add: Callable[[list[Tensor]], list[Tensor]]


def orthogonalised(
    directions: Sequence[Tensor], largest: int | None, shared: Shared | None = None
) -> list[Tensor]:
    """Every P (*g, I, C) with its singular values brought near one another, and ‖P‖ about as it was, (M2).

    The groups *g are diagonal blocks of one matrix. A P with more than ``largest`` rows and columns is cut
    into blocks of at most half as many rows, each for itself. Of rows, so that what multiplies P is symmetric
    and positive, as H_G is. Directions whose squares are alike, of one type and device, are treated in one.

    Of ``shared`` directions no block (`blocks`) may be in two processes.
    """
    rows = [None] * len(directions) if shared is None else shared.rows
    cuts = [_cut(P, n, largest) for P, n in zip(directions, rows, strict=True)]
    parts = [_part(P, cut) for P, cut in zip(directions, cuts, strict=True)]
    sizes = {} if shared is None else _add_up_(parts, cuts, shared)
    alike: dict[Any, list[int]] = {}
    for i, (_, squares, rank) in enumerate(parts):
        alike.setdefault((squares.shape, squares.dtype, squares.device, rank, i in sizes), []).append(i)
    results = [*directions]
    for members in alike.values():
        size = torch.stack([sizes[i] for i in members]) if members[0] in sizes else None
        roots = _roots(torch.stack([parts[i].squares for i in members]), parts[members[0]].rank, size)
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


def blocks(rows: int, columns: int, largest: int | None) -> Blocks | None:
    """How so many rows are cut; None where columns are fewer, and few enough."""
    if columns < rows and (largest is None or columns <= largest):
        return None
    return Blocks.of_at_most(rows if largest is None or rows <= largest else max(1, largest // 2), rows)


def _cut(P: Tensor, rows: int | None, largest: int | None) -> Blocks | None:
    """How P is cut, or what this process has of it if it is shared."""
    whole = blocks(P.shape[-2] if rows is None else rows, P.shape[-1], largest)
    return whole if rows is None or whole is None else Blocks(P.shape[-2], whole.size)


def _add_up_(parts: list[_Part], cuts: Sequence[Blocks | None], shared: Shared) -> dict[int, Tensor]:
    """Make the squares and ranks of shared directions those of all processes.

    Of those that are cut into blocks, whose squares are here, their squared norms, (1,).
    """
    own = [i for i, rows in enumerate(shared.rows) if rows is not None]
    told = [parts[i].squares if cuts[i] is None else traces(parts[i].squares).sum()[None] for i in own]
    sizes = {}
    for i, total in zip(own, shared.add(told), strict=True):
        if cuts[i] is None:
            parts[i] = parts[i]._replace(squares=total)
        else:
            parts[i], sizes[i] = parts[i]._replace(rank=shared.rows[i] or 0), total
    return sizes


def _part(P: Tensor, cut: Blocks | None) -> _Part:
    if cut is None:
        pieces = P.reshape(P.shape[:-2].numel(), *P.shape[-2:])
        return _Part(pieces, torch.bmm(pieces.mT, pieces), len(pieces) * P.shape[-1])
    pieces = cut.split(P, -2).reshape(-1, cut.size, P.shape[-1])
    return _Part(pieces, torch.bmm(pieces, pieces.mT), P.shape[:-1].numel())


def _put_together(part: _Part, root: Tensor, cut: Blocks | None, P: Tensor) -> Tensor:
    if cut is None:
        return torch.bmm(part.pieces, root).view(P.shape)
    pieces = torch.bmm(root, part.pieces)
    return cut.join(pieces.view(*P.shape[:-2], cut.count, cut.size, P.shape[-1]), -2)


def _roots(squares: Tensor, rank: int, size_of_all: Tensor | None) -> Tensor:
    """What to multiply pieces with, given X Xᵀ of the b pieces of each of l directions, (l, b, n, n).

    About (X Xᵀ)^(−½), for eigenvalues not far below the largest, times what gives a direction of so many
    singular values the norm that it has: of pieces in several processes the root of ``size_of_all``, (l, 1).
    """
    own = traces(squares)
    sizes = own.sum(-1, keepdim=True) if size_of_all is None else size_of_all
    norms = sizes.sqrt() / math.sqrt(rank)  # ‖P‖, (l, 1)
    return inverse_root(squares) * norms[..., None, None]
