"""KF-BFGS and KF-BFGS(L): Algorithm 2 of Ren and Goldfarb, and ours where no learning rate is given."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

from torch import nn

from kfqn.curvature.output_factor import LBFGS
from kfqn.learning.quasi_newton import QuasiNewton
from kfqn.optimizer import Kronecker
from kfqn.parameters.fallback import Others, adamw
from kfqn.parameters.settings import checked_settings, resolved
from kfqn.parts import Parts, checked_parts


@final
class KFBFGS(Kronecker):
    r"""Trains `Linear` and convolutional layers without a learning rate; with a number for it, KF-BFGS.

    By default momentum is whitened by H_A = (A + λ_A I)^(−½), with A (C × C) the second moment of a layer's
    inputs, and orthogonalised, and every layer moves by a share of the norm that it would be initialised
    with. There is one pass a step, and between steps the model holds an average of its weights
    (`docs/method.md`)::

        optimizer = kfqn.KFBFGS(model)
        for x, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()

    With a number for ``lr``, and W the matrix of a layer's weight and bias (shape ``(I, C)``), the step is
    W ← W − α H_G D̂W H_A. H_A (C × C) follows the inverse second moment of the layer's
    inputs by Hessian-action BFGS; H_G (I × I) follows the inverse Hessian in its
    pre-activations by doubly damped BFGS, from how they and their gradients change
    between two passes over one mini-batch: Algorithm 2 of Ren and Goldfarb,
    "Kronecker-factored Quasi-Newton Methods for Convolutional Neural Networks" (2021)::

        optimizer = kfqn.KFBFGS(model, lr=10.0, damping=30.0)
        for x, target in loader:
            loss = optimizer.step(kfqn.closure(model, x, target, F.cross_entropy))

    Args:
        model: the network, all of what the loss trains: a second pass, where there is one, leaves no trace
            in it, but would in parameters elsewhere. Its `Linear`, `Conv1d`, `Conv2d` and `Conv3d` layers,
            whose inputs have the batch first, get factors, as do subclasses that keep ``forward`` and
            Transformers' `Conv1D`; see ``others`` for what else it trains. Frozen parameters are ignored.
        lr: the learning rate α, or "auto", which is our own method. ``lr`` in the group is then a factor of
            the share that layers move (`kfqn.steps.relative`), from 1 to 0, for schedulers; a warning says
            where it looks like a learning rate. A number is the method of the paper, with
            ``curvature_interval=1`` and ``clip=None`` to the letter: best values grow with the damping and
            lie far above those of SGD, and too large a one ends in NaN.
        damping: λ; λ_A = λ_G = √λ is added to both factors. "auto" takes λ_A relative to each layer's A, and
            λ_G to the curvature that H_G meets (`kfqn.formulas.damping`), with ``damping`` in the group as a
            factor of both; with a number for ``lr`` it is 3. The paper's own for All-CNN-C is
            ``lr=30, damping=30``.
        beta: decay of the averages of the gradient and of the pair (s_G, y_G). With an automatic ``lr`` the
            step averages the mini-batch's gradient in once more, Nesterov's momentum. ``momentum`` in a
            group, which OneCycleLR and CyclicLR cycle unless told otherwise, takes its place for the
            gradient; that of ``others`` stays.
        mu1: μ₁ of Powell's damping.
        weight_decay: L2 regularisation: this times W is added to every gradient of a layer; of a bias it is
            this times ``bias_decay`` of its group, 1 unless groups give weights and biases different decays.
            With an automatic ``lr`` weights shrink instead by this times the share that layers move, at first
            0.06 of convolutions and 0.04 of others. "auto" is 0.03 then, else 0.
        decoupled_weight_decay: shrink W by lr × ``weight_decay`` before the step instead, as AdamW does, and
            as an automatic ``lr`` always does.
        clip: κ, with a number for ``lr`` an upper bound on α² Σ ⟨P, D̂W⟩ over the layers of a group, to
            which P is scaled down; None is the paper's method to the letter. With 1 even the largest learning
            rates of the paper's grid train (`docs/notebook/2026-11-24-stability-grid.md`).
        curvature_interval: learn curvature at every n-th step only, and take the others at the price of a
            first-order step; "auto" is 10 with a number for ``lr``, else 40. With a number factors learn
            more often at first: at each of the first 20 steps, then at gaps of about a tenth of the steps so
            far; 1 is the paper's method to the letter. With an automatic rate every third gap is one step
            longer (`kfqn.steps.cadence`).
        max_factor_size: keep only blocks on the diagonal of factors with more rows than this, the fewest and
            most alike that are no larger; neighbouring channels stay together. None keeps factors whole;
            "auto" does so with a number for ``lr``, else with those of up to 1024 rows, and cuts larger ones
            into blocks of at most 256. Of more than 32768 rows none is kept whole, unless a larger number is
            given. Directions that are orthogonalised are cut alike where they have more rows and columns than
            this, into blocks of at most half as many rows.
        groups: settings for some modules, each as for `add_param_group`. With an automatic rate
            ``"split": n`` says that the weights of these layers are n matrices in one, of as many outputs
            each, as of fused queries, keys and values, or of heads: each is orthogonalised and moves as a
            layer of its own, with the same H_A.
        others: makes a torch optimizer of the list of trainable parameters that belong to no such layer
            (normalisation, embeddings, …), which then trains them in parameter groups of their own;
            AdamW by default, with lr 3e-3 beside an automatic rate and 1e-3 else, and SparseAdam for sparse
            embeddings. `plan` shows what goes where, and a warning says if it is most of them.
        parts: parts of the method that are not to be those that ``lr`` and ``damping`` choose, from
            `kfqn.parts`; for example ``kfqn.Parts(direction=Plain())`` (`docs/parts.md`).
        process_group: the processes that train the model together; found by itself with
            `DistributedDataParallel` (`docs/distributed.md`).
        shard_factors: let each of these processes hold and update its share of the factors only.
        error_if_nonfinite: raise FloatingPointError for a loss or gradient that is not finite;
            otherwise the step is refused and counted.

    Settings are read from ``param_groups`` at every step. The loss must be a mean over the batch.

    Raises:
        TypeError: for parameters, or anything else, instead of a model, and for parts that are none.
        ValueError: for an argument out of range, a group that is none, a model without any such layer or that
            is sharded but not by `fully_shard` (`docs/distributed.md`), a layer that is too wide for whole
            factors, and a sharded one with a setting that asks for second passes.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Literal["auto"] = "auto",
        damping: float | Literal["auto"] = "auto",
        *,
        beta: float = 0.9,
        mu1: float = 0.2,
        weight_decay: float | Literal["auto"] = "auto",
        decoupled_weight_decay: bool = False,
        clip: float | None = None,
        curvature_interval: int | Literal["auto"] = "auto",
        max_factor_size: int | Literal["auto"] | None = "auto",
        groups: Sequence[Mapping[str, Any]] = (),
        others: Others = adamw,
        parts: Parts = Parts(),  # noqa: B008 - frozen
        process_group: Any = None,
        shard_factors: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        settings = {
            "lr": lr,
            "damping": damping,
            "beta": beta,
            "mu1": mu1,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "clip": clip,
            "curvature_interval": curvature_interval,
            "max_factor_size": max_factor_size,
            "split": 1,
        }
        super().__init__(
            model,
            QuasiNewton(),
            checked_parts(parts),
            checked_settings(**resolved(settings, {})),
            groups=groups,
            others=others,
            process_group=process_group,
            shard_factors=shard_factors,
            error_if_nonfinite=error_if_nonfinite,
        )


