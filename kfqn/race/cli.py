"""The command line, ``kfqn race`` and ``kfqn sweep``: what can be said, without importing anything heavy."""

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from kfqn import __version__
from kfqn.race.entrants import ENTRANTS
from kfqn.race.failure import Failure
from kfqn.race.grids import Settings
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
    race.add_argument("--seeds", type=positive, default=3, help="runs of everything (default: %(default)s)")
    add_problem(race)
    add_scale(race)

    sweep = commands.add_parser(
        "sweep",
        help="tune optimizers: try every point of their grids",
        description="Train every point of the optimizers' grids (on the paper's problems those of its "
        "appendix B.2), print the best of each and save all. An interrupted sweep goes on where it stopped, "
        "and several commands, on several machines that share the folder, can work on one sweep.",
    )
    sweep.set_defaults(command="sweep")
    sweep.add_argument(
        "--optimizers", nargs="+", choices=ENTRANTS, default=list(ENTRANTS), help="default: all"
    )
    sweep.add_argument("--save", type=Path, metavar="FILE", help="default: sweep.json in the output folder")
    sweep.add_argument(
        "--seeds", dest="sweep_seeds", type=positive, default=1, help="runs of every point (default: 1)"
    )
    add_search(sweep)
    add_problem(sweep)
    add_scale(sweep)
    return top


def add_problem(command: argparse.ArgumentParser) -> None:
    """The problem and the folder of a command that deals with one."""
    command.add_argument(
        "--problem", choices=PROBLEMS, default="digits", help="default: digits, needs no download"
    )
    command.add_argument("--out", type=Path, help="output folder (default: runs/PROBLEM)")


def add_search(command: argparse.ArgumentParser) -> None:
    """How a command that tunes goes through the grids."""
    command.add_argument(
        "--by",
        choices=("average_loss", "train_loss", "test_error"),
        default="average_loss",
        help="what the best point has the least of, at the end of any epoch; average_loss is the paper's 0.9 "
        "moving average of mini-batch losses (default: %(default)s)",
    )
    command.add_argument("--coarse", action="store_true", help="only every second value of each setting")
    command.add_argument(
        "--halving",
        action="store_true",
        help="successive halving: all points for a ninth of the length, the best third for a third, "
        "the best third of those in full",
    )


def add_scale(command: argparse.ArgumentParser) -> None:
    """Options of every command that trains."""
    command.add_argument("--epochs", type=positive, help="passes over the training images")
    command.add_argument(
        "--budget", type=seconds, metavar="S", help="stop a run after so many CPU seconds of training"
    )
    command.add_argument("--width", type=positive, help="filters of the first layer (default: the problem's)")
    command.add_argument("--train-size", type=positive, help="use only the first so many training images")
    command.add_argument(
        "--eval-size",
        type=positive,
        default=10_000,
        help="read loss and error on the first so many training and test images (default: %(default)s)",
    )
    command.add_argument(
        "--data-dir",
        type=Path,
        help=f"where the images are (default: ./{DEFAULT_DATA}, downloaded to it once)",
    )
    command.add_argument(
        "--jobs", type=positive, help="parallel processes, one thread each (default: one a core; on a GPU, 1)"
    )
    command.add_argument("--device", default="cpu", help="torch device, e.g. cuda (default: %(default)s)")


def seconds(text: str) -> float:
    """A number of seconds > 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0, got {text!r}")
    return value


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
    tuned, options = ENTRANTS[name].tuned, ENTRANTS[name].options
    given = [key for key, _, _ in pairs]
    if len({*given}) < len(given) or not {*tuned} <= {*given} <= {*tuned, *options}:
        takes = ",".join(f"{key}=..." for key in tuned)
        if options:
            takes += " and, if you like, " + ",".join(f"{key}=..." for key in options)
        raise argparse.ArgumentTypeError(f"{name} takes {takes}, got {rest!r}")
    try:
        settings = {key: float(value) for key, _, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rest!r} is not of the form key=number,key=number") from None
    if not all(0 < value < math.inf for value in settings.values()):
        raise argparse.ArgumentTypeError(f"settings must be > 0 and finite, got {rest!r}")
    return name, {key: settings[key] for key in (*tuned, *options) if key in settings}
