"""What each way to learn less curvature costs in training loss: KF-BFGS on one problem, variant by variant.

    python benchmarks/thrift.py [--problem digits] [--lr 30] [--damping 30] [--seeds 2]
    python benchmarks/thrift.py --problem cifar10-allcnn --lr 100 --damping 30 --seeds 1 --epochs 18 \
        --width 8 --train-size 2560 --data-dir DIR

One thread. Loss is that of the weights over the training images; seconds are CPU seconds of steps, by which
variants of one run may be compared. The default is in the first line.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import kfqn
from kfqn.formulas.statistics import mean_preactivation
from kfqn.passes.recorder import Look
from kfqn.race.problems import PROBLEMS, Problem
from kfqn.race.runs.conditions import conditions_of


@dataclass(frozen=True)
class Variant:
    """How often curvature is learnt, from which share of the batch; warm batches; how large factors are."""

    interval: int = 10
    part: float = 1.0
    warm: int = 0
    largest: int | None = None


VARIANTS = {
    "at gaps up to 10 steps (default)": Variant(),
    "at every step (the paper)": Variant(interval=1),
    "at every step, H_A from an epoch (the paper)": Variant(interval=1, warm=10**9),
    "default, H_A from an epoch": Variant(warm=10**9),
    "at gaps up to 30 steps": Variant(interval=30),
    "default, second pass over half the batch": Variant(part=0.5),
    "default, second pass over a quarter": Variant(part=0.25),
    "at every step, second pass over a quarter": Variant(interval=1, part=0.25),
    "default, factors up to 1/2 of the largest": Variant(largest=2),
    "default, factors up to 1/4": Variant(largest=4),
    "default, factors up to 1/8": Variant(largest=8),
}


def losses(
    problem: Problem, variant: Variant, options: argparse.Namespace, seed: int
) -> tuple[list[float], float]:
    """The training loss after every epoch, and the seconds of an epoch's steps."""
    torch.manual_seed(seed)
    data = problem.data(options.data_dir).to(torch.device("cpu"), options.train_size)
    model, m = problem.network(options.width), problem.batch_size
    if variant.largest is not None:
        layers = kfqn.KFBFGS(model)._layers
        side = max(max(layer.rows, layer.columns) for layer in layers)
        variant = replace(variant, largest=side // variant.largest)
    part = round(variant.part * m)
    with mock.patch.object(kfqn.KFBFGS, "_first_look", _look(part)):
        optimizer = kfqn.KFBFGS(
            model,
            lr=options.lr,
            damping=options.damping,
            weight_decay=problem.weight_decay,
            curvature_interval=variant.interval,
            max_factor_size=variant.largest,
        )
        same = torch.Generator().manual_seed(seed)
        if variant.warm:
            optimizer.warm_start([x for x, _ in data.training_batches(m, same)][: variant.warm])
        generator, found, seconds = torch.Generator().manual_seed(seed), [], 0.0
        for _ in range(options.epochs or problem.epochs):
            model.train()
            for x, y in data.training_batches(m, generator):
                start = time.process_time()
                optimizer.step(_closure(model, x, y, part))
                seconds += time.process_time() - start
            model.eval()
            with torch.no_grad():
                batches = data.in_order(data.train)
                total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
            found.append(total / len(data.train))
    return found, seconds / len(found)


def _look(part: int) -> Look:
    """A first pass in which h̄ and Dh̄ are means over the first ``part`` data alone."""
    return Look(
        inputs=True,
        h=lambda h: mean_preactivation(h[:part]),
        Dh=lambda gradient: len(gradient) * mean_preactivation(gradient[:part]),
    )


def _closure(model: torch.nn.Module, x: Tensor, y: Tensor, part: int) -> Callable[[], Tensor]:
    """The whole batch the first time, its first ``part`` data the second."""
    sizes = iter((len(x), part))

    def evaluate() -> Tensor:
        size = next(sizes)
        model.zero_grad()
        loss = F.cross_entropy(model(x[:size]), y[:size])
        loss.backward()
        return loss

    return evaluate


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
    facts = conditions_of(torch.device("cpu")) | {"threads": "1", "seeds": str(options.seeds)}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
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
