"""KFAC, the second-order rival: Algorithm 5 of Ren and Goldfarb, and the options of KFC-pre."""

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from kfqn.capture import Look, nothing_of
from kfqn.curvature import damped_inverse, second_moment, second_moment_of_gradient
from kfqn.factors import LayersSeen, Moments, inverse_factor
from kfqn.groups import Group, State
from kfqn.layers import Layer
from kfqn.optimizer import KroneckerOptimizer
from kfqn.others import Others, adamw
from kfqn.second_pass import Rewind, random_state, second_pass
from kfqn.seen import Seen
from kfqn.settings import checked_settings


@final
class KFAC(KroneckerOptimizer):
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
        model, weight_decay, decoupled_weight_decay, groups, others, process_group, shard_factors,
            error_if_nonfinite: as for `KFBFGS`.
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
    are read from ``param_groups`` at every step; ``k`` there counts the steps and ``drawn``, in the
    first, the times that targets were drawn, so a resumed run draws what it would have drawn.

    Raises:
        TypeError, ValueError: as `KFBFGS`.
    """

    _counted = ("resets", "Omega skipped", "Gamma skipped", "inversions", "not inverted")
    _first_look = Look(inputs=True, Dh=nothing_of)

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
        settings |= {"seed": torch.initial_seed() if seed is None else seed, "drawn": 0}
        super().__init__(model, settings, others, groups, process_group, shard_factors, error_if_nonfinite)

    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        g, rows, columns = layer.groups, layer.rows, layer.columns
        shapes: dict[str, tuple[int, ...]] = {"DW": (*g, rows, columns)}
        shapes |= dict.fromkeys(("Omega", "H_Omega"), (*g, columns, columns))
        shapes |= dict.fromkeys(("Gamma", "H_Gamma"), (*g, rows, rows))
        return shapes | ({"mean_W": (*g, rows, columns)} if group["averaging"] else {})

    def _check_closure(self, closure: Any) -> None:
        if not callable(getattr(closure, "sampled", None)):
            raise TypeError(
                "KFAC needs a closure that can also draw targets from the model's predictions: make it with "
                "kfqn.closure(model, x, target, loss_fn)."
            )
        if getattr(closure, "sample", closure) is None:
            raise ValueError(
                "KFAC cannot tell which distribution this loss is the likelihood of: give kfqn.closure a "
                "function sample(output, generator) that draws targets."
            )

    def _sampled_pass(self, closure: Any, rewind: Rewind, *, inputs: bool) -> LayersSeen:
        """Line 10: the batch again, with targets of the model's own; ``Dh`` of a layer is its Γ."""
        group = self._own_groups()[0]
        mixed = random.Random(f"{group['seed']} {group['drawn']}").getrandbits(32)
        generator = torch.Generator(self._layers[0].weight.device).manual_seed(mixed)
        group["drawn"] += 1
        look = Look(inputs=inputs, Dh=second_moment_of_gradient, frozen=True)
        with second_pass(self._model, rewind), torch.enable_grad(), self._unsynchronised():
            with self._watch.looking(look) as seen:
                closure.sampled(generator)
        return seen

    def _moment_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        g, rows, columns = layer.groups, layer.rows, layer.columns
        return {"Omega": (*g, columns, columns), "Gamma": (*g, rows, rows)}

    def _first_moments(self, seen: LayersSeen, closure: Any) -> dict[Layer, Moments]:
        if closure is None:
            raise RuntimeError(
                "KFAC starts from targets drawn from the model's predictions: give its first step a "
                "closure of kfqn.closure, or call warm_start."
            )
        sampled = self._sampled_pass(closure, self._memory.rewind, inputs=False)
        for layer in seen:
            if layer not in sampled:
                raise RuntimeError(
                    f"{layer} got a gradient from the loss but none with sampled targets: the model must do "
                    "the same in every pass over a batch."
                )
        with self._full_precision():
            return {layer: _moments(record, sampled[layer]) for layer, record in seen.items()}

    def _batch_moments(self, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        self._check_closure(batch)
        devices = {layer.weight.device for layer in self._layers}
        seen = self._sampled_pass(batch, random_state(devices), inputs=True)
        with self._full_precision():
            return {layer: (_moments(record, record), record.data) for layer, record in seen.items()}

    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:  # line 1
        Omega, Gamma = moments["Omega"], moments["Gamma"]
        lambda_Omega, lambda_Gamma = _split(Omega, Gamma, group)
        state = {
            "Omega": Omega,
            "H_Omega": inverse_factor(layer, Omega, lambda_Omega, "H_Ω"),
            "Gamma": Gamma,
            "H_Gamma": inverse_factor(layer, Gamma, lambda_Gamma, "H_Γ"),
        }
        return state | ({"mean_W": layer.W()} if group["averaging"] else {})

    def _average(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        if group["momentum"]:
            return layer.DW(gradients, self._decay(group), group["bias_decay"])
        decays = self._decay(group), group["bias_decay"]
        return layer.average_DW(state["DW"], gradients, group["beta"], *decays)  # line 6

    def _beta(self, group: Group) -> float | None:
        return None if group["momentum"] else float(group["beta"])

    def _direction(self, DW: Tensor, layer: Layer, state: State, group: Group) -> Tensor:
        return state["H_Gamma"] @ DW @ state["H_Omega"]  # line 7

    def _momentum(self, group: Group) -> float:
        return float(group["momentum"] or 0.0)

    def _learn(self, seen: LayersSeen, closure: Any) -> None:
        if closure is None:
            self._warn("step() without a closure of kfqn.closure learns nothing about curvature.")
            return
        with self._full_precision():
            self._take_in("Omega", {layer: _Omega(record) for layer, record in seen.items()})
        for layer, record in seen.items():
            record.let_go()
            group, state = self._group(layer), self.state.get(layer.weight, {})
            if group["averaging"] and state:
                W = layer.W()
                state.setdefault("mean_W", W).lerp_(W, 1 - group["averaging"])
        sampled = self._sampled_pass(closure, self._memory.rewind, inputs=False)
        with self._full_precision():
            self._take_in("Gamma", {layer: sampled[layer].Dh() for layer in seen if layer in sampled})
            self._invert()

    def _take_in(self, name: str, own: dict[Layer, Tensor]) -> None:
        """Line 12: average a second moment over processes and steps; one that is not finite is left out."""
        for layer in self._layers:
            shapes = {name: self._moment_shapes(layer)[name]}
            of_layer = {name: own.pop(layer)} if layer in own else {}
            mean = self._ranks.means(of_layer, shapes, layer.empty()).get(name)
            state = self.state.get(layer.weight)
            if state and mean is not None:
                finite = mean.isfinite().all()
                state[name].lerp_(torch.where(finite, mean, state[name]), 1 - self._group(layer)["beta"])
                self._count(state, {f"{name} skipped": ~finite})

    def _invert(self) -> None:
        """Lines 13 and 14, for every layer whose turn it is."""
        for layer in self._layers:
            state, group = self.state.get(layer.weight), self._group(layer)
            if state and group["k"] % group["inverse_interval"] == 0:
                self._count(state, {"inversions": 1, "not inverted": 2 - invert(state, group)})

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """With ``averaging``, put the averaged weights in the model while inside; without, nothing."""
        pairs = [
            (layer, state["mean_W"])
            for layer in self._layers
            if self._group(layer)["averaging"] and "mean_W" in (state := self.state.get(layer.weight, {}))
        ]
        own = [layer.W() for layer, _ in pairs]
        with torch.no_grad():
            for layer, mean in pairs:
                layer.set_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for (layer, _), W in zip(pairs, own, strict=True):
                    layer.set_(W)


def _moments(first: Seen, sampled: Seen) -> Moments:
    return {"Omega": _Omega(first), "Gamma": sampled.Dh()}


def _Omega(seen: Seen) -> Tensor:
    return seen.sum(lambda use: second_moment(seen.layer.inputs, seen.input(use)))


def _split(Omega: Tensor, Gamma: Tensor, group: Group) -> tuple[float | Tensor, float | Tensor]:
    """The damping of either factor."""
    damping = math.sqrt(group["damping"])
    if not group["pi"]:
        return damping, damping
    smallest = torch.finfo(Omega.dtype).tiny
    means = [M.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp(min=smallest) for M in (Omega, Gamma)]
    pi = (means[0] / means[1]).sqrt()
    return damping * pi, damping / pi


def invert(state: State, group: Group) -> int:
    """Line 14; a factor that cannot be inverted keeps its last inverse. Says how many could be."""
    lambda_Omega, lambda_Gamma = _split(state["Omega"], state["Gamma"], group)
    inverted = 0
    for name, damping in (("Omega", lambda_Omega), ("Gamma", lambda_Gamma)):
        with contextlib.suppress(ValueError):
            state[f"H_{name}"].copy_(damped_inverse(state[name], damping))
            inverted += 1
    return inverted
