"""Gates in autograd's graph, for passes that are run again.

A training loop's own closure calls ``backward`` whether anybody wants gradients or not. At a gate it ends, or
tells its gradient; `torch.autograd.grad`, with which a loss may have a gradient in it, goes through.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad

Arrive = Callable[[Tensor], None]


def gated(h: Tensor, arrive: Arrive) -> Tensor:
    """``h`` in its own memory, behind a gate; the root of a graph where there is none.

    A backward pass for everything gives ``arrive`` its gradient there, and goes on.
    """
    root = torch.zeros((), requires_grad=True)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(h).tangent is not None:
        return _with_tangent(h, root, arrive)
    passed: Tensor = _Gate.apply(h, root, arrive)  # type: ignore[no-untyped-call]
    return passed


def is_for(leaf: Tensor, *, itself: bool) -> bool:
    """Whether the backward pass that is running is for this leaf, and not for something else.

    ``itself`` is said where `torch.autograd.grad` is asked for the gradient of the leaf itself.
    """
    return _reaches(torch.autograd.graph.get_gradient_edge(leaf).node, itself)


def _reaches(node: Any, itself: bool) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad with respect to the leaf itself
        return itself


def _with_tangent(h: Tensor, root: Tensor, arrive: Arrive) -> Tensor:
    """The same for a tensor of forward mode, whose tangent a gate would lose: nothing ends here."""
    h = h.add_(root.to(h))

    def told(gradient: Tensor) -> None:
        if is_for(root, itself=False):
            arrive(gradient)

    h.register_hook(told)
    return h


@final
class _Gate(torch.autograd.Function):
    """Identity; backwards for those only who do not ask for everything, as ``backward`` does for ``root``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, root: Tensor, arrive: Arrive) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.root, ctx.arrive = torch.autograd.graph.get_gradient_edge(root).node, arrive
        return h.data  # not h: what comes next may overwrite it, whoever has saved h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient = gradients[0]
        if not _reaches(ctx.root, itself=False):
            return gradient, None, None
        if gradient is not None:
            ctx.arrive(gradient)
        return gradient, None, None
