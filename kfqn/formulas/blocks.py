"""Cutting a dimension into pieces of one size."""

import math
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor


@final
@dataclass(frozen=True)
class Blocks:
    """``total`` entries cut into pieces of ``size``, the last one filled up with zeros."""

    total: int
    size: int

    @classmethod
    def of_at_most(cls, largest: int, total: int) -> "Blocks":
        """As few pieces as there can be, and those alike."""
        return cls(total, math.ceil(total / math.ceil(total / largest)))

    @property
    def count(self) -> int:
        """How many pieces."""
        return math.ceil(self.total / self.size)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Dimension ``dim`` < 0 as two, (count, size)."""
        pieces: Tensor = self.filled(x, dim).unflatten(dim, (self.count, self.size))
        return pieces

    def join(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of `split`: dimensions ``dim`` − 1 and ``dim`` as one."""
        joined: Tensor = x.flatten(dim - 1, dim)
        return joined.narrow(dim, 0, self.total)

    def filled(self, x: Tensor, dim: int) -> Tensor:
        """With the zeros that the last piece lacks."""
        lacking = self.count * self.size - self.total
        return F.pad(x, [0] * 2 * (-dim - 1) + [0, lacking]) if lacking else x
