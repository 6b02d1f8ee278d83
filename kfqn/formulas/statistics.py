"""Statistics of A (KFAC's Ω), of G and of KFAC's Γ for one layer and one mini-batch of m data.

Scales, the usual source of wrong factors: A is a mean over the data and a SUM over the
locations T; ā, h̄, Dh̄ and Γ are means over both (`docs/decisions.md`, 4, 5 and 16). Shapes start with
*g, the groups of a convolution that has any and the blocks of A (`kfqn.formulas.inputs`).
"""

import math

import torch
from torch import Tensor

from kfqn.formulas.inputs import Inputs
from kfqn.formulas.roots import inverse_root

_BLOCK = 2**24  # entries of the a_t that `second_moment` writes out at a time, at the start
_IN_CACHE = 2**20  # entries of the maps that eq. (13) writes out at a time on a CPU


def mean_activation(inputs: Inputs, a: Tensor) -> Tensor:
    """ā = E_n[1/|T| Σ_t a_t(n)], (*g, C), for a layer's input ``a``: where the pair for H_A starts.

    Taking the mean over the data first leaves one datum's work.
    """
    return inputs.mean(_sum_over_data(a, 1 / len(a)))


def second_moment_matvec(inputs: Inputs, a: Tensor, v: Tensor) -> Tensor:
    """A v = E_n[Σ_t (a_t(n)ᵀ v) a_t(n)], (*g, C), eq. (13), without forming A or any a_t.

    On a CPU for a few data at a time, so that its cache holds what is written.
    """
    data = len(a)
    if a.device.type == "cpu":
        maps = math.prod((*inputs.groups, *inputs.locations(a))) * inputs.offsets
        data = max(1, min(data, _IN_CACHE // max(1, maps)))
    first, *rest = (inputs.weighted_sum(part, inputs.inner(part, v)) for part in a.split(data))
    return sum(rest, start=first) / len(a)


def second_moment(inputs: Inputs, a: Tensor, entries: int = _BLOCK) -> Tensor:
    """A = E_n[Σ_t a_t(n) a_t(n)ᵀ], (*g, C, C), eq. (8): dense, O(m|T|C²).

    The a_t are written out for a few data at a time, about so many ``entries``, so memory stays bounded.
    """
    g, C = inputs.groups, inputs.columns
    A = a.new_zeros(math.prod(g), C, C)
    data = max(1, entries // (math.prod((*g, *inputs.locations(a))) * C))
    for block in a.split(data):
        at = inputs.patches(block).movedim(0, -3).reshape(len(A), -1, C)
        A.baddbmm_(at.mT, at)
    return A.view(*g, C, C) / len(a)


def damped_inverse(A: Tensor, damping: float | Tensor) -> Tensor:
    """(A + λ_A I)⁻¹ for a positive semi-definite A (Algorithm 2, line 2).

    By Cholesky factorisation, in float64 where the device has it, because A's condition costs
    digits; that is slow on GPUs with little float64. Raises ValueError if A is not finite.
    """
    exact = A.to(torch.float32 if A.device.type == "mps" else torch.float64, copy=True)
    exact.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, info = torch.linalg.cholesky_ex(exact)
    if not A.isfinite().all() or info.any():
        raise ValueError("the matrix to invert is not finite and positive")
    return torch.cholesky_inverse(factor).to(A.dtype)


def damped_root(A: Tensor, damping: float | Tensor) -> Tensor:
    """(A + λ_A I)^(−½) for a positive semi-definite A (M1); ``damping`` is a number or (*g, 1).

    Within 9 % for a λ_A of a hundredth of ‖A‖ or more (`inverse_root`), of which two polynomials are enough.
    """
    regular = A.clone()
    regular.diagonal(dim1=-2, dim2=-1).add_(damping)
    return inverse_root(regular, polynomials=2)


def mean_preactivation(h: Tensor) -> Tensor:
    """h̄ = E_n[1/|T| Σ_t h_t(n)], (*g, I), the mean that eq. (10) subtracts; ``h`` is (m, *g, I, |T|)."""
    return _mean(h, 1 / len(h))


def mean_preactivation_gradient(gradient: Tensor) -> Tensor:
    """Dh̄ = E_n[1/|T| Σ_t Dh_t(n)], (*g, I), the mean that eq. (11) subtracts.

    ``gradient`` (m, *g, I, |T|) is autograd's, of a loss that is a mean over the batch; Dh
    belongs to one datum's loss, hence a factor m (`docs/decisions.md`, 3).
    """
    return _mean(gradient, 1.0)


def second_moment_of_gradient(gradient: Tensor) -> Tensor:
    """Γ = E_n[1/|T| Σ_t Dh_t(n) Dh_t(n)ᵀ], (*g, I, I), of Algorithm 5.

    ``gradient`` (m, *g, I, |T|) as in `mean_preactivation_gradient`, but of sampled labels; Dh is m
    times it.
    """
    m, locations = len(gradient), gradient.shape[-1]
    Dh = gradient.movedim(0, -2).flatten(-2)
    return (Dh @ Dh.mT).mul_(m / locations)


def _sum_over_data(x: Tensor, weight: float) -> Tensor:
    """``weight`` times the sum of ``x`` (m, …), on a CPU by a product, which reads x twice as fast there."""
    if x.device.type != "cpu":  # where calls cost more than reading
        return x.sum(0).mul_(weight)
    return (x.new_full((len(x),), weight) @ x.flatten(1)).view(x.shape[1:])


def _mean(x: Tensor, weight: float) -> Tensor:
    """``weight`` times the sum over the data of the mean over locations, for ``x`` (m, …, |T|)."""
    if x.device.type != "cpu":
        return x.sum((0, -1)).mul_(weight / x.shape[-1])
    total = _sum_over_data(x, weight)
    return total.mean(-1) if total.shape[-1] > 1 else total[..., 0]
