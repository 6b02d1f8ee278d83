"""What the commands do, from options to files and tables."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from kfqn.race import sweep as sweeping
from kfqn.race.cifar import Cifar
from kfqn.race.entrants import best_settings
from kfqn.race.failure import Failure
from kfqn.race.grids import SETTINGS, grid
from kfqn.race.plan import Field, Scale, configs
from kfqn.race.problems import DEFAULT_DATA, PROBLEMS, Problem
from kfqn.race.report import write_report
from kfqn.race.runs import Run, check_writable
from kfqn.race.watch import live_view
from kfqn.race.workers import do


def race(options: argparse.Namespace) -> int:
    """``kfqn race``."""
    problem, out = PROBLEMS[options.problem], output_folder(options)
    field = [
        (name, settings or best_settings(problem.name, name, out / "sweep.json"))
        for name, settings in options.optimizers
    ]
    console, scale = terminal(), scale_of(options, problem)
    runs = do_runs(
        problem, field, options.seeds, scale, out, data_folder(options, [problem], console), console
    )
    write_report(runs, out, console)
    return exit_status(runs)


def sweep(options: argparse.Namespace) -> int:
    """``kfqn sweep``."""
    problem, out = PROBLEMS[options.problem], output_folder(options)
    console, scale = terminal(), scale_of(options, problem)
    path = options.save or out / "sweep.json"
    sweeping.load(path)
    data_dir = data_folder(options, [problem], console)
    result, runs = tune(options, problem, options.optimizers, scale, out, data_dir, console)
    result = sweeping.save(result, sweeping.key(problem.name, options.by), path)
    sweeping.print_outcome(result, console)
    console.print(f"saved to {path}", highlight=False, soft_wrap=True)
    return exit_status(runs)


def tune(
    options: argparse.Namespace,
    problem: Problem,
    names: Sequence[str],
    scale: Scale,
    out: Path,
    data_dir: Path | None,
    console: Console,
) -> tuple[dict[str, Any], list[Run]]:
    """Sweep some optimizers on a problem: the outcome and the longest runs."""
    if options.halving and max(scale.epochs or 0, scale.budget or 0) < sweeping.SHARE**2:
        raise Failure(
            f"--halving starts with a ninth of the length, so --epochs or --budget must be at least "
            f"{sweeping.SHARE**2}: give more, or leave --halving out."
        )

    def run_field(field: Field, length: Scale) -> list[Run]:
        return do_runs(problem, field, options.sweep_seeds, length, out, data_dir, console, options.by)

    thinned = SETTINGS if options.coarse == [] else options.coarse or ()
    field = [(name, s) for name in names for s in grid(problem.name, name, thinned)]
    points, runs = sweeping.sweep(field, scale, options.by, options.halving, run_field)
    search = {"halving": options.halving, "coarse": list(thinned)}
    return sweeping.outcome(points, runs, options.by, search), runs


def do_runs(
    problem: Problem,
    field: Field,
    seeds: int,
    scale: Scale,
    out: Path,
    data_dir: Path | None,
    console: Console,
    by: str = "train_loss",
) -> list[Run]:
    """Every optimizer of the field with every seed, done now or before, watched while it lasts."""
    check_writable(out)
    runs = [Run.create(out / "runs", config) for config in configs(problem, field, seeds, scale)]
    for run in runs:
        run.forget_failure()
    known = sum(run.end() is not None for run in runs)
    if known:
        console.print(f"{known} of {len(runs)} runs are done already; delete {out} to repeat them.")
    with live_view(runs, console, by) as update:
        do(runs, scale.jobs, data_dir, update)
    return runs


def terminal() -> Console:
    """Where to print; a file has no edge to fold at."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


def scale_of(options: argparse.Namespace, problem: Problem) -> Scale:
    """The scale that the options ask for; Failure if the device is not there or the images are too few."""
    if options.train_size is not None and options.train_size < problem.batch_size:
        raise Failure(
            f"--train-size must be at least one batch, {problem.batch_size} here, got {options.train_size}."
        )
    if options.device != "cpu":
        try:
            torch.empty(1, device=options.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise Failure(
                f"--device {options.device} cannot be used ({reason}): leave it out for the CPU."
            ) from None
    unlimited = options.epochs is None and options.budget is None
    return Scale(
        epochs=problem.epochs if unlimited else options.epochs,
        budget=options.budget,
        width=options.width,
        train_size=options.train_size,
        evaluated=options.eval_size,
        device=options.device,
        jobs=options.jobs or (1 if options.device != "cpu" else os.cpu_count() or 1),
    )


def output_folder(options: argparse.Namespace) -> Path:
    """Where the command writes."""
    folder: Path = options.out or Path("runs") / options.problem
    return folder


def data_folder(options: argparse.Namespace, problems: Sequence[Problem], console: Console) -> Path | None:
    """The folder with the data sets, downloaded first if the user named none and one is not there."""
    sources = {id(source): source for p in problems if p.source is not None for source in (p.source(),)}
    folder: Path = options.data_dir or DEFAULT_DATA
    for source in sources.values():
        if options.data_dir is not None:
            source.load(folder)  # every file once, so that what is wrong is said before any run
        elif not source.found(folder):
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
