"""Try every point of every entrant's grid on a problem, and keep what was best.

Best is the smallest training loss at the end of any epoch, the mean over the seeds; a run
that diverged is never best. Exact ties go to the first point of the grid.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kfqn.race.entrants import ENTRANTS
from kfqn.race.failure import Failure
from kfqn.race.runs import Run, check_writable, write_atomically


def lowest_loss(run: Run) -> float:
    """The score of a run: its lowest training loss; infinite unless it finished."""
    end = run.end()
    if end is None or end["status"] != "finished":
        return math.inf
    return float(min(record["train_loss"] for record in run.epochs()))


def outcome(runs: Sequence[Run]) -> dict[str, Any]:
    """All points with their scores, and the best settings of every entrant."""
    points: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        config, loss, epochs, end = run.config, lowest_loss(run), run.epochs(), run.end()
        points.setdefault(config.entrant, []).append(
            {
                **config.settings,
                "seed": config.seed,
                "status": end["status"] if end else "unfinished",
                "train_loss": loss if math.isfinite(loss) else None,
                "test_error": epochs[-1]["test_error"] if math.isfinite(loss) else None,
            }
        )
    config = runs[0].config
    return {
        "problem": {
            key: getattr(config, key)
            for key in ("epochs", "width", "batch_size", "weight_decay", "train_size", "threads")
        },
        "conditions": next(
            (end["conditions"] for run in runs if (end := run.end()) and "conditions" in end), {}
        ),
        "grid": {name: {key: list(values) for key, values in ENTRANTS[name].grid.items()} for name in points},
        "best": {name: best for name in points if (best := _best(points[name], list(ENTRANTS[name].grid)))},
        "points": points,
    }


def _best(points: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, float] | None:
    """The settings whose mean score over the seeds is smallest; None if nothing finished."""
    scores: dict[tuple[float, ...], list[float]] = {}
    for point in points:
        loss = math.inf if point["train_loss"] is None else point["train_loss"]
        scores.setdefault(tuple(point[key] for key in keys), []).append(loss)
    settings, losses = min(scores.items(), key=lambda item: sum(item[1]) / len(item[1]))
    return dict(zip(keys, settings, strict=True)) if all(map(math.isfinite, losses)) else None


def load(path: Path) -> dict[str, Any]:
    """What a sweep file holds so far; Failure, before any training, if it cannot be read or written."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        check_writable(path.parent)
    except (OSError, ValueError, Failure) as error:
        raise Failure(f"cannot save to {path} ({error}): choose another file with --save.") from error
    return known


def save(result: dict[str, Any], name: str, path: Path) -> None:
    """Put the outcome for one problem into a file; other problems there, and other entrants, stay.

    Entrants tuned on another scale of the problem do not stay.
    """
    known = load(path)
    old = known.get(name, {})
    if old.get("problem") == result["problem"]:
        result = result | {key: old[key] | result[key] for key in ("grid", "best", "points")}
    write_atomically(path, json.dumps(known | {name: result}, indent=1) + "\n")


def print_outcome(result: dict[str, Any], console: Console) -> None:
    """A line an entrant: how many points, how many lost, the best of them, and whether it lies on an edge."""
    view = Table(box=None, header_style="dim", pad_edge=False)
    for heading in (
        "optimizer",
        "points",
        "lost",
        "best",
        "training loss",
        "test error, %",
        "on the grid's edge",
    ):
        view.add_column(heading, justify="left" if heading in ("optimizer", "best") else "right")
    for name, points in result["points"].items():
        best, lost = result["best"].get(name), sum(point["train_loss"] is None for point in points)
        if best is None:
            view.add_row(ENTRANTS[name].label, str(len(points)), str(lost), "–", "–", "–", "–")
            continue
        chosen = [p for p in points if all(p[key] == value for key, value in best.items())]
        edges = [
            key for key, values in ENTRANTS[name].grid.items() if best[key] in (min(values), max(values))
        ]
        view.add_row(
            ENTRANTS[name].label,
            str(len(points)),
            str(lost),
            ", ".join(f"{key} {value:g}" for key, value in best.items()),
            f"{sum(p['train_loss'] for p in chosen) / len(chosen):.3g}",
            f"{100 * sum(p['test_error'] for p in chosen) / len(chosen):.2f}",
            ", ".join(edges) or "–",
        )
    console.print(view)
