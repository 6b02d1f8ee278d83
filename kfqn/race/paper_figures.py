"""``kfqn figure 1`` to ``4``: the paper's figures, and the runs that each of them needs.

A figure is drawn from the files of runs alone. What is missing is run first: the optimizers with their
settings and seeds, and, where settings come from a search that nobody has done yet, the search.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from kfqn.race import sweep as sweeping
from kfqn.race.entrants import ENTRANTS, FIELD, best_settings
from kfqn.race.failure import Failure
from kfqn.race.figure import draw
from kfqn.race.grids import FIGURE_3_DAMPING, Settings, grid
from kfqn.race.plan import Scale
from kfqn.race.problems import PROBLEMS, Problem
from kfqn.race.report import conditions_of, losses_of, print_table, standings_of, title_of, verdict
from kfqn.race.runs import Run
from kfqn.race.summary import PAPER, rows
from kfqn.race.workshop import Workshop, exit_status, open_workshop, scale_of, search_of

BUDGET = 2000.0  # CPU seconds of a run in the paper, for its 50,000 training images
IMAGES = 50_000


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


@dataclass(frozen=True)
class Choice:
    """An optimizer of a figure with its settings, and where they come from."""

    name: str
    settings: Settings
    source: str


@dataclass(frozen=True)
class Experiment:
    """One problem of a figure or of Table 3: its scale, and a workshop in a folder of its own."""

    options: argparse.Namespace
    problem: Problem
    scale: Scale
    shop: Workshop

    @property
    def sweep_file(self) -> Path:
        """Where sweeps of this problem are kept."""
        return self.shop.out / "sweep.json"

    def entries(self, names: Sequence[str], by: str) -> dict[str, sweeping.Entry]:
        """The sweeps of these optimizers; one that is missing or not complete is done now."""
        key = sweeping.key(self.problem.name, by)
        known = sweeping.load(self.sweep_file).get(key, {})
        missing = [name for name in names if name not in known or not sweeping.complete(known[name])]
        if missing:
            self.shop.console.print(
                f"{key}: no complete sweep of {', '.join(missing)} in {self.sweep_file}; running it",
                highlight=False,
                soft_wrap=True,
            )
            search = search_of(self.options, self.scale, by)
            field = [
                (name, s)
                for name in missing
                for s in grid(self.problem.name, name, search.thinned, search.points)
            ]
            new, _ = self.shop.tune(self.problem, field, self.scale, search)
            sweeping.save(new, key, self.sweep_file)
            known = known | new
        return {name: known[name] for name in names}

    def run(self, choices: Sequence[Choice], seeds: int) -> list[Run]:
        """The runs of these choices: said first, then done if they are missing."""
        scale, count = self.scale, len(choices) * seeds
        limits = [_counted(scale.epochs, "epoch")] if scale.epochs else []
        limits += [f"{scale.budget:g} CPU seconds"] if scale.budget else []
        self.shop.console.print(
            f"{self.problem.name}: {_counted(count, 'run')}, {' or '.join(limits)} each, "
            f"{min(scale.jobs, count)} at a time"
        )
        plan = Table(box=None, header_style="dim", pad_edge=False)
        for heading in ("optimizer", "settings", "from", "seeds"):
            plan.add_column(heading)
        for choice in choices:
            values = ", ".join(f"{key} {value:g}" for key, value in choice.settings.items())
            plan.add_row(ENTRANTS[choice.name].label, values, choice.source, str(seeds))
        self.shop.console.print(plan)
        field = [(choice.name, choice.settings) for choice in choices]
        return self.shop.run(self.problem, field, seeds, scale, PAPER.loss)


def experiments(options: argparse.Namespace, problems: Sequence[Problem]) -> list[Experiment]:
    """Ready to train on these problems; Failure for data that is not there or a scale that cannot be."""
    scales = [paper_scale(options, problem) for problem in problems]
    shop = open_workshop(options, problems, options.out or Path("runs"))
    return [
        Experiment(options, problem, scale, replace(shop, out=shop.out / problem.name))
        for problem, scale in zip(problems, scales, strict=True)
    ]


def paper_scale(options: argparse.Namespace, problem: Problem) -> Scale:
    """The options' scale; the paper's budget, by the share of its training images, unless told."""
    scale = scale_of(options, problem)
    if options.epochs or options.budget:
        return scale
    return replace(scale, epochs=None, budget=BUDGET * min(1.0, (options.train_size or IMAGES) / IMAGES))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def figure(options: argparse.Namespace) -> int:
    """``kfqn figure``: run what is missing and draw."""
    spec = FIGURES[options.number]
    problems = [PROBLEMS[name] for name in options.problem or spec.problems]
    for problem in problems:
        if problem.name not in spec.problems:
            raise Failure(
                f"Figure {options.number} does not show {problem.name}: choose from "
                f"{', '.join(spec.problems)}, or use 'kfqn race' for any problem."
            )
    if options.number == 3 and options.optimizers:
        raise Failure("Figure 3 always shows KF-BFGS and SGD-m: leave --optimizers out.")
    of_all = experiments(options, problems)
    if options.number in (3, 4):
        for experiment in of_all:
            search_of(options, experiment.scale, PAPER.loss)  # what is wrong with it is said before any run
    runs = [experiment.run(_choices(experiment), options.seeds) for experiment in of_all]
    console, path = of_all[0].shop.console, (options.out or Path("runs")) / f"figure-{options.number}.png"
    blocks = [(title_of(of), standings_of(of, PAPER)) for of in runs]
    draw(blocks, spec.title, path)
    for heading, standings in blocks:
        print_table(rows(standings), heading, console, PAPER)
        console.print(verdict(standings), soft_wrap=not console.is_terminal)
    everything = [run for of in runs for run in of]
    for name, reason, _ in losses_of(everything):
        console.print(f"{name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    for key, value in conditions_of(everything):
        console.print(f"{key}: {value}", style="dim", highlight=False)
    console.print(f"figure  {path}", highlight=False, soft_wrap=True)
    return exit_status(everything)


def _choices(experiment: Experiment) -> list[Choice]:
    """The optimizers of the figure on a problem, with their settings."""
    options, problem = experiment.options, experiment.problem
    names = options.optimizers or list(FIELD)
    if options.number == 3:
        return _dampings(experiment)
    if options.number == 4:
        entries = experiment.entries(names, "test_error")
        return [_best(experiment, name, entries[name]) for name in names]
    swept = sweeping.load(experiment.sweep_file).get(problem.name, {})
    return [
        _best(experiment, name, swept[name])
        if name in swept and swept[name]["best"]
        else Choice(name, *best_settings(problem.name, name, experiment.sweep_file))
        for name in names
    ]


def _dampings(experiment: Experiment) -> list[Choice]:
    """KF-BFGS with every damping of Figure 3 that was swept and its best learning rate, and SGD-m."""
    entries = experiment.entries(["kfbfgs", "sgd"], PAPER.loss)
    entry = entries["kfbfgs"]
    found = [
        sweeping.best("kfbfgs", entry["points"], PAPER.loss, damping=damping) for damping in FIGURE_3_DAMPING
    ]
    source = f"sweep: {sweeping.told(entry)}"
    ours = [Choice("kfbfgs", settings, source) for settings in found if settings]
    return [*ours, _best(experiment, "sgd", entries["sgd"])]


def _best(experiment: Experiment, name: str, entry: sweeping.Entry) -> Choice:
    if entry["best"] is None:
        raise Failure(
            f"the sweep of {name} on {experiment.problem.name} has no point that finished: sweep again, with "
            "more epochs or without --coarse."
        )
    return Choice(name, entry["best"], f"sweep: {sweeping.told(entry)}")
