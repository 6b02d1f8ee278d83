"""The variant of KF-BFGS(L) whose convergence is proved: Algorithms 3 and 4 of Ren and Goldfarb."""

import math
from typing import final

from torch import Tensor, nn

from kfqn.curvature import second_moment
from kfqn.layers import Layer
from kfqn.optimizer import Group, Others, State, adamw, inverse_factor
from kfqn.secant import double_damping, lbfgs_matmul, lbfgs_push_
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
        model, weight_decay, others: as for `KFBFGS`.
        lr: the learning rate α_k.
        damping: λ; λ_A = λ_G = √λ.
        history_size: p, how many pairs (s, y) are kept; the oldest is dropped.
        beta: decay of the average of the pair (s_G, y_G).
        mu1: μ₁ of Powell's damping.

    Raises:
        ValueError: as `KFBFGS`.
    """

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
        others: Others = adamw,
    ) -> None:
        settings = checked_settings(lr=lr, damping=damping, beta=beta, mu1=mu1, weight_decay=weight_decay)
        super().__init__(model, settings | checked_settings(history_size=history_size), others)

    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        rows, columns, p = layer.rows, layer.columns, group["history_size"]
        return {"H_A": (columns, columns), "s_G": (rows,), "y_G": (rows,), "S": (p, rows), "Y": (p, rows)}

    def _start_G(self, state: State) -> None:
        """An empty history already stands for I (line 1)."""

    def _direction(self, DW: Tensor, state: State, group: Group) -> Tensor:  # line 6
        return lbfgs_matmul(state["S"], state["Y"], DW @ state["H_A"])

    def _learn_A(self, layer: Layer, a: Tensor, state: State, group: Group) -> None:  # line 11
        lambda_A = math.sqrt(group["damping"])
        state["H_A"].copy_(inverse_factor(layer, second_moment(layer, a), lambda_A, "H_A"))

    def _learn_G(self, dh: Tensor, dDh: Tensor, state: State, group: Group) -> None:
        lambda_G, beta = math.sqrt(group["damping"]), group["beta"]
        s = state["s_G"].lerp_(dh, 1 - beta)  # line 13
        y = state["y_G"].lerp_(dDh, 1 - beta)
        damped = double_damping(s, y, y, mu1=group["mu1"], mu2=lambda_G)  # line 14, Algorithm 4: H = I
        lbfgs_push_(state["S"], state["Y"], *damped)  # line 15
