"""The optimizers that race, the grids they are tuned on, and what tuning found.

The grids give every optimizer a similar number of points, around what its authors and
users take. The values found are read from ``tuned.json``, which `kfqn sweep` writes.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from kfqn.race.failure import Failure

if TYPE_CHECKING:
    import torch
    from torch import nn

Settings = Mapping[str, float]


@dataclass(frozen=True)
class Entrant:
    """``build`` makes the optimizer; ``grid`` holds the values that a sweep tries, per setting."""

    name: str
    label: str
    build: Callable[["nn.Module", Settings, float], "torch.optim.Optimizer"]
    grid: Mapping[str, tuple[float, ...]]

    def points(self) -> list[Settings]:
        """Every combination of the grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]


def _kfbfgs(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import kfqn

    return kfqn.KFBFGS(model, lr=settings["lr"], damping=settings["damping"], weight_decay=weight_decay)


def _kflbfgs(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import kfqn

    return kfqn.KFLBFGS(model, lr=settings["lr"], damping=settings["damping"], weight_decay=weight_decay)


def _sgd(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import torch

    return torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9, weight_decay=weight_decay)


def _adam(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import torch

    eps = settings["eps"]
    return torch.optim.Adam(model.parameters(), lr=settings["lr"], eps=eps, weight_decay=weight_decay)


_SECOND_ORDER = {"lr": (3.0, 10.0, 20.0, 30.0, 60.0), "damping": (1.0, 10.0, 30.0, 100.0)}

ENTRANTS = {
    entrant.name: entrant
    for entrant in (
        Entrant("kfbfgs", "KF-BFGS", _kfbfgs, _SECOND_ORDER),
        Entrant("kflbfgs", "KF-BFGS(L)", _kflbfgs, _SECOND_ORDER),
        Entrant(
            "sgd",
            "SGD-m",
            _sgd,
            {"lr": tuple(float(f"{0.003 * 100 ** (k / 19):.2g}") for k in range(20))},
        ),
        Entrant(
            "adam",
            "Adam",
            _adam,
            {"lr": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "eps": (1e-8, 1e-6, 1e-4, 1e-2)},
        ),
    )
}


@cache
def tuned() -> dict[str, dict[str, dict[str, float]]]:
    """What the committed sweeps found best: problem -> entrant -> settings."""
    text = resources.files("kfqn.race").joinpath("tuned.json").read_text(encoding="utf-8")
    return {problem: sweep["best"] for problem, sweep in json.loads(text).items()}


def best_settings(problem: str, entrant: str) -> Settings:
    """The settings an entrant races with; Failure if no sweep has found any."""
    try:
        return tuned()[problem][entrant]
    except KeyError:
        raise Failure(
            f"no settings are known for {entrant} on {problem}: give them, as in "
            f"--optimizers {entrant}:{','.join(f'{key}=...' for key in ENTRANTS[entrant].grid)}, or run "
            f"'kfqn sweep --problem {problem}' first."
        ) from None
