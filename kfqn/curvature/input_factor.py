"""H_A, the factor on the side of a layer's inputs: D̂W H_A, and how it learns from A.

Line numbers are of Algorithm 2 unless another is named.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfqn.curvature.damping import Shapes
from kfqn.formulas.inputs import Inputs
from kfqn.formulas.rows import Rows
from kfqn.formulas.secant import bfgs_update_, matvec
from kfqn.formulas.statistics import damped_inverse, damped_root, second_moment, second_moment_matvec
from kfqn.formulas.symmetric import packed, packed_shape, unpacked
from kfqn.parameters.groups import State
from kfqn.parameters.layers import Layer

REMEMBERED = 0.8  # of A is left at each mini-batch that is learnt from
ENOUGH = 10  # times as many a_t as A has rows, of which a mini-batch's A is taken,
SPARSEST = 8  # and of every eighth datum at least
WRITTEN = 2**20  # entries of the a_t that are written out at a time


class InputFactor(ABC):
    """H_A of a layer, (*g, C, C), whose tensors are in the layer's state; it sees no optimizer.

    Once per step that learns, A is asked: ``query`` gives an s of the mean input ā, ``respond`` what A makes
    of it, and ``learn_`` takes both in.
    """

    reads: bool  # whether `learn_` reads numbers back to the host

    @abstractmethod
    def shapes(self, inputs: Inputs) -> Shapes:
        """The shapes of what the state holds of H_A."""

    @abstractmethod
    def first(self, inputs: Inputs, a: Tensor) -> Tensor:
        """A of this input (*g, C, C), a mean over data and a sum over locations, to start from."""

    @abstractmethod
    def start(self, layer: Layer, A: Tensor, lambda_A: float | Tensor) -> State:
        """What the state holds at first, given A (*g, C, C) and λ_A, a number or (*g, 1) (line 2)."""

    @abstractmethod
    def right(self, inputs: Inputs, DW: Tensor, state: State) -> Tensor:
        """D̂W H_A, (*g, I, C)."""

    @abstractmethod
    def query(self, mean_a: Tensor, state: State) -> Tensor:
        """s_A (*g, C), given ā (*g, C): what A is asked with."""

    @abstractmethod
    def respond(self, inputs: Inputs, a: Tensor, s: Tensor) -> Tensor:
        """What A of this input says to s_A: A s_A (*g, C), or whatever else `learn_` takes."""

    @abstractmethod
    def response_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """The shape of `respond`."""

    @abstractmethod
    def learn_(
        self, states: list[State], s: list[Tensor], responses: list[Tensor], lambda_A: float | Tensor
    ) -> tuple[Rows, Tensor]:
        """Take in what was asked and said, in place, for several layers; ``lambda_A``: a number or (rows, 1).

        Returns rows, some for each layer, and which of these were used, (rows, 1).
        """


@final
@dataclass(frozen=True)
class HessianActionBFGS(InputFactor):
    """BFGS with s_A = H_A ā and y_A = A s_A + λ_A s_A, eq. (12); A is formed at the start alone."""

    reads = False

    def shapes(self, inputs: Inputs) -> Shapes:
        return {"H_A": (*inputs.groups, inputs.columns, inputs.columns)}

    def first(self, inputs: Inputs, a: Tensor) -> Tensor:
        return second_moment(inputs, a)

    def start(self, layer: Layer, A: Tensor, lambda_A: float | Tensor) -> State:
        return {"H_A": inverse_factor(layer, A, lambda_A, "H_A")}

    def right(self, inputs: Inputs, DW: Tensor, state: State) -> Tensor:
        return inputs.times(DW, state["H_A"])

    def query(self, mean_a: Tensor, state: State) -> Tensor:
        return matvec(state["H_A"], mean_a)  # line 13

    def respond(self, inputs: Inputs, a: Tensor, s: Tensor) -> Tensor:
        return second_moment_matvec(inputs, a, s)

    def response_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return (*inputs.groups, inputs.columns)

    def learn_(
        self, states: list[State], s: list[Tensor], responses: list[Tensor], lambda_A: float | Tensor
    ) -> tuple[Rows, Tensor]:
        rows = Rows.of(s)
        s_A, As = rows.join(s), rows.join(responses)
        y_A = As + lambda_A * s_A
        return rows, bfgs_update_([state["H_A"] for state in states], s_A, y_A)  # line 14


@final
@dataclass(frozen=True)
class BatchInverse(InputFactor):
    """H_A = (Â + λ_A I)⁻¹ of the current mini-batch (Algorithm 3, line 11); one that fails keeps the last.

    Costs O(m|T|C² + C³) at every step that learns, and waits for the device.
    """

    reads = True

    def shapes(self, inputs: Inputs) -> Shapes:
        return {"H_A": (*inputs.groups, inputs.columns, inputs.columns)}

    def first(self, inputs: Inputs, a: Tensor) -> Tensor:
        return second_moment(inputs, a)

    def start(self, layer: Layer, A: Tensor, lambda_A: float | Tensor) -> State:
        return {"H_A": inverse_factor(layer, A, lambda_A, "H_A")}

    def right(self, inputs: Inputs, DW: Tensor, state: State) -> Tensor:
        return inputs.times(DW, state["H_A"])

    def query(self, mean_a: Tensor, state: State) -> Tensor:
        return mean_a  # nothing is asked with it: A itself is wanted

    def respond(self, inputs: Inputs, a: Tensor, s: Tensor) -> Tensor:
        return second_moment(inputs, a)

    def response_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return (*inputs.groups, inputs.columns, inputs.columns)

    def learn_(
        self, states: list[State], s: list[Tensor], responses: list[Tensor], lambda_A: float | Tensor
    ) -> tuple[Rows, Tensor]:
        used = [
            self._inverted_(state, A, own)
            for state, A, own in each_with_damping(states, responses, s, lambda_A)
        ]
        rows = Rows([(1,)] * len(states))
        return rows, torch.tensor(used, device=s[0].device)[:, None]

    def _inverted_(self, state: State, A: Tensor, lambda_A: float | Tensor) -> bool:
        try:
            state["H_A"].copy_(damped_inverse(A, lambda_A))
        except ValueError:  # inputs too large for a second moment
            return False
        return True


@final
@dataclass(frozen=True)
class AveragedRoot(InputFactor):
    """H_A = (A + λ_A I)^(−½), of A averaged over the mini-batches that are learnt from (M1).

    A mini-batch's own A, the first one's too, is taken of every n-th datum, n at most `SPARSEST`, so that
    there are still `ENOUGH` times as many a_t as A has rows. One that is not finite is left out.
    ``triangles`` says that of A and of H_A, which are symmetric, half the entries are kept; the norm that
    diagnostics tell is of these.
    """

    triangles: bool = False
    reads = True

    def shapes(self, inputs: Inputs) -> Shapes:
        C = inputs.columns
        return dict.fromkeys(("A", "H_A"), (*inputs.groups, *(packed_shape(C) if self.triangles else (C, C))))

    def _kept(self, H: Tensor) -> Tensor:
        return packed(H) if self.triangles else H

    def _whole(self, kept: Tensor, C: int) -> Tensor:
        return unpacked(kept, C) if self.triangles else kept

    def first(self, inputs: Inputs, a: Tensor) -> Tensor:
        vectors = len(a) * math.prod(inputs.locations(a))
        every = max(1, min(SPARSEST, vectors // (ENOUGH * inputs.columns)))
        return second_moment(inputs, a[::every], WRITTEN)

    def start(self, layer: Layer, A: Tensor, lambda_A: float | Tensor) -> State:
        return {"A": self._kept(A.clone()), "H_A": self._kept(root_factor(layer, A, lambda_A))}

    def right(self, inputs: Inputs, DW: Tensor, state: State) -> Tensor:
        return inputs.times(DW, self._whole(state["H_A"], inputs.columns))

    def query(self, mean_a: Tensor, state: State) -> Tensor:
        return mean_a  # nothing is asked with it: A itself is wanted

    def respond(self, inputs: Inputs, a: Tensor, s: Tensor) -> Tensor:
        return self.first(inputs, a)

    def response_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return (*inputs.groups, inputs.columns, inputs.columns)

    def learn_(
        self, states: list[State], s: list[Tensor], responses: list[Tensor], lambda_A: float | Tensor
    ) -> tuple[Rows, Tensor]:
        used = []
        for state, A, own in each_with_damping(states, responses, s, lambda_A):
            used.append(bool(A.isfinite().all()))
            if used[-1]:
                state["A"].lerp_(self._kept(A), 1 - REMEMBERED)
                root = damped_root(self._whole(state["A"], A.shape[-1]), own)
                state["H_A"].copy_(self._kept(root))
        rows = Rows([(1,)] * len(states))
        return rows, torch.tensor(used, device=s[0].device)[:, None]


@final
@dataclass(frozen=True)
class NoInputFactor(InputFactor):
    """H_A = I."""

    reads = False

    def shapes(self, inputs: Inputs) -> Shapes:
        return {}

    def first(self, inputs: Inputs, a: Tensor) -> Tensor:
        return second_moment(inputs, a)

    def start(self, layer: Layer, A: Tensor, lambda_A: float | Tensor) -> State:
        return {}

    def right(self, inputs: Inputs, DW: Tensor, state: State) -> Tensor:
        return DW

    def query(self, mean_a: Tensor, state: State) -> Tensor:
        return mean_a

    def respond(self, inputs: Inputs, a: Tensor, s: Tensor) -> Tensor:
        return s

    def response_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return (*inputs.groups, inputs.columns)

    def learn_(
        self, states: list[State], s: list[Tensor], responses: list[Tensor], lambda_A: float | Tensor
    ) -> tuple[Rows, Tensor]:
        rows = Rows.of(s)
        return rows, torch.zeros(sum(rows.counts), 1, dtype=torch.bool, device=s[0].device)


def inverse_factor(layer: Layer, A: Tensor, damping: float | Tensor, name: str) -> Tensor:
    """(A + damping I)⁻¹; ValueError, naming the layer, if A is not finite."""
    try:
        return damped_inverse(A, damping)
    except ValueError as error:
        raise ValueError(
            f"{layer} has no {name}, because {error}: look for NaN, infinite or huge values in what comes "
            "into it."
        ) from None


def root_factor(layer: Layer, A: Tensor, lambda_A: float | Tensor) -> Tensor:
    """(A + λ_A I)^(−½); ValueError, naming the layer, if A is not finite."""
    if not A.isfinite().all():
        raise ValueError(
            f"{layer} has no H_A, because the second moment of its inputs is not finite: look for NaN, "
            "infinite or huge values in what comes into it."
        )
    return damped_root(A, lambda_A)


def each_with_damping(
    states: list[State], As: list[Tensor], s: list[Tensor], lambda_A: float | Tensor
) -> list[tuple[State, Tensor, float | Tensor]]:
    """Every layer with its A and its own λ_A, (*g, 1) where that is not one number for all."""
    if not isinstance(lambda_A, Tensor):
        return [(state, A, lambda_A) for state, A in zip(states, As, strict=True)]
    own = Rows([(*x.shape[:-1], 1) for x in s]).part(lambda_A)
    return [*zip(states, As, own, strict=True)]
