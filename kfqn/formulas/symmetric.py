"""Symmetric matrices of which the lower triangle is kept, row by row, in a rectangle without a gap."""

import functools

import torch
from torch import Tensor


def packed_shape(n: int) -> tuple[int, int]:
    """The shape of what `packed` makes of an n × n matrix: n (n + 1) / 2 entries."""
    return (n + 1) // 2, n + 1 - n % 2


def packed(H: Tensor) -> Tensor:
    """The lower triangle of H (*g, n, n)."""
    n = H.shape[-1]
    row, column = torch.tril_indices(n, n, device=H.device)
    kept: Tensor = H[..., row, column].unflatten(-1, packed_shape(n))
    return kept


def unpacked(kept: Tensor, n: int) -> Tensor:
    """H (*g, n, n), symmetric to the bit, of what `packed` has made of it."""
    H: Tensor = kept.flatten(-2).index_select(-1, _places(n, kept.device)).unflatten(-1, (n, n))
    return H


@functools.lru_cache(maxsize=64)
def _places(n: int, device: torch.device) -> Tensor:
    """Where the entries of an n × n matrix are in its lower triangle."""
    row, column = torch.meshgrid(*[torch.arange(n, device=device)] * 2, indexing="ij")
    low, high = torch.minimum(row, column), torch.maximum(row, column)
    return (high * (high + 1) // 2 + low).flatten().to(torch.int32)
