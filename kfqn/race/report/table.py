"""The table of results, as cells and in the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from rich.console import Console
from rich.table import Table

from kfqn.race.report.results import Measure, Result, common_target


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


def rows(results: Sequence[Result]) -> list[Row]:
    """The table, the lowest final training loss on top, who lost most of its runs at the bottom."""
    target = common_target(results)
    return [_row(result, target) for result in sorted(results, key=lambda s: s.final)]


def _row(result: Result, target: float) -> Row:
    if not result.epochs:
        return Row(result.label, "–", "–", "–", "–", "–", "–", "–", result.lost)
    measure = result.measure
    loss, error, seconds = (result.curve(key) for key in (measure.loss, "test_error", measure.time))
    epochs, time, warm = (
        result.reached(target, "epoch"),
        result.reached(target, measure.time),
        result.warm_start_seconds,
    )
    several = len(result.epochs) > 1
    return Row(
        label=result.label,
        train_loss=f"{loss.mean[-1]:.3g}" + f" ± {loss.error[-1]:.1g}" * several,
        test_error=f"{100 * error.mean[-1]:.2f}" + f" ± {100 * error.error[-1]:.2f}" * several,
        seconds=f"{seconds.mean[-1]:.1f}",
        seconds_per_epoch=f"{seconds.mean[-1] / len(seconds.mean):.2f}",
        epochs_to_target=f"{epochs:g}" if math.isfinite(epochs) else "–",
        seconds_to_target=f"{time:.2f}" if math.isfinite(time) else "–",
        warm_start_seconds=f"{warm:.2f}" if warm else "–",
        lost=result.lost or "–",
    )


def print_table(table: Sequence[Row], title: str, console: Console, measure: Measure) -> None:
    """The table, the winner first and bold."""
    view = Table(title=title, title_justify="left", header_style="dim", box=None, pad_edge=False)
    shown = [f.name for f in fields(Row) if f.name != "lost" or any(row.lost != "–" for row in table)]
    for name in shown:
        justify: Literal["left", "right"] = "left" if name == "label" else "right"
        view.add_column(getattr(headings(measure), name), justify=justify, overflow="fold")
    for n, row in enumerate(table):
        view.add_row(*(getattr(row, name) for name in shown), style="bold" if n == 0 else None)
    console.print(view)
