r"""The final loss of every optimizer over its whole grid, beside the one point of those without settings.

    kfqn race --problem digits --optimizers kfbfgs:auto --out FOLDER
    python -m benchmarks.claims.sensitivity SWEEP.json FOLDER [SWEEP.json FOLDER ...] \
        --out docs/sensitivity.png

A panel for every pair of a file of `kfqn sweep` and a race of automatic optimizers on one of its problems, at
the same scale. A dot is one point of a grid, the lowest training loss of its runs, means over its seeds; a
hollow one was stopped early by halving; crosses at the top are points that diverged. Diamonds are the
seeds of the automatic optimizer.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from kfqn.race.entrants import ENTRANTS, entrant_of
from kfqn.race.entrants.grids import SETTINGS
from kfqn.race.problems import PROBLEMS
from kfqn.race.report.palette import COLORS, GREY
from kfqn.race.runs import Run
from kfqn.race.runs.files import atomic_path

LOST = 1.06  # where crosses are drawn, as a share of the panel's height


def runs_of(folder: Path) -> list[Run]:
    """The finished runs of automatic optimizers."""
    runs = [Run(place) for place in sorted((folder / "runs").iterdir())]
    finished = [run for run in runs if (run.end() or {}).get("status") == "finished"]
    return [run for run in finished if entrant_of(run.config.entrant).automatic]


def points_of(entry: dict[str, Any]) -> list[tuple[float, bool]]:
    """The loss of every point of a grid, ∞ if a seed was lost, and whether it was run in full."""
    found: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for point in entry["points"]:
        found.setdefault(tuple(point.get(key, 0.0) for key in (*SETTINGS, "beta2")), []).append(point)
    return [
        (
            statistics.fmean(
                point["train_loss"] if point["status"] == "finished" else math.inf for point in of_seeds
            ),
            all(point["share"] == 1 for point in of_seeds),
        )
        for of_seeds in found.values()
    ]


def panel(axes: Axes, entries: dict[str, dict[str, Any]], runs: Sequence[Run]) -> None:
    """One problem: optimizers from left to right, losses upwards."""
    config = runs[0].config
    names = sorted(entries, key=[*ENTRANTS].index)
    losses = [min(record["train_loss"] for record in run.epochs()) for run in runs]
    ours = statistics.fmean(losses)
    color = COLORS[config.entrant]
    axes.axhline(ours, color=color, linewidth=0.8, linestyle=":")
    axes.scatter([0] * len(losses), losses, marker="D", s=34, color=color, zorder=3)
    rng, upwards = np.random.default_rng(0), axes.get_xaxis_transform()
    for x, name in enumerate(names, start=1):
        color = COLORS[name]
        points = points_of(entries[name])
        for loss, whole in points:
            place = x + rng.uniform(-0.25, 0.25)
            if math.isfinite(loss):
                face = color if whole else "none"
                axes.scatter(place, loss, s=20, facecolor=face, edgecolor=color, alpha=0.75, linewidth=1)
            else:
                axes.plot(place, LOST, "x", color=color, markersize=5, transform=upwards, clip_on=False)
        better = sum(loss < ours for loss, whole in points if whole)
        share = f"{better}/{len(points)}"
        axes.text(x, 0.01, share, transform=upwards, ha="center", fontsize=8, color=GREY)
    labels = [entrant_of(config.entrant).label, *(ENTRANTS[name].label for name in names)]
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    axes.set_yscale("log")
    low, high = np.log10(axes.get_ylim())
    axes.set_ylim(10 ** (low - 0.05 * (high - low)))  # room for the counts
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    scale = f"width {config.width}, {config.epochs} epochs"
    axes.set_title(f"{PROBLEMS[config.problem].title}\n{scale}", fontsize=10, pad=26)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", nargs="+", type=Path, metavar="SWEEP.json FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error("every file of a sweep needs the folder of a race after it.")
    pairs = list(zip(options.pairs[::2], options.pairs[1::2], strict=True))
    matplotlib.use("Agg")
    figure = Figure(figsize=(5.2 * len(pairs), 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (sweep, folder) in zip(all_axes, pairs, strict=True):
        runs = runs_of(folder)
        if not runs:
            parser.error(f"no run of an automatic optimizer has finished in {folder}.")
        panel(axes, json.loads(sweep.read_text(encoding="utf-8"))[runs[0].config.problem], runs)
    all_axes[0].set_ylabel("lowest training loss")
    figure.supxlabel(
        "Dots: every point of a grid (hollow: stopped early); crosses: diverged; below: how many points end "
        "lower than the optimizer without settings.",
        fontsize=9,
    )
    with atomic_path(options.out) as partial:
        figure.savefig(partial, format=options.out.suffix[1:], dpi=130)
    print(options.out)


if __name__ == "__main__":
    main()
