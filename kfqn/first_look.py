"""What the first pass over a mini-batch tells: A of the layers' inputs, and h̄ and Dh̄ before the step."""

import math
import weakref
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfqn.capture import EarlyReduction, Look, nothing_of
from kfqn.closures import Closure
from kfqn.curvature import (
    mean_activation,
    mean_preactivation,
    mean_preactivation_gradient,
    second_moment,
)
from kfqn.factors import LayersSeen, Moments, inverse_factor
from kfqn.groups import Group, State
from kfqn.inputs import Inputs
from kfqn.layers import Layer
from kfqn.optimizer import KroneckerOptimizer
from kfqn.pairs import Early, First
from kfqn.second_pass import unmoved_buffers
from kfqn.seen import Seen

_PART = 10  # the gap between steps that are learnt from is so manyth a part of those so far
_PAIRS = 10  # the least gap between steps that H_G learns from, where others are judged


def gap(k: int, interval: int) -> int:
    """How many steps after k, counted from 0, to the next that is learnt from; at most ``interval``.

    About a tenth of k: a whole number with one digit that counts, because k is to be a multiple of it.
    """
    share = max(1, k // _PART)
    digits: int = 10 ** (len(str(share)) - 1)
    return min(interval, share // digits * digits)


def pair_gap(k: int, interval: int) -> int:
    """The same for steps from which H_G learns too, where the first ones are judged for their length."""
    return min(interval, max(_PAIRS, gap(k, interval)))


class LookingOptimizer(KroneckerOptimizer):
    """The first look of Algorithm 2 and of Algorithm 3: lines 12 and 13, and h̄ and Dh̄ of lines 15 and 16.

    A layer's first state has H_A = (A + λ_A I)⁻¹ and zeros elsewhere.
    """

    _first_look = Look(inputs=True, h=mean_preactivation, Dh=mean_preactivation_gradient)

    def _full_look(self) -> Look:
        early: EarlyReduction = weakref.WeakMethod(self._early)
        return replace(self._first_look, early=early)

    def _look_at_inputs(self) -> Look:
        """What is kept of a first pass from which only H_A learns."""
        return replace(self._full_look(), h=None, Dh=nothing_of)

    def _lambda_A(self, moments: Moments, group: Group) -> float | Tensor:
        """What is added to the A that H_A starts from, (*g, 1) or one number."""
        return math.sqrt(group["damping"])

    @abstractmethod
    def _start_G(self, state: State) -> None:
        """Turn what the state holds of H_G, zeros so far, into H_G = I, in place."""

    @abstractmethod
    def _probe(self, mean_a: Tensor, state: State) -> Tensor:
        """What A is asked for, (*g, C), given ā (*g, C): the s whose product A s is wanted."""

    @abstractmethod
    def _answer(self, layer: Layer, a: Tensor, s: Tensor) -> Tensor:
        """A s of an input of the layer, or what else of A the method learns from."""

    @abstractmethod
    def _answer_shape(self, layer: Layer) -> tuple[int, ...]:
        """The shape of `_answer`."""

    def _is_due(self, k: int, group: Group) -> bool:
        """Whether step k, counted from 0, is to be learnt from; at first every one is."""
        return k % gap(k, group["curvature_interval"]) == 0

    def _inputs(self, layer: Layer) -> Inputs:
        """The layer's inputs as H_A acts on them, cut into blocks where A would be too large."""
        return layer.inputs.in_blocks(self._group(layer).get("max_factor_size"))

    def _moment_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        inputs = self._inputs(layer)
        return {"A": (*inputs.groups, inputs.columns, inputs.columns), "vectors": ()}

    def _moments(self, record: Seen) -> Moments:
        """A of what was seen, or its blocks, and of how many a_t it is."""
        inputs = self._inputs(record.layer)
        A = record.sum(lambda use: second_moment(inputs, record.input(use)))
        return {"A": A, "vectors": A.new_full((), record.vectors)}

    def _first_moments(self, seen: LayersSeen, closure: Any) -> dict[Layer, Moments]:
        with self._full_precision():
            return {layer: self._moments(record) for layer, record in seen.items()}

    def _batch_moments(self, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        with unmoved_buffers(self._model), self._watch.looking(Look(inputs=True)) as seen:
            if isinstance(batch, Closure):
                batch.output()
            else:
                self._model(*batch if isinstance(batch, tuple | list) else (batch,))
        with self._full_precision():
            return {layer: (self._moments(record), record.data) for layer, record in seen.items()}

    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:
        A, shapes = moments["A"], self._shapes(layer, group)
        zeros = {key: A.new_zeros(shape) for key, shape in shapes.items() if key != "H_A"}
        state = {"H_A": inverse_factor(layer, A, self._lambda_A(moments, group), "H_A")} | zeros
        self._start_G(state)
        return state

    def _first_of(self, seen: LayersSeen, paired: set[Layer]) -> dict[Layer, First]:
        """What the first pass says of every layer, over all processes; of these, h̄ and Dh̄ too."""
        layers, like = self._layers, self._layers[0].empty()
        cut = {layer: self._inputs(layer) for layer in layers}
        columns = {layer: (*inputs.groups, inputs.columns) for layer, inputs in cut.items()}
        rows = {layer: (*layer.groups, layer.rows) for layer in layers}
        again = {layer: record.since(self._memory.since) for layer, record in seen.items()}
        again = {layer: record for layer, record in again.items() if record.uses}
        own = {(layer, "a"): self._mean_a(seen[layer]) for layer in again}
        shapes = {(layer, "a"): columns[layer] for layer in layers}
        shown = [layer for layer, record in again.items() if layer in paired and record.has_h]
        own |= {(layer, "h"): again[layer].h() for layer in shown}
        own |= {(layer, "Dh"): again[layer].Dh() for layer in shown}
        shapes |= {(layer, key): rows[layer] for key in ("h", "Dh") for layer in layers if layer in paired}
        means = self._ranks.means(own, shapes, like)
        known = [layer for layer in layers if (layer, "a") in means]
        probes = {
            layer: self._probe(means[layer, "a"], self.state[layer.weight])
            for layer in known
            if layer.weight in self.state and (layer not in again or again[layer].has_inputs)
        }
        probes |= {
            layer: record.uses[0].early.like(layer).s
            for layer, record in again.items()
            if not record.has_inputs
        }
        probes = self._ranks.means(probes, columns, like)
        answers = {layer: self._answers(seen[layer], probes[layer]) for layer in known if layer in again}
        answers = self._ranks.means(answers, {layer: self._answer_shape(layer) for layer in layers}, like)
        factors = {layer: seen[layer].data / record.data for layer, record in again.items()}
        return {
            layer: First(
                probes[layer],
                answers[layer],
                (means[layer, "h"], means[layer, "Dh"]) if (layer, "h") in means else None,
                factors.get(layer, 1.0),
            )
            for layer in known
        }

    def _mean_a(self, record: Seen) -> Tensor:
        """ā, (*g, C)."""
        inputs = self._inputs(record.layer)
        return record.mean(
            lambda use: (
                use.early.like(record.layer).a
                if use.early is not None
                else mean_activation(inputs, record.input(use))
            )
        )

    def _answers(self, record: Seen, s: Tensor) -> Tensor:
        """`_answer` of all the layer's inputs."""
        return record.sum(
            lambda use: (
                use.early.like(record.layer).As
                if use.early is not None
                else self._answer(record.layer, record.input(use), s)
            )
        )

    def _early(self, seen: Seen, a: Tensor) -> Early | None:
        """What is learnt from an input when its gradient arrives, so that nobody has to hold the input.

        Only where ā and A are likely to be this input's alone, because the layer was used once in the last
        pass that was learnt from, by one process. If it is used again after all, A is asked for the s of the
        first use, with which H_A learns no less.
        """
        first = seen.uses[0].early if seen.uses else None
        if first is None and (seen.uses or not self._likely_alone(seen.layer)):
            return None
        layer, state = seen.layer, self.state[seen.layer.weight]
        with torch.no_grad(), self._full_precision():
            a = a.to(layer.dtype)
            mean_a = mean_activation(self._inputs(layer), a)
            s = first.s if first is not None else self._probe(mean_a, state)
            return Early(mean_a, s, self._answer(layer, a, s))

    def _likely_alone(self, layer: Layer) -> bool:
        """Whether the next use of a layer is likely to be all that its H_A learns from."""
        H_A, group = self.state.get(layer.weight, {}).get("H_A"), self._group(layer)
        there = H_A is not None and (H_A.device, H_A.dtype) == (layer.weight.device, layer.dtype)
        met = self._watch.data_parallel is None or self._process_group is not None
        alone = layer in self._memory.used_once and met and self._ranks.size == 1
        return there and alone and layer not in self._memory.broken and self._is_due(group["k"], group)
