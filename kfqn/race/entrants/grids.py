"""What a sweep tries, as data: the ranges of appendix B.2, and those of problems that are not the paper's.

`PRINTED` and `TABLE_3` hold the paper's numbers as printed. Its SGD-m averages the gradient, so that its
learning rate is ten times that of `torch.optim.SGD` with momentum 0.9 (`docs/decisions.md`, 15);
`in_torch` translates. All settings elsewhere are torch's.
"""

import itertools
import random
from collections.abc import Collection, Mapping

from kfqn.race.entrants.settings import Settings
from kfqn.race.failure import Failure
from kfqn.race.problems import DEVELOPMENT, is_own

Grid = Mapping[str, tuple[float, ...]]

_SECOND_ORDER = {
    "lr": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "damping": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
}

PRINTED: dict[str, Grid] = {
    "kfbfgs": _SECOND_ORDER,
    "kflbfgs": _SECOND_ORDER,
    "kfac": _SECOND_ORDER,
    "adam": {
        "lr": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
        "eps": (1e-12, 1e-8, 1e-4, 0.01, 0.1),
        "beta2": (0.9,),
    },
    "sgd": {"lr": (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)},
}

FIGURE_3_DAMPING = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

TABLE_3: Mapping[str, Mapping[str, Settings]] = {
    "cifar10-allcnn": {
        "kfbfgs": {"lr": 30.0, "damping": 30.0},
        "kflbfgs": {"lr": 30.0, "damping": 30.0},
        "kfac": {"lr": 100.0, "damping": 30.0},
        "adam": {"lr": 1e-4, "eps": 1e-4, "beta2": 0.9},
        "sgd": {"lr": 0.1},
    },
    "cifar10-vgg16": {
        "kfbfgs": {"lr": 30.0, "damping": 100.0},
        "kflbfgs": {"lr": 3.0, "damping": 3.0},
        "kfac": {"lr": 100.0, "damping": 100.0},
        "adam": {"lr": 0.01, "eps": 0.1, "beta2": 0.9},
        "sgd": {"lr": 0.1},
    },
    "cifar100-allcnn": {
        "kfbfgs": {"lr": 100.0, "damping": 100.0},
        "kflbfgs": {"lr": 100.0, "damping": 100.0},
        "kfac": {"lr": 1000.0, "damping": 100.0},
        "adam": {"lr": 1e-4, "eps": 1e-8, "beta2": 0.9},
        "sgd": {"lr": 0.3},
    },
    "cifar100-vgg16": {
        "kfbfgs": {"lr": 30.0, "damping": 100.0},
        "kflbfgs": {"lr": 10.0, "damping": 100.0},
        "kfac": {"lr": 1.0, "damping": 0.3},
        "adam": {"lr": 1e-3, "eps": 0.01, "beta2": 0.9},
        "sgd": {"lr": 0.03},
    },
}

_DIGITS_SECOND_ORDER = {"lr": (3.0, 10.0, 20.0, 30.0, 60.0), "damping": (1.0, 10.0, 30.0, 100.0)}

SETTINGS = ("lr", "damping", "eps", "decay", "beta", "adam", "lr_cov", "history")  # what the grids range over

_THRIFTY = {"interval": (10.0,), "warm": (0.0,)}  # as the optimizers do by default, and nothing untimed

DIGITS: dict[str, Grid] = {
    "kfbfgs": {**_DIGITS_SECOND_ORDER, **_THRIFTY},
    "kflbfgs": {**_DIGITS_SECOND_ORDER, **_THRIFTY},
    "kfac": _DIGITS_SECOND_ORDER,
    "sgd": {"lr": tuple(float(f"{0.003 * 100 ** (k / 19):.2g}") for k in range(20))},
    "adam": {"lr": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "eps": (1e-8, 1e-6, 1e-4, 1e-2)},
}

# The printed numbers, but in torch's convention, so that SGD-m's lr 0.1 of He et al. (2016) is no edge.
RESNET20: dict[str, Grid] = {
    **PRINTED,
    "adam": {key: PRINTED["adam"][key] for key in ("lr", "eps")},
}

OURS = {  # problems with ranges in torch's convention
    "digits": DIGITS,
    "digits-mlp": DIGITS,
    "cifar10-lenet5": DIGITS,
    "cifar10-resnet20": RESNET20,
}

