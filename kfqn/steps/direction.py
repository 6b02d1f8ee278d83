"""What becomes of the directions H_G D̂W H_A before they are taken."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from torch import Tensor

from kfqn.formulas.orthogonal import Shared, blocks, orthogonalised
from kfqn.parameters.shards import Cut
from kfqn.runtime.ranks import gathered, summed

Cuts = Sequence[Cut | None]


class Direction(ABC):
    """A transform of the directions of several layers."""

    @abstractmethod
    def of(self, directions: Sequence[Tensor], largest: int | None, cuts: Cuts) -> Sequence[Tensor]:
        """What takes the place of each P (*g, I, C); ``largest`` is their ``max_factor_size``, or None.

        Of a P with a cut the processes have some rows each, and all ask for the same directions.
        """


@final
@dataclass(frozen=True)
class Plain(Direction):
    """P as it is (line 8)."""

    def of(self, directions: Sequence[Tensor], largest: int | None, cuts: Cuts) -> Sequence[Tensor]:
        return directions


@final
@dataclass(frozen=True)
class Orthogonalised(Direction):
    """P with its singular values brought near one another (`kfqn.formulas.orthogonal`).

    Where rows are shared out over processes the same comes out. What is exchanged is Pᵀ P, C × C, where
    columns are fewer; nothing but norms where no block of rows is in two processes; and else P itself.
    """

    def of(self, directions: Sequence[Tensor], largest: int | None, cuts: Cuts) -> Sequence[Tensor]:
        known = {i: cut for i, cut in enumerate(cuts) if cut is not None}
        if not known:
            return orthogonalised(directions, largest)
        apart = {i: cut for i, cut in known.items() if _in_two(cut, directions[i].shape[-1], largest)}
        wholes = dict(zip(apart, gathered([directions[i] for i in apart], [*apart.values()]), strict=True))
        given = [wholes.get(i, P) for i, P in enumerate(directions)]
        rows = [cut.rows if cut is not None and i not in apart else None for i, cut in enumerate(cuts)]
        add = partial(summed, group=next(iter(known.values())).group)
        found = orthogonalised(given, largest, Shared(rows, add))
        return [apart[i].own(P) if i in apart else P for i, P in enumerate(found)]


def _in_two(cut: Cut, columns: int, largest: int | None) -> bool:
    """Whether a block of rows is in two processes."""
    whole = blocks(cut.rows, columns, largest)
    return whole is not None and not cut.keeps_whole(whole.size)
