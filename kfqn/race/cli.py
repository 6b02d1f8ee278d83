"""The command line: one command run, from argparse's namespace, which ends here, to an exit status."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from kfqn.race.entrants import Settings
from kfqn.race.entrants.grids import SETTINGS
from kfqn.race.entrants.registry import SCHEDULE
from kfqn.race.failure import Failure
from kfqn.race.options import PaperOptions, RaceOptions, SweepOptions, Training, Tuning
from kfqn.race.parser import parser

PACKAGES = ("filelock", "jinja2", "matplotlib", "numpy", "rich", "sklearn", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 a run failed, 2 wrong use, 130 interrupted."""
    given = parser().parse_args(arguments)
    if str(Path.cwd()) not in sys.path:  # optimizers of the current folder; nothing installed is hidden
        sys.path.append(str(Path.cwd()))
    try:
        for package in PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise Failure(f"{package} is missing: install the race with pip install 'kfqn[race]'.")
        if given.command != "race" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise Failure(f"torchrun can start a race, not a {given.command}: start it as kfqn itself.")
        result = COMMANDS[given.command](given)
    except Failure as failure:
        print(f"kfqn: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkfqn: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return result


def run_race(given: argparse.Namespace) -> int:
    """``kfqn race``."""
    from kfqn.race.commands import race

    schedule, training = schedule_of(given), training_of(given)
    return race(
        RaceOptions(given.problem, given.optimizers, schedule, given.seeds, given.out, training=training)
    )


def run_sweep(given: argparse.Namespace) -> int:
    """``kfqn sweep``."""
    from kfqn.race.commands import sweep

    return sweep(
        SweepOptions(
            problem=given.problem,
            optimizers=given.optimizers,
            schedule=schedule_of(given),
            by=given.by,
            seeds=given.seeds,
            out=given.out,
            save=given.save,
            tuning=tuning_of(given),
            training=training_of(given),
        )
    )


def run_figure(given: argparse.Namespace) -> int:
    """``kfqn figure``."""
    from kfqn.race.paper.figures import figure

    return figure(paper_of(given, seeds=given.seeds))


def run_table(given: argparse.Namespace) -> int:
    """``kfqn table``."""
    from kfqn.race.paper.tables import table

    return table(paper_of(given, batch_size=given.batch_size))


def paper_of(given: argparse.Namespace, **own: int) -> PaperOptions:
    """What a command that redoes a figure or a table takes; ``own`` is what the other has not."""
    return PaperOptions(
        given.number,
        given.problem,
        given.optimizers,
        given.out,
        tuning=tuning_of(given),
        training=training_of(given),
        **own,
    )


def training_of(given: argparse.Namespace) -> Training:
    """The options of `add_scale`."""
    return Training(**{field.name: getattr(given, field.name) for field in fields(Training)})


def schedule_of(given: argparse.Namespace) -> Settings:
    """Those options of `add_schedule` that were given."""
    return {key: getattr(given, key) for key in SCHEDULE if getattr(given, key) is not None}


def tuning_of(given: argparse.Namespace) -> Tuning:
    """The options of `add_search`; ``--coarse`` without a name stands for every setting."""
    coarse = SETTINGS if given.coarse == [] else tuple(given.coarse or ())
    return Tuning(coarse, given.points, given.halving)


def run_runs(given: argparse.Namespace) -> int:
    """``kfqn runs``."""
    from kfqn.race.report.listing import csv_of, print_runs, runs_below

    runs = runs_below(given.folder)
    if not given.csv:
        print_runs(runs)
        return 0
    try:
        print(csv_of(runs), end="", flush=True)
    except BrokenPipeError:  # a reader that has seen enough, as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


COMMANDS = {"race": run_race, "sweep": run_sweep, "figure": run_figure, "table": run_table, "runs": run_runs}
