"""Algorithm 2 of Ren and Goldfarb as a rule of curvature: what is kept of passes, and what is learnt of it.

Line numbers are of Algorithm 2; Algorithm 3 has the same loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from kfqn.closures import Closure
from kfqn.curvature.damping import Shapes
from kfqn.curvature.input_factor import InputFactor
from kfqn.curvature.pairs import ReducedInput
from kfqn.formulas.inputs import Inputs
from kfqn.formulas.statistics import (
    mean_activation,
    mean_preactivation,
    mean_preactivation_gradient,
)
from kfqn.learning.queries import first_statistics, paired
from kfqn.learning.secants import learn_from
from kfqn.learning.second_pass import closure_pass
from kfqn.parameters.groups import Group, State
from kfqn.parameters.layers import Layer
from kfqn.parameters.settings import largest_block
from kfqn.parts import Chosen
from kfqn.passes.record import LayerRecord, PassSpec, nothing_of
from kfqn.passes.replay import unmoved_buffers
from kfqn.state import full_precision
from kfqn.steps.rule import NO_SECOND_PASS
from kfqn.training import Curvature, Moments, Records, Training

SPEC = PassSpec(inputs=True, h=mean_preactivation, Dh=mean_preactivation_gradient)


@final
@dataclass(frozen=True)
class QuasiNewton(Curvature):
    """Algorithm 2, and with other parts Algorithm 3: the loss of one batch before and after the step.

    A layer's state: ``DW`` (I, C) the averaged gradient, what its input factor keeps of H_A and its output
    factor of H_G, ``s_G`` and ``y_G`` (I,) the averaged pair, and what its damping keeps. Of a factor larger
    than ``max_factor_size`` the b blocks on its diagonal are kept, (b, …).
    """

    shards = True
    counted = ("resets", "A taken", "A skipped", "G taken", "G damped", "G skipped")

    def check_closure(self, name: str, closure: Any) -> None:
        if not callable(closure):
            raise TypeError(
                f"{name}.step takes a closure that clears the gradients, computes the loss, "
                f"calls backward and returns the loss, but got {type(closure).__name__}."
            )

    def shapes(self, layer: Layer, group: Group, parts: Chosen) -> Shapes:
        g, inputs = layer.groups, layer.inputs.in_blocks(largest_block(group, layer.columns))
        DW: Shapes = {"DW": (*g, layer.rows, layer.columns)} if parts.average.keeps else {}
        pair: Shapes = dict.fromkeys(("s_G", "y_G"), (*g, layer.rows)) if parts.output.learns else {}
        factors = parts.input.shapes(inputs) | parts.output.shapes(layer, group)
        return DW | factors | parts.damping.shapes(layer, inputs) | pair

    def full_spec(self, training: Training) -> PassSpec:
        pairs = any(parts.output.learns for parts in training.chosen.values())
        return self._spec(training, pairs)

    def repeats(self, training: Training) -> bool:
        return any(training.pairs_due(place) for place in training.chosen)

    def next_spec(self, training: Training) -> PassSpec | None:
        if self.repeats(training):
            return self._spec(training, pairs=True)
        due = any(training.inputs_due(place) for place in training.chosen)
        if due or training.context.broken or training.states.missing(training.groups.layers):
            return self._spec(training, pairs=False)
        return None

    def _spec(self, training: Training, pairs: bool) -> PassSpec:
        """With pairs, or what H_A alone learns from."""
        layers = [x for x in training.groups.layers if self._likely_alone(training, x)]
        spec = SPEC if pairs else replace(SPEC, h=None, Dh=nothing_of)
        return replace(spec, reduced={layer: _reduction(training, layer) for layer in layers})

    def _likely_alone(self, training: Training, layer: Layer) -> bool:
        """Whether the next call of a layer is likely to be all that its H_A learns from.

        It is so where it was in the last pass that was learnt from, by one process. If it is used again after
        all, A is asked for the s of the first call, with which H_A learns no less.
        """
        context, place = training.context, training.groups.places[layer]
        if layer not in context.used_once or layer in context.broken or not training.states.of(layer):
            return False
        return training.ranks.size == 1 and training.inputs_due(place)

    def moment_shapes(self, training: Training, layer: Layer) -> Shapes:
        inputs = training.inputs(layer)
        return {"A": (*inputs.groups, inputs.columns, inputs.columns), "vectors": ()}

    def _moments(self, training: Training, record: LayerRecord) -> Moments:
        """A of what was seen, or its blocks, and how many a_t that had."""
        inputs, factor = training.inputs(record.layer), training.of(record.layer).input
        A = record.sum(lambda call: factor.first(inputs, record.input(call)))
        return {"A": A, "vectors": A.new_full((), record.vectors)}

    def first_moments(self, training: Training, records: Records, closure: Any) -> dict[Layer, Moments]:
        with full_precision(training.groups.layers):
            return {layer: self._moments(training, record) for layer, record in records.items()}

    def batch_moments(self, training: Training, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        model = training.groups.model
        with unmoved_buffers(model), training.recorder.recording(PassSpec(inputs=True)) as records:
            with torch.compiler.set_stance("force_eager"):
                if isinstance(batch, Closure):
                    batch.output()
                else:
                    model(*batch if isinstance(batch, tuple | list) else (batch,))
        with full_precision(training.groups.layers):
            return {x: (self._moments(training, record), record.data) for x, record in records.items()}

    def start(self, training: Training, layer: Layer, moments: Moments) -> State:
        group, parts, A = training.groups.of(layer), training.of(layer), moments["A"]
        damping = parts.damping.start(layer, A, moments["vectors"] * training.ranks.size)
        H_A = parts.input.start(layer, A, parts.damping.lambda_A(group, damping))
        state = {key: A.new_zeros(shape) for key, shape in parts.output.shapes(layer, group).items()}
        parts.output.start_(state)
        return state | H_A | damping

    def direction(self, training: Training, DW: Tensor, layer: Layer) -> Tensor:
        parts, state = training.of(layer), training.states.of(layer)
        return parts.output.left(state, parts.input.right(training.inputs(layer), DW, state))  # line 8

    def learn(self, training: Training, records: Records, closure: Callable[[], Any] | None) -> None:
        context, places = training.context, training.groups.places
        context.used_once.clear()
        context.used_once.update(layer for layer, record in records.items() if len(record.calls) == 1)
        due = {
            layer: record
            for layer, record in records.items()
            if layer not in context.broken and training.inputs_due(places[layer], back=1)
        }
        if context.firsts and closure is None:
            training.warn(NO_SECOND_PASS)
        firsts = context.firsts
        with full_precision(training.groups.layers):
            found = first_statistics(training, due, paired(training))  # lines 12 and 13
        firsts.clear()
        firsts.update(found)
        _keep_starts(training, due, closure)
        for record in due.values():
            record.let_go()
        if firsts and not any(first.h_Dh for first in firsts.values()):
            alone = dict(firsts)
            firsts.clear()
            with full_precision(training.groups.layers):
                learn_from(training, alone, {}, 1.0)  # of H_A, line 14
        elif closure is not None and firsts:
            closure_pass(training, closure)  # lines 10 to 18


@final
@dataclass(frozen=True, eq=False)
class _Reduction:
    """What is learnt from an input before the step, so that nobody has to hold it."""

    inputs: Inputs
    factor: InputFactor
    state: State
    dtype: torch.dtype

    def __call__(self, a: Tensor, first: ReducedInput | None) -> ReducedInput | None:
        if any((x.device, x.dtype) != (a.device, self.dtype) for x in self.state.values()):
            return None  # the layer has moved since its last step
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            a = a.to(self.dtype)
            mean_a = mean_activation(self.inputs, a)
            s = first.s if first is not None else self.factor.query(mean_a, self.state)
            return ReducedInput(mean_a, s, self.factor.respond(self.inputs, a, s))


def _reduction(training: Training, layer: Layer) -> _Reduction:
    inputs, factor, state = training.inputs(layer), training.of(layer).input, training.states.of(layer)
    return _Reduction(inputs, factor, {key: state[key] for key in factor.shapes(inputs)}, layer.dtype)


def _keep_starts(training: Training, records: Records, closure: Any) -> None:
    """Where the passes through the model started that the second pass is to repeat."""
    starts = {call.start for record in records.values() for call in record.calls if call.start is not None}
    if closure is not None:  # which runs as a whole from where it started
        starts.clear()
    in_turn = sorted(starts, key=lambda start: start[0])
    training.context.rewinds[:] = [rewind for _, rewind in in_turn]
