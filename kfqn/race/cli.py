"""The command line: what can be said, without importing anything heavy."""

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kfqn import __version__
from kfqn.race.entrants import ENTRANTS, FIELD, OF_TRAINER, RACE, SWEPT
from kfqn.race.failure import Failure
from kfqn.race.grids import SETTINGS, Grid, Settings
from kfqn.race.problems import DEFAULT_DATA, PROBLEMS

PACKAGES = ("filelock", "jinja2", "matplotlib", "numpy", "rich", "sklearn", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 a run failed, 2 wrong use, 130 interrupted."""
    options = parser().parse_args(arguments)
    if str(Path.cwd()) not in sys.path:  # optimizers of the current folder; nothing installed is hidden
        sys.path.append(str(Path.cwd()))
    try:
        for package in PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise Failure(f"{package} is missing: install the race with pip install 'kfqn[race]'.")
        if options.command != "race" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise Failure(f"torchrun can start a race, not a {options.command}: start it as kfqn itself.")
        home = {"figure": "paper_figures", "table": "paper_tables"}.get(options.command, "commands")
        module = importlib.import_module(f"kfqn.race.{home}")
        result: int = getattr(module, options.command)(options)
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
        default=[(name, None) for name in RACE],
        metavar="NAME[:KEY=VALUE,...]",
        help=f"any of {', '.join(ENTRANTS)}, with settings of your own if you like: kfbfgs:lr=3,damping=1 "
        f"(default: {' '.join(RACE)}); or any torch optimizer by its dotted name, with its own arguments: "
        "torch.optim.RMSprop:lr=1e-3,centered=true; cosine=1 lets the learning rate of any fall to 0 along "
        "half a cosine, averaged=8 reads loss and error of an average of the weights that forgets all but "
        "about the last ninth of the steps",
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
        "--optimizers",
        nargs="+",
        type=swept,
        default=[(name, None) for name in FIELD],
        metavar="NAME[:KEY=VALUE/VALUE,...]",
        help=f"any of {', '.join(SWEPT)} (default: {' '.join(FIELD)}); or any torch optimizer by its dotted "
        "name, with the values to try: mine.MySGD:lr=0.01/0.1/1,nesterov=true",
    )
    sweep.add_argument("--save", type=Path, metavar="FILE", help="default: sweep.json in the output folder")
    sweep.add_argument("--seeds", type=positive, default=1, help="runs of every point (default: 1)")
    add_search(sweep, by=True)
    add_problem(sweep)
    add_scale(sweep)
    figure = commands.add_parser(
        "figure",
        help="draw a figure of the paper",
        description="Draw Figure 1, 2, 3 or 4 of the paper from the files of runs in the output folder, "
        "after running what is missing. Settings: those that 'kfqn sweep --out OUT/PROBLEM' found, else the "
        "paper's Table 3 (Figures 3 and 4 sweep first if nobody has). A run lasts the paper's 2000 CPU "
        "seconds, by the share of the training images that --train-size leaves, unless --epochs or --budget "
        "says otherwise.",
    )
    figure.set_defaults(command="figure")
    figure.add_argument("number", type=int, choices=(1, 2, 3, 4))
    figure.add_argument(
        "--seeds", type=positive, default=5, help="runs of everything (default: the paper's 5)"
    )
    add_paper(figure)

    table = commands.add_parser(
        "table",
        help="print a table of the paper",
        description="Print Table 1 (storage), 2 (computation per iteration) or 3 (best settings) of the "
        "paper with what is measured here. Table 3 sweeps first where nobody has; its options are "
        "those of 'kfqn sweep'. Tables 1 and 2 need no data.",
    )
    table.set_defaults(command="table")
    table.add_argument("number", type=int, choices=(1, 2, 3))
    table.add_argument(
        "--batch-size", type=positive, default=256, help="m, for Table 2 (default: the paper's 256)"
    )
    add_paper(table)
    return top


def add_paper(command: argparse.ArgumentParser) -> None:
    """Options of the commands that redo a figure or a table."""
    command.add_argument(
        "--problem",
        nargs="+",
        choices=PROBLEMS,
        metavar="PROBLEM",
        help="default: those the paper shows there",
    )
    command.add_argument(
        "--optimizers", nargs="+", choices=FIELD, help="default: those the paper shows there"
    )
    command.add_argument(
        "--out", type=Path, help="output folder, which holds one folder a problem (default: runs)"
    )
    add_search(command, by=False)
    add_scale(command)


def add_problem(command: argparse.ArgumentParser) -> None:
    """The problem and the folder of a command that deals with one."""
    command.add_argument(
        "--problem", choices=PROBLEMS, default="digits", help="default: digits, needs no download"
    )
    command.add_argument("--out", type=Path, help="output folder (default: runs/PROBLEM)")


def add_search(command: argparse.ArgumentParser, *, by: bool) -> None:
    """How a command that tunes goes through the grids."""
    if by:
        command.add_argument(
            "--by",
            choices=("average_loss", "train_loss", "test_error"),
            default="average_loss",
            help="what the best point has the least of, at the end of any epoch; average_loss is the paper's "
            "0.9 moving average of mini-batch losses (default: %(default)s)",
        )
    command.add_argument(
        "--coarse",
        nargs="*",
        choices=SETTINGS,
        default=None,
        metavar="SETTING",
        help="only every second value of these settings, of every one if none is named",
    )
    command.add_argument(
        "--points",
        type=positive,
        metavar="N",
        help="of a larger grid try only N points, drawn at random but always the same: equal chances for all",
    )
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
        "--jobs",
        type=positive,
        help="parallel processes (default: one a core that this one may use; on a GPU, 1), of one thread "
        "each, or of OMP_NUM_THREADS",
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
    name, rest = _name_and_settings(text)
    if "." in name and not rest:
        return name, {}
    if "." in name:
        return name, {key: _argument(key, value) for key, _, value in map(_pair, rest.split(","))}
    if name not in ENTRANTS:
        raise argparse.ArgumentTypeError(f"no optimizer {name!r} (choose from {', '.join(ENTRANTS)})")
    if not rest:
        return name, None
    pairs = [_pair(item) for item in rest.split(",")]
    tuned, options = ENTRANTS[name].tuned, (*ENTRANTS[name].options, *OF_TRAINER)
    given = [key for key, _, _ in pairs]
    if len({*given}) < len(given) or not {*tuned} <= {*given} <= {*tuned, *options}:
        parts = [",".join(f"{key}=..." for key in keys) for keys in (tuned, options) if keys]
        takes = " and, if you like, ".join(parts) if tuned else f"only {parts[0]}"
        raise argparse.ArgumentTypeError(f"{name} takes {takes}, got {rest!r}")
    try:
        settings = {key: float(value) for key, _, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rest!r} is not of the form key=number,key=number") from None
    if not all(math.isfinite(v) and (v > 0 or key in options) for key, v in settings.items()):
        raise argparse.ArgumentTypeError(f"settings must be > 0 and finite, got {rest!r}")
    return name, {key: settings[key] for key in (*tuned, *options) if key in settings}


def swept(text: str) -> tuple[str, Grid | None]:
    """``name``, or ``dotted.name:key=value/value,...``, for argparse; None stands for the grid of `grids`."""
    name, _, rest = text.partition(":")
    if "." in name and rest:
        pairs = [_pair(item) for item in rest.split(",")]
        return name, {
            key: tuple(_argument(key, value) for value in values.split("/")) for key, _, values in pairs
        }
    if "." in name:
        raise argparse.ArgumentTypeError(
            f"{name} has no grid: give the values to try, as in {name}:lr=0.01/0.1"
        )
    if text not in SWEPT:
        raise argparse.ArgumentTypeError(
            f"no optimizer with a grid is {text!r} (choose from {', '.join(SWEPT)})"
        )
    return text, None


def _name_and_settings(text: str) -> tuple[str, str]:
    """``name:rest``, where the name may end with ``:auto``."""
    name, _, rest = text.partition(":")
    word, _, further = rest.partition(":")
    return (f"{name}:{word}", further) if f"{name}:{word}" in ENTRANTS else (name, rest)


def _pair(item: str) -> tuple[str, str, str]:
    key, equals, value = item.partition("=")
    return key.strip(), equals, value.strip()


def _argument(key: str, value: str) -> float:
    """An argument of any optimizer: true, false, a whole number or another."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    raise argparse.ArgumentTypeError(f"{key} must be a number, true or false, got {value!r}")
