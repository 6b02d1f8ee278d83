"""What the commands do, from options to files and tables."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from kfqn.race import cifar
from kfqn.race.entrants import ENTRANTS, Settings, best_settings
from kfqn.race.failure import Failure
from kfqn.race.problems import DEFAULT_DATA, PROBLEMS, Problem
from kfqn.race.report import write_report
from kfqn.race.runs import Config, Run, check_writable
from kfqn.race.sweep import load, outcome, print_outcome, save
from kfqn.race.watch import live_view
from kfqn.race.workers import do


def race(options: argparse.Namespace) -> int:
    """``kfqn race``."""
    own_sweep = output_folder(options) / "sweep.json"
    field = [
        (name, settings or best_settings(options.problem, name, own_sweep))
        for name, settings in options.optimizers
    ]
    runs, console = do_runs(options, field)
    write_report(runs, output_folder(options), console)
    return exit_status(runs)


def sweep(options: argparse.Namespace) -> int:
    """``kfqn sweep``."""
    path = options.save or output_folder(options) / "sweep.json"
    load(path)
    field = [(name, settings) for name in options.optimizers for settings in ENTRANTS[name].points()]
    runs, console = do_runs(options, field)
    result = outcome(runs)
    save(result, options.problem, path)
    print_outcome(result, console)
    console.print(f"saved to {path}", highlight=False, soft_wrap=True)
    return exit_status(runs)


def do_runs(options: argparse.Namespace, field: Sequence[tuple[str, Settings]]) -> tuple[list[Run], Console]:
    """Every entrant of the field with every seed, done now or before, watched while it lasts."""
    problem = PROBLEMS[options.problem]
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no edge to fold at
    check_scale(options, problem)
    jobs = options.jobs or (1 if options.device != "cpu" else os.cpu_count() or 1)
    data_dir = data_folder(options, console) if problem.downloads else None
    check_writable(output_folder(options))
    configs = [
        Config(
            problem=problem.name,
            entrant=name,
            settings=dict(settings),
            seed=seed,
            epochs=options.epochs or problem.epochs,
            width=options.width or problem.width,
            batch_size=problem.batch_size,
            weight_decay=problem.weight_decay,
            train_size=options.train_size,
            device=options.device,
            threads=1 if jobs > 1 else os.cpu_count() or 1,
        )
        for seed in range(options.seeds)
        for name, settings in field
    ]
    distinct = {config.identity: config for config in configs}
    runs = [Run.create(output_folder(options) / "runs", config) for config in distinct.values()]
    for run in runs:
        run.forget_failure()
    known = sum(run.end() is not None for run in runs)
    if known:
        console.print(
            f"{known} of {len(runs)} runs are done already; delete {output_folder(options)} to repeat them."
        )
    with live_view(runs, console) as update:
        do(runs, jobs, data_dir, update)
    return runs, console


def check_scale(options: argparse.Namespace, problem: Problem) -> None:
    """Failure for a device that is not there or too few images, before anything is written."""
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


def output_folder(options: argparse.Namespace) -> Path:
    """Where the command writes."""
    folder: Path = options.out or Path("runs") / options.problem
    return folder


def data_folder(options: argparse.Namespace, console: Console) -> Path:
    """The folder with the data set, downloaded first if the user named none and it is not there."""
    if options.data_dir is not None:
        cifar.cifar10(options.data_dir)  # every file once, so that what is wrong is said before any run
        folder: Path = options.data_dir
        return folder
    if not cifar.found(DEFAULT_DATA):
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("CIFAR-10", total=None)
            cifar.download(
                DEFAULT_DATA, lambda done, total: progress.update(task, completed=done, total=total or None)
            )
    return DEFAULT_DATA


def exit_status(runs: Sequence[Run]) -> int:
    """1 if any run failed or is unfinished; a diverged run is a result."""
    states = [(run.end() or {"status": "unfinished"})["status"] for run in runs]
    return 1 if "failed" in states or "unfinished" in states else 0
