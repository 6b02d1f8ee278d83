"""Means over the processes that train one model together, and what they make of rows that they share out.

Only vectors are exchanged, three messages a step that is learnt from, four where H_G learns, and A at the
start; KFAC exchanges Ω and Γ.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kfqn.parameters.shards import Cut

Key = TypeVar("Key", bound=Hashable)


@final
class Ranks:
    """The processes of a group; without one (None) a single process, and nothing is communicated.

    Every process must make the same calls in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    def join(self, group: Any) -> None:
        """Be one of a group from now on."""
        self._group = group

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self._group) if self._group is not None else 1

    @property
    def rank(self) -> int:
        """Which this one is, from 0."""
        return dist.get_rank(self._group) if self._group is not None else 0

    def means(
        self, own: Mapping[Key, Tensor], shapes: Mapping[Key, Sequence[int]], like: Tensor
    ) -> dict[Key, Tensor]:
        """The mean of each tensor over the processes that have it; in one message.

        ``shapes`` is the same everywhere and says what there may be, in what order; ``like`` has the
        device and dtype of the message.
        """
        if self.size == 1:
            return dict(own)
        zero = [like.new_zeros(tuple(shape)) for shape in shapes.values()]
        sums = [own.get(key, z).to(like.dtype).flatten() for key, z in zip(shapes, zero, strict=True)]
        present = like.new_tensor([float(key in own) for key in shapes])
        message = torch.cat([present, *sums])
        dist.all_reduce(message, group=self._group)
        counts, *parts = message.split([len(zero), *(z.numel() for z in zero)])
        return {
            key: (part / count).view_as(z).to(own[key].dtype if key in own else like.dtype)
            for key, part, count, z in zip(shapes, parts, counts.tolist(), zero, strict=True)
            if count
        }

    def all(self, flags: Tensor) -> Tensor:
        """Where a boolean tensor is true in every process."""
        if self.size == 1:
            return flags
        least = flags.to(torch.int32)
        dist.all_reduce(least, dist.ReduceOp.MIN, self._group)
        return least.bool()

    def any(self, flags: Tensor) -> Tensor:
        """Where a boolean tensor is true in some process."""
        return ~self.all(~flags)

    def send(self, value: Tensor, owner: int | None) -> None:
        """Make ``value`` what it is in the process ``owner``, in place; nothing for None."""
        if owner is not None and self.size > 1:
            dist.broadcast(value, dist.get_global_rank(self._group, owner), self._group)


def summed(parts: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The sum of each tensor over the processes of a group; in one message a dtype."""
    results = [*parts]
    for members in _by_dtype(parts):
        message = torch.cat([parts[i].flatten() for i in members])
        dist.all_reduce(message, group=group)
        sums = message.split([parts[i].numel() for i in members])
        for i, total in zip(members, sums, strict=True):
            results[i] = total.view_as(parts[i])
    return results


def gathered(parts: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """The matrices of which each process has its own rows, all cut in one group; in one message a dtype."""
    results = [*parts]
    for members in _by_dtype(parts):
        filled = [F.pad(parts[i], (0, 0, 0, cuts[i].each - cuts[i].held)) for i in members]
        message = torch.cat([x.flatten() for x in filled])
        of_all = [torch.empty_like(message) for _ in range(cuts[members[0]].processes)]
        dist.all_gather(of_all, message, group=cuts[members[0]].group)
        pieces = zip(*(own.split([x.numel() for x in filled]) for own in of_all), strict=True)
        for i, of_matrix in zip(members, pieces, strict=True):
            results[i] = torch.cat(of_matrix).view(-1, parts[i].shape[1])[: cuts[i].rows]
    return results


def _by_dtype(parts: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors of one dtype."""
    found: dict[torch.dtype, list[int]] = {}
    for i, part in enumerate(parts):
        found.setdefault(part.dtype, []).append(i)
    return [*found.values()]
