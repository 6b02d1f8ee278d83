"""Vectors of several layers as rows of one matrix, so that what is done to all of them is one call."""

import math
from collections.abc import Sequence
from typing import Self, final

import torch
from torch import Tensor


@final
class Rows:
    """Vectors (*g, n), with a g and an n of each layer's own, as a matrix (Σ ∏ g, longest n).

    Shorter ones are filled up with zeros, which products and sums of vectors do not see. ``shapes`` are
    those of the vectors; ``counts`` says how many rows each layer has.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.shapes = shapes
        self.counts = [math.prod(g) for *g, _ in shapes]

    @classmethod
    def of(cls, vectors: Sequence[Tensor]) -> Self:
        """For vectors of these shapes."""
        return cls([x.shape for x in vectors])

    def join(self, vectors: Sequence[Tensor]) -> Tensor:
        """The matrix of these vectors, a copy."""
        rows = vectors[0].new_zeros(sum(self.counts), max(n for *_, n in self.shapes))
        torch._foreach_copy_(self.part(rows), [*vectors])
        return rows

    def part(self, rows: Tensor) -> list[Tensor]:
        """The vectors of this matrix, views of it."""
        return [
            of_layer[0, : shape[-1]] if len(shape) == 1 else of_layer[:, : shape[-1]].view(shape)
            for of_layer, shape in zip(self.by_layer(rows), self.shapes, strict=True)
        ]

    def by_layer(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each layer."""
        return torch.split_with_sizes(rows, self.counts)
