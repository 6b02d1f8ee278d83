"""Parameter groups: which layer is in which, and what a fallback optimizer trains."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from kfqn.parameters.discovery import (
    bias_decay,
    by_decay,
    check_split,
    check_width,
    checked_model,
    layers_of,
    parameters_of,
    uncovered,
)
from kfqn.parameters.fallback import Others, adamw, made
from kfqn.parameters.layers import Layer
from kfqn.parameters.settings import checked_settings, resolved
from kfqn.parameters.shards import reshard

State = dict[str, Tensor]
Group = dict[str, Any]
Shapes = Callable[[Layer, Group], Mapping[str, tuple[int, ...]]]

_PASSING = ("params", "lr", "progress")  # differ from step to step


class Chosen(NamedTuple):
    """What a group asks for: some parameters, settings, and whether the fallback trains them all."""

    parameters: Sequence[Tensor]
    settings: Group
    first_order: bool


def lasting(group: Group) -> Group:
    """What of a group stays the same over steps, and so may be part of what a GPU repeats.

    See `kfqn.runtime.cuda_graphs`.
    """
    return {key: value for key, value in group.items() if key not in _PASSING}


def note(group: Group, **found: Any) -> None:
    """Keep something while running, under ``progress``: plain numbers, lists and dicts of these.

    It is replaced and not changed, as a ``state_dict`` that somebody holds has the same dict.
    """
    group["progress"] = group["progress"] | found


@final
class Groups:
    """A model's layers, with our settings, and its other parameters, with those of a fallback optimizer.

    The fallback is a torch optimizer that ``others`` makes. Both work on the same ``param_groups`` and the
    same ``state``, the optimizer's own (`bind`).
    """

    def __init__(self, model: nn.Module, name: str, others: Others) -> None:
        self.model, self.name, self.make_fallback = checked_model(model, name), name, others
        self.places: dict[Layer, int] = {}  # of each layer's group in param_groups
        self.fallback_places: list[int] = []
        self.fallback: torch.optim.Optimizer | None = None
        self.param_groups: list[Group] = []
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.defaults: Group = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"make_fallback": adamw}  # a function of the user's may have no pickle

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Work on these groups and this state from now on, and let the fallback do so."""
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.defaults = optimizer.defaults
        if self.fallback is not None:
            self.fallback.param_groups = [self.param_groups[place] for place in self.fallback_places]
            self.fallback.state = self.state

    @property
    def layers(self) -> list[Layer]:
        """All layers with factors."""
        return [*self.places]

    def of(self, layer: Layer) -> Group:
        """The settings of a layer."""
        return self.param_groups[self.places[layer]]

    def own(self) -> list[Group]:
        """The groups of layers."""
        return [self.param_groups[place] for place in self.own_places()]

    def own_places(self) -> list[int]:
        """Where they are in ``param_groups``."""
        return sorted({*self.places.values()})

    def alike(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Those layers that are in one group, on one device and of one type, which are learnt together."""
        found: dict[Any, list[Layer]] = {}
        for layer in layers:
            found.setdefault((self.places[layer], layer.weight.device, layer.dtype), []).append(layer)
        return [*found.values()]

    def start(
        self, groups: Sequence[Mapping[str, Any]], add: Callable[[Group], None], shapes: Shapes
    ) -> None:
        """The first groups: those asked for, and one of what is left. ValueError if there is no layer."""
        chosen = [self.read(group) for group in groups]
        taken = {p for group in chosen for p in group.parameters}
        rest = [p for p in self.model.parameters() if p.requires_grad and p not in taken]
        self.join([Chosen(rest, {}, False), *chosen], add, shapes)
        asked = {p for group in chosen if group.first_order for p in group.parameters}
        without = uncovered(self.model, self.layers, asked) if self.places else None
        if without is not None:
            warnings.warn(f"{self.name}: {without}", RuntimeWarning, stacklevel=4)
        if not self.places:
            raise ValueError(
                "the model has no trainable Linear, Conv1d, Conv2d or Conv3d layer, so there is nothing "
                "to precondition: use a torch.optim optimizer for it."
            )

    def read(self, group: Mapping[str, Any]) -> Chosen:
        """The new trainable parameters that a group names, its settings, and its ``first_order``."""
        checked_model(self.model, self.name)
        settings = dict(group)
        first_order = bool(settings.pop("first_order", False))
        if ("modules" in group) == ("params" in group):
            raise ValueError(f"a group has either 'modules' or 'params', but this one has {[*group]}.")
        named = self._named(group)
        settings = {key: value for key, value in settings.items() if key not in ("modules", "params")}
        present = {p for old in self.param_groups for p in old["params"]}
        parameters = [p for p in named if p.requires_grad and p not in present]
        if not parameters:
            raise ValueError(
                f"the group {[*group]} adds nothing: its parameters are frozen, or are trained already."
            )
        if not first_order:
            known = [key for key in self.defaults if key != "progress"]
            unknown = settings.keys() - known
            if unknown:
                raise ValueError(
                    f"{self.name} has no setting {', '.join(map(repr, sorted(unknown)))} for a group of "
                    f"layers: it has {', '.join(known)}."
                )
            settings = resolved(settings, self.defaults) if "automatic" in self.defaults else settings
            checked_settings(**settings)
        return Chosen(parameters, settings, first_order)

    def _named(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The parameters that a group names, of the model."""
        if "modules" in group:
            return parameters_of(self.model, group["modules"])
        named = [group["params"]] if isinstance(group["params"], Tensor) else [*group["params"]]
        own = {*self.model.parameters()}
        if any(p not in own for p in named):
            raise ValueError("'params' holds a tensor that is not a parameter of this optimizer's model.")
        return named

    def join(self, chosen: Sequence[Chosen], add: Callable[[Group], None], shapes: Shapes) -> None:
        """New groups: for each that is asked for those of its layers, and one of what else is in it.

        ``add`` is torch's ``add_param_group``; ``shapes`` are those of a layer's state.
        """
        asked = [p for group in chosen for p in group.parameters]
        if len({*asked}) < len(asked):
            raise ValueError(
                "some parameters appear in more than one group, or twice in one: name each once."
            )
        settings = {p: g.settings for g in chosen if not g.first_order for p in g.parameters}
        layers = layers_of(self.model, settings)
        decays: dict[Layer, float | None] = {}
        for layer in layers:
            of_weight, of_bias = (self.defaults | settings[p] for p in (layer.weight, layer.parameters()[-1]))
            check_width(layer, shapes(layer, of_weight), of_weight)
            check_split(layer, of_weight)
            decays[layer] = bias_decay(layer, of_weight, of_bias)
        taken = {p for layer in layers for p in layer.parameters()}
        for group in chosen:
            own = {x: decay for x, decay in decays.items() if settings[x.weight] is group.settings}
            for decay, alike in by_decay(own).items():
                params = [p for layer in alike for p in layer.parameters()]
                given = group.settings if decay is None else group.settings | {"bias_decay": decay}
                add({"params": params, **given})
                self.places |= dict.fromkeys(alike, len(self.param_groups) - 1)
            rest = [p for p in group.parameters if p not in taken]
            if rest:
                self._join_fallback({"params": rest, **(group.settings if group.first_order else {})}, add)

    def _join_fallback(self, group: Group, add: Callable[[Group], None]) -> None:
        if self.fallback is None:
            given = [group] if len(group) > 1 else group["params"]
            automatic = bool(self.defaults.get("automatic"))
            self.fallback = made(self.make_fallback, given, self.model, automatic)
            new = [*self.fallback.param_groups]
        else:
            self.fallback.add_param_group(group)
            new = self.fallback.param_groups[-1:]
        for added in new:
            keys = set(added)
            add(added)
            for key in added.keys() - keys:  # torch has put our defaults there
                del added[key]
            self.fallback_places.append(len(self.param_groups) - 1)
        self.fallback.param_groups = [self.param_groups[place] for place in self.fallback_places]
        self.fallback.state = self.state

    def plan(self, size: Callable[[Layer], int], not_in_graphs: Sequence[str]) -> str:
        """A table of what happens to every trainable parameter: see `Kronecker.plan`."""
        reshard(self.model)
        names = {p: name for name, p in self.model.named_parameters()}
        lines = [("parameters", "rule", "shape", "lr", "state, MB")]
        for layer in self.layers:
            group = self.of(layer)
            split = group.get("split", 1)
            pieces = (*layer.groups, *[split][: split - 1], layer.rows // split, layer.columns)
            shape = " × ".join(map(str, pieces))
            megabytes = f"{size(layer) / 1e6:.3g}"
            lr = "auto" if group.get("automatic") else f"{group['lr']:g}"
            lines.append((layer.name, self.name, shape, lr, megabytes))
        for place in self.fallback_places:
            for p in self.param_groups[place]["params"]:
                shape = " × ".join(map(str, p.shape)) or "1"
                lr = f"{self.param_groups[place].get('lr', math.nan):g}"
                lines.append((names[p], type(self.fallback).__name__, shape, lr, "–"))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*table, *(f"compiled code: {told}" for told in not_in_graphs)])
