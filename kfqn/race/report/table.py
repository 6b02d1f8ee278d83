"""The table of results, as cells and in the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from rich.console import Console
from rich.table import Table

from kfqn.race.problems.measures import Quantity
from kfqn.race.report.results import Measure, Result, common_target


@dataclass(frozen=True)
class Row:
    """One line of the table; numbers are means over the seeds unless said otherwise."""

    name: str
    settings: str
    quantities: tuple[str, ...]
    seconds: str
    seconds_per_epoch: str
    epochs_to_target: str
    seconds_to_target: str
    warm_start_seconds: str
    lost: str

    @property
    def cells(self) -> tuple[str, ...]:
        """All of it, from left to right."""
        _, _, quantities, *rest = (getattr(self, field.name) for field in fields(self))
        return (self.label, *quantities, *rest)

    @property
    def label(self) -> str:
        """Name and settings in one."""
        return f"{self.name} ({self.settings})" if self.settings else self.name


def headings(measure: Measure) -> Row:
    """The table's first line."""
    s = measure.second
    return Row(
        name="optimizer",
        settings="",
        quantities=tuple(quantity.label for quantity in measure.quantities),
        seconds=s,
        seconds_per_epoch=f"{s} an epoch",
        epochs_to_target="epochs to target",
        seconds_to_target=f"{s} to target",
        warm_start_seconds="warm start, s",
        lost="lost runs",
    )


def rows(results: Sequence[Result]) -> list[Row]:
    """The table, the lowest of what counts on top, who lost most of its runs at the bottom."""
    target = common_target(results)
    return [_row(result, target) for result in sorted(results, key=lambda s: s.final)]


def _row(result: Result, target: float) -> Row:
    if not result.epochs:
        nothing = ("–",) * len(result.measure.quantities)
        return Row(result.name, result.settings, nothing, "–", "–", "–", "–", "–", result.lost)
    measure = result.measure
    seconds = result.curve(measure.time)
    epochs, time, warm = (
        result.reached(target, "epoch"),
        result.reached(target, measure.time),
        result.warm_start_seconds,
    )
    return Row(
        name=result.name,
        settings=result.settings,
        quantities=tuple(_final(result, quantity) for quantity in measure.quantities),
        seconds=f"{seconds.mean[-1]:.1f}",
        seconds_per_epoch=f"{seconds.mean[-1] / len(seconds.mean):.2f}",
        epochs_to_target=f"{epochs:g}" if math.isfinite(epochs) else "–",
        seconds_to_target=f"{time:.2f}" if math.isfinite(time) else "–",
        warm_start_seconds=f"{warm:.2f}" if warm else "–",
        lost=result.lost or "–",
    )


def _final(result: Result, quantity: Quantity) -> str:
    curve = result.curve(quantity.key)
    return quantity.text(curve.mean[-1], curve.error[-1] if len(result.epochs) > 1 else None)


def columns_of(table: Sequence[Row]) -> int:
    """How many are shown: the last tells of lost runs, if there are any."""
    return len(table[0].cells) - all(row.lost == "–" for row in table)


def print_table(table: Sequence[Row], title: str, console: Console, measure: Measure) -> None:
    """The table, the winner first and bold."""
    view = Table(title=title, title_justify="left", header_style="dim", box=None, pad_edge=False)
    shown = columns_of(table)
    for n, heading in enumerate(headings(measure).cells[:shown]):
        justify: Literal["left", "right"] = "left" if n == 0 else "right"
        view.add_column(heading, justify=justify, overflow="fold")
    for n, row in enumerate(table):
        view.add_row(*row.cells[:shown], style="bold" if n == 0 else None)
    console.print(view)
