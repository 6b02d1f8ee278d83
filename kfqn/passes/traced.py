"""What a compiler traces of a pass that is recorded: tensor code, and what it leaves in a layer's slot.

A zero that requires a gradient, the probe, is added to the pre-activation: its gradient is the sum of Dh over
data and locations, and that it has one says that the backward pass has reached the layer. So nothing of this
runs in the backward pass but what torch does with a leaf.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from kfqn.parameters.layers import Layer
from kfqn.passes.record import Call
from kfqn.passes.spec import InputReduction, PassSpec, Reduction, nothing_of


@final
class Slot:
    """One layer as hooks see it; ``seen`` are the calls that compiled code has made and nobody has taken.

    ``told`` is called with the slot when a gradient has reached its probe.
    """

    def __init__(self, layer: Layer, told: Callable[["Slot"], None]) -> None:
        self.layer, self.told = layer, weakref.WeakMethod(told)
        self.open: weakref.WeakSet[Call] = weakref.WeakSet()  # calls of eager code before their gradients
        self.seen: tuple[Call, ...] = ()
        self.reduced: InputReduction | None = None
        self.probe = torch.empty(0)

    def prepare(self, reduced: InputReduction | None) -> None:
        """A pass may be recorded next, which is to keep this of the layer's input."""
        self.reduced, weight = reduced, self.layer.weight
        if not self.probe.numel() or self.probe.device != weight.device or self.probe.dtype != self.layer.dtype:
            zeros = torch.zeros(self.layer.outputs, device=weight.device, dtype=self.layer.dtype)
            self.probe = zeros.requires_grad_()
            slot = weakref.ref(self)
            self.probe.register_post_accumulate_grad_hook(lambda probe: _tell(slot))

    def reduce(self, call: Call, before: Sequence[Call]) -> None:
        """Keep of a call's input what is wanted in its place, given the calls before."""
        if self.reduced is None or call.a is None or call.wrong is not None:
            return
        first = before[0].reduced if before else None
        if first is not None or not before:
            call.reduced = self.reduced(call.a, first)
            call.a = call.a if call.reduced is None else None

    def take(self, Dh: Reduction | None) -> tuple[list[Call], Tensor | None]:
        """The calls, and what the gradient that has come to the probe says of the Dh of each."""
        calls, self.seen = [*self.seen], ()
        gradient, self.probe.grad = self.probe.grad, None
        if gradient is None or Dh is None:
            return calls, None
        with torch.no_grad():
            return calls, Dh(gradient.view(1, *self.layer.groups, -1, 1))


def _tell(slot: "weakref.ref[Slot]") -> None:
    layer_slot = slot()
    told = layer_slot.told() if layer_slot is not None else None
    if told is not None:
        told(layer_slot)


def traced(spec: PassSpec | None, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
    """Leave in the slot what is to be kept of a call; what takes the place of ``h``."""
    layer = slot.layer
    if spec is None or torch.is_grad_enabled() != (spec.Dh is not None):
        return None
    if spec.Dh is not None and not spec.frozen and not (h.requires_grad and layer.weight.requires_grad):
        return None
    call = call_of(spec, layer, a, h)
    slot.reduce(call, slot.seen)
    slot.seen = (*slot.seen, call)
    if spec.Dh is None:
        return None
    return (h.to(layer.dtype) + layer.along_outputs(slot.probe)).to(h.dtype)


def call_of(spec: PassSpec, layer: Layer, a: Tensor, h: Tensor) -> Call:
    """What a call shows before its gradient is there."""
    call = Call(len(a), 1, a.detach() if spec.inputs else None, wrong=layer.wrong_input(a))
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