PEERS: dict[str, Grid] = {  # on every problem; of the size of those of the digits
    "adamw": {"lr": (1e-3, 3e-3, 0.01, 0.03, 0.1), "decay": (1e-3, 0.01, 0.1, 1.0)},
    "soap": {"lr": (1e-3, 3e-3, 0.01, 0.03, 0.1), "beta": (0.8, 0.9, 0.95, 0.99)},
    "muon": {"lr": (3e-3, 0.01, 0.03, 0.1, 0.3), "adam": (1e-3, 3e-3, 0.01, 0.03)},
    "shampoo": {"lr": (0.01, 0.03, 0.1, 0.3, 1.0), "eps": (1e-8, 1e-6, 1e-4, 0.01)},
    "singd": {"lr": (1e-3, 3e-3, 0.01, 0.03, 0.1), "lr_cov": (3e-3, 0.01, 0.03, 0.1)},
}

# The development set: what its rivals are usually set to among few others, under its problems' schedules.
USUAL: Mapping[str, Settings] = {
    "muon": {"lr": 0.02, "adam": 3e-3, "decay": 0.01},
    "soap": {"lr": 3e-3, "beta": 0.95, "decay": 0.01},
    "adamw": {"lr": 3e-3, "decay": 0.01},
    "sgd": {"lr": 0.1, "nesterov": 1.0},
    "lbfgs": {"lr": 1.0, "history": 100.0},
}
_TRIED: dict[str, Grid] = {
    "muon": {"lr": (5e-3, 0.01, 0.02, 0.05)},
    "soap": {"lr": (1e-3, 3e-3, 0.01)},
    "adamw": {"lr": (1e-3, 3e-3, 0.01)},
    "sgd": {"lr": (0.01, 0.03, 0.1, 0.3)},
    "lbfgs": {"lr": (0.3, 1.0), "history": (10.0, 100.0)},
}
_WITHOUT_DECAY: Settings = {"decay": 0.0}  # as the equation is solved


def usual(problem: str, entrant: str) -> Settings | None:
    """What a rival is usually set to on the development set and one's own; None elsewhere, or for others."""
    if entrant not in (USUAL if is_own(problem) else rivals(problem)):
        return None
    settings = USUAL[entrant]
    return {**settings, **_WITHOUT_DECAY} if problem == "burgers" and "decay" in settings else settings


def rivals(problem: str) -> tuple[str, ...]:
    """Who is swept on a problem of the development set, or one's own (torch's alone); nobody on others."""
    if is_own(problem):
        return ("adamw", "sgd")
    if problem not in DEVELOPMENT:
        return ()
    return ("muon", "soap", "adamw", "sgd", *["lbfgs"] * (problem == "burgers"))


def in_torch(entrant: str, settings: Settings) -> dict[str, float]:
    """Settings as the paper prints them, in the convention of torch's optimizers."""
    if entrant != "sgd":
        return dict(settings)
    return dict(settings) | {"lr": float(f"{settings['lr'] / 10:.12g}")}


def in_print(entrant: str, settings: Settings) -> dict[str, float]:
    """Settings in torch's convention as the paper would print them: the inverse of `in_torch`."""
    if entrant != "sgd":
        return dict(settings)
    return dict(settings) | {"lr": float(f"{settings['lr'] * 10:.12g}")}


def grid(
    problem: str, entrant: str, coarse: Collection[str] = (), max_points: int | None = None
) -> list[dict[str, float]]:
    """Every point that a sweep tries of one of the entrants, in torch's convention: see `expand`."""
    points = expand(_ranges(problem, entrant), coarse, max_points)
    return [in_torch(entrant, point) for point in points] if problem in TABLE_3 else points


def _ranges(problem: str, entrant: str) -> Grid:
    settings = usual(problem, entrant)
    if settings is not None:
        return {**{key: (value,) for key, value in settings.items()}, **_TRIED[entrant]}
    others = RESNET20 if is_own(problem) else PRINTED
    known = {} if problem in DEVELOPMENT else OURS.get(problem, others) | PEERS
    if entrant not in known:
        raise Failure(
            f"there is no grid of {entrant} on {problem}: sweep others there, or race it with settings."
        )
    return known[entrant]


def expand(
    ranges: Grid, coarse: Collection[str] = (), max_points: int | None = None
) -> list[dict[str, float]]:
    """Every point of a grid; of ``coarse`` settings every second value.

    A coarse setting keeps its last value, where the paper's best damping often lies. Of more than
    ``max_points`` points so many are drawn at random, always the same.
    """
    kept = [values[::-1][::2][::-1] if key in coarse else values for key, values in ranges.items()]
    points = [dict(zip(ranges, values, strict=True)) for values in itertools.product(*kept)]
    if max_points is not None and len(points) > max_points:
        points = [points[n] for n in sorted(random.Random(0).sample(range(len(points)), max_points))]
    return points
