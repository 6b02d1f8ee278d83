"""Which values the settings of the optimizers may have."""

import math
from collections.abc import Mapping
from typing import Any

_RANGES = {  # low, high, whether low itself is allowed
    "lr": (0, math.inf, False),
    "damping": (0, math.inf, False),
    "beta": (0, 1, True),
    "mu1": (0, 1, False),
    "weight_decay": (0, math.inf, True),
    "momentum": (0, 1, True),
    "averaging": (0, 1, True),
    "clip": (0, math.inf, False),
}
_WHOLE = ("history_size", "inverse_interval", "curvature_interval", "max_factor_size")
_DAMPING = 3.0  # where none is given with a fixed learning rate


def checked_settings(**settings: Any) -> dict[str, Any]:
    """The settings as a group; ValueError for one that is out of range. None and flags are not looked at."""
    for name, value in settings.items():
        if value is None or name not in (*_RANGES, *_WHOLE):
            continue
        if name in _WHOLE:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")
            continue
        low, high, closed = _RANGES[name]
        if isinstance(value, str) or not (low <= value < high if closed else low < value < high):
            upper = "finite" if high == math.inf else f"< {high:g}"
            raise ValueError(f"{name} must be {'>=' if closed else '>'} {low:g} and {upper}, got {value}.")
    return settings


def resolved(settings: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``lr="auto"`` and ``damping="auto"`` as a group keeps them: as flags, and as factors of what is found.

    ``defaults`` hold in resolved form what the settings leave out. Dampings that are ``relative`` to each
    layer go with an ``automatic`` rate alone, since only that makes steps of one size of them.
    """
    if not settings.keys() & {"lr", "damping"}:
        return settings
    lr = settings.get("lr", "auto" if defaults.get("automatic") else defaults.get("lr"))
    damping = settings.get("damping", "auto" if defaults.get("relative") else defaults.get("damping"))
    automatic = isinstance(lr, str) and lr == "auto"
    unset = isinstance(damping, str) and damping == "auto"
    relative = automatic and unset
    return settings | {
        "lr": 1.0 if automatic else lr,
        "automatic": automatic,
        "damping": 1.0 if relative else _DAMPING if unset else damping,
        "relative": relative,
    }
