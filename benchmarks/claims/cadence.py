r"""What learning curvature at fewer steps costs in training loss: KF-BFGS on one problem, variant by variant.

    python -m benchmarks.claims.cadence [--problem digits] [--lr 30] [--damping 30] [--seeds 2]
    python -m benchmarks.claims.cadence --problem cifar10-allcnn --lr 100 --damping 30 --seeds 1 --epochs 18 \
        --width 8 --train-size 2560 --data-dir DIR

One thread. Loss is that of the weights over the training images; seconds are CPU seconds of steps, by which
variants of one run may be compared. The default is in the first line.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kfqn
from benchmarks.timing import epoch, evaluated, show_conditions
from kfqn.race.problems import PROBLEMS, Problem
from kfqn.race.problems.data import Dataset


@dataclass(frozen=True)
class Variant:
    """The longest gap between steps that are learnt from; warm-up batches; how many blocks factors have."""

    interval: int = 10
    warm_up: int = 0
    parts: int | None = None


VARIANTS = {
    "at gaps up to 10 steps (default)": Variant(),
    "at every step (the paper)": Variant(interval=1),
    "at every step, H_A from an epoch (the paper)": Variant(interval=1, warm_up=10**9),
    "default, H_A from an epoch": Variant(warm_up=10**9),
    "at gaps up to 30 steps": Variant(interval=30),
    "default, factors up to 1/2 of the largest": Variant(parts=2),
    "default, factors up to 1/4": Variant(parts=4),
    "default, factors up to 1/8": Variant(parts=8),
}


def largest_side(model: nn.Module) -> int:
    """That of the factors of the model's layers, where nothing limits them."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return max(max(len(m.weight), m.weight[0].numel() + (m.bias is not None)) for m in layers)


def losses(
    problem: Problem, variant: Variant, options: argparse.Namespace, seed: int
) -> tuple[list[float], float]:
    """The training loss after every epoch, and the seconds of an epoch's steps."""
    torch.manual_seed(seed)
    whole = problem.data(options.data_dir)
    assert isinstance(whole, Dataset)
    data = whole.to(torch.device("cpu"), options.train_size)
    model, m = problem.network(options.width), problem.batch_size
    optimizer = kfqn.KFBFGS(
        model,
        lr=options.lr,
        damping=options.damping,
        weight_decay=problem.weight_decay,
        curvature_interval=variant.interval,
        max_factor_size=largest_side(model) // variant.parts if variant.parts else None,
    )
    if variant.warm_up:
        same = torch.Generator().manual_seed(seed)
        optimizer.warm_start([x for x, _ in data.training_batches(m, same)][: variant.warm_up])
    generator, found, seconds = torch.Generator().manual_seed(seed), [], 0.0
    for _ in range(options.epochs or problem.epochs):
        seconds += epoch(model, optimizer, data.training_batches(m, generator), F.cross_entropy)[1]
        found.append(evaluated(model, data.in_order(data.train), F.cross_entropy))
    return found, seconds / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--lr", type=float, default=30.0)
    parser.add_argument("--damping", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = PROBLEMS[options.problem]
    show_conditions(threads=1, seeds=options.seeds)
    epochs = options.epochs or problem.epochs
    shown = sorted({max(1, epochs // 9), max(1, epochs // 3), 2 * epochs // 3, epochs})
    print(f"{'training loss after epoch':<46}" + "".join(f"{n:>10}" for n in shown) + f"{'s an epoch':>12}")
    for name, variant in VARIANTS.items():
        runs = [losses(problem, variant, options, seed) for seed in range(options.seeds)]
        means = [statistics.mean(found[n - 1] for found, _ in runs) for n in shown]
        seconds = statistics.mean(seconds for _, seconds in runs)
        print(f"  {name:<44}" + "".join(f"{v:>10.3g}" for v in means) + f"{seconds:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
