"""What passes have shown of a layer: each call of its module, and the means over the calls.

`kfqn.capture` fills it in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kfqn.layers import Layer
from kfqn.second_pass import Rewind


@final
@dataclass(eq=False)
class Use:
    """One call of a layer's module in a pass, each part only if asked for.

    ``m`` data and |T| = ``locations`` went through it; ``batch`` counts the micro-batches. ``a`` is
    the input tensor itself, or None where ``early`` is what it was reduced to; ``h`` and ``Dh`` are what the
    pre-activation and its gradient, both (m, *g, I, |T|), were reduced to. ``start`` is the number of that
    pass through the model, and what puts the random state back to where it started.
    """

    batch: int
    m: int
    locations: int
    a: Tensor | None
    h: Tensor | None
    Dh: Tensor | None
    start: tuple[int, Rewind] | None
    wrong: str | None = None  # why the input is of the wrong kind
    early: Any = None


@final
class Seen:
    """All uses of one layer that are one look at the loss, and the means over them.

    Several uses in one micro-batch are further locations of the same data; several micro-batches are more
    data. Means over data therefore weigh a micro-batch by its m, and means over locations weigh
    a use by its |T|.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.version = layer.weight._version  # of the weights that were used
        self.uses: list[Use] = []

    def of(self, batch: int) -> list[Use]:
        """The uses in one micro-batch."""
        return [use for use in self.uses if use.batch == batch]

    def since(self, batch: int) -> "Seen":
        """The uses in this micro-batch and later ones."""
        later = Seen(self.layer)
        later.uses = [use for use in self.uses if use.batch >= batch]
        return later

    @property
    def data(self) -> int:
        """m, over all micro-batches."""
        return sum(self.of(batch)[0].m for batch in {use.batch for use in self.uses})

    @property
    def vectors(self) -> int:
        """How many a_t there were, over all data and locations."""
        return sum(use.m * use.locations for use in self.uses)

    def _share_of_data(self, use: Use) -> float:
        return self.of(use.batch)[0].m / self.data

    def _share_of_locations(self, use: Use) -> float:
        return use.locations / sum(other.locations for other in self.of(use.batch))

    def _sum(self, value: Callable[[Use], Tensor], weight: Callable[[Use], float]) -> Tensor:
        if len(self.uses) == 1:
            return value(self.uses[0])
        return torch.stack([value(use) * weight(use) for use in self.uses]).sum(0)

    def mean(self, of_use: Callable[[Use], Tensor]) -> Tensor:
        """A mean over data and locations, from one over those of a single use."""
        return self._sum(of_use, lambda use: self._share_of_data(use) * self._share_of_locations(use))

    def sum(self, of_use: Callable[[Use], Tensor]) -> Tensor:
        """A mean over data and a sum over locations, from one over those of a single use."""
        return self._sum(of_use, self._share_of_data)

    @property
    def has_inputs(self) -> bool:
        """Whether the inputs are still there."""
        return all(use.a is not None for use in self.uses)

    def input(self, use: Use) -> Tensor:
        """The input of a use, in the layer's `dtype`."""
        return _known(use.a).to(self.layer.dtype)

    @property
    def has_h(self) -> bool:
        """Whether what h was reduced to was asked for."""
        return all(use.h is not None for use in self.uses)

    def let_go(self) -> None:
        """Drop the inputs, which nothing needs after the step."""
        for use in self.uses:
            use.a = None

    def h(self) -> Tensor:
        """The mean over data and locations of what ``h`` was reduced to, itself such a mean."""
        return self._sum(
            lambda use: _known(use.h), lambda use: self._share_of_data(use) * self._share_of_locations(use)
        )

    def Dh(self) -> Tensor:
        """The same of the gradient, each a mean over its micro-batch with a factor of its m, or m².

        A micro-batch has only its share of the whole loss, so autograd's gradient is smaller than that of a
        datum's own loss by the whole m, and a sum over micro-batches is what a mean over data was.
        """
        return self._sum(lambda use: _known(use.Dh), self._share_of_locations)


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
