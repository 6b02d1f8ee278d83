"""The step with two passes over one mini-batch, which every method here shares.

What differs between the methods is left to a few holes: the state a layer starts with, the
direction, and what is learnt of A and of G.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfqn.capture import Seen, capture
from kfqn.curvature import damped_inverse, second_moment
from kfqn.layers import Layer, layers_of
from kfqn.second_pass import random_state, second_pass, unmoved_buffers

State = dict[str, Tensor]
Group = dict[str, Any]


class TwoPassOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that looks at each mini-batch before and after its step.

    State is kept per layer, under the layer's weight, in the layer's `dtype` (at least
    float32). Scalars stay tensors: no step waits for the device.
    """

    def __init__(self, model: nn.Module, defaults: Group) -> None:
        self._model = model
        self._layers = layers_of(model)
        super().__init__([p for layer in self._layers for p in layer.parameters()], defaults)

    @abstractmethod
    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the layer's state."""

    @abstractmethod
    def _start(self, layer: Layer, A: Tensor, group: Group) -> State:
        """The layer's state before its first step, from A = E_n[Σ_t a_t a_tᵀ], (C, C)."""

    @abstractmethod
    def _direction(self, DW: Tensor, state: State, group: Group) -> Tensor:
        """P in W ← W − α P, (I, C), from the mini-batch gradient ``DW`` (I, C)."""

    @abstractmethod
    def _learn_A(self, layer: Layer, a: Tensor, state: State, group: Group) -> None:
        """Take in the layer's input ``a`` of the first pass, after the step."""

    @abstractmethod
    def _learn_G(self, dh: Tensor, dDh: Tensor, state: State, group: Group) -> None:
        """Take in how h̄ and Dh̄, (I,), changed from the first to the second pass."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One step: a pass, the update of the weights, a second pass, the update of curvature.

        ``closure`` clears the gradients, computes the loss as a mean over the batch,
        calls ``backward`` and returns the loss. It is called twice, must use the same
        batch both times, and draw its random numbers from torch; the second call leaves no
        trace in the model (`kfqn.second_pass`). A layer that the batch gives no gradient
        is left as it is.

        Returns the loss of the first call. Raises TypeError for a closure that is missing
        or returns no tensor, RuntimeError if no layer ran or none got a gradient, and
        ValueError for an input of the wrong kind; if the first call shows it, weights and state
        are then as before. If the second call fails, the step is taken but H_G is not updated.
        """
        if not callable(closure):
            raise TypeError(
                f"{self._name}.step needs a closure that clears the gradients, computes the loss, "
                "calls backward and returns the loss, because it runs two passes over each batch."
            )
        rewind = random_state({layer.weight.device for layer in self._layers})
        with torch.enable_grad(), capture(self._layers, inputs=True) as before:
            loss = closure()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure given to {self._name}.step must return the loss as a tensor, but "
                f"returned {type(loss).__name__}: end it with 'return loss'."
            )
        with torch.autocast(self._layers[0].weight.device.type, enabled=False):
            gradients = self._gradients(before)
            self._update(gradients, before)
        with second_pass(self._model, rewind), torch.enable_grad():  # line 10
            with capture(self._layers, inputs=False) as after:
                closure()
        if not after:
            raise RuntimeError(
                f"the closure given to {self._name}.step ran no layer in its second call, so the step was "
                "taken without learning from it: it must do the same both times."
            )
        with torch.autocast(self._layers[0].weight.device.type, enabled=False):
            for layer in gradients:  # lines 15-18
                old, new = before[layer], after.get(layer)
                if old.Dh is not None and new is not None and new.Dh is not None:
                    state = self.state[layer.weight]
                    self._learn_G(new.h - old.h, new.Dh - old.Dh, state, self._group)
        return loss

    def _update(self, gradients: dict[Layer, Tensor], before: dict[Layer, Seen]) -> None:
        """Everything between the two passes; the inputs seen in the first are let go."""
        starting = [layer for layer in gradients if layer.weight not in self.state]
        self._start_layers({layer: second_moment(layer, before[layer].input()) for layer in starting})
        group = self._group
        for layer, DW in gradients.items():  # Algorithm 2, lines 6-9
            layer.add_(self._direction(DW, self.state[layer.weight], group), alpha=-group["lr"])
        for layer in gradients:  # lines 12-14, before line 10: the pair is the first pass's
            self._learn_A(layer, before[layer].input(), self.state[layer.weight], group)
        for seen in before.values():
            seen.a = None

    @torch.no_grad()
    def warm_start(self, batches: Iterable[Any]) -> None:
        """Start every layer from the mean of A over ``batches`` (Algorithm 2, line 2).

        ``batches`` yields inputs of the model: a tensor, or a tuple or list of positional
        arguments, the batch in the first dimension. The model runs forward in the mode
        it is in; its buffers, BatchNorm's running statistics among them, do not move. Earlier
        state of the layers that ran is dropped. Without a warm start, A comes from the first
        mini-batch.

        Raises ValueError without batches, and RuntimeError if no layer ran; state is
        then as it was.
        """
        sums: dict[Layer, Tensor] = {}
        data: dict[Layer, int] = {}
        count = 0
        with unmoved_buffers(self._model):
            for batch in batches:
                count += 1
                arguments = batch if isinstance(batch, tuple | list) else (batch,)
                with capture(self._layers, inputs=True, gradients=False) as seen:
                    self._model(*arguments)
                for layer, record in seen.items():
                    a = record.input()
                    with torch.autocast(a.device.type, enabled=False):
                        A = second_moment(layer, a).mul_(len(a))
                    sums[layer] = sums[layer].add_(A) if layer in sums else A
                    data[layer] = data.get(layer, 0) + len(a)
        if count == 0:
            raise ValueError(
                "warm_start got no batches: give an iterable of model inputs, and a new one each time "
                "(a generator yields nothing twice)."
            )
        if not sums:
            raise RuntimeError(self._nothing_ran)
        self._start_layers({layer: A.div_(data[layer]) for layer, A in sums.items()})

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
        for p, state in states.items():
            if state:
                self._check_state(layers.get(p), state, state_dict["param_groups"][0])
        super().load_state_dict(state_dict)
        for p, state in states.items():
            for key, value in state.items():
                self.state[p][key] = value.to(p.device, layers[p].dtype, copy=True)

    def _check_state(self, layer: Layer | None, state: State, group: Group) -> None:
        """Raise ValueError unless the saved state is of this optimizer and of this layer's shape."""
        saved = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
        expected = {} if layer is None or "lr" not in group else self._shapes(layer, group)
        if saved != expected:
            raise ValueError(
                f"this state is not {self._name}'s for {layer or 'a bias'}: it holds {saved} where "
                f"{expected} belongs; load it into the optimizer and model it was saved from."
            )

    def add_param_group(self, param_group: Group) -> None:
        """Refused once the optimizer stands: its layers come from the model."""
        if self.param_groups:
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
        (group,) = self.param_groups
        return group

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

    def _start_layers(self, A: dict[Layer, Tensor]) -> None:
        """Line 2 of Algorithm 2 for the given layers: all of them, or on an error none."""
        states = {layer: self._start(layer, A[layer], self._group) for layer in A}
        for layer, state in states.items():
            self.state[layer.weight] = state


