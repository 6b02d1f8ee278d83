"""Lemmas 1-4 and the bounds (15) of the paper's section 5, as properties over many seeds and shapes."""

import pytest
import torch
from cases import LAYERS

from kfqn.formulas.secant import bfgs_update_, double_damping, lbfgs_matmul, lbfgs_push_
from kfqn.formulas.statistics import damped_inverse, second_moment
from kfqn.parameters.discovery import layers_of

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),  # torch's own
]
SEEDS = range(100)
ROUNDING = 1 + 1e-9
SETTINGS = [(0.2, 0.1), (0.2, 5.0), (0.7, 1.0), (0.01, 0.01)]


def mu3(mu1, mu2):
    return mu1 / (1 + 2 * mu1 * mu2)


def damped_pair(size, mu1, mu2):
    """D_P(I)D_LM of a random pair of random scales, as often as not with negative curvature."""
    s, y = torch.randn(2, size) * 10.0 ** torch.randint(-3, 4, (2, 1))
    return double_damping(s, y, y, mu1, mu2)  # Algorithm 4: H = I


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.parametrize(("mu1", "mu2"), SETTINGS)
def test_lemma_1(mu1, mu2):
    for seed in SEEDS:
        torch.manual_seed(seed)
        s, y = damped_pair(2 + seed % 7, mu1, mu2)
        assert s @ s <= s @ y / mu2 * ROUNDING
        assert y @ y <= s @ y / mu3(mu1, mu2) * ROUNDING


@pytest.mark.parametrize(("mu1", "mu2"), SETTINGS)
def test_lemma_2(mu1, mu2):
    for seed in SEEDS:
        torch.manual_seed(seed)
        size = 2 + seed % 7
        M = torch.randn(size, size)
        H = M @ M.T + 0.1 * torch.eye(size)
        B_norm, H_norm = norm(torch.linalg.inv(H)), norm(H)
        s, y = damped_pair(size, mu1, mu2)
        assert bfgs_update_([H], s[None], y[None])
        # The inverse of an ill-conditioned H has fewer digits, hence the room of its condition number.
        assert norm(torch.linalg.inv(H)) <= (B_norm + 1 / mu3(mu1, mu2)) * (1 + 1e-12 * torch.linalg.cond(H))
        assert norm(H) <= ((1 + (mu2 * mu3(mu1, mu2)) ** -0.5) ** 2 * H_norm + 1 / mu2) * ROUNDING


@pytest.mark.parametrize(("mu1", "mu2"), [(0.2, 1.0), (0.2, 5.0)])
def test_lemma_3(mu1, mu2):
    """The eigenvalues of the L-BFGS H_G stay between the proof's two constants, whatever pairs come in."""
    p, lower = 3, 1 / (1 + 3 / mu3(mu1, mu2))
    growth = (1 + (mu2 * mu3(mu1, mu2)) ** -0.5) ** 2
    upper = growth**p + (growth**p - 1) / (growth - 1) / mu2
    for seed in SEEDS:
        torch.manual_seed(seed)
        size = 2 + seed % 7
        S, Y = torch.zeros(2, p, size)
        for _ in range(2 * p):
            lbfgs_push_(S, Y, *damped_pair(size, mu1, mu2))
            H = lbfgs_matmul(S, Y, torch.eye(size))
            eigenvalues = torch.linalg.eigvalsh((H + H.T) / 2)
            assert lower <= eigenvalues.min() * ROUNDING
            assert eigenvalues.max() <= upper * ROUNDING


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("phi", [0.1, 3.0])
def test_lemma_4_and_the_bounds_15(name, phi):
    case, lambda_A = LAYERS[name], 0.5
    (layer,) = layers_of(case())
    a = phi * (2 * torch.rand(3, *case.shape) - 1)  # AS.3
    A = second_moment(layer.inputs, a)
    T = torch.Size(layer.inputs.locations(a)).numel()
    bound = (layer.fan_in * phi**2 + 1) * T
    assert torch.linalg.eigvalsh(A).max() <= bound
    H_A = torch.linalg.eigvalsh(damped_inverse(A, lambda_A))
    assert 1 / (bound + lambda_A) <= H_A.min() * ROUNDING
    assert H_A.max() <= 1 / lambda_A * ROUNDING
