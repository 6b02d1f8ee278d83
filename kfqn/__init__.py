"""Kronecker-factored quasi-Newton optimizers for PyTorch.

The optimizers are imported when first used, so that ``kfqn --help`` need not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfqn.quasi_newton import KFBFGS, KFLBFGS

__all__ = ["KFBFGS", "KFLBFGS"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from kfqn import quasi_newton

        return getattr(quasi_newton, name)
    raise AttributeError(f"module 'kfqn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
