"""Who races: the optimizers, their settings, the grids that a sweep tries and the best points it found."""

from kfqn.race.entrants.registry import (
    DEFAULT_FIELD,
    ENTRANTS,
    PAPER_FIELD,
    SWEPT,
    Entrant,
    entrant_of,
    with_schedule,
)
from kfqn.race.entrants.settings import Settings
from kfqn.race.entrants.tuned import best_settings, default_field, swept_field

__all__ = [
    "DEFAULT_FIELD",
    "ENTRANTS",
    "PAPER_FIELD",
    "SWEPT",
    "Entrant",
    "Settings",
    "best_settings",
    "default_field",
    "entrant_of",
    "swept_field",
    "with_schedule",
]
