"""What one forward-backward pass shows of each layer: the only file that registers hooks.

Hooks live inside one ``with`` and are gone after it, whatever happens inside, so between
steps the model can be copied, saved and compiled as if we were not there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfqn.layers import Layer

Reduction = Callable[[Tensor], Tensor]


@dataclass
class Seen:
    """One layer in one pass, each part only if asked for.

    ``a`` is the input tensor itself, in the layer's `dtype`; ``h`` and ``Dh`` are what the
    pre-activation and its gradient, (m, I, *T), were reduced to. ``Dh`` is None until the
    backward pass has reached the layer.
    """

    a: Tensor | None = None
    h: Tensor | None = None
    Dh: Tensor | None = None

    def input(self) -> Tensor:
        """The input, in a pass that was to keep it."""
        assert self.a is not None
        return self.a

    def gradient(self) -> Tensor:
        """What the gradient was reduced to, of a layer that the backward pass has reached."""
        assert self.Dh is not None
        return self.Dh


@contextlib.contextmanager
def capture(
    layers: Sequence[Layer], *, inputs: bool, h: Reduction | None = None, Dh: Reduction | None = None
) -> Iterator[dict[Layer, Seen]]:
    """Watch the layers during the pass inside the ``with``; a layer not run is not in the result.

    ``inputs`` says whether to keep each layer's input; ``h`` and ``Dh`` what to reduce the
    pre-activation and its gradient to, at once, in the layer's `dtype`. With ``Dh`` forward passes with
    gradients are watched, also when the weights are frozen; without, those under ``torch.no_grad()``. The
    other forward passes are not looked at.

    Raises ValueError inside the ``with`` for an input of the wrong kind, and for a layer
    that runs twice in one pass.
    """
    seen: dict[Layer, Seen] = {}
    handles = [
        layer.module.register_forward_hook(_observer(layer, seen, inputs, h, Dh), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


Observer = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]


def _observer(
    layer: Layer,
    seen: dict[Layer, Seen],
    inputs: bool,
    reduce_h: Reduction | None,
    reduce_Dh: Reduction | None,
) -> Observer:
    def observe(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], h: Tensor) -> None:
        if torch.is_grad_enabled() != (reduce_Dh is not None):
            return
        a = args[0] if args else kwargs["input"]
        layer.check_input(a)
        if layer in seen:
            raise ValueError(
                f"{layer} ran twice in one pass, and layers used several times or under activation "
                "checkpointing are not supported yet: use a module of its own for each place, or freeze it "
                "with requires_grad_(False)."
            )
        record = seen[layer] = Seen(a=a.detach().to(layer.dtype) if inputs else None)
        if reduce_h is not None:  # now: an in-place ReLU overwrites h next
            record.h = reduced(reduce_h, h.detach())
        if reduce_Dh is None:
            return
        if not h.requires_grad:  # weights frozen and nothing trainable below: the graph starts here
            h.add_(torch.zeros((), dtype=h.dtype, device=h.device, requires_grad=True))
        h.register_hook(lambda gradient: note(record, reduced(reduce_Dh, gradient)))

    def reduced(reduction: Reduction, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return reduction(layer.channels_first(x).to(layer.dtype))

    def note(record: Seen, Dh: Tensor) -> None:
        record.Dh = Dh if record.Dh is None else record.Dh + Dh  # a closure may call backward more than once

    return observe
