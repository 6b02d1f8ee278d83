"""A layer's input as the vectors a_t that its matrix W acts on, without storing them.

For a batch of m data the input becomes vectors a_t(n) of length C, one for every datum n and location
t ∈ T: C = J|Δ| for J channels and |Δ| filter offsets, plus one for the homogeneous coordinate if there is
a bias. The two products with all a_t that the methods need (`inner`, `weighted_sum`) cost
about as much as reading the input. Only `patches` writes them out.

Several such problems may stand side by side, each with its own channels: the groups of a convolution,
and the blocks that one A is cut into (`in_blocks`). Shapes start with ``groups``, below *g, which is ()
for most layers.
"""

import copy
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfqn.formulas.blocks import Blocks

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Inputs(ABC):
    """How the input of a layer with ``channels`` = J becomes vectors a_t (*g, C).

    ``offsets`` is |Δ|; ``homogeneous`` says whether there is a bias, whose coordinate comes last.
    """

    def __init__(self, groups: tuple[int, ...], channels: int, offsets: int, homogeneous: bool) -> None:
        self.groups, self.channels, self.offsets, self.homogeneous = groups, channels, offsets, homogeneous
        self.blocks: Blocks | None = None  # of the channels of a group

    @property
    def columns(self) -> int:
        """C of one problem."""
        return self.channels * self.offsets + self.homogeneous

    def in_blocks(self, largest: int | None) -> Self:
        """The same input as several side by side, so that no A has more than ``largest`` columns.

        Their A are diagonal blocks of the whole: channels that are neighbours stay together, each with
        all its offsets (a single channel is never cut). The homogeneous coordinate belongs to the last
        block, and is 0 in the others. Exact where inputs of different blocks are uncorrelated; A ≈ A_J ⊗ A_Δ
        would forget how offsets and channels go together, and has no place for the bias.
        """
        if largest is None or self.columns <= largest or self.channels == 1:
            return self
        most = max(1, (largest - self.homogeneous) // self.offsets)
        part = copy.copy(self)
        part.blocks = Blocks.of_at_most(most, self.channels)
        part.groups, part.channels = (*self.groups, part.blocks.count), part.blocks.size
        return part

    def times(self, V: Tensor, H: Tensor) -> Tensor:
        """V H, (*g, I, C) of the whole, for H (*g, C, C) or its blocks, each with its own columns of V.

        All blocks but the last, to which the homogeneous coordinate belongs, in one product; into the result,
        so that nothing of V's size is copied.
        """
        if self.blocks is None:
            return V @ H
        P, n, width = torch.empty_like(V), self.blocks.count - 1, self.blocks.size * self.offsets
        last = self._last_block(H)
        for V_g, H_g, last_g, P_g in zip(_each(V, 2), _each(H, 3), _each(last, 2), _each(P, 2), strict=True):
            of_blocks, result = (x[:, : n * width].unflatten(1, (n, width)).movedim(1, 0) for x in (V_g, P_g))
            torch.bmm(of_blocks, H_g[:n, :width, :width], out=result)
            torch.mm(V_g[:, n * width :], last_g, out=P_g[:, n * width :])
        return P

    def _last_block(self, H: Tensor) -> Tensor:
        """The last of the blocks (*g, b, C, C) without what it is filled up with."""
        assert self.blocks is not None
        last, lacking = H[..., -1, :, :], self.blocks.count * self.blocks.size - self.blocks.total
        for dim in (-2, -1) if lacking else ():
            there = (self.blocks.size - lacking) * self.offsets
            kept = [last.narrow(dim, 0, there)]
            kept += [last.narrow(dim, -1, 1)] if self.homogeneous else []
            last = torch.cat(kept, dim)
        return last

    def _in_last(self, x: Tensor) -> Tensor:
        """``x`` (*g), but 0 in the blocks that the homogeneous coordinate does not belong to."""
        if self.blocks is None:
            return x
        return F.pad(x[..., -1:], (self.blocks.count - 1, 0))

    @abstractmethod
    def locations(self, a: Tensor) -> tuple[int, ...]:
        """The shape of T for an input of this size; () where |T| = 1 by nature."""

    @abstractmethod
    def mean(self, a: Tensor) -> Tensor:
        """1/|T| Σ_t a_t, (*g, C), of one datum, so ``a`` without its first dimension."""

    @abstractmethod
    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        """a_t(n)ᵀ v for every n and t, (m, *g, *T), for ``v`` of shape (*g, C)."""

    @abstractmethod
    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        """Σ_n Σ_t u_t(n) a_t(n), (*g, C), for weights ``u`` of shape (m, *g, *T): the adjoint of `inner`."""

    @abstractmethod
    def patches(self, a: Tensor) -> Tensor:
        """The vectors a_t(n) themselves, (m, *g, |T|, C)."""

    def _with_ones(self, rows: Tensor) -> Tensor:
        """(m, *g, |T|, J|Δ|) with the homogeneous coordinate."""
        if not self.homogeneous:
            return rows
        ones = self._in_last(rows.new_ones(self.groups))[..., None, None].expand(*rows.shape[:-1], 1)
        return torch.cat((rows, ones), dim=-1)

    def _with_one(self, means: Tensor) -> Tensor:
        """(*g, J|Δ|) with the homogeneous coordinate, 1."""
        if not self.homogeneous:
            return means
        extended = F.pad(means, (0, 1), value=1.0 if self.blocks is None else 0.0)
        if self.blocks is not None:
            extended[..., -1, -1].fill_(1.0)
        return extended

    def _with_sum(self, sums: Tensor, u: Tensor) -> Tensor:
        """(*g, J|Δ|) with the homogeneous coordinate, the sum of the weights."""
        if not self.homogeneous:
            return sums
        g = len(self.groups)
        total = u.flatten(1 + g).sum((0, -1)) if u.ndim > 1 + g else u.sum(0)
        return torch.cat((sums, self._in_last(total)[..., None]), dim=-1)


@final
class LinearInputs(Inputs):
    """Those of `torch.nn.Linear`, (m, *T, J): dimensions between are locations."""

    def locations(self, a: Tensor) -> tuple[int, ...]:
        return tuple(a.shape[1:-1])

    def _by_block(self, a: Tensor) -> Tensor:
        """(*g, m|T|, J)."""
        a = a.flatten(0, -2)
        return a if self.blocks is None else self.blocks.split(a, -1).movedim(-2, 0)

    def mean(self, a: Tensor) -> Tensor:
        mean = a.flatten(0, -2).mean(0) if a.ndim > 1 else a
        return self._with_one(mean if self.blocks is None else self.blocks.split(mean, -1))

    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        products = (self._by_block(a) @ v[..., : self.channels, None])[..., 0]  # (*g, m|T|)
        if self.homogeneous:
            products = products + self._in_last(v[..., -1])[..., None]
        by_location: Tensor = products.unflatten(-1, a.shape[:-1])
        return by_location.movedim(0, 1) if self.groups else by_location

    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        weights = u.movedim(1, 0).flatten(1) if self.groups else u.flatten()
        sums = (weights[..., None, :] @ self._by_block(a))[..., 0, :]
        return self._with_sum(sums, u)

    def patches(self, a: Tensor) -> Tensor:
        rows = self._by_block(a).unflatten(-2, (len(a), -1))
        return self._with_ones(rows.movedim(0, 1) if self.groups else rows)


@final
class ConvolutionInputs(Inputs):
    """Those of `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, images (m, channels, *size).

    No a_t is written out for the products, only one map z_k per offset δ_k of the filter: `inner` mixes the
    channels first, with one product of size |Δ| × J, and adds up the maps, each moved by its offset;
    `weighted_sum` moves the weights, and then multiplies them with the channels.
    """

    def __init__(self, module: Convolution, homogeneous: bool) -> None:
        groups = (module.groups,) if module.groups > 1 else ()
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.pad = list(_pad(module))
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        super().__init__(groups, module.in_channels // module.groups, math.prod(self.kernel), homogeneous)

    def locations(self, a: Tensor) -> tuple[int, ...]:
        sizes = zip(_padded_size(a, self.pad), self.kernel, self.stride, self.dilation, strict=True)
        return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes)

    def _padded(self, a: Tensor) -> Tensor:
        return F.pad(a, self.pad, self.mode) if any(self.pad) else a

    def _with_images(self, a: Tensor) -> tuple[Tensor, list[int]]:
        """The input with its padding, unless that is zeros, which count for nothing; how much is left out.

        Of each dimension what is left out before its first location.
        """
        if self.mode == "constant":
            return a, self.pad[-2::-2]
        return self._padded(a), [0] * len(self.kernel)

    def _windows(
        self, x: Tensor, size: Sequence[int], stride: Sequence[int], start: int | None = None
    ) -> Tensor:
        """A view (n, *Δ, *size) of maps x (n, *positions): what each δ meets in steps of ``stride``.

        ``start`` is where in the memory of x it begins, if not with x.
        """
        along_Δ, along_size = (map(operator.mul, by, x.stride()[1:]) for by in (self.dilation, stride))
        strides = (x.stride(0), *along_Δ, *along_size)
        return x.as_strided((len(x), *self.kernel, *size), strides, start)

    def _met(self, z: Tensor, i: int, before: int, T: int) -> Tensor:
        """Maps z (n, *Δ, *size), summed up where the offsets along dimension i meet them.

        The first of *Δ is that of dimension i, and is gone then; of *size the i-th is what T is there.
        """
        dim, step = i - len(self.kernel), self.stride[i]
        before_dim, after_dim = [slice(None)] * (z.ndim - 1 + dim), [slice(None)] * (-dim - 1)
        size, shape = z.shape[dim], [len(z), *z.shape[2:]]
        shape[dim] = T
        u = z.new_zeros(shape)
        for k, z_k in enumerate(z.unbind(1)):
            shift = self.dilation[i] * k - before  # location t meets t * step + shift
            first, end = max(0, -(shift // step)), min(T, (size - 1 - shift) // step + 1)
            if first < end:
                met = slice(first * step + shift, (end - 1) * step + shift + 1, step)
                u[(*before_dim, slice(first, end), *after_dim)].add_(z_k[(*before_dim, met, *after_dim)])
        return u

    def _by_group(self, a: Tensor) -> Tensor:
        """The images of each group, (m, *g, J, locations)."""
        a = a.flatten(2)
        if self.blocks is not None:
            a = a.unflatten(1, (*self.groups[:-1], -1))
            a = self.blocks.filled(a, -2).flatten(1, -2)
        images: Tensor = a.unflatten(1, (*self.groups, -1))
        return images

    def mean(self, a: Tensor) -> Tensor:
        a = a[None]
        T, a = self.locations(a), self._padded(a)
        images = self._by_group(a).reshape(-1, *a.shape[2:])
        means = self._windows(images, T, self.stride).mean([*range(-len(T), 0)])
        return self._with_one(means.view(*self.groups, -1))

    def inner(self, a: Tensor, v: Tensor) -> Tensor:
        T = self.locations(a)
        filters = v[..., : self.channels * self.offsets].unflatten(-1, (-1, self.offsets)).mT
        a, before = self._with_images(a)
        z = (filters @ self._by_group(a)).unflatten(-1, a.shape[2:])  # (m, *g, |Δ|, *size)
        z = z.flatten(0, len(self.groups)).unflatten(1, self.kernel)
        for i in range(len(T)):
            z = self._met(z, i, before[i], T[i])
        u: Tensor = z.unflatten(0, (-1, *self.groups))
        return u + self._in_last(v[..., -1])[(..., *[None] * len(T))] if self.homogeneous else u

    def weighted_sum(self, a: Tensor, u: Tensor) -> Tensor:
        T, padded = self.locations(a), _padded_size(a, self.pad)
        a, before = self._with_images(a)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        around = u.new_zeros(u.shape[: 1 + len(self.groups)].numel(), *map(operator.add, padded, reach))
        steps = [slice(r, r + s * (n - 1) + 1, s) for r, s, n in zip(reach, self.stride, T, strict=True)]
        around[(slice(None), *steps)] = u.flatten(0, len(self.groups))
        start = sum(map(operator.mul, before, around.stride()[1:]))
        z = self._windows(around, a.shape[2:], [1] * len(T), start)  # the last offset first
        z = z.reshape(*u.shape[: 1 + len(self.groups)], self.offsets, -1)  # (m, *g, |Δ|, locations)
        return self._with_sum((z @ self._by_group(a).mT).sum(0).flip(-2).mT.flatten(-2), u)

    def patches(self, a: Tensor) -> Tensor:
        T, a = self.locations(a), self._padded(a)
        images = self._by_group(a).reshape(-1, *a.shape[2:])
        windows = self._windows(images, T, self.stride).reshape(len(a), *self.groups, -1, math.prod(T))
        return self._with_ones(windows.mT)


def _each(x: Tensor, dims: int) -> Tensor:
    """All dimensions but the last ``dims`` as one, the first."""
    return x.reshape(-1, *x.shape[-dims:])


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
