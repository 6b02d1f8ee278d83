"""The command line: ``kfqn race`` and ``kfqn sweep``. Nothing heavy is imported before there is work."""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kfqn import __version__
from kfqn.race.entrants import ENTRANTS, Settings, best_settings
from kfqn.race.failure import Failure
from kfqn.race.problems import PROBLEMS, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from kfqn.race.runs import Run

DEFAULT_DATA = Path("data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 a run failed, 2 wrong use, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        result: int = options.command(options)
    except Failure as failure:
        print(f"kfqn: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkfqn: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return result


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="kfqn",
        description="Race Kronecker-factored quasi-Newton optimizers against others on real images.",
    )
    top.add_argument("--version", action="version", version=f"kfqn {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")

    race = commands.add_parser(
        "race",
        help="train one model with several optimizers and show who is ahead",
        description="Train the same model on the same data with several optimizers, by default each with the "
        "best settings a sweep found, and show who is ahead by epoch and by second: a table, race.png and "
        "race.html. An interrupted race goes on where it stopped; finished runs are not done again.",
    )
    race.set_defaults(command=command_race)
    race.add_argument(
        "--optimizers",
        nargs="+",
        type=entrant,
        default=[(name, None) for name in ENTRANTS],
        metavar="NAME[:KEY=VALUE,...]",
        help=f"any of {', '.join(ENTRANTS)}, with settings of your own if you like: kfbfgs:lr=3,damping=1 "
        "(default: all of them)",
    )
    add_common(race, seeds=3)

    sweep = commands.add_parser(
        "sweep",
        help="tune optimizers: try every point of their grids",
        description="Train every point of the optimizers' grids, print the best of each and save all. "
        "An interrupted sweep goes on where it stopped.",
    )
    sweep.set_defaults(command=command_sweep)
    sweep.add_argument(
        "--optimizers", nargs="+", choices=ENTRANTS, default=list(ENTRANTS), help="default: all"
    )
    sweep.add_argument("--save", type=Path, metavar="FILE", help="default: sweep.json in the output folder")
    add_common(sweep, seeds=1)
    return top


def add_common(command: argparse.ArgumentParser, seeds: int) -> None:
    """Options of every command that trains."""
    command.add_argument(
        "--problem", choices=PROBLEMS, default="digits", help="default: digits, needs no download"
    )
    command.add_argument(
        "--epochs", type=positive, help="passes over the training images (default: the problem's)"
    )
    command.add_argument(
        "--seeds", type=positive, default=seeds, help="runs of everything (default: %(default)s)"
    )
    command.add_argument("--width", type=positive, help="filters of the first layer (default: the problem's)")
    command.add_argument("--train-size", type=positive, help="use only the first so many training images")
    command.add_argument(
        "--data-dir", type=Path, help=f"where the images are (default: download to ./{DEFAULT_DATA})"
    )
    command.add_argument("--out", type=Path, help="output folder (default: runs/PROBLEM)")
    command.add_argument(
        "--jobs", type=positive, help="parallel processes, one thread each (default: one a core; on a GPU, 1)"
    )
    command.add_argument("--device", default="cpu", help="torch device, e.g. cuda (default: %(default)s)")


def positive(text: str) -> int:
    """A whole number ≥ 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def entrant(text: str) -> tuple[str, Settings | None]:
    """``name`` or ``name:key=value,key=value``, for argparse; None stands for the best known settings."""
    name, _, rest = text.partition(":")
    if name not in ENTRANTS:
        raise argparse.ArgumentTypeError(f"no optimizer {name!r} (choose from {', '.join(ENTRANTS)})")
    if not rest:
        return name, None
    pairs = [item.partition("=") for item in rest.split(",")]
    keys = list(ENTRANTS[name].grid)
    if sorted(key for key, _, _ in pairs) != sorted(keys):
        raise argparse.ArgumentTypeError(
            f"{name} takes {','.join(f'{key}=...' for key in keys)}, got {rest!r}"
        )
    try:
        settings = {key: float(value) for key, _, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rest!r} is not of the form key=number,key=number") from None
    if not all(0 < value < math.inf for value in settings.values()):
        raise argparse.ArgumentTypeError(f"settings must be > 0 and finite, got {rest!r}")
    return name, {key: settings[key] for key in keys}


def command_race(options: argparse.Namespace) -> int:
    """``kfqn race``."""
    check_installed()
    sweep = output_folder(options) / "sweep.json"
    field = [
        (name, settings or best_settings(options.problem, name, sweep))
        for name, settings in options.optimizers
    ]
    runs, console = do_runs(options, field)
    from kfqn.race.report import write_report

    write_report(runs, output_folder(options), console)
    return exit_status(runs)


def command_sweep(options: argparse.Namespace) -> int:
    """``kfqn sweep``."""
    check_installed()
    from kfqn.race.sweep import load, outcome, print_outcome, save

    path = options.save or output_folder(options) / "sweep.json"
    load(path)
    field = [(name, settings) for name in options.optimizers for settings in ENTRANTS[name].points()]
    runs, console = do_runs(options, field)
    result = outcome(runs)
    save(result, options.problem, path)
    print_outcome(result, console)
    console.print(f"saved to {path}", highlight=False, soft_wrap=True)
    return exit_status(runs)


def do_runs(
    options: argparse.Namespace, field: Sequence[tuple[str, Settings]]
) -> tuple[list["Run"], "Console"]:
    """Every entrant of the field with every seed, done now or before, watched while it lasts."""
    from rich.console import Console

    from kfqn.race import runs as files
    from kfqn.race import watch, workers

    problem = PROBLEMS[options.problem]
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no edge to fold at
    check_scale(options, problem)
    jobs = options.jobs or (1 if options.device != "cpu" else os.cpu_count() or 1)
    files.check_writable(output_folder(options))
    data_dir = data_folder(options, console) if problem.downloads else None
    configs = [
        files.Config(
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
    runs = [files.Run.create(output_folder(options) / "runs", config) for config in distinct.values()]
    for run in runs:
        run.forget_failure()
    known = sum(run.end() is not None for run in runs)
    if known:
        console.print(
            f"{known} of {len(runs)} runs are done already; delete {output_folder(options)} to repeat them."
        )
    with watch.live_view(runs, console) as update:
        workers.do(runs, jobs, data_dir, update)
    return runs, console


def check_installed() -> None:
    """Failure for a missing package, now and not after an hour of training."""
    for module in ("filelock", "jinja2", "matplotlib", "numpy", "rich", "sklearn", "torch"):
        if importlib.util.find_spec(module) is None:
            raise Failure(f"{module} is missing: install the race with pip install 'kfqn[race]'.")


def check_scale(options: argparse.Namespace, problem: Problem) -> None:
    """Failure for a device that is not there or too few images, before anything is written."""
    if options.train_size is not None and options.train_size < problem.batch_size:
        raise Failure(
            f"--train-size must be at least one batch, {problem.batch_size} here, got {options.train_size}."
        )
    if options.device != "cpu":
        import torch

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


def data_folder(options: argparse.Namespace, console: "Console") -> Path:
    """The folder with the data set, downloaded first if the user named none and it is not there."""
    from kfqn.race import cifar

    if options.data_dir is not None:
        cifar.cifar10(options.data_dir)  # every file once, so that what is wrong is said before any run
        folder: Path = options.data_dir
        return folder
    if not cifar.found(DEFAULT_DATA):
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("CIFAR-10", total=None)
            cifar.download(
                DEFAULT_DATA, lambda done, total: progress.update(task, completed=done, total=total or None)
            )
    return DEFAULT_DATA


def exit_status(runs: Sequence["Run"]) -> int:
    """1 if any run failed or is unfinished; a diverged run is a result."""
    states = [(run.end() or {"status": "unfinished"})["status"] for run in runs]
    return 1 if "failed" in states or "unfinished" in states else 0
