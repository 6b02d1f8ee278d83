"""The time of one step as a ratio to torch.optim.SGD, interleaved in one process.

Every optimizer trains its own copy of one network on one batch. In each round every one of them
takes a step, so that a machine that slows down slows all of them; a ratio is the
median over the rounds of a step's time over SGD's in the same round.

    python benchmarks/step_time.py [--rounds 15] [--threads 2] [--device cpu]
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn
from kfqn.race.models import all_cnn_c
from kfqn.race.train import conditions_of

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
    "KF-BFGS": lambda model: kfqn.KFBFGS(model, lr=0.1, damping=30.0),
    "KF-BFGS(L)": lambda model: kfqn.KFLBFGS(model, lr=0.1, damping=30.0),
    "KFAC": lambda model: kfqn.KFAC(model, lr=0.1, damping=30.0),
}


def vgg_like() -> nn.Module:
    """Three 3×3 convolutions from 512 to 512 channels, as at the end of VGG16, and a classifier."""
    layers = [
        module for _ in range(3) for module in (nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "All-CNN-C, batch 128": (lambda: all_cnn_c(10), (128, 3, 32, 32)),
    "3 × 512×512 3×3 on 4×4, batch 128": (vgg_like, (128, 512, 4, 4)),
}


def seconds_of_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    closure = kfqn.closure(model, x, y, F.cross_entropy)
    synchronise(x.device)
    start = time.perf_counter()
    optimizer.step(closure)  # type: ignore[arg-type]
    synchronise(x.device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: nn.Module, shape: tuple[int, ...], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    torch.manual_seed(0)
    x, y = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)
    models = {name: copy.deepcopy(model).to(device) for name in OPTIMIZERS}
    optimizers = {name: make(models[name]) for name, make in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for round_ in range(rounds + 2):
        for name, optimizer in optimizers.items():
            seconds = seconds_of_a_step(models[name], optimizer, x, y)
            if round_ >= 2:  # the first builds A, the second warms caches
                times[name].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = conditions_of(device) | {"threads": str(options.threads), "rounds": str(options.rounds)}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for title, (make, shape) in PROBLEMS.items():
        times = measure(make(), shape, options.rounds, device)
        print(
            f"\n{title}: SGD {statistics.median(times['SGD']):.4f} s a step; ratio to it, median (quartiles)"
        )
        for name in times:
            ratios = [t / sgd for t, sgd in zip(times[name], times["SGD"], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            print(f"  {name:<12}{median:.2f}  ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    main()
