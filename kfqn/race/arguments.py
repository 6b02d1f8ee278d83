"""What a person types, as values: each is a ``type`` for argparse, and says what is wrong with a text."""

import argparse
import contextlib
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn, final

from kfqn.race.entrants import ENTRANTS, SWEPT, Entrant, Settings
from kfqn.race.entrants.grids import Grid
from kfqn.race.entrants.registry import OF_TRAINER, OF_TRAINER_CHOICES
from kfqn.race.failure import did_you_mean
from kfqn.race.problems import PROBLEMS


@final
class Parser(argparse.ArgumentParser):
    """One that also says what was meant by an unknown word or option."""

    def error(self, message: str) -> NoReturn:
        """Print it below the usage, and leave with 2."""
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        option = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if choice:
            message += did_you_mean(choice[1], choice[2].replace("'", "").split(", "))
        elif option:
            message += did_you_mean(option[1], self._words())
        super().error(message)

    def _words(self) -> Iterator[str]:
        """All options, of its commands too."""
        for action in self._actions:
            yield from action.option_strings
            commands = action.choices if isinstance(action, argparse._SubParsersAction) else {}
            for command in commands.values():
                yield from (word for own in command._actions for word in own.option_strings)


def seconds(text: str) -> float:
    """A number of seconds > 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be a number of seconds > 0, got {text!r}")
    return value


def warm_up(text: str) -> float:
    """A share of the steps, or a number of them."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a share of the steps, or a number of them, got {text!r}") from None


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"must be a share, 0 to 1, got {text!r}")
    return value


def positive(text: str) -> int:
    """A whole number ≥ 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def one_of(noun: str, known: Collection[str]) -> Callable[[str], str]:
    """A name among those known; the ``noun`` says what of."""

    def name(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(_unknown(noun, text, known))
        return text

    return name


def problem(text: str) -> str:
    """A problem that is known, or one's own, ``module:function``."""
    module, colon, function = text.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), function)):
        return text
    if text not in PROBLEMS:
        told = _unknown("problem", text, PROBLEMS)
        raise ArgumentTypeError(f"{told}, or name your own as FILE:FUNCTION, mine:problem for mine.py")
    return text


def _unknown(noun: str, text: str, known: Collection[str]) -> str:
    return f"no {noun} {text!r}{did_you_mean(text, known)} (choose from {', '.join(known)})"


def entrant(text: str) -> tuple[str, Settings | None]:
    """``name`` or ``name:key=value,key=value``; None stands for the best known settings."""
    name, rest = _name_and_settings(text)
    if "." in name:
        pairs = [_pair(item) for item in rest.split(",")] if rest else []
        return name, {key: _argument(key, value) for key, _, value in pairs}
    word = rest.partition(":")[0]
    whole = f"{name}:{word}" if word and "=" not in word else name  # a word that may belong to the name
    if name not in ENTRANTS or (whole != name and ":" in did_you_mean(whole, ENTRANTS)):
        raise ArgumentTypeError(_unknown("optimizer", whole, ENTRANTS))
    return name, settings_of(ENTRANTS[name], rest) if rest else None


def settings_of(entrant: Entrant, text: str) -> Settings:
    """``key=value,key=value`` for this entrant, in the order in which it names its settings."""
    pairs = [_pair(item) for item in text.split(",")]
    given = [key for key, _, _ in pairs]
    known = (*entrant.settings, *OF_TRAINER)
    if len({*given}) < len(given) or not {*entrant.required} <= {*given} <= {*known}:
        wrong = next((key for key in given if key not in known), "")
        raise ArgumentTypeError(f"{_takes(entrant)}, got {text!r}{did_you_mean(wrong, known)}")
    choices = {**entrant.choices, **OF_TRAINER_CHOICES}
    words = {key: _word(key, value, choices[key]) for key, _, value in pairs if key in choices}
    try:
        numbers = {key: float(value) for key, _, value in pairs if key not in words}
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not of the form key=number,key=number") from None
    if not all(math.isfinite(v) and (v > 0 or key not in entrant.required) for key, v in numbers.items()):
        raise ArgumentTypeError(f"settings must be > 0 and finite, got {text!r}")
    settings: Settings = numbers | words
    return {key: settings[key] for key in known if key in settings}


def _takes(entrant: Entrant) -> str:
    """What an entrant can be set to: "adam takes lr=...,eps=... and, if you like, beta2=..."."""
    choices = {**entrant.choices, **OF_TRAINER_CHOICES}
    required, options = (
        ",".join(f"{key}={'|'.join(choices[key]) if key in choices else '...'}" for key in keys)
        for keys in (entrant.required, (*entrant.options, *entrant.choices, *OF_TRAINER))
    )
    return (
        f"{entrant.name} takes {required} and, if you like, {options}"
        if required
        else f"{entrant.name} takes only {options}"
    )


def _word(key: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ArgumentTypeError(
            f"{key} must be {' or '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}"
        )
    return value


def swept(text: str) -> tuple[str, Grid | None]:
    """``name``, or ``dotted.name:key=value/value,...``; None stands for the grid of `entrants.grids`."""
    name, _, rest = text.partition(":")
    if "." in name and rest:
        pairs = [_pair(item) for item in rest.split(",")]
        return name, {
            key: tuple(_argument(key, value) for value in values.split("/")) for key, _, values in pairs
        }
    if "." in name:
        raise ArgumentTypeError(f"{name} has no grid: give the values to try, as in {name}:lr=0.01/0.1")
    if name in SWEPT and "=" in rest:
        raise ArgumentTypeError(f"{name} has a grid of its own: leave {rest!r} out, or race single values")
    if text not in SWEPT:
        near = did_you_mean(text, SWEPT)
        raise ArgumentTypeError(
            f"no optimizer with a grid is {text!r}{near} (choose from {', '.join(SWEPT)})"
        )
    return text, None


def _name_and_settings(text: str) -> tuple[str, str]:
    """``name:rest``, where the name may end with ``:auto``."""
    name, _, rest = text.partition(":")
    word, _, further = rest.partition(":")
    return (f"{name}:{word}", further) if f"{name}:{word}" in ENTRANTS else (name, rest)


def _pair(item: str) -> tuple[str, str, str]:
    key, equals, value = item.partition("=")
    return key.strip(), equals, value.strip()


def _argument(key: str, value: str) -> Any:
    """An argument of any optimizer: true, false, a whole number or another; or a word of the trainer's."""
    if key in OF_TRAINER_CHOICES:
        return _word(key, value, OF_TRAINER_CHOICES[key])
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    near = did_you_mean(key, OF_TRAINER_CHOICES) or did_you_mean(value, ("true", "false"))
    raise ArgumentTypeError(f"{key} must be a number, true or false, got {value!r}{near}")
