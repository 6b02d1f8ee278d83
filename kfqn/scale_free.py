"""Layers whose scale changes nothing, because their output is normalised: the loss does not see ‖W‖.

Every step makes such a W longer, and steps that are shares of ‖W‖ make it grow without bound, by about a
percent each time. Running statistics of BatchNorm, averages over steps, then lag behind what they describe,
and one day W overflows. So ‖W‖ is kept.

The gradient of such a layer has nothing along W. By that it is known, whatever the modules behind it are.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from kfqn.layers import Layer

DECAY = 0.9  # of the average, a judged step
NOTHING = 0.05  # below this there is nothing along W, not even by chance


def along(n: int, inner: float, norm_W: float, norm: float) -> float:
    """n ⟨W, ∇f⟩² / ‖W‖² ‖∇f‖² of a layer with n weights: 1 on average for directions at random.

    NaN where W or ∇f is zero, or not known.
    """
    lengths = norm_W * norm
    return n * (inner / lengths) ** 2 if lengths > 0 else math.nan


def averaged(average: float, found: float) -> float:
    """With what one batch has shown, at most 1; a gradient that is zero, NaN here, shows nothing."""
    return DECAY * average + (1 - DECAY) * min(found, 1.0) if found >= 0 else average


def keep_norms_(norms: Mapping[Layer, float]) -> None:
    """Make ‖W‖ of every layer, weight and bias together, this positive number, in place."""
    alike: dict[Any, list[Layer]] = {}
    for layer in norms:
        alike.setdefault((layer.weight.device, layer.dtype, layer.bias is None), []).append(layer)
    for (_, dtype, _), layers in alike.items():
        parameters = [layer.parameters() for layer in layers]
        W = [p for of_layer in parameters for p in of_layer]
        lengths = torch.stack(torch._foreach_norm(W, 2, dtype)).view(len(layers), -1)
        now = torch.linalg.vector_norm(lengths, dim=1)
        scales = [*torch.where(now > 0, now.reciprocal(), 0.0).unbind()]
        torch._foreach_mul_(scales, [norms[layer] for layer in layers])
        pairs = zip(scales, parameters, strict=True)
        torch._foreach_mul_(W, [scale.to(p.dtype) for scale, of_layer in pairs for p in of_layer])
