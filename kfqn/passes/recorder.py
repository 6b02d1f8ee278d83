"""What forward-backward passes show of each layer: the only file that registers hooks.

The hooks (`kfqn.passes.hooks`) stay on the modules as long as the optimizer lives, because a training loop
of the user's own may run its first pass at any time. They hold the optimizer by a weak reference only, do
nothing in a pickle of the model, and outside passes with gradients return at once. In passes where no
parameter requires a gradient they put every layer behind a gate (`kfqn.passes.gate`).
"""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.parameters.layers import Layer
from kfqn.parameters.shards import is_fully_sharded
from kfqn.passes.gate import Arrive, gated, is_for
from kfqn.passes.hooks import Ahead, Observe, Start, noticed_by_compiled_code
from kfqn.passes.record import Call, LayerRecord
from kfqn.passes.replay import Rewind, start_of
from kfqn.passes.spec import InputReduction, PassSpec, Reduction, nothing_of

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

    in_closure = False  # whether passes are those of a closure, which starts as a whole
    blind = ""  # why a layer that ran since the last step was not seen, a sentence

    def __init__(self, model: nn.Module, layers: Sequence[Layer], first: PassSpec, ahead: Any = None) -> None:
        self.data_parallel: DistributedDataParallel | None = None  # what the model was last run by
        noticed_by_compiled_code()
        self.record_first(first)
        self._open: dict[Layer, weakref.WeakSet[Call]] = {}
        self._numbers = itertools.count()
        self._replay: Iterator[Rewind] = iter(())
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._ahead = ahead
        for module in model.modules():
            if (
                module is model
                or is_fully_sharded(module)
                or any(True for _ in module.parameters(recurse=False))
            ):
                self._before(module, Ahead(self))
        self._before(model, Start(self))
        self.forget()
        self.add(layers)

    def record_first(self, spec: PassSpec | None) -> None:
        """Record this of first passes from now on; with None nothing."""
        self._spec = self.first = spec
        self.blind = ""

    def add(self, layers: Sequence[Layer]) -> None:
        """Record these layers too."""
        for layer in layers:
            self._open[layer] = weakref.WeakSet()
            for module in layer.modules:
                hook = Observe(self, layer)
                first = is_fully_sharded(module)  # before its own hook drops the parameters
                hook.handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first)
                self._handles.append(hook.handle)

    def _before(self, module: nn.Module, hook: Ahead | Start) -> None:
        """Run this before the module's forward, and before `fully_shard` gathers its parameters."""
        hook.handle = module.register_forward_pre_hook(hook, prepend=is_fully_sharded(module))
        self._handles.append(hook.handle)

    def forget(self) -> None:
        """Drop what was seen."""
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
        if self._spec is self.first:
            self._batch, self._arrived = self.next_batch, False
            self.recorded.clear()
            self._aside.clear()

    def take(self) -> dict[Layer, LayerRecord]:
        """What was seen, once. Raises ValueError if an input was of the wrong kind."""
        for layer in self._aside.keys() - self.recorded.keys():
            if not _has_no_gradient(layer):  # a loss of derivatives alone, for the last layer
                self.recorded[layer] = self._aside[layer]
        seen = {layer: self.recorded[layer] for layer in self._open if layer in self.recorded}
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
        outside = self._spec, self.recorded, self._token, self._batch, self._arrived, self.ran
        self._spec, self._replay = spec, iter(replay)
        self.forget()
        try:
            yield self.recorded
        finally:
            self._spec, self.recorded, self._token, self._batch, self._arrived, self.ran = outside
            self._replay = iter(())

    def ahead(self) -> None:
        """A training pass through a module begins."""
        ahead = self._ahead() if self._ahead is not None else None
        if ahead is not None and not (torch._C._are_functorch_transforms_active() or torch._C._is_tracing()):
            ahead()

    def start(self, model: nn.Module) -> None:
        """A pass through the whole model begins."""
        if not torch.is_grad_enabled() or self._spec is None:
            return
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing of the whole model
        self.data_parallel = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if self._spec is not self.first:
            next(self._replay, _nothing)()
        elif not self.in_closure and self._spec.h is not None:
            devices = {layer.weight.device for layer in self._open}
            self._start = next(self._numbers), start_of(model, devices)

    def observe(self, layer: Layer, a: Tensor, h: Tensor) -> Tensor | None:
        """A module of the layer has turned ``a`` into ``h``; what takes the place of h, if anything does."""
        spec, with_gradients = self._spec, torch.is_grad_enabled()
        if torch._C._are_functorch_transforms_active():
            self.blind = f"{layer} ran inside vmap, grad or another transform of torch.func, {_HIDES}"
            return None
        if torch._C._is_tracing():
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
        return self._keep(spec, layer, a, h)

    def _keep(self, spec: PassSpec, layer: Layer, a: Tensor, h: Tensor) -> Tensor | None:
        """Keep of this call what is asked for; what takes the place of ``h``."""
        if spec.Dh is not None and not spec.frozen and not (h.requires_grad and layer.weight.requires_grad):
            self.ran |= h.requires_grad  # of another optimizer's second pass, or for the inputs alone
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self._open[layer]:
            return gated(h, _forget) if spec.frozen else None  # checkpointing computes what was seen again
        if not in_backward:
            self._next_batch()
        self.ran = True
        call = Call(self._batch, len(a), 1, a.detach() if spec.inputs else None, None, None, self._start)
        wrong = layer.wrong_input(a)
        if wrong is not None and spec is not self.first:
            raise ValueError(wrong)
        call.wrong = wrong
        if wrong is None:
            call.locations = math.prod(layer.inputs.locations(a))
            if spec.h is not None:  # now: an in-place ReLU overwrites h next
                call.h = _reduced(spec.h, layer, h.detach())
        if spec.Dh is None:
            self.recorded.setdefault(layer, LayerRecord(layer)).calls.append(call)
            return None
        self._open[layer].add(call)
        arrive = self._arrival(layer, call, spec.Dh, spec.reduced)
        if spec.frozen:
            return gated(h, arrive)
        zero = functools.partial(_reduced, spec.Dh, layer, layer.empty().new_zeros(()).expand(h.shape))
        h.register_hook(self._of_the_weight(layer, call, arrive, zero))
        return None

    def _of_the_weight(
        self, layer: Layer, call: Call, arrive: Arrive, zero: Callable[[], Tensor]
    ) -> Callable[[Tensor | None], None]:
        """``arrive`` where the backward pass is for the weight, and not for something else in the loss."""
        token, aside = self._token, False
        weight = layer.modules[0].weight  # of fully_shard another tensor while the module runs

        def sift(gradient: Tensor | None) -> None:
            if gradient is None or token is not self._token or not layer.weight.requires_grad:
                return  # behind a gate, of a pass that is forgotten, or of another optimizer's second pass
            # of torch.autograd.grad with respect to the weight: to be its .grad, or to go into the loss
            if is_for(weight, itself=not torch.is_grad_enabled()):
                arrive(gradient)
                return
            nonlocal aside
            if not aside and call.Dh is None and call.wrong is None:
                self._aside.setdefault(layer, LayerRecord(layer)).calls.append(replace(call, Dh=zero()))
                aside = True

        return sift

    def _arrival(
        self, layer: Layer, call: Call, reduction: Reduction, reduced: InputReduction | None
    ) -> Arrive:
        """What to do with the gradient of a call's pre-activation."""
        token = self._token

        def arrive(gradient: Tensor) -> None:
            if token is not self._token:
                return
            self._aside.pop(layer, None)
            gradient = gradient.detach()  # of a backward pass with create_graph
            Dh = _reduced(reduction, layer, gradient) if call.wrong is None else gradient
            if call.Dh is not None:  # a closure may call backward for each part of its loss
                call.Dh = call.Dh + Dh
                return
            call.Dh = Dh
            seen = self.recorded.setdefault(layer, LayerRecord(layer))
            reduce = reduced() if reduced is not None else None
            if reduce is not None and call.a is not None and call.wrong is None:
                call.reduced = reduce(seen, call.a)
                call.a = call.a if call.reduced is None else None
            seen.calls.append(call)
            self._open[layer].discard(call)
            self._arrived = True

        return arrive

    def _next_batch(self) -> None:
        """Forward passes after a backward pass are of another micro-batch, or of another step."""
        if self._arrived:
            self._arrived, self._batch = False, self._batch + 1
            dropped = all(map(_has_no_gradient, self.recorded))
            moved = any(seen.version != layer.weight._version for layer, seen in self.recorded.items())
            if self._spec is self.first and (dropped or moved):
                self.recorded.clear()  # their gradients have been cleared, or used by another optimizer


def _reduced(reduction: Reduction, layer: Layer, x: Tensor) -> Tensor:
    """In the layer's `dtype`, whatever surrounds the pass: 1/m Σ h has more digits than h."""
    if reduction is nothing_of:
        return nothing_of(x)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _reduced(reduction, layer, x)
    return reduction(layer.preactivation(x).to(layer.dtype))


def _has_no_gradient(layer: Layer) -> bool:
    """As far as is known: that of a sharded layer may be yet to come, and is here in part."""
    grad = layer.weight.grad
    return not layer.sharded and (grad is None or not bool(grad.any()))


def _nothing() -> None:
    """There is nothing to go back to."""


def _forget(gradient: Tensor) -> None:
    """It has been told already."""


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
