"""The table of results, as cells and in the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from rich.console import Console
from rich.table import Table

from kfqn.race.problems.measures import Quantity
from kfqn.race.report.results import Measure, Result, common_target

LABEL, GAP = 24, 2  # characters that labels get, if need be in several lines, and between columns
SPARED = (-5, -4, -2)  # seconds an epoch, epochs to the target, warm start: left out in this order


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


def columns_of(table: Sequence[Row]) -> list[int]:
    """Those in which at least one row has something to say."""
    columns = zip(*(row.cells for row in table), strict=True)
    return [n for n, column in enumerate(columns) if {*column} != {"–"}]


def print_table(table: Sequence[Row], title: str, console: Console, measure: Measure) -> None:
    """The table, the winner first and bold."""
    view = Table(title=title, title_justify="left", header_style="dim", box=None, pad_edge=False)
    heading = headings(measure).cells
    widths = fitting(heading, table, console.width)
    for n, width in widths.items():
        justify: Literal["left", "right"] = "left" if n == 0 else "right"
        view.add_column(heading[n], justify=justify, overflow="fold", width=width)
    for place, row in enumerate(table):
        view.add_row(*(row.cells[n] for n in widths), style="bold" if place == 0 else None)
    console.print(view)


def fitting(heading: Sequence[str], table: Sequence[Row], room: int) -> dict[int, int]:
    """Columns, and widths that break no number: where there is no room headings are broken, columns left out.

    Labels get what the others leave, in several lines if need be.
    """
    longest = [max(map(len, column)) for column in zip(*(row.cells for row in table), strict=True)]
    there = columns_of(table)
    whole = {n: max(longest[n], len(heading[n])) for n in there}
    broken = {n: max(longest[n], *map(len, heading[n].split())) for n in there}
    spared = [{len(heading) + n for n in SPARED[:count]} for count in range(len(SPARED) + 1)]
    for widths in (whole, *({n: broken[n] for n in there if n not in out} for out in spared)):
        left = room - sum(width + GAP for n, width in widths.items() if n)
        if left >= min(widths[0], LABEL):
            break
    return widths | {0: min(widths[0], max(left, 1))}
