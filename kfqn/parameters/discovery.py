"""Which parameters form layers with factors, and which are left to a first-order rule."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from kfqn.parameters.layers import ConvolutionLayer, Layer, LinearLayer
from kfqn.parameters.shards import reshard, wrongly_sharded

Owners = Mapping[Tensor, Mapping[str, nn.Module]]

Modules = nn.Module | str | Sequence[nn.Module | str]
_LAYERS: Mapping[type, Callable[..., Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvolutionLayer,
    nn.Conv2d: ConvolutionLayer,
    nn.Conv3d: ConvolutionLayer,
}
_FORM = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")  # of a convolution
_METHODS = ("forward", "_conv_forward")  # what a module does to its input
_WIDEST = 2**15  # rows of a factor, 4 GiB in float32, unless ``max_factor_size`` says more
_NAMED = 4  # modules without factors that are told


def layers_of(model: nn.Module, parameters: Collection[Tensor] | None = None) -> list[Layer]:
    """The trainable layers of a model that have factors, in the order of its modules.

    ``parameters`` limits them to layers whose weight is among these. Modules that share
    a weight form one layer, if they are alike and nothing else has it; if their biases differ, these are not
    part of it. Nor is a bias that is frozen by itself or not among ``parameters``, and a frozen weight leaves
    no layer. Raises ValueError for an uninitialised lazy module, naming it.
    """
    owners: dict[Tensor, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if is_lazy(p):
                where = f"'{name or 'the model itself'}' ({type(module).__name__})"
                raise ValueError(f"{where} has no shape yet: run one batch through the model first.")
            owners.setdefault(p, {})[name] = module
    wanted = {p for p in (owners if parameters is None else parameters) if p.requires_grad}
    found = [
        _layer(weight, modules, owners, wanted) for weight, modules in owners.items() if weight in wanted
    ]
    return [layer for layer in found if layer is not None]


def _layer(
    weight: Tensor, owners: Mapping[str, nn.Module], all_owners: Owners, wanted: Collection[Tensor]
) -> Layer | None:
    """The layer that ``weight`` is the weight of, if it is one; its bias only if that is ``wanted``."""
    names, modules = [*owners], [*owners.values()]
    make = _maker(modules[0])
    if make is None or weight.is_complex() or not weight.numel():
        return None
    if any(_form(module) != _form(modules[0]) for module in modules):
        return None
    if any(own not in ("weight", "bias") for module in modules for own, _ in module.named_parameters()):
        return None
    biases = {id(module.bias): module.bias for module in modules}
    bias: Tensor | None = biases.popitem()[1] if len(biases) == 1 else None  # type: ignore[assignment]
    if bias is not None and not (bias in wanted and all_owners[bias].keys() == owners.keys()):
        bias = None
    if modules[0].weight is not weight:
        return None
    return make(names, modules, bias)


def _maker(module: nn.Module) -> Callable[..., Layer] | None:
    """What makes a layer of the module, given names, modules and bias; None if its class is none of ours."""
    kind = _kind(module)
    return _LAYERS.get(kind, functools.partial(LinearLayer, transposed=True)) if kind is not None else None


def _kind(module: nn.Module) -> type | None:
    """The class that says what the module does: `Linear`, a convolution or Transformers' `Conv1D`.

    A subclass does the same as long as it keeps ``forward``. That of `MultiheadAttention` does, but is never
    called.
    """
    own = type(module)
    for kind in own.__mro__ if own is not NonDynamicallyQuantizableLinear else ():
        if kind in _LAYERS or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")):
            same = all(getattr(own, name, None) is getattr(kind, name, None) for name in _METHODS)
            return kind if same else None
    return None


def _form(module: nn.Module) -> tuple[Any, ...]:
    """What two modules must agree in to do the same with one weight."""
    return (_kind(module), *(getattr(module, key, None) for key in _FORM))


def uncovered(model: nn.Module, layers: Sequence[Layer], asked: Collection[Tensor]) -> str | None:
    """Which modules have most of the parameters, if fewer than half of these are in layers with factors.

    Those that were ``asked`` to be trained by the fallback optimizer do not count.
    """
    own = {p for layer in layers for p in layer.parameters()}
    without: dict[str, int] = {}
    seen: set[Tensor] = set()
    for name, module in model.named_modules():
        lacking = {p for p in module.parameters(recurse=False) if p.requires_grad} - own - seen - {*asked}
        seen |= lacking
        if lacking:
            without[f"'{name}' ({type(module).__name__})"] = sum(p.numel() for p in lacking)
    covered, rest = sum(p.numel() for p in own), sum(without.values())
    if rest <= covered:
        return None
    largest = sorted(without, key=lambda where: -without[where])
    named = ", ".join(f"{where} with {without[where]}" for where in largest[:_NAMED])
    more = f" and {len(largest) - _NAMED} more modules" if len(largest) > _NAMED else ""
    return (
        f"only {covered / (covered + rest):.0%} of {covered + rest} trainable parameters get factors, as "
        f"those of Linear and convolutional layers do; a first-order optimizer trains {named}{more}: build "
        "these of such layers where you can, or say that it is meant, by groups=[{'modules': ..., "
        "'first_order': True}]."
    )


def parameters_of(model: nn.Module, modules: Modules) -> list[Tensor]:
    """The parameters of some modules, given themselves or by their names in the model, and all below them.

    Raises ValueError for a name that the model has not, and for a module that is not in it.
    """
    by_name = dict(model.named_modules())
    wanted: dict[Tensor, None] = {}
    for module in [modules] if isinstance(modules, str | nn.Module) else modules:
        if isinstance(module, str) and module not in by_name:
            raise ValueError(
                f"the model has no module named {module!r}: its names are those of model.named_modules()."
            )
        found = by_name[module] if isinstance(module, str) else module
        if all(found is not own for own in model.modules()):
            raise ValueError(f"this {type(found).__name__} is not a module of the optimizer's model.")
        wanted |= dict.fromkeys(found.parameters())
    return [*wanted]


def bias_decay(layer: Layer, own: Mapping[str, Any], of_bias: Mapping[str, Any]) -> float | None:
    """What share of the weight's decay the bias has, given the settings of both; None without a bias.

    Raises ValueError, naming the layer, if they differ in more than that.
    """
    if layer.bias is None:
        return None
    differ = [k for k in own if k not in ("weight_decay", "decayed", "bias_decay") and own[k] != of_bias[k]]
    decay, wanted = own["weight_decay"], of_bias["weight_decay"] * of_bias["bias_decay"]
    if differ or (wanted and not decay):
        what = ", ".join(differ) or "weight_decay, and the weight has none"
        raise ValueError(
            f"weight and bias of {layer} are one matrix here, but their groups differ in {what}: put both "
            "into one group, or let the weight_decay be all that differs, and that of the weight be > 0."
        )
    return float(wanted / decay) if decay else float(own["bias_decay"])


def by_decay(decays: Mapping[Layer, float | None]) -> dict[float | None, list[Layer]]:
    """Layers by what `bias_decay` says of them, those without a bias with the first that have one."""
    known = [decay for decay in decays.values() if decay is not None]
    found: dict[float | None, list[Layer]] = {}
    for layer, decay in decays.items():
        found.setdefault(known[0] if decay is None and known else decay, []).append(layer)
    return found


def check_width(layer: Layer, shapes: Mapping[str, tuple[int, ...]], group: Mapping[str, Any]) -> None:
    """Raise ValueError for a layer with state of these shapes whose factors nobody can mean to keep whole."""
    rows = max((shape[-1] for key, shape in shapes.items() if key.startswith("H_")), default=0)
    if rows <= max(_WIDEST, group.get("max_factor_size") or 0):
        return
    instead = "give max_factor_size, 256 for example, to keep blocks of it, or a larger one to insist"
    if "max_factor_size" not in group:
        name = layer.names[0]
        instead = f"leave it to the fallback optimizer: groups=[{{'modules': {name!r}, 'first_order': True}}]"
    raise ValueError(
        f"{layer} needs a factor of {rows} × {rows}, {rows**2 / 2**28:.0f} GiB in float32, and of more than "
        f"{_WIDEST} rows none is kept whole: {instead}."
    )


def check_split(layer: Layer, group: Mapping[str, Any]) -> None:
    """Raise ValueError for a layer that cannot be stepped as ``split`` layers of its rows."""
    split = group.get("split", 1)
    if layer.rows % split:
        raise ValueError(
            f"{layer} has {layer.rows} outputs, which split={split} does not divide: name as many parts as "
            "are fused in its weight."
        )
    if split > 1 and not group.get("automatic"):
        raise ValueError(
            f"split={split} is of directions that are orthogonalised, and those of {layer} are not, whose lr "
            'is a number: leave split out, or let the lr of its group be "auto".'
        )
    if split > 1 and layer.sharded:
        raise ValueError(
            f"split={split} would cut the rows of {layer} where other processes have them (fully_shard): "
            "leave split out, or let the parts be modules of their own."
        )


def checked_model(model: nn.Module, name: str) -> nn.Module:
    """The model itself, for the optimizer ``name``; what `fully_shard` has gathered of it is dropped.

    Raises TypeError if it is none, and ValueError if it is sharded in another way.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} takes the model itself, to see what goes through its layers, but got a "
            f"{type(model).__name__}: write {name}(model), not {name}(model.parameters()), with settings for "
            "some of it as groups=[...]."
        )
    reshard(model)
    wrong = wrongly_sharded(model)
    if wrong is not None:
        raise ValueError(
            f"{name} cannot train a sharded model unless fully_shard (FSDP2) has sharded all of it on one "
            f"mesh, but {wrong}: use fully_shard alone, or DistributedDataParallel with shard_factors=True, "
            "which shares the factors out."
        )
    return unwrapped(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
