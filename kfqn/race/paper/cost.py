"""What an iteration of each optimizer costs, layer by layer: bytes of state, and seconds of each phase.

Seconds are medians of repeated calls, the optimizers interleaved, on the inputs and gradients that
the layers really see in a step on random images.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

import kfqn
from kfqn.closures import Closure
from kfqn.curvature.pairs import averaged_pairs
from kfqn.formulas.statistics import (
    mean_activation,
    mean_preactivation,
    mean_preactivation_gradient,
    second_moment,
    second_moment_of_gradient,
)
from kfqn.learning.fisher import invert, take_in
from kfqn.learning.secants import learn_A, learn_G
from kfqn.optimizer import Kronecker
from kfqn.parameters.discovery import layers_of
from kfqn.parameters.layers import Layer
from kfqn.passes.record import LayerRecord, PassSpec
from kfqn.passes.recorder import Recorder
from kfqn.race.entrants import ENTRANTS
from kfqn.race.timing import medians
from kfqn.update import keep_averages, propose

COLUMNS = {  # of Table 1, and which tensors of the optimizers' state count to each
    "DW": ("DW", "momentum_buffer", "exp_avg"),
    "DW⊙DW": ("exp_avg_sq",),
    "A": ("H_A", "Omega", "H_Omega"),
    "G": ("H_G", "s_G", "y_G", "S", "Y", "Gamma", "H_Gamma"),
}
PHASES = ("pass", "curvature", "step")
SETTINGS = {"lr": 1e-3, "damping": 1.0, "eps": 1e-8}  # what an iteration costs does not depend on them


@dataclass(frozen=True)
class Shape:
    """A layer in the paper's letters."""

    name: str
    I: int  # noqa: E741, the paper's letter
    J: int
    offsets: int  # |Δ|
    locations: int  # |T|


@dataclass(frozen=True)
class Cost:
    """One optimizer on one model, by layer: bytes of every column, seconds of every phase.

    ``iteration`` is the median of whole steps, in seconds, and ``ratio`` its ratio to SGD-m's.
    """

    entrant: str
    bytes: list[dict[str, int]]
    seconds: list[dict[str, float]] = field(default_factory=list)
    iteration: float = 0.0
    ratio: float = 0.0


@dataclass(frozen=True)
class Sample:
    """What one layer sees in one step: its input, and (m, *g, I, |T|) the pre-activation and its gradient."""

    layer: Layer
    record: LayerRecord
    h: Tensor
    gradient: Tensor


