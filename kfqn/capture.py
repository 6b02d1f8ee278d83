"""What forward-backward passes show of each layer: the only file that registers hooks.

The hooks (`kfqn.hooks`) stay on the modules as long as the optimizer lives, because a training loop of the
user's own may run its first pass at any time. They hold the optimizer by a weak reference only, do
nothing in a pickle of the model, and outside passes with gradients return at once. In passes where no
parameter requires a gradient they put every layer behind a gate (`kfqn.gate`).
"""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.gate import Arrive, gated, is_for
from kfqn.hooks import Observe, Start, noticed_by_compiled_code
from kfqn.layers import Layer
from kfqn.second_pass import Rewind, start_of
from kfqn.seen import Seen, Use

Reduction = Callable[[Tensor], Tensor]
EarlyReduction = weakref.WeakMethod[Callable[[Seen, Tensor], Any]]


@final
@dataclass(frozen=True)
class Look:
    """What to keep of each use: its input, and what h and Dh are reduced to.

    With ``Dh`` passes with gradients are looked at, without those under ``torch.no_grad()``. ``frozen`` says
    that no parameter requires a gradient, so that graphs have to start at the pre-activations. ``early`` says
    what to keep instead of an input when its gradient arrives, given what was seen of the layer so far; with
    None it is kept itself. With ``gated`` nothing is kept, and no backward pass goes through a layer; with
    ``cut`` neither does `torch.autograd.grad`, and autograd does not know what was before.
    """

    inputs: bool
    h: Reduction | None = None
    Dh: Reduction | None = None
    frozen: bool = False
    early: EarlyReduction | None = None
    gated: bool = False
    cut: bool = False


def nothing_of(x: Tensor) -> Tensor:
    """Zero, for a `Look` that asks which gradients arrive, and not what they are."""
    return x.new_zeros(())


_HIDES = (
    "which hides what goes through it: run the model outside of them, and take derivatives with "
    "torch.autograd.grad"
)
LOSS_ALONE = Look(inputs=False, frozen=True, gated=True)
LOSS_WITHOUT_GRADIENTS = Look(inputs=False, frozen=True, gated=True, cut=True)


