"""The state of every layer: how it starts, which process holds it, and how it is saved and loaded."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kfqn.formulas.rows import Rows
from kfqn.parameters.groups import Group, Groups, Shapes, State
from kfqn.parameters.layers import Layer
from kfqn.parameters.shards import is_sharded
from kfqn.runtime.ranks import Ranks

EMPTY = -1.0  # ``step`` of a state that is all zeros because nothing has been seen yet
NOTES = ("step", "counts", "last", "ahead")  # in a layer's state beside its tensors


@final
class States:
    """What is kept of every layer under its weight, in its `dtype` (at least float32).

    Beside the tensors of its parts: ``step``, the steps taken, on the CPU; ``counts`` of what ``counted``
    names; ``last``, the norm of the last αP and sᵀy/yᵀHy. Under the bias is ``step`` again.
    """

    def __init__(
        self,
        groups: Groups,
        shapes: Shapes,
        halved: Callable[[Group], bool],
        counted: Sequence[str],
        process_group: Any,
        shard: bool,
    ) -> None:
        self.groups, self.shapes, self.halved, self.counted = groups, shapes, halved, counted
        self.ranks, self.process_group, self.shard = Ranks(process_group), process_group, shard
        self.owners: dict[Layer, int] = {}

    def of(self, layer: Layer) -> State:
        """The layer's state; empty where there is none, or of what is kept of all weights alone."""
        found: State = self.groups.state.get(layer.weight, {})
        return found if "step" in found else {}

    def owns(self, layer: Layer) -> bool:
        """Whether this process holds the layer's factors."""
        return not self.owners or self.owners[layer] == self.ranks.rank

    def missing(self, layers: Iterable[Layer]) -> list[Layer]:
        """Which of the layers have no state to step with, in any process."""
        wanted = [*layers]
        ready = [float(self.of(layer).get("step", EMPTY)) != EMPTY for layer in wanted]
        if self.shard and wanted:
            device = self.groups.layers[0].weight.device
            ready = self.ranks.any(torch.tensor(ready, device=device)).tolist()
        return [layer for layer, there in zip(wanted, ready, strict=True) if not there]

    def dtype(self, layer: Layer, key: str) -> torch.dtype:
        """What this of the layer's state is kept in."""
        return torch.bfloat16 if key == "DW" and self.halved(self.groups.of(layer)) else layer.dtype

    def bytes(self, layer: Layer) -> int:
        """How many bytes the layer's state has, beside notes."""
        shapes = self.shapes(layer, self.groups.of(layer))
        return sum(math.prod(shape) * self.dtype(layer, key).itemsize for key, shape in shapes.items())

    def empty(self, layer: Layer) -> State:
        """A state of zeros."""
        like = layer.empty()
        shapes = self.shapes(layer, self.groups.of(layer))
        zeros = {key: like.new_zeros(shape) for key, shape in shapes.items() if key != "DW"}
        if "DW" in shapes:
            zeros["DW"] = layer.zeros(self.dtype(layer, "DW"))
        counts = torch.zeros(len(self.counted), device=like.device)
        empty = torch.tensor(EMPTY, device="cpu")
        return zeros | {"step": empty, "counts": counts, "last": counts.new_zeros(2)}

    def enter(self, layer: Layer, state: State) -> None:
        """Make this the layer's state; torch.distributed.checkpoint wants every parameter to have one."""
        own = self.groups.state
        own[layer.weight] = _ahead(own, layer.weight) | {key: x.contiguous() for key, x in state.items()}
        if layer.bias is not None:
            own[layer.bias] = _ahead(own, layer.bias) | {"step": state["step"].clone()}

    def start(self, states: Mapping[Layer, State]) -> None:
        """Enter the first states of layers, of which only what is not zero is given."""
        for layer, state in {layer: self.empty(layer) | states[layer] for layer in states}.items():
            self.enter(layer, state | {"step": torch.zeros((), device="cpu")})

    def forget_lengths(self, layers: Iterable[Layer]) -> None:
        """These layers do not move in this step."""
        for layer in layers:
            if self.of(layer):
                self.of(layer)["last"][0].zero_()

    def count(self, layer: Layer, increments: Mapping[str, Tensor | int]) -> None:
        """Add to a layer's ``counts``."""
        for name, increment in increments.items():
            self.of(layer)["counts"][self.counted.index(name)] += increment

    def count_rows(self, states: Sequence[State], rows: Rows, flags: Mapping[str, Tensor]) -> None:
        """Count in every layer's state the flags, (rows, 1), of its rows."""
        none = torch.zeros_like(next(iter(flags.values())))
        table = torch.cat([flags.get(name, none) for name in self.counted], dim=1).float()
        counts = [state["counts"] for state in states]
        sums = [of_layer[0] if len(of_layer) == 1 else of_layer.sum(0) for of_layer in rows.by_layer(table)]
        torch._foreach_add_(counts, sums)

    def sync(self, running: DistributedDataParallel | None) -> None:
        """Find the processes that train the model together, and bring states to where the layers are."""
        if self.process_group is None and running is not None:
            self.process_group = running.process_group
            self.ranks.join(running.process_group)
            for layer in self.groups.layers if not self.shard else []:  # each may have warm-started by itself
                for value in self.of(layer).values():
                    self.ranks.send(value, 0)
        if self.shard and self.ranks.size > 1:
            self._partition()
        for layer in self.groups.layers:
            state = self.of(layer)
            if is_sharded(layer.modules[0].weight) and not layer.sharded:
                raise ValueError(
                    f"{layer} was sharded after {self.groups.name} was built, which does not know its "
                    "parameters any more: call fully_shard first."
                )
            if state and not self.owns(layer):
                for p in layer.parameters():
                    kept = _ahead(self.groups.state, p)
                    self.groups.state.pop(p, None)
                    self.groups.state |= {p: kept} if kept else {}
            elif state:
                _to(state, layer)

    def _partition(self) -> None:
        """Say which process holds the factors of each layer: the largest first, to whom has least."""
        groups = self.groups
        sizes = {layer: self.bytes(layer) for layer in groups.layers}
        loads = [0] * self.ranks.size
        for layer, owner in self.owners.items():
            loads[owner] += sizes[layer]
        for layer in sorted(sizes.keys() - self.owners.keys(), key=lambda layer: (-sizes[layer], layer.name)):
            self.owners[layer] = loads.index(min(loads))
            loads[self.owners[layer]] += sizes[layer]

    def loaded(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict as it is to be loaded: a setting that a group was saved without is the default.

        Raises ValueError for the state of another method, another model or an earlier version.
        """
        groups, places = self.groups, {*self.groups.places.values()}
        completed = [
            {**{key: groups.defaults[key] for key in groups.defaults if key not in group}, **group}
            if place in places
            else group
            for place, group in enumerate(saved["param_groups"])
        ]
        state_dict = {**saved, "param_groups": completed}
        layers, fallback = {layer.weight: layer for layer in groups.layers}, self._of_fallback()
        for p, state, group in self._pairs(state_dict):
            self._check_sharding(p, layers.get(p), state)
            if state.keys() - {"ahead"} and p not in fallback:
                self._check(layers.get(p), state, group)
        of_layers = [group for place, group in enumerate(saved["param_groups"]) if place in places]
        if any("progress" not in group for group in of_layers):
            raise ValueError(
                f"this state is not {groups.name}'s, or was saved by an earlier version of kfqn, which kept "
                "what it had found elsewhere in its groups: load the weights alone, and start anew."
            )
        return state_dict

    def _check_sharding(self, p: Tensor, layer: Layer | None, state: State) -> None:
        """Raise ValueError if a whole state was saved for a sharded parameter, or the other way round."""
        expected = {"ahead": is_sharded(p), "DW": layer is not None and layer.cut is not None}
        if any(is_sharded(state[key]) != there for key, there in expected.items() if key in state):
            was, now = ("whole", "sharded") if is_sharded(p) else ("sharded", "whole")
            raise ValueError(
                f"this state of {self.groups.name} is of a model that was {was}, but this one is {now}: "
                "save and load it with torch.distributed.checkpoint, which shares it out anew."
            )

    def _pairs(self, saved: Mapping[str, Any]) -> list[tuple[Tensor, State, Group]]:
        """Every parameter with what was saved of it, and of its group."""
        return [
            (p, saved["state"].get(i, {}), of_group)
            for group, of_group in zip(self.groups.param_groups, saved["param_groups"], strict=False)
            for p, i in zip(group["params"], of_group["params"], strict=False)
        ]

    def _of_fallback(self) -> set[Tensor]:
        return {p for place in self.groups.fallback_places for p in self.groups.param_groups[place]["params"]}

    def _check(self, layer: Layer | None, state: State, group: Group) -> None:
        """Raise ValueError unless the saved state is of this optimizer and of this layer's shape."""
        saved = {
            key: tuple(v.shape) for key, v in state.items() if isinstance(v, Tensor) and key not in NOTES
        }
        expected = self.shapes(layer, group) if layer is not None else {}
        if saved != expected:
            raise ValueError(
                f"this state is not {self.groups.name}'s for {layer or 'a bias'}: it holds {saved} where "
                f"{expected} belongs; load it into the optimizer and model it was saved from."
            )

    def take(self, saved: Mapping[str, Any]) -> None:
        """After torch has loaded it: copies, in each layer's own `dtype`.

        torch casts factors to the weight's type, which loses half their digits for a bfloat16 weight, and
        shares their memory with what was saved.
        """
        layers, fallback = {layer.weight: layer for layer in self.groups.layers}, self._of_fallback()
        for p, state, _ in self._pairs(saved):
            own = self.groups.state
            for key, value in state.items():
                if key == "step" and p not in fallback:  # a plain number in what torch saved long ago
                    own[p][key] = torch.as_tensor(value, device="cpu").clone()
                elif p in layers:
                    dtype = value.dtype if key in NOTES else self.dtype(layers[p], key)
                    own[p][key] = value.to(p.device, dtype, copy=True)
                elif isinstance(value, Tensor):
                    own[p][key] = own[p][key].clone()


def _ahead(states: Mapping[Tensor, State], p: Tensor) -> State:
    """What is kept of a weight whoever has its factors, and whatever becomes of them (`kfqn.iterates`)."""
    return {key: x for key, x in states.get(p, {}).items() if key == "ahead"}


def _to(state: State, layer: Layer) -> None:
    """Bring a state to where the layer's weight is, and what is no note, nor in bfloat16, into its type."""
    device, dtype = layer.weight.device, layer.dtype
    for key, value in state.items():
        wanted = value.dtype if key in NOTES or value.dtype == torch.bfloat16 else dtype
        if key != "step" and (value.device != device or value.dtype != wanted):
            state[key] = value.to(device, wanted)


def full_precision(layers: Sequence[Layer]) -> torch.autocast:
    """Our own arithmetic is never done in lower precision, whatever surrounds the step."""
    return torch.autocast(layers[0].weight.device.type, enabled=False)


def unsynchronised(running: DistributedDataParallel | None) -> contextlib.AbstractContextManager[None]:
    """Around a pass without weight gradients, which `DistributedDataParallel` is not to wait for."""
    return running.no_sync() if running is not None else contextlib.nullcontext()
