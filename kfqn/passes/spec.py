"""What to keep of a pass through the model."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from kfqn.passes.record import LayerRecord

Reduction = Callable[[Tensor], Tensor]
InputReduction = weakref.WeakMethod[Callable[[LayerRecord, Tensor], Any]]


@final
@dataclass(frozen=True)
class PassSpec:
    """What to keep of each call: its input, and what h and Dh are reduced to.

    With ``Dh`` passes with gradients are recorded, without those under ``torch.no_grad()``. ``frozen`` says
    that no parameter requires a gradient, so that graphs have to start at the pre-activations. ``reduced``
    says what to keep instead of an input when its gradient arrives, given what was recorded of the layer so
    far; with None it is kept itself.
    """

    inputs: bool
    h: Reduction | None = None
    Dh: Reduction | None = None
    frozen: bool = False
    reduced: InputReduction | None = None


def nothing_of(x: Tensor) -> Tensor:
    """Zero, for a `PassSpec` that asks which gradients arrive, and not what they are."""
    return x.new_zeros(())
