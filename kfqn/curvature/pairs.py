"""The pairs (s, y) that two passes over one mini-batch give, and what is kept of the first until then."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfqn.formulas.rows import Rows
from kfqn.parameters.groups import Group, State
from kfqn.parameters.layers import Layer


class First(NamedTuple):
    """What is kept of a layer's first pass until the second: s (*g, C), A s, and h̄ and Dh̄ (*g, I).

    h̄ and Dh̄ are of those micro-batches that the second pass runs again, and None where H_A learns alone;
    ``factor`` is the data of all over the data of these.
    """

    s: Tensor
    As: Tensor
    h_Dh: tuple[Tensor, Tensor] | None
    factor: float


class ReducedInput(NamedTuple):
    """What an input was reduced to when its gradient arrived: ā and s (*g, C), and A s."""

    a: Tensor
    s: Tensor
    As: Tensor

    def like(self, layer: Layer) -> "ReducedInput":
        """The same where the layer is now, and of its type."""
        return ReducedInput(*(x.to(layer.weight.device, layer.dtype) for x in self))


def changes(
    h: Sequence[Tensor],
    Dh: Sequence[Tensor],
    h_after: Sequence[Tensor],
    Dh_after: Sequence[Tensor],
    factors: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """How h̄ and Dh̄, (*g, I), of every layer have changed, the latter times the layer's factor."""
    dh, dDh = torch._foreach_sub([*h_after], [*h]), torch._foreach_sub([*Dh_after], [*Dh])
    torch._foreach_mul_(dDh, factors)
    return [*dh], [*dDh]


def averaged_pairs(
    dh: Sequence[Tensor], dDh: Sequence[Tensor], states: Sequence[State], group: Group
) -> tuple[list[Tensor], list[Tensor]]:
    """s_G and y_G with this step's changes of h̄ and Dh̄ averaged in; without, and zeros, if not finite."""
    rows = Rows.of(dh)
    changed = {"s_G": rows.join(dh), "y_G": rows.join(dDh)}
    finite = torch.stack([*changed.values()]).isfinite().all(0).all(-1, keepdim=True)
    pair = []
    for key, change in changed.items():
        kept = [state[key] for state in states]
        before = rows.join(kept)
        average = before.lerp(torch.where(finite, change, before), 1 - group["beta"])
        torch._foreach_copy_(kept, rows.part(average))
        pair.append(rows.part(torch.where(finite, average, 0.0)))
    return pair[0], pair[1]
