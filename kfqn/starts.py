"""How factors start (line 2 of Algorithm 2, line 1 of Algorithm 5), and start anew where they are broken."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from kfqn.parameters.groups import note
from kfqn.parameters.layers import Layer
from kfqn.state import full_precision
from kfqn.steps.rule import Proposal
from kfqn.training import Moments, Records, Training, mean_moments
from kfqn.update import propose

_KEPT = ("DW", "lambda_G", "step", "counts", "last")  # where a layer starts anew


def warm_start(training: Training, batches: Iterable[Any]) -> None:
    """See `Kronecker.warm_start`."""
    training.states.sync(training.recorder.data_parallel)
    sums: dict[Layer, Moments] = {}
    data: dict[Layer, int] = {}
    count = 0
    for batch in batches:
        count += 1
        for layer, (moments, m) in training.curvature.batch_moments(training, batch).items():
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
        raise RuntimeError(training.nothing_ran)
    for layer, total in sums.items():
        for value in total.values():
            value.div_(data[layer])
    _start(training, mean_moments(training, [x for x in training.groups.layers if x in sums], sums))
    for group in map(training.groups.of, sums):
        note(group, k=0)
    for rule, members in training.rules:
        for member in members:
            note(member.group, **rule.kept())
    training.recorder.record_first(training.full_spec())


def start_from(training: Training, layers: Sequence[Layer], records: Records, closure: Any) -> None:
    """The states of the given layers, from this mini-batch: all of them, or on an error none."""
    own = {layer: records[layer] for layer in layers if layer in records}
    moments = training.curvature.first_moments(training, own, closure)
    _start(training, mean_moments(training, layers, moments))


def _start(training: Training, moments: Mapping[Layer, Moments]) -> None:
    """The states of the given layers: all of them, or on an error none."""
    with full_precision(training.groups.layers):
        states = {
            layer: training.curvature.start(training, layer, of_layer)
            for layer, of_layer in moments.items()
            if training.states.owns(layer)
        }
    training.states.start(states)


def with_sound_factors(
    training: Training, proposals: dict[Layer, Proposal], records: Records, closure: Any
) -> dict[Layer, Proposal]:
    """The proposals; of layers whose factors turn out to be broken from factors that start anew, if they can.

    The others of these layers stay where they are.
    """
    context = training.context
    waiting = context.broken if training.ranks.size == 1 else set()
    broken = [layer for layer, own in proposals.items() if not own.is_valid or layer in waiting]
    context.broken.clear()
    if broken:
        _reset(training, broken, records, closure)
        proposals = proposals | propose(training, broken)[0]
    return {layer: own for layer, own in proposals.items() if own.is_valid}


def _reset(training: Training, layers: Sequence[Layer], records: Records, closure: Any) -> None:
    """Start these layers anew from this mini-batch; what is averaged over steps is kept.

    One whose inputs are too large even for that keeps its state, and does not move; nor does one whose
    inputs are not there, which starts anew from the next mini-batch.
    """
    groups, states, broken = training.groups, training.states, training.context.broken
    for layer in layers:
        note(groups.of(layer), k=0)  # young factors: see `curvature_interval`
    for layer in layers:
        broken.add(layer)
        old = states.of(layer)
        kept = {key: old[key] for key in _KEPT if key in old}
        with contextlib.suppress(ValueError):
            if (layer in records and records[layer].has_inputs) or training.ranks.size > 1:
                start_from(training, [layer], records, closure)
                if states.owns(layer):
                    states.enter(layer, states.of(layer) | kept)
                    states.count(layer, {"resets": 1})
                broken.discard(layer)
    training.warn(
        f"the factors of {layers[0]} were no longer finite and positive and start anew; this is said "
        "once, and diagnostics() counts how often it happens.",
        "reset",
    )
