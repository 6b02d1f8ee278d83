"""The paper's four panels: training loss above test error, by epoch and by time; one block a problem.

Of the development set, what counts there above the training loss.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullLocator

from kfqn.race.problems.measures import Quantity
from kfqn.race.report import axes
from kfqn.race.report.palette import GREY, Style, styles
from kfqn.race.report.results import Result, common_target, short_labels
from kfqn.race.runs.files import atomic_path

SIZE = (8.0, 6.4)  # inches of one block


def draw(blocks: Sequence[tuple[str, Sequence[Result]]], title: str, path: Path) -> None:
    """Write the figure, one block of four panels for every title and its results.

    The suffix of ``path`` (.png, .svg, .pdf) chooses the format; colours are those of `palette`.
    """
    matplotlib.use("Agg")
    columns = min(2, len(blocks))
    lines = math.ceil(len(blocks) / columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * lines), layout="constrained")
    figure.suptitle(title, fontsize=12)
    parts = figure.subfigures(lines, columns, squeeze=False, wspace=0.03, hspace=0.03).flat
    for part, (heading, results) in zip(parts, blocks, strict=False):
        _block(part, heading, results)
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150 if len(blocks) == 1 else 110)


def _block(part: SubFigure, heading: str, results: Sequence[Result]) -> None:
    measure, labels = results[0].measure, short_labels(results)
    quantities, times = measure.quantities[:2], {"epoch": "epoch", measure.time: measure.time_label}
    panels = part.subplots(2, 2, sharex="col", sharey="row")
    for result, label, style in zip(
        results, labels, styles([result.config.entrant for result in results]), strict=True
    ):
        lost = f", {result.lost}" if result.lost else ""
        for row, quantity in enumerate(quantities):
            for column, time in enumerate(times):
                _line(panels[row, column], result, time, quantity, label + lost, style)
    target = measure.first.scale * common_target(results)
    if math.isfinite(target):
        for panel in panels[0]:
            panel.axhline(target, color=GREY, linewidth=0.8, linestyle=":", label="common target")
    for row, quantity in enumerate(quantities):
        logarithmic = axes.are_positive(results, quantity)
        low, high = axes.limits(results, quantity, logarithmic=logarithmic)
        panels[row, 0].set_ylabel(quantity.label)
        for panel in panels[row]:
            panel.set_yscale("log", nonpositive="clip") if logarithmic else panel.set_yscale("linear")
            panel.set_ylim(low, high)
            places = axes.ticks(low, high, logarithmic=logarithmic)
            panel.set_yticks(places, [axes.told(place) for place in places])
            panel.yaxis.set_minor_locator(NullLocator())
    for column, (time, label) in enumerate(times.items()):
        clipped = axes.beyond(results, labels, time)
        panels[1, column].set_xlabel(f"{label}\n({clipped})" if clipped else label)
        panels[1, column].set_xlim(0, axes.end_of(results, time))
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if heading:
        part.suptitle(heading, fontsize=11)
    handles, names = panels[0, 0].get_legend_handles_labels()
    part.legend(handles, names, loc="outside lower center", ncols=3, fontsize=10, frameon=False)


def _line(panel: Axes, result: Result, time: str, quantity: Quantity, label: str, style: Style) -> None:
    dashes = (0, style.dashes or None)
    if not result.epochs:
        panel.plot([], [], color=style.color, linestyle=dashes, label=label)
        return
    curve, x = result.curve(quantity.key), result.curve(time).mean
    mean, error = quantity.scale * curve.mean, quantity.scale * curve.error
    panel.plot(x, mean, color=style.color, linestyle=dashes, linewidth=1.8, label=label)
    panel.fill_between(x, mean - error, mean + error, color=style.color, alpha=0.2, linewidth=0)
