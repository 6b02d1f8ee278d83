"""The torch optimizer of the parameters that belong to no layer, unless told otherwise."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

Others = Callable[[list[Any]], torch.optim.Optimizer]

_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)  # of torch's


AUTOMATIC = 3e-3  # learning rate beside lr="auto", as for what Muon leaves to Adam


def adamw(parameters: list[Any], lr: float = 1e-3) -> torch.optim.Optimizer:
    """What trains the parameters that belong to no layer, unless told otherwise."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, foreach=True)


@final
class AdamWAndSparseAdam(torch.optim.Optimizer):
    """`adamw`, with `torch.optim.SparseAdam` at its settings for parameters that have sparse gradients."""

    def __init__(self, parameters: list[Any], lr: float = 1e-3) -> None:
        groups = adamw(parameters, lr)
        super().__init__(groups.param_groups, groups.defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for sparse, make in ((False, torch.optim.AdamW), (True, torch.optim.SparseAdam)):
            parts = [
                [p for p in group["params"] if p.grad is not None and p.grad.is_sparse == sparse]
                for group in self.param_groups
            ]
            if any(parts):
                rule = make([g | {"params": some} for g, some in zip(self.param_groups, parts, strict=True)])
                rule.state = self.state
                rule.step()


def made(others: Others, parameters: list[Any], model: nn.Module, automatic: bool) -> torch.optim.Optimizer:
    """What ``others`` makes of the parameters.

    The default takes the sparse gradients of a model, too, and has a rate of its own beside an automatic one.
    Raises ValueError if it makes no optimizer, or one that cannot be used here.
    """
    if not callable(others) or isinstance(others, torch.optim.Optimizer):
        raise ValueError(
            "others must be a function that makes a torch optimizer of a list of parameters, such as "
            f"torch.optim.AdamW itself, but is {others!r}."
        )
    sparse = _sparse(model)
    if others is adamw:
        default = AdamWAndSparseAdam if sparse else adamw
        return default(parameters, AUTOMATIC if automatic else 1e-3)
    optimizer = others(parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("others cannot be torch.optim.LBFGS, which needs closures of its own.")
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    if sparse and of_torch and not isinstance(optimizer, _TAKE_SPARSE):
        raise ValueError(
            f"others makes {type(optimizer).__name__}, which takes no sparse gradients, and {sparse} has "
            "sparse=True: leave others out, which trains it by SparseAdam, or build it with sparse=False."
        )
    return optimizer


def _sparse(model: nn.Module) -> str | None:
    """The first trainable module whose gradients are sparse."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and any(p.requires_grad for p in module.parameters()):
            return f"'{name}' ({type(module).__name__})"
    return None
