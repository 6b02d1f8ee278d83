"""All that decides a run, and the name of its folder."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from kfqn.race.entrants.settings import format_value


@dataclass(frozen=True)
class Config:
    """All that decides the outcome of a run, and the device and threads that decide its seconds.

    A run ends after ``epochs``, or at the end of the epoch in which its CPU seconds of training
    reach ``budget``, whichever is first; None is no limit. Loss and error are read on the
    first ``evaluated`` training and test images. Each of ``processes`` takes its share of every batch.
    ``code`` tells versions of a problem or an optimizer of the current folder apart; empty without.
    """

    problem: str
    entrant: str
    settings: dict[str, Any]
    seed: int
    epochs: int | None
    budget: float | None
    evaluated: int
    width: int
    batch_size: int
    weight_decay: float
    train_size: int | None
    device: str
    threads: int
    processes: int = 1
    code: str = ""

    @property
    def identity(self) -> str:
        """The name of the run's folder: readable, and different for different configurations."""
        values = [f"{key}{format_value(value)}" for key, value in self.settings.items()]
        every = asdict(self)
        for key, usual in (("processes", 1), ("code", "")):  # as it was named before there could be others
            if every[key] == usual:
                del every[key]
        digest = hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()[:8]
        name = "-".join([self.entrant.replace(":", "-"), *values, f"seed{self.seed}"])
        return f"{name}-{digest}"
