"""The paper's four panels: training loss above test error, by epoch and by time; one block a problem.

Of the development set, what counts there above the training loss.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogFormatter

from kfqn.race.entrants import ENTRANTS
from kfqn.race.problems.measures import Quantity
from kfqn.race.report.results import Result, common_target
from kfqn.race.runs.files import atomic_path

COLORS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#555555",
    "#F0E442",
    "#882255",
    "#332288",
    "#AA4499",
    "#117733",
    "#999933",
    "#44AA99",
]
DASHES = ["-", "--", ":", "-."]
SIZE = (10.0, 7.0)  # inches of one block


def draw(blocks: Sequence[tuple[str, Sequence[Result]]], title: str, path: Path) -> None:
    """Write the figure, one block of four panels for every title and its results.

    The suffix of ``path`` (.png, .svg, .pdf) chooses the format. Colours tell optimizers
    apart, or settings where a block shows several of one optimizer.
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
    measure = results[0].measure
    quantities = measure.quantities[:2]
    axes = {"epoch": "epoch", measure.time: measure.time_label}
    panels = part.subplots(2, 2, sharex="col", sharey="row")
    for result, color, style in zip(results, *_styles(results), strict=True):
        for row, quantity in enumerate(quantities):
            for column, axis in enumerate(axes):
                _line(panels[row, column], result, axis, quantity, color, style)
    for panel in panels[0] if any(result.epochs for result in results) else []:
        target = common_target(results)
        if math.isfinite(target):
            panel.axhline(
                measure.first.scale * target,
                color="#999",
                linewidth=0.8,
                linestyle=":",
                label="common target",
            )
    for row, quantity in enumerate(quantities):
        panels[row, 0].set_ylabel(quantity.label)
        for panel in panels[row] if quantity.logarithmic and any(result.epochs for result in results) else []:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
            panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    for column, label in enumerate(axes.values()):
        panels[1, column].set_xlabel(label)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    if heading:
        part.suptitle(heading, fontsize=11)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _styles(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """A colour and a line style for every result: the same optimizer has the same in every race.

    Where there are too many optimizers or settings for that, all that is left is that no two are alike.
    """
    names = [result.config.entrant for result in results]
    order = [*ENTRANTS, *dict.fromkeys(name for name in names if name not in ENTRANTS)]
    places = [(order.index(name), names[:n].count(name)) for n, name in enumerate(names)]
    if any(color >= len(COLORS) or dash >= len(DASHES) for color, dash in places):
        places = [(n % len(COLORS), n // len(COLORS) % len(DASHES)) for n in range(len(names))]
    return [COLORS[color] for color, _ in places], [DASHES[dash] for _, dash in places]


def _line(panel: Axes, result: Result, axis: str, quantity: Quantity, color: str, style: str) -> None:
    lost = f", {result.lost}" if result.lost else ""
    if not result.epochs:
        panel.plot([], [], color=color, linestyle=style, label=result.label + lost)
        return
    curve, x = result.curve(quantity.key), result.curve(axis).mean
    mean, error = quantity.scale * curve.mean, quantity.scale * curve.error
    panel.plot(x, mean, color=color, linestyle=style, linewidth=1.8, label=result.label + lost)
    floor = mean / 100 if quantity.logarithmic else np.zeros_like(mean)  # below 0 there is no logarithm
    panel.fill_between(x, np.maximum(mean - error, floor), mean + error, color=color, alpha=0.2, linewidth=0)
