"""What one forward-backward pass shows of each layer: the only file that registers hooks.

Hooks live inside one ``with`` and are gone after it, whatever happens inside, so between
steps the model can be copied, saved and compiled as if we were not there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfqn.curvature import mean_preactivation, mean_preactivation_gradient
from kfqn.layers import Layer


@dataclass
class Seen:
    """One layer in one pass: its input (if asked for) and the means over data and locations.

    ``a`` is the input tensor itself, in the layer's `dtype`; ``h`` is h̄ and ``Dh`` is Dh̄,
    both (I,). ``Dh`` is None until the backward pass has reached the layer.
    """

    a: Tensor | None
    h: Tensor
    Dh: Tensor | None = None

    def input(self) -> Tensor:
        """The input, in a pass that was to keep it."""
        assert self.a is not None
        return self.a


@contextlib.contextmanager
def capture(layers: Sequence[Layer], *, inputs: bool, gradients: bool = True) -> Iterator[dict[Layer, Seen]]:
    """Watch the layers during the pass inside the ``with``; a layer not run is not in the result.

    ``inputs`` says whether to keep each layer's input. ``gradients`` says which forward passes
    count: those with gradients, whose backward passes are then watched too, also when the weights
    are frozen; or those under ``torch.no_grad()``. The others are not looked at.

    Raises ValueError inside the ``with`` for an input of the wrong kind, and for a layer
    that runs twice in one pass.
    """
    seen: dict[Layer, Seen] = {}
    handles = [
        layer.module.register_forward_hook(_observer(layer, seen, inputs, gradients), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


Observer = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]


def _observer(layer: Layer, seen: dict[Layer, Seen], inputs: bool, gradients: bool) -> Observer:
    def observe(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], h: Tensor) -> None:
        if torch.is_grad_enabled() != gradients:
            return
        a = args[0] if args else kwargs["input"]
        layer.check_input(a)
        if layer in seen:
            raise ValueError(
                f"{layer} ran twice in one pass, and layers used several times or under activation "
                "checkpointing are not supported yet: use a module of its own for each place, or freeze it "
                "with requires_grad_(False)."
            )
        with torch.autocast(h.device.type, enabled=False):
            mean = mean_preactivation(h.detach().to(layer.dtype))  # now: in-place ReLU overwrites h next
        record = seen[layer] = Seen(a=a.detach().to(layer.dtype) if inputs else None, h=mean)
        if not gradients:
            return
        if not h.requires_grad:  # weights frozen and nothing trainable below: the graph starts here
            h.add_(torch.zeros((), dtype=h.dtype, device=h.device, requires_grad=True))
        h.register_hook(lambda gradient: note(record, gradient))

    def note(record: Seen, gradient: Tensor) -> None:
        with torch.autocast(gradient.device.type, enabled=False):
            Dh = mean_preactivation_gradient(gradient.to(layer.dtype))
        record.Dh = Dh if record.Dh is None else record.Dh + Dh  # a closure may call backward more than once

    return observe
