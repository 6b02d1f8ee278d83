"""What a set of finished runs says: mean curves, and who reached the common target when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kfqn.race.entrants import ENTRANTS
from kfqn.race.runs import Config, Record, Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch over the seeds: mean and standard error std/√n, each (epochs,)."""

    mean: Array
    error: Array


class Standing:
    """One entrant with one setting: its runs over the seeds, the diverged and failed ones counted apart."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.config: Config = runs[0].config
        self.ends = [run.end() or {"status": "unfinished"} for run in runs]
        pairs = zip(runs, self.ends, strict=True)
        self.epochs: list[list[Record]] = [run.epochs() for run, end in pairs if end["status"] == "finished"]

    @property
    def label(self) -> str:
        """Name and settings, as in a legend."""
        values = ", ".join(f"{key} {value:g}" for key, value in self.config.settings.items())
        return f"{ENTRANTS[self.config.entrant].label} ({values})"

    @property
    def lost(self) -> str:
        """How many runs did not finish, and why; empty if all did."""
        states = [end["status"] for end in self.ends if end["status"] != "finished"]
        return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))

    def curve(self, key: str) -> Curve:
        """One key of the records, over the finished runs."""
        values = np.array([[record[key] for record in run] for run in self.epochs])
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        return Curve(values.mean(axis=0), spread / math.sqrt(len(values)))

    def reached(self, target: float, key: str) -> float:
        """The median over the seeds of ``key`` where the training loss first is at ``target`` or below."""
        firsts = [next((r[key] for r in run if r["train_loss"] <= target), math.inf) for run in self.epochs]
        return float(np.median(firsts)) if firsts else math.inf

    @property
    def warm_start_seconds(self) -> float:
        """Mean seconds of the warm start, which are in no other figure."""
        return float(np.mean([end.get("warm_start_seconds", 0.0) for end in self.ends]))


def common_target(standings: Sequence[Standing]) -> float:
    """The lowest training loss that every finished run has reached by the end of some epoch."""
    lowest = [min(r["train_loss"] for r in run) for standing in standings for run in standing.epochs]
    return max(lowest, default=math.nan)


@dataclass(frozen=True)
class Row:
    """One line of the table; numbers are means over the seeds unless said otherwise."""

    label: str
    train_loss: str
    test_error: str
    seconds: str
    seconds_per_epoch: str
    epochs_to_target: str
    seconds_to_target: str
    warm_start_seconds: str
    lost: str


HEADINGS = Row(
    label="optimizer",
    train_loss="training loss",
    test_error="test error, %",
    seconds="seconds",
    seconds_per_epoch="s an epoch",
    epochs_to_target="epochs to target",
    seconds_to_target="s to target",
    warm_start_seconds="warm start, s",
    lost="lost runs",
)


def rows(standings: Sequence[Standing]) -> list[Row]:
    """The table, the first to the target on top."""
    target = common_target(standings)
    ordered = sorted(standings, key=lambda s: s.reached(target, "seconds"))
    return [_row(standing, target) for standing in ordered]


def _row(standing: Standing, target: float) -> Row:
    if not standing.epochs:
        return Row(standing.label, "–", "–", "–", "–", "–", "–", "–", standing.lost)
    loss, error, seconds = (standing.curve(key) for key in ("train_loss", "test_error", "seconds"))
    warm = standing.warm_start_seconds
    return Row(
        label=standing.label,
        train_loss=f"{loss.mean[-1]:.3g} ± {loss.error[-1]:.1g}",
        test_error=f"{100 * error.mean[-1]:.2f} ± {100 * error.error[-1]:.2f}",
        seconds=f"{seconds.mean[-1]:.1f}",
        seconds_per_epoch=f"{seconds.mean[-1] / len(seconds.mean):.2f}",
        epochs_to_target=f"{standing.reached(target, 'epoch'):g}",
        seconds_to_target=f"{standing.reached(target, 'seconds'):.2f}",
        warm_start_seconds=f"{warm:.2f}" if warm else "–",
        lost=standing.lost or "–",
    )
