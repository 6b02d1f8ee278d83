"""What a step works on: layers, parts, processes, passes, the step in flight; and who learns curvature."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from kfqn.context import StepContext
from kfqn.curvature.damping import Shapes
from kfqn.formulas.inputs import Inputs
from kfqn.iterates import Iterates
from kfqn.lending import put_hooks
from kfqn.parameters.groups import Group, Groups, State, note
from kfqn.parameters.layers import Layer
from kfqn.parameters.schedules import FactorCheck
from kfqn.parameters.settings import largest_block
from kfqn.parts import Chosen, Parts, chosen
from kfqn.passes.record import LayerRecord, PassSpec
from kfqn.passes.recorder import Recorder
from kfqn.runtime.cuda_graphs import Graphs
from kfqn.state import States
from kfqn.steps.rule import Member, Members, StepRule

Records = dict[Layer, LayerRecord]
Moments = dict[str, Tensor]  # what a layer starts from, each a mean over data


@final
class Training:
    """The layers of one optimizer with all that serves them; it knows no optimizer."""

    def __init__(
        self,
        groups: Groups,
        curvature: "Curvature",
        parts: Parts,
        process_group: Any,
        shard: bool,
        warned: set[str],
    ) -> None:
        self.groups, self.curvature, self.parts = groups, curvature, parts
        self.states = States(
            groups,
            partial(shapes_of, curvature, parts),
            lambda group: chosen(parts, group).average.bfloat16,
            curvature.counted,
            process_group,
            shard,
        )
        self.ranks, self.graphs, self.context = self.states.ranks, Graphs(), StepContext()
        self.factors, self.warned = FactorCheck(), warned
        self.iterates = Iterates(groups)
        self.refresh()
        put_hooks(self.iterates)  # before the recorder's: where a pass starts is known once z is there
        met = process_group is not None
        self.recorder = Recorder(groups.model, groups.layers, self.full_spec(), met)

    def refresh(self) -> None:
        """After groups have changed."""
        self.chosen = {
            place: chosen(self.parts, self.groups.param_groups[place]) for place in self.groups.own_places()
        }
        self.rules: list[tuple[StepRule, Members]] = [
            (rule, self._members(rule))
            for rule in dict.fromkeys(parts.steps for parts in self.chosen.values())
        ]
        for rule, members in self.rules:
            for member in members:
                note(member.group, **(rule.kept() | member.group["progress"]))
        self.iterates.use({place: parts.weights for place, parts in self.chosen.items()})

    def _members(self, rule: StepRule) -> Members:
        return [
            Member(
                self.groups.param_groups[place],
                [layer for layer, own in self.groups.places.items() if own == place],
            )
            for place, parts in self.chosen.items()
            if parts.steps == rule
        ]

    def of(self, layer: Layer) -> Chosen:
        """The parts of a layer's group."""
        return self.chosen[self.groups.places[layer]]

    def rate(self, layer: Layer) -> float:
        """α of a layer."""
        return self.of(layer).steps.rate(self.groups.of(layer), layer)

    def inputs(self, layer: Layer) -> Inputs:
        """The layer's inputs as H_A acts on them, cut into blocks where A would be too large."""
        return layer.inputs.in_blocks(largest_block(self.groups.of(layer), layer.columns))

    def inputs_due(self, place: int, back: int = 0) -> bool:
        """Whether H_A of a group learns from the next step, or the one so many steps ``back``."""
        group, cadence = self.groups.param_groups[place], self.chosen[place].cadence
        k = group["progress"]["k"] - back
        return cadence.is_due(k, group.get("curvature_interval", 1))

    def pairs_due(self, place: int, back: int = 0) -> bool:
        """The same of H_G."""
        return self.chosen[place].output.learns and self.inputs_due(place, back)

    def record_next(self) -> None:
        """From here on the next first pass is recorded, as far as anything is to be learnt from it."""
        self.recorder.met = self.states.process_group is not None
        self.recorder.record_first(self.curvature.next_spec(self))

    def full_spec(self) -> PassSpec:
        """All that may have to be kept of a first pass."""
        return self.curvature.full_spec(self)

    def check_factors(self) -> None:
        """Warn where ``lr`` of an automatic group looks like a learning rate."""
        self.factors.check({place: self.groups.param_groups[place] for place in self.chosen}, self.warn)

    def restart(self) -> None:
        """After another state has been loaded: nothing is known of the last step."""
        self.refresh()
        self.context.stepped = False
        self.context.used_once.clear()
        self.context.firsts.clear()
        self.recorder.forget()
        self.recorder.record_first(self.full_spec())

    def warn(self, message: str, key: str = "") -> None:
        """Say it once; with a key, once whatever the message."""
        if (key or message) not in self.warned:
            self.warned.add(key or message)
            warnings.warn(f"{self.groups.name}: {message}", RuntimeWarning, stacklevel=2)

    @property
    def nothing_ran(self) -> str:
        """What to say where no layer was seen."""
        name, layers, blind = self.groups.name, self.groups.layers, self.recorder.blind
        if blind:
            return f"{name} saw no forward pass: {blind}."
        return (
            f"{name} saw no forward pass through any of its {len(layers)} layers, the first "
            f"being {layers[0]}: run the very model the optimizer was built with, and if it has been "
            "compiled and run before, call torch.compiler.reset() first: compiled code ignores new hooks."
        )

    def mean(self, numbers: Sequence[Tensor]) -> list[float]:
        """Scalars as numbers, averaged over the processes."""
        like = self.groups.layers[0].empty()
        own = {"": torch.stack([number.detach().to(like).reshape(()) for number in numbers])}
        values: list[float] = self.ranks.means(own, {"": (len(numbers),)}, like)[""].tolist()
        return values


