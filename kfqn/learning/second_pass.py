"""The second pass over a batch, after its step, for H_G (lines 10 and 11 of Algorithm 2)."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from kfqn.learning.secants import learn_from
from kfqn.passes.record import PassSpec
from kfqn.passes.replay import second_pass
from kfqn.state import full_precision, unsynchronised
from kfqn.training import Training

_NO_GRADIENTS = (
    "This happened in a second pass, where parameters require no gradient and .grad is None: leave out what "
    "only works with them, or write optimizer.second_pass(loss, gradients=True)."
)


@final
@dataclass
class Handle:
    """What `Kronecker.second_pass` gives: a place for the loss inside it."""

    loss: Tensor | float | None = None


@contextlib.contextmanager
def again(training: Training, loss_scale: float, gradients: bool) -> Iterator[Handle]:
    """See `Kronecker.second_pass`."""
    context, recorder, handle = training.context, training.recorder, Handle()
    if not context.stepped and not recorder.waiting and not recorder.ran:
        raise RuntimeError(
            "second_pass learns from the step just taken, but there was none since the last: call "
            f"{training.groups.name}.step() first."
        )
    firsts = dict(context.firsts)
    context.firsts.clear()
    context.stepped = recorder.ran = False
    frozen = not (gradients or context.with_gradients)
    if training.iterates.behind:
        training.iterates.go_ahead()  # now: inside, the buffers that go ahead would be put back
    with (
        second_pass(training.groups.model, context.rewind, frozen=frozen),
        torch.enable_grad(),
        unsynchronised(recorder.data_parallel),
        recorder.recording(_spec(training, frozen), context.rewinds) as records,
    ):
        try:
            yield handle
        except Exception as error:
            if frozen:
                error.add_note(_NO_GRADIENTS)
            raise
        ran = recorder.ran
    context.forget_starts()
    if firsts and not records and training.ranks.size == 1:
        done = "computed no gradient" if ran else "ran no layer"
        raise RuntimeError(
            f"the second pass {done}, so the step was taken without learning from it: it must do "
            "the same as the first, in a closure as in second_pass()."
        )
    with torch.no_grad(), full_precision(training.groups.layers):
        learn_from(training, firsts, records, float(loss_scale))


def _spec(training: Training, frozen: bool) -> PassSpec:
    """h̄ and Dh̄ are kept of the pass."""
    return replace(training.curvature.full_spec(training), reduced={}, inputs=False, frozen=frozen)


def closure_pass(training: Training, closure: Callable[[], Any]) -> None:
    """The second pass of a closure, which need not be made for passes without gradients of weights.

    If it fails in one, because it works with such gradients itself, it is run again with them, and so
    are all second passes from now on.
    """
    context, returned = training.context, False
    firsts = dict(context.firsts)
    with_pairs = [layer for layer, first in firsts.items() if first.h_Dh]
    try:
        with again(training, 1.0, gradients=False):
            closure()
            if not context.with_gradients and training.recorder.misses(with_pairs):
                raise RuntimeError(_NO_GRADIENTS)
            returned = True
    except Exception:
        if returned or context.with_gradients:
            raise
        context.stepped = True
        context.firsts.update(firsts)
        with again(training, 1.0, gradients=True):
            closure()
        context.with_gradients = True
