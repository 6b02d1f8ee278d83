"""Tune optimizers: try every point of their grids on a problem, and keep what was best.

Best is the smallest value, at the end of any epoch, of what the sweep goes ``by``: the paper's moving
average of the training loss, the training loss itself, the test loss or error; the mean over the
seeds. A point that diverged is never best. Exact ties go to the first point of the grid.

With halving, every point is first run for a ninth of the length, the best third of each optimizer for
a third, and the best third of those in full: a point's scores are those of its longest run.

A sweep is plain files: a grid needs no sampler, and a folder with one lock a run gives resumption, several
workers and machines, diverged points kept, and files that a person can read.

A sweep file holds one entry per problem and optimizer, with the scale it was tuned at; a new sweep
of an optimizer replaces its entry and no other.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.table import Table

from kfqn.race.entrants import ENTRANTS, entrant_of, sweep_file
from kfqn.race.entrants.registry import OF_TRAINER
from kfqn.race.entrants.settings import Settings, format_settings
from kfqn.race.failure import Failure
from kfqn.race.problems import Problem
from kfqn.race.runs.files import check_writable, write_atomically
from kfqn.race.runs.plan import Field, Scale, Search
from kfqn.race.runs.run import Run

CRITERIA = ("average_loss", "train_loss", "test_loss", "test_error")
STEP = 3  # from rung to rung so many times the length, for one in so many points

Entry = sweep_file.Entry
Point = dict[str, Any]  # settings, seed, status, share of the length, and the lowest value of every criterion
RunField = Callable[[Field, Scale], list[Run]]  # runs a field at a scale, what is done already included


def sweep(
    field: Field, scale: Scale, search: Search, run_field: RunField
) -> tuple[dict[str, Entry], list[Run]]:
    """Run the field, in one go or by halving: the entry of every optimizer, and all the runs."""
    points: dict[str, dict[str, Point]] = {name: {} for name, _ in field}
    everything: list[Run] = []
    for share in (1 / STEP**2, 1 / STEP, 1.0) if search.halving else (1.0,):
        runs = run_field(field, _shortened(scale, share)) if field else []
        everything += runs
        reached = points_of(runs, share)
        for name, new in reached.items():
            points[name].update({_identity(name, point): point for point in new})
        field = [(name, s) for name, new in reached.items() for s in _best_third(name, new, search.by)]
    return {name: _entry(name, [*of.values()], everything, search) for name, of in points.items()}, everything


def _shortened(scale: Scale, share: float) -> Scale:
    return replace(
        scale,
        epochs=scale.epochs and max(1, round(scale.epochs * share)),
        budget=scale.budget and scale.budget * share,
    )


def _best_third(name: str, points: Sequence[Point], by: str) -> Iterator[Settings]:
    scores = scores_of(name, points, by)
    for settings, score in scores[: math.ceil(len(scores) / STEP)]:
        if math.isfinite(score):
            yield settings


def _entry(name: str, points: Sequence[Point], runs: Sequence[Run], search: Search) -> Entry:
    own = [run for run in runs if run.config.entrant == name]
    config = own[-1].config  # of the last rung: the whole length
    keys = ("epochs", "budget", "width", "batch_size", "weight_decay", "train_size", "evaluated")
    return {
        "scale": {key: getattr(config, key) for key in keys},
        "by": search.by,
        "halving": search.halving,
        "coarse": list(search.coarse),
        "most": search.max_points,
        "conditions": next(
            (end["conditions"] for run in own if (end := run.end()) and "conditions" in end), {}
        ),
        "best": best(name, points, search.by),
        "points": points,
    }


def points_of(runs: Sequence[Run], share: float = 1.0) -> dict[str, list[Point]]:
    """Every run as a point, by optimizer."""
    points: dict[str, list[Point]] = {}
    for run in runs:
        config, end, epochs = run.config, run.end(), run.epochs()
        finished = end is not None and end["status"] == "finished"
        lowest = {
            key: min(record[key] for record in epochs) if finished else None
            for key in CRITERIA
            if not finished or key in epochs[0]
        }
        facts = {"seed": config.seed, "status": end["status"] if end else "unfinished", "share": share}
        points.setdefault(config.entrant, []).append({**config.settings, **facts, **lowest})
    return points


def complete(entry: Entry) -> bool:
    """Whether every point of an entry has come to an end: finished or diverged."""
    return all(point["status"] in ("finished", "diverged") for point in entry["points"])


def _identity(name: str, point: Point) -> str:
    return str([point[key] for key in (*_keys(name, point), "seed")])


def _keys(name: str, point: Point) -> list[str]:
    """Which entries of a point are settings."""
    if name not in ENTRANTS:  # anybody's class: all that does not tell of the run
        return [key for key in point if key not in ("seed", "status", "share", *CRITERIA)]
    return [key for key in (*ENTRANTS[name].settings, *OF_TRAINER) if key in point]


def scores_of(name: str, points: Sequence[Point], by: str) -> list[tuple[dict[str, float], float]]:
    """Settings with their mean score over the seeds, the best first; infinite if any seed was lost.

    Points that were run longer come before those that halving dropped earlier.
    """
    gathered: dict[tuple[tuple[str, float], ...], list[Point]] = {}
    for point in points:
        gathered.setdefault(tuple((key, point[key]) for key in _keys(name, point)), []).append(point)

    def score(of: Sequence[Point]) -> float:
        values = [math.inf if p[by] is None else p[by] for p in of]
        return float(sum(values)) / len(values)

    def rank(of: Sequence[Point]) -> tuple[bool, float, float]:
        lost = math.isinf(score(of))
        return lost, 0.0 if lost else -min(p["share"] for p in of), score(of)

    ordered = sorted(gathered.items(), key=lambda item: rank(item[1]))
    return [(dict(settings), score(of)) for settings, of in ordered]


def best(name: str, points: Sequence[Point], by: str, **fixed: float) -> dict[str, float] | None:
    """The best settings, among those with the ``fixed`` values; None if nothing finished there."""
    for settings, score in scores_of(name, points, by):
        if math.isfinite(score) and all(settings.get(key) == value for key, value in fixed.items()):
            return settings
    return None


def key(problem: Problem, by: str) -> str:
    """A problem's name in a sweep file: searches by loss and by test error stand side by side."""
    return f"{problem.name} by test error" if by == "test_error" != problem.criterion else problem.name


