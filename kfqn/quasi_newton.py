"""KF-BFGS and KF-BFGS(L): Algorithm 2 of Ren and Goldfarb."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from kfqn.curvature import second_moment_matvec
from kfqn.damping import damping_A, damping_G, in_units_of
from kfqn.factors import Moments
from kfqn.groups import Group, State
from kfqn.inputs import Blocks
from kfqn.layers import Layer
from kfqn.orthogonal import orthogonalised
from kfqn.others import Others, adamw
from kfqn.pairs import pushed
from kfqn.rows import Rows
from kfqn.secant import bfgs_update_, dot, double_damping, lbfgs_matmul, matvec
from kfqn.self_tuning import SelfTuningOptimizer
from kfqn.settings import checked_settings, momentum, resolved


class KFQN(SelfTuningOptimizer):
    """Algorithm 2, open only in how H_G is kept.

    A layer's state: ``DW`` (I, C) the averaged gradient, ``H_A`` (C, C), ``s_G`` and ``y_G`` (I,) the
    averaged pair, with ``damping="auto"`` the numbers ``lambda_A`` and ``lambda_G``, and what the subclass
    keeps of H_G. Of a factor larger than ``max_factor_size`` the b blocks on its diagonal are kept, (b, …).
    """

    @staticmethod
    def _settings(**settings: Any) -> Group:
        """Arguments as the defaults of a group; ValueError for one that is out of range."""
        of_the_search = {"search": None, "trust": None, "usual": (), "along": (), "norms": ()}
        return checked_settings(**resolved(settings, {})) | of_the_search

    @abstractmethod
    def _shapes_G(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        """The shapes of what the state holds of H_G."""

    @abstractmethod
    def _H_G(self, state: State, V: Tensor) -> Tensor:
        """H_G V, (I, C), for ``V`` (I, C)."""

    @abstractmethod
    def _blocks_G(self, x: Tensor, state: State) -> Tensor:
        """A vector (*g, I) as H_G's blocks see it, (*g, b, I), if it has any."""

    @abstractmethod
    def _update_G(self, states: list[State], rows: Rows, s: Tensor, y: Tensor) -> Tensor:
        """Update every H_G with the rows of damped pairs (line 18); say of each, (rows, 1), if it was."""

    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        g, rows, inputs = layer.groups, layer.rows, layer.inputs.in_blocks(group["max_factor_size"])
        H_A = (*inputs.groups, inputs.columns, inputs.columns)
        shapes = {"DW": (*g, rows, layer.columns), "H_A": H_A}
        if group["relative"]:
            shapes |= {"lambda_A": inputs.groups, "lambda_G": g}
        return shapes | {"s_G": (*g, rows), "y_G": (*g, rows)} | self._shapes_G(layer, group)

    def _lambda_A(self, moments: Moments, group: Group) -> float | Tensor:
        if not group["relative"]:
            return super()._lambda_A(moments, group)
        scaled: Tensor = group["damping"] * moments["lambda_A"][..., None]
        return scaled

    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:
        if not group["relative"]:
            return super()._start(layer, moments, group)
        for_each = moments["vectors"] * self._ranks.size / layer.columns  # of the mini-batch of all processes
        lambda_A = damping_A(moments["A"], for_each)
        return super()._start(layer, moments | {"lambda_A": lambda_A}, group) | {"lambda_A": lambda_A}

    def _average(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        beta = momentum(group)
        if group["automatic"]:
            beta = beta**2  # averaged in twice, Nesterov's momentum: docs/decisions.md, 34
        # line 7; docs/decisions.md, 1
        return layer.average_DW(state["DW"], gradients, beta, self._decay(group), group["bias_decay"])

    def _direction(self, DW: Tensor, layer: Layer, state: State, group: Group) -> Tensor:
        inputs = self._inputs(layer)
        return self._H_G(state, inputs.times(DW, state["H_A"]))  # line 8

    def _finish(self, directions: list[Tensor], groups: Sequence[Group]) -> None:
        alike: dict[int | None, list[int]] = {}
        for i, group in enumerate(groups):
            if group["automatic"]:
                alike.setdefault(group["max_factor_size"], []).append(i)
        for largest, members in alike.items():
            found = orthogonalised([directions[i] for i in members], largest)  # docs/decisions.md, 39
            for i, P in zip(members, found, strict=True):
                directions[i] = P

    def _probe(self, mean_a: Tensor, state: State) -> Tensor:
        return matvec(state["H_A"], mean_a)  # line 13, eq. (12)

    def _answer(self, layer: Layer, a: Tensor, s: Tensor) -> Tensor:
        return second_moment_matvec(self._inputs(layer), a, s)

    def _answer_shape(self, layer: Layer) -> tuple[int, ...]:
        inputs = self._inputs(layer)
        return (*inputs.groups, inputs.columns)

    def _learn_A(self, s: list[Tensor], answers: list[Tensor], states: list[State], group: Group) -> None:
        rows = Rows.of(s)
        s_A, As = rows.join(s), rows.join(answers)
        lambda_A: float | Tensor = math.sqrt(group["damping"])
        if group["relative"]:
            known = [state["lambda_A"][..., None] for state in states]
            lambda_A = group["damping"] * Rows.of(known).join(known)
        y_A = As + lambda_A * s_A
        used = bfgs_update_([state["H_A"] for state in states], s_A, y_A)  # line 14
        self._count_rows(states, rows, {"A taken": used, "A skipped": ~used})

    def _learn_G(self, s: list[Tensor], y: list[Tensor], states: list[State], group: Group) -> None:
        mu2 = math.sqrt(group["damping"])  # λ_G = √λ
        if group["relative"]:
            y, mu2 = _in_own_units(s, y, states), group["damping"]
        Hy = [self._H_G(state, y_G[..., None])[..., 0] for state, y_G in zip(states, y, strict=True)]
        s, y, Hy = ([*map(self._blocks_G, x, states)] for x in (s, y, Hy))
        rows = Rows.of(s)
        s_G, y_G, Hy_G = map(rows.join, (s, y, Hy))
        ratio = dot(s_G, y_G) / dot(y_G, Hy_G)
        if group["automatic"]:  # a pair without curvature says nothing: docs/decisions.md, 35
            s_G, y_G, Hy_G = (torch.where(ratio > 0, x, 0.0) for x in (s_G, y_G, Hy_G))
        damped = double_damping(s_G, y_G, Hy_G, mu1=group["mu1"], mu2=mu2)  # line 17
        used = self._update_G(states, rows, *damped)  # line 18
        self._note_G(states, rows, ratio, used & (ratio < group["mu1"]), used)


def _in_own_units(s: list[Tensor], y: list[Tensor], states: list[State]) -> list[Tensor]:
    """y/λ_G of every layer, after its λ_G has taken in the pair."""
    rows, kept = Rows.of(y), [state["lambda_G"][..., None] for state in states]
    of_layers = Rows.of(kept)
    steps = [state["step"].expand_as(x) for state, x in zip(states, kept, strict=True)]
    y_G = rows.join(y)
    lambda_G = damping_G(of_layers.join(kept), rows.join(s), y_G, of_layers.join(steps))
    torch._foreach_copy_(kept, of_layers.part(lambda_G))
    return rows.part(in_units_of(lambda_G, y_G))


@final
class KFBFGS(KFQN):
    r"""KF-BFGS: Kronecker-factored BFGS for networks of `Linear` and convolutional layers.

    For every layer, with W the matrix of its weight and bias (shape ``(I, C)``), the step is
    W ← W − α H_G D̂W H_A. H_A (C × C) follows the inverse second moment of the layer's
    inputs by Hessian-action BFGS; H_G (I × I) follows the inverse Hessian in its
    pre-activations by doubly damped BFGS, from how they and their gradients change
    between two passes over one mini-batch: Algorithm 2 of Ren and Goldfarb,
    "Kronecker-factored Quasi-Newton Methods for Convolutional Neural Networks" (2021).

    Example::

        optimizer = kfqn.KFBFGS(model)
        optimizer.warm_start(x for x, _ in loader)  # optional
        for x, target in loader:
            loss = optimizer.step(kfqn.closure(model, x, target, F.cross_entropy))

    Args:
        model: the network, all of what the loss trains: the second pass leaves no trace in it, but would
            in parameters elsewhere. Its `Linear`, `Conv1d`, `Conv2d` and `Conv3d` layers, whose
            inputs have the batch first, get factors, as do subclasses that keep ``forward`` and Transformers'
            `Conv1D`; see ``others`` for what else it trains. Frozen parameters are ignored.
        lr: the learning rate α, or "auto": found from the losses of both passes at each step that has two
            (`kfqn.step_size`), with all layers moving by one share of their size, at most 1.2 over their
            number, along directions that are orthogonalised (`kfqn.orthogonal`), and a step that was bad is
            taken back; steps are halved where the loss of batches comes no lower for long, and layers before
            a normalisation keep their norms (`kfqn.scale_free`).
            ``lr`` in the group is then a factor of it, for schedulers, 1 being all; a warning says where it
            looks like a learning rate. What is found is ``diagnostics()[""]["rate"]``. A number is the method
            of the paper, with ``curvature_interval=1`` and ``clip=None`` to the letter: best values grow with
            the damping and lie far above those of SGD, and too large a one ends in NaN.
        damping: λ; λ_A = λ_G = √λ is added to both factors. "auto" takes λ_A and λ_G relative to each
            layer's A and to the curvature that it meets (`kfqn.damping`), with ``damping`` in the group as a
            factor of both; with a number for ``lr`` it is 3. The paper's own for All-CNN-C is
            ``lr=30, damping=30``.
        beta: decay of the averages of the gradient and of the pair (s_G, y_G). With an automatic ``lr`` the
            step averages the mini-batch's gradient in once more, Nesterov's momentum, and the first averages,
            which start from zero, are brought to whole weight. ``momentum`` in a group, which OneCycleLR and
            CyclicLR cycle unless told otherwise, takes its place for the gradient; that of ``others`` stays.
        mu1: μ₁ of Powell's damping.
        weight_decay: L2 regularisation: this times W is added to every gradient of a layer; of a bias it is
            this times ``bias_decay`` of its group, 1 unless groups give weights and biases different decays.
        decoupled_weight_decay: shrink W by lr × ``weight_decay`` before the step instead, as AdamW does;
            of an automatic rate by the share of their size that layers move × ``weight_decay``, and layers
            whose norm is kept not at all.
        clip: κ, with a number for ``lr`` an upper bound on α² Σ ⟨P, D̂W⟩ over the layers of a group, to
            which P is scaled down; None is the paper's method to the letter. With 1 even the largest learning
            rates of the paper's grid train (`docs/results.md`).
        curvature_interval: learn curvature at every so manyth step only, and take the others at the price of
            a first-order step. Young factors learn more often: at each of the first 20 steps, then at
            gaps of about a tenth of the steps so far. With an automatic ``lr`` H_G is taught by every
            ``curvature_interval``-th step only (at first by every tenth, if that is more), the other young
            ones teach H_A and are judged, which costs a forward pass. 1 is the paper's method to the
            letter; 10 costs little more than one pass a step (`benchmarks/README.md`).
        max_factor_size: keep only blocks on the diagonal of factors with more rows than this, the fewest and
            most alike that are no larger; neighbouring channels stay together. None keeps factors whole;
            "auto" does so with a number for ``lr``, else it is 256. Of more than 32768 rows none is kept
            whole, unless a larger number is given.
        groups: settings for some modules, each as for `add_param_group`.
        others: makes a torch optimizer of the list of trainable parameters that belong to no such layer
            (normalisation, embeddings, …), which then trains them in parameter groups of their own;
            AdamW by default, with lr 3e-3 beside an automatic rate and 1e-3 else, and SparseAdam for sparse
            embeddings. `plan` shows what goes where,
            and a warning says if it is most of them.
        process_group: the processes that train the model together; found by itself with
            `DistributedDataParallel` (`docs/distributed.md`).
        shard_factors: let each of these processes hold and update its share of the factors only.
        error_if_nonfinite: raise FloatingPointError for a loss or gradient that is not finite;
            otherwise the step is refused and counted.

    Settings are read from ``param_groups`` at every step. The loss must be a mean over the batch.

    Raises:
        TypeError: for parameters, or anything else, instead of a model.
        ValueError: for an argument out of range, a group that is none, a model without any such layer or with
            parameters that are sharded, and a layer that is too wide for whole factors.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Literal["auto"] = "auto",
        damping: float | Literal["auto"] = "auto",
        *,
        beta: float = 0.9,
        mu1: float = 0.2,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        clip: float | None = None,
        curvature_interval: int = 10,
        max_factor_size: int | Literal["auto"] | None = "auto",
        groups: Sequence[Mapping[str, Any]] = (),
        others: Others = adamw,
        process_group: Any = None,
        shard_factors: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        settings = self._settings(
            lr=lr,
            damping=damping,
            beta=beta,
            mu1=mu1,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            clip=clip,
            curvature_interval=curvature_interval,
            max_factor_size=max_factor_size,
        )
        super().__init__(model, settings, others, groups, process_group, shard_factors, error_if_nonfinite)

    def _shapes_G(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        rows, largest = layer.rows, group["max_factor_size"]
        if largest is None or rows <= largest:
            return {"H_G": (*layer.groups, rows, rows)}
        blocks = Blocks.of_at_most(largest, rows)
        return {"H_G": (*layer.groups, blocks.count, blocks.size, blocks.size)}

    def _start_G(self, state: State) -> None:
        state["H_G"].diagonal(dim1=-2, dim2=-1).fill_(1)

    def _H_G(self, state: State, V: Tensor) -> Tensor:
        H_G = state["H_G"]
        if H_G.ndim == V.ndim:
            return H_G @ V
        blocks = Blocks(V.shape[-2], H_G.shape[-1])
        return blocks.join(H_G @ blocks.split(V, -2), -2)

    def _blocks_G(self, x: Tensor, state: State) -> Tensor:
        H_G = state["H_G"]
        return x if H_G.ndim == x.ndim + 1 else Blocks(x.shape[-1], H_G.shape[-1]).split(x, -1)

    def _update_G(self, states: list[State], rows: Rows, s: Tensor, y: Tensor) -> Tensor:
        return bfgs_update_([state["H_G"] for state in states], s, y)


@final
class KFLBFGS(KFQN):
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
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        clip: float | None = None,
        curvature_interval: int = 10,
        max_factor_size: int | Literal["auto"] | None = "auto",
        groups: Sequence[Mapping[str, Any]] = (),
        others: Others = adamw,
        process_group: Any = None,
        shard_factors: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        settings = self._settings(
            lr=lr,
            damping=damping,
            history_size=history_size,
            beta=beta,
            mu1=mu1,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            clip=clip,
            curvature_interval=curvature_interval,
            max_factor_size=max_factor_size,
        )
        super().__init__(model, settings, others, groups, process_group, shard_factors, error_if_nonfinite)

    def _shapes_G(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("S", "Y"), (*layer.groups, group["history_size"], layer.rows))

    def _start_G(self, state: State) -> None:
        """An empty history already stands for I."""

    def _H_G(self, state: State, V: Tensor) -> Tensor:
        return lbfgs_matmul(state["S"], state["Y"], V)

    def _blocks_G(self, x: Tensor, state: State) -> Tensor:
        return x  # a history is small however long its vectors

    def _update_G(self, states: list[State], rows: Rows, s: Tensor, y: Tensor) -> Tensor:
        return pushed(states, rows, s, y)
