"""Parameters of which each process has a part: the DTensors that `fully_shard` (FSDP2) makes of them.

Of every parameter a process holds a run of rows, as `torch.chunk` deals them out: all have as many, but the
last ones may have fewer or none.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Cut(NamedTuple):
    """How the ``rows`` of a matrix are shared out over the ``processes`` of a group, of which this is one."""

    rows: int
    processes: int
    rank: int
    group: Any

    @property
    def each(self) -> int:
        """How many rows a process has, but for the last ones."""
        return math.ceil(self.rows / self.processes)

    @property
    def held(self) -> int:
        """How many this one has."""
        return max(0, min(self.rows - self.rank * self.each, self.each))

    def own(self, W: Tensor) -> Tensor:
        """A copy of this process's rows of the whole."""
        return W.narrow(0, min(self.rank * self.each, self.rows), self.held).clone()

    def keeps_whole(self, size: int) -> bool:
        """Whether no block of so many rows is in two processes."""
        return self.each % size == 0 or self.each >= self.rows


def is_sharded(x: Any) -> bool:
    """Whether this process has a part of a tensor only."""
    return _is_a(x, "DTensor")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module, so that its hooks gather parameters before it runs."""
    return _is_a(module, "FSDPModule")


def local(x: Any) -> Tensor:
    """This process's part of a tensor, in its memory."""
    part: Tensor = x.to_local() if is_sharded(x) else x
    return part


def whole(part: Tensor, like: Any) -> Tensor:
    """The whole of what each process has such a part of as of ``like``; all of them have to ask for it."""
    from torch.distributed.tensor import DTensor  # takes time, and is there where there are any

    given = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return given.full_tensor()


def part_of(W: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor that is to be shared out as ``like``."""
    sharding = like.placements[-1]
    cut = Cut(like.shape[sharding.dim], *place(like))
    return cut.own(W.movedim(sharding.dim, 0)).movedim(0, sharding.dim)


def cut_of(p: Any, dim: int) -> Cut | None:
    """How a parameter's rows are shared out, if these are its dimension ``dim``; None where they are not."""
    return Cut(p.shape[dim], *place(p)) if is_sharded(p) and p.placements[-1].dim == dim else None


def zeros(shape: Sequence[int], like: Any, dtype: torch.dtype) -> Tensor:
    """Zeros of this shape, whose first dimension is shared out as the rows of ``like`` are."""
    from torch.distributed.tensor import DTensor, Shard

    own = local(like).new_zeros((Cut(shape[0], *place(like)).held, *shape[1:]), dtype=dtype)
    return DTensor.from_local(
        own,
        like.device_mesh,
        [*like.placements[:-1], Shard(0)],
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))),
    )


def processes_of(p: Any) -> Any:
    """The group of all processes that have a part of a parameter, or a copy of one; None if it is whole."""
    if not is_sharded(p):
        return None
    mesh = p.device_mesh
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)


def reshard(model: nn.Module) -> None:
    """Have `fully_shard` drop what it has gathered, so that the model has its sharded parameters.

    The root keeps them whole after a forward pass, until a backward pass.
    """
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def wrongly_sharded(model: nn.Module) -> str | None:
    """Why a model is sharded in a way that its layers cannot be trained in; None if it is not."""
    for name, module in model.named_modules():
        if _is_a(module, "FullyShardedDataParallel"):
            return f"'{name or 'the model itself'}' is a FullyShardedDataParallel"
    managed = {p for module in model.modules() if is_fully_sharded(module) for p in module.parameters()}
    first: Any = None
    named: list[tuple[str, Any]] = [*model.named_parameters()]
    alone = [name for name, p in named if p.requires_grad and not is_sharded(p)]
    for name, p in named:
        for kind in ("ShardedTensor", "FlatParameter"):
            if _is_a(p, kind):
                return f"'{name}' is a {kind}"
        if not is_sharded(p):
            continue
        if p not in managed:
            return f"'{name}' is a DTensor that is not fully_shard's"
        if not _is_of_fully_shard(p):
            return f"'{name}' is a DTensor of placements {p.placements}"
        if alone:
            return f"'{alone[0]}' is not, so that nobody averages its gradient"
        if first is not None and p.device_mesh != first.device_mesh:
            return f"'{name}' is on another mesh than what comes before it"
        if p.device.type == "cpu" != p.device_mesh.device_type:
            return f"'{name}' is offloaded to the CPU"
        first = p
    return None


def _is_of_fully_shard(p: Any) -> bool:
    """Whether a DTensor is shared out on one dimension of its mesh, and copied along one at most."""
    return [type(x).__name__ for x in p.placements] in (["Shard"], ["Replicate", "Shard"])


def place(p: Any) -> tuple[int, int, Any]:
    """Of a DTensor: over how many processes it is shared out, which one this is, and their group."""
    mesh, dim = p.device_mesh, p.device_mesh.ndim - 1
    return mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim)


def _is_a(x: Any, name: str) -> bool:
    """Whether x is of a class of this name, which need not be imported to ask."""
    kind: Any = type(x)
    return name in _names(kind)


@cache
def _names(kind: type) -> set[str]:
    return {base.__name__ for base in kind.__mro__}
