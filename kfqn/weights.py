"""Averages of the weights, which are put in the model where it is evaluated."""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from kfqn.parameters.layers import Layer
from kfqn.training import Training


def average_weights(training: Training, layers: Iterable[Layer]) -> None:
    """Take the weights of layers, which have just moved, into their averages, ``mean_W`` (*g, I, C)."""
    for layer in layers:
        decay, state = training.groups.of(layer)["averaging"], training.states.of(layer)
        if decay and state:
            W = layer.W()
            state.setdefault("mean_W", W).lerp_(W, 1 - decay)


@contextlib.contextmanager
def averaged_weights(training: Training) -> Iterator[None]:
    """See `Kronecker.averaged`."""
    pairs = [
        (layer, state["mean_W"])
        for layer in training.groups.layers
        if training.groups.of(layer).get("averaging") and "mean_W" in (state := training.states.of(layer))
    ]
    own, iterates = [layer.W() for layer, _ in pairs], training.iterates
    lent = iterates.lend(training.groups.model)
    with torch.no_grad():
        for layer, mean in pairs:
            layer.set_(mean)
    try:
        yield
    finally:
        iterates.give_back(lent)
        with torch.no_grad():
            for (layer, _), W in zip(pairs, own, strict=True):
                layer.set_(W)
