"""Any data sets of inputs and targets, and what is learned of them: batches, a loss, an error."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

import kfqn
from kfqn.race import process_group
from kfqn.race.problems.task import Closure, Data, Evaluation, Size, Task

Measure = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets of a batch: a mean over it


@final
@dataclass(frozen=True)
class Pairs(Data):
    """Data sets that have a length and whose items are pairs of an input and a target."""

    train: Dataset[Any]
    test: Dataset[Any]
    loss: Measure
    error: Measure
    items = "training data"

    def __len__(self) -> int:
        return len(self.train)  # type: ignore[arg-type]  # torch's Dataset promises none

    def task(self, device: torch.device, size: Size) -> "Fitting":
        return Fitting(self, device, size)


@final
class Fitting(Task):
    """Shuffled batches; a rest smaller than one is dropped in training, and read in evaluation."""

    def __init__(self, data: Pairs, device: torch.device, size: Size) -> None:
        self.data, self.device, self.batch = data, device, size.batch
        self.count = len(data) if size.train is None else size.train
        self.steps = self.count // size.batch
        tested = len(data.test)  # type: ignore[arg-type]
        self.read = [min(self.count, size.evaluated), min(tested, size.evaluated)]
        self.conditions = {
            "training data": str(self.count),
            "evaluated data": f"first {self.read[0]} to train on and {self.read[1]} to test",
        }

    def epoch(self, model: nn.Module, generator: torch.Generator) -> Iterator[Closure]:
        order = torch.randperm(self.count, generator=generator)
        for indices in order[: self.steps * self.batch].split(self.batch):
            x, y = self.items(self.data.train, indices[process_group.share()])
            yield kfqn.closure(model, x, y, self.data.loss)

    def evaluate(self, model: nn.Module) -> Evaluation:
        train, test = zip((self.data.train, self.data.test), self.read, strict=True)
        (train_loss,) = self.means(model, *train, (self.data.loss,))
        return Evaluation(train_loss, *self.means(model, *test, (self.data.loss, self.data.error)))

    @torch.no_grad()
    def means(
        self, model: nn.Module, data: Dataset[Any], count: int, measures: Sequence[Measure]
    ) -> list[float]:
        """Of each measure over the first items."""
        sums = [0.0] * len(measures)
        for indices in torch.arange(count).split(self.batch):
            x, y = self.items(data, indices)
            output = model(x)
            for n, measure in enumerate(measures):
                sums[n] += float(measure(output, y)) * len(indices)
        return [total / count for total in sums]

    def items(self, data: Dataset[Any], indices: Tensor) -> tuple[Tensor, Tensor]:
        """So many inputs and targets, on the device."""
        if isinstance(data, TensorDataset):
            x, y = data[indices]
        else:
            x, y = default_collate([data[int(n)] for n in indices])
        return x.to(self.device), y.to(self.device)


def wrong(output: Tensor, target: Tensor) -> Tensor:
    """The share of targets, numbers of classes, that are not where the output (m, classes, …) is largest."""
    return (output.argmax(1) != target).float().mean()


def distance(output: Tensor, target: Tensor) -> Tensor:
    """The mean absolute error."""
    return (output - target).abs().mean()