class Curvature(ABC):
    """What passes are run to learn curvature, what layers start from, and what directions are made of.

    It has no state of its own: factors are in the layers' states, what is known of a step in
    ``training.context``.
    """

    counted: tuple[str, ...]  # what a layer's ``counts`` counts
    shards: bool  # whether it can be of a layer of whose rows each process has some

    @abstractmethod
    def check_closure(self, name: str, closure: Any) -> None:
        """Raise TypeError or ValueError for a closure that cannot be used, before it is called."""

    @abstractmethod
    def shapes(self, layer: Layer, group: Group, parts: Chosen) -> Shapes:
        """The shape of every tensor in the layer's state."""

    @abstractmethod
    def full_spec(self, training: Training) -> PassSpec:
        """All that may have to be kept of a first pass."""

    @abstractmethod
    def next_spec(self, training: Training) -> PassSpec | None:
        """What is to be kept of the next first pass, if anything is to be learnt from it."""

    @abstractmethod
    def repeats(self, training: Training) -> bool:
        """Whether the batch of the next step is run again after it."""

    @abstractmethod
    def moment_shapes(self, training: Training, layer: Layer) -> Shapes:
        """The shapes of what a layer starts from."""

    @abstractmethod
    def first_moments(self, training: Training, records: Records, closure: Any) -> dict[Layer, Moments]:
        """What layers without state start from, when this was seen in the first pass."""

    @abstractmethod
    def batch_moments(self, training: Training, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        """What layers would start from given one batch of a warm start, and of how many data."""

    @abstractmethod
    def start(self, training: Training, layer: Layer, moments: Moments) -> State:
        """The layer's state before its first step."""

    @abstractmethod
    def direction(self, training: Training, DW: Tensor, layer: Layer) -> Tensor:
        """H_G D̂W H_A, (*g, I, C)."""

    @abstractmethod
    def learn(self, training: Training, records: Records, closure: Callable[[], Any] | None) -> None:
        """After the step: run what passes are needed with the closure, if any, and learn from them."""


def shapes_of(curvature: Curvature, parts: Parts, layer: Layer, group: Group) -> Shapes:
    """The shape of every tensor in the state of a layer with these settings.

    Raises ValueError for a sharded layer if they ask for a second pass or for a factor of its rows.
    """
    own = chosen(parts, group)
    if layer.sharded and (own.output.learns or not curvature.shards):
        raise ValueError(
            f"{layer} is sharded, but these settings ask for a factor of its outputs, H_G or Γ, and second "
            "passes for it, which need whole rows: use KFBFGS(model), or Parts(output=NoOutputFactor())."
        )
    return curvature.shapes(layer, group, own)


def mean_moments(
    training: Training, layers: Sequence[Layer], own: Mapping[Layer, Moments]
) -> dict[Layer, Moments]:
    """Means over the processes, a layer at a time because moments are large."""
    found = {}
    for layer in layers:
        shapes = training.curvature.moment_shapes(training, layer)
        found[layer] = training.ranks.means(own.get(layer, {}), shapes, layer.empty())
        if not found[layer]:
            if training.recorder.blind:
                raise RuntimeError(f"{layer} got a gradient, but {training.recorder.blind}.")
            raise RuntimeError(
                f"{layer} got a gradient, but no call of its module was seen that gives one: call the "
                "module itself in the model's forward, or leave it to the fallback optimizer with "
                f"groups=[{{'modules': '{layer.names[0]}', 'first_order': True}}]."
            )
    return found
