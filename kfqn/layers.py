"""A layer as the paper sees it: one matrix W acting on the vectors a_t.

Notation (section 2). A module with I outputs has W = [weight | bias] of shape (I, C);
C = J|Δ| for J inputs and |Δ| filter offsets, plus one for the homogeneous coordinate if
there is a bias. For a batch of m data its input becomes the vectors a_t(n) of length C,
one for every datum n and location t ∈ T, and its output is h_t = W a_t, eq. (1). For a
`Linear` layer |Δ| = 1, and T is whatever stands between batch and features.

Each class turns an input tensor into those vectors without ever storing them: the two
products with all a_t that the method needs (`inner`, `weighted_sum`) cost about as much
as reading the input. Only `patches` writes them out.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Layer(ABC):
    """A module with weight and bias, as one matrix W of shape (`rows`, `columns`) = (I, C).

    ``fan_in`` = J|Δ| of the columns are the weight's. ``weight`` stands for the whole layer: it is
    the key of the layer's optimizer state. ``bias`` is None where there is none to train.
    ``dtype`` is what statistics and factors are kept in: the weight's type, but at least float32.
    """

    def __init__(self, name: str, module: nn.Linear | Convolution) -> None:
        self.name = name
        self.module: nn.Module = module
        self.weight: Tensor = module.weight
        trained = module.bias is not None and module.bias.requires_grad
        self.bias: Tensor | None = module.bias if trained else None
        self.dtype = torch.promote_types(module.weight.dtype, torch.float32)
        self.rows, self.fan_in = len(module.weight), module.weight[0].numel()  # I and J|Δ|
        self.columns = self.fan_in + trained

    def __str__(self) -> str:
        return f"'{self.name}' ({type(self.module).__name__})"

    def parameters(self) -> list[Tensor]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def W(self) -> Tensor:
        """The parameters as one matrix (I, C)."""
        return self._matrix(self.weight, self.bias)

    def DW(self) -> Tensor | None:
        """The gradients as one matrix (I, C), on the scale of ``.grad``; None without any.

        Raises RuntimeError if only one of weight and bias has a gradient.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not gradients:
            return None
        if len(gradients) < len(self.parameters()):
            raise RuntimeError(
                f"{self} got a gradient for only one of weight and bias, and the two form one matrix here: "
                "freeze both or neither, before the optimizer is built."
            )
        return self._matrix(gradients[0], gradients[1] if len(gradients) > 1 else None)

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        columns = [weight.flatten(1)] if bias is None else [weight.flatten(1), bias[:, None]]
        return torch.cat(columns, dim=1).to(self.dtype)

    def add_(self, P: Tensor, alpha: float) -> None:
        """W += alpha P in place, for P of shape (I, C)."""
        self.weight.add_(P[:, : self.fan_in].view_as(self.weight).to(self.weight.dtype), alpha=alpha)
        if self.bias is not None:
            self.bias.add_(P[:, self.fan_in].to(self.bias.dtype), alpha=alpha)

    def set_(self, W: Tensor) -> None:
        """Make W, of shape (I, C), the parameters, in place."""
        self.weight.copy_(W[:, : self.fan_in].view_as(self.weight))
        if self.bias is not None:
            self.bias.copy_(W[:, self.fan_in])

    def _with_ones(self, rows: Tensor) -> Tensor:
        return rows if self.bias is None else torch.cat((rows, rows.new_ones(*rows.shape[:-1], 1)), dim=-1)

    def channels_first(self, h: Tensor) -> Tensor:
        """The module's output with its I numbers in the second dimension, (m, I, *T)."""
        return h

    @abstractmethod
    def check_input(self, a: Tensor) -> None:
        """Raise ValueError for an input that is not a batch of what the layer takes."""

    @abstractmethod
    def locations(self, a: Tensor) -> tuple[int, ...]:
        """The shape of T for an input of this size; () where |T| = 1 by nature."""

    @abstractmethod
    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        """a_t(n)ᵀ v for every n and t, (m, *T), for ``v`` of shape (C,)."""

    @abstractmethod
    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        """Σ_n Σ_t u_t(n) a_t(n), (C,), for weights ``u`` of shape (m, *T): the adjoint of `inner`."""

    @abstractmethod
    def patches(self, a: Tensor) -> Tensor:
        """The vectors a_t(n) themselves, (m, |T|, C)."""


@final
class LinearLayer(Layer):
    """`torch.nn.Linear` on an input of shape (m, *T, J): dimensions between are locations."""

    def channels_first(self, h: Tensor) -> Tensor:
        return h.movedim(-1, 1)

    def check_input(self, a: Tensor) -> None:
        if a.ndim < 2:
            raise ValueError(
                f"{self} takes inputs of shape (batch, ..., features) here, but got {tuple(a.shape)}: "
                "add the batch dimension with x[None]."
            )

    def locations(self, a: Tensor) -> tuple[int, ...]:
        return tuple(a.shape[1:-1])

    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        if self.bias is None:
            return a @ v
        return a @ v[:-1] + v[-1]

    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        sums = u.flatten() @ a.flatten(0, -2)
        return sums if self.bias is None else torch.cat((sums, u.sum()[None]))

    def patches(self, a: Tensor) -> Tensor:
        return self._with_ones(a.reshape(len(a), -1, a.shape[-1]))


