"""``kfqn race`` and ``kfqn sweep``, from options to files and tables."""

from pathlib import Path

from kfqn.race import process_group
from kfqn.race import sweep as sweeping
from kfqn.race.entrants import Settings, best_settings, default_field, swept_field, with_schedule
from kfqn.race.entrants.grids import expand, grid
from kfqn.race.options import RaceOptions, SweepOptions
from kfqn.race.problems import Problem, problem_of
from kfqn.race.report.page import write_report
from kfqn.race.runs.plan import Field
from kfqn.race.session import exit_status, open_session, scale_of, search_of


def race(options: RaceOptions) -> int:
    """Train the field with every seed and report who is ahead."""
    problem, out = problem_of(options.problem), options.out or folder_of(options.problem)
    entrants = options.optimizers or [(name, None) for name in default_field(problem.name)]
    known = [
        (name, settings or best_settings(problem.name, name, out / "sweep.json")[0])
        for name, settings in entrants
    ]
    field = scheduled(known, problem, options.schedule)
    scale = scale_of(options.training, problem)
    with process_group.joined(options.training.device):
        session = open_session(options.training, [problem], out)
        runs = session.run(problem, field, options.seeds, scale, problem.quantities[0].key)
        if process_group.rank() == 0:
            write_report(runs, out, session.console)
        return exit_status(runs)


def sweep(options: SweepOptions) -> int:
    """Go through the grids and save what was best."""
    problem, out = problem_of(options.problem), options.out or folder_of(options.problem)
    path = options.save or out / "sweep.json"
    scale = scale_of(options.training, problem)
    search = search_of(options.tuning, scale, options.by or problem.criterion, options.seeds)
    sweeping.load(path)
    session = open_session(options.training, [problem], out)
    coarse, most = search.coarse, search.max_points
    entrants = options.optimizers or [(name, None) for name in swept_field(problem.name)]
    points = [
        (name, settings)
        for name, own in entrants
        for settings in (expand(own, coarse, most) if own else grid(problem.name, name, coarse, most))
    ]
    field = scheduled(points, problem, options.schedule)
    entries, runs = session.tune(problem, field, scale, search)
    sweeping.save(entries, sweeping.key(problem, search.by), path)
    sweeping.print_entries(entries, session.console)
    session.console.print(f"saved to {path}", highlight=False, soft_wrap=True)
    return exit_status(runs)


def folder_of(problem: str) -> Path:
    """Where the runs of a problem are unless told otherwise."""
    return Path("runs") / problem.replace(":", "-")


def scheduled(field: Field, problem: Problem, given: Settings) -> Field:
    """The field with the options' schedule, or the problem's where they say nothing, for who names none."""
    default = dict(problem.schedule) | dict(given)
    if default.get("schedule") != "cosine":
        default = {key: value for key, value in default.items() if key != "floor"}
    return [(name, with_schedule(name, settings, default)) for name, settings in field]
