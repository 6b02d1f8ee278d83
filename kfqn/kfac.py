"""KFAC, the second-order rival: Algorithm 5 of Ren and Goldfarb, and the options of KFC-pre."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from kfqn.learning.fisher import Fisher
from kfqn.optimizer import Kronecker
from kfqn.parameters.fallback import Others, adamw
from kfqn.parameters.settings import checked_settings
from kfqn.parts import Parts
from kfqn.steps.average import HeavyBall


@final
class KFAC(Kronecker):
    r"""KFAC: Kronecker-factored natural gradient, as the paper raced it (Algorithm 5).

    For every layer the step is W ← W − α H_Γ D̂W H_Ω. Ω (C × C) averages the second moment of the
    layer's inputs, Γ (I × I) that of its pre-activation gradients Dh for targets drawn from the
    model's own predictions, in an extra pass after the step. Every ``inverse_interval`` steps
    H_Ω = (Ω + √λ I)⁻¹ and H_Γ = (Γ + √λ I)⁻¹; the step then waits for the device.

    Drawing targets needs to know the loss, so `step` and `warm_start` take closures of
    `kfqn.closure` and no others::

        optimizer = kfqn.KFAC(model, lr=1.0, damping=1.0)
        optimizer.warm_start(kfqn.closure(model, x, y, F.cross_entropy) for x, y in loader)  # optional
        for x, y in loader:
            loss = optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))

    Args:
        model, weight_decay, decoupled_weight_decay: as for `KFBFGS`.
        groups, others, process_group, shard_factors, error_if_nonfinite: as for `KFBFGS`.
        lr: the learning rate α.
        damping: λ; √λ is added to either factor.
        beta: decay of the averages of the gradient, of Ω and of Γ.
        inverse_interval: T, steps from one inversion to the next.
        pi: split the damping between the factors, π√λ to Ω and √λ/π to Γ, with
            π² = (tr Ω / C) / (tr Γ / I), as KFC-pre (Grosse and Martens 2016) does.
        clip: κ of KFC-pre's trust region: all P are scaled by min(1, √(κ / (α² Σ ⟨P, D̂W⟩))),
            which keeps the quadratic model of the change in predictions at κ or below; with
            ``momentum`` that of a single step's share, before it is accumulated.
        momentum: decay of an accumulated direction, P ← momentum P + H_Γ DW H_Ω; the gradient is
            then not averaged by itself, as in KFC-pre, and ``DW`` in the state holds P. OneCycleLR and
            CyclicLR cycle it, also from 0, unless told otherwise.
        averaging: decay of an average of the weights, which `averaged` puts in their place.
        seed: of the sampled targets; by default that of `torch.manual_seed`.

    The loss must be the mean negative log-likelihood of the predictive distribution. Settings
    are read from ``param_groups`` at every step; what is under ``progress`` there says how often targets
    were drawn, so a resumed run draws what it would have drawn.

    Raises:
        TypeError, ValueError: as `KFBFGS`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 1.0,
        *,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        inverse_interval: int = 20,
        pi: bool = False,
        clip: float | None = None,
        momentum: float = 0.0,
        averaging: float = 0.0,
        seed: int | None = None,
        decoupled_weight_decay: bool = False,
        groups: Sequence[Mapping[str, Any]] = (),
        others: Others = adamw,
        process_group: Any = None,
        shard_factors: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        settings = checked_settings(
            lr=lr,
            damping=damping,
            beta=beta,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            inverse_interval=inverse_interval,
            pi=pi,
            clip=clip,
            momentum=momentum,
            averaging=averaging,
        )
        settings |= {"seed": torch.initial_seed() if seed is None else seed}
        super().__init__(
            model,
            Fisher(),
            Parts(average=HeavyBall()),
            settings,
            groups=groups,
            others=others,
            process_group=process_group,
            shard_factors=shard_factors,
            error_if_nonfinite=error_if_nonfinite,
        )
