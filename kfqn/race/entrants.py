"""The optimizers that race, the grids they are tuned on, and what tuning found.

The grids give every optimizer a similar number of points, around what its authors and
users take. The values found on digits are in ``tuned.json``, which `kfqn sweep --save` writes.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
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


# The best values of the paper's own search, Table 3. Its SGD-m averages the gradient, so that its lr 0.1 is
# torch's 0.01, and its Adam is not quite torch's (`docs/decisions.md`, 15).
TABLE_3: Mapping[str, Mapping[str, Settings]] = {
    "cifar10-allcnn": {
        "kfbfgs": {"lr": 30.0, "damping": 30.0},
        "kflbfgs": {"lr": 30.0, "damping": 30.0},
        "sgd": {"lr": 0.01},
        "adam": {"lr": 1e-4, "eps": 1e-4},
    },
}


def best_settings(problem: str, entrant: str, sweep: Path) -> Settings:
    """The settings an entrant races with unless told otherwise.

    From ``sweep``, a file of `kfqn sweep`, if it is there; else from the sweep committed in
    ``tuned.json``; else from the paper. Raises Failure if none of them knows the entrant.
    """
    committed = resources.files("kfqn.race").joinpath("tuned.json")
    texts = [file.read_text(encoding="utf-8") for file in (sweep, committed) if file.is_file()]
    try:
        found = [json.loads(text).get(problem, {}).get("best", {}) for text in texts]
    except ValueError as error:
        raise Failure(
            f"{sweep} is damaged ({error}): delete it, or choose another folder with --out."
        ) from error
    for best in (*found, TABLE_3.get(problem, {})):
        if entrant in best:
            return dict(best[entrant])
    raise Failure(
        f"no settings are known for {entrant} on {problem}: give them, as in --optimizers "
        f"{entrant}:{','.join(f'{key}=...' for key in ENTRANTS[entrant].grid)}, or run 'kfqn sweep --problem "
        f"{problem}' with the same --out first."
    )
