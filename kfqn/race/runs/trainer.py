"""Train one configuration: the protocol of the paper's section 6, one seed.

At the end of every epoch the training loss is read twice. ``average_loss`` is the paper's: a
moving average of the mini-batch losses with decay 0.9. It looks back over ten steps, which is
nothing in the paper's epoch of 195 steps and a whole epoch on a small problem, so ``train_loss``
is the loss of the weights as they are, over the training images without augmentation (the
first ``evaluated`` of them). Seconds count the training steps alone, neither the evaluation nor the
warm start, which is stated by itself.
"""

import contextlib
import functools
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

import kfqn
from kfqn.closures import Closure
from kfqn.race import process_group
from kfqn.race.entrants.registry import entrant_of, of_optimizer
from kfqn.race.problems import PROBLEMS, Problem
from kfqn.race.problems.data import Dataset, Images
from kfqn.race.runs import checkpoint
from kfqn.race.runs.averaging import polynomial_average
from kfqn.race.runs.conditions import conditions_of
from kfqn.race.runs.run import Record, Run

LOSS_DECAY = 0.9
CHECKPOINT_SECONDS = 20.0  # of work that a kill may cost
PROGRESS_SECONDS = 0.5


@functools.lru_cache(maxsize=1)
def _load(problem: Problem, data_dir: Path | None) -> Dataset:
    """The data set, read once by a worker that does many runs on it."""
    return problem.data(data_dir)


