"""Optimizers raced on real images: problems, entrants, runs, reports, the paper's figures and tables."""

from kfqn.race.problems.own import Supervised

__all__ = ["Supervised"]
