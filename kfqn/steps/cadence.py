"""Which steps factors learn from: young ones from many, old ones from each ``curvature_interval``-th.

Without learning at every one of the first steps young factors meet bold steps, and settings that are good at
every step diverge. Between, weights move with H_A and H_G as they are, and there is one pass, unrecorded.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

_PART = 10  # the gap between steps that are learnt from is so manyth a part of those so far


def gap(k: int, interval: int) -> int:
    """How many steps after k, counted from 0, to the next that is learnt from; at most ``interval``.

    About a tenth of k: a whole number with one digit that counts, because k is to be a multiple of it.
    """
    share = max(1, k // _PART)
    digits: int = 10 ** (len(str(share)) - 1)
    return min(interval, share // digits * digits)


class Cadence(ABC):
    """When factors learn."""

    @abstractmethod
    def is_due(self, k: int, interval: int) -> bool:
        """Whether they learn from step k, counted from 0."""


@final
@dataclass(frozen=True)
class YoungOften(Cadence):
    """At gaps that grow with the steps: at every step with an ``interval`` of 1, as in the paper."""

    def is_due(self, k: int, interval: int) -> bool:
        return k % gap(k, interval) == 0


@final
@dataclass(frozen=True)
class Regular(Cadence):
    """At every ``interval``-th step, each third time one later (M3).

    Tasks or batches that take turns in a period of their own are all met then, and not one of them each time.
    """

    def is_due(self, k: int, interval: int) -> bool:
        return interval == 1 or k % (3 * interval + 1) in (0, interval, 2 * interval)
