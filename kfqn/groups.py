"""Parameter groups: which rule trains what, and the state that is saved and loaded with them."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfqn.layers import Layer
from kfqn.others import Others, adamw, made
from kfqn.rules import bias_decay, by_decay, check_width, checked_model, layers_of, parameters_of, uncovered
from kfqn.settings import checked_settings, resolved

State = dict[str, Tensor]
Group = dict[str, Any]

_PASSING = (
    "params",
    "lr",
    "k",
    "refused",
    "search",
    "usual",
    "along",
    "norms",
    "trust",
    "drawn",
)  # differ from step to step
NOTES = ("step", "counts", "last")  # in a layer's state beside its factors


class Chosen(NamedTuple):
    """What a group asks for: some parameters, settings, and whether the other rule trains them all."""

    parameters: Sequence[Tensor]
    settings: Group
    first_order: bool


def lasting(group: Group) -> Group:
    """What of a group stays the same over steps, and so may be part of what a GPU repeats (`kfqn.graphs`)."""
    return {key: value for key, value in group.items() if key not in _PASSING}


class LayeredOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer of a model's layers, and of its other parameters through a torch optimizer.

    A group holds layers, with this optimizer's settings, or other parameters, with those of the torch
    optimizer that ``others`` makes; both work on the same ``param_groups`` and the same ``state``. A layer's
    state is kept under its weight.
    """

    def __init__(
        self, model: nn.Module, defaults: Group, others: Others, groups: Sequence[Mapping[str, Any]]
    ) -> None:
        self._model, self._make_others = checked_model(model, self._name), others
        self._places: dict[Layer, int] = {}  # of each layer's group in param_groups
        self._other_places: list[int] = []
        self._others: torch.optim.Optimizer | None = None
        super().__init__([{"params": []}], defaults)
        self.param_groups.clear()
        chosen = [self._read(group) for group in groups]
        taken = {p for group in chosen for p in group.parameters}
        rest = [p for p in self._model.parameters() if p.requires_grad and p not in taken]
        self._join([Chosen(rest, {}, False), *chosen])
        asked = {p for group in chosen if group.first_order for p in group.parameters}
        without = uncovered(self._model, self._layers, asked) if self._places else None
        if without is not None:
            warnings.warn(f"{self._name}: {without}", RuntimeWarning, stacklevel=4)
        if not self._places:
            raise ValueError(
                "the model has no trainable Linear, Conv1d, Conv2d or Conv3d layer, so there is nothing "
                "to precondition: use a torch.optim optimizer for it."
            )

    @abstractmethod
    def _shapes(self, layer: Layer, group: Group) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the layer's state."""

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _layers(self) -> list[Layer]:
        return [*self._places]

    def _group(self, layer: Layer) -> Group:
        """The settings of a layer."""
        return self.param_groups[self._places[layer]]

    def add_param_group(self, param_group: Group) -> None:
        """Train more of the model, for example what was frozen when the optimizer was made.

        ``param_group`` has either ``"modules"``, a module of the model, its name, or a list of these,
        each with all below it; or ``"params"``, parameters of the model. Layers whose weight is among
        them get factors, the rest goes to the other parameters and keeps the settings of ``others``; with
        ``"first_order": True`` everything does. What else it holds are settings: of layers, or with
        ``"first_order"`` of the optimizer of the other parameters. A bias is in the group of its weight;
        where the groups given to the constructor have it in another one, that may differ in its
        ``weight_decay`` alone, which the bias keeps (``bias_decay``).

        Raises ValueError, with nothing changed, for a name or module that is not the model's, for
        an unknown setting or a value out of range, if nothing is left to add, for a layer too wide for whole
        factors, and for a model that is sharded.
        """
        if not hasattr(self, "param_groups") or (not self.param_groups and not self._places):
            super().add_param_group(param_group)  # torch's constructor
            return
        self._join([self._read(param_group)])

    def _read(self, group: Mapping[str, Any]) -> Chosen:
        """The new trainable parameters that a group names, its settings, and its ``first_order``."""
        checked_model(self._model, self._name)
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
            unknown = settings.keys() - self.defaults.keys()
            if unknown:
                raise ValueError(
                    f"{self._name} has no setting {', '.join(map(repr, sorted(unknown)))} for a group of "
                    f"layers: it has {', '.join(self.defaults)}."
                )
            settings = resolved(settings, self.defaults) if "automatic" in self.defaults else settings
            checked_settings(**settings)
        return Chosen(parameters, settings, first_order)

    def _named(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The parameters that a group names, of the model."""
        if "modules" in group:
            return parameters_of(self._model, group["modules"])
        named = [group["params"]] if isinstance(group["params"], Tensor) else [*group["params"]]
        own = {*self._model.parameters()}
        if any(p not in own for p in named):
            raise ValueError("'params' holds a tensor that is not a parameter of this optimizer's model.")
        return named

    def _join(self, chosen: Sequence[Chosen]) -> None:
        """New groups: for each that is asked for those of its layers, and one of what else is in it."""
        asked = [p for group in chosen for p in group.parameters]
        if len({*asked}) < len(asked):
            raise ValueError(
                "some parameters appear in more than one group, or twice in one: name each once."
            )
        settings = {p: g.settings for g in chosen if not g.first_order for p in g.parameters}
        layers = layers_of(self._model, settings)
        decays: dict[Layer, float | None] = {}
        for layer in layers:
            of_weight, of_bias = (self.defaults | settings[p] for p in (layer.weight, layer.parameters()[-1]))
            check_width(layer, self._shapes(layer, of_weight), of_weight)
            decays[layer] = bias_decay(layer, of_weight, of_bias)
        taken = {p for layer in layers for p in layer.parameters()}
        for group in chosen:
            own = {x: decay for x, decay in decays.items() if settings[x.weight] is group.settings}
            for decay, alike in by_decay(own).items():
                params = [p for layer in alike for p in layer.parameters()]
                given = group.settings if decay is None else group.settings | {"bias_decay": decay}
                super().add_param_group({"params": params, **given})
                self._places |= dict.fromkeys(alike, len(self.param_groups) - 1)
            rest = [p for p in group.parameters if p not in taken]
            if rest:
                self._join_others({"params": rest, **(group.settings if group.first_order else {})})

    def _join_others(self, group: Group) -> None:
        if self._others is None:
            given = [group] if len(group) > 1 else group["params"]
            self._others = made(self._make_others, given, self._model, bool(self.defaults.get("automatic")))
            new = [*self._others.param_groups]
        else:
            self._others.add_param_group(group)
            new = self._others.param_groups[-1:]
        for added in new:
            keys = set(added)
            super().add_param_group(added)
            for key in added.keys() - keys:  # torch has put our defaults there
                del added[key]
            self._other_places.append(len(self.param_groups) - 1)
        self._share()

    def _share(self) -> None:
        """Let the optimizer of the other parameters work on our groups and our state."""
        if self._others is not None:
            self._others.param_groups = [self.param_groups[place] for place in self._other_places]
            self._others.state = self.state

    def plan(self) -> str:
        """A table of what happens to every trainable parameter: its rule, its shape, its factors' bytes."""
        names = {p: name for name, p in self._model.named_parameters()}
        lines = [("parameters", "rule", "shape", "lr", "state, MB")]
        for layer in self._layers:
            group = self._group(layer)
            size = torch.finfo(layer.dtype).bits // 8
            entries = sum(math.prod(shape) for shape in self._shapes(layer, group).values())
            shape = " × ".join(map(str, (*layer.groups, layer.rows, layer.columns)))
            megabytes = f"{entries * size / 1e6:.3g}"
            lr = "auto" if group.get("automatic") else f"{group['lr']:g}"
            lines.append((layer.name, self._name, shape, lr, megabytes))
        for place in self._other_places:
            for p in self.param_groups[place]["params"]:
                shape = " × ".join(map(str, p.shape)) or "1"
                lr = f"{self.param_groups[place].get('lr', math.nan):g}"
                lines.append((names[p], type(self._others).__name__, shape, lr, "–"))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def __getstate__(self) -> dict[str, Any]:
        """All of it, for `copy.deepcopy` and `pickle`; torch would leave the model and the layers out."""
        ours = ("_model", "_places", "_other_places", "_others")
        return super().__getstate__() | {key: self.__dict__[key] for key in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it here, and our groups do not have it
        self.__dict__.setdefault("_make_others", adamw)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state saved by `state_dict`: copied, and in each layer's own `dtype`.

        torch would cast the factors to the weight's type, which loses half their digits for
        a bfloat16 weight, and would share their memory with ``state_dict``. A history of another size
        is taken as it is, and its ``history_size`` with it. A setting that a group was saved without, by an
        earlier version, is this optimizer's default. Raises ValueError, with nothing changed,
        for the state of another method or another model.
        """
        places = {*self._places.values()}
        completed = [
            {**group, **{key: self.defaults[key] for key in self.defaults if key not in group}}
            if place in places
            else group
            for place, group in enumerate(state_dict["param_groups"])
        ]
        state_dict = state_dict | {"param_groups": completed}
        pairs = [
            (p, state_dict["state"].get(i, {}), saved)
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
            for p, i in zip(group["params"], saved["params"], strict=False)
        ]
        others = {p for place in self._other_places for p in self.param_groups[place]["params"]}
        layers = {layer.weight: layer for layer in self._layers}
        for p, state, group in pairs:
            if state and p not in others:
                self._check_state(layers.get(p), state, group)
        super().load_state_dict(state_dict)
        for p, state, _ in pairs:
            for key, value in state.items():
                if key == "step" and p not in others:  # a plain number in what torch saved long ago
                    self.state[p][key] = torch.as_tensor(value, device="cpu").clone()
                elif p in layers:
                    dtype = value.dtype if key in NOTES else layers[p].dtype
                    self.state[p][key] = value.to(p.device, dtype, copy=True)
                elif isinstance(value, Tensor):
                    self.state[p][key] = self.state[p][key].clone()
        self._share()
        if self._others is not None:
            self._others.__setstate__({})  # what its own class makes of an earlier version's groups

    def _check_state(self, layer: Layer | None, state: State, group: Group) -> None:
        """Raise ValueError unless the saved state is of this optimizer and of this layer's shape."""
        saved = {
            key: tuple(v.shape) for key, v in state.items() if isinstance(v, Tensor) and key not in NOTES
        }
        expected = self._shapes(layer, group) if layer is not None else {}
        if saved != expected:
            raise ValueError(
                f"this state is not {self._name}'s for {layer or 'a bias'}: it holds {saved} where "
                f"{expected} belongs; load it into the optimizer and model it was saved from."
            )
