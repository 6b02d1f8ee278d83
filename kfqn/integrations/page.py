"""The page of `kfqn.Report`: HTML with SVG in it, and nothing that has to be fetched.

Curves are stretched to the width there is, with letters beside them that are not.
"""

import csv
import io
import itertools
import math
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

Curve = Sequence[tuple[int, float]]


@final
@dataclass(frozen=True)
class Point:
    """What was seen at a step: ``moved`` is ‖ΔW‖/‖W‖ by layer; ``refused`` counts from the start."""

    step: int
    loss: float | None
    rate: float
    refused: float
    moved: Mapping[str, float]


@final
@dataclass(frozen=True)
class Run:
    """All that is drawn; ``told`` is the last of `Kronecker.diagnostics`."""

    title: str
    points: Sequence[Point]
    told: Mapping[str, Mapping[str, float]]
    optimizer: str


@final
@dataclass(frozen=True)
class Axis:
    """From numbers to 0 … 1, by their logarithms where none is negative and they are far apart.

    Six powers of ten are shown at most; what is less is at the bottom.
    """

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(values: Sequence[float], *, zero: bool = False) -> "Axis":
        """Of finite values, of which there may be none; with ``zero`` from 0, unless by logarithms."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if low >= 0 and high > 10 * low:
            return Axis(max(low, high / 1e6), high, True)
        low = min(low, 0.0) if zero else low
        return Axis(low, high if high > low else low + (abs(low) or 1.0), False)

    def place(self, value: float) -> float:
        """Where a value is, 0 at the bottom and 1 at the top."""
        if self.logarithmic:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers within, about three."""
        if self.logarithmic:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            decades = [10.0**n for n in tens if self.low <= 10.0**n <= self.high]
            fine = [k * 10.0**n for n in tens for k in (1, 2, 5) if self.low <= k * 10.0**n <= self.high]
            found = decades if len(decades) > 2 else fine
            return found[:: max(1, math.ceil(len(found) / 5))]
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        size *= next(k for k in (5, 2, 1) if k * size <= (self.high - self.low) / 2 or k == 1)
        first = math.ceil(self.low / size - 1e-9)
        return [n * size for n in range(first, math.floor(self.high / size + 1e-9) + 1)]


def page(run: Run) -> str:
    """The whole file."""
    points, title = run.points, _escaped(run.title)
    losses = [(p.step, p.loss) for p in points if p.loss is not None and math.isfinite(p.loss)]
    rates = [(p.step, p.rate) for p in points]
    refused = [b.step for a, b in itertools.pairwise(points) if b.refused > a.refused]
    body = [f"<h1>{title}</h1><p>{_summary(run)}</p>"]
    if losses:
        body.append(_panel("Loss", [("pale", losses), ("line", _smooth(losses))], refused))
    if rates:
        body += [_panel("Rate", [("line", rates)], [], zero=True), _layers(run)]
    data = b64encode(_csv(points).encode()).decode()
    body.append(f'<p><a download="run.csv" href="data:text/csv;base64,{data}">All of it as CSV</a></p>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><main>{''.join(body)}</main></html>\n"
    )


def _summary(run: Run) -> str:
    """What the run has come to, in a sentence or two."""
    if not run.points:
        return "No step has been taken."
    last, resets = run.points[-1], sum(of.get("resets", 0) for name, of in run.told.items() if name)
    losses = [p.loss for p in run.points if p.loss is not None]
    told = f"{_escaped(run.optimizer)}, {last.step:,} steps"
    if losses:
        told += f", loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last"
    wrong = f"Steps refused, because a loss or gradient was not finite: <b>{last.refused:g}</b>. "
    again = f"Factors that started anew: <b>{resets:g}</b>."
    return f"{told}. {wrong if last.refused else ''}{again if resets else ''}"


def _panel(
    name: str, curves: Sequence[tuple[str, Curve]], marks: Sequence[int], *, zero: bool = False
) -> str:
    """Curves over steps, each (class, points), with vertical marks; the axis is that of the last."""
    x = Axis(curves[0][1][0][0], max(curves[0][1][-1][0], curves[0][1][0][0] + 1), False)
    y = Axis.of([value for _, curve in curves for _, value in curve], zero=zero)
    lines = "".join(f'<path class="{kind}" d="{_path(curve, x, y)}"/>' for kind, curve in curves)
    lines += "".join(f'<path class="mark" d="M{1000 * x.place(step):.1f} 0V300"/>' for step in marks)
    grid = "".join(f'<path class="grid" d="M0 {300 * (1 - y.place(tick)):.1f}H1000"/>' for tick in y.ticks())
    left = "".join(f'<i style="top:{100 * (1 - y.place(tick)):.1f}%">{tick:.4g}</i>' for tick in y.ticks())
    below = "".join(f'<i style="left:{100 * x.place(tick):.1f}%">{tick:,.0f}</i>' for tick in x.ticks())
    return (
        f'<h2>{name}</h2><div class="panel"><div class="y">{left}</div>'
        f'<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{name} by step">'
        f'{grid}{lines}</svg><div class="x">{below}</div></div>'
    )


