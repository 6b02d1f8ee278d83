"""How the weights that the model holds follow those that steps are taken with (M6)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from kfqn.parameters.groups import Group


class WeightAverage(ABC):
    """An average x of the weights z over steps, x ← x + c (z − x)."""

    averages: bool  # whether x is anything but z

    @abstractmethod
    def share(self, group: Group, k: int) -> float:
        """c of the k-th step, k = 1, 2, …, from 0 to 1."""


@final
@dataclass(frozen=True)
class Latest(WeightAverage):
    """The weights as they are: x = z."""

    averages = False

    def share(self, group: Group, k: int) -> float:
        return 1.0


@final
@dataclass(frozen=True)
class PolynomialAverage(WeightAverage):
    """c = (p + 1)/(k + p), of about the last 1/(p + 1) of the steps; nearer to z where ``lr`` is lower (M6).

    Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization" (2013), section 4. No length
    of training has to be known. A schedule that ends at 0 ends with x = z.
    """

    power: float = 15.0
    averages = True

    def share(self, group: Group, k: int) -> float:
        lr = min(1.0, max(float(group["lr"]), 0.0))
        share = (self.power + 1) / (k + self.power)
        return share / lr if share < lr else 1.0
