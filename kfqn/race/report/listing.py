"""Runs as lines that other programs read: ``kfqn runs --csv``, and what a page lets people download."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kfqn.race.entrants.settings import format_value
from kfqn.race.failure import Failure, did_you_mean
from kfqn.race.runs import Run

VALUES = ("train_loss", "average_loss", "test_loss", "test_error", "seconds", "cpu_seconds")  # of an epoch
COLUMNS = ("problem", "optimizer", "settings", "seed", "epoch", *VALUES, "status")


def runs_below(folder: Path) -> list[Run]:
    """All runs in a folder and the folders in it, by name; Failure if there are none."""
    found = [Run(path.parent) for path in sorted(folder.rglob("config.json"))]
    if not found:
        near = did_you_mean(folder.name, (path.name for path in folder.parent.glob("*/")))
        raise Failure(
            f"there are no runs in {folder}{near or ':'} name a folder that a race or a sweep had as --out."
        )
    return found


def csv_of(runs: Sequence[Run]) -> str:
    """A line an epoch, below one of `COLUMNS`; a run without epochs has one as well.

    Settings are written as the command line takes them; losses and errors are as in the files, errors from 0
    to 1; a run's status, on all its lines, is finished, diverged, failed or unfinished.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for run in runs:
        lines.writerows(_lines(run))
    return text.getvalue()


def _lines(run: Run) -> Iterator[list[object]]:
    config = run.config
    first, status = [config.problem, config.entrant, as_typed(run), config.seed], status_of(run)
    for record in run.epochs() or [{}]:
        yield [*first, *(record.get(key, "") for key in ("epoch", *VALUES)), status]


def as_typed(run: Run) -> str:
    """A run's settings as after the colon on the command line."""
    return ",".join(f"{key}={format_value(value)}" for key, value in run.config.settings.items())


def status_of(run: Run) -> str:
    """How a run ended: finished, diverged or failed; or unfinished."""
    return str((run.end() or {"status": "unfinished"})["status"])


def print_runs(runs: Sequence[Run]) -> None:
    """A line a run, on the terminal."""
    view = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("problem", "optimizer", "seed", "epochs", "training loss", "test error", "status"):
        view.add_column(heading, justify="left" if heading in ("problem", "optimizer", "status") else "right")
    for run in runs:
        config, epochs = run.config, run.epochs()
        last = [f"{epochs[-1][key]:.4g}" if epochs else "–" for key in ("train_loss", "test_error")]
        name = ":".join(filter(None, (config.entrant, as_typed(run))))
        view.add_row(config.problem, name, str(config.seed), str(len(epochs)), *last, status_of(run))
    console = Console()
    console.width = console.width if console.is_terminal else 160
    console.print(view)