@final
class Watch:
    """What the passes since the last `take` have shown of each layer that a gradient has reached.

    A use counts from the moment its gradient arrives; before, only autograd's graph holds it, so
    a pass that nobody calls backward on is forgotten with its graph.
    """

    in_closure = False  # whether passes are those of a closure, which starts as a whole
    differentiated = False  # whether gradients of something else than weights were ever asked for
    blind = ""  # why a layer that ran since the last step was not seen, a sentence

    def __init__(self, model: nn.Module, layers: Sequence[Layer], first: Look) -> None:
        self.data_parallel: DistributedDataParallel | None = None  # what the model was last run by
        noticed_by_compiled_code()
        self.look_first(first)
        self._open: dict[Layer, weakref.WeakSet[Use]] = {}
        self._numbers = itertools.count()
        self._replay: Iterator[Rewind] = iter(())
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles).atexit = False
        hook = Start(self)
        hook.handles.append(model.register_forward_pre_hook(hook))
        self._handles += hook.handles
        self.forget()
        self.add(layers)

    def look_first(self, look: Look | None) -> None:
        """Look like this at first passes from now on; with None not at all."""
        self._look = self.first = look
        self.blind = ""

    def add(self, layers: Sequence[Layer]) -> None:
        """Watch these layers too."""
        for layer in layers:
            hook = Observe(self, layer)
            self._open[layer] = weakref.WeakSet()
            hook.handles += [m.register_forward_hook(hook, with_kwargs=True) for m in layer.modules]
            self._handles += hook.handles

    def forget(self) -> None:
        """Drop what was seen."""
        self._seen: dict[Layer, Seen] = {}
        self._aside: dict[Layer, Seen] = {}  # uses whose output was differentiated, but not for the weights
        self._token = object()  # graphs of before are none of ours any more
        self._batch, self._arrived = 0, False
        self._start: tuple[int, Rewind] | None = None  # of the pass that runs
        self._hidden: set[Layer] = set()  # what ran where no gradients are recorded
        self.empty = False  # whether a layer ran on no data
        self.ran = False  # whether a layer ran at all, also if no gradient has reached it

    def drop(self) -> None:
        """The gradients have been cleared, and with them what earlier passes say of this step."""
        if self._look is self.first:
            self._batch, self._arrived = self.next_batch, False
            self._seen.clear()
            self._aside.clear()

    def take(self) -> dict[Layer, Seen]:
        """What was seen, once. Raises ValueError if an input was of the wrong kind."""
        for layer in self._aside.keys() - self._seen.keys():
            if not _has_no_gradient(layer):  # a loss of derivatives alone, for the last layer
                self._seen[layer] = self._aside[layer]
        seen = {layer: self._seen[layer] for layer in self._open if layer in self._seen}
        self.forget()
        for message in (use.wrong for layer in seen for use in seen[layer].uses if use.wrong):
            raise ValueError(message)
        return seen

    @property
    def next_batch(self) -> int:
        """The number of the micro-batch that a forward pass now would be of."""
        return self._batch + self._arrived

    @property
    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self._seen)

    def misses(self, layers: Iterable[Layer]) -> bool:
        """Whether one of them ran, but inside a `torch.autograd.Function` which has not shown it."""
        return any(layer in self._hidden and layer not in self._seen for layer in layers)

    @contextlib.contextmanager
    def looking(self, look: Look, replay: Sequence[Rewind] = ()) -> Iterator[dict[Layer, Seen]]:
        """Look otherwise inside the ``with``, at passes that start from these states in turn."""
        outside = self._look, self._seen, self._token, self._batch, self._arrived, self.ran
        self._look, self._replay = look, iter(replay)
        self.forget()
        try:
            yield self._seen
        finally:
            self._look, self._seen, self._token, self._batch, self._arrived, self.ran = outside
            self._replay = iter(())

    def start(self, model: nn.Module) -> None:
        """A pass through the whole model begins."""
        if not torch.is_grad_enabled() or self._look is None:
            return
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing of the whole model
        self.data_parallel = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if self._look is not self.first:
            next(self._replay, _nothing)()
        elif not self.in_closure:
            devices = {layer.weight.device for layer in self._open}
            self._start = next(self._numbers), start_of(model, devices)

    def observe(self, layer: Layer, a: Tensor, h: Tensor) -> Tensor | None:
        """A module of the layer has turned ``a`` into ``h``; what takes the place of h, if anything does."""
        look, with_gradients = self._look, torch.is_grad_enabled()
        if torch._C._are_functorch_transforms_active():
            self.blind = f"{layer} ran inside vmap, grad or another transform of torch.func, {_HIDES}"
            return None
        if torch._C._is_tracing():
            return None
        if not h.numel():
            self.empty |= with_gradients
            return None
        if look is not None and look is not self.first:
            self.ran = True
        if look is not None and look.gated:
            return gated(h, cut=look.cut) if with_gradients else None
        if with_gradients != (look is None or look.Dh is not None):
            self._hidden.add(layer)
            return None
        if look is None:
            self.ran = True
            return None
        return self._keep(look, layer, a, h)

    def _keep(self, look: Look, layer: Layer, a: Tensor, h: Tensor) -> Tensor | None:
        """Keep of this use what is asked for; what takes the place of ``h``."""
        if look.Dh is not None and not look.frozen and not (h.requires_grad and layer.weight.requires_grad):
            self.ran |= h.requires_grad  # of another optimizer's second pass, or for the inputs alone
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self._open[layer]:
            return gated(h, _forget) if look.frozen else None  # checkpointing computes what was seen again
        if not in_backward:
            self._next_batch()
        self.ran = True
        use = Use(self._batch, len(a), 1, a.detach() if look.inputs else None, None, None, self._start)
        wrong = layer.wrong_input(a)
        if wrong is not None and look is not self.first:
            raise ValueError(wrong)
        use.wrong = wrong
        if wrong is None:
            use.locations = math.prod(layer.inputs.locations(a))
            if look.h is not None:  # now: an in-place ReLU overwrites h next
                use.h = _reduced(look.h, layer, h.detach())
        if look.Dh is None:
            self._seen.setdefault(layer, Seen(layer)).uses.append(use)
            return None
        self._open[layer].add(use)
        arrive = self._arrival(layer, use, look.Dh, look.early)
        if look.frozen:
            return gated(h, arrive)
        zero = functools.partial(_reduced, look.Dh, layer, layer.empty().new_zeros(()).expand(h.shape))
        h.register_hook(self._of_the_weight(layer, use, arrive, zero))
        return None

    def _of_the_weight(
        self, layer: Layer, use: Use, arrive: Arrive, zero: Callable[[], Tensor]
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
            self.differentiated = True
            nonlocal aside
            if not aside and use.Dh is None and use.wrong is None:
                self._aside.setdefault(layer, Seen(layer)).uses.append(replace(use, Dh=zero()))
                aside = True

        return sift

    def _arrival(self, layer: Layer, use: Use, reduction: Reduction, early: EarlyReduction | None) -> Arrive:
        """What to do with the gradient of a use's pre-activation."""
        token = self._token

        def arrive(gradient: Tensor) -> None:
            if token is not self._token:
                return
            self._aside.pop(layer, None)
            gradient = gradient.detach()  # of a backward pass with create_graph
            Dh = _reduced(reduction, layer, gradient) if use.wrong is None else gradient
            if use.Dh is not None:  # a closure may call backward for each part of its loss
                use.Dh = use.Dh + Dh
                return
            use.Dh = Dh
            seen = self._seen.setdefault(layer, Seen(layer))
            reduce = early() if early is not None else None
            if reduce is not None and use.a is not None and use.wrong is None:
                use.early = reduce(seen, use.a)
                use.a = use.a if use.early is None else None
            seen.uses.append(use)
            self._open[layer].discard(use)
            self._arrived = True

        return arrive

    def _next_batch(self) -> None:
        """Forward passes after a backward pass are of another micro-batch, or of another step."""
        if self._arrived:
            self._arrived, self._batch = False, self._batch + 1
            dropped = all(map(_has_no_gradient, self._seen))
            moved = any(seen.version != layer.weight._version for layer, seen in self._seen.items())
            if self._look is self.first and (dropped or moved):
                self._seen.clear()  # their gradients have been cleared, or used by another optimizer


def _reduced(reduction: Reduction, layer: Layer, x: Tensor) -> Tensor:
    """In the layer's `dtype`, whatever surrounds the pass: 1/m Σ h has more digits than h."""
    if reduction is nothing_of:
        return nothing_of(x)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _reduced(reduction, layer, x)
    return reduction(layer.preactivation(x).to(layer.dtype))


def _has_no_gradient(layer: Layer) -> bool:
    return layer.weight.grad is None or not layer.weight.grad.any()


def _nothing() -> None:
    """There is nothing to go back to."""


def _forget(gradient: Tensor) -> None:
    """It has been told already."""


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
