"""What is asked of a pass, and what it has shown of a layer: each call of its module, and means over them.

`kfqn.passes.recorder` fills it in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from kfqn.parameters.layers import Layer
from kfqn.passes.replay import Rewind
from kfqn.runtime.private import version

Reduction = Callable[[Tensor], Tensor]
InputReduction = Callable[[Tensor, Any], Any]


@final
@dataclass(frozen=True)
class PassSpec:
    """What to keep of each call: its input, and what h and Dh are reduced to.

    With ``Dh`` passes with gradients are recorded, without those under ``torch.no_grad()``. Compiled code
    shows those with gradients, of which ``Dh`` is linear, as sums over data and locations are; others have
    to be run in eager code. ``frozen`` says that no parameter requires a gradient, so that graphs have to
    start at the pre-activations. ``reduced`` says what to keep instead of a layer's input, given the input
    and what was kept of the first call; None says: the input.
    """

    inputs: bool
    h: Reduction | None = None
    Dh: Reduction | None = None
    frozen: bool = False
    reduced: Mapping[Layer, InputReduction] = field(default_factory=dict)


def nothing_of(x: Tensor) -> Tensor:
    """Zero, for a `PassSpec` that asks which gradients arrive, and not what they are."""
    return x.new_zeros(())


@final
@dataclass(eq=False)
class Call:
    """One call of a layer's module in a pass, each part only if asked for.

    ``m`` data and |T| = ``locations`` went through it; ``batch`` counts the micro-batches. ``a`` is
    the input tensor itself, or None where ``reduced`` is what is kept of it; ``h`` and ``Dh`` are what the
    pre-activation and its gradient, both (m, *g, I, |T|), were reduced to. ``start`` is the number of that
    pass through the model, and what puts the random state back to where it started.
    """

    m: int
    locations: int
    a: Tensor | None
    wrong: str | None = None  # why the input is of the wrong kind
    h: Tensor | None = None
    Dh: Tensor | None = None
    reduced: Any = None
    batch: int = 0
    start: tuple[int, Rewind] | None = None


@final
class LayerRecord:
    """All calls of one layer that are one look at the loss, and the means over them.

    Several calls in one micro-batch are further locations of the same data; several micro-batches are more
    data. Means over data therefore weigh a micro-batch by its m, and means over locations weigh
    a call by its |T|.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.version = version(layer.weight)  # of the weights that were used
        self.calls: list[Call] = []

    def of(self, batch: int) -> list[Call]:
        """The calls in one micro-batch."""
        return [call for call in self.calls if call.batch == batch]

    def since(self, batch: int) -> "LayerRecord":
        """The calls in this micro-batch and later ones."""
        later = LayerRecord(self.layer)
        later.calls = [call for call in self.calls if call.batch >= batch]
        return later

    @property
    def data(self) -> int:
        """m, over all micro-batches."""
        return sum(self.of(batch)[0].m for batch in {call.batch for call in self.calls})

    @property
    def vectors(self) -> int:
        """How many a_t there were, over all data and locations."""
        return sum(call.m * call.locations for call in self.calls)

    def _share_of_data(self, call: Call) -> float:
        return self.of(call.batch)[0].m / self.data

    def _share_of_locations(self, call: Call) -> float:
        return call.locations / sum(other.locations for other in self.of(call.batch))

    def _sum(self, value: Callable[[Call], Tensor], weight: Callable[[Call], float]) -> Tensor:
        if len(self.calls) == 1:
            return value(self.calls[0])
        return torch.stack([value(call) * weight(call) for call in self.calls]).sum(0)

    def mean(self, of_call: Callable[[Call], Tensor]) -> Tensor:
        """A mean over data and locations, from one over those of a single call."""
        return self._sum(of_call, lambda call: self._share_of_data(call) * self._share_of_locations(call))

    def sum(self, of_call: Callable[[Call], Tensor]) -> Tensor:
        """A mean over data and a sum over locations, from one over those of a single call."""
        return self._sum(of_call, self._share_of_data)

    @property
    def has_inputs(self) -> bool:
        """Whether the inputs are still there."""
        return all(call.a is not None for call in self.calls)

    def input(self, call: Call) -> Tensor:
        """The input of a call, in the layer's `dtype`."""
        return _known(call.a).to(self.layer.dtype)

    @property
    def has_h(self) -> bool:
        """Whether what h was reduced to was asked for."""
        return all(call.h is not None for call in self.calls)

    def let_go(self) -> None:
        """Drop the inputs, which nothing needs after the step."""
        for call in self.calls:
            call.a = None

    def h(self) -> Tensor:
        """The mean over data and locations of what ``h`` was reduced to, itself such a mean."""
        return self.mean(lambda call: _known(call.h))

    def Dh(self) -> Tensor:
        """The same of the gradient, each a mean over its micro-batch with a factor of its m, or m².

        A micro-batch has only its share of the whole loss, so autograd's gradient is smaller than that of a
        datum's own loss by the whole m, and a sum over micro-batches is what a mean over data was.
        """
        return self._sum(lambda call: _known(call.Dh), self._share_of_locations)


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
