"""`Kronecker.diagnostics` and the loss of every so manyth step, to TensorBoard and to W&B.

    board = TensorBoard(SummaryWriter("runs/first"))
    …
    optimizer.step()
    board.update(optimizer, loss)

Neither package is imported here. Other loggers take what `kfqn.integrations.watch.scalars` gives.
"""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from kfqn.integrations.watch import scalars


class Logger(ABC):
    """A `Watcher` that logs every ``every``-th step."""

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.every, self.step = every, 0

    @abstractmethod
    def log(self, numbers: dict[str, float], step: int) -> None:
        """Log these numbers of a step."""

    def update(self, optimizer: Any, loss: Tensor | float | None = None, step: int | None = None) -> None:
        """A step has been taken; see `Watcher`."""
        before, self.step = self.step, self.step + 1 if step is None else step
        if self.step // self.every == before // self.every and before:
            return
        of_loss = {} if loss is None else {"loss": float(torch.as_tensor(loss).detach())}
        self.log(of_loss | scalars(optimizer), self.step)


@final
class TensorBoard(Logger):
    """To a `torch.utils.tensorboard.SummaryWriter`, or what has its methods."""

    def __init__(self, writer: Any, every: int = 50) -> None:
        super().__init__(every)
        self.writer = writer

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def write(self) -> None:
        """Have all that is known on disk."""
        self.writer.flush()


@final
class WandB(Logger):
    """To a run of W&B, as `wandb.init` returns it; offline too.

    The step is logged as ``step`` beside the numbers, so that others may log at steps of their own.
    """

    def __init__(self, run: Any, every: int = 50) -> None:
        super().__init__(every)
        self.run = run

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log({**numbers, "step": step})

    def write(self) -> None:
        """W&B has it on disk already."""
