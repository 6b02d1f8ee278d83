"""Which steps factors learn from (M17): young ones from many, old ones from each ``curvature_interval``-th.

Without learning at every one of the first steps young factors meet bold steps, and settings that are good at
every step diverge. Between, weights move with H_A and H_G as they are, and there is one pass, unrecorded.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

_PART = 10  # the gap between steps that are learnt from is so manyth a part of those so far
_PAIRS = 10  # the least gap between steps that H_G learns from, where others are judged


def gap(k: int, interval: int) -> int:
    """How many steps after k, counted from 0, to the next that is learnt from; at most ``interval``.

    About a tenth of k: a whole number with one digit that counts, because k is to be a multiple of it.
    """
    share = max(1, k // _PART)
    digits: int = 10 ** (len(str(share)) - 1)
    return min(interval, share // digits * digits)


def pair_gap(k: int, interval: int) -> int:
    """The same for steps from which H_G learns too, where the first ones are judged for their length."""
    return min(interval, max(_PAIRS, gap(k, interval)))


class Cadence(ABC):
    """Whether step k, counted from 0, is learnt from; ``trial`` says that it is judged whatever k."""

    @abstractmethod
    def inputs(self, k: int, interval: int, trial: bool) -> bool:
        """Whether H_A learns from it."""

    @abstractmethod
    def pairs(self, k: int, interval: int, trial: bool) -> bool:
        """Whether H_G learns from it."""

    @abstractmethod
    def after_reset(self, pairs: bool) -> int:
        """k of the step that starts factors anew, and shows pairs of them or not."""


@final
@dataclass(frozen=True)
class BothTogether(Cadence):
    """Both factors learn at once: at every step with an ``interval`` of 1, as in the paper."""

    def inputs(self, k: int, interval: int, trial: bool) -> bool:
        return trial or k % gap(k, interval) == 0

    def pairs(self, k: int, interval: int, trial: bool) -> bool:
        return trial or k % gap(k, interval) == 0

    def after_reset(self, pairs: bool) -> int:
        return 0


def is_met(k: int, gap: int) -> bool:
    """Whether step k is one of those that are ``gap`` steps apart, each third time one more.

    Tasks or batches that take turns in a period of their own are all met then, and not one of them each time.
    """
    third = 3 * gap + 1
    return gap == 1 or k % third in (0, gap, 2 * gap)


@final
@dataclass(frozen=True)
class InputsOftener(Cadence):
    """H_A learns oftener than H_G at first: what it asks for is the first pass, which is there anyway."""

    def inputs(self, k: int, interval: int, trial: bool) -> bool:
        return trial or is_met(k, gap(k, interval)) or is_met(k, pair_gap(k, interval))

    def pairs(self, k: int, interval: int, trial: bool) -> bool:
        return is_met(k, pair_gap(k, interval))

    def after_reset(self, pairs: bool) -> int:
        return 0 if pairs else -1  # then the next step is the first
