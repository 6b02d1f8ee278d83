"""How everything here is timed and trained: ways in turn, epochs, and of what kind a step was."""

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
class Watch:
    """What was seen in one step with a closure: passes through the model, and whether H_A has changed."""

    passes: int = 0
    learnt: bool = False

    @property
    def kind(self) -> str:
        """What the step was."""
        if self.passes > 1:
            return "with a second pass"
        return "with A learnt" if self.learnt else "without learning"


@contextmanager
def watched(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Watch]:
    """Watch one step inside."""
    watch, before = Watch(), versions(optimizer)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))

    def forward(*_: object) -> None:
        watch.passes += 1

    handle = first.register_forward_hook(forward)
    yield watch
    handle.remove()
    watch.learnt = before != versions(optimizer)


def versions(optimizer: torch.optim.Optimizer) -> list[int]:
    """How often each H_A has been written, which reads nothing from the device."""
    return [state["H_A"]._version for state in optimizer.state.values() if "H_A" in state]


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