def load(path: Path) -> dict[str, dict[str, Entry]]:
    """What a sweep file holds so far; Failure, before any training, if it cannot be read or written."""
    known = sweep_file.read(path)
    try:
        check_writable(path.parent)
    except (OSError, Failure) as error:
        raise Failure(f"cannot save to {path} ({error}): choose another file with --save.") from error
    return known


def save(entries: dict[str, Entry], problem: str, path: Path) -> None:
    """Put the entries into the file in the place of older ones of the same optimizers."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = load(path)
        known[problem] = known.get(problem, {}) | entries
        write_atomically(path, json.dumps(known, indent=1) + "\n")


def describe(entry: Entry) -> str:
    """At which scale and how an entry was tuned, for a person."""
    scale = entry["scale"]
    parts = [
        f"{scale[key]} {noun}" for key, noun in (("epochs", "epochs"), ("budget", "CPU s")) if scale[key]
    ]
    parts += [f"width {scale['width']}"] if scale["width"] else []
    parts += [f"{scale['train_size']} images"] if scale["train_size"] else []
    parts += ["halving"] if entry["halving"] else []
    parts += [f"every second {', '.join(entry['coarse'])}"] if entry["coarse"] else []
    parts += [f"at most {entry['most']} points"] if entry.get("most") else []
    return ", ".join(parts)


def print_entries(entries: dict[str, Entry], console: Console) -> None:
    """A line an optimizer: how many points, how many lost, the best of them, whether it lies on an edge."""
    view = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("optimizer", "points", "lost", "best", "its score", "on the grid's edge", "tuned at"):
        view.add_column(heading, justify="left" if heading in ("optimizer", "best", "tuned at") else "right")
    for name, entry in entries.items():
        points, chosen = entry["points"], entry["best"]
        tried = {_identity(name, point | {"seed": 0}) for point in points}
        lost = sum(point["status"] != "finished" for point in points)
        cells = ["–", "–", "–"]
        if chosen is not None:
            (score,) = (s for settings, s in scores_of(name, points, entry["by"]) if settings == chosen)
            ranges = {key: {point[key] for point in points} for key in chosen}
            edges = [
                key
                for key, values in ranges.items()
                if len(values) > 1 and chosen[key] in (min(values), max(values))
            ]
            cells = [
                format_settings(chosen),
                f"{score:.4g}",
                ", ".join(edges) or "–",
            ]
        view.add_row(entrant_of(name).label, str(len(tried)), str(lost), *cells, describe(entry))
    console.print(view)
