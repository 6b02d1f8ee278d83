"""How long steps are. A step rule is numbers in, numbers out; what it keeps lies in ``group["progress"]``.

One rule serves all groups that have it, and is given them as `Members`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from torch import Tensor

from kfqn.parameters.groups import Group
from kfqn.parameters.layers import Layer

NO_SECOND_PASS = (
    "step() was called again without a second pass over the batch of the last step, so nothing is learnt "
    "about curvature: after each step for which optimizer.second_pass_due is true write 'with "
    "optimizer.second_pass() as again: again.loss = loss_fn(model(x), y); again.loss.backward()', or give "
    "step a closure."
)


class Member(NamedTuple):
    """A group and its layers."""

    group: Group
    layers: Sequence[Layer]


Members = Sequence[Member]


class Proposal(NamedTuple):
    """A layer's step before it is taken: P, ⟨P, D̂W⟩, ‖P‖, ‖W‖, and whether a positive H can have made it."""

    P: Tensor
    slope: float
    norm: float
    norm_W: float
    is_valid: bool


class StepRule(ABC):
    """How far layers move along P."""

    @abstractmethod
    def begin(self, members: Members) -> None:
        """A step is about to be taken: bring what is kept up to it."""

    @abstractmethod
    def rate(self, group: Group, layer: Layer) -> float:
        """α of a layer of this group, which decoupled weight decay is a multiple of."""

    @abstractmethod
    def scale(self, group: Group) -> float:
        """What the learning rate of parameters without factors is multiplied by."""

    @abstractmethod
    def shares(self, members: Members, proposals: Mapping[Layer, Proposal]) -> dict[Layer, float]:
        """How much of α P every layer takes."""

    @abstractmethod
    def kept(self) -> dict[str, Any]:
        """What the rule keeps in each group's ``progress``, as it is before the first step."""

    @abstractmethod
    def report(self, members: Members) -> dict[str, float]:
        """Numbers for `diagnostics`."""


@final
@dataclass(frozen=True)
class FixedRate(StepRule):
    """α is the group's ``lr``; with ``clip`` P is scaled so that α² Σ ⟨P, D̂W⟩ is at most that."""

    def begin(self, members: Members) -> None:
        """Nothing is kept."""

    def rate(self, group: Group, layer: Layer) -> float:
        return float(group["lr"])

    def scale(self, group: Group) -> float:
        return 1.0

    def shares(self, members: Members, proposals: Mapping[Layer, Proposal]) -> dict[Layer, float]:
        shares: dict[Layer, float] = {}
        for group, layers in members:
            slopes = {layer: proposals[layer].slope for layer in layers if layer in proposals}
            change, clip = float(group["lr"]) ** 2 * sum(slopes.values()), group["clip"]
            clipped = clip is not None and change > clip
            shares |= dict.fromkeys(slopes, math.sqrt(clip / change) if clipped else 1.0)
        return shares

    def kept(self) -> dict[str, Any]:
        return {}

    def report(self, members: Members) -> dict[str, float]:
        return {}
