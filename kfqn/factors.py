"""The factors of every layer: how they start, which process holds them, and what they tell of themselves."""

import contextlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.capture import Look, Watch
from kfqn.curvature import damped_inverse
from kfqn.groups import NOTES, Group, LayeredOptimizer, State
from kfqn.layers import Layer
from kfqn.others import Others
from kfqn.ranks import Ranks
from kfqn.rows import Rows
from kfqn.seen import Seen
from kfqn.settings import Factors, looks_absolute, with_factor

Moments = dict[str, Tensor]  # what a layer starts from, each a mean over data
LayersSeen = dict[Layer, Seen]

_EMPTY = -1.0  # ``step`` of a state that is all zeros because nothing has been seen yet


class FactoredOptimizer(LayeredOptimizer):
    """An optimizer that keeps two Kronecker factors a layer, and watches the model for what they learn from.

    A layer's state is in its `dtype` (at least float32): what `_shapes` says, and ``step``, the steps
    taken, on the CPU, ``counts`` and ``last`` for `diagnostics`; under the bias is ``step`` again.
    """

    _counted: tuple[str, ...]  # what ``counts`` counts
    _first_look: Look  # what is kept of a first pass

    def __init__(
        self,
        model: nn.Module,
        defaults: Group,
        others: Others,
        groups: Sequence[Mapping[str, Any]],
        process_group: Any,
        shard_factors: bool,
        error_if_nonfinite: bool,
    ) -> None:
        if process_group is None and isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        self._process_group, self._shard = process_group, shard_factors
        self._error_if_nonfinite = error_if_nonfinite
        self._warned: set[str] = set()
        common = {"bias_decay": 1.0, "momentum": None, "k": 0, "refused": 0}
        super().__init__(model, common | defaults, others, groups)
        self._begin()

    def _begin(self) -> None:
        """What is not saved: hooks, and the memory of the last pass."""
        self._ranks = Ranks(self._process_group)
        self._owners: dict[Layer, int] = {}
        self._factors: dict[int, Factors] = {}  # by the place of an automatic group that is new
        self._watch = Watch(self._model, self._layers, self._full_look())

    def _full_look(self) -> Look:
        """All that may have to be kept of a first pass."""
        return self._first_look

    def __getstate__(self) -> dict[str, Any]:
        ours = ("_shard", "_error_if_nonfinite", "_warned")
        return super().__getstate__() | {key: self.__dict__[key] for key in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_watch" not in self.__dict__:
            self._process_group = None
            self._begin()

    @abstractmethod
    def _first_moments(self, seen: LayersSeen, closure: Any) -> dict[Layer, Moments]:
        """What layers without state start from, when this was seen in the first pass."""

    @abstractmethod
    def _moment_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The shapes of what a layer starts from."""

    @abstractmethod
    def _batch_moments(self, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        """What layers would start from given one batch of a warm start, and of how many data."""

    @abstractmethod
    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:
        """The layer's state before its first step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._watch.drop()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._watch.look_first(self._full_look())

    def add_param_group(self, param_group: Group) -> None:
        before = {*self._layers}
        super().add_param_group(param_group)
        if "_watch" in self.__dict__:
            self._watch.add([layer for layer in self._layers if layer not in before])
            self._watch.look_first(self._full_look())

    @torch.no_grad()
    def warm_start(self, batches: Iterable[Any]) -> None:
        """Start every layer from means over ``batches``: line 2 of Algorithm 2, line 1 of Algorithm 5.

        ``batches`` yields inputs of the model: a tensor, or a tuple or list of positional
        arguments, the batch in the first dimension; or closures from `kfqn.closure`, which
        `KFAC` needs. The model is in the mode it is in; its buffers, BatchNorm's running
        statistics among them, do not move, nor do gradients. Earlier state of the layers that
        ran is dropped. Without a warm start, layers start from their first mini-batch.
        With several processes each gives its own batches, as many as the others.

        Raises ValueError without batches, and RuntimeError if no layer ran; state is
        then as it was.
        """
        self._meet()
        sums: dict[Layer, Moments] = {}
        data: dict[Layer, int] = {}
        count = 0
        for batch in batches:
            count += 1
            for layer, (moments, m) in self._batch_moments(batch).items():
                data[layer] = data.get(layer, 0) + m
                total = sums.setdefault(layer, {key: torch.zeros_like(v) for key, v in moments.items()})
                for key, value in moments.items():
                    total[key].add_(value, alpha=m)
        if count == 0:
            raise ValueError(
                "warm_start got no batches: give an iterable of model inputs, and a new one each time "
                "(a generator yields nothing twice)."
            )
        if not sums:
            raise RuntimeError(self._nothing_ran)
        for layer, total in sums.items():
            for value in total.values():
                value.div_(data[layer])
        self._start_layers(self._mean_moments([layer for layer in self._layers if layer in sums], sums))
        for group in map(self._group, sums):
            group["k"] = 0
        self._watch.look_first(self._full_look())

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What the factors of every layer are doing, by the layer's name.

        Counts since the start: ``steps``, and what the method counts, always among them ``resets``, how
        often the layer started anew because a factor was no longer positive. Of the last step:
        ``update``, the norm of α P, and ``ratio``, sᵀy/yᵀHy before damping (of the group where it is
        smallest; 0 for a method without). Now: the Frobenius norm of every factor. The entry ``""`` has
        ``refused``, how many steps were refused because a loss or gradient was not finite.
        """
        refused = max(group["refused"] for group in self._own_groups())
        found: dict[str, dict[str, float]] = {"": {"refused": float(refused)}}
        for layer in self._layers:
            state = self.state.get(layer.weight)
            if not state:
                continue
            norms = {f"norm {key}": state[key].norm() for key in state if key.startswith("H_")}
            values = [state["step"].clamp(min=0), *state["counts"], *state["last"], *norms.values()]
            names = ["steps", *self._counted, "update", "ratio", *norms]
            found[layer.name] = dict(zip(names, [float(v) for v in values], strict=True))
        return found

    def _start_from(self, layers: Sequence[Layer], seen: LayersSeen, closure: Any) -> None:
        """The states of the given layers, from this mini-batch: all of them, or on an error none."""
        if not layers:
            return
        moments = self._first_moments({layer: seen[layer] for layer in layers if layer in seen}, closure)
        self._start_layers(self._mean_moments(layers, moments))

    def _mean_moments(self, layers: Sequence[Layer], own: Mapping[Layer, Moments]) -> dict[Layer, Moments]:
        """Means over the processes, a layer at a time because moments are large."""
        found = {}
        for layer in layers:
            like = layer.empty()
            found[layer] = self._ranks.means(own.get(layer, {}), self._moment_shapes(layer), like)
            if not found[layer]:
                if self._watch.blind:
                    raise RuntimeError(f"{layer} got a gradient, but {self._watch.blind}.")
                raise RuntimeError(
                    f"{layer} got a gradient, but no call of its module was seen that gives one: call the "
                    "module itself in the model's forward, or train it by the other rule with "
                    f"groups=[{{'modules': '{layer.names[0]}', 'first_order': True}}]."
                )
        return found

    def _start_layers(self, moments: Mapping[Layer, Moments]) -> None:
        """The states of the given layers: all of them, or on an error none."""
        with self._full_precision():
            states = {
                layer: self._empty_state(layer) | self._start(layer, moments[layer], self._group(layer))
                for layer in moments
                if self._owns(layer)
            }
        for layer, state in states.items():
            self._enter(layer, state | {"step": torch.zeros((), device="cpu")})

    def _enter(self, layer: Layer, state: State) -> None:
        """Make this the layer's state; torch.distributed.checkpoint wants every parameter to have one."""
        self.state[layer.weight] = {key: value.contiguous() for key, value in state.items()}
        if layer.bias is not None:
            self.state[layer.bias] = {"step": state["step"].clone()}

    def _empty_state(self, layer: Layer) -> State:
        like = layer.empty()
        zeros = {key: like.new_zeros(shape) for key, shape in self._shapes(layer, self._group(layer)).items()}
        counts = torch.zeros(len(self._counted), device=like.device)
        empty = torch.tensor(_EMPTY, device="cpu")
        return zeros | {"step": empty, "counts": counts, "last": counts.new_zeros(2)}

    def _missing(self, layers: Iterable[Layer]) -> list[Layer]:
        """Which of the layers have no state to step with, in any process."""
        wanted = [*layers]
        ready = [
            float(self.state.get(w, {}).get("step", _EMPTY)) != _EMPTY
            for w in (layer.weight for layer in wanted)
        ]
        if self._shard and wanted:
            ready = self._ranks.any(torch.tensor(ready, device=self._layers[0].weight.device)).tolist()
        return [layer for layer, there in zip(wanted, ready, strict=True) if not there]

    def _meet(self) -> None:
        """Find the processes that train the model together, and follow it to another device or type."""
        running = self._watch.data_parallel
        if self._process_group is None and running is not None:
            self._process_group = running.process_group
            self._ranks.join(running.process_group)
            for layer in self._layers if not self._shard else []:  # each may have warm-started by itself
                for value in self.state.get(layer.weight, {}).values():
                    self._ranks.send(value, 0)
        if self._shard and self._ranks.size > 1:
            self._share_out()
        for layer in self._layers:
            state = self.state.get(layer.weight)
            if state and not self._owns(layer):
                for p in layer.parameters():
                    self.state.pop(p, None)
            elif state:
                _follow(state, layer)

    def _share_out(self) -> None:
        """Say which process holds the factors of each layer: the largest first, to whom has least."""
        sizes = {
            layer: sum(map(math.prod, self._shapes(layer, self._group(layer)).values()))
            for layer in self._layers
        }
        loads = [0] * self._ranks.size
        for layer, owner in self._owners.items():
            loads[owner] += sizes[layer]
        for layer in sorted(
            sizes.keys() - self._owners.keys(), key=lambda layer: (-sizes[layer], layer.name)
        ):
            self._owners[layer] = loads.index(min(loads))
            loads[self._owners[layer]] += sizes[layer]

    def _owns(self, layer: Layer) -> bool:
        """Whether this process holds the layer's factors."""
        return not self._owners or self._owners[layer] == self._ranks.rank

    def _own_groups(self) -> list[Group]:
        return [self.param_groups[place] for place in sorted({*self._places.values()})]

    def _unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """Around a pass without weight gradients, which `DistributedDataParallel` is not to wait for."""
        running = self._watch.data_parallel
        return running.no_sync() if running is not None else contextlib.nullcontext()

    def _check_factors(self) -> None:
        """Warn once if ``lr`` of an automatic group looks like a learning rate; called at every step."""
        for place in {*self._places.values()}:
            group = self.param_groups[place]
            if not group.get("automatic") or (place not in self._factors and group["k"] > 0):
                continue  # what was before is not known of a run that is resumed
            seen = self._factors[place] = with_factor(self._factors.get(place, Factors()), float(group["lr"]))
            if "lr" not in self._warned and looks_absolute(seen, group):
                self._warned.add("lr")
                self._warn(
                    f"lr in a group was at most {seen.largest:g} in {seen.steps} steps, which looks like a "
                    "learning rate, but with lr='auto' it is a factor of what is found, 1 being all of it: "
                    "leave it at 1, let a schedule go from 1 to 0, or give the optimizer a number for lr."
                )

    def _count(self, state: State, increments: Mapping[str, Tensor | int]) -> None:
        for name, increment in increments.items():
            state["counts"][self._counted.index(name)] += increment

    def _count_rows(self, states: Sequence[State], rows: Rows, flags: Mapping[str, Tensor]) -> None:
        """Count in every layer's state the flags, (rows, 1), of its rows."""
        none = torch.zeros_like(next(iter(flags.values())))
        table = torch.cat([flags.get(name, none) for name in self._counted], dim=1).float()
        counts = [state["counts"] for state in states]
        sums = [of_layer[0] if len(of_layer) == 1 else of_layer.sum(0) for of_layer in rows.by_layer(table)]
        torch._foreach_add_(counts, sums)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{self._name}: {message}", RuntimeWarning, stacklevel=2)

    def _full_precision(self) -> torch.autocast:
        """Our own arithmetic is never done in lower precision, whatever surrounds the step."""
        return torch.autocast(self._layers[0].weight.device.type, enabled=False)

    @property
    def _nothing_ran(self) -> str:
        if self._watch.blind:
            return f"{self._name} saw no forward pass: {self._watch.blind}."
        return (
            f"{self._name} saw no forward pass through any of its {len(self._layers)} layers, the first "
            f"being {self._layers[0]}: run the very model the optimizer was built with, and if it has been "
            "compiled and run before, call torch._dynamo.reset() first: compiled code ignores new hooks."
        )


def _follow(state: State, layer: Layer) -> None:
    """Bring a state to where the layer's weight is, and what is no note into its type."""
    device, dtype = layer.weight.device, layer.dtype
    for key, value in state.items():
        if key != "step" and (value.device != device or (key not in NOTES and value.dtype != dtype)):
            state[key] = value.to(device, value.dtype if key in NOTES else dtype)


def inverse_factor(layer: Layer, A: Tensor, damping: float | Tensor, name: str) -> Tensor:
    """(A + damping I)⁻¹; ValueError, naming the layer, if A is not finite."""
    try:
        return damped_inverse(A, damping)
    except ValueError as error:
        raise ValueError(
            f"{layer} has no {name}, because {error}: look for NaN, infinite or huge values in what comes "
            "into it."
        ) from None
