"""What a trainer asks of a problem: closures to step on, and what the weights are worth."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]  # clears the gradients, calls backward, returns the loss: what a step takes


@dataclass(frozen=True)
class Size:
    """How much of a data set is used: None trains on all of it, ``evaluated`` items at most are read."""

    train: int | None
    evaluated: int
    batch: int


@dataclass(frozen=True)
class Evaluation:
    """What a model is worth: the training loss, and loss and error on what it has not seen."""

    train_loss: float
    test_loss: float
    test_error: float


class Task(ABC):
    """A data set on a device, at some size, and the loss on it."""

    steps: int  # in an epoch
    conditions: dict[str, str]  # how much is trained on and read, for the report

    @abstractmethod
    def epoch(self, model: nn.Module, generator: torch.Generator) -> Iterator[Closure]:
        """The closures of one epoch, one a step; all that is random in them comes from ``generator``."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Evaluation:
        """What a model in evaluation mode is worth."""


class Data(ABC):
    """A data set as it was read, which many runs share."""

    items: str  # what is counted: training images

    @abstractmethod
    def __len__(self) -> int:
        """How many there are to train on."""

    @abstractmethod
    def task(self, device: torch.device, size: Size) -> Task:
        """The data set on a device, at this size."""
