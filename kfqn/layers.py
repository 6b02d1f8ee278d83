"""A layer as the paper sees it: one matrix W acting on the vectors a_t.

Notation (section 2). A module with I outputs has W = [weight | bias] of shape (I, C);
C = J|Δ| for J inputs and |Δ| filter offsets, plus one for the homogeneous coordinate if
there is a bias. For a batch of m data its input becomes the vectors a_t(n) of length C,
one for every datum n and location t ∈ T, and its output is h_t = W a_t, eq. (1). For a
`Linear` layer |Δ| = 1, and T is whatever stands between batch and features.

A convolution with g groups is g such layers side by side: ``groups`` is then (g,), and every
shape starts with it: W (g, I, C) for the I outputs and J inputs of one group. For every other layer
``groups`` is (), so the shapes are the paper's; below they are written (*g, …).

Each class turns an input tensor into those vectors without ever storing them: the two
products with all a_t that the method needs (`inner`, `weighted_sum`) cost about as much
as reading the input. Only `patches` writes them out.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Layer(ABC):
    """A weight and perhaps a bias as one matrix W (*g, I, C), and the modules that apply it.

    ``fan_in`` = J|Δ| of the ``columns`` are the weight's, I is ``rows``. There are several ``modules``
    where they share the weight, all alike; each is then one more place at which the layer acts.
    ``weight`` stands for the whole layer: it is the key of the layer's optimizer state. ``bias`` is
    None where there is none to train, or the modules have each their own.
    """

    def __init__(
        self, names: Sequence[str], modules: Sequence[nn.Linear | Convolution], bias: Tensor | None
    ) -> None:
        self.names, self.modules = tuple(names), tuple(modules)
        self.weight: Tensor = modules[0].weight
        self.bias = bias
        self.groups: tuple[int, ...] = ()
        self.fan_in = self.weight[0].numel()  # J|Δ|
        self.columns = self.fan_in + (bias is not None)

    @property
    def rows(self) -> int:
        """I, the outputs of a group."""
        return len(self.weight) // math.prod(self.groups)

    @property
    def dtype(self) -> torch.dtype:
        """What statistics and factors are kept in: the weight's type, but at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def name(self) -> str:
        """The module's name in the model, or the names of all that share the weight."""
        return ", ".join(self.names)

    def __str__(self) -> str:
        return f"'{self.name}' ({type(self.modules[0]).__name__})"

    def parameters(self) -> list[Tensor]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def W(self) -> Tensor:
        """The parameters as one matrix (*g, I, C)."""
        return self._matrix(self.weight, self.bias)

    def DW(self) -> Tensor | None:
        """The gradients as one matrix (*g, I, C), on the scale of ``.grad``; None without any.

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
        return torch.cat(columns, dim=1).to(self.dtype).view(*self.groups, self.rows, self.columns)

    def add_(self, P: Tensor, alpha: float) -> None:
        """W += alpha P in place, for P of shape (*g, I, C)."""
        for p, part in self._parts(P):
            p.add_(part, alpha=alpha)  # rounded to the parameter's type once

    def set_(self, W: Tensor) -> None:
        """Make W, of shape (*g, I, C), the parameters, in place."""
        for p, part in self._parts(W):
            p.copy_(part)

    def _parts(self, W: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its share of a matrix (*g, I, C)."""
        yield self.weight, W[..., : self.fan_in].reshape(self.weight.shape)
        if self.bias is not None:
            yield self.bias, W[..., self.fan_in].reshape(self.bias.shape)

    def _with_ones(self, rows: Tensor) -> Tensor:
        return rows if self.bias is None else torch.cat((rows, rows.new_ones(*rows.shape[:-1], 1)), dim=-1)

    def preactivation(self, h: Tensor) -> Tensor:
        """The module's output, or the gradient of it, as (m, *g, I, |T|)."""
        by_group: Tensor = h.unflatten(1, (*self.groups, self.rows))
        return by_group.flatten(2 + len(self.groups))

    @abstractmethod
    def wrong_input(self, a: Tensor) -> str | None:
        """Why an input is not a batch of what the layer takes; None if it is."""

    @abstractmethod
    def locations(self, a: Tensor) -> tuple[int, ...]:
        """The shape of T for an input of this size; () where |T| = 1 by nature."""

    @abstractmethod
    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        """a_t(n)ᵀ v for every n and t, (m, *g, *T), for ``v`` of shape (*g, C)."""

    @abstractmethod
    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        """Σ_n Σ_t u_t(n) a_t(n), (*g, C), for weights ``u`` of shape (m, *g, *T): the adjoint of `inner`."""

    @abstractmethod
    def patches(self, a: Tensor) -> Tensor:
        """The vectors a_t(n) themselves, (m, *g, |T|, C)."""


