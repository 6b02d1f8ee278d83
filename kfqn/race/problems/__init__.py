"""What is learned: data sets, networks, and which of them with how many epochs make a problem."""

from kfqn.race.problems.own import Supervised, is_own, problem_of
from kfqn.race.problems.registry import DEFAULT_DATA, DEVELOPMENT, PROBLEMS, Problem

__all__ = ["DEFAULT_DATA", "DEVELOPMENT", "PROBLEMS", "Problem", "Supervised", "is_own", "problem_of"]
