"""The curves of a page: paths of SVG, drawn from the records, with axes that text can stand beside.

A panel is a quantity by epoch or by time. Its paths lie in a square of `SIDE` × `SIDE`, which the page
stretches to any screen; its ticks are shares of the width or the height, and letters are as large on all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfqn.race.problems.measures import Quantity
from kfqn.race.report import axes
from kfqn.race.report.palette import Style, styles
from kfqn.race.report.results import Array, Result, common_target, short_labels

SIDE = 1000
LINE = 2  # pixels


@dataclass(frozen=True)
class Tick:
    """A number beside an axis, at a share in percent of its length."""

    text: str
    place: float


@dataclass(frozen=True)
class Path:
    """A curve and the band of its standard error, which is empty for one seed."""

    entry: int
    curve: str
    band: str


@dataclass(frozen=True)
class Plot:
    """The paths on one kind of axis, ``scale``: log or linear. ``target`` is its place, None off the axis."""

    scale: str
    ticks: list[Tick]
    paths: list[Path]
    target: float | None


@dataclass(frozen=True)
class Panel:
    """A quantity over an axis that begins at 0 and ends at ``end``, which ``clipped`` goes on beyond."""

    title: str
    quantity: int
    axis: str
    label: str
    end: float
    clipped: str
    ticks: list[Tick]
    plots: list[Plot]


@dataclass(frozen=True)
class Entry:
    """One line of the legend."""

    label: str
    color: str
    dashes: str  # in pixels, as SVG takes them
    lost: str


def entries_of(results: Sequence[Result]) -> list[Entry]:
    """The legend."""
    looks = zip(results, short_labels(results), styles([r.config.entrant for r in results]), strict=True)
    return [Entry(label, style.color, _pixels(style), result.lost) for result, label, style in looks]


def _pixels(style: Style) -> str:
    return " ".join(f"{LINE * length:g}" for length in style.dashes)


def panels_of(results: Sequence[Result]) -> list[Panel]:
    """The first two quantities, each by epoch and by time; none where nothing finished."""
    if not any(result.epochs for result in results):
        return []
    measure = results[0].measure
    times = {"epoch": "epoch", measure.time: measure.time_label}
    return [
        _panel(results, n, axis, label)
        for n in range(len(measure.quantities[:2]))
        for axis, label in times.items()
    ]


def _panel(results: Sequence[Result], n: int, axis: str, label: str) -> Panel:
    quantity, end = results[0].measure.quantities[n], axes.end_of(results, axis)
    return Panel(
        title=quantity.label,
        quantity=n,
        axis=axis,
        label=label,
        end=end,
        clipped=axes.beyond(results, short_labels(results), axis),
        ticks=[Tick(axes.told(x), 100 * x / end) for x in axes.ticks(0, end, logarithmic=False)],
        plots=[_plot(results, quantity, axis, end, scale) for scale in ("log", "linear")],
    )


def _plot(results: Sequence[Result], quantity: Quantity, axis: str, end: float, scale: str) -> Plot:
    logarithmic = scale == "log" and axes.are_positive(results, quantity)
    low, high = axes.limits(results, quantity, logarithmic=logarithmic)

    def height(values: Array) -> Array:
        """From the bottom, 0 to 1 on the axis."""
        if logarithmic:
            return np.log(np.maximum(values, low / 1e6) / low) / math.log(high / low)
        return (values - low) / (high - low)

    paths = []
    for entry, result in enumerate(results):
        if result.epochs:
            curve, x = result.curve(quantity.key), SIDE * result.curve(axis).mean / end
            mean, error = quantity.scale * curve.mean, quantity.scale * curve.error
            bounds = [_points(x, height(values)) for values in (mean - error, mean + error)]
            band = f"M{' '.join(bounds[0])}L{' '.join(reversed(bounds[1]))}Z" if error.any() else ""
            paths.append(Path(entry, f"M{' '.join(_points(x, height(mean)))}", band))
    target = quantity.scale * common_target(results)
    shown = quantity == results[0].measure.first and low <= target <= high
    return Plot(
        scale=scale,
        ticks=[
            Tick(axes.told(y), 100 * float(height(np.array(y))))
            for y in axes.ticks(low, high, logarithmic=logarithmic)
        ],
        paths=paths,
        target=100 * float(height(np.array(target))) if shown else None,
    )


def _points(x: Array, height: Array) -> list[str]:
    """Corners of a path, downwards as SVG counts; what is far off the axis, or no number, is put near it."""
    y = SIDE * (1 - np.clip(np.nan_to_num(height, nan=2.0), -1, 2))
    return [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]


def data_of(results: Sequence[Result]) -> dict[str, Any]:
    """What the pointer tells of: for every entry the axes, and of every quantity means and standard errors.

    Numbers are in the units shown; what is not finite is None.
    """
    measure = results[0].measure
    shown = measure.quantities[:2]
    return {
        "labels": [entry.label for entry in entries_of(results)],
        "curves": [
            {key: _plain(result.curve(key).mean, 1) for key in ("epoch", measure.time)}
            | {
                "values": [
                    [
                        _plain(values, q.scale)
                        for values in (result.curve(q.key).mean, result.curve(q.key).error)
                    ]
                    for q in shown
                ]
            }
            if result.epochs
            else None
            for result in results
        ],
    }


def _plain(values: Array, scale: float) -> list[float | None]:
    return [float(f"{scale * value:.5g}") if math.isfinite(value) else None for value in values]
