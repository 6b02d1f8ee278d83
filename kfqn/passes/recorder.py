"""What forward-backward passes show of each layer, put together from its calls (`kfqn.passes.calls`).

The hooks stay on the modules as long as the optimizer lives, because a training loop of the user's own may
run its first pass at any time. `torch.compile` traces them: none breaks a graph, unless a pass is wanted
that cannot be traced.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.parameters.layers import Layer
from kfqn.parameters.shards import is_fully_sharded
from kfqn.passes.calls import After, Slot, reduced
from kfqn.passes.record import Call, LayerRecord, PassSpec
from kfqn.passes.replay import Rewind, start_of
from kfqn.runtime import private
from kfqn.runtime.module_hooks import Hook, handles_of

_STARTS = "a second pass without a closure starts as the first did: give step a closure"


@final
class Recorder:
    """What the passes since the last `take` have shown of each layer that a gradient has reached.

    A call counts from the moment its gradient arrives; before, only autograd's graph holds it, so a pass
    that nobody calls backward on is forgotten with its graph, of compiled code with the step.
    """

    blind = ""  # why a layer that ran since the last step was not seen, a sentence

    def __init__(self, model: nn.Module, layers: Sequence[Layer], first: PassSpec, met: bool) -> None:
        self.met = met  # whether it is known with which processes gradients are averaged
        self.data_parallel: DistributedDataParallel | None = None  # what the model was last run by
        private.have_hooks_noticed()
        self._slots, self._handles = dict[Layer, Slot](), handles_of(self)
        self.repeats = list[Rewind]()  # where the passes through the model that come next are to start
        self.passes = 0  # of those whose starts were kept
        self.breaks = set[str]()  # what compiled code was broken for
        self.forget()
        self.record_first(first)
        _BeforeModel(self).put(self._handles, model.register_forward_pre_hook)
        self.add(layers)

    def add(self, layers: Sequence[Layer]) -> None:
        """Record these layers too."""
        for layer in layers:
            self._slots[layer] = Slot(self, layer)
            for module in layer.modules:
                first = is_fully_sharded(module)  # before its own hook drops the parameters
                after = After(self, self._slots[layer])
                after.put(self._handles, module.register_forward_hook, with_kwargs=True, prepend=first)
        self._record(self.spec)

    def record_first(self, spec: PassSpec | None) -> None:
        """Record this of first passes from now on; with None nothing."""
        self.first, self.blind = spec, ""
        self._record(spec)

    def _record(self, spec: PassSpec | None) -> None:
        self.spec, distributed = spec, torch.distributed
        # whether the next pass may be the first in several processes; all that compiled code asks here
        self.meets = not self.met and distributed.is_available() and distributed.is_initialized()
        self.keeps_starts = spec is not None and spec is self.first and spec.h is not None
        if spec is not None:
            for slot in self._slots.values():
                slot.prepare(spec)

    @contextlib.contextmanager
    def in_closure(self) -> Iterator[None]:
        """Passes inside are those of a closure, which is repeated as a whole."""
        kept, self.keeps_starts = self.keeps_starts, False
        self._gradients_are_gone()
        try:
            yield
        finally:
            self.keeps_starts = kept

    def forget(self) -> None:
        """Drop what was seen; graphs of before are none of ours any more."""
        for slot in self._slots.values():
            slot.forget()
        self.recorded: dict[Layer, LayerRecord] = {}
        self.batch, self.arrived = 0, False
        self.last_start: tuple[int, Rewind] | None = None  # of a pass through the model, and its number
        self.hidden: set[Layer] = set()  # what ran where nothing is kept of it, as without gradients
        self.empty = False  # whether a layer ran on no data
        self.ran = False  # whether a layer ran at all, also if no gradient has reached it

    @contextlib.contextmanager
    def recording(self, spec: PassSpec, replay: Sequence[Rewind] = ()) -> Iterator[dict[Layer, LayerRecord]]:
        """Record this inside the ``with`` instead, of passes that start from these states in turn."""
        outside, of_passes = self.spec, (self.recorded, self.batch, self.arrived, self.ran)
        self.forget()
        self.repeats = [*replay]
        self._record(spec)
        try:
            yield self.recorded
        finally:
            self.forget()
            self.repeats = []
            self._record(outside)
            self.recorded, self.batch, self.arrived, self.ran = of_passes

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def drop(self) -> None:
        """The gradients have been cleared, and with them what earlier passes say of this step."""
        if self.spec is self.first:
            self.batch, self.arrived = self.next_batch, False
            self.recorded.clear()
            self._gradients_are_gone()

    def _gradients_are_gone(self) -> None:
        for slot in self._slots.values() if self.spec is not None else ():
            slot.drop()

    def take(self) -> dict[Layer, LayerRecord]:
        """What was seen, once. Raises ValueError if an input was of the wrong kind."""
        for layer, slot in self._slots.items():  # a gradient of derivatives alone, or by torch.autograd.grad
            calls = [replace(call, h=None) for call in (*slot.aside, *slot.waiting)]
            if calls and layer not in self.recorded and _has_gradient(layer):
                self.count(layer, calls)
        seen = {layer: self.recorded[layer] for layer in self._slots if layer in self.recorded}
        self.forget()
        for call in (call for record in seen.values() for call in record.calls if call.wrong):
            raise ValueError(call.wrong)
        return seen

    @property
    def next_batch(self) -> int:
        """The number of the micro-batch that a forward pass now would be of."""
        return self.batch + self.arrived

    @property
    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self.recorded)

    def not_in_graphs(self) -> list[str]:
        """What compiled code has left out of passes so far, in words; nothing where there is none."""
        outside = [layer.name for layer, slot in self._slots.items() if not slot.in_graph]
        if len(outside) == len(self._slots):
            return []
        ran = "run by eager code, not compiled or where the graph breaks (TORCH_LOGS=graph_breaks): "
        return [*sorted(self.breaks), *([ran + ", ".join(outside)] if outside else [])]

    def misses(self, layers: Iterable[Layer]) -> bool:
        """Whether one of them ran, but inside a `torch.autograd.Function` which has not shown it."""
        return any(layer in self.hidden and layer not in self.recorded for layer in layers)

    def meet(self) -> None:
        """A pass through the whole model begins, maybe in several processes. Compilers trace it."""
        running = private.running_data_parallel()
        if running is not None:
            self.data_parallel = running
            for slot in self._slots.values() if not self.met else ():
                slot.reduced = None  # what the others have seen counts too

    @torch.compiler.disable(reason=_STARTS)  # type: ignore[untyped-decorator]
    def start(self, model: nn.Module, compiled: bool) -> None:
        """A pass through the whole model begins, whose start matters."""
        self.breaks |= {f"broken before the model: {_STARTS}"} if compiled else set()
        if private.in_backward():
            return  # activation checkpointing of the whole model repeats a pass
        if self.repeats:
            self.repeats.pop(0)()
        else:
            devices, self.passes = {layer.weight.device for layer in self._slots}, self.passes + 1
            self.last_start = self.passes, start_of(model, devices)

    def take_from(self, slot: Slot) -> None:
        """A gradient has come to a layer's probe."""
        layer, (new, gradient) = slot.layer, slot.take()
        if new and layer in self.recorded and self.recorded[layer].of(self.batch):
            self.begin_batch()
        for call in new:
            call.batch, call.start = self.batch, self.last_start
        self.count(layer, new)
        if self.spec is not None and self.spec.Dh is not None and layer in self.recorded:
            calls = self.recorded[layer].of(self.batch)
            mean = layer.along_outputs(gradient)[None] / sum(call.locations for call in calls)
            self.arrive(calls, reduced(self.spec.Dh, layer, mean))  # as of one datum; each has its share

    def count(self, layer: Layer, calls: Sequence[Call]) -> None:
        """These calls are to be learnt from."""
        if calls:
            self.recorded.setdefault(layer, LayerRecord(layer)).calls.extend(calls)
            self.ran = True

    def arrive(self, calls: Iterable[Call], Dh: Tensor) -> None:
        """This has come to each call; a closure may call backward for each part of its loss."""
        self.arrived = True
        for call in calls:
            call.Dh = Dh if call.Dh is None else call.Dh + Dh

    def begin_batch(self) -> None:
        """Forward passes after a backward pass are of another micro-batch, or of another step."""
        if self.arrived:
            self.arrived, self.batch = False, self.batch + 1
            dropped = not any(map(_has_gradient, self.recorded))
            moved = any(of.version != private.version(x.weight) for x, of in self.recorded.items())
            if self.spec is self.first and (dropped or moved):  # cleared, or used by another optimizer
                self.recorded.clear()


@final
class _BeforeModel(Hook):
    """Before the forward of the whole model."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        recorder, compiled = self.owner(), torch.compiler.is_compiling()
        if recorder is None or torch.compiler.is_exporting() or not torch.is_grad_enabled():
            return
        recorder.ran = recorder.ran or compiled
        if recorder.meets or not compiled:
            recorder.meet()
        if recorder.repeats or recorder.keeps_starts:
            recorder.start(model, compiled)


def _has_gradient(layer: Layer) -> bool:
    """Whether the layer has one that is not zero; waits for the device.

    That of a sharded layer may be yet to come, and is here in part.
    """
    grad = layer.weight.grad
    return layer.sharded or (grad is not None and bool(grad.any()))
