"""Who is told of a run's steps, and what an optimizer can tell them, inside of a framework's wrapper too."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from kfqn import Kronecker


class Watcher(Protocol):
    """Told of steps, by a loop of one's own or by the ``Watch`` of a framework."""

    def update(self, optimizer: Any, loss: Tensor | float | None = None, step: int | None = None) -> None:
        """A step has been taken. ``step`` is its number, by default one more than the last."""

    def write(self) -> None:
        """Have all that is known on disk."""


def inner(optimizer: Any) -> Kronecker:
    """kfqn's optimizer: itself, or what Lightning and Accelerate have wrapped.

    Raises TypeError for the optimizer of anybody else.
    """
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, Kronecker):
        raise TypeError(
            f"only optimizers of kfqn tell what their factors do, but this is a {type(found).__name__}: give "
            "the one that kfqn.KFBFGS(model) has made."
        )
    return found


def scalars(optimizer: Any) -> dict[str, float]:
    """`Kronecker.diagnostics` by one name each, ``layer/number``, as loggers want it.

    ``wandb.log(scalars(optimizer))``, ``accelerator.log(...)``, and so on.
    """
    found: Mapping[str, Mapping[str, float]] = inner(optimizer).diagnostics()
    return {
        f"{layer or 'all layers'}/{name}": value
        for layer, numbers in found.items()
        for name, value in numbers.items()
    }
