"""What is added to both factors: one √λ for all layers, as in the paper, or a share of each layer's size."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfqn.formulas.damping import damping_A, damping_G, in_units_of
from kfqn.formulas.inputs import Inputs
from kfqn.formulas.rows import Rows
from kfqn.parameters.groups import Group, State
from kfqn.parameters.layers import Layer

Shapes = dict[str, tuple[int, ...]]


class Damping(ABC):
    """λ_A and λ_G of a layer, given the setting λ of its group."""

    @abstractmethod
    def shapes(self, layer: Layer, inputs: Inputs) -> Shapes:
        """The shapes of what the layer's state holds for it."""

    @abstractmethod
    def start(self, layer: Layer, A: Tensor, vectors: Tensor) -> State:
        """What the state holds at first, given A (*g, C, C) and how many a_t, (), a mini-batch has."""

    @abstractmethod
    def lambda_A(self, group: Group, state: State) -> float | Tensor:
        """λ_A of one layer: a number, or (*g, 1)."""

    @abstractmethod
    def lambda_A_rows(self, group: Group, states: Sequence[State]) -> float | Tensor:
        """λ_A of several layers: a number, or (rows, 1)."""

    @abstractmethod
    def units_of_G(
        self, group: Group, s: list[Tensor], y: list[Tensor], states: list[State]
    ) -> tuple[list[Tensor], float]:
        """y_G, (*g, I) of every layer, in the units that H_G is kept in, and λ_G in them."""


@final
@dataclass(frozen=True)
class AbsoluteDamping(Damping):
    """λ_A = λ_G = √λ (section 3.3)."""

    def shapes(self, layer: Layer, inputs: Inputs) -> Shapes:
        return {}

    def start(self, layer: Layer, A: Tensor, vectors: Tensor) -> State:
        return {}

    def lambda_A(self, group: Group, state: State) -> float | Tensor:
        return math.sqrt(group["damping"])

    def lambda_A_rows(self, group: Group, states: Sequence[State]) -> float | Tensor:
        return math.sqrt(group["damping"])

    def units_of_G(
        self, group: Group, s: list[Tensor], y: list[Tensor], states: list[State]
    ) -> tuple[list[Tensor], float]:
        return y, math.sqrt(group["damping"])


@final
@dataclass(frozen=True)
class RelativeDamping(Damping):
    """``damping`` times what `kfqn.formulas.damping` finds for each layer, ``lambda_A`` and ``lambda_G``."""

    def shapes(self, layer: Layer, inputs: Inputs) -> Shapes:
        return {"lambda_A": inputs.groups, "lambda_G": layer.groups}

    def start(self, layer: Layer, A: Tensor, vectors: Tensor) -> State:
        return {"lambda_A": damping_A(A, vectors / layer.columns)}

    def lambda_A(self, group: Group, state: State) -> float | Tensor:
        scaled: Tensor = group["damping"] * state["lambda_A"][..., None]
        return scaled

    def lambda_A_rows(self, group: Group, states: Sequence[State]) -> float | Tensor:
        known = [state["lambda_A"][..., None] for state in states]
        joined: Tensor = group["damping"] * Rows.of(known).join(known)
        return joined

    def units_of_G(
        self, group: Group, s: list[Tensor], y: list[Tensor], states: list[State]
    ) -> tuple[list[Tensor], float]:
        rows, kept = Rows.of(y), [state["lambda_G"][..., None] for state in states]
        of_layers = Rows.of(kept)
        steps = [state["step"].expand_as(x) for state, x in zip(states, kept, strict=True)]
        y_G = rows.join(y)
        lambda_G = damping_G(of_layers.join(kept), rows.join(s), y_G, of_layers.join(steps))
        torch._foreach_copy_(kept, of_layers.part(lambda_G))
        return rows.part(in_units_of(lambda_G, y_G)), group["damping"]
