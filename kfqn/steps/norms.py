"""Scale-invariant weights: where the output of a layer is normalised, the loss does not see ‖W‖ (M20).

Every step makes such a W longer, and steps that are shares of ‖W‖ make it grow without bound, by about a
percent each time. Running statistics of BatchNorm, averages over steps, then lag behind what they describe,
and one day W overflows. So ‖W‖ is kept.

The gradient of such a layer has nothing along W. By that it is known, whatever the modules behind it are.

A group keeps, for each of its layers, the radial component of its gradient, along W, as an average
(``radial``), and the norm that is kept, or 0 (``kept_norms``); after a step that was taken back they are kept
anew, so that a step without a length moves nothing.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfqn.parameters.groups import note
from kfqn.parameters.layers import Layer
from kfqn.steps.rule import Members

DECAY = 0.9  # of the average, a judged step
ROUNDING = 0.01  # of ‖W‖ is what weights in half precision may drift by in a step
NOTHING = 0.05  # below this there is nothing along W, not even by chance


def radial_share(n: int, inner: float, norm_W: float, norm: float) -> float:
    """n ⟨W, ∇f⟩² / ‖W‖² ‖∇f‖² of a layer with n weights: 1 on average for directions at random.

    NaN where W or ∇f is zero, or not known.
    """
    lengths = norm_W * norm
    return n * (inner / lengths) ** 2 if lengths > 0 else math.nan


def averaged(average: float, found: float) -> float:
    """With what one batch has shown, at most 1; a gradient that is zero, NaN here, shows nothing."""
    return DECAY * average + (1 - DECAY) * min(found, 1.0) if found >= 0 else average


def radial_products(members: Members, before: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """⟨W, ∇f⟩ of every parameter, and then ‖∇f‖ of every one; NaN of one that did not move.

    ``before`` has the weights that ∇f belongs to.
    """
    parameters = [p for _, layers, _ in members for layer in layers for p in layer.parameters()]
    like = next(layer.empty() for _, layers, _ in members for layer in layers)
    moved = {p: p.grad for p in parameters if p in before and p.grad is not None}
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in moved.values()), like.dtype)
    norms = torch._foreach_norm([*moved.values()], 2, dtype) if moved else ()
    length, unknown = dict(zip(moved, norms, strict=True)), like.new_full((), math.nan)
    inner = {
        p: torch.linalg.vecdot(before[p].flatten().to(like), gradient.flatten().to(like))
        for p, gradient in moved.items()
    }
    return [of.get(p, unknown) for of in (inner, length) for p in parameters]


def note_radial(members: Members, norms_W: Mapping[Layer, float], found: Sequence[float]) -> None:
    """Take in `radial_products`, as numbers, given ‖W‖ of the layers that moved."""
    inner, length = iter(found[: len(found) // 2]), iter(found[len(found) // 2 :])
    for group, layers, _ in members:
        before, now = group["progress"]["radial"] or (1.0,) * len(layers), []
        for layer in layers:
            n, count = sum(p.numel() for p in layer.parameters()), len(layer.parameters())
            towards = sum(itertools.islice(inner, count))
            norm = math.hypot(*itertools.islice(length, count))
            now.append(radial_share(n, towards, norms_W.get(layer, 0.0), norm))
        note(group, radial=[*map(averaged, before, now)])


def keep_norms(members: Members, before: Mapping[Layer, float]) -> None:
    """Put ‖W‖ back to what it was when the layer's gradients were first known to have nothing along W.

    ``before`` has that of the layers that moved, before they did; where it is another by more than
    `ROUNDING`, somebody else has changed W, and it counts from then on.
    """
    kept: dict[Layer, float] = {}
    for group, layers, _ in members:
        found = []
        averages = group["progress"]["radial"] or (1.0,) * len(layers)
        norms = group["progress"]["kept_norms"] or (0.0,) * len(layers)
        for layer, average, norm in zip(layers, averages, norms, strict=True):
            now = before.get(layer, norm)
            found.append((norm if abs(now - norm) <= ROUNDING * norm else now) if average < NOTHING else 0.0)
            if found[-1] and layer in before:
                kept[layer] = found[-1]
        note(group, kept_norms=found)
    keep_norms_(kept)


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
