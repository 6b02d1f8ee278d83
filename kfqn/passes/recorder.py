"""What forward-backward passes show of each layer: the only file that registers hooks.

The hooks (`kfqn.passes.hooks`) stay on the modules as long as the optimizer lives, because a training loop
of the user's own may run its first pass at any time. They hold the optimizer by a weak reference only, do
nothing in a pickle of the model, and outside passes with gradients return at once. Eager code is watched by
hooks on the gradients of layers, and in passes where no parameter requires one every layer is behind a gate
(`kfqn.passes.gate`); what is watched of compiled code it computes itself (`kfqn.passes.traced`).
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.parameters.layers import Layer
from kfqn.passes.gate import Arrive, gated, is_for
from kfqn.passes.hooks import Ahead, Iterates, Observe, Start
from kfqn.passes.record import Call, LayerRecord
from kfqn.passes.replay import Rewind, start_of
from kfqn.passes.spec import PassSpec, Reduction
from kfqn.passes.traced import Slot, call_of, reduced
from kfqn.runtime.private import (
    have_hooks_noticed,
    in_backward,
    in_transform,
    running_data_parallel,
    version,
)

_HIDES = (
    "which hides what goes through it: run the model outside of them, and take derivatives with "
    "torch.autograd.grad"
)


@final
class Recorder:
    """What the passes since the last `take` have shown of each layer that a gradient has reached.

    A call counts from the moment its gradient arrives; before, only autograd's graph holds it, so
    a pass that nobody calls backward on is forgotten with its graph.
    """

    _in_closure = False
    met = False  # whether it is known with whom gradients are averaged
    blind = ""  # why a layer that ran since the last step was not seen, a sentence

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], first: PassSpec, iterates: Iterates | None = None
    ) -> None:
        self.data_parallel: DistributedDataParallel | None = None  # what the model was last run by
        have_hooks_noticed()
        self._slots: dict[Layer, Slot] = {}
        self._numbers = itertools.count()
        self._replay: list[Rewind] = []  # what the next passes start from
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles).atexit = False
        for module in model.modules() if iterates is not None else ():
            if module is model or any(True for _ in module.parameters(recurse=False)):
                self._before(module, Ahead(iterates))
        self._before(model, Start(self))
        self.forget()
        self.record_first(first)
        self.add(layers)

    def record_first(self, spec: PassSpec | None) -> None:
        """Record this of first passes from now on; with None nothing."""
        self.first = spec
        self.blind = ""
        self._record(spec)

    def _record(self, spec: PassSpec | None) -> None:
        self.spec = spec
        self.eager = spec is not None and not spec.linear
        self.starts = self._has_starts(spec)
        if spec is not None:
            for layer, slot in self._slots.items():
                slot.prepare(spec.reduced.get(layer))

    def _has_starts(self, spec: PassSpec | None) -> bool:
        """Whether anything is to be known, or to be put back, where a pass through the model begins."""
        if spec is None:
            return False
        own = spec is self.first and spec.h is not None and not self._in_closure
        alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        return own or bool(self._replay) or not (alone or (self.met and spec.h is None))

    @contextlib.contextmanager
    def in_closure(self) -> Iterator[None]:
        """Passes inside are those of a closure, which starts as a whole."""
        before, self._in_closure = self.starts, True
        self.starts = self._has_starts(self.spec)
        try:
            yield
        finally:
            self._in_closure, self.starts = False, before

    def add(self, layers: Sequence[Layer]) -> None:
        """Record these layers too."""
        for layer in layers:
            slot = self._slots[layer] = Slot(layer, self._take_from)
            if self.spec is not None:
                slot.prepare(self.spec.reduced.get(layer))
            for module in layer.modules:
                hook = Observe(self, slot)
                hook.handle = module.register_forward_hook(hook, with_kwargs=True)
                self._handles.append(hook.handle)

    def _before(self, module: nn.Module, hook: Ahead | Start) -> None:
        """Run this before the module's forward."""
        hook.handle = module.register_forward_pre_hook(hook)
        self._handles.append(hook.handle)

    def forget(self) -> None:
        """Drop what was seen."""
        for slot in self._slots.values():
            slot.seen = ()
        self.recorded: dict[Layer, LayerRecord] = {}
        self._aside: dict[Layer, LayerRecord] = {}  # whose output was differentiated for something else
        self._token = object()  # graphs of before are none of ours any more
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

    def take(self) -> dict[Layer, LayerRecord]:
        """What was seen, once. Raises ValueError if an input was of the wrong kind."""
        for layer, slot in self._slots.items():
            if slot.seen and layer not in self.recorded and not _has_no_gradient(layer):
                self.recorded[layer] = LayerRecord(layer)  # by torch.autograd.grad, of compiled code
                self.recorded[layer].calls = [replace(call, h=None) for call in slot.seen]
        for layer in self._aside.keys() - self.recorded.keys():
            if not _has_no_gradient(layer):  # a loss of derivatives alone, for the last layer
                self.recorded[layer] = self._aside[layer]
        seen = {layer: self.recorded[layer] for layer in self._slots if layer in self.recorded}
        self.forget()
        for message in (call.wrong for layer in seen for call in seen[layer].calls if call.wrong):
            raise ValueError(message)
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
        outside = self.spec, self.recorded, self._token, self._batch, self._arrived, self.ran
        self._replay = [*replay]
        self.forget()
        self._record(spec)
        try:
            yield self.recorded
            if spec.Dh is None:
                for slot in self._slots.values():
                    self._take_from(slot)
        finally:
            for slot in self._slots.values():
                slot.seen = ()
            self._replay = []
            self._record(outside[0])
            _, self.recorded, self._token, self._batch, self._arrived, self.ran = outside

    def start(self, model: nn.Module) -> None:
        """A pass through the whole model begins."""
        if not torch.is_grad_enabled() or self.spec is None or in_backward():
            return  # in a backward pass: activation checkpointing of the whole model
        self.data_parallel = running_data_parallel()
        if self.spec is not self.first:
            if self._replay:
                self._replay.pop(0)()
        elif not self._in_closure and self.spec.h is not None:
            devices = {layer.weight.device for layer in self._slots}
            self._start = next(self._numbers), start_of(model, devices)

    def _take_from(self, slot: Slot) -> None:
        """A gradient has come to the probe of a layer, or a pass without gradients has ended."""
        spec, layer = self.spec, slot.layer
        if spec is None:
            return
        calls, Dh = slot.take(spec.Dh)
        if calls:
            self.ran = True
            if layer in self.recorded and self.recorded[layer].of(self._batch):
                self._next_batch()
            for call in calls:
                call.batch, call.start = self._batch, self._start
            self.recorded.setdefault(layer, LayerRecord(layer)).calls += calls
        calls = self.recorded[layer].of(self._batch) if layer in self.recorded else []
        if Dh is not None and calls:
            Dh = Dh / sum(call.locations for call in calls)
            for call in calls:
                call.Dh = Dh if call.Dh is None else call.Dh + Dh
            self._arrived = True

    def observe(self, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
        """A module of the layer has turned ``a`` into ``h``; what takes the place of h, if anything does."""
        spec, with_gradients, layer = self.spec, torch.is_grad_enabled(), slot.layer
        if in_transform():
            self.blind = f"{layer} ran inside vmap, grad or another transform of torch.func, {_HIDES}"
            return None
        if torch.jit.is_tracing():
            return None
        if not h.numel():
            self.empty |= with_gradients
            return None
        if spec is not None and spec is not self.first:
            self.ran = True
        if with_gradients != (spec is None or spec.Dh is not None):
            self._hidden.add(layer)
            return None
        if spec is None:
            self.ran = True
            return None
        return self._keep(spec, slot, a, h)

    def _keep(self, spec: PassSpec, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
        """Keep of this call what is asked for; what takes the place of ``h``."""
        layer = slot.layer
        if spec.Dh is not None and not spec.frozen and not (h.requires_grad and layer.weight.requires_grad):
            self.ran |= h.requires_grad  # of another optimizer's second pass, or for the inputs alone
            return None
        again = in_backward()
        if again and slot.open:
            return gated(h, _forget) if spec.frozen else None  # checkpointing computes what was seen again
        if not again:
            self._next_batch()
        self.ran = True
        call = call_of(spec, layer, a, h)
        call.batch, call.start = self._batch, self._start
        if call.wrong is not None and spec is not self.first:
            raise ValueError(call.wrong)
        if spec.Dh is None:
            self.recorded.setdefault(layer, LayerRecord(layer)).calls.append(call)
            return None
        slot.open.add(call)
        arrive = self._arrival(slot, call, spec.Dh)
        if spec.frozen:
            return gated(h, arrive)
        zero = functools.partial(reduced, spec.Dh, layer, layer.empty().new_zeros(()).expand(h.shape))
        h.register_hook(self._of_the_weight(layer, call, arrive, zero))
        return None

    def _of_the_weight(
        self, layer: Layer, call: Call, arrive: Arrive, zero: Callable[[], Tensor]
    ) -> Callable[[Tensor | None], None]:
        """``arrive`` where the backward pass is for the weight, and not for something else in the loss."""
        token, aside = self._token, False

        def sift(gradient: Tensor | None) -> None:
            if gradient is None or token is not self._token or not layer.weight.requires_grad:
                return  # behind a gate, of a pass that is forgotten, or of another optimizer's second pass
            # of torch.autograd.grad with respect to the weight: to be its .grad, or to go into the loss
            if is_for(layer.weight, itself=not torch.is_grad_enabled()):
                arrive(gradient)
                return
            nonlocal aside
            if not aside and call.Dh is None and call.wrong is None:
                self._aside.setdefault(layer, LayerRecord(layer)).calls.append(replace(call, Dh=zero()))
                aside = True

        return sift

    def _arrival(self, slot: Slot, call: Call, reduction: Reduction) -> Arrive:
        """What to do with the gradient of a call's pre-activation."""
        token, layer = self._token, slot.layer

        def arrive(gradient: Tensor) -> None:
            if token is not self._token:
                return
            self._aside.pop(layer, None)
            gradient = gradient.detach()  # of a backward pass with create_graph
            Dh = reduced(reduction, layer, gradient) if call.wrong is None else gradient
            if call.Dh is not None:  # a closure may call backward for each part of its loss
                call.Dh = call.Dh + Dh
                return
            call.Dh = Dh
            seen = self.recorded.setdefault(layer, LayerRecord(layer))
            slot.reduce(call, seen.calls)
            seen.calls.append(call)
            slot.open.discard(call)
            self._arrived = True

        return arrive

    def _next_batch(self) -> None:
        """Forward passes after a backward pass are of another micro-batch, or of another step."""
        if self._arrived:
            self._arrived, self._batch = False, self._batch + 1
            dropped = all(map(_has_no_gradient, self.recorded))
            moved = any(seen.version != version(layer.weight) for layer, seen in self.recorded.items())
            if self.spec is self.first and (dropped or moved):
                self.recorded.clear()  # their gradients have been cleared, or used by another optimizer


def _has_no_gradient(layer: Layer) -> bool:
    return layer.weight.grad is None or not layer.weight.grad.any()


def _forget(gradient: Tensor) -> None:
    """It has been told already."""


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
