"""What a compiler traces of a pass that is recorded: tensor code, and what it leaves in a layer's slot.

A zero that requires a gradient, the probe, is added to the pre-activation: its gradient is the sum of Dh over
data and locations, and that it has one says that a backward pass has reached the layer. So nothing of this
runs in the backward pass but what torch does with a leaf.
"""

import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from kfqn.parameters.layers import Layer
from kfqn.passes.record import Call
from kfqn.passes.spec import InputReduction, PassSpec, Reduction, nothing_of


@final
class Slot:
    """One layer as hooks see it; ``recorder`` is told when a gradient has come to the probe.

    ``seen`` are calls of compiled code whose gradients have not come, ``before`` those of them that gradients
    were cleared after; ``open`` are such calls of eager code. ``in_graph`` says whether compiled code ran the
    layer when something was last kept of a pass.
    """

    def __init__(self, recorder: Any, layer: Layer) -> None:
        self.recorder, self.layer = weakref.ref(recorder), layer
        self.open: weakref.WeakSet[Call] = weakref.WeakSet()
        self.seen, self.before = tuple[Call, ...](), tuple[Call, ...]()
        self.in_graph = False
        self.reduced: InputReduction | None = None
        self.probe = torch.empty(0)

    def prepare(self, spec: PassSpec) -> None:
        """A pass may be recorded next."""
        layer, probe = self.layer, self.probe
        self.reduced = spec.reduced.get(layer)
        if not probe.numel() or (probe.device, probe.dtype) != (layer.weight.device, layer.dtype):
            self.probe = layer.empty().new_zeros(layer.outputs).requires_grad_()
            self.probe.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self)))

    def forget(self) -> None:
        """Drop what was seen."""
        self.seen = self.before = ()

    def drop(self) -> None:
        """Gradients have been cleared."""
        self.seen, self.before = (), self.seen or self.before

    def take(self) -> tuple[Sequence[Call], Tensor | None]:
        """The calls, and the sum of Dh over data and locations, as of one datum, if a gradient has come."""
        calls = self.seen or self.before  # not both: passes that nobody calls backward on come before
        self.forget()
        gradient, self.probe.grad = self.probe.grad, None
        return calls, None if gradient is None else self.layer.along_outputs(gradient)[None]

    def reduce(self, call: Call, before: Sequence[Call]) -> None:
        """Keep of a call's input what is wanted in its place, given the calls before."""
        first = before[0].reduced if before else None
        if self.reduced is not None and call.a is not None and call.wrong is None and (first or not before):
            call.reduced = self.reduced(call.a, first)
            call.a = call.a if call.reduced is None else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _arrived(reference: weakref.ref[Slot], probe: Tensor) -> None:
    """Not to be compiled for every layer where a whole step is compiled, and with it what backward runs."""
    slot = reference()
    recorder = slot.recorder() if slot is not None else None
    if recorder is not None:
        recorder.take_from(slot)


def traced(recorder: Any, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
    """Leave in the slot what is to be kept of a call; what takes the place of ``h``."""
    spec, layer, with_gradients = recorder.spec, slot.layer, torch.is_grad_enabled()
    if with_gradients != (spec.Dh is not None):
        return None
    if with_gradients and not spec.frozen and not (h.requires_grad and layer.weight.requires_grad):
        return None
    call = call_of(spec, layer, a, h)
    slot.reduce(call, slot.seen)
    slot.seen, slot.in_graph = (*slot.seen, call), True
    if not with_gradients:
        return None
    return (h.to(layer.dtype) + layer.along_outputs(slot.probe)).to(h.dtype)


def call_of(spec: PassSpec, layer: Layer, a: Tensor, h: Tensor) -> Call:
    """What a call shows before its gradient is there."""
    call = Call(len(a), 1, a.detach() if spec.inputs else None, layer.wrong_input(a))
    if call.wrong is None:
        call.locations = math.prod(layer.inputs.locations(a))
        if spec.h is not None:  # now: an in-place ReLU overwrites h next
            call.h = reduced(spec.h, layer, h.detach())
    return call


def reduced(reduction: Reduction, layer: Layer, x: Tensor) -> Tensor:
    """In the layer's `dtype`, whatever surrounds the pass: 1/m Σ h has more digits than h."""
    if reduction is nothing_of:
        return nothing_of(x)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return reduced(reduction, layer, x)
    return reduction(layer.preactivation(x).to(layer.dtype))
