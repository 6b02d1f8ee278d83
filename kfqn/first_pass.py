"""The first pass over a batch: running a closure, what it has to give, and whether a step can be taken."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfqn.context import nothing
from kfqn.parameters.groups import note
from kfqn.parameters.layers import Layer
from kfqn.parameters.shards import local
from kfqn.passes.replay import start_of
from kfqn.training import Records, Training


def run(training: Training, closure: Callable[[], Any] | None) -> Tensor | None:
    """The loss, from a pass that is recorded; None without a closure, or from one that does nothing.

    Lightning's does nothing where it has done everything before. Raises TypeError, ValueError and
    RuntimeError for a closure that cannot be used.
    """
    training.iterates.go_on()
    training.check_factors()
    training.context.begin()
    if closure is None:
        return None
    training.curvature.check_closure(training.groups.name, closure)
    recorder, context = training.recorder, training.context
    before = recorder.ran or recorder.waiting
    recorder.ran, context.since = False, recorder.next_batch
    if recorder.first is not None and training.curvature.repeats(training):
        devices = {layer.weight.device for layer in training.groups.layers}
        context.rewind = start_of(training.groups.model, devices)
    with recorder.in_closure(), torch.enable_grad():
        loss = closure()
    ran = recorder.ran
    recorder.ran |= before and (recorder.empty or loss is None)  # of micro-batches before
    if loss is None and not ran:
        context.rewind, context.since = nothing, 0
        return None
    _check_loss(training, loss)
    if before and not (ran or recorder.empty or recorder.blind):
        raise RuntimeError(
            f"the closure given to {training.groups.name}.step ran no layer, while the model ran before it: "
            "the closure is called again after the step, so compute the loss and call backward inside it, or "
            "call step() without one."
        )
    checked: Tensor = loss
    return checked


def _check_loss(training: Training, loss: Any) -> None:
    name = training.groups.name
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the closure given to {name}.step must return the loss as a tensor, but "
            f"returned {type(loss).__name__}: end it with 'return loss'."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the closure given to {name}.step must return the loss as one number, its mean over "
            f"the batch, but returned a tensor of shape {tuple(loss.shape)}: end it with 'return "
            "loss.mean()'."
        )


def was_empty(training: Training) -> bool:
    """Whether the batch was empty for every layer: then only other parameters may have gradients."""
    return training.recorder.empty and not training.recorder.ran and training.ranks.size == 1


def collect(training: Training, closure: Any) -> tuple[Records, list[Layer]]:
    """What was recorded of the pass, and the layers that got a gradient.

    Raises RuntimeError if a closure left none.
    """
    ran, records = training.recorder.ran, training.recorder.take()
    if closure is not None and not records and not ran and training.recorder.first is not None:
        raise RuntimeError(training.nothing_ran)
    training.states.sync(training.recorder.data_parallel)
    layers = _with_gradients(training, records)
    if closure is not None and not layers:
        raise RuntimeError(
            f"the closure given to {training.groups.name}.step left no gradient on any layer: call "
            "loss.backward() inside it, on a loss that depends on the model."
        )
    training.context.stepped = bool(layers)
    return records, layers


def _with_gradients(training: Training, records: Records) -> list[Layer]:
    states, found = training.states, {layer: layer.gradients() for layer in training.groups.layers}
    layers = [layer for layer, gradients in found.items() if gradients]
    unseen = [layer for layer in layers if layer not in records and training.recorder.first]
    idle = {layer for layer in unseen if not any(g.any() for g in found[layer])}
    if training.ranks.size > 1:
        idle = _idle_everywhere(training, layers, idle)
    for layer in [layer for layer in layers if layer in idle]:
        if not states.of(layer) and states.owns(layer):  # torch.distributed.checkpoint asks this way
            states.enter(layer, states.empty(layer))
    return [layer for layer in layers if layer not in idle]


def _idle_everywhere(training: Training, layers: Sequence[Layer], idle: Collection[Layer]) -> set[Layer]:
    """Those of these layers without state that no process has seen, nor got a gradient for."""
    new = training.states.missing(layers)
    if not new:
        return set()
    flags = training.groups.layers[0].empty().new_tensor([layer in idle for layer in new])
    everywhere = training.ranks.all(flags.bool()).tolist()
    return {layer for layer, is_idle in zip(new, everywhere, strict=True) if is_idle}


def signs(training: Training, loss: Tensor | None, layers: Iterable[Layer]) -> Tensor:
    """1 if all is finite, as far as a norm tells, and the loss, if a closure told."""
    like = training.groups.layers[0].empty()
    values = [x for _, x in _values(training, loss, layers)] or [like.new_zeros(1)]
    found = [_are_finite(values, 2.0)] + ([] if loss is None else [loss.detach().reshape(())])
    return torch.stack([sign.to(like) for sign in found])


def is_valid(
    training: Training, finite: float, loss: Tensor | None, layers: Iterable[Layer], raises: bool
) -> bool:
    """Whether the step can be taken, given the mean over the processes of the first of `signs`.

    If not, that is counted and said, or with ``raises`` FloatingPointError raised.
    """
    values = _values(training, loss, layers) if finite != 1 else []
    if finite == 1 or training.ranks.all(_are_finite([x for _, x in values], math.inf)):
        return True
    message = f"{_wrong(training, values)} is not finite, so the step was refused and nothing was changed"
    if raises:
        raise FloatingPointError(f"{message}: look for too large a learning rate or bad data.")
    for group in training.groups.own():
        note(group, refused=group["progress"]["refused"] + 1)
    said = f"{message}; this is said once, and diagnostics() counts how often it happens."
    training.warn(said, "refused")
    return False


def _values(
    training: Training, loss: Tensor | None, layers: Iterable[Layer]
) -> list[tuple[Tensor | None, Tensor]]:
    """All that has to be finite: gradients, with their parameters, and the loss."""
    fallback = training.groups.fallback
    others = [p for group in (fallback.param_groups if fallback is not None else []) for p in group["params"]]
    found: list[tuple[Tensor | None, Tensor]] = []
    for p in others:
        if p.grad is not None:
            g = p.grad.coalesce().values() if p.grad.is_sparse else local(p.grad)
            found += [(p, g)] if g.numel() else []
    for layer in layers:
        pairs = zip(layer.parameters(), layer.gradients(), strict=True)
        found += [(p, g) for p, g in pairs if g.numel()]
    return found if loss is None else [*found, (None, loss.detach())]


def _wrong(training: Training, values: Sequence[tuple[Tensor | None, Tensor]]) -> str:
    """What is not finite, as a user knows it: the loss, if it is, else the first gradient."""
    wrong = [p for p, x in values if not x.isfinite().all()]
    if not wrong:
        return "the loss or a gradient in another process"
    if wrong[-1] is None:
        return "the loss"
    names = {id(p): name for name, p in training.groups.model.named_parameters()}
    return f"the gradient of '{names[id(wrong[0])]}'"


def _are_finite(values: Sequence[Tensor], order: float) -> Tensor:
    """Whether all entries are. The norm of order 2 is by far the fastest, but may overflow."""
    norms = [norm.to(values[0].device) for norm in torch._foreach_norm([*values], order)]
    return torch.stack(norms).isfinite().all()
