"""What processes that share a model by `fully_shard` exchange, and how long a step takes, beside AdamW.

    python -m benchmarks.cost.sharded [--models resnet gpt] [--width 192] [--processes 2] [--rounds 20]

Starts the processes itself, on the CPU with gloo. Bytes are of the tensors that a process gives to or gets
from a collective call, the larger of both: of the pass, which is the same for all optimizers, and of `step`,
of ours also where A is learnt, at about every 40th. Seconds are medians of a pass and a step, in turn, of
steps that learn nothing; where processes share few cores their ratios say nothing of other machines.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kfqn
from benchmarks.timing import in_turn, show_conditions
from kfqn.race.problems.resnet import Block, resnet20
from kfqn.race.problems.transformers import Block as OfTransformer
from kfqn.race.problems.transformers import CharacterGPT

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "KFBFGS": kfqn.KFBFGS,
}
Batch = tuple[Tensor, Tensor]


class Exchanged(TorchDispatchMode):
    """Counts the bytes of collective calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
            self.bytes += max((x.nbytes for x in tensors), default=0)
        return result


def made(name: str, width: int) -> tuple[nn.Module, Batch]:
    """A model and this process's share of a batch, random."""
    if name == "resnet":
        return resnet20(10), (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))
    x, y = torch.randint(101, (2, 12, 64))
    return CharacterGPT(101, width), (x, y.flatten())


def sharded(model: nn.Module) -> nn.Module:
    """Block by block, then what is left."""
    for module in [m for m in model.modules() if isinstance(m, Block | OfTransformer)]:
        fully_shard(module)
    fully_shard(model)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[int, int]:
    """Bytes of a pass, and of the step after it."""
    optimizer.zero_grad()
    with Exchanged() as of_pass:
        F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1]).backward()
    with Exchanged() as of_step:
        optimizer.step()
    return of_pass.bytes, of_step.bytes


def compare(name: str, width: int, rounds: int) -> None:
    """Two lines of the table, printed by the first process."""
    torch.manual_seed(0)
    model, batch = made(name, width)
    models = {of: sharded(copy.deepcopy(model)) for of in OPTIMIZERS}
    optimizers = {of: make(models[of]) for of, make in OPTIMIZERS.items()}
    ways = {of: partial(step, models[of], optimizers[of], batch) for of in OPTIMIZERS}
    learnt = {of: way()[1] for of, way in ways.items()}
    found = in_turn(ways, min(rounds, 37), 2)  # before A is learnt again
    for of in OPTIMIZERS if dist.get_rank() == 0 else ():
        (of_pass, of_step), seconds = found[of][-1][1], statistics.median(s for s, _ in found[of])
        cells = [f"{x / 1e6:.3f}" for x in (of_pass, of_step, learnt[of])]
        print(f"| {name}, {of} | {' | '.join(cells)} | {seconds:.4f} |", flush=True)


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("resnet", "gpt"), default=["resnet", "gpt"])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    if "RANK" not in os.environ:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.processes)]
        command = [sys.executable, *run, "-m", "benchmarks.cost.sharded", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        show_conditions(processes=given.processes, threads=1, rounds=given.rounds, width=given.width)
        print("| | pass, MB | step, MB | step that learns, MB | s |\n| --- | --- | --- | --- | --- |")
    for name in given.models:
        compare(name, given.width, given.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
