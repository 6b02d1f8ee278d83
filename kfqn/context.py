"""What has to be known of a step from its first pass to the end of its second."""

from dataclasses import dataclass, field
from typing import final

from kfqn.curvature.pairs import First
from kfqn.parameters.layers import Layer
from kfqn.passes.replay import Rewind


def nothing() -> None:
    """Without a closure that is put back where a pass through the model starts."""


@final
@dataclass
class StepContext:
    """What has to be known from the first pass of a step to the end of its second.

    One object that is changed in place: Lightning hands out optimizers that share its attributes, but
    not what is assigned to them later.
    """

    rewind: Rewind = nothing  # to where the closure started
    rewinds: list[Rewind] = field(default_factory=list)  # to where each pass through the model started
    since: int = 0  # the first micro-batch that the closure runs, and so will run again
    stepped: bool = False  # whether there was a step since the last second pass
    used_once: set[Layer] = field(default_factory=set)  # in the last pass that was learnt from
    with_gradients: bool = False  # whether second passes can do with no less than the first
    broken: set[Layer] = field(default_factory=set)  # what has to start anew, but could not in the last step
    firsts: dict[Layer, First] = field(default_factory=dict)  # what waits for a second pass

    def forget_starts(self) -> None:
        """Let go of copies of buffers."""
        self.rewind = nothing
        self.rewinds.clear()

    def begin(self) -> None:
        """A step begins: nothing is known of its closure."""
        self.rewind, self.since = nothing, 0
