"""What forward-backward passes show of each layer: the only file that registers hooks.

The hooks (`kfqn.passes.hooks`) stay on the modules as long as the optimizer lives, because a training loop
of the user's own may run its first pass at any time. They hold the optimizer by a weak reference only, do
nothing in a pickle of the model, and outside passes with gradients return at once. Eager code is watched by
hooks on gradients, and where no parameter requires one layers are behind gates (`kfqn.passes.gate`); what is
watched of compiled code it computes itself (`kfqn.passes.traced`).
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.parameters.layers import Layer
from kfqn.parameters.shards import is_fully_sharded
from kfqn.passes.gate import gated, is_for
from kfqn.passes.hooks import After, Before, Saved
from kfqn.passes.record import Call, LayerRecord, has_gradient
from kfqn.passes.replay import Rewind, start_of
from kfqn.passes.spec import PassSpec
from kfqn.passes.traced import Slot, call_of, reduced
from kfqn.runtime import private

_HIDES = (
    "which hides what goes through it: run the model outside of them, and take derivatives with "
    "torch.autograd.grad"
)


@final
class Recorder:
    """What the passes since the last `take` have shown of each layer that a gradient has reached.

    A call counts from the moment its gradient arrives; before, only autograd's graph holds it, so a pass
    that nobody calls backward on is forgotten with its graph, of compiled code with the step.
    """

    blind = ""  # why a layer that ran since the last step was not seen, a sentence
    starts = False  # whether anything is to be known, or put back, where a pass through the model begins
    _in_closure = False

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], first: PassSpec, iterates: Any, met: bool
    ) -> None:
        self.met = met  # whether it is known with which processes gradients are averaged
        self.data_parallel: DistributedDataParallel | None = None  # what the model was last run by
        private.have_hooks_noticed()
        self.iterates, self._slots = iterates, dict[Layer, Slot]()
        self._numbers, self._replay = itertools.count(), list[Rewind]()
        self.handles: list[Any] = []
        weakref.finalize(self, _remove, self.handles).atexit = False
        self.forget()
        self.record_first(first)
        for module in model.modules():
            sharded = is_fully_sharded(module)
            if module is model or sharded or any(True for _ in module.parameters(recurse=False)):
                before, saved = Before(self, whole=module is model), Saved(self)
                before.handle = module.register_forward_pre_hook(before, prepend=sharded)  # before it gathers
                saved.handle = module.register_state_dict_post_hook(saved)
                self.handles += [before.handle, saved.handle]
        self.add(layers)

    def add(self, layers: Sequence[Layer]) -> None:
        """Record these layers too."""
        for layer in layers:
            self._slots[layer] = Slot(self, layer)
            for module in layer.modules:
                hook = After(self, self._slots[layer])
                first = is_fully_sharded(module)  # before its own hook drops the parameters
                hook.handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first)
                self.handles.append(hook.handle)
        self._record(self.spec)

    def record_first(self, spec: PassSpec | None) -> None:
        """Record this of first passes from now on; with None nothing."""
        self.first, self.blind = spec, ""
        self._record(spec)

    def _record(self, spec: PassSpec | None) -> None:
        self.spec = spec
        self._see_to_starts()
        if spec is not None:
            for slot in self._slots.values():
                slot.prepare(spec)

    def _see_to_starts(self) -> None:
        spec, distributed = self.spec, torch.distributed
        alone = self.met or not (distributed.is_available() and distributed.is_initialized())
        numbered = spec is not None and spec is self.first and spec.h is not None and not self._in_closure
        self.starts = numbered or bool(self._replay) or (spec is not None and not alone)

    @contextlib.contextmanager
    def in_closure(self) -> Iterator[None]:
        """Passes inside are those of a closure, which starts as a whole."""
        self._in_closure = True
        self._see_to_starts()
        self._set_aside()
        try:
            yield
        finally:
            self._in_closure = False
            self._see_to_starts()

    def forget(self) -> None:
        """Drop what was seen; graphs of before are none of ours any more."""
        for slot in self._slots.values():
            slot.forget()
        self.recorded: dict[Layer, LayerRecord] = {}
        self._aside: dict[Layer, dict[Call, None]] = {}  # whose output was differentiated for something else
        self._batch, self._arrived = 0, False
        self._start: tuple[int, Rewind] | None = None  # of the pass that runs
        self._hidden: set[Layer] = set()  # what ran where no gradients are recorded
        self.empty = False  # whether a layer ran on no data
        self.ran = False  # whether a layer ran at all, also if no gradient has reached it

    def drop(self) -> None:
        """The gradients have been cleared, and with them what earlier passes say of this step."""
        if self.spec is self.first:
            self._batch, self._arrived = self.next_batch, False
            self.recorded.clear()
            self._aside.clear()
            self._set_aside()

    def _set_aside(self) -> None:
        for slot in self._slots.values() if self.spec is not None else ():
            slot.drop()

    def take(self) -> dict[Layer, LayerRecord]:
        """What was seen, once. Raises ValueError if an input was of the wrong kind."""
        for layer, calls in self._aside.items():  # a loss of derivatives alone, for the last layer
            zero = layer.empty().new_zeros(*layer.groups, layer.rows)
            self._count(layer, [replace(call, Dh=zero) for call in calls], late=True)
        for layer, slot in self._slots.items():  # torch.autograd.grad, of compiled code
            self._count(layer, [replace(call, h=None) for call in slot.seen or slot.before], late=True)
        seen = {layer: self.recorded[layer] for layer in self._slots if layer in self.recorded}
        self.forget()
        for call in (call for record in seen.values() for call in record.calls if call.wrong):
            raise ValueError(call.wrong)
        return seen

    @property
    def next_batch(self) -> int:
        """The number of the micro-batch that a forward pass now would be of."""
        return self._batch + self._arrived

    @property
    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self.recorded)

    def misses(self, layers: Iterable[Layer]) -> bool:
        """Whether one of them ran, but inside a `torch.autograd.Function` which has not shown it."""
        return any(layer in self._hidden and layer not in self.recorded for layer in layers)

    @contextlib.contextmanager
    def recording(self, spec: PassSpec, replay: Sequence[Rewind] = ()) -> Iterator[dict[Layer, LayerRecord]]:
        """Record this inside the ``with`` instead, of passes that start from these states in turn."""
        outside, of_passes = self.spec, (self.recorded, self._batch, self._arrived, self.ran)
        self.forget()
        self._replay = [*replay]
        self._record(spec)
        try:
            yield self.recorded
            for slot in self._slots.values() if spec.Dh is None else ():
                self.take_from(slot)
        finally:
            self.forget()
            self._replay = []
            self._record(outside)
            self.recorded, self._batch, self._arrived, self.ran = of_passes

    def start(self, model: nn.Module) -> None:
        """A pass through the whole model begins."""
        if self.spec is None or private.in_backward():
            return  # in a backward pass: activation checkpointing of the whole model
        self.data_parallel = private.running_data_parallel()
        for slot in self._slots.values() if self.data_parallel is not None and not self.met else ():
            slot.reduced = None  # what the others have seen counts too
        if self._replay:
            self._replay.pop(0)()
        elif self.spec is self.first and self.spec.h is not None and not self._in_closure:
            devices = {layer.weight.device for layer in self._slots}
            self._start = next(self._numbers), start_of(model, devices)

    def take_from(self, slot: Slot) -> None:
        """A gradient has come to a layer's probe, or compiled passes without gradients have ended."""
        (calls, sums), layer = slot.take(), slot.layer
        if calls and layer in self.recorded and self.recorded[layer].of(self._batch):
            self._next_batch()
        for call in calls:
            call.batch, call.start = self._batch, self._start
        self._count(layer, calls)
        if sums is None or self.spec is None or self.spec.Dh is None or layer not in self.recorded:
            return
        calls, self._arrived = self.recorded[layer].of(self._batch), True
        Dh = reduced(self.spec.Dh, layer, sums / sum(call.locations for call in calls))
        for call in calls:  # of each its share of the locations
            call.Dh = Dh if call.Dh is None else call.Dh + Dh

    def observe(self, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
        """A module of the layer has turned ``a`` into ``h``; what takes the place of h, if anything does."""
        spec, with_gradients, layer = self.spec, torch.is_grad_enabled(), slot.layer
        if private.in_transform():
            self.blind = f"{layer} ran inside vmap, grad or another transform of torch.func, {_HIDES}"
            return None
        if private.in_jit_trace():
            return None
        if not h.numel():
            self.empty |= with_gradients
            return None
        self.ran |= spec is not None and spec is not self.first
        if with_gradients != (spec is None or spec.Dh is not None):
            self._hidden.add(layer)
            return None
        if spec is None:
            self.ran = True
            return None
        if with_gradients and not spec.frozen and not (h.requires_grad and layer.weight.requires_grad):
            self.ran |= h.requires_grad  # of another optimizer's second pass, or for the inputs alone
            return None
        self.ran = True
        return self._keep(spec, slot, a, h)

    def _keep(self, spec: PassSpec, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
        """Keep of this call what is asked for; what takes the place of ``h``."""
        again = private.in_backward()
        if again and slot.open:  # checkpointing computes again what was seen
            return gated(h, lambda gradient: None) if spec.frozen else None
        if not again:
            self._next_batch()
        call = replace(call_of(spec, slot.layer, a, h), batch=self._batch, start=self._start)
        if call.wrong is not None and spec is not self.first:
            raise ValueError(call.wrong)
        if spec.Dh is None:
            self._count(slot.layer, [call])
            return None
        slot.open.add(call)
        arrive = self._arrival(spec, slot, call)
        if spec.frozen:
            return gated(h, arrive)
        h.register_hook(arrive)
        return None

    def _arrival(self, spec: PassSpec, slot: Slot, call: Call) -> Callable[[Tensor | None], None]:
        """What to do with the gradient of a call's pre-activation, if the backward pass is for the weight."""
        recorded, layer, Dh_of = self.recorded, slot.layer, spec.Dh
        weight = layer.modules[0].weight  # of fully_shard another tensor while the module runs
        assert Dh_of is not None

        def arrive(gradient: Tensor | None) -> None:
            if gradient is None or recorded is not self.recorded:
                return  # behind a gate, or of a pass that is forgotten
            if not spec.frozen:
                if not layer.weight.requires_grad:
                    return  # of another optimizer's second pass
                # of torch.autograd.grad with respect to the weight: to be its .grad, or to go into the loss
                if not is_for(weight, itself=not torch.is_grad_enabled()):
                    if call.Dh is None and call.wrong is None:
                        self._aside.setdefault(layer, {})[call] = None
                    return
            self._aside.pop(layer, None)
            gradient = gradient.detach()  # of a backward pass with create_graph
            Dh = reduced(Dh_of, layer, gradient) if call.wrong is None else gradient
            if call.Dh is not None:  # a closure may call backward for each part of its loss
                call.Dh = call.Dh + Dh
                return
            call.Dh = Dh
            slot.reduce(call, recorded[layer].calls if layer in recorded else ())
            slot.open.discard(call)
            self._count(layer, [call])
            self._arrived = True

        return arrive

    def _count(self, layer: Layer, calls: Sequence[Call], *, late: bool = False) -> None:
        """These calls are to be learnt from; ``late`` ones where a gradient came that was not seen."""
        if calls and not (late and (layer in self.recorded or not has_gradient(layer))):
            self.recorded.setdefault(layer, LayerRecord(layer)).calls.extend(calls)
            self.ran = True

    def _next_batch(self) -> None:
        """Forward passes after a backward pass are of another micro-batch, or of another step."""
        if self._arrived:
            self._arrived, self._batch = False, self._batch + 1
            dropped = not any(map(has_gradient, self.recorded))
            moved = any(of.version != private.version(x.weight) for x, of in self.recorded.items())
            if self.spec is self.first and (dropped or moved):  # cleared, or used by another optimizer
                self.recorded.clear()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