@final
class ConvolutionLayer(Layer):
    """`torch.nn.Conv1d`, `Conv2d` or `Conv3d` with groups = 1, on a batch of J-channel inputs.

    No a_t is written out for the products: the channels are mixed first, with one product of
    size |Δ| × J, which leaves one map z_k per offset δ_k of the filter, and the a_t are then met
    through windows of those maps.
    """

    def __init__(self, name: str, module: Convolution) -> None:
        super().__init__(name, module)
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.pad = list(_pad(module))
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def check_input(self, a: Tensor) -> None:
        expected = 2 + len(self.kernel)
        if a.ndim != expected:
            raise ValueError(
                f"{self} takes inputs of {expected} dimensions, (batch, channels, locations), here, "
                f"but got {tuple(a.shape)}: add the batch dimension with x[None]."
            )

    def locations(self, a: Tensor) -> tuple[int, ...]:
        sizes = zip(_padded_size(a, self.pad), self.kernel, self.stride, self.dilation, strict=True)
        return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad, self.mode) if any(self.pad) else x

    def _windows(self, z: Tensor, T: tuple[int, ...]) -> Tensor:
        """A view (m, *Δ, *T) of the maps z (m, *Δ, *padded): z_k(n) where offset δ_k meets it at t."""
        maps, steps = z.stride()[1 : 1 + len(T)], z.stride()[1 + len(T) :]
        along_T = (s * step for s, step in zip(self.stride, steps, strict=True))
        diagonal = (m + d * step for m, d, step in zip(maps, self.dilation, steps, strict=True))
        return z.as_strided((len(z), *self.kernel, *T), (z.stride(0), *diagonal, *along_T))

    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        T = self.locations(a)
        filters = v[: self.fan_in].view(-1, math.prod(self.kernel)).T
        z = self._padded((filters @ a.flatten(2)).unflatten(2, a.shape[2:]))
        u = self._windows(z.unflatten(1, self.kernel), T).flatten(1, len(T)).sum(1)
        return u if self.bias is None else u + v[-1]

    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        T = tuple(u.shape[1:])
        z = u.new_zeros(len(u), *self.kernel, *_padded_size(a, self.pad))
        self._windows(z, T).copy_(u.view(len(u), *[1] * len(T), *T))
        if self.mode == "constant":
            z = F.pad(z, [-p for p in self.pad]) if any(self.pad) else z  # padding counts for nothing
        else:
            a = self._padded(a)
        sums = (z.flatten(1, len(T)).flatten(2) @ a.flatten(2).mT).sum(0).T.flatten()
        return sums if self.bias is None else torch.cat((sums, u.sum()[None]))

    def patches(self, a: Tensor) -> Tensor:
        T, a = self.locations(a), self._padded(a)
        size = a.shape[2:]
        maps = a.reshape(-1, *[1] * len(T), *size).expand(-1, *self.kernel, *size)
        return self._with_ones(self._windows(maps, T).reshape(len(a), -1, math.prod(T)).mT)


def _padded_size(a: Tensor, pad: Sequence[int]) -> list[int]:
    return [n + pad[-2 * i - 1] + pad[-2 * i - 2] for i, n in enumerate(a.shape[2:])]


def _pad(module: Convolution) -> Iterator[int]:
    """The module's padding in the order of `torch.nn.functional.pad`: last dimension first."""
    for i in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[i] * (module.kernel_size[i] - 1)
            yield from (total // 2, total - total // 2)
        elif module.padding == "valid":
            yield from (0, 0)
        else:
            yield from (int(module.padding[i]),) * 2


def layers_of(model: nn.Module) -> list[Layer]:
    """The trainable layers of a model that have factors, in the order of its modules.

    A bias frozen by itself leaves a layer without homogeneous coordinate; a frozen weight, or a
    weight that several modules share, leaves no layer. Raises ValueError for an uninitialised lazy
    module, naming it, and for a model with no layer at all.
    """
    uses = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    layers = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(is_lazy(p) for p in own.values()):
            where = f"'{name or 'the model itself'}' ({type(module).__name__})"
            raise ValueError(f"{where} has no shape yet: run one batch through the model first.")
        alone = all(uses[p] == 1 for p in own.values())
        if alone and "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].requires_grad:
            layer = _layer(name, module)
            layers += [layer] if layer is not None else []
    if not layers:
        raise ValueError(
            "the model has no trainable Linear, Conv1d, Conv2d or Conv3d layer, so there is nothing "
            "to precondition: use a torch.optim optimizer for it."
        )
    return layers


def other_parameters(model: nn.Module, layers: Sequence[Layer]) -> dict[str, nn.Parameter]:
    """Every trainable parameter, by name, that belongs to none of the layers."""
    taken = {id(p) for layer in layers for p in layer.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken}


def _layer(name: str, module: nn.Module) -> Layer | None:
    # Exact types: a subclass may compute something else from the same parameters.
    if type(module) is nn.Linear:
        return LinearLayer(name, module)
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        assert isinstance(module, Convolution)
        return ConvolutionLayer(name, module) if module.groups == 1 else None
    return None
