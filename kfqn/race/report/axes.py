"""Where axes begin, end and have their ticks, so that who is far away squeezes nobody else's curve."""

import math
from collections.abc import Sequence

import numpy as np

from kfqn.race.problems import problem_of
from kfqn.race.problems.measures import Quantity
from kfqn.race.report.results import Array, Result

MOST = 2.0  # so many times as long as the best, or as half of all, an axis may last to show everybody
ROOM = 1.5  # else it lasts so many times as long
FAR = 2.0  # what is above so many times guessing is left out of an axis
_MANTISSAS = (
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
)


def end_of(results: Sequence[Result], axis: str) -> float:
    """Where the axis of a key of the records ends: with the last curve, or, if that is far off, before."""
    done = [result for result in results if result.epochs]
    if not done:
        return 1.0
    lasts = [float(result.curve(axis).mean[-1]) for result in done]
    best = lasts[min(range(len(done)), key=lambda n: done[n].final)]
    usual = max(best, float(np.median(lasts)))
    return max(lasts) if max(lasts) <= MOST * usual else ROOM * usual


def beyond(results: Sequence[Result], labels: Sequence[str], axis: str) -> str:
    """Who goes on where the axis has ended: "Adam goes on to 61, SGD-m to 70"; empty if nobody does."""
    end, ends = end_of(results, axis), []
    for result, label in zip(results, labels, strict=True):
        last = float(result.curve(axis).mean[-1]) if result.epochs else 0.0
        ends += [(last, label)] * (last > end)
    if len(ends) > 3:
        return f"{len(ends)} go on, to {max(ends)[0]:.3g} at most"
    return ", ".join(
        f"{label} goes on to {last:.3g}" if n == 0 else f"{label} to {last:.3g}"
        for n, (last, label) in enumerate(sorted(ends))
    )


def are_positive(results: Sequence[Result], quantity: Quantity) -> bool:
    """Whether a logarithmic axis can show a quantity; single zeros lie below its end."""
    values = _values(results, quantity)
    return bool((values >= 0).all() and (values > 0).any())


def _values(results: Sequence[Result], quantity: Quantity) -> Array:
    """All finite ones of the curves."""
    curves = [result.curve(quantity.key).mean for result in results if result.epochs]
    values = np.concatenate([*curves, np.empty(0)])
    finite: Array = values[np.isfinite(values)]
    return finite


def limits(results: Sequence[Result], quantity: Quantity, *, logarithmic: bool) -> tuple[float, float]:
    """The lowest and highest value shown, as percent or not, with a margin; nothing far above guessing."""
    values = _values(results, quantity)
    values = values[values > 0] if logarithmic else values
    far = FAR * problem_of(results[0].config.problem).guess.of(quantity.key)
    near = values[values <= far]
    values = quantity.scale * (near if len(near) else values)
    if not len(values):
        return 0.1, 1.0
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        margin = max((high / low) ** 0.04, 1.02)
        return low / margin, high * margin
    margin = 0.04 * (high - low) or 0.02 * abs(high) or 1.0
    return (0.0 if 0 <= low < high / 3 else low - margin), high + margin


def told(tick: float) -> str:
    """A number beside an axis: 0.5, 1e-7."""
    return f"{tick:g}".replace("e-0", "e-").replace("e+0", "e")


def ticks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    """Round numbers from low to high, at most eight of them, and two at least."""
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for mantissas in _MANTISSAS:
            found = [
                float(f"{m}e{n}") for n in decades for m in mantissas if low <= float(f"{m}e{n}") <= high
            ]
            if 2 <= len(found) <= 8:
                return found
        if len(found) > 8:
            return found[:: math.ceil(len(found) / 8)]
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    steps = [size * m for m in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5)]
    step = next((s for s in steps if (high - low) / s <= 7), steps[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]
