"""Parameter groups: which rule trains what, and the state that is saved and loaded with them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn.layers import Layer
from kfqn.rules import layers_of, parameters_of
from kfqn.settings import checked_settings, resolved

State = dict[str, Tensor]
Group = dict[str, Any]
Others = Callable[[list[Any]], torch.optim.Optimizer]

_PASSING = (
    "params",
    "lr",
    "k",
    "refused",
    "search",
    "usual",
    "along",
    "trust",
    "drawn",
)  # differ from step to step
NOTES = ("step", "counts", "last")  # in a layer's state beside its factors


def adamw(parameters: list[Any]) -> torch.optim.Optimizer:
    """What trains the parameters that belong to no layer, unless told otherwise."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, foreach=True)


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
        self._model, self._make_others = unwrapped(model), others
        self._places: dict[Layer, int] = {}  # of each layer's group in param_groups
        self._other_places: list[int] = []
        self._others: torch.optim.Optimizer | None = None
        super().__init__([{"params": []}], defaults)
        self.param_groups.clear()
        chosen = [self._read(group) for group in groups]
        taken = {p for parameters, _, _ in chosen for p in parameters}
        self._join([p for p in self._model.parameters() if p.requires_grad and p not in taken], {}, False)
        for parameters, settings, first_order in chosen:
            self._join(parameters, settings, first_order)
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
        each with all below it; or ``"params"``, parameters of the model. Whole layers among them get
        factors, the rest goes to the other parameters; with ``"first_order": True`` everything does.
        What else it holds are settings: of layers, or with ``"first_order"`` of the optimizer of the
        other parameters.

        Raises ValueError, with nothing changed, for a name or module that is not the model's, for
        an unknown setting or a value out of range, and if nothing is left to add.
        """
        if not hasattr(self, "param_groups") or (not self.param_groups and not self._places):
            super().add_param_group(param_group)  # torch's constructor
            return
        parameters, settings, first_order = self._read(param_group)
        self._join(parameters, settings, first_order)

    def _read(self, group: Mapping[str, Any]) -> tuple[list[Tensor], Group, bool]:
        """The new trainable parameters that a group names, its settings, and its ``first_order``."""
        settings = dict(group)
        first_order = bool(settings.pop("first_order", False))
        if ("modules" in group) == ("params" in group):
            raise ValueError(f"a group has either 'modules' or 'params', but this one has {[*group]}.")
        if "modules" in group:
            named = parameters_of(self._model, settings.pop("modules"))
        else:
            params = settings.pop("params")
            named = [params] if isinstance(params, Tensor) else [*params]
            own = {*self._model.parameters()}
            if any(p not in own for p in named):
                raise ValueError("'params' holds a tensor that is not a parameter of this optimizer's model.")
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
        return parameters, settings, first_order

    def _join(self, parameters: list[Tensor], settings: Group, first_order: bool) -> None:
        """New groups: one of the layers, one of what else is among the parameters."""
        layers = [] if first_order else layers_of(self._model, parameters)
        if layers:
            own = [p for layer in layers for p in layer.parameters()]
            super().add_param_group({"params": own, **settings})
            self._places |= dict.fromkeys(layers, len(self.param_groups) - 1)
        taken = {p for layer in layers for p in layer.parameters()}
        rest = [p for p in parameters if p not in taken]
        if rest:
            self._join_others({"params": rest, **(settings if first_order else {})})

    def _join_others(self, group: Group) -> None:
        if self._others is None:
            if not callable(self._make_others) or isinstance(self._make_others, torch.optim.Optimizer):
                raise ValueError(
                    "others must be a function that makes a torch optimizer of a list of parameters, such as "
                    f"torch.optim.AdamW itself, but is {self._make_others!r}."
                )
            made = self._make_others([group] if len(group) > 1 else group["params"])
            if isinstance(made, torch.optim.LBFGS):
                raise ValueError("others cannot be torch.optim.LBFGS, which needs closures of its own.")
            self._others = made
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
            lines.append((layer.name or "the model", self._name, shape, lr, megabytes))
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
        is taken as it is, and its ``history_size`` with it. Raises ValueError, with nothing changed,
        for the state of another method or another model.
        """
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
                if p in layers:
                    place = layers[p].weight.device if key != "step" else "cpu"
                    dtype = value.dtype if key in NOTES else layers[p].dtype
                    self.state[p][key] = value.to(place, dtype, copy=True)
                elif isinstance(value, Tensor):
                    self.state[p][key] = self.state[p][key].clone()
        self._share()

    def _check_state(self, layer: Layer | None, state: State, group: Group) -> None:
        """Raise ValueError unless the saved state is of this optimizer and of this layer's shape."""
        saved = {
            key: tuple(v.shape) for key, v in state.items() if isinstance(v, Tensor) and key not in NOTES
        }
        ours = layer is not None and self.defaults.keys() <= group.keys()
        expected = self._shapes(layer, group) if ours and layer is not None else {}
        if saved != expected:
            raise ValueError(
                f"this state is not {self._name}'s for {layer or 'a bias'}: it holds {saved} where "
                f"{expected} belongs; load it into the optimizer and model it was saved from."
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
