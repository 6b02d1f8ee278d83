"""What to keep of a pass through the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from kfqn.parameters.layers import Layer

Reduction = Callable[[Tensor], Tensor]
InputReduction = Callable[[Tensor, Any], Any]


@final
@dataclass(frozen=True)
class PassSpec:
    """What to keep of each call: its input, and what h and Dh are reduced to.

    With ``Dh`` passes with gradients are recorded, without those under ``torch.no_grad()``; ``linear`` says
    that it is so in the gradient, as sums over data and locations are. ``frozen`` says that no parameter
    requires a gradient, so that graphs have to start at the pre-activations. ``reduced`` says what to keep
    instead of a layer's input, given the input and what was kept of the first call; None says: the input.
    """

    inputs: bool
    h: Reduction | None = None
    Dh: Reduction | None = None
    linear: bool = True
    frozen: bool = False
    reduced: Mapping[Layer, InputReduction] = field(default_factory=dict)


def nothing_of(x: Tensor) -> Tensor:
    """Zero, for a `PassSpec` that asks which gradients arrive, and not what they are."""
    return x.new_zeros(())
