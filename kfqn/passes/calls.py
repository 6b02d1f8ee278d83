"""Calls of layers' modules: what is kept of each, and how it is known that its gradient has come.

Eager code has a hook on the gradient of each output: it tells of which call the gradient is, and whether the
backward pass is for the weights or for something else. Compilers trace no such hooks. In what they compile a
zero that requires a gradient, the layer's probe, is added to all its outputs: the gradient of the probe is
the sum of Dh over them, and that it has one says that a backward pass has reached the layer.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfqn.parameters.layers import Layer
from kfqn.passes.record import Call, InputReduction, PassSpec, Reduction, nothing_of
from kfqn.runtime import private
from kfqn.runtime.module_hooks import Hook

_HIDES = (
    "which hides what goes through it: run the model outside of them, and take derivatives with "
    "torch.autograd.grad"
)


@final
class Slot:
    """One layer as hooks see it; ``recorder`` is told when a gradient has come to the probe.

    Of eager code ``open`` are calls whose gradients have not come, and ``aside`` those of them that were
    differentiated for something else. Of compiled code ``seen`` are calls since gradients were cleared, and
    ``before`` those before that. ``in_graph`` says whether compiled code ran the layer when something was
    last kept of a first pass.
    """

    def __init__(self, recorder: Any, layer: Layer) -> None:
        self.recorder, self.layer = weakref.ref(recorder), layer
        self.open: weakref.WeakSet[Call] = weakref.WeakSet()
        self.aside = dict[Call, None]()
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
            self.probe.register_post_accumulate_grad_hook(partial(_probe_arrived, weakref.ref(self)))

    def forget(self) -> None:
        """Drop what was seen."""
        self.seen = self.before = ()
        self.aside.clear()

    def drop(self) -> None:
        """Gradients have been cleared."""
        self.seen, self.before = (), self.seen or self.before
        self.aside.clear()

    @property
    def waiting(self) -> tuple[Call, ...]:
        """Calls of compiled code; those before gradients were cleared only if there were none since."""
        return self.seen or self.before

    def take(self) -> tuple[tuple[Call, ...], Tensor]:
        """These calls, once, and the gradient of their probe, the sum of Dh over data and locations."""
        calls, gradient = self.waiting, self.probe.grad
        self.seen, self.before, self.probe.grad = (), (), None
        assert gradient is not None
        return calls, gradient

    def reduce(self, call: Call, before: Sequence[Call]) -> None:
        """Keep of a call's input what is wanted in its place, given the calls before."""
        first = before[0].reduced if before else None
        if self.reduced is not None and call.a is not None and call.wrong is None and (first or not before):
            call.reduced = self.reduced(call.a, first)
            call.a = call.a if call.reduced is None else None


@final
class After(Hook):
    """After the forward of a layer's module."""

    def __init__(self, recorder: Any, slot: Slot) -> None:
        super().__init__(recorder)
        self.slot = slot

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], h: Tensor) -> Tensor | None:
        recorder, slot = self.owner(), self.slot
        if recorder is None or torch.compiler.is_exporting():
            return None
        a, spec = args[0] if args else next(iter(kwargs.values())), recorder.spec
        if not torch.compiler.is_compiling():
            return _eager(recorder, slot, module.weight, a, h)
        if not h.numel():
            recorder.empty, recorder.ran = recorder.empty or torch.is_grad_enabled(), False
            return None
        if spec is None or spec.Dh is None or not _is_kept(spec, module.weight, h):
            return None
        shown: Tensor = private.also_where_checkpointed(_traced, spec, slot, a, h)
        return shown


def _is_kept(spec: PassSpec, weight: Any, h: Tensor) -> bool:
    """Whether something is kept of a call: of passes that have gradients of weights if Dh is asked for."""
    with_gradients = torch.is_grad_enabled()
    if spec.Dh is None or not with_gradients:
        return spec.Dh is None and not with_gradients
    return spec.frozen or (h.requires_grad and weight.requires_grad)


def _call_of(spec: PassSpec, layer: Layer, a: Tensor, h: Tensor) -> Call:
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


def _traced(spec: PassSpec, slot: Slot, a: Tensor, h: Tensor) -> Tensor:
    """Of compiled code: leave in the slot what is to be kept of a call; what takes the place of ``h``."""
    layer, call = slot.layer, _call_of(spec, slot.layer, a, h)
    slot.reduce(call, slot.seen)
    slot.seen, slot.in_graph = (*slot.seen, call), True
    return (h.to(layer.dtype) + layer.along_outputs(slot.probe)).to(h.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _probe_arrived(reference: weakref.ref[Slot], probe: Tensor) -> None:
    """Not to be compiled for every layer where a whole step is compiled, and with it what backward runs."""
    slot = reference()
    recorder = slot.recorder() if slot is not None else None
    if recorder is not None:
        recorder.take_from(slot)


def _eager(recorder: Any, slot: Slot, weight: Any, a: Tensor, h: Tensor) -> Tensor | None:
    """Of eager code: watch for the gradient of ``h``; what takes its place, if anything does."""
    spec, layer, with_gradients = recorder.spec, slot.layer, torch.is_grad_enabled()
    if private.in_transform():
        recorder.blind = f"{layer} ran inside vmap, grad or another transform of torch.func, {_HIDES}"
        return None
    if private.in_jit_trace():
        return None
    if not h.numel():
        recorder.empty |= with_gradients
        return None
    recorder.ran |= with_gradients or spec is not recorder.first
    if spec is None:
        return None
    if not _is_kept(spec, weight, h):
        recorder.hidden.add(layer)
        return None
    root, again = weight, private.in_backward()
    if spec.frozen:
        root = torch.zeros((), requires_grad=True)
        h = _Rooted.apply(h, root)  # type: ignore[no-untyped-call]
    if again and slot.open:  # checkpointing computes again what was seen
        return h
    if not again:
        recorder.begin_batch()
    call = _call_of(spec, layer, a, h)
    if call.wrong is not None and spec is not recorder.first:
        raise ValueError(call.wrong)
    call.batch, call.start = recorder.batch, recorder.last_start
    slot.in_graph &= spec is not recorder.first
    if spec.Dh is None:
        recorder.count(layer, [call])
    else:
        slot.open.add(call)
        h.register_hook(_arrival(recorder, slot, call, get_gradient_edge(root).node))
    return h


def _arrival(recorder: Any, slot: Slot, call: Call, root: Any) -> Callable[[Tensor | None], None]:
    """What to do with the gradient of a call's output, if the backward pass is for ``root``."""
    recorded, layer = recorder.recorded, slot.layer
    Dh_of = recorder.spec.Dh if call.wrong is None else nothing_of

    def arrive(gradient: Tensor | None) -> None:
        if gradient is None or recorded is not recorder.recorded:
            return  # of a pass that is forgotten
        if private.is_wanted(root):
            if call.Dh is None:
                slot.open.discard(call)
                slot.aside.clear()
                slot.reduce(call, recorded[layer].calls if layer in recorded else ())
                recorder.count(layer, [call])
            # detached: of a backward pass with create_graph
            recorder.arrive([call], reduced(Dh_of, layer, gradient.detach()))
        elif call.Dh is None:
            slot.aside[call] = None

    return arrive


@final
class _Rooted(torch.autograd.Function):
    """``h`` in its own memory, in a graph that starts here at the latest: at a root that gets no gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, root: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return h.data  # not h: what comes next may overwrite it, whoever has saved h

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return tangents[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return gradients[0], None
