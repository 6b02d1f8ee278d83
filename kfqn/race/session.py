"""What every command that trains does: from options to a scale, and from a field to finished runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from kfqn.race import process_group, sweep
from kfqn.race.cores import available_cores, requested_threads
from kfqn.race.entrants.registry import check_settings
from kfqn.race.failure import Failure, did_you_mean
from kfqn.race.options import Training, Tuning
from kfqn.race.problems import DEFAULT_DATA, Problem
from kfqn.race.problems.cifar import Cifar
from kfqn.race.report.live_view import live_view
from kfqn.race.runs.files import check_writable
from kfqn.race.runs.plan import Field, Scale, Search, configs
from kfqn.race.runs.run import Run
from kfqn.race.runs.workers import run_all


@dataclass(frozen=True)
class Session:
    """One command at work: the folder of its runs, that of the images, the terminal."""

    out: Path
    data_dir: Path | None
    console: Console

    def run(self, problem: Problem, field: Field, seeds: int, scale: Scale, by: str) -> list[Run]:
        """Every optimizer of the field with every seed, done now or before, watched while it lasts.

        ``by`` is the record whose lowest value is shown meanwhile.
        """
        for name, settings in field:
            check_settings(name, settings, scale.epochs, problem.weight_decay)
        check_writable(self.out)
        runs = [Run.create(self.out / "runs", config) for config in configs(problem, field, seeds, scale)]
        for run in runs:
            if run.damaged():
                self.console.print(
                    f"{run.folder / 'epochs.jsonl'} is damaged: what is sound is kept, the rest done again.",
                    highlight=False,
                    soft_wrap=True,
                )
            run.forget_failure()
        known = sum(run.end() is not None for run in runs)
        if known:
            self.console.print(
                f"{known} of {len(runs)} runs are done already; delete {self.out} to repeat them."
            )
        process_group.from_rank_0(None)  # every process has seen how things stand
        with live_view(runs, self.console, by) as update:
            run_all(runs, scale.jobs, self.data_dir, update)
        return runs

    def tune(
        self, problem: Problem, field: Field, scale: Scale, search: Search
    ) -> tuple[dict[str, sweep.Entry], list[Run]]:
        """Sweep the points of some optimizers on a problem: the entries of a sweep file, and all the runs."""

        def run_field(promoted: Field, length: Scale) -> list[Run]:
            return self.run(problem, promoted, search.seeds, length, search.by)

        return sweep.sweep(field, scale, search, run_field)


def open_session(training: Training, problems: Sequence[Problem], out: Path) -> Session:
    """Ready to train on these problems, their images at hand; Failure if those are not there or too few."""
    console = terminal()
    folder = data_folder(training.data_dir, problems, console)
    if training.data_dir is not None or training.train_size is not None:
        for problem in {problem.source: problem for problem in reversed(problems)}.values():
            check_size(training.train_size, problem, folder)
    return Session(out, folder, console)


def check_size(train_size: int | None, problem: Problem, folder: Path | None) -> None:
    """Read every file, so that what is wrong is said before any run; Failure for more images than those."""
    data = problem.data(folder)
    if train_size is not None and train_size > len(data):
        raise Failure(
            f"--train-size must be at most {len(data)}, the {data.items} of {problem.name}, got "
            f"{train_size}: leave it out to train on all of them."
        )


def terminal() -> Console:
    """Where to print; a file has no edge to fold at."""
    console = Console(quiet=process_group.rank() > 0)
    if not console.is_terminal:
        console.width = 160
    return console


def scale_of(training: Training, problem: Problem) -> Scale:
    """The scale that the options ask for; Failure if the device is not there or the images are too few."""
    if training.train_size is not None and training.train_size < problem.smallest:
        raise Failure(
            f"--train-size must be at least {problem.smallest_is}, {problem.smallest} here, got "
            f"{training.train_size}."
        )
    if training.width is not None and not problem.width:
        raise Failure(f"{problem.name} has no --width: leave it out, or change its model.")
    if training.width is not None and training.width % problem.heads:
        raise Failure(
            f"--width must be a multiple of {problem.heads}, the heads of attention, got {training.width}."
        )
    check_device(training.device)
    if problem.batch_size % process_group.size():
        raise Failure(
            f"a batch of {problem.batch_size} cannot be shared by {process_group.size()} processes: start as "
            "many as divide it, with torchrun --nproc-per-node."
        )
    unlimited = training.epochs is None and training.budget is None
    return Scale(
        epochs=problem.epochs if unlimited else training.epochs,
        budget=training.budget,
        width=training.width,
        train_size=training.train_size,
        evaluated=training.eval_size,
        device=training.device,
        jobs=training.jobs or _jobs(training.device),
    )


def _jobs(device: str) -> int:
    """As many as the cores have room for; on a GPU one."""
    return max(1, available_cores() // (requested_threads() or 1)) if device == "cpu" else 1


def check_device(device: str) -> None:
    """Failure for a device that is not there."""
    if device != "cpu":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            near = did_you_mean(device, ("cpu", "cuda", "mps", "xpu")) if "Expected one of" in reason else ""
            raise Failure(
                f"--device {device} cannot be used ({reason}){near or ':'} leave it out for the CPU."
            ) from None


def search_of(tuning: Tuning, scale: Scale, by: str, seeds: int = 1) -> Search:
    """The search that the options ask for; Failure if it is to be halved and is too short for that."""
    if tuning.halving and (scale.epochs or math.inf) < sweep.STEP**2:
        raise Failure(
            "--halving starts with a ninth of the length, so --epochs must be at least "
            f"{sweep.STEP**2}: give more, or leave --halving out."
        )
    return Search(by, tuning.halving, tuning.coarse, tuning.max_points, seeds)


def data_folder(given: Path | None, problems: Sequence[Problem], console: Console) -> Path | None:
    """The folder with the data sets, downloaded first if the user named none and one is not there."""
    sources = {id(source): source for p in problems if p.source is not None for source in (p.source(),)}
    folder = given or DEFAULT_DATA
    for source in sources.values():
        if given is None and not source.found(folder):
            download(source, folder, console)
    return folder if sources else None


def download(source: Cifar, folder: Path, console: Console) -> None:
    """Fetch a data set under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(source.title, total=None)
        source.download(
            folder, lambda done, total: progress.update(task, completed=done, total=total or None)
        )


def exit_status(runs: Sequence[Run]) -> int:
    """1 if any run failed or is unfinished; a diverged run is a result."""
    states = [(run.end() or {"status": "unfinished"})["status"] for run in runs]
    return 1 if "failed" in states or "unfinished" in states else 0
