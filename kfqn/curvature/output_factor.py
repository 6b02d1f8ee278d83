"""H_G, the factor on the side of a layer's outputs: H_G V, and how it learns from damped pairs (s_G, y_G)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfqn.curvature.damping import Shapes
from kfqn.formulas.blocks import Blocks
from kfqn.formulas.rows import Rows
from kfqn.formulas.secant import bfgs_update_, lbfgs_matmul, lbfgs_push_
from kfqn.parameters.groups import Group, State
from kfqn.parameters.layers import Layer
from kfqn.parameters.settings import largest_block


class OutputFactor(ABC):
    """H_G of a layer, (*g, I, I), whose tensors are in the layer's state; it sees no optimizer."""

    learns: bool  # whether pairs are wanted at all

    @abstractmethod
    def shapes(self, layer: Layer, group: Group) -> Shapes:
        """The shapes of what the state holds of H_G."""

    @abstractmethod
    def start_(self, state: State) -> None:
        """Turn what the state holds, zeros so far, into H_G = I, in place."""

    @abstractmethod
    def left(self, state: State, V: Tensor) -> Tensor:
        """H_G V, (*g, I, c), for ``V`` (*g, I, c)."""

    @abstractmethod
    def damps_with(self, state: State, y: Tensor) -> Tensor:
        """What Powell's damping takes for H y, (*g, I): H_G y (Algorithm 1), or y itself (Algorithm 4)."""

    @abstractmethod
    def blocks(self, x: Tensor, state: State) -> Tensor:
        """A vector (*g, I) as H_G's blocks see it, (*g, b, I/b), if it has any."""

    @abstractmethod
    def learn_(self, states: list[State], rows: Rows, s: Tensor, y: Tensor) -> Tensor:
        """Update every H_G with the rows of damped pairs, in place; say of each, (rows, 1), if it was."""


@final
@dataclass(frozen=True)
class BFGS(OutputFactor):
    """H_G as a matrix, or the b blocks on its diagonal where `largest_block` cuts it."""

    learns = True

    def shapes(self, layer: Layer, group: Group) -> Shapes:
        rows, largest = layer.rows, largest_block(group, layer.rows)
        if largest is None:
            return {"H_G": (*layer.groups, rows, rows)}
        blocks = Blocks.of_at_most(largest, rows)
        return {"H_G": (*layer.groups, blocks.count, blocks.size, blocks.size)}

    def start_(self, state: State) -> None:
        state["H_G"].diagonal(dim1=-2, dim2=-1).fill_(1)

    def left(self, state: State, V: Tensor) -> Tensor:
        H_G = state["H_G"]
        if H_G.ndim == V.ndim:
            return H_G @ V
        blocks = Blocks(V.shape[-2], H_G.shape[-1])
        return blocks.join(H_G @ blocks.split(V, -2), -2)

    def damps_with(self, state: State, y: Tensor) -> Tensor:
        return self.left(state, y[..., None])[..., 0]

    def blocks(self, x: Tensor, state: State) -> Tensor:
        H_G = state["H_G"]
        return x if H_G.ndim == x.ndim + 1 else Blocks(x.shape[-1], H_G.shape[-1]).split(x, -1)

    def learn_(self, states: list[State], rows: Rows, s: Tensor, y: Tensor) -> Tensor:
        return bfgs_update_([state["H_G"] for state in states], s, y)


@final
@dataclass(frozen=True)
class LBFGS(OutputFactor):
    """H_G as its last ``history_size`` pairs, from H₀ = I; with ``identity`` damped as in Algorithm 4."""

    identity: bool = False
    learns = True

    def shapes(self, layer: Layer, group: Group) -> Shapes:
        return dict.fromkeys(("S", "Y"), (*layer.groups, group["history_size"], layer.rows))

    def start_(self, state: State) -> None:
        """An empty history already stands for I."""

    def left(self, state: State, V: Tensor) -> Tensor:
        return lbfgs_matmul(state["S"], state["Y"], V)

    def damps_with(self, state: State, y: Tensor) -> Tensor:
        return y if self.identity else self.left(state, y[..., None])[..., 0]

    def blocks(self, x: Tensor, state: State) -> Tensor:
        return x  # a history is small however long its vectors

    def learn_(self, states: list[State], rows: Rows, s: Tensor, y: Tensor) -> Tensor:
        pairs = zip(states, rows.part(s), rows.part(y), strict=True)
        used = [lbfgs_push_(state["S"], state["Y"], *pair) for state, *pair in pairs]
        return torch.cat([of_layer.view(-1, 1) for of_layer in used])


@final
@dataclass(frozen=True)
class NoOutputFactor(OutputFactor):
    """H_G = I: there is no second pass (``lr="auto"`` in `KFBFGS`)."""

    learns = False

    def shapes(self, layer: Layer, group: Group) -> Shapes:
        return {}

    def start_(self, state: State) -> None:
        """There is nothing to start."""

    def left(self, state: State, V: Tensor) -> Tensor:
        return V

    def damps_with(self, state: State, y: Tensor) -> Tensor:
        return y

    def blocks(self, x: Tensor, state: State) -> Tensor:
        return x

    def learn_(self, states: list[State], rows: Rows, s: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(sum(rows.counts), 1, dtype=torch.bool, device=s.device)
