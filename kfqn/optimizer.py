"""The step that every method here takes: look at a mini-batch, move the weights, look again, learn.

What differs between the methods is left to a few holes: what is watched, the state a layer
starts with, the direction, and what is learnt of the two factors.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfqn.capture import Seen
from kfqn.curvature import damped_inverse
from kfqn.layers import Layer, layers_of, other_parameters
from kfqn.second_pass import Rewind, random_state

State = dict[str, Tensor]
Group = dict[str, Any]
Moments = dict[str, Tensor]  # what a layer starts from, each a mean over data
Others = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What trains the parameters that belong to no layer, unless told otherwise."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


class KroneckerOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer with two Kronecker factors a layer, which looks at each mini-batch twice.

    State is kept per layer, under the layer's weight, in the layer's `dtype` (at least
    float32). Scalars stay tensors: no step waits for the device unless its method says so.
    Trainable parameters that belong to no layer are in parameter groups of their own, after the
    first, and trained by the torch optimizer that ``others`` makes of them.
    """

    def __init__(self, model: nn.Module, defaults: Group, others: Others) -> None:
        self._model = model
        self._layers = layers_of(model)
        self._other_parameters = other_parameters(model, self._layers)
        groups: list[Group] = [{"params": [p for layer in self._layers for p in layer.parameters()]}]
        self._others = others([*self._other_parameters.values()]) if self._other_parameters else None
        groups += self._others.param_groups if self._others is not None else []
        own = [set(group) for group in groups[1:]]
        self._complete = False
        super().__init__(groups, defaults)
        for group, keys in zip(self.param_groups[1:], own, strict=True):
            for key in group.keys() - keys:  # torch has put our defaults there
                del group[key]
        self._complete = True
        self._share()

    def _share(self) -> None:
        """Let the optimizer of the other parameters work on our groups and our state."""
        if self._others is not None:
            self._others.param_groups = self.param_groups[1:]
            self._others.state = self.state

    @abstractmethod
    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the layer's state."""

    @abstractmethod
    def _check_closure(self, closure: Any) -> None:
        """Raise TypeError or ValueError for a closure that cannot be used, before it is called."""

    @abstractmethod
    def _first_pass(self) -> contextlib.AbstractContextManager[dict[Layer, Seen]]:
        """Watch the first pass: keep inputs, and let ``Dh`` say which layers got a gradient."""

    @abstractmethod
    def _first_moments(self, before: dict[Layer, Seen], closure: Any, rewind: Rewind) -> dict[Layer, Moments]:
        """What layers without state start from, when they were seen in the first pass."""

    @abstractmethod
    def _batch_moments(self, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        """What layers would start from given one batch of a warm start, and of how many data."""

    @abstractmethod
    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:
        """The layer's state before its first step."""

    @abstractmethod
    def _directions(self, gradients: dict[Layer, Tensor], group: Group) -> Iterator[tuple[Layer, Tensor]]:
        """P in W ← W − α P, (I, C), for every layer, from its mini-batch gradient DW (I, C)."""

    @abstractmethod
    def _learn_A(self, layer: Layer, a: Tensor, state: State, group: Group) -> None:
        """Take in the layer's input ``a`` of the first pass, after the step."""

    @abstractmethod
    def _look_again(self, before: dict[Layer, Seen], closure: Any, rewind: Rewind) -> None:
        """Run the second pass and learn from it; ``before`` is what moved layers showed in the first."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One step: a pass, the update of the weights, a second pass, the update of curvature.

        ``closure`` clears the gradients, computes the loss as a mean over the batch,
        calls ``backward`` and returns the loss; `kfqn.closure` makes one. It is run twice (three times in
        KFAC's first step without a warm start), must use the same batch every time, and draw
        its random numbers from torch; all runs but the first leave no trace in the model
        (`kfqn.second_pass`). A layer that the batch gives no gradient is left as it is.

        Returns the loss of the first call. Raises TypeError for a closure that is missing
        or returns no tensor, RuntimeError if no layer ran or none got a gradient, and
        ValueError for an input of the wrong kind; if the first call shows it, weights and state
        are then as before. If the second fails, the step is taken but nothing is learnt from it.
        """
        self._check_closure(closure)
        rewind = random_state({layer.weight.device for layer in self._layers})
        with torch.enable_grad(), self._first_pass() as before:
            loss = closure()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure given to {self._name}.step must return the loss as a tensor, but "
                f"returned {type(loss).__name__}: end it with 'return loss'."
            )
        with self._full_precision():
            gradients = self._gradients(before)
        moved = {layer: before[layer] for layer in gradients}
        starting = {layer: seen for layer, seen in moved.items() if not self.state.get(layer.weight)}
        if starting:
            self._start_layers(self._first_moments(starting, closure, rewind))
        with self._full_precision():
            self._update(gradients, moved)
        self._look_again(moved, closure, rewind)
        return loss

    def _update(self, gradients: dict[Layer, Tensor], seen: dict[Layer, Seen]) -> None:
        """Everything between the two passes; the inputs seen in the first are let go."""
        group = self._group
        for layer, P in self._directions(gradients, group):
            layer.add_(P, alpha=-group["lr"])
        if self._others is not None:
            self._others.step()
        for layer, record in seen.items():
            self._learn_A(layer, record.input(), self.state[layer.weight], group)
            record.a = None

    @torch.no_grad()
    def warm_start(self, batches: Iterable[Any]) -> None:
        """Start every layer from means over ``batches``: line 2 of Algorithm 2, line 1 of Algorithm 5.

        ``batches`` yields inputs of the model: a tensor, or a tuple or list of positional
        arguments, the batch in the first dimension; or closures from `kfqn.closure`, which
        `KFAC` needs. The model is in the mode it is in; its buffers, BatchNorm's running
        statistics among them, do not move, nor do gradients. Earlier state of the layers that
        ran is dropped. Without a warm start, layers start from their first mini-batch.

        Raises ValueError without batches, and RuntimeError if no layer ran; state is
        then as it was.
        """
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
        self._start_layers(sums)

    def __getstate__(self) -> dict[str, Any]:
        """All of it, for `copy.deepcopy` and `pickle`; torch would leave the model and the layers out."""
        ours = ("_model", "_layers", "_other_parameters", "_others", "_complete")
        return super().__getstate__() | {key: self.__dict__[key] for key in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state saved by `state_dict`: copied, and in each layer's own `dtype`.

        torch would cast the factors to the weight's type, which loses half their digits for
        a bfloat16 weight, and would share their memory with ``state_dict``. Raises ValueError, with
        nothing changed, for the state of another method or another model.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        layers = {layer.weight: layer for layer in self._layers}
        states = {p: state_dict["state"].get(i, {}) for i, p in zip(saved, parameters, strict=False)}
        others = {id(p) for p in self._other_parameters.values()}
        for p, state in states.items():
            if state and id(p) not in others:
                self._check_state(layers.get(p), state, state_dict["param_groups"][0])
        super().load_state_dict(state_dict)
        for p, state in states.items():
            for key, value in state.items():
                if p in layers:
                    self.state[p][key] = value.to(p.device, layers[p].dtype, copy=True)
                elif isinstance(value, Tensor):
                    self.state[p][key] = self.state[p][key].clone()
        self._share()

    def _check_state(self, layer: Layer | None, state: State, group: Group) -> None:
        """Raise ValueError unless the saved state is of this optimizer and of this layer's shape."""
        saved = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
        ours = layer is not None and self.defaults.keys() <= group.keys()
        expected = self._shapes(layer, group) if ours and layer is not None else {}
        if saved != expected:
            raise ValueError(
                f"this state is not {self._name}'s for {layer or 'a bias'}: it holds {saved} where "
                f"{expected} belongs; load it into the optimizer and model it was saved from."
            )

    def add_param_group(self, param_group: Group) -> None:
        """Refused once the optimizer stands: its layers come from the model."""
        if self._complete:
            raise ValueError(
                f"{self._name} takes its layers from the model it is given, so a parameter group "
                "cannot be added: build a new optimizer after the model has changed."
            )
        super().add_param_group(param_group)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _nothing_ran(self) -> str:
        return (
            f"{self._name} saw no forward pass through any of its {len(self._layers)} layers, the first "
            f"being {self._layers[0]}: run the very model the optimizer was built with, and if it has been "
            "compiled and run before, call torch._dynamo.reset() first: compiled code ignores new hooks."
        )

    @property
    def _group(self) -> Group:
        return self.param_groups[0]

    def plan(self) -> str:
        """A table of what happens to every trainable parameter: its rule, its shape, its factors' bytes."""
        lines = [("parameters", "rule", "shape", "state, MB")]
        for layer in self._layers:
            size = torch.finfo(layer.dtype).bits // 8
            entries = sum(math.prod(shape) for shape in self._shapes(layer, self._group).values())
            shape = f"{layer.rows} × {layer.columns}"
            lines.append((layer.name or "the model", self._name, shape, f"{entries * size / 1e6:.3g}"))
        for name, p in self._other_parameters.items():
            shape = " × ".join(map(str, p.shape)) or "1"
            lines.append((name, type(self._others).__name__, shape, "–"))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def _full_precision(self) -> torch.autocast:
        """Our own arithmetic is never done in lower precision, whatever surrounds the step."""
        return torch.autocast(self._layers[0].weight.device.type, enabled=False)

    def _gradients(self, seen: dict[Layer, Seen]) -> dict[Layer, Tensor]:
        """DW of every layer that ran and got a gradient, L2 included."""
        if not seen:
            raise RuntimeError(self._nothing_ran)
        gradients: dict[Layer, Tensor] = {}
        for layer in seen:
            DW = layer.DW()
            if DW is not None and seen[layer].Dh is not None:
                weight_decay = self._group["weight_decay"]
                gradients[layer] = DW.add_(layer.W(), alpha=weight_decay) if weight_decay else DW
        if not gradients:
            raise RuntimeError(
                f"the closure given to {self._name}.step left no gradient on any layer: call "
                "loss.backward() inside it, on a loss that depends on the model."
            )
        return gradients

    def _start_layers(self, moments: dict[Layer, Moments]) -> None:
        """The states of the given layers: all of them, or on an error none."""
        states = {layer: self._start(layer, moments[layer], self._group) for layer in moments}
        for layer, state in states.items():
            self.state[layer.weight] = state


def inverse_factor(layer: Layer, A: Tensor, damping: float | Tensor, name: str) -> Tensor:
    """(A + damping I)⁻¹; ValueError, naming the layer, if A is not finite."""
    try:
        return damped_inverse(A, damping)
    except ValueError as error:
        raise ValueError(
            f"{layer} has no {name}, because {error}: look for NaN, infinite or huge values in what comes "
            "into it."
        ) from None
