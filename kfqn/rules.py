"""Which parameters form layers with factors, and which are left to a first-order rule."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfqn.layers import ConvolutionLayer, Layer, LinearLayer

Owners = Mapping[Tensor, Mapping[str, nn.Module]]

Modules = nn.Module | str | Sequence[nn.Module | str]
_LAYERS: Mapping[type, Any] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvolutionLayer,
    nn.Conv2d: ConvolutionLayer,
    nn.Conv3d: ConvolutionLayer,
}
_FORM = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")  # of a convolution


def layers_of(model: nn.Module, parameters: Collection[Tensor] | None = None) -> list[Layer]:
    """The trainable layers of a model that have factors, in the order of its modules.

    ``parameters`` limits them to layers whose parameters are all among these. Modules that share
    a weight form one layer, if they are alike and nothing else has it; if their biases differ, these are not
    part of it. Nor is a bias that is frozen by itself, and a frozen weight leaves no layer. Raises
    ValueError for an uninitialised lazy module, naming it.
    """
    owners: dict[Tensor, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if is_lazy(p):
                where = f"'{name or 'the model itself'}' ({type(module).__name__})"
                raise ValueError(f"{where} has no shape yet: run one batch through the model first.")
            owners.setdefault(p, {})[name] = module
    found = [_layer(weight, modules, owners) for weight, modules in owners.items() if weight.requires_grad]
    layers = [layer for layer in found if layer is not None]
    if parameters is None:
        return layers
    wanted = {id(p) for p in parameters}
    return [layer for layer in layers if all(id(p) in wanted for p in layer.parameters())]


def _layer(weight: Tensor, owners: Mapping[str, nn.Module], all_owners: Owners) -> Layer | None:
    """The layer that ``weight`` is the weight of, if it is one."""
    names, modules = [*owners], [*owners.values()]
    if weight.is_complex() or not weight.numel():
        return None
    # Exact types: a subclass may compute something else from the same parameters.
    if any(type(module) not in _LAYERS or _form(module) != _form(modules[0]) for module in modules):
        return None
    if any(own not in ("weight", "bias") for module in modules for own, _ in module.named_parameters()):
        return None
    biases = {id(module.bias): module.bias for module in modules}
    bias: Tensor | None = biases.popitem()[1] if len(biases) == 1 else None  # type: ignore[assignment]
    if bias is not None and not (bias.requires_grad and all_owners[bias].keys() == owners.keys()):
        bias = None
    if modules[0].weight is not weight:
        return None
    layer: Layer = _LAYERS[type(modules[0])](names, modules, bias)
    return layer


def _form(module: nn.Module) -> tuple[Any, ...]:
    """What two modules must agree in to do the same with one weight."""
    return (type(module), *(getattr(module, key, None) for key in _FORM))


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
