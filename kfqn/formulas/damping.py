"""``damping="auto"``: λ_A and λ_G of every layer's own size, where the paper has one √λ for all.

λ_A is a hundredth of ‖A‖, Frobenius' norm of the A that H_A starts from: where inputs have a large mean, as
after ReLU, about A's largest eigenvalue, that of the mean. Where a mini-batch has fewer a_t than they have
entries, C, it is larger in proportion: such an A is singular, and along directions that it does not tell
about a step would be made for its own batch alone. Where H_G learns, λ_G is the average of ‖y_G‖/‖s_G‖, the
curvature that is met; a pair is learnt in units of it, (s, y/λ_G), damped with μ₂ = 1, so that the H_G that
is kept is λ_G times the inverse Hessian, and starts from I whatever the units of the loss are.

Nothing here reads a number back to the host.
"""

import torch
from torch import Tensor

from kfqn.formulas.secant import smallest

SHARE = 0.01  # of ‖A‖ is λ_A
LEAST_WEIGHT = 0.05  # of a new pair in the average; the first ones weigh more


def damping_A(A: Tensor, for_each: Tensor) -> Tensor:
    """λ_A, (*g,), of A (*g, C, C), as in (M1); 1 where nothing has come in yet.

    ``for_each``, (), is how many a_t a mini-batch has for each of their entries (all, where A is in blocks).
    """
    largest = A.diagonal(dim1=-2, dim2=-1).amax(-1)  # entry; its square may overflow
    known = largest > smallest(largest.dtype)
    largest = torch.where(known, largest, 1.0)
    norm = largest * torch.linalg.matrix_norm(A / largest[..., None, None])
    return torch.where(known, SHARE * norm * (1 / for_each).clamp(min=1), 1.0)


def damping_G(lambda_G: Tensor, s: Tensor, y: Tensor, steps: Tensor) -> Tensor:
    """λ_G, (*g, 1), with a pair (*g, I) averaged in: all of it the first time, where it is 0.

    ``steps``, (*g, 1), have been taken before; a pair without a size leaves λ_G as it was.
    """
    length, change = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (s, y))
    met = change / length
    known = met.isfinite() & (length > smallest(length.dtype)) & (change > smallest(change.dtype))
    usual = (1 / steps.clamp(min=1)).clamp(min=LEAST_WEIGHT)
    weight = torch.where(lambda_G > 0, usual.to(lambda_G), 1.0)
    return torch.where(known, lambda_G.lerp(met, weight), lambda_G)


def in_units_of(lambda_G: Tensor, y: Tensor) -> Tensor:
    """y/λ_G, (*g, I), for λ_G (*g, 1); y itself where λ_G is not known yet."""
    return y / torch.where(lambda_G > 0, lambda_G, 1.0)
