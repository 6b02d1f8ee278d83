"""What compiling a model leaves of it: graphs, breaks, what is compiled again, and the time of a step.

    python -m benchmarks.cost.compiled [--models resnet20 vit gpt] [--rounds 60] [--device cuda]

Graphs are those of the first 41 steps, in the last of which H_A learns for the second time; "again" is what
the 45 steps after them, in which it learns once more, compile. Breaks are counted by Dynamo. Then steps of
compiled AdamW, of KF-BFGS on the compiled model and on the model as it is take turns: a ratio is the median
over the rounds of a step's time over another's in the same round, of steps in which nothing is learnt, and
apart of those that learn.
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

WARM_UP, MORE = 41, 45
Loss = Callable[[Callable[..., Any]], Tensor]


def images(side: int, m: int, device: torch.device) -> Loss:
    """Cross-entropy on images that are noise."""
    x, y = torch.randn(m, 3, side, side, device=device), torch.randint(10, (m,), device=device)
    return lambda net: F.cross_entropy(net(x), y)


def characters(m: int, device: torch.device) -> Loss:
    """The same of the next of 64 characters."""
    x = torch.randint(101, (m, 65), device=device)
    return lambda net: F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


MODELS: Mapping[str, tuple[str, Callable[[], nn.Module], Callable[[torch.device], Loss]]] = {
    "resnet20": ("ResNet-20, batch 128", partial(resnet20, 10), partial(images, 32, 128)),
    "vit": ("ViT, 3 blocks of 64, batch 128", partial(VisionTransformer, 10), partial(images, 16, 128)),
    "gpt": ("GPT, 3 blocks of 96, batch 48", partial(CharacterGPT, 101), partial(characters, 48)),
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


def show(name: str, rounds: int, device: torch.device, backend: str) -> None:
    """One line of a table."""
    title, build, data = MODELS[name]
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    model, loss_of = build().to(device), data(device)
    graphs, twins = CompileCounterWithBackend(backend), [copy.deepcopy(model) for _ in range(2)]
    adamw = torch.optim.AdamW(twins[0].parameters(), lr=1e-4)
    ours = Run(model, torch.compile(model, backend=graphs), kfqn.KFBFGS(model), loss_of, device)
    told = graphs_of(ours, graphs)
    runs = {
        "compiled": ours,
        "eager": Run(twins[1], twins[1], kfqn.KFBFGS(twins[1]), loss_of, device),
        "AdamW": Run(twins[0], torch.compile(twins[0], backend=backend), adamw, loss_of, device),
    }
    found = in_turn({name: run.step for name, run in runs.items()}, rounds, warm_up=3)
    columns = [ratio(found, "compiled", to, learnt) for learnt in (False, True) for to in ("AdamW", "eager")]
    print(f"| {title} | {told} | " + " | ".join(columns) + " |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    show_conditions(given.device, rounds=given.rounds, backend=given.backend, threads=given.threads)
    print("| | compiled code | × compiled AdamW | × eager KF-BFGS | learning: × AdamW | × eager |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in given.models:
        show(name, given.rounds, given.device, given.backend)


if __name__ == "__main__":
    main()
