"""Learning from the change between two passes of the same loss: what the quasi-Newton methods share."""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kfqn.capture import Seen, capture
from kfqn.closures import Closure
from kfqn.curvature import mean_preactivation, mean_preactivation_gradient, second_moment
from kfqn.layers import Layer
from kfqn.optimizer import Group, KroneckerOptimizer, Moments, State, inverse_factor
from kfqn.second_pass import Rewind, second_pass, unmoved_buffers


class TwoPassOptimizer(KroneckerOptimizer):
    """The loop of Algorithm 2 and of Algorithm 3: the same closure runs before and after the step.

    H_G learns how h̄ and Dh̄ change from one run to the other. A layer's first state has
    H_A = (A + λ_A I)⁻¹ and zeros elsewhere.
    """

    @abstractmethod
    def _direction(self, DW: Tensor, state: State, group: Group) -> Tensor:
        """P in W ← W − α P, (I, C), from the mini-batch gradient ``DW`` (I, C)."""

    @abstractmethod
    def _learn_G(self, dh: Tensor, dDh: Tensor, state: State, group: Group) -> None:
        """Take in how h̄ and Dh̄, (I,), changed from the first to the second pass."""

    @abstractmethod
    def _start_G(self, state: State) -> None:
        """Turn what the state holds of H_G, zeros so far, into H_G = I, in place."""

    def _check_closure(self, closure: Any) -> None:
        if not callable(closure):
            raise TypeError(
                f"{self._name}.step needs a closure that clears the gradients, computes the loss, "
                "calls backward and returns the loss, because it runs two passes over each batch."
            )

    def _first_pass(self) -> contextlib.AbstractContextManager[dict[Layer, Seen]]:
        return capture(self._layers, inputs=True, h=mean_preactivation, Dh=mean_preactivation_gradient)

    def _first_moments(self, before: dict[Layer, Seen], closure: Any, rewind: Rewind) -> dict[Layer, Moments]:
        with self._full_precision():
            return {layer: {"A": second_moment(layer, seen.input())} for layer, seen in before.items()}

    def _batch_moments(self, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        with unmoved_buffers(self._model), capture(self._layers, inputs=True) as seen:
            if isinstance(batch, Closure):
                batch.output()
            else:
                self._model(*batch if isinstance(batch, tuple | list) else (batch,))
        inputs = {layer: record.input() for layer, record in seen.items()}
        with self._full_precision():
            return {layer: ({"A": second_moment(layer, a)}, len(a)) for layer, a in inputs.items()}

    def _directions(self, gradients: dict[Layer, Tensor], group: Group) -> Iterator[tuple[Layer, Tensor]]:
        for layer, DW in gradients.items():
            yield layer, self._direction(DW, self.state[layer.weight], group)

    def _look_again(self, before: dict[Layer, Seen], closure: Any, rewind: Rewind) -> None:
        reductions = {"h": mean_preactivation, "Dh": mean_preactivation_gradient}
        with second_pass(self._model, rewind), torch.enable_grad():
            with capture(self._layers, inputs=False, **reductions) as after:
                closure()
        if not after:
            raise RuntimeError(
                f"the closure given to {self._name}.step ran no layer in its second call, so the step was "
                "taken without learning from it: it must do the same both times."
            )
        with self._full_precision():
            for layer, old in before.items():
                new = after.get(layer, Seen())
                if old.h is not None and old.Dh is not None and new.h is not None and new.Dh is not None:
                    self._learn_G(new.h - old.h, new.Dh - old.Dh, self.state[layer.weight], self._group)

    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:
        A, shapes = moments["A"], self._shapes(layer, group)
        zeros = {key: A.new_zeros(shape) for key, shape in shapes.items() if key != "H_A"}
        state = {"H_A": inverse_factor(layer, A, math.sqrt(group["damping"]), "H_A")} | zeros
        self._start_G(state)
        return state
