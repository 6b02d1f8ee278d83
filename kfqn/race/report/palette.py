"""One colour an optimizer in every figure of the project; settings of one differ in shade and dashes.

Each colour has a contrast of 3 or more with white and with `DARK`. Any two of them differ by at least 0.04 in
OKLab for eyes without red, green or blue cones as well, and by 0.06 where both race unless told otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

COLORS = {
    "kfbfgs:auto": "#0072B2",
    "kfbfgs": "#8C86FB",
    "kflbfgs": "#01A0C2",
    "kflbfgs:auto": "#5C58C4",
    "kfac": "#BD8500",
    "adam": "#9B50EA",
    "sgd": "#818486",
    "adamw": "#BF7EC0",
    "soap": "#6DA15F",
    "muon": "#D7370A",
    "shampoo": "#866062",
    "singd": "#527B27",
    "lbfgs": "#A93682",
}
OTHERS = ("#977159", "#CE0FA3", "#ED5193", "#707FDA", "#9220E5", "#38703E")  # of anybody's classes, in turn
DARK = "#15171A"  # the page at night
GREY = "#767A80"  # what is no optimizer: targets, bounds, counts

DASHES = ((), (4, 1.5), (1, 1.2), (5, 1.2, 1, 1.2))  # on and off, in widths of the line
_SHADES = (0.0, 0.3, -0.3)  # of white, or of black


@dataclass(frozen=True)
class Style:
    """A line's colour, and its dashes in widths of the line; none is solid."""

    color: str
    dashes: tuple[float, ...]


def styles(entrants: Sequence[str]) -> list[Style]:
    """A style for every line of a figure, from whose it is; the first of an optimizer has its colour, solid.

    Of one optimizer twelve lines differ, of no known one six.
    """
    unknown = [name for name in dict.fromkeys(entrants) if name not in COLORS]
    colors = COLORS | {name: OTHERS[n % len(OTHERS)] for n, name in enumerate(unknown)}
    places = [(name, entrants[:n].count(name)) for n, name in enumerate(entrants)]
    return [
        Style(_shaded(colors[name], _SHADES[k % len(_SHADES)]), DASHES[k % len(DASHES)]) for name, k in places
    ]


def _shaded(color: str, share: float) -> str:
    """A colour mixed with so much white, or black where negative."""
    end = 255 if share > 0 else 0
    parts = (int(color[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{round(part + (end - part) * abs(share)):02X}" for part in parts)
