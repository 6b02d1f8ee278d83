"""The paper's four panels: training loss above test error, by epoch and by time."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from kfqn.race.entrants import ENTRANTS
from kfqn.race.runs import atomic_path
from kfqn.race.summary import Standing, common_target

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#F0E442"]  # Okabe-Ito
DASHES = ["-", "--", "-.", ":"]
ROWS = {"train_loss": "training loss", "test_error": "test error, %"}
COLUMNS = {"epoch": "epoch", "seconds": "training time, s"}


def draw(standings: Sequence[Standing], title: str, path: Path) -> None:
    """Write the figure; the suffix of ``path`` (.png, .svg, .pdf) chooses the format."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    drawn: list[str] = []
    for standing in standings:
        name = standing.config.entrant
        color = COLORS[[*ENTRANTS].index(name) % len(COLORS)]
        style = DASHES[drawn.count(name) % len(DASHES)]  # for a second setting of one optimizer
        drawn.append(name)
        for row, quantity in enumerate(ROWS):
            for column, axis in enumerate(COLUMNS):
                _line(panels[row, column], standing, axis, quantity, color, style)
    for panel in panels[0] if any(standing.epochs for standing in standings) else []:
        panel.axhline(
            common_target(standings), color="#999", linewidth=0.8, linestyle=":", label="common target"
        )
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    for row, label in enumerate(ROWS.values()):
        panels[row, 0].set_ylabel(label)
    for column, label in enumerate(COLUMNS.values()):
        panels[1, column].set_xlabel(label)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    with atomic_path(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)


def _line(panel: Axes, standing: Standing, axis: str, quantity: str, color: str, style: str) -> None:
    lost = f", {standing.lost}" if standing.lost else ""
    if not standing.epochs:
        panel.plot([], [], color=color, linestyle=style, label=standing.label + lost)
        return
    scale = 100 if quantity == "test_error" else 1
    curve, x = standing.curve(quantity), standing.curve(axis).mean
    mean, error = scale * curve.mean, scale * curve.error
    panel.plot(x, mean, color=color, linestyle=style, linewidth=1.8, label=standing.label + lost)
    floor = mean / 100 if quantity == "train_loss" else np.zeros_like(mean)  # a band below 0 has no logarithm
    panel.fill_between(x, np.maximum(mean - error, floor), mean + error, color=color, alpha=0.2, linewidth=0)
