"""What an optimizer is set to, and how it is written where people read it."""

from collections.abc import Mapping
from typing import Any

# A number, which may be true or false, or a word: one of an entrant's `choices`.
Settings = Mapping[str, Any]


def format_value(value: Any) -> str:
    """A setting as short as it can be read: 0.1, 1e-07, 30, plain."""
    return value if isinstance(value, str) else f"{value:g}"


def format_settings(settings: Settings) -> str:
    """Settings as in a legend: "lr 30, damping 1, cosine, warmup 0.05"; empty without any."""
    return ", ".join(f"{key} {format_value(value)}" for key, value in settings.items()).replace(
        "schedule ", ""
    )
