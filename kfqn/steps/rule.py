"""What a step rule is asked, and told: numbers in, numbers out. What it keeps lies in ``group["progress"]``.

One rule serves all groups that have it, and is given them as `Members`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from torch import Tensor

from kfqn.parameters.groups import Group
from kfqn.parameters.layers import Layer
from kfqn.steps.average import GradientAverage

NO_SECOND_PASS = (
    "step() was called again without a second pass over the batch of the last step, so nothing is learnt "
    "about curvature: {advice}."
)
RUN_SECOND_PASS = (
    "after each step for which optimizer.second_pass_due is true write 'with optimizer.second_pass(loss) as "
    "again: again.loss = loss_fn(model(x), y); again.loss.backward()', or give step a closure"
)


class Member(NamedTuple):
    """A group, its layers, and what their directions are taken of."""

    group: Group
    layers: Sequence[Layer]
    average: GradientAverage


Members = Sequence[Member]


class Proposal(NamedTuple):
    """A layer's step before it is taken: P, ⟨P, D̂W⟩, ‖P‖, ‖W‖, and whether they can be those of a positive H.

    ``size`` is ‖W‖, or a tenth of the norm of a usual initialisation where that is more.
    """

    P: Tensor
    slope: float
    norm: float
    norm_W: float
    size: float
    is_valid: bool


@final
@dataclass
class Plan:
    """A step that a rule has decided on, handed back to it when the losses before and after are known.

    ``shares`` say how much of α P every layer takes. With ``judged`` both losses are wanted; the second one
    is asked for ``at`` so much of the way, 1 being the end of the step. ``promise`` is the rule's own.
    """

    shares: dict[Layer, float] = field(default_factory=dict)
    judged: bool = False
    at: float = 1.0
    promise: tuple[float, ...] = ()


class Trial(NamedTuple):
    """What the losses of one batch before and after a step have shown, means over processes.

    Slopes are ⟨∇f, ΔW⟩: ``slope`` of the rule's layers, ``regularised`` the same with L2, ``slope_of_all``
    that of everything that moved. ``resolution`` is the smallest difference of losses that counts;
    ``coarse`` says that weights are too coarse for a part of a step. ``norms_W`` has ‖W‖ before it;
    ``radial`` what `kfqn.steps.norms.radial_products` has measured.
    """

    before: float
    after: float
    slope: float
    regularised: float
    slope_of_all: float
    resolution: float
    coarse: bool
    norms_W: Mapping[Layer, float]
    radial: Sequence[float]


class StepRule(ABC):
    """How far layers move along P, and whether a step stays.

    In the order in which a step asks: `went_wrong`, `observe`, `plan`, `rate`, `decay_rate`, `taken`, and
    `judge` once both losses are known.
    """

    @abstractmethod
    def rate(self, members: Members, group: Group) -> float:
        """α of a group."""

    @abstractmethod
    def decay_rate(self, members: Members, group: Group, plan: Plan) -> float:
        """What decoupled weight decay is a multiple of."""

    @abstractmethod
    def forces_trial(self, members: Members) -> bool:
        """Whether the next step is to be judged, and learnt from, whatever the cadence."""

    @abstractmethod
    def wants_second_pass(self, members: Members) -> bool:
        """Whether second passes are of use: to judge steps, or for H_G to learn."""

    @abstractmethod
    def went_wrong(self, members: Members, valid: bool, loss: float | None) -> bool:
        """Whether a batch, of this loss if told, shows that the last step is to be taken back.

        ``valid`` says that loss and gradients are finite. If it is True, the last step has been undone as far
        as the rule knows.
        """

    @abstractmethod
    def observe(self, members: Members, loss: float) -> None:
        """Take in the loss of a batch, before its step is taken."""

    @abstractmethod
    def plan(self, members: Members, proposals: Mapping[Layer, Proposal], on_offer: bool) -> Plan:
        """How much of every layer's step is taken; ``on_offer`` says that a second pass follows."""

    @abstractmethod
    def taken(self, members: Members, plan: Plan, norms_W: Mapping[Layer, float]) -> None:
        """The step has been taken; ``norms_W`` has ‖W‖ before it, of the layers that moved."""

    @abstractmethod
    def judge(self, members: Members, plan: Plan, trial: Trial) -> float:
        """What share of the step stays: 1, or less where it is rejected."""

    @abstractmethod
    def missed(self, members: Members) -> str:
        """Nobody ran a second pass that was due: what to say of it, or nothing."""

    @abstractmethod
    def complaint(self, members: Members) -> str:
        """Why the rule goes on without what it needs, a sentence that is said once; or nothing."""

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

    def rate(self, members: Members, group: Group) -> float:
        return float(group["lr"])

    def decay_rate(self, members: Members, group: Group, plan: Plan) -> float:
        return float(group["lr"])

    def forces_trial(self, members: Members) -> bool:
        return False

    def wants_second_pass(self, members: Members) -> bool:
        return True

    def went_wrong(self, members: Members, valid: bool, loss: float | None) -> bool:
        return False

    def observe(self, members: Members, loss: float) -> None:
        """Nothing depends on losses."""

    def plan(self, members: Members, proposals: Mapping[Layer, Proposal], on_offer: bool) -> Plan:
        shares: dict[Layer, float] = {}
        for group, layers, _ in members:
            slopes = {layer: proposals[layer].slope for layer in layers if layer in proposals}
            change, clip = self.rate(members, group) ** 2 * sum(slopes.values()), group["clip"]
            clipped = clip is not None and change > clip
            shares |= dict.fromkeys(slopes, math.sqrt(clip / change) if clipped else 1.0)
        return Plan(shares)

    def taken(self, members: Members, plan: Plan, norms_W: Mapping[Layer, float]) -> None:
        """Nothing follows from it."""

    def judge(self, members: Members, plan: Plan, trial: Trial) -> float:
        return 1.0

    def missed(self, members: Members) -> str:
        return NO_SECOND_PASS.format(advice=RUN_SECOND_PASS)

    def complaint(self, members: Members) -> str:
        return ""

    def kept(self) -> dict[str, Any]:
        return {}

    def report(self, members: Members) -> dict[str, float]:
        return {}
