"""A layer's step before it is taken, and whether it can be: pure functions of numbers and norms."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfqn.layers import Layer


class Move(NamedTuple):
    """A layer's step before it is taken: P, ⟨P, D̂W⟩, ‖P‖, ‖W‖, and whether they can be those of a positive H.

    ``size`` is ‖W‖, or a tenth of the norm of a usual initialisation where that is more.
    """

    P: Tensor
    slope: float
    norm: float
    norm_W: float
    size: float
    sound: bool


def judged(
    layer: Layer, rate: float, P: Tensor, slope: float, norm: float, norm_DW: float, *norms_W: float
) -> Move:
    """A positive H has ⟨P, D̂W⟩ ≥ 0, up to rounding; weights must stay in the range of their type."""
    norm_W = math.hypot(*norms_W)
    rounding = math.sqrt(torch.finfo(layer.dtype).eps) * norm * norm_DW
    reach, limit = norm_W + rate * norm, torch.finfo(layer.weight.dtype).max
    sound = math.isfinite(slope) and slope >= -rounding and reach < limit
    return Move(P, slope, norm, norm_W, max(norm_W, 0.1 * math.sqrt(layer.outputs)), sound)


def are_finite(values: Sequence[Tensor], order: float) -> Tensor:
    """Whether all entries are. The norm of order 2 is by far the fastest, but may overflow."""
    norms = [norm.to(values[0].device) for norm in torch._foreach_norm([*values], order)]
    return torch.stack(norms).isfinite().all()
