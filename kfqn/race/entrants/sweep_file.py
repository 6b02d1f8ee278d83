"""A sweep file as it is read: problem → optimizer → entry, checked, so that a damaged one is named."""

import json
from pathlib import Path
from typing import Any

from kfqn.race.entrants.registry import OF_TRAINER_CHOICES
from kfqn.race.failure import Failure

Entry = dict[str, Any]  # what a sweep file holds of one optimizer on one problem


def read(path: Path) -> dict[str, dict[str, Entry]]:
    """What the file holds, nothing if it is not there; Failure, which names it, if it cannot be used."""
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    for name, entries in _items(known, path, "the file"):
        for entrant, entry in _items(entries, path, name):
            _check(entry, path, f"{entrant} on {name}")
    found: dict[str, dict[str, Entry]] = known
    return found


def _items(value: Any, path: Path, what: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise _damaged(path, f"{what} is {type(value).__name__} and no table")
    return [*value.items()]


def _check(entry: Any, path: Path, what: str) -> None:
    """An entry has settings of numbers and known words, if any were best, and points with their ends."""
    best = dict(_items(entry, path, what)).get("best")
    if best is not None and not all(
        isinstance(v, int | float) or v in OF_TRAINER_CHOICES.get(key, ())
        for key, v in _items(best, path, f"best of {what}")
    ):
        raise _damaged(path, f"best of {what} is not made of numbers")
    points = entry.get("points", [])
    if not (isinstance(points, list) and all(isinstance(p, dict) and "status" in p for p in points)):
        raise _damaged(path, f"points of {what} do not say how they ended")


def _damaged(path: Path, why: object) -> Failure:
    return Failure(
        f"{path} is no sweep file, or damaged ({why}): choose another with --out or --save, or delete it, "
        "and 'kfqn sweep' makes it anew from its runs."
    )
