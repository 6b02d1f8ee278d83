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
from kfqn.parameters.groups import Group, note
from kfqn.parameters.layers import Layer
from kfqn.race.problems.data import digits
from kfqn.steps.rule import Members, Proposal, StepRule


@final
@dataclass(frozen=True)
class ShareOfTheNorm(StepRule):
    """Every layer moves by share × ‖W‖ / √k, times ``lr`` of its group."""

    share: float = 0.1

    def begin(self, members: Members) -> None:
        for group, _ in members:
            note(group, steps=group["progress"]["steps"] + 1)

    def rate(self, group: Group, layer: Layer) -> float:
        return self.share * float(group["lr"]) / math.sqrt(max(1, group["progress"]["steps"]))

    def scale(self, group: Group) -> float:
        return 1.0  # the rate of parameters without factors stays as it is

    def shares(self, members: Members, proposals: Mapping[Layer, Proposal]) -> dict[Layer, float]:
        return {layer: own.norm_W / own.norm if own.norm else 0.0 for layer, own in proposals.items()}

    def kept(self) -> dict[str, Any]:
        return {"steps": 0}

    def report(self, members: Members) -> dict[str, float]:
        return {"rate": self.rate(members[0].group, members[0].layers[0])}


def main(epochs: int = 3) -> float:
    """Train, and return the last mini-batch's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    optimizer = kfqn.KFBFGS(model, parts=kfqn.Parts(steps=ShareOfTheNorm()))
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for epoch in range(epochs):
        for x, y in digits().training_batches(128, generator):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss of the last mini-batch {float(loss.detach()):.3f}")
    return float(loss.detach())


if __name__ == "__main__":
    main()
