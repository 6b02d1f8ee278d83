"""A step rule of one's own as a part of KF-BFGS, on the digits: docs/parts.md.

python examples/own_step_rule.py
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import nn

import kfqn
from kfqn.parameters.groups import Group
from kfqn.parameters.layers import Layer
from kfqn.race.problems.data import digits
from kfqn.steps.rule import Members, Plan, Proposal, StepRule, Trial


@final
@dataclass(frozen=True)
class RelativeSteps(StepRule):
    """Every layer moves by share × ‖W‖ / √k, times ``lr`` of its group."""

    share: float = 0.2

    def rate(self, members: Members, group: Group) -> float:
        return float(group["lr"])

    def decay_rate(self, members: Members, group: Group, plan: Plan) -> float:
        return float(group["lr"])

    def plan(self, members: Members, proposals: Mapping[Layer, Proposal], on_offer: bool) -> Plan:
        k = members[0].group["progress"]["k"] + 1
        lengths = {layer: own.size / own.norm for layer, own in proposals.items() if own.norm > 0}
        return Plan({layer: self.share / math.sqrt(k) * lengths.get(layer, 0.0) for layer in proposals})

    def judge(self, members: Members, plan: Plan, trial: Trial) -> float:
        return 1.0  # every step stays

    def forces_trial(self, members: Members) -> bool:
        return False

    def wants_second_pass(self, members: Members) -> bool:
        return True

    def went_wrong(self, members: Members, valid: bool, loss: float | None) -> bool:
        return False

    def observe(self, members: Members, loss: float) -> None:
        pass

    def taken(self, members: Members, plan: Plan, norms_W: Mapping[Layer, float]) -> None:
        pass

    def missed(self, members: Members) -> str:
        return "nobody ran the second pass, so H_G learns nothing"

    def complaint(self, members: Members) -> str:
        return ""

    def kept(self) -> dict[str, Any]:
        return {}

    def report(self, members: Members) -> dict[str, float]:
        return {}


def main(epochs: int = 3) -> float:
    """Train, and return the last mini-batch's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    optimizer = kfqn.KFBFGS(model, lr=1.0, damping=3.0, parts=kfqn.Parts(steps=RelativeSteps()))
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for epoch in range(epochs):
        for x, y in digits().training_batches(128, generator):
            loss = optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))
        print(f"epoch {epoch + 1}: loss of the last mini-batch {float(loss.detach()):.3f}")
    return float(loss.detach())


if __name__ == "__main__":
    main()
