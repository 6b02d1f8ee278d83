"""``kfqn race`` and ``kfqn sweep``, from options to files and tables."""

import argparse
from pathlib import Path

from kfqn.race import processes
from kfqn.race import sweep as sweeping
from kfqn.race.entrants import best_settings
from kfqn.race.grids import grid, spread
from kfqn.race.problems import PROBLEMS
from kfqn.race.report import write_report
from kfqn.race.summary import RACE
from kfqn.race.workshop import exit_status, open_workshop, scale_of, search_of


def race(options: argparse.Namespace) -> int:
    """Train the field with every seed and report who is ahead."""
    problem, out = PROBLEMS[options.problem], output_folder(options)
    field = [
        (name, settings or best_settings(problem.name, name, out / "sweep.json")[0])
        for name, settings in options.optimizers
    ]
    scale = scale_of(options, problem)
    with processes.together(options.device):
        shop = open_workshop(options, [problem], out)
        runs = shop.run(problem, field, options.seeds, scale, RACE.loss)
        if processes.rank() == 0:
            write_report(runs, out, shop.console)
        return exit_status(runs)


def sweep(options: argparse.Namespace) -> int:
    """Go through the grids and save what was best."""
    problem, out = PROBLEMS[options.problem], output_folder(options)
    path = options.save or out / "sweep.json"
    scale = scale_of(options, problem)
    search = search_of(options, scale, options.by, options.seeds)
    sweeping.load(path)
    shop = open_workshop(options, [problem], out)
    thinned, most = search.thinned, search.points
    field = [
        (name, settings)
        for name, own in options.optimizers
        for settings in (spread(own, thinned, most) if own else grid(problem.name, name, thinned, most))
    ]
    entries, runs = shop.tune(problem, field, scale, search)
    sweeping.save(entries, sweeping.key(problem.name, search.by), path)
    sweeping.print_entries(entries, shop.console)
    shop.console.print(f"saved to {path}", highlight=False, soft_wrap=True)
    return exit_status(runs)


def output_folder(options: argparse.Namespace) -> Path:
    """Where the command writes."""
    folder: Path = options.out or Path("runs") / options.problem
    return folder
