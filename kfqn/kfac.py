"""KFAC, the second-order rival: Algorithm 5 of Ren and Goldfarb, and the options of KFC-pre."""

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from kfqn.capture import Seen, capture
from kfqn.curvature import damped_inverse, second_moment, second_moment_of_gradient
from kfqn.layers import Layer
from kfqn.optimizer import (
    Group,
    KroneckerOptimizer,
    Moments,
    Others,
    State,
    adamw,
    inverse_factor,
)
from kfqn.second_pass import Rewind, random_state, second_pass
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
        model, weight_decay: as for `KFBFGS`.
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
            then not averaged by itself, as in KFC-pre, and ``DW`` in the state holds P.
        averaging: decay of an average of the weights, which `averaged` puts in their place.
        seed: of the sampled targets; by default that of `torch.manual_seed`.
        others: as for `KFBFGS`.

    The loss must be the mean negative log-likelihood of the predictive distribution. Settings
    are read from ``param_groups[0]`` at every step; ``k`` there counts the steps and ``drawn`` the
    times that targets were drawn, so a resumed run draws what it would have drawn.

    Raises:
        ValueError: as `KFBFGS`.
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
        others: Others = adamw,
    ) -> None:
        settings = checked_settings(
            lr=lr,
            damping=damping,
            beta=beta,
            weight_decay=weight_decay,
            inverse_interval=inverse_interval,
            momentum=momentum,
            averaging=averaging,
        )
        if clip is not None:
            checked_settings(clip=clip)
        if seed is None:
            seed = torch.initial_seed()
        super().__init__(model, settings | {"pi": pi, "clip": clip, "seed": seed, "k": 0, "drawn": 0}, others)

    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        rows, columns = layer.rows, layer.columns
        shapes: dict[str, tuple[int, ...]] = {"DW": (rows, columns)}
        shapes |= dict.fromkeys(("Omega", "H_Omega"), (columns, columns))
        shapes |= dict.fromkeys(("Gamma", "H_Gamma"), (rows, rows))
        return shapes | ({"mean_W": (rows, columns)} if group["averaging"] else {})

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

    def _first_pass(self) -> contextlib.AbstractContextManager[dict[Layer, Seen]]:
        return capture(self._layers, inputs=True, Dh=lambda gradient: gradient.new_zeros(()))

    def _sampled_pass(self, closure: Any, rewind: Rewind, *, inputs: bool) -> dict[Layer, Seen]:
        """Line 10: the batch again, with targets of the model's own; ``Dh`` of a layer is its Γ."""
        group = self._group
        mixed = random.Random(f"{group['seed']} {group['drawn']}").getrandbits(32)
        generator = torch.Generator(self._layers[0].weight.device).manual_seed(mixed)
        group["drawn"] += 1
        with second_pass(self._model, rewind), torch.enable_grad():
            with capture(self._layers, inputs=inputs, Dh=second_moment_of_gradient) as seen:
                closure.sampled(generator)
        return {layer: record for layer, record in seen.items() if record.Dh is not None}

    def _first_moments(self, before: dict[Layer, Seen], closure: Any, rewind: Rewind) -> dict[Layer, Moments]:
        sampled = self._sampled_pass(closure, rewind, inputs=False)
        for layer in before:
            if layer not in sampled:
                raise RuntimeError(
                    f"{layer} got a gradient from the loss but none with sampled targets: the model must do "
                    "the same in every pass over a batch."
                )
        with self._full_precision():
            return {layer: _moments(layer, seen.input(), sampled[layer]) for layer, seen in before.items()}

    def _batch_moments(self, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        self._check_closure(batch)
        devices = {layer.weight.device for layer in self._layers}
        seen = self._sampled_pass(batch, random_state(devices), inputs=True)
        with self._full_precision():
            return {
                layer: (_moments(layer, record.input(), record), len(record.input()))
                for layer, record in seen.items()
            }

    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:  # line 1
        Omega, Gamma = moments["Omega"], moments["Gamma"]
        lambda_Omega, lambda_Gamma = _split(Omega, Gamma, group)
        state = {
            "DW": Omega.new_zeros(layer.rows, layer.columns),
            "Omega": Omega,
            "H_Omega": inverse_factor(layer, Omega, lambda_Omega, "H_Ω"),
            "Gamma": Gamma,
            "H_Gamma": inverse_factor(layer, Gamma, lambda_Gamma, "H_Γ"),
        }
        return state | ({"mean_W": layer.W()} if group["averaging"] else {})

    def _directions(self, gradients: dict[Layer, Tensor], group: Group) -> Iterator[tuple[Layer, Tensor]]:
        momentum, beta, directions, slope = group["momentum"], group["beta"], {}, 0.0
        for layer, DW in gradients.items():
            state = self.state[layer.weight]
            if not momentum:
                DW = state["DW"].lerp_(DW, 1 - beta)  # line 6
            P = state["H_Gamma"] @ DW @ state["H_Omega"]  # line 7
            if group["clip"] is None and not momentum:
                yield layer, P  # line 8
            else:
                directions[layer] = P
                slope = slope + (P * DW).sum()
        scale = _clipping(slope, group) if directions else 1.0
        for layer, P in directions.items():
            clipped = P * scale
            yield layer, self.state[layer.weight]["DW"].mul_(momentum).add_(clipped) if momentum else clipped

    def _learn_A(self, layer: Layer, a: Tensor, state: State, group: Group) -> None:  # line 12
        _average(state["Omega"], second_moment(layer, a), group)

    def _look_again(self, before: dict[Layer, Seen], closure: Any, rewind: Rewind) -> None:
        group = self._group
        group["k"] += 1
        if group["averaging"]:
            for layer in before:
                W = layer.W()
                self.state[layer.weight].setdefault("mean_W", W).lerp_(W, 1 - group["averaging"])
        sampled = self._sampled_pass(closure, rewind, inputs=False)
        with self._full_precision():
            for layer in before:
                if layer in sampled:
                    _average(self.state[layer.weight]["Gamma"], sampled[layer].gradient(), group)  # line 12
            if group["k"] % group["inverse_interval"] == 0:  # line 13
                for layer in self._layers:
                    if self.state.get(layer.weight):
                        invert(self.state[layer.weight], group)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """With ``averaging``, put the averaged weights in the model while inside; without, nothing."""
        pairs = [
            (layer, state["mean_W"])
            for layer in self._layers
            if self._group["averaging"] and "mean_W" in (state := self.state.get(layer.weight, {}))
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


def _moments(layer: Layer, a: Tensor, sampled: Seen) -> Moments:
    return {"Omega": second_moment(layer, a), "Gamma": sampled.gradient()}


def _average(old: Tensor, new: Tensor, group: Group) -> None:
    """Line 12, in place; a second moment that is not finite is left out."""
    old.lerp_(torch.where(new.isfinite().all(), new, old), 1 - group["beta"])


def _split(Omega: Tensor, Gamma: Tensor, group: Group) -> tuple[float | Tensor, float | Tensor]:
    """The damping of either factor."""
    damping = math.sqrt(group["damping"])
    if not group["pi"]:
        return damping, damping
    smallest = torch.finfo(Omega.dtype).tiny
    pi = (Omega.diagonal().mean().clamp(min=smallest) / Gamma.diagonal().mean().clamp(min=smallest)).sqrt()
    return damping * pi, damping / pi


def invert(state: State, group: Group) -> None:
    """Line 14; a factor that cannot be inverted keeps its last inverse."""
    lambda_Omega, lambda_Gamma = _split(state["Omega"], state["Gamma"], group)
    for name, damping in (("Omega", lambda_Omega), ("Gamma", lambda_Gamma)):
        with contextlib.suppress(ValueError):
            state[f"H_{name}"].copy_(damped_inverse(state[name], damping))


def _clipping(slope: float | Tensor, group: Group) -> float | Tensor:
    """min(1, √(κ / (α² Σ ⟨P, D̂W⟩))), 1 without clipping."""
    if group["clip"] is None:
        return 1.0
    return torch.sqrt(group["clip"] / (group["lr"] ** 2 * torch.as_tensor(slope))).clamp(max=1.0)
