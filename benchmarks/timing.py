"""How everything here is timed and trained: ways in turn, epochs, and how many passes a step took."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

import kfqn
from kfqn.race.runs.conditions import conditions_of

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


def show_conditions(device: torch.device | None = None, **facts: object) -> None:
    """The first line of what a benchmark prints: machine, versions, commit, and how it was run."""
    known = conditions_of(device or torch.device("cpu")) | facts
    print(", ".join(f"{key} {value}" for key, value in known.items()), flush=True)


def timed(way: Callable[[], T], clock: Callable[[], float] = time.perf_counter) -> tuple[float, T]:
    """Seconds and result."""
    start = clock()
    result = way()
    return clock() - start, result


def in_turn(
    ways: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 1
) -> dict[str, list[tuple[float, T]]]:
    """Seconds and result of every way in every round, after some that are not counted.

    In each round every way has its turn, so that a machine that slows down slows all of them.
    """
    found: dict[str, list[tuple[float, T]]] = {name: [] for name in ways}
    for round_ in range(warm_up + rounds):
        for name, way in ways.items():
            measured = timed(way)
            if round_ >= warm_up:
                found[name].append(measured)
    return found


@dataclass
class Passes:
    """The passes through a model in one step: forward, and backward as far as its first layer."""

    forward: int = 0
    backward: int = 0

    @property
    def kind(self) -> str:
        """What a step with a closure was, by the passes that it took."""
        if self.forward == 1:
            return "without a second pass"
        if self.forward == 2:
            return "with a second pass" if self.backward == 2 else "for the loss alone"
        return "with a check"


@contextmanager
def watched(model: nn.Module) -> Iterator[Passes]:
    """Count the passes through ``model`` inside."""
    passes = Passes()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))

    def backward(_: Tensor) -> None:
        passes.backward += 1

    def forward(_: nn.Module, __: object, output: Tensor) -> None:
        passes.forward += 1
        if output.requires_grad:
            output.register_hook(backward)

    handle = first.register_forward_hook(forward)
    yield passes
    handle.remove()


def epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, loss_fn: Loss
) -> tuple[float, float]:
    """The mean loss of an epoch's batches, and the CPU seconds of its steps."""
    model.train()
    losses, seconds = [], 0.0
    for x, y in batches:
        step = kfqn.closure(model, x, y, loss_fn)
        taken, loss = timed(partial(optimizer.step, step), time.process_time)
        seconds += taken
        losses.append(torch.as_tensor(loss).item())
    return sum(losses) / len(losses), seconds


@torch.no_grad()
def evaluated(model: nn.Module, batches: Batches, loss_fn: Loss) -> float:
    """The loss in evaluation, a mean over the data."""
    model.eval()
    total, count = 0.0, 0
    for x, y in batches:
        total += loss_fn(model(x), y).item() * len(x)
        count += len(x)
    return total / count
