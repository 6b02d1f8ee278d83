"""Whether the ``lr`` of a group with an automatic rate is a factor of it, or looks like a rate itself."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

_WATCHED = 20  # steps after which a factor is told from a learning rate
_FACTOR = 0.1  # a factor reaches this at some time
_RISING = 1e-3  # and this even early in a long warm-up


class Factors(NamedTuple):
    """What was seen of an automatic group's ``lr``: in how many steps, the largest, and how long ago."""

    steps: int = 0
    largest: float = 0.0
    since: int = 0


def with_factor(seen: Factors, lr: float) -> Factors:
    """With the ``lr`` of one more step."""
    since = 1 if lr > seen.largest else seen.since + 1
    return Factors(seen.steps + 1, max(seen.largest, lr), since)


def looks_absolute(seen: Factors, group: Mapping[str, Any]) -> bool:
    """Whether an automatic group's ``lr`` looks like a learning rate, and not like a factor from 1 to 0.

    A schedule of factors is at 0.1 or more at some time: at first if it decays, and later if it warms up,
    where it keeps rising until then and is at 0.001 or more after 20 steps; or it says so itself, by
    ``initial_lr`` or ``max_lr`` in the group. A group at rest, with 0, is none.
    """
    told = (float(group.get(key, 0.0)) for key in ("initial_lr", "max_lr"))
    if seen.steps < _WATCHED or not 0 < max(seen.largest, *told) < _FACTOR or not seen.largest:
        return False
    return seen.since >= _WATCHED or seen.largest < _RISING


@final
class FactorCheck:
    """What was seen of the factors of new groups; of a run that is resumed nobody knows what was before."""

    def __init__(self) -> None:
        self._seen: dict[int, Factors] = {}  # by the place of the group

    def check(self, groups: Mapping[int, Mapping[str, Any]], warn: Callable[[str, str], None]) -> None:
        """Take in the factors of one more step, and warn once of one that looks like a learning rate."""
        for place, group in groups.items():
            if not group.get("automatic") or (place not in self._seen and group["progress"]["k"] > 0):
                continue
            seen = self._seen[place] = with_factor(self._seen.get(place, Factors()), float(group["lr"]))
            if looks_absolute(seen, group):
                warn(
                    f"lr in a group was at most {seen.largest:g} in {seen.steps} steps, which looks like a "
                    "learning rate, but with lr='auto' it is a factor of the share that layers move, 1 being "
                    "all of it: leave it at 1, let a schedule go from 1 to 0, or give a number for lr.",
                    "lr",
                )