def start_state(layer: Layer, A: Tensor, shapes: dict[str, tuple[int, ...]], damping: float) -> State:
    """H_A = (A + √λ I)⁻¹ and zeros for the other tensors of these shapes."""
    zeros = {key: A.new_zeros(shape) for key, shape in shapes.items() if key != "H_A"}
    return {"H_A": inverse_of_A(layer, A, damping)} | zeros


def inverse_of_A(layer: Layer, A: Tensor, damping: float) -> Tensor:
    """(A + λ_A I)⁻¹ with λ_A = √λ; ValueError, naming the layer, if A is not finite."""
    try:
        return damped_inverse(A, math.sqrt(damping))
    except ValueError as error:
        raise ValueError(
            f"{layer} has no H_A, because {error}: look for NaN, infinite or huge values in what comes "
            "into it."
        ) from None


def checked_settings(
    lr: float,
    damping: float,
    beta: float,
    mu1: float,
    weight_decay: float,
    history_size: int | None = None,
) -> Group:
    """The settings as a group; ValueError for one that is out of range."""
    _check_range("lr", lr, 0)
    _check_range("damping", damping, 0)
    _check_range("beta", beta, 0, 1, closed=True)
    _check_range("mu1", mu1, 0, 1)
    _check_range("weight_decay", weight_decay, 0, closed=True)
    group = {"lr": lr, "damping": damping, "beta": beta, "mu1": mu1, "weight_decay": weight_decay}
    if history_size is None:
        return group
    if not isinstance(history_size, int) or history_size < 1:
        raise ValueError(f"history_size must be a whole number >= 1, got {history_size!r}.")
    return group | {"history_size": history_size}


def _check_range(
    name: str, value: float, low: float, high: float = math.inf, *, closed: bool = False
) -> None:
    """Raise ValueError unless low < value < high, or low ≤ value < high if ``closed``."""
    if not (low <= value < high if closed else low < value < high):
        bounds = f"{'>=' if closed else '>'} {low:g} and " + ("finite" if high == math.inf else f"< {high:g}")
        raise ValueError(f"{name} must be {bounds}, got {value}.")
