"""What becomes of the directions H_G D̂W H_A before they are taken."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from kfqn.formulas.orthogonal import orthogonalised


class Direction(ABC):
    """A transform of the directions of several layers."""

    @abstractmethod
    def of(self, directions: Sequence[Tensor], largest: int | None) -> Sequence[Tensor]:
        """What takes the place of each P (*g, I, C); ``largest`` is their ``max_factor_size``."""


@final
@dataclass(frozen=True)
class Plain(Direction):
    """P as it is (line 8)."""

    def of(self, directions: Sequence[Tensor], largest: int | None) -> Sequence[Tensor]:
        return directions


@final
@dataclass(frozen=True)
class Orthogonalised(Direction):
    """P with its singular values brought near one another (`kfqn.formulas.orthogonal`)."""

    def of(self, directions: Sequence[Tensor], largest: int | None) -> Sequence[Tensor]:
        return orthogonalised(directions, largest)
