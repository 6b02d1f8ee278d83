"""What a set of finished runs says: mean curves, who has learned, and who reached the common target when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfqn.race.entrants import entrant_of
from kfqn.race.entrants.settings import format_settings
from kfqn.race.problems import Problem, problem_of
from kfqn.race.problems.measures import AVERAGE_LOSS, TEST_ERROR, TRAIN_LOSS, Quantity
from kfqn.race.runs import Config, Record, Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """Which keys of the records are shown, and which is time (`docs/decisions.md`, 14).

    The first of the ``quantities`` is what optimizers are compared by.
    """

    quantities: tuple[Quantity, ...]
    time: str
    time_label: str
    second: str  # its unit in the table

    @property
    def first(self) -> Quantity:
        """What optimizers are compared by."""
        return self.quantities[0]

    @property
    def loss(self) -> str:
        """Its key."""
        return self.first.key

    @property
    def loss_label(self) -> str:
        """Its name."""
        return self.first.name


RACE = Measure((TRAIN_LOSS, TEST_ERROR), "seconds", "training time, s", "s")
PAPER = Measure((AVERAGE_LOSS, TEST_ERROR), "cpu_seconds", "CPU time, s", "CPU s")


def race_measure(problem: Problem) -> Measure:
    """A race's, with what counts on a problem."""
    return replace(RACE, quantities=problem.quantities)


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch over the seeds: mean and standard error std/√n, each (epochs,)."""

    mean: Array
    error: Array


class Result:
    """One entrant with one setting: its runs over the seeds, the diverged and failed ones counted apart."""

    def __init__(self, runs: Sequence[Run], measure: Measure = RACE) -> None:
        self.measure = measure
        self.config: Config = runs[0].config
        self.ends = [run.end() or {"status": "unfinished"} for run in runs]
        pairs = zip(runs, self.ends, strict=True)
        self.epochs: list[list[Record]] = [run.epochs() for run, end in pairs if end["status"] == "finished"]

    @property
    def label(self) -> str:
        """Name and settings."""
        return f"{self.name} ({self.settings})" if self.settings else self.name

    @property
    def name(self) -> str:
        """The optimizer's."""
        return entrant_of(self.config.entrant).label

    @property
    def settings(self) -> str:
        """Its settings, as in a legend."""
        return format_settings(self.config.settings)

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


def results_of(runs: Sequence[Run], measure: Measure = RACE) -> list[Result]:
    """The runs gathered by entrant and settings, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = run.config
        groups.setdefault(f"{config.entrant} {sorted(config.settings.items())}", []).append(run)
    return [Result(group, measure) for group in groups.values()]


def short_labels(results: Sequence[Result]) -> list[str]:
    """Names for a legend, with those settings alone that tell two of the same name apart."""
    labels = []
    for result in results:
        own, name = result.config.settings, result.name
        others = [other.config.settings for other in results if other.name == name]
        telling = {key: own[key] for key in own if any(other.get(key) != own[key] for other in others)}
        values = format_settings(telling)
        labels.append(f"{name} ({values})" if values else name)
    whole = [f"{result.config.entrant} ({result.settings})" for result in results]
    return [whole[n] if labels.count(label) > 1 else label for n, label in enumerate(labels)]


def learned(results: Sequence[Result]) -> list[Result]:
    """Those whose lowest training loss is at least half the way from guessing to the lowest of all.

    Guessing is ln(classes), the loss of equal logits, or what else the problem says. Who stays near it,
    diverges or loses most of its runs says nothing about the others: whether it races or not, they are
    compared in the same way. On the development set all this is of the first of its quantities.
    """
    guessing = problem_of(results[0].config.problem).guess.of(results[0].measure.loss)
    best = min(s.lowest for s in results)
    return [s for s in results if best < guessing and s.lowest <= (guessing + best) / 2]


def common_target(results: Sequence[Result]) -> float:
    """The lowest training loss that everybody who has `learned` has reached, in the median over the seeds.

    NaN if nobody has.
    """
    return max((s.lowest for s in learned(results)), default=math.nan)