def _layers(run: Run) -> str:
    """A row for every layer: a small curve of ‖ΔW‖/‖W‖, all at one scale, and the numbers of now."""
    moved = [value for p in run.points for value in p.moved.values() if 0 < value < math.inf]
    x, y = Axis(run.points[0].step, max(run.points[-1].step, run.points[0].step + 1), False), Axis.of(moved)
    rows = []
    for name, numbers in run.told.items():
        curve = [(p.step, p.moved[name]) for p in run.points if 0 < p.moved.get(name, 0) < math.inf]
        if not name or not curve:
            continue
        norms = [(key.removeprefix("norm "), v) for key, v in numbers.items() if key.startswith("norm ")]
        factors = ", ".join(f"{key} {norm:.3g}" for key, norm in norms)
        breaking = _escaped(name).replace(".", ".<wbr>")
        rows.append(
            f"<tr><th>{breaking}</th><td><svg viewBox='0 0 1000 300' preserveAspectRatio='none'>"
            f"<path class='line' d='{_path(curve, x, y)}'/></svg></td><td>{100 * curve[-1][1]:.3g} %</td>"
            f"<td>{factors}</td></tr>"
        )
    logarithmic = "by logarithms, " if y.logarithmic else ""
    return (
        "<h2>How far layers move</h2><p>Length of a step relative to the weights, ‖ΔW‖/‖W‖, by step, "
        f"{logarithmic}from {100 * y.low:.2g} to {100 * y.high:.2g} % in every row; then the last one, and "
        "the norms of factors.</p>"
        f"<table><tr><th>layer</th><th></th><th>last</th><th>norms</th></tr>{''.join(rows)}</table>"
    )


def _path(curve: Curve, x: Axis, y: Axis) -> str:
    """The line of an SVG that is 1000 wide and 300 high."""
    places = [f"{1000 * x.place(step):.1f} {300 * (1 - y.place(value)):.1f}" for step, value in curve]
    return "M" + "L".join(places) + ("h.1" if len(places) == 1 else "")


def _smooth(curve: Curve) -> list[tuple[int, float]]:
    """Medians over the last twenty-fifth of the run, or what there is of it."""
    window = max(1, len(curve) // 25)
    values = [value for _, value in curve]
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [(step, statistics.median(part)) for (step, _), part in zip(curve, parts, strict=True)]


def _csv(points: Sequence[Point]) -> str:
    names = [*points[-1].moved] if points else []
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["step", "loss", "rate", "refused", *names])
    for p in points:
        writer.writerow([p.step, p.loss, p.rate, p.refused, *(p.moved.get(name) for name in names)])
    return out.getvalue()


_STYLE = """
:root{color-scheme:light dark;--ink:#222;--dim:#667;--rule:#ddd;--line:#0072b2;--bad:#d55e00;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--dim:#aab;--rule:#444;--line:#56b4e9;--bad:#ff8c42;--back:#16181c}}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:auto;padding:1rem}
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:1.4rem 0 .6rem}p{margin:.3rem 0;color:var(--dim)}
b{color:var(--bad)}a{color:var(--line)}
.panel{display:grid;grid-template-columns:3.6rem 1fr;grid-template-rows:13rem 1.6rem}
.panel svg{width:100%;height:100%;border-bottom:1px solid var(--dim);overflow:visible}
.x{grid-column:2;position:relative}.y{position:relative}
i{position:absolute;font-style:normal;font-size:.85rem;color:var(--dim)}
.y i{right:.5rem;transform:translateY(-50%)}.x i{transform:translateX(-50%)}
path{fill:none;vector-effect:non-scaling-stroke;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line{stroke:var(--line)}.pale{stroke:var(--line);opacity:.3;stroke-width:1}
.grid{stroke:var(--rule);stroke-width:1}.mark{stroke:var(--bad)}
table{width:100%;border-collapse:collapse;font-size:.9rem}
th{font-weight:400;text-align:left;overflow-wrap:anywhere;max-width:11rem}tr:first-child th{color:var(--dim)}
td{text-align:right;white-space:nowrap;padding-left:.6rem}td:last-child{white-space:normal;color:var(--dim)}
td:nth-child(2){width:45%}td svg{display:block;overflow:visible;width:100%;height:1.7rem}
th:nth-child(n+3){text-align:right}tr{border-bottom:1px solid var(--rule)}
@media(max-width:32rem){
td:last-child,tr:first-child th:last-child{display:none}.panel{grid-template-rows:10rem 1.6rem}}
"""


def _escaped(text: str) -> str:
    from html import escape  # of all that is imported here the one thing that torch does without

    return escape(text)
