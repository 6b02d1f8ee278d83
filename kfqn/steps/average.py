"""What directions are taken of: an average D̂W of the mini-batches' gradients DW, or DW itself."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from kfqn.parameters.groups import Group, State
from kfqn.parameters.layers import Layer
from kfqn.parameters.settings import l2, momentum
from kfqn.parameters.shards import local


class GradientAverage(ABC):
    """D̂W of a layer. It may be asked for on a GPU from a record (`kfqn.runtime.cuda_graphs`)."""

    keeps: bool  # whether the layer's state has a ``DW``, (*g, I, C)
    bfloat16: bool = False  # whether that is in bfloat16, rounded at random

    @abstractmethod
    def of(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        """D̂W, (*g, I, C), with this mini-batch's gradients and L2; the state is not changed.

        Nobody knows yet whether the step is taken.
        """

    @abstractmethod
    def beta(self, group: Group) -> float | None:
        """β of D̂W ← β D̂W + (1 − β) DW, kept as ``DW`` in the state; None if no average is kept."""

    @abstractmethod
    def momentum(self, group: Group) -> float:
        """What share of the last step is taken again, after clipping; if any, ``DW`` keeps the steps."""


@final
@dataclass(frozen=True)
class Averaged(GradientAverage):
    """D̂W ← β D̂W + (1 − β) DW (line 7)."""

    keeps = True

    def of(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        # docs/decisions.md, 1
        DW = local(state["DW"])
        return layer.average_DW(DW, gradients, momentum(group), l2(group), group["bias_decay"])

    def beta(self, group: Group) -> float | None:
        return momentum(group)

    def momentum(self, group: Group) -> float:
        return 0.0


@final
@dataclass(frozen=True)
class Nesterov(GradientAverage):
    """The same, with the mini-batch's gradient averaged in once more: Nesterov's momentum, (M2)."""

    bfloat16: bool = False
    keeps = True

    def of(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        DW = local(state["DW"]).to(layer.dtype)
        return layer.average_DW(DW, gradients, momentum(group) ** 2, l2(group), group["bias_decay"])

    def beta(self, group: Group) -> float | None:
        return momentum(group)

    def momentum(self, group: Group) -> float:
        return 0.0


@final
@dataclass(frozen=True)
class NoAverage(GradientAverage):
    """The mini-batch's own gradient, as Algorithm 3 has it."""

    keeps = False

    def of(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        return layer.DW(gradients, l2(group), group["bias_decay"])

    def beta(self, group: Group) -> float | None:
        return None

    def momentum(self, group: Group) -> float:
        return 0.0


@final
@dataclass(frozen=True)
class HeavyBall(GradientAverage):
    """With ``momentum`` in the group steps accumulate, P ← momentum P + H DW H; without it as `Averaged`."""

    keeps = True

    def of(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        if group["momentum"]:
            return layer.DW(gradients, l2(group), group["bias_decay"])
        DW = local(state["DW"])
        return layer.average_DW(DW, gradients, group["beta"], l2(group), group["bias_decay"])

    def beta(self, group: Group) -> float | None:
        return None if group["momentum"] else float(group["beta"])

    def momentum(self, group: Group) -> float:
        return float(group["momentum"] or 0.0)
