"""A gate in autograd's graph, for passes of which only the loss is wanted.

A training loop's own closure calls ``backward`` whether anybody wants gradients or not. Behind a gate it
computes none, while `torch.autograd.grad`, with which a loss may have a gradient in it, goes through.
"""

from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad


def gated(h: Tensor) -> Tensor:
    """``h`` in its own memory, behind a gate; the root of a graph where there is none."""
    root = torch.zeros((), requires_grad=True)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(h).tangent is not None:
        return h if h.requires_grad else h.add_(root.to(h))  # a gate would lose the tangent
    passed: Tensor = _Gate.apply(h, root)  # type: ignore[no-untyped-call]
    return passed


@final
class _Gate(torch.autograd.Function):
    """Identity; backwards for those only who do not ask for everything, as ``backward`` does for ``root``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, root: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.root = torch.autograd.graph.get_gradient_edge(root).node
        return h.data  # not h: what comes next may overwrite it, whoever has saved h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        try:
            asks_for_everything = bool(torch._C._will_engine_execute_node(ctx.root))
        except RuntimeError:  # torch.autograd.grad with respect to the root itself
            asks_for_everything = False
        return (None if asks_for_everything else gradients[0]), None
