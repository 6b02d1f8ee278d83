"""Learning rates over a run: a linear warm-up, then constant or along half a cosine."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kfqn.race.entrants.settings import Settings


def schedule_of(optimizer: Optimizer, settings: Settings, steps: int | None) -> LambdaLR | None:
    """The schedule that settings name for a run of so many steps (None: no end is known); None without.

    ``warmup`` is a share of the steps below 1, a number of them else; a cosine ends at the share ``floor``.
    """
    cosine, warmup = settings.get("schedule") == "cosine", settings.get("warmup", 0.0)
    if not (cosine or warmup):
        return None
    first = round(warmup * (steps or 0)) if warmup < 1 else round(warmup)
    return LambdaLR(optimizer, factor_of(first, steps if cosine else None, settings.get("floor", 0.0)))


def factor_of(warmup: int, steps: int | None, floor: float) -> Callable[[int], float]:
    """What a rate is times at step k = 0, …: up to 1 in ``warmup`` steps, down to ``floor`` at ``steps``."""

    def factor(k: int) -> float:
        if k < warmup:
            return (k + 1) / warmup
        if steps is None:
            return 1.0
        over = min(1.0, (k - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * over)) / 2

    return factor
