"""Which values the settings of the optimizers may have."""

import math
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


def with_rate(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with ``lr="auto"`` as a group keeps it: ``automatic``, and a factor of what is found."""
    if "lr" not in settings:
        return settings
    automatic = isinstance(settings["lr"], str) and settings["lr"] == "auto"
    return settings | {"lr": 1.0 if automatic else settings["lr"], "automatic": automatic}