def build(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with settings that do no harm."""
    entrant = ENTRANTS[name]
    return entrant.build(model, {key: SETTINGS[key] for key in entrant.required}, 0.0)


def storage(model: nn.Module, names: Sequence[str], closure: Closure) -> list[Cost]:
    """Table 1: the bytes of each optimizer's state after one step."""
    costs = []
    for name in names:
        optimizer = build(name, model)
        optimizer.step(closure)  # type: ignore[arg-type]
        costs.append(Cost(name, [_bytes(optimizer, layer) for layer in layers_of(model)]))
        del optimizer
    return costs


def _bytes(optimizer: torch.optim.Optimizer, layer: Layer) -> dict[str, int]:
    total = dict.fromkeys(COLUMNS, 0)
    for p in layer.parameters():
        for key, value in optimizer.state[p].items():
            for column, members in COLUMNS.items():
                if key in members and value is not None:
                    total[column] += value.nbytes
    return total


def computation(
    model: nn.Module, names: Sequence[str], closure: Closure, repeats: int, wait: Callable[[], None]
) -> list[Cost]:
    """Table 2: the seconds of each phase in every layer, and of whole iterations. SGD-m comes first."""
    names = ["sgd", *(name for name in names if name != "sgd")]
    models = {name: copy.deepcopy(model) for name in names}  # an optimizer watches every pass of its model
    optimizers = {name: build(name, models[name]) for name in names}
    steps = {
        name: partial(optimizer.step, replace(closure, model=models[name]))
        for name, optimizer in optimizers.items()
    }
    for step in steps.values():
        step()  # the first step sets up the state
    iteration = medians(steps, repeats, wait)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for n, sample in enumerate(samples(model, closure)):
        calls = {
            f"{name} {phase}": call
            for name, optimizer in optimizers.items()
            for phase, call in phases(optimizer, _own_layer(optimizer, models[name], n), sample).items()
        }
        found = medians(calls, repeats, wait)
        for name, optimizer in optimizers.items():
            by_phase = {phase: found.get(f"{name} {phase}", 0.0) for phase in PHASES}
            if f"{name} inversion" in found:  # amortised over T steps
                inversion = found[f"{name} inversion"] / optimizer.defaults["inverse_interval"]
                by_phase |= {"curvature": by_phase["curvature"] + inversion, "inversion": inversion}
            seconds[name].append(by_phase)
    for name in names:  # a median of whole steps never sees an inversion
        iteration[name] += sum(layer.get("inversion", 0.0) for layer in seconds[name])
    return [
        Cost(name, [], seconds[name], iteration[name], iteration[name] / iteration["sgd"]) for name in names
    ]


def _own_layer(optimizer: torch.optim.Optimizer, model: nn.Module, n: int) -> Layer:
    """The n-th layer of an optimizer's copy of the model."""
    layers = optimizer.training.groups.layers if isinstance(optimizer, Kronecker) else layers_of(model)
    return layers[n]


def samples(model: nn.Module, closure: Closure) -> list[Sample]:
    """What every layer sees when the closure runs."""
    layers = layers_of(model)
    recorder = Recorder(model, layers, PassSpec(inputs=True, h=torch.clone, Dh=torch.clone), met=False)
    closure()
    found = recorder.take()
    return [Sample(x, found[x], found[x].h(), found[x].Dh()) for x in layers if x in found]


def shape(sample: Sample) -> Shape:
    """The layer's sizes."""
    I, J, *offsets = sample.layer.weight.shape  # noqa: E741
    return Shape(sample.layer.name, I, J, math.prod(offsets), sample.h[0, 0].numel())


def phases(optimizer: torch.optim.Optimizer, layer: Layer, sample: Sample) -> dict[str, Callable[[], object]]:
    """The work of one iteration in one layer beyond its mini-batch gradient, phase by phase.

    ``layer`` is the optimizer's own, of a copy of the model that ``sample`` is of.
    """
    if isinstance(optimizer, kfqn.KFBFGS | kfqn.KFLBFGS | kfqn.ConvergentKFLBFGS):
        return {
            "pass": lambda: second_pass_of(sample),
            "curvature": lambda: _learn_quasi_newton(optimizer, layer, sample),
            "step": lambda: _move(optimizer, layer),
        }
    if isinstance(optimizer, kfqn.KFAC):
        return {
            "pass": lambda: second_pass_of(sample),
            "curvature": lambda: _learn_kfac(optimizer, layer, sample),
            "inversion": lambda: invert(optimizer.state[layer.weight], optimizer.param_groups[0]),
            "step": lambda: _move(optimizer, layer),
        }
    return {"step": lambda: _step_alone(optimizer, layer)}


def second_pass_of(sample: Sample) -> None:
    """The layer's part of a pass without weight gradients."""
    a = sample.record.input(sample.record.calls[0]).requires_grad_(True)
    parameters = sample.layer.parameters()
    for p in parameters:
        p.requires_grad_(False)
    sample.layer.preactivation(sample.layer.modules[0](a)).backward(sample.gradient)
    a.grad = None
    a.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)


@torch.no_grad()
def _learn_quasi_newton(optimizer: Kronecker, layer: Layer, sample: Sample) -> None:
    training, states = optimizer.training, [optimizer.state[layer.weight]]
    group = training.groups.of(layer)
    parts, inputs = training.of(layer), training.inputs(layer)
    h, Dh = mean_preactivation(sample.h), mean_preactivation_gradient(sample.gradient)
    a = sample.record.input(sample.record.calls[0])
    s = parts.input.query(mean_activation(inputs, a), *states)
    learn_A(training, parts, group, states, [s], [parts.input.respond(inputs, a, s)])
    learn_G(training, parts, group, states, *averaged_pairs([h], [Dh], states, group))


@torch.no_grad()
def _learn_kfac(optimizer: Kronecker, layer: Layer, sample: Sample) -> None:
    a = sample.record.input(sample.record.calls[0])
    take_in(optimizer.training, "Omega", {layer: second_moment(layer.inputs, a)})
    take_in(optimizer.training, "Gamma", {layer: second_moment_of_gradient(sample.gradient)})


@torch.no_grad()
def _move(optimizer: Kronecker, layer: Layer) -> None:
    proposals, _ = propose(optimizer.training, [layer])
    keep_averages(optimizer.training, [layer])
    layer.add_(proposals[layer].P, alpha=0.0)


def _step_alone(optimizer: torch.optim.Optimizer, layer: Layer) -> None:
    """A step of torch's optimizer in which only this layer has gradients."""
    own = {id(p) for p in layer.parameters()}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    kept = [p.grad for p in others]
    for p in others:
        p.grad = None
    optimizer.step()
    for p, gradient in zip(others, kept, strict=True):
        p.grad = gradient
