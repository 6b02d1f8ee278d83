"""What can be said on the command line, and its help, without importing anything heavy."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfqn import __version__
from kfqn.race.arguments import Parser, entrant, one_of, positive, problem, seconds, share, swept, warm_up
from kfqn.race.entrants import DEFAULT_FIELD, ENTRANTS, PAPER_FIELD, SWEPT
from kfqn.race.entrants.grids import SETTINGS
from kfqn.race.entrants.registry import OF_TRAINER_CHOICES
from kfqn.race.problems import DEFAULT_DATA, DEVELOPMENT, PROBLEMS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]

OF_PAPER = [name for name in PROBLEMS if name not in DEVELOPMENT]  # that figures and tables can be made of


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = Parser(
        prog="kfqn",
        description="Race Kronecker-factored quasi-Newton optimizers against others on real data.",
    )
    top.add_argument("--version", action="version", version=f"kfqn {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    add_race(commands)
    add_sweep(commands)
    add_figure(commands)
    add_table(commands)
    add_runs(commands)
    return top


def add_race(commands: "Commands") -> None:
    """``kfqn race``."""
    race = commands.add_parser(
        "race",
        help="train one model with several optimizers and show who is ahead",
        description="Train the same model on the same data with several optimizers, by default each with the "
        "best settings a sweep found, and show who is ahead by epoch and by second: a table, race.png and "
        "race.html. An interrupted race goes on where it stopped; finished runs are not done again.",
    )
    race.set_defaults(command="race")
    add_optimizers(
        race,
        entrant,
        "NAME[:KEY=VALUE,...]",
        f"any of {', '.join(ENTRANTS)}, with settings of your own if you like: kfbfgs:lr=3,damping=1 "
        f"(default: {' '.join(DEFAULT_FIELD)}; on the development set its rivals); or any torch optimizer by "
        "its dotted name, with its own arguments: torch.optim.RMSprop:lr=1e-3,centered=true; any takes "
        "schedule=cosine, warmup=0.05 and floor=0.1, as the options below, and averaged=8, which reads loss "
        "and error of an average of the weights that forgets all but about the last ninth of the steps; "
        "decay=0.01 stands for the problem's weight decay",
    )
    add_schedule(race)
    race.add_argument("--seeds", type=positive, default=3, help="runs of everything (default: %(default)s)")
    add_problem(race)
    add_scale(race)


def add_sweep(commands: "Commands") -> None:
    """``kfqn sweep``."""
    sweep = commands.add_parser(
        "sweep",
        help="tune optimizers: try every point of their grids",
        description="Train every point of the optimizers' grids (on the paper's problems those of its "
        "appendix B.2), print the best of each and save all. An interrupted sweep goes on where it stopped, "
        "and several commands, on several machines that share the folder, can work on one sweep.",
    )
    sweep.set_defaults(command="sweep")
    add_optimizers(
        sweep,
        swept,
        "NAME[:KEY=VALUE/VALUE,...]",
        f"any of {', '.join(SWEPT)} (default: {' '.join(PAPER_FIELD)}; on the development set its rivals); "
        "or any torch optimizer by its dotted name, with the values to try: mine.MySGD:lr=0.01/0.1/1",
    )
    add_schedule(sweep)
    sweep.add_argument("--save", type=Path, metavar="FILE", help="default: sweep.json in the output folder")
    sweep.add_argument("--seeds", type=positive, default=1, help="runs of every point (default: 1)")
    sweep.add_argument(
        "--by",
        choices=("average_loss", "train_loss", "test_loss", "test_error"),
        help="what the best point has the least of, at the end of any epoch (default: average_loss, the "
        "paper's 0.9 moving average of mini-batch losses; on the development set what its tables show first)",
    )
    add_search(sweep)
    add_problem(sweep)
    add_scale(sweep)


def add_figure(commands: "Commands") -> None:
    """``kfqn figure``."""
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


def add_table(commands: "Commands") -> None:
    """``kfqn table``."""
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


def add_runs(commands: "Commands") -> None:
    """``kfqn runs``."""
    runs = commands.add_parser(
        "runs",
        help="list the runs of a folder",
        description="List the runs in a folder, a line each; or, as CSV, a line an epoch: settings, seed, "
        "losses, error, seconds and status.",
    )
    runs.set_defaults(command="runs")
    runs.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="looked through whole (default: runs)"
    )
    runs.add_argument("--csv", action="store_true", help="a line an epoch, for other programs")


def add_optimizers(
    command: argparse.ArgumentParser,
    kind: Callable[[str], tuple[str, Any]],
    metavar: str,
    help: str,
) -> None:
    """Who takes part: names with whatever ``kind`` reads after a colon."""
    command.add_argument("--optimizers", nargs="+", type=kind, metavar=metavar, help=help)


def add_schedule(command: argparse.ArgumentParser) -> None:
    """What the learning rates of those follow that name none of it themselves."""
    command.add_argument(
        "--schedule",
        choices=OF_TRAINER_CHOICES["schedule"],
        help="what learning rates follow after the warm-up, of every optimizer that names no schedule, "
        "warmup or floor itself; not of those whose steps have lengths of their own, kfbfgs:auto, "
        "kflbfgs:auto and lbfgs, unless they say so: kfbfgs:auto:schedule=cosine (default: constant; on the "
        "development set cosine)",
    )
    command.add_argument(
        "--warmup",
        type=warm_up,
        metavar="W",
        help="rates rise to their value over this share of the steps, or so many (default: none; on the "
        "development set 0.05)",
    )
    command.add_argument(
        "--floor",
        type=share,
        metavar="F",
        help="the share of its value at which a cosine ends (default: 0; of char-gpt 0.1)",
    )


def add_paper(command: argparse.ArgumentParser) -> None:
    """Options of the commands that redo a figure or a table."""
    command.add_argument(
        "--problem",
        nargs="+",
        type=one_of("problem", OF_PAPER),
        choices=OF_PAPER,
        metavar="PROBLEM",
        help="default: those the paper shows there",
    )
    command.add_argument(
        "--optimizers",
        nargs="+",
        type=one_of("optimizer", PAPER_FIELD),
        choices=PAPER_FIELD,
        help="default: those the paper shows there",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        help="output folder, which holds one folder a problem (default: runs)",
    )
    add_search(command)
    add_scale(command)


def add_problem(command: argparse.ArgumentParser) -> None:
    """The problem and the folder of a command that deals with one."""
    command.add_argument(
        "--problem",
        type=problem,
        default="digits",
        metavar="PROBLEM",
        help=f"any of {', '.join(PROBLEMS)}: the last {len(DEVELOPMENT)} are the development set, where test "
        "error or validation loss counts (default: digits, needs no download); or your own, mine:problem for "
        "the function problem of ./mine.py, which returns a kfqn.race.Supervised",
    )
    command.add_argument(
        "--out", type=Path, help="output folder (default: runs/PROBLEM; of mine:problem runs/mine-problem)"
    )


def add_search(command: argparse.ArgumentParser) -> None:
    """How a command that tunes goes through the grids."""
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
    command.add_argument(
        "--epochs",
        type=positive,
        help="passes over the training images; of char-gpt 80 steps, of burgers 100 (default: the problem's)",
    )
    command.add_argument(
        "--budget", type=seconds, metavar="S", help="stop a run after so many CPU seconds of training"
    )
    command.add_argument(
        "--width",
        type=positive,
        help="filters of the first layer, or the width of all others (default: the problem's)",
    )
    command.add_argument(
        "--train-size",
        type=positive,
        help="use only the first so many training images; of char-gpt characters, of burgers interior points",
    )
    command.add_argument(
        "--eval-size",
        type=positive,
        default=10_000,
        help="read loss and error on the first so many training and test images; of char-gpt on so many "
        "windows, 500 at most, of burgers test points (default: %(default)s)",
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
