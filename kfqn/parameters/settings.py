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
    "bias_decay": (0, math.inf, True),
    "momentum": (0, 1, True),
    "averaging": (0, 1, True),
    "clip": (0, math.inf, False),
}
_UNSET = ("clip", "max_factor_size", "momentum")  # may be None
_WHOLE = ("history_size", "inverse_interval", "curvature_interval", "max_factor_size", "split")
_DAMPING = 3.0  # where none is given with a fixed learning rate
_LARGEST = 256  # rows of a block of a factor or direction, where none are given with an automatic one,
_NOT_CUT = 1024  # and of one that is not cut
_INTERVAL, _LONG_INTERVAL = 10, 40  # steps between those that are learnt from: of the paper's, and of ours
_DECAY = 0.03  # of the weights, times the share that they move by, where none is given with an automatic rate
_FLAGS = {
    "lr": "automatic",
    "damping": "relative",
    "max_factor_size": "bounded",
    "curvature_interval": "spaced",
    "weight_decay": "decayed",
}


def checked_settings(**settings: Any) -> dict[str, Any]:
    """The settings as a group; ValueError for one that is out of range. Flags are not looked at."""
    for name, value in settings.items():
        if name not in (*_RANGES, *_WHOLE) or (value is None and name in _UNSET):
            continue
        if name in _WHOLE:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")
            continue
        low, high, closed = _RANGES[name]
        try:
            inside = low <= value < high if closed else low < value < high
        except TypeError:  # no number
            inside = False
        if not inside:
            upper = "finite" if high == math.inf else f"< {high:g}"
            raise ValueError(f"{name} must be {'>=' if closed else '>'} {low:g} and {upper}, got {value}.")
    return settings


def resolved(settings: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is "auto" of the settings in `_FLAGS` as a group keeps it: a flag and a number.

    ``defaults`` hold in resolved form what the settings leave out. An ``automatic`` rate is a factor of the
    share that layers move, 1. Dampings that are ``relative`` to each layer go with such a rate alone, since
    only that makes steps of one size of them; and with a number for the rate factors stay whole, as in the
    paper. ValueError for any other word.
    """
    if not settings.keys() & _FLAGS.keys():
        return settings
    given = {
        key: settings.get(key, "auto" if defaults.get(flag) else defaults.get(key))
        for key, flag in _FLAGS.items()
        if key in settings or key in defaults
    }
    for key, value in given.items():
        if isinstance(value, str) and value != "auto":
            raise ValueError(f'{key} must be a number or "auto", got {value!r}.')
    unset = {flag for key, flag in _FLAGS.items() if isinstance(given.get(key), str)}
    automatic = "automatic" in unset
    if not automatic:
        unset.discard("relative")
    numbers = {
        "lr": 1.0,
        "damping": 1.0 if automatic else _DAMPING,
        "max_factor_size": _LARGEST if automatic else None,
        "curvature_interval": _LONG_INTERVAL if automatic else _INTERVAL,
        "weight_decay": _DECAY if automatic else 0.0,
    }
    found = {key: numbers[key] if isinstance(value, str) else value for key, value in given.items()}
    return settings | found | {_FLAGS[key]: _FLAGS[key] in unset for key in found}


def largest_block(group: Mapping[str, Any], rows: int) -> int | None:
    """`max_factor_size` of what has so many rows, or columns if fewer; None where it is not cut."""
    largest: int | None = group.get("max_factor_size")
    whole = _NOT_CUT if group.get("bounded") else largest
    return None if whole is None or rows <= whole else largest


def momentum(group: Mapping[str, Any]) -> float:
    """β of the average of the gradient.

    ``momentum`` is None, and ``beta`` holds, unless it is set: by OneCycleLR and CyclicLR, which cycle it.
    """
    return float(group["beta"] if group["momentum"] is None else group["momentum"])


def l2(group: Mapping[str, Any]) -> float:
    """What times W is added to gradients; 0 where weights decay by themselves."""
    return 0.0 if _decoupled(group) else float(group["weight_decay"])


def shrinkage(group: Mapping[str, Any]) -> float:
    """What times the rate W shrinks by before a step."""
    return float(group["weight_decay"]) if _decoupled(group) else 0.0


def _decoupled(group: Mapping[str, Any]) -> bool:
    """Always with an automatic rate: what is added to gradients would depend on the scale of the loss."""
    return bool(group.get("automatic") or group["decoupled_weight_decay"])
