"""Burgers' equation, u_t + u u_x = ν u_xx, solved by a network that knows the equation (Raissi et al. 2019).

On x ∈ [-1, 1], t ∈ [0, 1], with u(0, x) = -sin(πx), u(t, ±1) = 0 and ν = 0.01/π. The points are the same in
all runs, which differ in their first weights alone.
"""

import math
from collections.abc import Iterator
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from kfqn.race import process_group
from kfqn.race.failure import Failure
from kfqn.race.problems.task import Closure, Data, Evaluation, Size, Task

NU = 0.01 / math.pi
INTERIOR, BOUNDARY, INITIAL, TEST = 2000, 100, 100, 10_000  # points
STEPS = 100  # of what is called an epoch: each is on all points
NODES = 120  # of the quadrature


@final
class Points(Data):
    """Fixed random points (t, x), (n, 2), of the interior, the boundary, the start, and to test on."""

    items = "interior points"

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)

        def uniform(n: int) -> Tensor:
            return torch.rand(n, 2, generator=random) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])

        self.interior, self.boundary, self.initial = uniform(INTERIOR), uniform(BOUNDARY), uniform(INITIAL)
        self.test = uniform(TEST)
        self.boundary[:, 1] = self.boundary[:, 1].sign()
        self.initial[:, 0] = 0

    def __len__(self) -> int:
        return len(self.interior)

    def task(self, device: torch.device, size: Size) -> "Burgers":
        return Burgers(self, device, size)


@final
class Burgers(Task):
    """Mean squares of the equation's residual, and of the errors on boundary and start, on all points."""

    steps = STEPS

    def __init__(self, points: Points, device: torch.device, size: Size) -> None:
        if process_group.size() > 1:
            raise Failure("burgers differentiates its inputs, which several processes cannot share: run one.")
        interior, boundary, initial = points.interior[: size.train], points.boundary, points.initial
        self.test = points.test[: size.evaluated].to(device)
        self.points = torch.cat((interior, boundary, initial)).to(device)
        known = torch.cat((torch.zeros(len(boundary)), -torch.sin(math.pi * initial[:, 1])))
        self.known, self.interior = known.to(device), len(interior)
        self.exact = solution(*self.test.double().cpu().unbind(1)).float().to(device)
        self.conditions = {
            "points": f"{len(interior)} interior, {len(boundary)} boundary, {len(initial)} initial",
            "evaluated points": str(len(self.test)),
        }

    def epoch(self, model: nn.Module, generator: torch.Generator) -> Iterator[Closure]:
        def closure() -> Tensor:
            model.zero_grad()
            loss = self.loss(model)
            loss.backward()
            return loss

        for _ in range(self.steps):
            yield closure

    def loss(self, model: nn.Module) -> Tensor:
        """The mean squared residual, plus the mean squared error where u is known."""
        points = self.points.detach().requires_grad_()
        u = model(points)[:, 0]
        u_t, u_x = _gradient(u, points).unbind(1)
        u_xx = _gradient(u_x, points)[:, 1]
        residual = (u_t + u * u_x - NU * u_xx)[: self.interior]
        loss: Tensor = residual.square().mean() + (u[self.interior :] - self.known).square().mean()
        return loss

    def evaluate(self, model: nn.Module) -> Evaluation:
        loss = self.loss(model).item()
        with torch.no_grad():
            error = model(self.test)[:, 0] - self.exact
        return Evaluation(loss, error.square().mean().item(), (error.norm() / self.exact.norm()).item())


def _gradient(values: Tensor, points: Tensor) -> Tensor:
    """The derivatives of each value by its own point, (n, 2)."""
    (gradient,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    return gradient


def solution(t: Tensor, x: Tensor) -> Tensor:
    """u at times t ≥ 0 and places x, float64, (n,): Cole and Hopf's integrals (Basdevant et al. 1986).

    u = -∫ sin(πy) f(y) w(η) dη / ∫ f(y) w(η) dη with y = x - η, f(y) = exp(-cos(πy)/2πν) and w(η) =
    exp(-η²/4νt), by Gauss-Hermite quadrature in z = η/√(4νt).
    """
    z, weights = (torch.from_numpy(values) for values in np.polynomial.hermite.hermgauss(NODES))
    y = x[:, None] - (4 * NU * t)[:, None].sqrt() * z
    logarithm = weights.log() - torch.cos(math.pi * y) / (2 * math.pi * NU)
    shares = (logarithm - logarithm.amax(1, keepdim=True)).exp()
    return -(torch.sin(math.pi * y) * shares).sum(1) / shares.sum(1)
