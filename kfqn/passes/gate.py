"""Gates in autograd's graph, for passes that are run again.

A training loop's own closure calls ``backward`` whether anybody wants gradients or not. At a gate it ends, or
tells its gradient; `torch.autograd.grad`, with which a loss may have a gradient in it, goes through.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from kfqn.runtime.private import is_wanted

Arrive = Callable[[Tensor], None]


def gated(h: Tensor, arrive: Arrive) -> Tensor:
    """``h`` in its own memory, behind a gate; the root of a graph where there is none.

    A backward pass for everything gives ``arrive`` its gradient there, and goes on.
    """
    passed: Tensor = _Gate.apply(h, torch.zeros((), requires_grad=True), arrive)  # type: ignore[no-untyped-call]
    return passed


def is_for(leaf: Tensor, *, itself: bool) -> bool:
    """Whether the backward pass that is running is for this leaf, and not for something else."""
    return is_wanted(torch.autograd.graph.get_gradient_edge(leaf).node, itself)


@final
class _Gate(torch.autograd.Function):
    """Identity; backwards for those only who do not ask for everything, as ``backward`` does for ``root``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, root: Tensor, arrive: Arrive) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.root, ctx.arrive = torch.autograd.graph.get_gradient_edge(root).node, arrive
        return h.data  # not h: what comes next may overwrite it, whoever has saved h

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return tangents[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient = gradients[0]
        if gradient is not None and is_wanted(ctx.root, itself=False):
            ctx.arrive(gradient)
        return gradient, None, None
