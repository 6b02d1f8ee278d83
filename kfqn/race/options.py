"""What each command is asked to do: typed, and without anything heavy to import."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kfqn.race.entrants.grids import Grid
from kfqn.race.entrants.settings import Settings


@dataclass(frozen=True)
class Training:
    """How much of a problem is trained on, for how long and where; None is the problem's own, or no limit.

    ``budget`` is in CPU seconds; loss and error are read on ``eval_size`` images; ``jobs`` run in parallel.
    """

    epochs: int | None
    budget: float | None
    width: int | None
    train_size: int | None
    eval_size: int
    data_dir: Path | None
    jobs: int | None
    device: str


@dataclass(frozen=True)
class Tuning:
    """How grids are gone through: every second value of ``coarse`` settings, so many points at most."""

    coarse: tuple[str, ...]
    max_points: int | None
    halving: bool


@dataclass(frozen=True)
class RaceOptions:
    """``kfqn race``. Settings of None are the best that are known, optimizers of None the problem's field.

    ``schedule`` is what optimizers follow that name none.
    """

    problem: str
    optimizers: Sequence[tuple[str, Settings | None]] | None
    schedule: Settings
    seeds: int
    out: Path | None
    training: Training


@dataclass(frozen=True)
class SweepOptions:
    """``kfqn sweep``. A grid of None is that of `kfqn.race.entrants.grids`; the rest as for a race."""

    problem: str
    optimizers: Sequence[tuple[str, Grid | None]] | None
    schedule: Settings
    by: str | None
    seeds: int
    out: Path | None
    save: Path | None
    tuning: Tuning
    training: Training


@dataclass(frozen=True)
class PaperOptions:
    """``kfqn figure`` and ``kfqn table``. Problems and optimizers of None are those that the paper shows."""

    number: int
    problems: Sequence[str] | None
    optimizers: Sequence[str] | None
    out: Path
    tuning: Tuning
    training: Training
    seeds: int = 1  # of a figure
    batch_size: int = 256  # of Table 2
