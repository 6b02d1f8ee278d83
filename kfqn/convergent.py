"""The variant of KF-BFGS(L) whose convergence is proved: Algorithms 3 and 4 of Ren and Goldfarb."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from kfqn.curvature import damped_inverse, second_moment
from kfqn.groups import Group, State
from kfqn.layers import Layer
from kfqn.others import Others, adamw
from kfqn.pairs import pushed
from kfqn.rows import Rows
from kfqn.secant import dot, double_damping, lbfgs_matmul
from kfqn.settings import checked_settings
from kfqn.two_pass import TwoPassOptimizer


@final
class ConvergentKFLBFGS(TwoPassOptimizer):
    r"""KF-BFGS(L) as in the paper's Theorem 1: Algorithm 3, with the damping of Algorithm 4.

    It differs from `KFLBFGS` in three places. The gradient is the mini-batch's own, without
    momentum. H_A = (Â + λ_A I)⁻¹ is inverted from the current mini-batch at every step, which
    costs O(m|T|C² + C³) and waits for the device. Powell's damping has I in the place of H.
    With inputs of every layer bounded (AS.3) the eigenvalues of H_A ⊗ H_G then stay between two
    positive constants (Lemmas 1-4). It is meant for studying the theory; `KFLBFGS` is faster.

    Theorem 1 asks for the step sizes α_k = c k^(−b) with b in (0.5, 1), an ordinary schedule::

        optimizer = kfqn.ConvergentKFLBFGS(model, lr=c)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) ** -b)

    Args:
        model, weight_decay, and all from decoupled_weight_decay on: as for `KFBFGS`.
        lr: the learning rate α_k.
        damping: λ; λ_A = λ_G = √λ.
        history_size: p, how many pairs (s, y) are kept; the oldest is dropped.
        beta: decay of the average of the pair (s_G, y_G). There is no momentum for a scheduler to cycle.
        mu1: μ₁ of Powell's damping.

    Raises:
        TypeError, ValueError: as `KFBFGS`.
    """

    _reads = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3.0,
        damping: float = 30.0,
        *,
        history_size: int = 100,
        beta: float = 0.9,
        mu1: float = 0.2,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        clip: float | None = None,
        curvature_interval: int = 1,
        groups: Sequence[Mapping[str, Any]] = (),
        others: Others = adamw,
        process_group: Any = None,
        shard_factors: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        settings = checked_settings(
            lr=lr,
            damping=damping,
            history_size=history_size,
            beta=beta,
            mu1=mu1,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            clip=clip,
            curvature_interval=curvature_interval,
        )
        super().__init__(model, settings, others, groups, process_group, shard_factors, error_if_nonfinite)

    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        g, rows, columns, p = layer.groups, layer.rows, layer.columns, group["history_size"]
        shapes = {"H_A": (*g, columns, columns), "s_G": (*g, rows), "y_G": (*g, rows)}
        return shapes | {"S": (*g, p, rows), "Y": (*g, p, rows)}

    def _start_G(self, state: State) -> None:
        """An empty history already stands for I (line 1)."""

    def _average(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        return layer.DW(gradients, self._decay(group), group["bias_decay"])  # without momentum

    def _beta(self, group: Group) -> float | None:
        return None

    def _direction(self, DW: Tensor, layer: Layer, state: State, group: Group) -> Tensor:  # line 6
        return lbfgs_matmul(state["S"], state["Y"], DW @ state["H_A"])

    def _probe(self, mean_a: Tensor, state: State) -> Tensor:
        return mean_a  # nothing is asked with it: A itself is wanted

    def _answer(self, layer: Layer, a: Tensor, s: Tensor) -> Tensor:
        return second_moment(layer.inputs, a)

    def _answer_shape(self, layer: Layer) -> tuple[int, ...]:
        return (*layer.groups, layer.columns, layer.columns)

    def _learn_A(self, s: list[Tensor], answers: list[Tensor], states: list[State], group: Group) -> None:
        for A, state in zip(answers, states, strict=True):
            try:
                state["H_A"].copy_(damped_inverse(A, math.sqrt(group["damping"])))  # line 11
            except ValueError:  # inputs too large for a second moment; the last H_A stays
                self._count(state, {"A skipped": 1})
            else:
                self._count(state, {"A taken": 1})

    def _learn_G(self, s: list[Tensor], y: list[Tensor], states: list[State], group: Group) -> None:
        rows, mu2 = Rows.of(s), math.sqrt(group["damping"])
        s_G, y_G = rows.join(s), rows.join(y)
        ratio = dot(s_G, y_G) / dot(y_G, y_G)
        damped = double_damping(s_G, y_G, y_G, mu1=group["mu1"], mu2=mu2)  # line 14, Algorithm 4: H = I
        self._note_G(states, rows, ratio, ratio < group["mu1"], pushed(states, rows, *damped))  # line 15
