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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kfqn.race import process_group
from kfqn.race.entrants.registry import entrant_of, of_optimizer
from kfqn.race.failure import Failure
from kfqn.race.problems import Problem, problem_of
from kfqn.race.problems.task import Closure, Data, Size
from kfqn.race.runs import checkpoint
from kfqn.race.runs.averaging import polynomial_average
from kfqn.race.runs.conditions import conditions_of
from kfqn.race.runs.plan import code_of
from kfqn.race.runs.run import Record, Run
from kfqn.race.runs.schedule import schedule_of

LOSS_DECAY = 0.9
CHECKPOINT_SECONDS = 20.0  # of work that a kill may cost
PROGRESS_SECONDS = 0.5


@functools.lru_cache(maxsize=1)
def _load(problem: Problem, data_dir: Path | None) -> Data:
    """The data set, read once by a worker that does many runs on it."""
    return problem.data(data_dir)


class Trainer:
    """The state of one run in progress; a checkpoint holds all of it."""

    def __init__(self, run: Run, data_dir: Path | None) -> None:
        config = run.config
        problem, entrant = problem_of(config.problem), entrant_of(config.entrant)
        if config.code != code_of(problem, config.entrant):
            raise Failure(
                f"{config.problem} or {config.entrant} was changed while it raced, or is another each time: "
                "the same command races what it is now."
            )
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.run, self.config = run, config
        self.device = torch.device(process_group.local_device(config.device))
        size = Size(config.train_size, config.evaluated, config.batch_size)
        self.task = _load(problem, data_dir).task(self.device, size)
        self.model = problem.network(config.width).to(self.device)
        self.trained = DistributedDataParallel(self.model) if process_group.size() > 1 else self.model
        power = config.settings.get("averaged", 0.0)
        self.averaged_model = polynomial_average(self.model, power) if power else None
        self.optimizer = entrant.make(self.trained, of_optimizer(config.settings), config.weight_decay)
        ends = config.epochs * self.task.steps if config.epochs else None
        self.schedule = schedule_of(self.optimizer, config.settings, ends)
        self.needs_closure = needs_closure(self.optimizer)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.average: Tensor | None = None
        self.records: list[Record] = []
        self.seconds = self.cpu_seconds = self.warm_start_seconds = 0.0
        self.saved_at = self.shown_at = time.monotonic()
        self.conditions = conditions_of(self.device)  # now: the checkout may change while a run lasts
        self.conditions |= self.task.conditions

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
        closures = self.task.epoch(self.trained, generator)
        start_from(itertools.islice(closures, None if few is None else int(few)))
        self.warm_start_seconds = time.perf_counter() - start

    def train_epoch(self, epoch: int) -> None:
        """One epoch of steps, timed."""
        self.model.train()
        start, cpu_start = time.perf_counter(), time.process_time()
        for step, closure in enumerate(self.task.epoch(self.trained, self.generator)):
            loss = self.step(closure)
            self.average = loss if self.average is None else self.average.lerp(loss, 1 - LOSS_DECAY)
            cpu_seconds = self.cpu_seconds + time.process_time() - cpu_start
            self.show(self.fraction(epoch - 1 + (step + 1) / self.task.steps, cpu_seconds))
        self.synchronise()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start

    def step(self, closure: Closure) -> Tensor:
        """One step of any optimizer; the loss before it. Not all that need no closure take one."""
        loss: Any
        if self.needs_closure:
            loss = self.optimizer.step(closure)  # type: ignore[arg-type]  # torch says float
        else:
            loss = closure()
            self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.averaged_model is not None:
            self.averaged_model.update_parameters(self.model)
        return process_group.mean(torch.as_tensor(loss).detach())

    def evaluate(self, epoch: int) -> Record:
        """The record of a finished epoch."""
        assert self.average is not None
        averaged = getattr(self.optimizer, "averaged", contextlib.nullcontext)  # weights, while inside
        model = self.model if self.averaged_model is None else self.averaged_model.module
        model.eval()
        with averaged():
            found = self.task.evaluate(model)
        record: Record = {
            "epoch": epoch,
            **asdict(found),
            "average_loss": self.average.item(),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        if hasattr(self.optimizer, "diagnostics"):
            record["diagnostics"] = self.optimizer.diagnostics()
        return record

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
