"""``kfqn figure 1`` to ``4``: the paper's figures, and the runs that each of them needs.

A figure is drawn from the files of runs alone. What is missing is run first: the optimizers with their
settings and seeds, and, where settings come from a search that nobody has done yet, the search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from kfqn.race import sweep as sweeping
from kfqn.race.entrants import PAPER_FIELD, best_settings
from kfqn.race.entrants.grids import FIGURE_3_DAMPING
from kfqn.race.failure import Failure
from kfqn.race.options import PaperOptions
from kfqn.race.paper.experiment import Choice, Experiment, experiments
from kfqn.race.problems import PROBLEMS, Problem
from kfqn.race.report.figure import draw
from kfqn.race.report.results import PAPER, Result, results_of
from kfqn.race.report.sentences import merged_conditions, title_of, unfinished, verdict
from kfqn.race.report.table import print_table, rows
from kfqn.race.runs import Run
from kfqn.race.session import exit_status, search_of


@dataclass(frozen=True)
class Figure:
    """What a figure of the paper shows."""

    title: str
    problems: tuple[str, ...]


FIGURES = {
    1: Figure("Figure 1: CIFAR-10", ("cifar10-allcnn", "cifar10-vgg16")),
    2: Figure("Figure 2: CIFAR-100", ("cifar100-allcnn", "cifar100-vgg16")),
    3: Figure(
        "Figure 3: KF-BFGS with several dampings, each with its best learning rate",
        ("cifar10-allcnn", "cifar10-vgg16", "cifar100-allcnn", "cifar100-vgg16"),
    ),
    4: Figure("Figure 4: settings chosen by test error", ("cifar100-vgg16",)),
}


def figure(options: PaperOptions) -> int:
    """``kfqn figure``: run what is missing and draw."""
    spec = FIGURES[options.number]
    of_all = experiments(options, _problems(options, spec))
    if options.number in (3, 4):
        for experiment in of_all:
            search_of(options.tuning, experiment.scale, PAPER.loss)  # what is wrong is said before any run
    runs = [experiment.run(_choices(options, experiment), options.seeds) for experiment in of_all]
    console, path = of_all[0].session.console, options.out / f"figure-{options.number}.png"
    blocks = [(title_of(of), results_of(of, PAPER)) for of in runs]
    draw(blocks, spec.title, path)
    everything = [run for of in runs for run in of]
    _print(blocks, everything, console)
    console.print(f"figure  {path}", highlight=False, soft_wrap=True)
    return exit_status(everything)


def _problems(options: PaperOptions, spec: Figure) -> list[Problem]:
    """Those that the figure is to show; Failure for one that the paper's does not."""
    problems = [PROBLEMS[name] for name in options.problems or spec.problems]
    for problem in problems:
        if problem.name not in spec.problems:
            raise Failure(
                f"Figure {options.number} does not show {problem.name}: choose from "
                f"{', '.join(spec.problems)}, or use 'kfqn race' for any problem."
            )
    if options.number == 3 and options.optimizers:
        raise Failure("Figure 3 always shows KF-BFGS and SGD-m: leave --optimizers out.")
    return problems


def _print(blocks: Sequence[tuple[str, Sequence[Result]]], runs: Sequence[Run], console: Console) -> None:
    """A table and a verdict for each block, what did not finish, and the conditions."""
    for heading, results in blocks:
        print_table(rows(results), heading, console, PAPER)
        console.print(verdict(results), soft_wrap=not console.is_terminal)
    for name, reason, _ in unfinished(runs):
        console.print(f"{name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    for key, value in merged_conditions(runs):
        console.print(f"{key}: {value}", style="dim", highlight=False)


def _choices(options: PaperOptions, experiment: Experiment) -> list[Choice]:
    """The optimizers of the figure on a problem, with their settings."""
    names = options.optimizers or PAPER_FIELD
    if options.number == 3:
        return _dampings(experiment)
    if options.number == 4:
        entries = experiment.entries(names, "test_error")
        return [_best(experiment, name, entries[name]) for name in names]
    problem = experiment.problem.name
    swept = sweeping.load(experiment.sweep_file).get(problem, {})
    return [
        _best(experiment, name, swept[name])
        if name in swept and swept[name]["best"]
        else Choice(name, *best_settings(problem, name, experiment.sweep_file))
        for name in names
    ]


def _dampings(experiment: Experiment) -> list[Choice]:
    """KF-BFGS with every damping of Figure 3 that was swept and its best learning rate, and SGD-m."""
    entries = experiment.entries(["kfbfgs", "sgd"], PAPER.loss)
    entry = entries["kfbfgs"]
    found = [
        sweeping.best("kfbfgs", entry["points"], PAPER.loss, damping=damping) for damping in FIGURE_3_DAMPING
    ]
    source = f"sweep: {sweeping.describe(entry)}"
    ours = [Choice("kfbfgs", settings, source) for settings in found if settings]
    return [*ours, _best(experiment, "sgd", entries["sgd"])]


def _best(experiment: Experiment, name: str, entry: sweeping.Entry) -> Choice:
    if entry["best"] is None:
        raise Failure(
            f"the sweep of {name} on {experiment.problem.name} has no point that finished: sweep again, with "
            "more epochs or without --coarse."
        )
    return Choice(name, entry["best"], f"sweep: {sweeping.describe(entry)}")