class Trainer:
    """The state of one run in progress; a checkpoint holds all of it."""

    def __init__(self, run: Run, data_dir: Path | None) -> None:
        config = run.config
        problem, entrant = PROBLEMS[config.problem], entrant_of(config.entrant)
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.run, self.config = run, config
        self.device = torch.device(process_group.local_device(config.device))
        self.data: Dataset = _load(problem, data_dir).to(self.device, config.train_size)
        self.model = problem.network(config.width).to(self.device)
        self.trained = DistributedDataParallel(self.model) if process_group.size() > 1 else self.model
        power = config.settings.get("averaged", 0.0)
        self.averaged_model = polynomial_average(self.model, power) if power else None
        self.optimizer = entrant.build(self.trained, of_optimizer(config.settings), config.weight_decay)
        ends = config.epochs * self.steps if config.epochs and config.settings.get("cosine") else None
        self.schedule = CosineAnnealingLR(self.optimizer, ends) if ends else None
        self.needs_closure = needs_closure(self.optimizer)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.average: Tensor | None = None
        self.records: list[Record] = []
        self.seconds = self.cpu_seconds = self.warm_start_seconds = 0.0
        self.saved_at = self.shown_at = time.monotonic()
        self.read = [images.first(config.evaluated) for images in (self.data.train, self.data.test)]
        self.conditions = conditions_of(self.device)  # now: the checkout may change while a run lasts
        self.conditions |= {
            "training images": str(len(self.data.train)),
            "evaluated images": f"first {len(self.read[0])} training and {len(self.read[1])} test images",
        }

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.data.train) // self.config.batch_size

    def train(self) -> None:
        """Every epoch that is left, then the record of the end."""
        plain = type(self.optimizer).__module__.split(".")[0] in ("torch", "kfqn")
        saved = checkpoint.read(self.run.checkpoint, plain=plain)
        if saved is not None:
            self.load(saved)
        elif hasattr(self.optimizer, "warm_start"):
            self.warm_start(self.optimizer.warm_start)
        self.write(self.records)
        while not self.done:
            epoch = len(self.records) + 1
            self.train_epoch(epoch)
            record = process_group.from_rank_0(self.evaluate(epoch))
            self.seconds, self.cpu_seconds = record["seconds"], record["cpu_seconds"]
            if not math.isfinite(record["train_loss"] + record["average_loss"]):
                self.finish(
                    {"status": "diverged", "reason": f"the training loss in epoch {epoch} is not finite"}
                )
                return
            self.records.append(record)
            self.write(self.records)
            if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self.save()
        self.finish({"status": "finished"})

    @property
    def done(self) -> bool:
        """Whether epochs or budget are used up."""
        return self.fraction(len(self.records), self.cpu_seconds) >= 1

    def fraction(self, epochs: float, cpu_seconds: float) -> float:
        """How much of the run is over, by whichever limit is nearer."""
        shares = [epochs / self.config.epochs] if self.config.epochs else []
        shares += [cpu_seconds / self.config.budget] if self.config.budget else []
        return max(shares)

    def finish(self, end: Record) -> None:
        """Write the last record; nothing is left to resume."""
        facts = {"warm_start_seconds": self.warm_start_seconds, "conditions": self.conditions}
        self.write([*self.records, end | facts])
        if process_group.rank() == 0:
            self.run.checkpoint.unlink(missing_ok=True)

    def write(self, records: list[Record]) -> None:
        """Replace the records; of several processes the first does."""
        if process_group.rank() == 0:
            self.run.write(records)

    def warm_start(self, start_from: Callable[[Iterable[Closure]], None]) -> None:
        """Start from one epoch of augmented batches, as the authors did: those of the first epoch.

        With the setting ``warm`` from so many of them; with 0 the first step starts by itself, timed.
        """
        few = self.config.settings.get("warm", 0 if entrant_of(self.config.entrant).automatic else None)
        if few == 0:
            return
        generator = torch.Generator().manual_seed(self.config.seed)
        start = time.perf_counter()
        batches = self.data.training_batches(self.config.batch_size, generator)
        first = itertools.islice(batches, None if few is None else int(few))
        start_from(self.closure(x, y) for x, y in first)
        self.warm_start_seconds = time.perf_counter() - start

    def train_epoch(self, epoch: int) -> None:
        """One pass over the training images, timed."""
        self.model.train()
        start, cpu_start = time.perf_counter(), time.process_time()
        for step, (x, y) in enumerate(self.data.training_batches(self.config.batch_size, self.generator)):
            loss = self.step(x, y)
            self.average = loss if self.average is None else self.average.lerp(loss, 1 - LOSS_DECAY)
            cpu_seconds = self.cpu_seconds + time.process_time() - cpu_start
            self.show(self.fraction(epoch - 1 + (step + 1) / self.steps, cpu_seconds))
        self.synchronise()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of any optimizer; the loss before it. Not all that need no closure take one."""
        closure: Any = self.closure(x, y)
        if self.needs_closure:
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.averaged_model is not None:
            self.averaged_model.update_parameters(self.model)
        return process_group.mean(torch.as_tensor(loss).detach())

    def closure(self, x: Tensor, y: Tensor) -> Closure:
        """The closure of a batch, or of this process's share of it."""
        share = slice(process_group.rank(), None, process_group.size())
        return kfqn.closure(self.trained, x[share], y[share], F.cross_entropy)

    def evaluate(self, epoch: int) -> Record:
        """The record of a finished epoch."""
        assert self.average is not None
        averaged = getattr(self.optimizer, "averaged", contextlib.nullcontext)  # weights, while inside
        model = self.model if self.averaged_model is None else self.averaged_model.module
        with averaged():
            train_loss, _ = self.loss_and_error(model, self.read[0])
            test_loss, test_error = self.loss_and_error(model, self.read[1])
        record: Record = {
            "epoch": epoch,
            "train_loss": train_loss,
            "average_loss": self.average.item(),
            "test_loss": test_loss,
            "test_error": test_error,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        if hasattr(self.optimizer, "diagnostics"):
            record["diagnostics"] = self.optimizer.diagnostics()
        return record

    @torch.no_grad()
    def loss_and_error(self, model: nn.Module, images: Images) -> tuple[float, float]:
        """Means over the images, in evaluation mode."""
        model.eval()
        loss = error = 0.0
        for x, y in self.data.in_order(images):
            output = model(x)
            loss += F.cross_entropy(output, y, reduction="sum").item()
            error += (output.argmax(1) != y).sum().item()
        return loss / len(images), error / len(images)

    def show(self, fraction: float) -> None:
        """Say how far the run is, but not at every step."""
        if process_group.rank() == 0 and time.monotonic() - self.shown_at > PROGRESS_SECONDS:
            self.run.show_progress(fraction)
            self.shown_at = time.monotonic()

    def synchronise(self) -> None:
        """Wait for the device, so that a clock tells the truth."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def save(self) -> None:
        """A checkpoint that `load` goes on from as if nothing had happened."""
        self.saved_at = time.monotonic()
        if process_group.rank() > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "averaged": self.averaged_model and self.averaged_model.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "average": self.average,
            "records": self.records,
            "seconds": [self.seconds, self.cpu_seconds, self.warm_start_seconds],
        }
        checkpoint.save(self.run.checkpoint, state)

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint; later epochs are done again. Failure if it does not fit this run."""
        try:
            self._load(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.unfit(self.run.checkpoint, error) from error

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.averaged_model is not None:
            self.averaged_model.load_state_dict(state["averaged"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        self.average, self.records = state["average"].to(self.device), state["records"]
        self.seconds, self.cpu_seconds, self.warm_start_seconds = state["seconds"]


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step runs the passes itself: its closure has no default, or others warm it up."""
    takes = inspect.signature(optimizer.step).parameters.values()
    return hasattr(optimizer, "warm_start") or any(p.default is p.empty for p in takes)