@final
class KFLBFGS(Kronecker):
    r"""KF-BFGS(L): `KFBFGS` with H_G kept as its last ``history_size`` pairs, from H₀ = I.

    H_A is dense, as in `KFBFGS`. Algorithm 2 of Ren and Goldfarb (2021) with L-BFGS in
    line 18. All arguments but one, and what is raised, as for `KFBFGS`.

    Args:
        history_size: p, how many pairs (s, y) are kept; the oldest is dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Literal["auto"] = "auto",
        damping: float | Literal["auto"] = "auto",
        *,
        history_size: int = 100,
        beta: float = 0.9,
        mu1: float = 0.2,
        weight_decay: float | Literal["auto"] = "auto",
        decoupled_weight_decay: bool = False,
        clip: float | None = None,
        curvature_interval: int | Literal["auto"] = "auto",
        max_factor_size: int | Literal["auto"] | None = "auto",
        groups: Sequence[Mapping[str, Any]] = (),
        others: Others = adamw,
        parts: Parts = Parts(),  # noqa: B008 - frozen
        process_group: Any = None,
        shard_factors: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        settings = {
            "lr": lr,
            "damping": damping,
            "history_size": history_size,
            "beta": beta,
            "mu1": mu1,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "clip": clip,
            "curvature_interval": curvature_interval,
            "max_factor_size": max_factor_size,
            "split": 1,
        }
        super().__init__(
            model,
            QuasiNewton(),
            replace(checked_parts(parts), output=parts.output or LBFGS()),
            checked_settings(**resolved(settings, {})),
            groups=groups,
            others=others,
            process_group=process_group,
            shard_factors=shard_factors,
            error_if_nonfinite=error_if_nonfinite,
        )
