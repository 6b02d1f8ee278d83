"""What forward-backward passes show of each layer: the only file that registers hooks.

The hooks (`kfqn.passes.hooks`) stay on the modules as long as the optimizer lives, because a training loop
of the user's own may run its first pass at any time. They hold the optimizer by a weak reference only, do
nothing in a pickle of the model, and outside passes with gradients return at once. How a call and its
gradient are seen differs between eager code (`kfqn.passes.eager`) and compiled code (`kfqn.passes.traced`);
what they amount to is counted here.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.parameters.layers import Layer
from kfqn.parameters.shards import is_fully_sharded
from kfqn.passes.hooks import After, Before, Saved
from kfqn.passes.record import Call, LayerRecord, has_gradient
from kfqn.passes.replay import Rewind, Starts
from kfqn.passes.spec import PassSpec
from kfqn.passes.traced import Slot, reduced
from kfqn.runtime import private


@final
class Recorder:
    """What the passes since the last `take` have shown of each layer that a gradient has reached.

    A call counts from the moment its gradient arrives; before, only autograd's graph holds it, so a pass
    that nobody calls backward on is forgotten with its graph, of compiled code with the step.
    """

    blind = ""  # why a layer that ran since the last step was not seen, a sentence

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], first: PassSpec, iterates: Any, met: bool
    ) -> None:
        self.met = met  # whether it is known with which processes gradients are averaged
        self.data_parallel: DistributedDataParallel | None = None  # what the model was last run by
        private.have_hooks_noticed()
        self.iterates, self._slots = iterates, dict[Layer, Slot]()
        self.starts = Starts()
        self.breaks = set[str]()  # what compiled code was broken for
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
        self.spec, distributed = spec, torch.distributed
        # whether the next pass may be the first in several processes; all that compiled code asks here
        self.meets = not self.met and distributed.is_available() and distributed.is_initialized()
        self.starts.kept = spec is not None and spec is self.first and spec.h is not None
        if spec is not None:
            for slot in self._slots.values():
                slot.prepare(spec)

    @contextlib.contextmanager
    def in_closure(self) -> Iterator[None]:
        """Passes inside are those of a closure, which is repeated as a whole."""
        kept, self.starts.kept = self.starts.kept, False
        self._gradients_are_gone()
        try:
            yield
        finally:
            self.starts.kept = kept

    def forget(self) -> None:
        """Drop what was seen; graphs of before are none of ours any more."""
        for slot in self._slots.values():
            slot.forget()
        self.recorded: dict[Layer, LayerRecord] = {}
        self.aside: dict[Layer, dict[Call, None]] = {}  # whose output was differentiated for something else
        self.batch, self.arrived = 0, False
        self.starts.last = None
        self.hidden: set[Layer] = set()  # what ran where no gradients are recorded
        self.empty = False  # whether a layer ran on no data
        self.ran = False  # whether a layer ran at all, also if no gradient has reached it

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def drop(self) -> None:
        """The gradients have been cleared, and with them what earlier passes say of this step."""
        if self.spec is self.first:
            self.batch, self.arrived = self.next_batch, False
            self.recorded.clear()
            self.aside.clear()
            self._gradients_are_gone()

    def _gradients_are_gone(self) -> None:
        for slot in self._slots.values() if self.spec is not None else ():
            slot.drop()

    def take(self) -> dict[Layer, LayerRecord]:
        """What was seen, once. Raises ValueError if an input was of the wrong kind."""
        for layer, calls in self.aside.items():  # a loss of derivatives alone, for the last layer
            zero = layer.empty().new_zeros(*layer.groups, layer.rows)
            self.count(layer, [replace(call, Dh=zero) for call in calls], late=True)
        for layer, slot in self._slots.items():  # torch.autograd.grad, of compiled code
            self.count(layer, [replace(call, h=None) for call in slot.seen or slot.before], late=True)
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

    @contextlib.contextmanager
    def recording(self, spec: PassSpec, replay: Sequence[Rewind] = ()) -> Iterator[dict[Layer, LayerRecord]]:
        """Record this inside the ``with`` instead, of passes that start from these states in turn."""
        outside, of_passes = self.spec, (self.recorded, self.batch, self.arrived, self.ran)
        self.forget()
        self.starts.repeated = [*replay]
        self._record(spec)
        try:
            yield self.recorded
            for slot in self._slots.values() if spec.Dh is None else ():
                self.take_from(slot)
        finally:
            self.forget()
            self.starts.repeated = []
            self._record(outside)
            self.recorded, self.batch, self.arrived, self.ran = of_passes

    def meet(self) -> None:
        """A pass through the whole model begins, maybe in several processes. Compilers trace it."""
        running = private.running_data_parallel()
        if running is not None:
            self.data_parallel = running
            for slot in self._slots.values() if not self.met else ():
                slot.reduced = None  # what the others have seen counts too

    def start(self, model: nn.Module) -> None:
        """A pass through the whole model begins, whose start matters."""
        if not private.in_backward():  # there activation checkpointing of the whole model repeats one
            self.starts.begin(model, {layer.weight.device for layer in self._slots})

    def take_from(self, slot: Slot) -> None:
        """A gradient has come to a layer's probe, or compiled passes without gradients have ended."""
        (calls, sums), layer = slot.take(), slot.layer
        if calls and layer in self.recorded and self.recorded[layer].of(self.batch):
            self.begin_batch()
        for call in calls:
            call.batch, call.start = self.batch, self.starts.last
        self.count(layer, calls)
        if sums is None or self.spec is None or self.spec.Dh is None or layer not in self.recorded:
            return
        calls, self.arrived = self.recorded[layer].of(self.batch), True
        Dh = reduced(self.spec.Dh, layer, sums / sum(call.locations for call in calls))
        for call in calls:  # of each its share of the locations
            call.Dh = Dh if call.Dh is None else call.Dh + Dh

    def count(self, layer: Layer, calls: Sequence[Call], *, late: bool = False) -> None:
        """These calls are to be learnt from; ``late`` ones where a gradient came that was not seen."""
        if calls and not (late and (layer in self.recorded or not has_gradient(layer))):
            self.recorded.setdefault(layer, LayerRecord(layer)).calls.extend(calls)
            self.ran = True

    def begin_batch(self) -> None:
        """Forward passes after a backward pass are of another micro-batch, or of another step."""
        if self.arrived:
            self.arrived, self.batch = False, self.batch + 1
            dropped = not any(map(has_gradient, self.recorded))
            moved = any(of.version != private.version(x.weight) for x, of in self.recorded.items())
            if self.spec is self.first and (dropped or moved):  # cleared, or used by another optimizer
                self.recorded.clear()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
