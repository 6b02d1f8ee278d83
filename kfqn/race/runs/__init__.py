"""One training at a time: its configuration, its files, the trainer, and the processes that do many."""

from kfqn.race.runs.config import Config
from kfqn.race.runs.run import Record, Run

__all__ = ["Config", "Record", "Run"]
