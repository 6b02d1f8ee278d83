"""The variant of KF-BFGS(L) whose convergence is proved: Algorithms 3 and 4 of Ren and Goldfarb."""

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import nn

from kfqn.curvature.input_factor import BatchInverse
from kfqn.curvature.output_factor import LBFGS
from kfqn.learning.quasi_newton import QuasiNewton
from kfqn.optimizer import Kronecker
from kfqn.parameters.fallback import Others, adamw
from kfqn.parameters.settings import checked_settings
from kfqn.parts import Parts
from kfqn.steps.average import NoAverage


@final
class ConvergentKFLBFGS(Kronecker):
    r"""KF-BFGS(L) as in the paper's Theorem 1: Algorithm 3, with the damping of Algorithm 4.

    It differs from `KFLBFGS` in three places. The gradient is the mini-batch's own, without
    momentum. H_A = (Â + λ_A I)⁻¹ is inverted from the current mini-batch at every step, which
    costs O(m|T|C² + C³) and waits for the device. Powell's damping has I in the place of H.
    With inputs of every layer bounded (AS.3) the eigenvalues of H_A ⊗ H_G then stay between two
    positive constants (Lemmas 1-4). It is meant for studying the theory; `KFLBFGS` is faster.

    Theorem 1 asks for the step sizes α_k = c k^(−b) with b in (0.5, 1), an ordinary schedule::

        optimizer = kfqn.ConvergentKFLBFGS(model, lr=c)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) ** -b)

    What is not named here is as for `KFBFGS`.

    Args:
        lr: the learning rate α_k.
        damping: λ; λ_A = λ_G = √λ.
        history_size: p, how many pairs (s, y) are kept; the oldest is dropped.
        beta: decay of the average of the pair (s_G, y_G). There is no momentum for a scheduler to cycle.
        mu1: μ₁ of Powell's damping.

    Raises:
        TypeError, ValueError: as `KFBFGS`.
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
        super().__init__(
            model,
            QuasiNewton(),
            Parts(input=BatchInverse(), output=LBFGS(identity=True), average=NoAverage()),
            settings,
            groups=groups,
            others=others,
            process_group=process_group,
            shard_factors=shard_factors,
            error_if_nonfinite=error_if_nonfinite,
        )
