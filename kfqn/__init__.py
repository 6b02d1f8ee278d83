"""Kronecker-factored quasi-Newton optimizers for PyTorch.

The optimizers are imported when first used, so that ``kfqn --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfqn.closures import closure
    from kfqn.convergent import ConvergentKFLBFGS
    from kfqn.integrations.report import Report
    from kfqn.kf_bfgs import KFBFGS, KFLBFGS
    from kfqn.kfac import KFAC
    from kfqn.optimizer import Kronecker
    from kfqn.parts import Parts

__all__ = ["KFAC", "KFBFGS", "KFLBFGS", "ConvergentKFLBFGS", "Kronecker", "Parts", "Report", "closure"]
__version__ = "0.1.0"

_HOMES = {
    "KFAC": "kfac",
    "KFBFGS": "kf_bfgs",
    "KFLBFGS": "kf_bfgs",
    "Kronecker": "optimizer",
    "Parts": "parts",
    "Report": "integrations.report",
    "ConvergentKFLBFGS": "convergent",
    "closure": "closures",
}


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(f"kfqn.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'kfqn' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
