"""A layer as the paper sees it: one matrix W acting on the vectors a_t.

Notation (section 2). A module with I outputs has W = [weight | bias] of shape (I, C) for the vectors
a_t (`kfqn.formulas.inputs`) that its input becomes; its output is h_t = W a_t, eq. (1). For a
`Linear` layer |Δ| = 1, and T is whatever stands between batch and features.

A convolution with g groups is g such layers side by side: ``groups`` is then (g,), and every
shape starts with it: W (g, I, C) for the I outputs and J inputs of one group. For every other layer
``groups`` is (), so the shapes are the paper's; below they are written (*g, …).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from kfqn.formulas.inputs import Convolution, ConvolutionInputs, Inputs, LinearInputs
from kfqn.parameters import shards


class Layer(ABC):
    """A weight and perhaps a bias as one matrix W (*g, I, C), and the modules that apply it.

    ``fan_in`` = J|Δ| of the C ``columns`` are the weight's, I is ``rows``. There are several ``modules``
    where they share the weight, all alike; each is then one more place at which the layer acts.
    ``inputs`` is how what they are given becomes the vectors a_t. ``transposed`` says that the weight is
    kept as (J, I), its outputs last.
    ``weight`` stands for the whole layer: it is the key of the layer's optimizer state. ``bias`` is
    None where there is none to train, or the modules have each their own.

    Of a layer that is ``sharded`` each of so many ``processes`` has a part. With a ``cut`` these are rows of
    W, and matrices here have those rows only; without, as of groups, whole matrices are gathered when needed.
    """

    def __init__(
        self,
        names: Sequence[str],
        modules: Sequence[Any],
        bias: Tensor | None,
        inputs: Inputs,
        transposed: bool = False,
    ) -> None:
        self.names, self.modules = tuple(names), tuple(modules)
        self.weight: Tensor = modules[0].weight
        self.bias, self.inputs, self.transposed = bias, inputs, transposed
        self.groups, self.columns = inputs.groups, inputs.columns
        self.outputs = len(self._outputs_first(self.weight))  # of all groups together
        self.fan_in = self.weight.numel() // self.outputs  # J|Δ|
        self.sharded = shards.is_sharded(self.weight)
        self.cut = self._cut() if self.sharded else None
        self.processes = shards.place(self.weight)[0] if self.sharded else 1

    @property
    def rows(self) -> int:
        """I, the outputs of a group."""
        return self.outputs // math.prod(self.groups)

    def _cut(self) -> shards.Cut | None:
        of_bias = None if self.bias is None else shards.cut_of(self.bias, 0)
        cut = shards.cut_of(self.weight, 1 if self.transposed else 0)
        return None if self.groups or (self.bias is not None and of_bias is None) else cut

    @property
    def dtype(self) -> torch.dtype:
        """What statistics and factors are kept in: the weight's type, but at least float32."""
        dtype = self.weight.dtype
        return dtype if dtype.itemsize >= 4 else torch.float32

    @property
    def name(self) -> str:
        """The module's name in the model, its class if it is the model, or the names of all that share it."""
        return ", ".join(name or type(self.modules[0]).__name__ for name in self.names)

    def __str__(self) -> str:
        return f"'{self.name}' ({type(self.modules[0]).__name__})"

    def parameters(self) -> list[Tensor]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def empty(self) -> Tensor:
        """A tensor without entries, where and of which type the layer's statistics are."""
        return shards.local(self.weight).new_empty(0, dtype=self.dtype)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """A matrix (*g, I, C) of zeros, to be kept: all of it, shared out over the processes as W is."""
        shape = (*self.groups, self.rows, self.columns)
        if self.cut is not None:
            return shards.zeros(shape, self.weight, dtype)
        return self.empty().new_zeros(shape, dtype=dtype)

    def held(self) -> list[Tensor]:
        """What this process has of `parameters`."""
        return [*map(shards.local, self.parameters())] if self.sharded else self.parameters()

    def _gathered(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a matrix is made of, given what this process has of the parameters or their gradients."""
        if self.sharded and self.cut is None:
            return [*map(shards.whole, parts, self.parameters())]
        return parts

    def W(self) -> Tensor:
        """The parameters as one matrix (*g, I, C)."""
        return self._matrix(*self._gathered(self.held()))

    def gradients(self) -> list[Tensor]:
        """``.grad`` of weight and bias, with zeros for one that has none while the other has; or nothing.

        Of a sharded layer this process's part. A loss of derivatives of the output alone, for one, gives
        the last bias none. Raises RuntimeError if one of them is frozen.
        """
        parameters = self.parameters()
        if all(p.grad is None for p in parameters):
            return []
        if any(p.grad is None and not p.requires_grad for p in parameters):
            raise RuntimeError(
                f"{self} got a gradient for only one of weight and bias, and the two form one matrix here: "
                "freeze both or neither, before the optimizer is built."
            )
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return [*map(shards.local, given)] if self.sharded else given

    def DW(self, gradients: Sequence[Tensor], decay: float = 0.0, of_bias: float = 1.0) -> Tensor:
        """`gradients` as one matrix (*g, I, C), on the scale of ``.grad``, with ``decay`` × W added.

        Of the bias it is this times ``of_bias``, here as in all that follows.
        """
        DW = self._matrix(*self._gathered(gradients))
        W = self._gathered(self.held()) if decay else ()
        for p, part, own in zip(W, self._views(DW), _decays(decay, of_bias), strict=False):
            if own:
                part.add_(p, alpha=own)
        return DW

    def average_DW(
        self, average: Tensor, gradients: Sequence[Tensor], beta: float, decay: float, of_bias: float = 1.0
    ) -> Tensor:
        """β D̂W + (1 − β) DW, for D̂W of shape (*g, I, C) and DW of `gradients`, with ``decay`` × W added.

        DW is not written out, which would be a copy of the gradient.
        """
        out = torch.empty_like(average)
        new, given = self._views(out), self._gathered(gradients)
        for gradient, old, part in zip(given, self._views(average), new, strict=True):
            torch.lerp(old, gradient.to(old.dtype), 1 - beta, out=part)
        W = self._gathered(self.held()) if decay else ()
        for p, part, own in zip(W, new, _decays(decay, of_bias), strict=False):
            if own:
                part.add_(p, alpha=(1 - beta) * own)
        return out

    def _outputs_first(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape with its outputs in the first dimension, or back: a view."""
        return weight.mT if self.transposed else weight

    def _matrix(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = self._outputs_first(weight)
        columns = [weight.flatten(1)] + ([] if bias is None else [bias[:, None]])
        rows = len(weight) // math.prod(self.groups)
        return torch.cat(columns, dim=1).to(self.dtype).view(*self.groups, rows, self.columns)

    def add_(self, P: Tensor, alpha: float) -> None:
        """W += alpha P in place, for P of shape (*g, I, C)."""
        for p, part in self.parts(P.contiguous()):
            p.add_(part, alpha=alpha)  # rounded to the parameter's type once

    def set_(self, W: Tensor) -> None:
        """Make W, of shape (*g, I, C), the parameters, in place."""
        for p, part in self.parts(W.contiguous()):
            p.copy_(part)

    def shrink_(self, share: float, of_bias: float = 1.0) -> None:
        """W −= share × W, in place, rounded to the parameters' type once."""
        for p, own in zip(self.held(), _decays(share, of_bias), strict=False):
            p.copy_(p.to(self.dtype) * (1 - own))

    def parts(self, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What this process has of each parameter, with its share of a matrix (*g, I, C): a view.

        A copy where a sharded layer has no ``cut``.
        """
        views = self._views(W)
        if self.sharded and self.cut is None:
            views = [*map(shards.part_of, views, self.parameters())]
        return [*zip(self.held(), views, strict=True)]

    def _views(self, W: Tensor) -> list[Tensor]:
        """Views of a matrix (*g, I, C) as weight and bias."""
        shape = (W.shape[:-1].numel(), *self._outputs_first(self.weight).shape[1:])
        if self.bias is None:
            return [self._outputs_first(W.view(shape))]
        weight, bias = self._outputs_first(W[..., : self.fan_in].view(shape)), W[..., self.fan_in]
        return [weight, bias.view(self.bias.shape) if self.groups else bias]

    @abstractmethod
    def preactivation(self, h: Tensor) -> Tensor:
        """The module's output, or the gradient of it, as (m, *g, I, |T|)."""

    @abstractmethod
    def along_outputs(self, e: Tensor) -> Tensor:
        """A number for each output, (outputs), as it is added to the module's output."""

    @abstractmethod
    def wrong_input(self, a: Tensor) -> str | None:
        """Why an input is not a batch of what the layer takes; None if it is."""


def average_DW_(averages: Mapping[Layer, Tensor], beta: float, decay: float, of_bias: float = 1.0) -> None:
    """`Layer.average_DW` of several layers, in place.

    In one call, but for weights in half precision, whose gradients have to be copied, and for sharded ones
    whose gradients have to be gathered.
    """
    averages = dict(averages)
    for layer in [layer for layer in averages if layer.sharded and layer.cut is None]:
        average = averages.pop(layer)
        average.copy_(layer.average_DW(average, layer.gradients(), beta, decay, of_bias))
    alike = [layer for layer in averages if layer.weight.dtype == layer.dtype]
    for layers in filter(None, [alike, *([layer] for layer in averages if layer not in alike)]):
        pairs = [pair for layer in layers for pair in layer.parts(averages[layer])]
        gradients = [gradient.to(layer.dtype) for layer in layers for gradient in layer.gradients()]
        torch._foreach_lerp_([average for _, average in pairs], gradients, 1 - beta)
        decays = [own for layer in layers for own in _decays(decay, of_bias)[: len(layer.parameters())]]
        for own in {*decays} - {0.0}:
            chosen = [pair for pair, of_pair in zip(pairs, decays, strict=True) if of_pair == own]
            W, decayed = [p for p, _ in chosen], [average for _, average in chosen]
            torch._foreach_add_(decayed, W, alpha=(1 - beta) * own)


def _decays(decay: float, of_bias: float) -> tuple[float, float]:
    """What times W is added of the weight, and of the bias if there is one."""
    return decay, decay * of_bias


@final
class LinearLayer(Layer):
    """`torch.nn.Linear` on an input of shape (m, *T, J), or, transposed, Transformers' `Conv1D`."""

    def __init__(
        self, names: Sequence[str], modules: Sequence[Any], bias: Tensor | None, transposed: bool = False
    ) -> None:
        channels = modules[0].weight.shape[0 if transposed else 1]
        super().__init__(
            names, modules, bias, LinearInputs((), channels, 1, bias is not None), transposed=transposed
        )

    def preactivation(self, h: Tensor) -> Tensor:
        return h.flatten(1, -2).mT if h.ndim > 2 else h[..., None]

    def along_outputs(self, e: Tensor) -> Tensor:
        return e

    def wrong_input(self, a: Tensor) -> str | None:
        if a.ndim >= 2:
            return None
        return (
            f"{self} takes inputs of shape (batch, ..., features) here, but got {tuple(a.shape)}: "
            "add the batch dimension with x[None]."
        )


@final
class ConvolutionLayer(Layer):
    """`torch.nn.Conv1d`, `Conv2d` or `Conv3d` on a batch of images with J channels a group."""

    def __init__(self, names: Sequence[str], modules: Sequence[Convolution], bias: Tensor | None) -> None:
        super().__init__(names, modules, bias, ConvolutionInputs(modules[0], bias is not None))

    def preactivation(self, h: Tensor) -> Tensor:
        by_group: Tensor = h.unflatten(1, (*self.groups, self.rows))
        return by_group.flatten(2 + len(self.groups))

    def along_outputs(self, e: Tensor) -> Tensor:
        return e.view(-1, *[1] * (self.weight.ndim - 2))

    def wrong_input(self, a: Tensor) -> str | None:
        expected = self.weight.ndim
        if a.ndim == expected:
            return None
        return (
            f"{self} takes inputs of {expected} dimensions, (batch, channels, locations), here, "
            f"but got {tuple(a.shape)}: add the batch dimension with x[None]."
        )
