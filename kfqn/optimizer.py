"""The step that every method here takes: look at a mini-batch, move the weights, look again, learn.

What differs between the methods is left to a few holes: what is watched, the state a layer
starts with, the direction, and what is learnt of the two factors.
"""

import contextlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.capture import Look, Seen, Watch
from kfqn.curvature import damped_inverse
from kfqn.groups import Group, LayeredOptimizer, Others, State
from kfqn.layers import Layer
from kfqn.ranks import Ranks
from kfqn.second_pass import random_state

Moments = dict[str, Tensor]  # what a layer starts from, each a mean over data
LayersSeen = dict[Layer, Seen]

_EMPTY = -1.0  # ``step`` of a state that is all zeros because nothing has been seen yet


class Move(NamedTuple):
    """A layer's step before it is taken: P, ⟨P, D̂W⟩, ‖P‖, and whether they can be those of a positive H."""

    P: Tensor
    slope: float
    norm: float
    sound: bool


class KroneckerOptimizer(LayeredOptimizer):
    """An optimizer with two Kronecker factors a layer, which looks at each mini-batch twice.

    A layer's state is in its `dtype` (at least float32): what `_shapes` says, and ``step``, the steps
    taken, on the CPU, ``counts`` and ``last`` for `diagnostics`; under the bias is ``step`` again. A step
    waits for the device twice, to see that first the gradients and then the directions are sound.
    """

    _counted: tuple[str, ...]  # what ``counts`` counts
    _first_look: Look

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
        super().__init__(model, defaults | {"refused": 0}, others, groups)
        self._begin()

    def _begin(self) -> None:
        """What is not saved: hooks, and the memory of the last pass."""
        self._ranks = Ranks(self._process_group)
        self._owners: dict[Layer, int] = {}
        self._stepped = False  # whether step() has been called since the last second pass
        self._watch = Watch(self._model, self._layers, self._first_look)

    def add_param_group(self, param_group: Group) -> None:
        before = {*self._layers}
        super().add_param_group(param_group)
        if "_watch" in self.__dict__:
            self._watch.add([layer for layer in self._layers if layer not in before])

    def __getstate__(self) -> dict[str, Any]:
        ours = ("_shard", "_error_if_nonfinite", "_warned")
        return super().__getstate__() | {key: self.__dict__[key] for key in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_watch" not in self.__dict__:
            self._process_group = None
            self._begin()

    def _meet(self) -> None:
        """Find the processes that train the model together, and follow it to another device or type."""
        running = self._watch.data_parallel
        if self._process_group is None and running is not None:
            self._process_group = running.process_group
            self._ranks = Ranks(self._process_group)
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
                _follow(state, self._shapes(layer, self._group(layer)).keys(), layer)

    def _share_out(self) -> None:
        """Say which process holds the factors of each layer: the largest first, to whom has least."""
        sizes = {
            layer: (layer.columns**2 + layer.rows**2) * math.prod(layer.groups) for layer in self._layers
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

    @abstractmethod
    def _check_closure(self, closure: Any) -> None:
        """Raise TypeError or ValueError for a closure that cannot be used, before it is called."""

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

    @abstractmethod
    def _average(self, DW: Tensor, state: State, group: Group) -> Tensor:
        """D̂W, (*g, I, C), from the mini-batch gradient DW (*g, I, C)."""

    @abstractmethod
    def _direction(self, DW: Tensor, state: State, group: Group) -> Tensor:
        """P in W ← W − α P, (*g, I, C), from D̂W."""

    def _accumulated(self, P: Tensor, state: State, group: Group) -> Tensor:
        """P with what a momentum of its own adds, after clipping."""
        return P

    @abstractmethod
    def _learn(self, seen: LayersSeen, closure: Any) -> None:
        """After the step: look again with the closure if there is one, and take in both looks."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step: a pass, the update of the weights, a second pass, the update of curvature.

        ``closure`` clears the gradients, computes the loss as a mean over the batch,
        calls ``backward`` and returns the loss; `kfqn.closure` makes one. It is run twice (three times in
        KFAC's first step without a warm start), must use the same batch every time, and draw
        its random numbers from torch; all runs but the first leave no trace in the model
        (`kfqn.second_pass`). Several forward passes, each followed by its backward pass, are
        micro-batches of one batch. A layer that the batch gives no gradient is left as it is.

        Without a closure the gradients are those that are there, and nothing is learnt before `second_pass`.

        A step whose loss or gradients are not finite is refused: weights and state stay as they are,
        and it is counted, with a warning the first time; with ``error_if_nonfinite`` it raises
        FloatingPointError instead.

        Returns the loss of the first call. Raises TypeError for a closure that cannot be used
        or returns no tensor, RuntimeError if no layer ran or none got a gradient, and
        ValueError for an input of the wrong kind; if the first call shows it, weights and state
        are then as before. If the second fails, the step is taken but nothing is learnt from it.
        """
        loss = None
        if closure is not None:
            self._check_closure(closure)
            loss = self._first_call(closure)
        with self._full_precision():
            seen = self._move(loss, closure)
        if seen:
            self._learn(seen, closure)
        return loss

    def _first_call(self, closure: Callable[[], Any]) -> Tensor:
        """The loss, from a pass that is watched."""
        self._watch.forget()
        self._rewind = random_state({layer.weight.device for layer in self._layers})
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure given to {self._name}.step must return the loss as a tensor, but "
                f"returned {type(loss).__name__}: end it with 'return loss'."
            )
        return loss

    def _move(self, loss: Tensor | None, closure: Any) -> LayersSeen | None:
        """Update the weights; what was seen of every layer that moved, or None if nothing did."""
        ran, seen = self._watch.ran, self._watch.take()
        if closure is not None and not seen and not ran:
            raise RuntimeError(self._nothing_ran)
        self._meet()
        gradients = self._gradients(seen)
        if closure is not None and not gradients:
            raise RuntimeError(
                f"the closure given to {self._name}.step left no gradient on any layer: call "
                "loss.backward() inside it, on a loss that depends on the model."
            )
        self._stepped = bool(gradients)
        if not self._finite(loss, gradients):
            return None
        self._start_from(self._missing(gradients), seen, closure)
        self._update(gradients, seen, closure)
        return {layer: seen[layer] for layer in gradients if layer in seen}

    def _gradients(self, seen: LayersSeen) -> dict[Layer, Tensor]:
        """DW of every layer that got a gradient, L2 included."""
        gradients: dict[Layer, Tensor] = {}
        for layer in self._layers:
            DW, group = layer.DW(), self._group(layer)
            if DW is None:
                continue
            if layer not in seen and self._ranks.size == 1 and not DW.any():
                if not self.state.get(layer.weight):  # torch.distributed.checkpoint asks for states this way
                    self._enter(layer, self._empty_state(layer))
                continue
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                DW.add_(layer.W(), alpha=group["weight_decay"])
            gradients[layer] = DW
        return gradients

    def _finite(self, loss: Tensor | None, gradients: Mapping[Layer, Tensor]) -> bool:
        """Whether the step can be taken; if not, that is counted, or FloatingPointError raised."""
        others = self._others.param_groups if self._others is not None else []
        values = [p.grad for group in others for p in group["params"] if p.grad is not None]
        values += gradients.values()
        values += [] if loss is None else [loss.detach()]
        if not values:
            return True
        each = [torch.linalg.vector_norm(v, math.inf).isfinite().to(values[0].device) for v in values]
        if self._ranks.all(torch.stack(each).all()):
            return True
        message = "the loss or a gradient is not finite, so the step was refused and nothing was changed"
        if self._error_if_nonfinite:
            raise FloatingPointError(f"{message}: look for too large a learning rate or bad data.")
        for group in self._own_groups():
            group["refused"] += 1
        self._warn(f"{message}; this is said once, and diagnostics() counts how often it happens.")
        return False

    def _update(self, gradients: Mapping[Layer, Tensor], seen: LayersSeen, closure: Any) -> None:
        """Move every parameter; a layer whose factors turn out to be broken starts anew first."""
        averages = {
            layer: self._average(DW, self.state[layer.weight], self._group(layer))
            for layer, DW in gradients.items()
            if self._owns(layer)
        }
        moves = self._moves(gradients, averages)
        broken = [layer for layer, move in moves.items() if not move.sound]
        if broken:
            self._reset(broken, seen, closure)
            moves |= self._moves(broken, averages)
        for group in self._own_groups():
            self._apply({layer: move for layer, move in moves.items() if self._group(layer) is group}, group)
        if self._others is not None:
            self._others.step()

    def _moves(self, layers: Iterable[Layer], averages: Mapping[Layer, Tensor]) -> dict[Layer, Move]:
        """The steps of these layers before they are taken; P is empty where the factors are elsewhere."""
        directions, own = {}, {}
        for layer in layers:
            directions[layer] = layer.W().new_empty(0)
            if self._owns(layer):
                DW, state = averages[layer], self.state[layer.weight]
                P = directions[layer] = self._direction(DW, state, self._group(layer))
                norms = [torch.linalg.vector_norm(x) for x in (P, DW)]
                reach = torch.linalg.vector_norm(layer.weight, math.inf).to(P.dtype)
                own[layer] = torch.stack([torch.linalg.vecdot(P.flatten(), DW.flatten()), *norms, reach])
        if not own and self._ranks.size == 1:
            return {}
        shared = self._ranks.means(own, dict.fromkeys(directions, (4,)), self._layers[0].W())
        numbers = torch.stack([shared[layer] for layer in directions]).tolist()
        return {
            layer: self._judged(layer, P, *of_layer)
            for (layer, P), of_layer in zip(directions.items(), numbers, strict=True)
        }

    def _judged(
        self, layer: Layer, P: Tensor, slope: float, norm: float, norm_DW: float, reach: float
    ) -> Move:
        """A positive H has ⟨P, D̂W⟩ ≥ 0, up to rounding; weights must stay in the range of their type."""
        rounding = math.sqrt(torch.finfo(layer.dtype).eps) * norm * norm_DW
        limit = torch.finfo(layer.weight.dtype).max
        sound = (
            math.isfinite(slope) and slope >= -rounding and reach + self._group(layer)["lr"] * norm < limit
        )
        return Move(P, slope, norm, sound)

    def _apply(self, moves: Mapping[Layer, Move], group: Group) -> None:
        """W ← W − α P for the layers of a group; what is still not sound is left where it is."""
        lr = float(group["lr"])
        moves = {layer: move for layer, move in moves.items() if move.sound}
        scale = 1.0
        if group["clip"] is not None:
            change = lr**2 * sum(move.slope for move in moves.values())
            scale = math.sqrt(group["clip"] / change) if change > group["clip"] else 1.0
        for layer, move in moves.items():
            P = move.P if scale == 1 else move.P * scale
            if self._owns(layer):
                state = self.state[layer.weight]
                P = self._accumulated(P, state, group)
                for p in layer.parameters():
                    self.state[p]["step"] += 1
                state["last"][0] = lr * scale * move.norm
            else:
                P = layer.W()
            self._ranks.send(P, self._owners.get(layer))
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                layer.set_(layer.W().mul_(1 - lr * group["weight_decay"]))
            layer.add_(P, alpha=-lr)

    def _reset(self, layers: Sequence[Layer], seen: LayersSeen, closure: Any) -> None:
        """Start these layers anew from this mini-batch; what is averaged over steps is kept.

        One whose inputs are too large even for that keeps its state, and does not move.
        """
        for layer in layers:
            old = self.state.get(layer.weight, {})
            kept = {key: old[key] for key in ("DW", "step", "counts", "last") if key in old}
            with contextlib.suppress(ValueError):
                if layer in seen or self._ranks.size > 1:
                    self._start_from([layer], seen, closure)
                    if self._owns(layer):
                        self._enter(layer, self.state[layer.weight] | kept)
                        self._count(self.state[layer.weight], {"resets": 1})
        self._warn(
            f"the factors of {layers[0]} were no longer finite and positive and start anew; this is said "
            "once, and diagnostics() counts how often it happens."
        )

    def _missing(self, layers: Iterable[Layer]) -> list[Layer]:
        """Which of the layers have no state to step with, in any process."""
        wanted = [*layers]
        ready = [
            self.state.get(w, {}).get("step", _EMPTY) != _EMPTY for w in (layer.weight for layer in wanted)
        ]
        if self._shard and wanted:
            ready = self._ranks.any(torch.tensor(ready)).tolist()
        return [layer for layer, there in zip(wanted, ready, strict=True) if not there]

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
            like = layer.W()
            found[layer] = self._ranks.means(own.get(layer, {}), self._moment_shapes(layer), like)
            if not found[layer]:
                raise RuntimeError(
                    f"{layer} got a gradient, but no call of its module was seen that gives one: call the "
                    "module itself in the model's forward, or train it by the other rule with "
                    f"groups=[{{'modules': '{layer.names[0]}', 'first_order': True}}]."
                )
        return found

    def _start_layers(self, moments: Mapping[Layer, Moments]) -> None:
        """The states of the given layers: all of them, or on an error none."""
        states = {
            layer: self._empty_state(layer) | self._start(layer, moments[layer], self._group(layer))
            for layer in moments
            if self._owns(layer)
        }
        for layer, state in states.items():
            self._enter(layer, state | {"step": torch.zeros(())})

    def _enter(self, layer: Layer, state: State) -> None:
        """Make this the layer's state; torch.distributed.checkpoint wants every parameter to have one."""
        self.state[layer.weight] = {key: value.contiguous() for key, value in state.items()}
        if layer.bias is not None:
            self.state[layer.bias] = {"step": state["step"].clone()}

    def _empty_state(self, layer: Layer) -> State:
        like = layer.W()
        zeros = {key: like.new_zeros(shape) for key, shape in self._shapes(layer, self._group(layer)).items()}
        counts = torch.zeros(len(self._counted), device=like.device)
        return zeros | {"step": torch.tensor(_EMPTY), "counts": counts, "last": counts.new_zeros(2)}

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

    def _count(self, state: State, increments: Mapping[str, Tensor | int]) -> None:
        for name, increment in increments.items():
            state["counts"][self._counted.index(name)] += increment

    def _own_groups(self) -> list[Group]:
        return [self.param_groups[place] for place in sorted({*self._places.values()})]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{self._name}: {message}", RuntimeWarning, stacklevel=2)

    def _full_precision(self) -> torch.autocast:
        """Our own arithmetic is never done in lower precision, whatever surrounds the step."""
        return torch.autocast(self._layers[0].weight.device.type, enabled=False)

    @property
    def _nothing_ran(self) -> str:
        return (
            f"{self._name} saw no forward pass through any of its {len(self._layers)} layers, the first "
            f"being {self._layers[0]}: run the very model the optimizer was built with, and if it has been "
            "compiled and run before, call torch._dynamo.reset() first: compiled code ignores new hooks."
        )


def _follow(state: State, factors: Set[str], layer: Layer) -> None:
    """Bring a state to where the layer's weight is, and into its type."""
    device = layer.weight.device
    for key in state.keys() & factors:
        if state[key].device != device or state[key].dtype != layer.dtype:
            state[key] = state[key].to(device, layer.dtype)
    for key in ("counts", "last"):
        state[key] = state[key].to(device)


def inverse_factor(layer: Layer, A: Tensor, damping: float | Tensor, name: str) -> Tensor:
    """(A + damping I)⁻¹; ValueError, naming the layer, if A is not finite."""
    try:
        return damped_inverse(A, damping)
    except ValueError as error:
        raise ValueError(
            f"{layer} has no {name}, because {error}: look for NaN, infinite or huge values in what comes "
            "into it."
        ) from None
