"""What a set of finished runs says: mean curves, who has learned, and who reached the common target when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kfqn.race.entrants import entrant_of
from kfqn.race.problems import PROBLEMS
from kfqn.race.runs import Config, Record, Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """Which keys of the records are called training loss and time (`docs/decisions.md`, 14)."""

    loss: str
    loss_label: str
    time: str
    time_label: str
    second: str  # its unit in the table


RACE = Measure("train_loss", "training loss", "seconds", "training time, s", "s")
PAPER = Measure("average_loss", "moving average of the loss", "cpu_seconds", "CPU time, s", "CPU s")


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch over the seeds: mean and standard error std/√n, each (epochs,)."""

    mean: Array
    error: Array


class Standing:
    """One entrant with one setting: its runs over the seeds, the diverged and failed ones counted apart."""

    def __init__(self, runs: Sequence[Run], measure: Measure = RACE) -> None:
        self.measure = measure
        self.config: Config = runs[0].config
        self.ends = [run.end() or {"status": "unfinished"} for run in runs]
        pairs = zip(runs, self.ends, strict=True)
        self.epochs: list[list[Record]] = [run.epochs() for run, end in pairs if end["status"] == "finished"]

    @property
    def label(self) -> str:
        """Name and settings, as in a legend."""
        values = ", ".join(f"{key} {value:g}" for key, value in self.config.settings.items())
        label = entrant_of(self.config.entrant).label
        return f"{label} ({values})" if values else label

    @property
    def lost(self) -> str:
        """How many runs did not finish, and why; empty if all did."""
        states = [end["status"] for end in self.ends if end["status"] != "finished"]
        return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))

    def curve(self, key: str) -> Curve:
        """One key of the records, over the finished runs, as far as the shortest goes."""
        shortest = min(map(len, self.epochs))
        values = np.array([[record[key] for record in run[:shortest]] for run in self.epochs])
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        return Curve(values.mean(axis=0), spread / math.sqrt(len(values)))

    @property
    def lowest(self) -> float:
        """The lowest training loss at the end of any epoch: the median over the seeds, a lost one at ∞.

        Of an even number the higher of the two in the middle, so that most seeds have been there.
        """
        losses = [min(record[self.measure.loss] for record in run) for run in self.epochs]
        return self._median(losses)

    @property
    def final(self) -> float:
        """The training loss at the end, as the table shows it: a mean; ∞ if most of the runs were lost."""
        return float(self.curve(self.measure.loss).mean[-1]) if math.isfinite(self.lowest) else math.inf

    def reached(self, target: float, key: str) -> float:
        """``key`` where the training loss first is at ``target`` or below: the median over the seeds.

        A run that never is there, or is lost, counts as infinite.
        """
        loss = self.measure.loss
        firsts = [next((r[key] for r in run if r[loss] <= target), math.inf) for run in self.epochs]
        return self._median(firsts)

    def _median(self, finished: list[float]) -> float:
        everyone = finished + [math.inf] * (len(self.ends) - len(self.epochs))
        return float(np.quantile(everyone, 0.5, method="higher"))

    @property
    def warm_start_seconds(self) -> float:
        """Mean seconds of the warm start, which are in no other figure; 0 for a method without."""
        seconds = [end["warm_start_seconds"] for end in self.ends if "warm_start_seconds" in end]
        return float(np.mean(seconds)) if seconds else 0.0


def learned(standings: Sequence[Standing]) -> list[Standing]:
    """Those whose lowest training loss is at least half the way from guessing to the lowest of all.

    Guessing is ln(classes), the loss of equal logits. Who stays near it, diverges or loses most of its runs
    says nothing about the others: whether it races or not, they are compared in the same way.
    """
    guessing = math.log(PROBLEMS[standings[0].config.problem].classes)
    best = min(s.lowest for s in standings)
    return [s for s in standings if best < guessing and s.lowest <= (guessing + best) / 2]


def common_target(standings: Sequence[Standing]) -> float:
    """The lowest training loss that everybody who has `learned` has reached, in the median over the seeds.

    NaN if nobody has.
    """
    return max((s.lowest for s in learned(standings)), default=math.nan)


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


def headings(measure: Measure) -> Row:
    """The table's first line."""
    s = measure.second
    return Row(
        label="optimizer",
        train_loss=measure.loss_label,
        test_error="test error, %",
        seconds=s,
        seconds_per_epoch=f"{s} an epoch",
        epochs_to_target="epochs to target",
        seconds_to_target=f"{s} to target",
        warm_start_seconds="warm start, s",
        lost="lost runs",
    )


def rows(standings: Sequence[Standing]) -> list[Row]:
    """The table, the lowest final training loss on top, who lost most of its runs at the bottom."""
    target = common_target(standings)
    return [_row(standing, target) for standing in sorted(standings, key=lambda s: s.final)]


def _row(standing: Standing, target: float) -> Row:
    if not standing.epochs:
        return Row(standing.label, "–", "–", "–", "–", "–", "–", "–", standing.lost)
    measure = standing.measure
    loss, error, seconds = (standing.curve(key) for key in (measure.loss, "test_error", measure.time))
    epochs, time, warm = (
        standing.reached(target, "epoch"),
        standing.reached(target, measure.time),
        standing.warm_start_seconds,
    )
    several = len(standing.epochs) > 1
    return Row(
        label=standing.label,
        train_loss=f"{loss.mean[-1]:.3g}" + f" ± {loss.error[-1]:.1g}" * several,
        test_error=f"{100 * error.mean[-1]:.2f}" + f" ± {100 * error.error[-1]:.2f}" * several,
        seconds=f"{seconds.mean[-1]:.1f}",
        seconds_per_epoch=f"{seconds.mean[-1] / len(seconds.mean):.2f}",
        epochs_to_target=f"{epochs:g}" if math.isfinite(epochs) else "–",
        seconds_to_target=f"{time:.2f}" if math.isfinite(time) else "–",
        warm_start_seconds=f"{warm:.2f}" if warm else "–",
        lost=standing.lost or "–",
    )
