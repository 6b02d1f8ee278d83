"""KFAC's curvature: Algorithm 5 of Ren and Goldfarb, with targets drawn from the model's predictions."""

import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kfqn.curvature.damping import Shapes
from kfqn.curvature.input_factor import inverse_factor
from kfqn.formulas.statistics import damped_inverse, second_moment, second_moment_of_gradient
from kfqn.parameters.groups import Group, State, note
from kfqn.parameters.layers import Layer
from kfqn.parts import Chosen
from kfqn.passes.record import LayerRecord, PassSpec, nothing_of
from kfqn.passes.replay import Rewind, random_state, second_pass
from kfqn.state import full_precision, unsynchronised
from kfqn.training import Curvature, Moments, Records, Training
from kfqn.weights import average_weights


@final
@dataclass(frozen=True)
class Fisher(Curvature):
    """Ω (C, C) and Γ (I, I), averaged, and now and then their damped inverses H_Ω and H_Γ.

    A layer's state has these as ``Omega``, ``Gamma``, ``H_Omega`` and ``H_Gamma``, ``DW`` and with
    ``averaging`` ``mean_W``.
    """

    shards = False
    counted = ("resets", "Omega skipped", "Gamma skipped", "inversions", "not inverted")

    def check_closure(self, name: str, closure: Any) -> None:
        if not callable(getattr(closure, "sampled", None)):
            raise TypeError(
                f"{name} needs a closure that can also draw targets from the model's predictions: make it "
                "with kfqn.closure(model, x, target, loss_fn)."
            )
        if getattr(closure, "sample", closure) is None:
            raise ValueError(
                f"{name} cannot tell which distribution this loss is the likelihood of: give kfqn.closure a "
                "function sample(output, generator) that draws targets."
            )

    def shapes(self, layer: Layer, group: Group, parts: Chosen) -> Shapes:
        g, rows, columns = layer.groups, layer.rows, layer.columns
        shapes: Shapes = {"DW": (*g, rows, columns)} if parts.average.keeps else {}
        shapes |= dict.fromkeys(("Omega", "H_Omega"), (*g, columns, columns))
        shapes |= dict.fromkeys(("Gamma", "H_Gamma"), (*g, rows, rows))
        return shapes | ({"mean_W": (*g, rows, columns)} if group["averaging"] else {})

    def full_spec(self, training: Training) -> PassSpec:
        return PassSpec(inputs=True, Dh=nothing_of)

    def next_spec(self, training: Training) -> PassSpec | None:
        return self.full_spec(training)

    def repeats(self, training: Training) -> bool:
        return True

    def moment_shapes(self, training: Training, layer: Layer) -> Shapes:
        g, rows, columns = layer.groups, layer.rows, layer.columns
        return {"Omega": (*g, columns, columns), "Gamma": (*g, rows, rows)}

    def first_moments(self, training: Training, records: Records, closure: Any) -> dict[Layer, Moments]:
        if closure is None:
            raise RuntimeError(
                f"{training.groups.name} starts from targets drawn from the model's predictions: give its "
                "first step a closure of kfqn.closure, or call warm_start."
            )
        sampled = self._sampled_pass(training, closure, training.context.rewind, inputs=False)
        for layer in records:
            if layer not in sampled:
                raise RuntimeError(
                    f"{layer} got a gradient from the loss but none with sampled targets: the model must do "
                    "the same in every pass over a batch."
                )
        with full_precision(training.groups.layers):
            return {x: {"Omega": _Omega(records[x]), "Gamma": sampled[x].Dh()} for x in records}

    def batch_moments(self, training: Training, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        self.check_closure(training.groups.name, batch)
        devices = {layer.weight.device for layer in training.groups.layers}
        records = self._sampled_pass(training, batch, random_state(devices), inputs=True)
        with full_precision(training.groups.layers):
            return {x: ({"Omega": _Omega(of), "Gamma": of.Dh()}, of.data) for x, of in records.items()}

    def start(self, training: Training, layer: Layer, moments: Moments) -> State:  # line 1
        group, Omega, Gamma = training.groups.of(layer), moments["Omega"], moments["Gamma"]
        lambda_Omega, lambda_Gamma = split_damping(Omega, Gamma, group)
        state = {
            "Omega": Omega,
            "H_Omega": inverse_factor(layer, Omega, lambda_Omega, "H_Ω"),
            "Gamma": Gamma,
            "H_Gamma": inverse_factor(layer, Gamma, lambda_Gamma, "H_Γ"),
        }
        return state | ({"mean_W": layer.W()} if group["averaging"] else {})

    def direction(self, training: Training, DW: Tensor, layer: Layer) -> Tensor:
        state = training.states.of(layer)
        P: Tensor = state["H_Gamma"] @ DW @ state["H_Omega"]  # line 7
        return P

    def learn(self, training: Training, records: Records, closure: Callable[[], Any] | None) -> None:
        if closure is None:
            training.warn("step() without a closure of kfqn.closure learns nothing about curvature.")
            return
        with full_precision(training.groups.layers):
            take_in(training, "Omega", {layer: _Omega(record) for layer, record in records.items()})
        for record in records.values():
            record.let_go()
        average_weights(training, records)
        sampled = self._sampled_pass(training, closure, training.context.rewind, inputs=False)  # line 10
        with full_precision(training.groups.layers):
            take_in(training, "Gamma", {layer: sampled[layer].Dh() for layer in records if layer in sampled})
            _invert(training)

    def _sampled_pass(self, training: Training, closure: Any, rewind: Rewind, *, inputs: bool) -> Records:
        """The batch again, with targets of the model's own; ``Dh`` of a layer is its Γ."""
        group, recorder = training.groups.own()[0], training.recorder
        drawn = group["progress"]["drawn"]
        mixed = random.Random(f"{group['seed']} {drawn}").getrandbits(32)
        generator = torch.Generator(training.groups.layers[0].weight.device).manual_seed(mixed)
        note(group, drawn=drawn + 1)
        spec = PassSpec(inputs=inputs, Dh=second_moment_of_gradient, frozen=True)
        recorder.breaks.add("left out of KFAC's sampled passes, as it shows no gradients of single data")
        with second_pass(training.groups.model, rewind), torch.enable_grad():
            with unsynchronised(recorder.data_parallel), recorder.recording(spec) as records:
                with torch.compiler.set_stance("force_eager"):
                    closure.sampled(generator)
        return records


def _Omega(record: LayerRecord) -> Tensor:
    return record.sum(lambda call: second_moment(record.layer.inputs, record.input(call)))


def take_in(training: Training, name: str, own: dict[Layer, Tensor]) -> None:
    """Line 12: average a second moment over processes and steps; one that is not finite is left out."""
    for layer in training.groups.layers:
        shapes = {name: training.curvature.moment_shapes(training, layer)[name]}
        of_layer = {name: own.pop(layer)} if layer in own else {}
        mean = training.ranks.means(of_layer, shapes, layer.empty()).get(name)
        state = training.states.of(layer)
        if state and mean is not None:
            finite = mean.isfinite().all()
            state[name].lerp_(torch.where(finite, mean, state[name]), 1 - training.groups.of(layer)["beta"])
            training.states.count(layer, {f"{name} skipped": ~finite})


def _invert(training: Training) -> None:
    """Lines 13 and 14, for every layer whose turn it is."""
    for layer in training.groups.layers:
        state, group = training.states.of(layer), training.groups.of(layer)
        if state and group["progress"]["k"] % group["inverse_interval"] == 0:
            training.states.count(layer, {"inversions": 1, "not inverted": 2 - invert(state, group)})


def split_damping(Omega: Tensor, Gamma: Tensor, group: Group) -> tuple[float | Tensor, float | Tensor]:
    """The damping of either factor, √λ; with ``pi`` π√λ and √λ/π, π² = (tr Ω / C) / (tr Γ / I)."""
    damping = math.sqrt(group["damping"])
    if not group["pi"]:
        return damping, damping
    smallest = torch.finfo(Omega.dtype).tiny
    means = [M.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp(min=smallest) for M in (Omega, Gamma)]
    pi = (means[0] / means[1]).sqrt()
    return damping * pi, damping / pi


def invert(state: State, group: Group) -> int:
    """Line 14; a factor that cannot be inverted keeps its last inverse. Says how many could be."""
    lambda_Omega, lambda_Gamma = split_damping(state["Omega"], state["Gamma"], group)
    inverted = 0
    for name, damping in (("Omega", lambda_Omega), ("Gamma", lambda_Gamma)):
        with contextlib.suppress(ValueError):
            state[f"H_{name}"].copy_(damped_inverse(state[name], damping))
            inverted += 1
    return inverted
