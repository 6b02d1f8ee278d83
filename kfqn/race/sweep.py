"""Tune optimizers: try every point of their grids on a problem, and keep what was best.

Best is the smallest value, at the end of any epoch, of what the sweep goes ``by``: the paper's moving
average of the training loss, the training loss itself or the test error; the mean over the
seeds. A point that diverged is never best. Exact ties go to the first point of the grid.

With halving, every point is first run for a ninth of the length, the best third of each optimizer for
a third, and the best third of those in full: a point's scores are those of its longest run.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kfqn.race.entrants import ENTRANTS
from kfqn.race.failure import Failure
from kfqn.race.grids import Settings
from kfqn.race.plan import Field, Scale, Search
from kfqn.race.runs import Run, check_writable, write_atomically

CRITERIA = ("average_loss", "train_loss", "test_error")
SHARE = 3  # of the points go on to runs so many times as long

Point = dict[str, Any]  # settings, seed, status, epochs, and the lowest value of every criterion


Do = Callable[[Field, Scale], list[Run]]  # runs a field at a scale, what is done already included


def sweep(field: Field, scale: Scale, search: Search, do: Do) -> tuple[dict[str, list[Point]], list[Run]]:
    """Run the field, in one go or by halving: the points of every optimizer, and the longest runs."""
    lengths = [*_rungs(scale)] if search.halving else [scale]
    points: dict[str, dict[str, Point]] = {}
    for length in lengths:
        runs = do(field, length)
        reached = points_of(runs)
        for name, new in reached.items():
            points.setdefault(name, {}).update({_identity(name, point): point for point in new})
        if length is not lengths[-1]:
            field = [(name, s) for name, new in reached.items() for s in _best_third(name, new, search.by)]
    return {name: [*of.values()] for name, of in points.items()}, runs


def _rungs(scale: Scale) -> Iterator[Scale]:
    """The scale at a ninth, at a third and at the whole of its length."""
    for part in (SHARE**2, SHARE, 1):
        yield replace(
            scale,
            epochs=scale.epochs and max(1, round(scale.epochs / part)),
            budget=scale.budget and scale.budget / part,
        )


def _best_third(name: str, points: Sequence[Point], by: str) -> Sequence[Settings]:
    scores = scores_of(name, points, by)
    finite = [settings for settings, score in scores if math.isfinite(score)]
    return finite[: math.ceil(len(scores) / SHARE)]


def points_of(runs: Sequence[Run]) -> dict[str, list[Point]]:
    """Every run as a point, by optimizer."""
    points: dict[str, list[Point]] = {}
    for run in runs:
        config, end, epochs = run.config, run.end(), run.epochs()
        finished = end is not None and end["status"] == "finished"
        lowest = {key: min(record[key] for record in epochs) if finished else None for key in CRITERIA}
        status = end["status"] if end else "unfinished"
        facts = {"seed": config.seed, "status": status, "epochs": len(epochs)}
        points.setdefault(config.entrant, []).append({**config.settings, **facts, **lowest})
    return points


def _identity(name: str, point: Point) -> str:
    return str([point[key] for key in (*_keys(name, point), "seed")])


def _keys(name: str, point: Point) -> list[str]:
    """Which entries of a point are settings."""
    entrant = ENTRANTS[name]
    return [key for key in (*entrant.tuned, *entrant.options) if key in point]


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

    def rank(of: Sequence[Point]) -> tuple[bool, int, float]:
        lost = math.isinf(score(of))
        return lost, 0 if lost else -min(p.get("epochs", 0) for p in of), score(of)

    ordered = sorted(gathered.items(), key=lambda item: rank(item[1]))
    return [(dict(settings), score(of)) for settings, of in ordered]


def best(name: str, points: Sequence[Point], by: str, **fixed: float) -> dict[str, float] | None:
    """The best settings, among those with the ``fixed`` values; None if nothing finished there."""
    for settings, score in scores_of(name, points, by):
        if math.isfinite(score) and all(settings.get(key) == value for key, value in fixed.items()):
            return settings
    return None


def outcome(points: dict[str, list[Point]], runs: Sequence[Run], search: Search) -> dict[str, Any]:
    """What a sweep file holds of one problem: conditions, every point, and the best settings."""
    config = runs[0].config
    keys = ("epochs", "budget", "width", "batch_size", "weight_decay", "train_size", "evaluated", "threads")
    return {
        "problem": {key: getattr(config, key) for key in keys} | {"by": search.by},
        "conditions": next(
            (end["conditions"] for run in runs if (end := run.end()) and "conditions" in end), {}
        ),
        "search": {name: {"halving": search.halving, "coarse": search.thinned} for name in points},
        "best": {name: found for name in points if (found := best(name, points[name], search.by))},
        "points": points,
    }


def key(problem: str, by: str) -> str:
    """A problem's name in a sweep file: searches by loss and by test error stand side by side."""
    return f"{problem} by test error" if by == "test_error" else problem


def load(path: Path) -> dict[str, Any]:
    """What a sweep file holds so far; Failure, before any training, if it cannot be read or written."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        check_writable(path.parent)
    except (OSError, ValueError, Failure) as error:
        raise Failure(f"cannot save to {path} ({error}): choose another file with --save.") from error
    return known


def save(result: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Put the outcome for one problem into a file, and return it merged with what was there.

    Other problems stay; other optimizers stay if they were tuned at the same scale.
    """
    known = load(path)
    old = known.get(name, {})
    if old.get("problem") == result["problem"]:
        result = result | {key: old[key] | result[key] for key in ("search", "best", "points")}
    write_atomically(path, json.dumps(known | {name: result}, indent=1) + "\n")
    return result


def print_outcome(result: dict[str, Any], console: Console) -> None:
    """A line an optimizer: how many points, how many lost, the best of them, whether it lies on an edge."""
    view = Table(box=None, header_style="dim", pad_edge=False)
    by = result["problem"]["by"]
    for heading in ("optimizer", "points", "lost", "best", by.replace("_", " "), "on the grid's edge"):
        view.add_column(heading, justify="left" if heading in ("optimizer", "best") else "right")
    for name, points in result["points"].items():
        lost = sum(point["status"] != "finished" for point in points)
        chosen = result["best"].get(name)
        if chosen is None:
            view.add_row(ENTRANTS[name].label, str(len(points)), str(lost), "–", "–", "–")
            continue
        (score,) = (score for settings, score in scores_of(name, points, by) if settings == chosen)
        ranges = {key: {point[key] for point in points} for key in chosen}
        edges = [
            key
            for key, values in ranges.items()
            if chosen[key] in (min(values), max(values)) and len(values) > 1
        ]
        view.add_row(
            ENTRANTS[name].label,
            str(len(points)),
            str(lost),
            ", ".join(f"{key} {value:g}" for key, value in chosen.items()),
            f"{score:.4g}",
            ", ".join(edges) or "–",
        )
    console.print(view)
