"""Theorem 1 seen at work: the running mean of ‖∇f(θ_k)‖² under Algorithm 3 with α_k = c k^(−β).

A small convolutional network with tanh on the digits: smooth (AS.1), inputs of every layer bounded
(AS.3), mini-batches drawn independently (AS.2). The theorem bounds the mean over k ≤ K of E‖∇f‖² by a
constant times K^(β−1), plus a term that falls faster; the gradient of the whole training set is
computed at every step to see it.

    python -m benchmarks.claims.theorem_1 --out docs/theorem-1.png
"""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import kfqn
from kfqn.race.problems.data import digits
from kfqn.race.report.palette import COLORS, GREY
from kfqn.race.runs.files import atomic_path

EXPONENTS = (0.55, 0.7, 0.85)  # β of α_k = c k^(−β), in (0.5, 1)
BATCH = 64
IMAGES = 512  # the training set here: its whole gradient is computed at every step


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def squared_gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return sum(g.double().square().sum().item() for g in gradients)


def trajectory(seed: int, exponent: float, lr: float, damping: float, steps: int) -> list[float]:
    """‖∇f(θ_k)‖² for k = 1 … steps."""
    torch.manual_seed(seed)
    data = digits()
    train = data.train.first(IMAGES)
    x, y = data.normalised(train.x), train.y
    model = network()
    optimizer = kfqn.ConvergentKFLBFGS(model, lr=lr, damping=damping)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) ** -exponent)
    optimizer.warm_start(x.split(256))
    generator, norms = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        norms.append(squared_gradient(model, x, y))
        batch = torch.randint(len(y), (BATCH,), generator=generator)
        optimizer.step(kfqn.closure(model, x[batch], y[batch], F.cross_entropy))
        scheduler.step()
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=10.0, help="c of α_k = c k^(−β)")
    parser.add_argument("--damping", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("theorem-1.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    figure = Figure(figsize=(4.2 * len(EXPONENTS), 4.2), layout="constrained")
    panels = figure.subplots(1, len(EXPONENTS), sharey=True, squeeze=False)[0]
    K = np.arange(1, options.steps + 1)
    late = options.steps / 10 <= K  # the last decade, for the slope
    print(f"{options.seeds} seeds, {options.steps} steps, c = {options.lr:g}, damping {options.damping:g}")
    for panel, exponent in zip(panels, EXPONENTS, strict=True):
        means = []
        for seed in range(options.seeds):
            norms = trajectory(seed, exponent, options.lr, options.damping, options.steps)
            means.append(np.cumsum(norms) / K)
            panel.loglog(K, means[-1], color=COLORS["kflbfgs"], linewidth=1, alpha=0.7)
        mean = np.mean(means, axis=0)
        slope = np.polyfit(np.log(K[late]), np.log(mean[late]), 1)[0]
        bound = K ** (exponent - 1.0)
        bound *= np.max(mean / bound)
        panel.loglog(K, bound, color=GREY, linestyle="--", label=f"slope β − 1 = {exponent - 1:.2f}")
        panel.set_title(f"α_k = {options.lr:g} k^(−{exponent:g}), slope at the end {slope:.2f}", fontsize=10)
        panel.set_xlabel("K")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
        ratio = mean / K ** (exponent - 1.0)
        last = ratio[-1] / ratio[math.ceil(options.steps / 10)]
        print(
            f"beta {exponent:g}: mean of |grad f|^2 {mean[-1]:.3g}, slope over the last decade "
            f"{slope:.2f}, bound {exponent - 1:.2f}, mean / K^(beta-1) grew by {last:.2f} over it",
            flush=True,
        )
    panels[0].set_ylabel("1/K Σ ‖∇f(θ_k)‖²")
    with atomic_path(options.out) as partial:
        figure.savefig(partial, format=options.out.suffix[1:], dpi=130)


if __name__ == "__main__":
    main()