@final
class LinearLayer(Layer):
    """`torch.nn.Linear` on an input of shape (m, *T, J): dimensions between are locations."""

    def preactivation(self, h: Tensor) -> Tensor:
        return h.flatten(1, -2).mT if h.ndim > 2 else h[..., None]

    def wrong_input(self, a: Tensor) -> str | None:
        if a.ndim >= 2:
            return None
        return (
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
    """`torch.nn.Conv1d`, `Conv2d` or `Conv3d` on a batch of images with J channels a group.

    No a_t is written out for the products: the channels are mixed first, with one product of
    size |Δ| × J, which leaves one map z_k per offset δ_k of the filter, and the a_t are then met
    through windows of those maps.
    """

    def __init__(self, names: Sequence[str], modules: Sequence[Convolution], bias: Tensor | None) -> None:
        super().__init__(names, modules, bias)
        module = modules[0]
        self.groups = (module.groups,) if module.groups > 1 else ()
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.pad = list(_pad(module))
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def wrong_input(self, a: Tensor) -> str | None:
        expected = 2 + len(self.kernel)
        if a.ndim == expected:
            return None
        return (
            f"{self} takes inputs of {expected} dimensions, (batch, channels, locations), here, "
            f"but got {tuple(a.shape)}: add the batch dimension with x[None]."
        )

    def locations(self, a: Tensor) -> tuple[int, ...]:
        sizes = zip(_padded_size(a, self.pad), self.kernel, self.stride, self.dilation, strict=True)
        return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad, self.mode) if any(self.pad) else x

    def _windows(self, z: Tensor, T: tuple[int, ...]) -> Tensor:
        """A view (n, *Δ, *T) of the maps z (n, *Δ, *padded): z_k where offset δ_k meets it at t."""
        maps, steps = z.stride()[1 : 1 + len(T)], z.stride()[1 + len(T) :]
        along_T = (s * step for s, step in zip(self.stride, steps, strict=True))
        diagonal = (m + d * step for m, d, step in zip(maps, self.dilation, steps, strict=True))
        return z.as_strided((len(z), *self.kernel, *T), (z.stride(0), *diagonal, *along_T))

    def _by_group(self, a: Tensor) -> Tensor:
        """The images of each group, (m, *g, J, locations)."""
        images: Tensor = a.flatten(2).unflatten(1, (*self.groups, -1))
        return images

    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        T = self.locations(a)
        filters = v[..., : self.fan_in].unflatten(-1, (-1, math.prod(self.kernel))).mT
        z = (filters @ self._by_group(a)).unflatten(-1, a.shape[2:])  # (m, *g, |Δ|, *size)
        z = self._padded(z.flatten(0, len(self.groups))).unflatten(1, self.kernel)
        u: Tensor = self._windows(z, T).flatten(1, len(T)).sum(1).unflatten(0, (-1, *self.groups))
        return u if self.bias is None else u + v[..., -1].view(*self.groups, *[1] * len(T))

    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        T, g = self.locations(a), len(self.groups)
        z = u.new_zeros(math.prod(u.shape[: 1 + g]), *self.kernel, *_padded_size(a, self.pad))
        self._windows(z, T).copy_(u.reshape(len(z), *[1] * len(T), *T))
        if self.mode == "constant":
            z = F.pad(z, [-p for p in self.pad]) if any(self.pad) else z  # padding counts for nothing
        else:
            a = self._padded(a)
        z = z.flatten(1, len(T)).flatten(2).unflatten(0, (-1, *self.groups))  # (m, *g, |Δ|, locations)
        sums: Tensor = (z @ self._by_group(a).mT).sum(0).mT.flatten(-2)
        if self.bias is None:
            return sums
        return torch.cat((sums, u.flatten(1 + g).sum((0, -1))[..., None]), dim=-1)

    def patches(self, a: Tensor) -> Tensor:
        T, a = self.locations(a), self._padded(a)
        size = a.shape[2:]
        maps = a.reshape(-1, *[1] * len(T), *size).expand(-1, *self.kernel, *size)
        windows = self._windows(maps, T).reshape(len(a), *self.groups, -1, math.prod(T))
        return self._with_ones(windows.mT)


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
