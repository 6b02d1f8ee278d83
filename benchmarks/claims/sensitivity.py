r"""The final loss of every optimizer over its whole grid, beside the one point of those without settings.

    python results/make.py unpack digits runs/digits
    python results/make.py unpack digits-mlp runs/digits-mlp
    kfqn race --problem cifar10-allcnn --width 8 --train-size 2560 --eval-size 2560 --epochs 18 --seeds 3 \
        --optimizers kfbfgs:auto
    python -m benchmarks.claims.sensitivity kfqn/race/entrants/tuned.json runs/digits \
        kfqn/race/entrants/tuned.json runs/digits-mlp \
        docs/sweeps/cifar10-allcnn-field.json runs/cifar10-allcnn --out docs

A picture, ``sensitivity-PROBLEM.svg``, for every pair of a file of `kfqn sweep` and a race of automatic
optimizers on one of its problems, at the same scale. A dot is one point of a grid, the lowest training loss
of its runs, means over its seeds; a hollow one was stopped early by halving; crosses at the right are points
that diverged. Diamonds are the seeds of the automatic optimizer; beside a name stands how many of its points
end lower.
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
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullLocator

from kfqn.race.entrants import ENTRANTS, entrant_of
from kfqn.race.entrants.grids import SETTINGS
from kfqn.race.problems import PROBLEMS
from kfqn.race.report.palette import COLORS
from kfqn.race.runs import Run
from kfqn.race.runs.files import atomic_path

LOST = 1.03  # where crosses are drawn, as a share of the panel's width
SIZE = (2.5, 3.0)  # inches: three stand side by side in a page, and one is as wide as a phone


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
    """One problem: optimizers from top to bottom, losses to the right."""
    config = runs[0].config
    names = sorted(entries, key=[*ENTRANTS].index)
    losses = [min(record["train_loss"] for record in run.epochs()) for run in runs]
    ours, color = statistics.fmean(losses), COLORS[config.entrant]
    axes.axvline(ours, color=color, linewidth=0.8, linestyle=":")
    axes.scatter(losses, [0] * len(losses), marker="D", s=16, color=color, zorder=3)
    labels = [entrant_of(config.entrant).label]
    rng, sideways = np.random.default_rng(0), axes.get_yaxis_transform()
    for y, name in enumerate(names, start=1):
        color, points = COLORS[name], points_of(entries[name])
        for loss, whole in points:
            place = y + rng.uniform(-0.25, 0.25)
            if math.isfinite(loss):
                face = color if whole else "none"
                axes.scatter(loss, place, s=8, facecolor=face, edgecolor=color, alpha=0.75, linewidth=0.8)
            else:
                axes.plot(LOST, place, "x", color=color, markersize=3, transform=sideways, clip_on=False)
        better = sum(loss < ours for loss, whole in points if whole)
        labels.append(f"{ENTRANTS[name].label}, {better}/{len(points)}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    if min(losses) < 0.01:
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda loss, _: f"{loss:g}" if loss > 1e-3 else f"{loss:.0e}".replace("e-0", "e-"))
    )
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.set_xlabel("lowest training loss")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    scale = f"width {config.width}, {config.epochs} epochs"
    axes.set_title(f"{PROBLEMS[config.problem].title}\n{scale}", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", nargs="+", type=Path, metavar="SWEEP.json FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error("every file of a sweep needs the folder of a race after it.")
    pairs = list(zip(options.pairs[::2], options.pairs[1::2], strict=True))
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kfqn", "font.size": 7.5})
    for sweep, folder in pairs:
        runs = runs_of(folder)
        if not runs:
            parser.error(f"no run of an automatic optimizer has finished in {folder}.")
        problem = runs[0].config.problem
        figure = Figure(figsize=SIZE, layout="constrained")
        panel(figure.subplots(), json.loads(sweep.read_text(encoding="utf-8"))[problem], runs)
        path = options.out / f"sensitivity-{problem}.svg"
        with atomic_path(path) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
