"""Secant pairs (s, y): damping them, and keeping an H with H y = s, dense or from a history.

B is the symmetric matrix whose inverse H approximates; a pair samples its action,
y ≈ B s. Leading dimensions ``*g`` are any number of independent such problems, none for most
layers; of several H the pairs are rows, one for each problem of each H (`kfqn.formulas.rows`). Nothing
here knows of networks, and no function reads a scalar back to the host: what may be used is decided by
``torch.where``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfqn.formulas.rows import Rows


def double_damping(s: Tensor, y: Tensor, Hy: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1, D_P D_LM: make the pair (s, y) safe for a BFGS update of H.

    ``s``, ``y`` and ``Hy`` = H y are vectors (*g, n); passing y itself as ``Hy``
    gives Algorithm 4, D_P(I) D_LM, whose result also satisfies Lemma 1. However negative sᵀy
    came in, the result (s̃, ỹ) has s̃ᵀỹ ≥ μ₂ s̃ᵀs̃ (section 3.1). Needs 0 < μ₁ < 1
    and μ₂ > 0. A zero y is left alone (θ₁ = 1), never divided by.
    """
    sy, yHy = dot(s, y), dot(y, Hy)
    theta = torch.where(sy < mu1 * yHy, (1 - mu1) * yHy / (yHy - sy), 1.0)  # lines 2-6
    s = theta * s + (1 - theta) * Hy  # line 7, Powell
    y = y + mu2 * s  # line 8, Levenberg-Marquardt
    return s, y


def bfgs_update_(Hs: Sequence[Tensor], s: Tensor, y: Tensor) -> Tensor:
    """Update every symmetric H (*g, n, n) in place so that H y = s, eq. (9), for rows s and y.

    With u = ρ (½ (1 + ρ yᵀHy) s − Hy), eq. (9) reads H⁺ = H + s uᵀ + u sᵀ: one pass over
    H, and ρ² is never formed (it overflows in float32 for pairs that are merely small).

    Returns for every row, (rows, 1), whether it was done: not, and H is untouched, unless sᵀy is
    positive (and large enough to be accurate) and s and u are finite.
    """
    rows = Rows([H.shape[:-1] for H in Hs])
    sy, Hy = dot(s, y), rows.join([*map(matvec, Hs, rows.part(y))])
    u = ((1 + dot(y, Hy) / sy) / 2 * s - Hy) / sy
    su = torch.stack((s, u), dim=-2)
    usable = (sy > smallest(sy.dtype)) & su.flatten(1).isfinite().all(-1, keepdim=True)
    su = torch.where(usable[..., None], su, 0.0)
    for H, su_H, us_H in zip(Hs, rows.by_layer(su), rows.by_layer(su.flip(-2)), strict=True):
        n = H.shape[-1]
        H.view(-1, n, n).baddbmm_(su_H[..., :n].mT, us_H[..., :n])
    return usable


def lbfgs_push_(S: Tensor, Y: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Append a pair (*g, n) to the history in place, dropping the oldest; say where it was done.

    ``S`` and ``Y`` hold p pairs as rows, (*g, p, n), the newest last; a row of zeros is a
    place not yet filled.

    Returns a boolean tensor (*g,): False, and the history is untouched, unless sᵀy is
    positive (and large enough to be accurate) and finite, and so are s and y.
    """
    sy = dot(s, y)[..., 0]
    usable = (sy > smallest(sy.dtype)) & (sy < math.inf) & (s.isfinite() & y.isfinite()).all(-1)
    for history, new in ((S, s), (Y, y)):
        pushed = torch.cat((history[..., 1:, :], new[..., None, :]), dim=-2)
        history.copy_(torch.where(usable[..., None, None], pushed, history))
    return usable


def lbfgs_matmul(S: Tensor, Y: Tensor, V: Tensor) -> Tensor:
    """H V for the H that the pairs in the history make from H₀ = I by eq. (14), without forming it.

    The compact representation (Byrd, Nocedal and Schnabel 1994, theorem 2.2, γ = 1), as
    section 3.4 asks, because V is a matrix. ``S`` and ``Y`` (*g, p, n) as `lbfgs_push_` keeps
    them, ``V`` (*g, n, c); O(pnc + p²c) operations, or O(pn² + p²n + n²c) where it pays to form H.
    """
    p, n, c = *S.shape[-2:], V.shape[-1]
    if c > n and n * (4 * p + c) < 4 * p * c:
        eye = torch.eye(n, dtype=V.dtype, device=V.device).expand(*V.shape[:-2], n, n)
        return lbfgs_matmul(S, Y, eye) @ V
    SY = S @ Y.mT
    diagonal = SY.diagonal(dim1=-2, dim2=-1)
    D = torch.where(diagonal > 0, diagonal, 1.0)
    R = SY.triu(1) + D.diag_embed()  # an unfilled row becomes a row of I, and takes no part
    RSV = torch.linalg.solve_triangular(R, S @ V, upper=True)  # R⁻¹ S V
    middle = D[..., None] * RSV + Y @ (Y.mT @ RSV) - Y @ V
    correction: Tensor = S.mT @ torch.linalg.solve_triangular(R.mT, middle, upper=False) - Y.mT @ RSV
    return V + correction


def dot(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy of vectors (*g, n), as (*g, 1)."""
    product: Tensor = torch.linalg.vecdot(x, y)
    return product[..., None]


def matvec(H: Tensor, y: Tensor) -> Tensor:
    """H y, (*g, n), for H (*g, n, n) and y (*g, n)."""
    return (H @ y[..., None])[..., 0] if y.ndim > 1 else H @ y


def smallest(dtype: torch.dtype) -> float:
    """A sum of products this small still has all its digits; below, averages that only decay would count."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps
