"""Secant pairs (s, y): damping them, and keeping an H with H y = s, dense or from a history.

B is the symmetric matrix whose inverse H approximates; a pair samples its action,
y ≈ B s. Nothing here knows of networks, and no function reads a scalar back to the
host: what may be used is decided by ``torch.where``.
"""

import math

import torch
from torch import Tensor


def double_damping(s: Tensor, y: Tensor, Hy: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1, D_P D_LM: make the pair (s, y) safe for a BFGS update of H.

    ``s``, ``y`` and ``Hy`` = H @ y are vectors of one length; passing y itself as ``Hy``
    gives Algorithm 4, D_P(I) D_LM, whose result also satisfies Lemma 1. However negative sᵀy
    came in, the result (s̃, ỹ) has s̃ᵀỹ ≥ μ₂ s̃ᵀs̃ (section 3.1). Needs 0 < μ₁ < 1
    and μ₂ > 0. A zero y is left alone (θ₁ = 1), never divided by.
    """
    sy, yHy = s @ y, y @ Hy
    theta = torch.where(sy < mu1 * yHy, (1 - mu1) * yHy / (yHy - sy), 1.0)  # lines 2-6
    s = theta * s + (1 - theta) * Hy  # line 7, Powell
    y = y + mu2 * s  # line 8, Levenberg-Marquardt
    return s, y


def bfgs_update_(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Update the symmetric H in place so that H y = s, eq. (9); say whether it was done.

    With u = ρ (½ (1 + ρ yᵀHy) s − Hy), eq. (9) reads H⁺ = H + s uᵀ + u sᵀ: one pass over
    H, and ρ² is never formed (it overflows in float32 for pairs that are merely small).

    Returns a boolean scalar tensor: False, and H is untouched, unless sᵀy is positive (and large
    enough to be accurate) and s and u are finite.
    """
    sy, Hy = s @ y, H @ y
    u = ((1 + (y @ Hy) / sy) / 2 * s - Hy) / sy
    su = torch.stack((s, u))
    usable = (sy > _smallest(sy.dtype)) & su.isfinite().all()
    su = torch.where(usable, su, 0.0)
    H.addmm_(su.T, su.flip(0))
    return usable


def lbfgs_push_(S: Tensor, Y: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Append a pair to the history in place, dropping the oldest; say whether it was done.

    ``S`` and ``Y`` hold p pairs as rows, (p, I), the newest last; a row of zeros is a
    place not yet filled.

    Returns a boolean scalar tensor: False, and the history is untouched, unless sᵀy is
    positive (and large enough to be accurate) and finite, and so are s and y.
    """
    sy = s @ y
    usable = (sy > _smallest(sy.dtype)) & (sy < math.inf) & torch.stack((s, y)).isfinite().all()
    S.copy_(torch.where(usable, torch.cat((S[1:], s[None])), S))
    Y.copy_(torch.where(usable, torch.cat((Y[1:], y[None])), Y))
    return usable


def lbfgs_matmul(S: Tensor, Y: Tensor, V: Tensor) -> Tensor:
    """H V for the H that the pairs in the history make from H₀ = I by eq. (14), without forming it.

    The compact representation (Byrd, Nocedal and Schnabel 1994, theorem 2.2, γ = 1), as
    section 3.4 asks, because V is a matrix. ``S`` and ``Y`` (p, I) as `lbfgs_push_` keeps
    them, ``V`` (I, C); O(pIC + p²C) operations.
    """
    SY = S @ Y.T
    filled = SY.diagonal() > 0
    D = torch.where(filled, SY.diagonal(), 1.0)
    R = SY.triu(1) + D.diag()  # an unfilled row becomes a row of I, and takes no part
    RSV = torch.linalg.solve_triangular(R, S @ V, upper=True)  # R⁻¹ S V
    middle = D[:, None] * RSV + Y @ (Y.T @ RSV) - Y @ V
    correction: Tensor = S.T @ torch.linalg.solve_triangular(R.T, middle, upper=False) - Y.T @ RSV
    return V + correction


def _smallest(dtype: torch.dtype) -> float:
    """A sum of products this small still has all its digits; below, averages that only decay would count."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps
