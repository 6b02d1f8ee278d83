"""What the first pass over a mini-batch tells: A s of the layers' inputs, and h̄ and Dh̄ before the step."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from kfqn.curvature.pairs import First
from kfqn.formulas.statistics import mean_activation
from kfqn.parameters.layers import Layer
from kfqn.passes.record import LayerRecord
from kfqn.training import Records, Training


def paired(training: Training) -> set[Layer]:
    """The layers whose H_G is to learn from the step just taken, if its first pass shows h and Dh."""
    spec = training.recorder.first
    if spec is None or spec.h is None:
        return set()
    due = {place for place in training.chosen if training.pairs_due(place, back=1)}
    return {layer for layer, place in training.groups.places.items() if place in due}


def first_statistics(
    training: Training, records: Records, with_pairs: Collection[Layer]
) -> dict[Layer, First]:
    """s, A s, and of layers ``with_pairs`` h̄ and Dh̄, over all processes (lines 12 and 13).

    s is asked of ā; ā, h̄ and Dh̄ are of the micro-batches that a second pass repeats, A is of all.
    """
    layers, ranks = training.groups.layers, training.ranks
    like = layers[0].empty()
    again = {layer: record.since(training.context.since) for layer, record in records.items()}
    again = {layer: record for layer, record in again.items() if record.calls}
    means = ranks.means(*_means(training, records, again, with_pairs), like)
    known = [layer for layer in layers if (layer, "a") in means]
    columns = {layer: means_shape(training, layer) for layer in layers}
    queries = ranks.means(_queries(training, means, again, known), columns, like)
    answers = {
        layer: _response(training, records[layer], queries[layer]) for layer in known if layer in again
    }
    shapes = {layer: training.of(layer).input.response_shape(training.inputs(layer)) for layer in layers}
    answers = ranks.means(answers, shapes, like)
    factors = {layer: records[layer].data / record.data for layer, record in again.items()}
    return {
        layer: First(
            queries[layer],
            answers[layer],
            (means[layer, "h"], means[layer, "Dh"]) if (layer, "h") in means else None,
            factors.get(layer, 1.0),
        )
        for layer in known
    }


def means_shape(training: Training, layer: Layer) -> tuple[int, ...]:
    """The shape of ā, (*g, C)."""
    inputs = training.inputs(layer)
    return (*inputs.groups, inputs.columns)


def _means(
    training: Training, records: Records, again: Records, with_pairs: Collection[Layer]
) -> tuple[dict[Any, Tensor], dict[Any, tuple[int, ...]]]:
    """ā, h̄ and Dh̄ that this process has, and the shapes of all."""
    layers = training.groups.layers
    own = {(layer, "a"): _mean_a(training, records[layer]) for layer in again}
    shown = [layer for layer, record in again.items() if layer in with_pairs and record.has_h]
    own |= {(layer, "h"): again[layer].h() for layer in shown}
    own |= {(layer, "Dh"): again[layer].Dh() for layer in shown}
    shapes = {(layer, "a"): means_shape(training, layer) for layer in layers}
    rows = {layer: (*layer.groups, layer.rows) for layer in layers if layer in with_pairs}
    return own, shapes | {(layer, key): rows[layer] for key in ("h", "Dh") for layer in rows}


def _queries(
    training: Training, means: dict[Any, Tensor], again: Records, known: list[Layer]
) -> dict[Layer, Tensor]:
    """What A is asked with, of layers whose factors are here; or was asked with when their input was seen."""
    asked = {
        layer: training.of(layer).input.query(means[layer, "a"], training.states.of(layer))
        for layer in known
        if training.states.of(layer) and (layer not in again or again[layer].has_inputs)
    }
    return asked | {
        layer: record.calls[0].reduced.like(layer).s
        for layer, record in again.items()
        if not record.has_inputs
    }


def _mean_a(training: Training, record: LayerRecord) -> Tensor:
    """ā, (*g, C)."""
    layer, inputs = record.layer, training.inputs(record.layer)
    return record.mean(
        lambda call: (
            call.reduced.like(layer).a
            if call.reduced is not None
            else mean_activation(inputs, record.input(call))
        )
    )


def _response(training: Training, record: LayerRecord, s: Tensor) -> Tensor:
    """What A of all the layer's inputs says to s."""
    layer, inputs, factor = record.layer, training.inputs(record.layer), training.of(record.layer).input
    return record.sum(
        lambda call: (
            call.reduced.like(layer).As
            if call.reduced is not None
            else factor.respond(inputs, record.input(call), s)
        )
    )
