"""Optimizers that need no settings against tuned ones, from the files of races.

    kfqn race --problem digits --optimizers kfbfgs:auto adam sgd ... --out FOLDER
    python -m benchmarks.claims.without_settings FOLDER [FOLDER ...]

For every race a table in Markdown: the training loss at the end, epochs and seconds to the lowest loss that
tuned SGD-m reaches (without one, to the common target), and the test error when the fastest to finish has
finished; then, for every tuned optimizer, the lowest loss it reaches and the seconds of the automatic ones
until they are there. Medians over the seeds, means ± standard errors for losses and errors. Seconds are CPU
seconds of the training process, on a GPU seconds.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kfqn.race.entrants import entrant_of
from kfqn.race.report.results import RACE, Result, common_target
from kfqn.race.runs import Run

ON_CPU = replace(RACE, time="cpu_seconds", time_label="CPU time, s", second="CPU s")


def results(folder: Path) -> list[Result]:
    """The runs of a race that have ended, by optimizer and settings."""
    found: dict[str, list[Run]] = {}
    for place in sorted((folder / "runs").iterdir()):
        run = Run(place)
        if run.end() is not None:
            found.setdefault(f"{run.config.entrant} {run.config.settings}", []).append(run)
    on_cpu = all(run.config.device == "cpu" for runs in found.values() for run in runs)
    return [Result(runs, ON_CPU if on_cpu else RACE) for runs in found.values()]


def is_automatic(standing: Result) -> bool:
    return entrant_of(standing.config.entrant).automatic


def target_of(field: Sequence[Result]) -> tuple[float, str]:
    """The loss to get to, and whose it is."""
    of_sgd = [s.lowest for s in field if s.config.entrant == "sgd" and math.isfinite(s.lowest)]
    return (min(of_sgd), "SGD-m's") if of_sgd else (common_target(field), "the common one")


def test_error_at(standing: Result, time: float) -> str:
    """Mean and standard error over the seeds at the end of the last epoch that ended by then."""
    key = standing.measure.time
    errors = [[r["test_error"] for r in run if r[key] <= time] for run in standing.epochs]
    last = np.array([100 * run[-1] for run in errors if run])
    if len(last) < len(standing.ends):
        return "–"
    return f"{last.mean():.1f}" + (
        f" ± {last.std(ddof=1) / math.sqrt(len(last)):.1f}" if len(last) > 1 else ""
    )


def finite(value: float, form: str = ".2f") -> str:
    return f"{value:{form}}" if math.isfinite(value) else "–"


def table(field: Sequence[Result]) -> list[str]:
    """Lines of Markdown, the lowest loss first."""
    target, whose = target_of(field)
    finished = [s for s in field if s.epochs]
    time = min(float(s.curve(s.measure.time).mean[-1]) for s in finished)
    unit = field[0].measure.second
    lines = [
        f"| optimizer | training loss | {unit} | epochs to {target:.3g} ({whose}) | {unit} to it "
        f"| test error, %, after {time:.1f} {unit} | at the end | lost runs |",
        "| --- " * 8 + "|",
    ]
    for s in sorted(finished, key=lambda s: float(s.curve(s.measure.loss).mean[-1])):
        loss, seconds = s.curve(s.measure.loss), s.curve(s.measure.time)
        cells = [
            s.label,
            f"{loss.mean[-1]:.3g}" + f" ± {loss.error[-1]:.1g}" * (len(s.epochs) > 1),
            f"{seconds.mean[-1]:.1f}",
            finite(s.reached(target, "epoch"), "g"),
            finite(s.reached(target, s.measure.time)),
            test_error_at(s, time),
            test_error_at(s, math.inf),
            s.lost or "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        field = results(folder)
        print(f"\n{folder.name}\n", *table(field), "", sep="\n")
        untuned = [s for s in field if is_automatic(s)]
        for standing in field:
            if is_automatic(standing):
                continue
            key = standing.measure.time
            own, *ours = (finite(s.reached(standing.lowest, key)) for s in (standing, *untuned))
            reached = ", ".join(f"{s.label} {time}" for s, time in zip(untuned, ours, strict=True))
            print(f"to the {standing.lowest:.3g} of {standing.label}: {own} s; {reached}")


if __name__ == "__main__":
    main()
