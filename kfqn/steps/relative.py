"""``lr="auto"``: every layer moves by a share of a usual initialisation's norm, less later (M4), (M5).

Nothing is found, and no loss is asked for: directions are orthogonalised, so that neither the scale of the
loss nor that of the gradient says how far to go. What is left is the noise of batches, which a share that
falls with the steps keeps in bounds; where a scheduler lowers ``lr`` itself, the share stays as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from kfqn.parameters.groups import Group, note
from kfqn.parameters.layers import Layer
from kfqn.steps.rule import Members, Proposal, StepRule

SHARE = 0.06  # of √(I/3), the norm of a usual initialisation with I outputs, that a convolution moves by,
POINTWISE = 2 / 3  # and of that share what a layer moves by whose filters have one offset, as `Linear`
HELD = 100  # steps before the share begins to fall
POWER = 1 / 3  # with which power of the steps it falls


@final
@dataclass(frozen=True)
class RelativeSteps(StepRule):
    """‖ΔW‖ = ``share`` · √(I/3) · ``lr`` · min(1, (``held``/k)^⅓), whatever ‖P‖.

    Two thirds of it where filters have one offset (`POINTWISE`).

    ``lr`` of a group is a factor, 1 unless a scheduler changes it. From the first step at which it is lower
    than at the one before, the schedule is in charge, and the last factor (held/k)^⅓ stays: ``fall`` in the
    group's progress, with ``steps``, ``last_lr`` and whether a schedule is ``scheduled``.
    """

    share: float = SHARE
    held: float = HELD

    def begin(self, members: Members) -> None:
        for group, _ in members:
            progress, lr = group["progress"], float(group["lr"])
            k, scheduled = progress["steps"] + 1, progress["scheduled"] or lr < progress["last_lr"]
            fall = progress["fall"] if scheduled else min(1.0, (self.held / k) ** POWER)
            note(group, steps=k, fall=fall, last_lr=lr, scheduled=scheduled)

    def rate(self, group: Group, layer: Layer) -> float:
        share = self.share * (POINTWISE if layer.inputs.offsets == 1 else 1.0)
        return share * float(group["lr"]) * float(group["progress"]["fall"])

    def scale(self, group: Group) -> float:
        return float(group["progress"]["fall"])

    def shares(self, members: Members, proposals: Mapping[Layer, Proposal]) -> dict[Layer, float]:
        return {
            layer: math.sqrt(layer.outputs / 3) / own.norm if own.norm > 0 else 0.0
            for _, layers in members
            for layer in layers
            if (own := proposals.get(layer)) is not None
        }

    def kept(self) -> dict[str, Any]:
        return {"steps": 0, "fall": 1.0, "last_lr": 0.0, "scheduled": False}

    def report(self, members: Members) -> dict[str, float]:
        return {
            "rate": self.rate(members[0].group, members[0].layers[0]),
            "rejected": 0.0,
        }  # no step is taken back
