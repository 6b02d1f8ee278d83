"""The command line, ``kfqn race`` and ``kfqn sweep``: what can be said, without importing anything heavy."""

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from kfqn import __version__
from kfqn.race.entrants import ENTRANTS, Settings
from kfqn.race.failure import Failure
from kfqn.race.problems import DEFAULT_DATA, PROBLEMS

PACKAGES = ("filelock", "jinja2", "matplotlib", "numpy", "rich", "sklearn", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 a run failed, 2 wrong use, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        for package in PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise Failure(f"{package} is missing: install the race with pip install 'kfqn[race]'.")
        from kfqn.race import commands

        result: int = getattr(commands, options.command)(options)
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
    race.set_defaults(command="race")
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
    sweep.set_defaults(command="sweep")
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
        "--data-dir",
        type=Path,
        help=f"where the images are (default: ./{DEFAULT_DATA}, downloaded to it once)",
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
