"""What compiling a model leaves of it: graphs, breaks, what is compiled again, and the time of a step.

    python -m benchmarks.cost.compiled [--models resnet20 vit gpt] [--rounds 40] [--device cuda]

Graphs are those of the first 41 steps, in the last of which H_A learns for the second time; "again" is what
the 45 steps after them, in which it learns once more, compile: on batches of 8, which compile alike. Breaks
are counted by Dynamo. Then steps of compiled AdamW, of KF-BFGS on the compiled model and on the model as it
is take turns on whole batches: a ratio is the median over the rounds of a step's time over another's in the
same round, of steps in which nothing is learnt, and apart of those that learn, here each tenth.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import kfqn
from benchmarks.timing import in_turn, show_conditions, versions
from kfqn.race.problems.resnet import resnet20
from kfqn.race.problems.transformers import CharacterGPT, VisionTransformer

WARM_UP, MORE, EVERY = 41, 45, 10
Loss = Callable[[Callable[..., Any]], Tensor]


def images(side: int, device: torch.device, m: int) -> Loss:
    """Cross-entropy on images that are noise."""
    x, y = torch.randn(m, 3, side, side, device=device), torch.randint(10, (m,), device=device)
    return lambda net: F.cross_entropy(net(x), y)


def characters(device: torch.device, m: int) -> Loss:
    """The same of the next of 64 characters."""
    x = torch.randint(101, (m, 65), device=device)
    return lambda net: F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


Data = Callable[[torch.device, int], Loss]
MODELS: Mapping[str, tuple[str, int, Callable[[], nn.Module], Data]] = {
    "resnet20": ("ResNet-20", 128, partial(resnet20, 10), partial(images, 32)),
    "vit": ("ViT, 3 blocks of 64", 128, partial(VisionTransformer, 10), partial(images, 16)),
    "gpt": ("GPT, 3 blocks of 96", 48, partial(CharacterGPT, 101), characters),
}


@dataclass(frozen=True)
class Run:
    """A model, what runs it, compiled or not, its optimizer and its loss."""

    model: nn.Module
    net: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    loss_of: Loss
    device: torch.device

    def step(self) -> bool:
        """A step of a loop of one's own; whether a factor has learnt."""
        before = versions(self.optimizer)
        self.optimizer.zero_grad()
        self.loss_of(self.net).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return before != versions(self.optimizer)


def graphs_of(run: Run, graphs: CompileCounterWithBackend) -> str:
    """How many graphs there are, at how many breaks, and how many come later."""
    for _ in range(WARM_UP):
        run.step()
    first = graphs.frame_count
    for _ in range(MORE):
        run.step()
    breaks = sum(counters["graph_break"].values())
    return f"{first} graphs, {breaks} breaks, {graphs.frame_count - first} again"


def ratio(found: Mapping[str, list[tuple[float, bool]]], name: str, to: str, learnt: bool) -> str:
    """The median over the rounds, of steps of ``name`` of a kind."""
    of_rounds = zip(found[name], found[to], strict=True)
    ratios = [own / other for (own, kind), (other, _) in of_rounds if kind == learnt]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def show(name: str, rounds: int, device: torch.device, backend: str, m: int | None) -> None:
    """One line of a table."""
    title, usual, build, data = MODELS[name]
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    model, graphs = build().to(device), CompileCounterWithBackend(backend)
    counted, eager, adamw, ours = (copy.deepcopy(model) for _ in range(4))
    few = Run(counted, torch.compile(counted, backend=graphs), kfqn.KFBFGS(counted), data(device, 8), device)
    told = graphs_of(few, graphs)
    torch.compiler.reset()
    loss_of, make = data(device, m or usual), partial(kfqn.KFBFGS, curvature_interval=EVERY)
    compiled = partial(torch.compile, backend=backend)
    runs = {
        "compiled": Run(ours, compiled(ours), make(ours), loss_of, device),
        "eager": Run(eager, eager, make(eager), loss_of, device),
        "AdamW": Run(adamw, compiled(adamw), torch.optim.AdamW(adamw.parameters(), lr=1e-4), loss_of, device),
    }
    found = in_turn({name: run.step for name, run in runs.items()}, rounds, warm_up=EVERY + 2)
    columns = [ratio(found, "compiled", to, learnt) for learnt in (False, True) for to in ("AdamW", "eager")]
    print(f"| {title}, batch {m or usual} | {told} | " + " | ".join(columns) + " |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, help="of how many data, instead of each model's usual number")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    show_conditions(given.device, rounds=given.rounds, backend=given.backend, threads=given.threads)
    print("| | compiled code | × compiled AdamW | × eager KF-BFGS | learning: × AdamW | × eager |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in given.models:
        show(name, given.rounds, given.device, given.backend, given.batch)


if __name__ == "__main__":
    main()
