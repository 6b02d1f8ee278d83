"""``kfqn figure 1`` to ``4``: the paper's figures, and the runs that each of them needs.

A figure is drawn from the files of runs alone. What is missing is run first: the optimizers with their
settings and seeds, and, where settings come from a search that nobody has done yet, the search.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kfqn.race import sweep as sweeping
from kfqn.race.commands import data_folder, do_runs, exit_status, scale_of, terminal, tune
from kfqn.race.entrants import ENTRANTS, best_settings
from kfqn.race.failure import Failure
from kfqn.race.figure import draw
from kfqn.race.grids import FIGURE_3_DAMPING
from kfqn.race.plan import Field, Scale
from kfqn.race.problems import PROBLEMS, Problem
from kfqn.race.report import conditions_of, losses_of, print_table, standings_of, title_of, verdict
from kfqn.race.runs import Run
from kfqn.race.summary import PAPER, common_target, rows

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
class Workshop:
    """Where and how one command trains; shared by the figures and Table 3."""

    options: argparse.Namespace
    out: Path
    data_dir: Path | None
    console: Console

    def scale(self, problem: Problem) -> Scale:
        """The options' scale; the paper's budget, by the share of its training images, unless told."""
        scale = scale_of(self.options, problem)
        if self.options.epochs or self.options.budget:
            return scale
        share = min(1.0, (self.options.train_size or IMAGES) / IMAGES)
        return replace(scale, epochs=None, budget=BUDGET * share)

    def folder(self, problem: Problem) -> Path:
        """The folder of a problem's runs and of its sweeps."""
        return self.out / problem.name

    def points(self, problem: Problem, names: Sequence[str], by: str) -> dict[str, list[sweeping.Point]]:
        """The points of a sweep of these optimizers, which is done now if it has not been."""
        path = self.folder(problem) / "sweep.json"
        key = sweeping.key(problem.name, by)
        known = sweeping.load(path).get(key, {}).get("points", {})
        missing = [name for name in names if name not in known]
        if missing:
            self.console.print(f"{problem.name}: no sweep of {', '.join(missing)} in {path}; running it")
            options = argparse.Namespace(**vars(self.options) | {"by": by, "sweep_seeds": 1})
            out, scale = self.folder(problem), self.scale(problem)
            result, _ = tune(options, problem, missing, scale, out, self.data_dir, self.console)
            known = known | sweeping.save(result, key, path)["points"]
        return {name: known[name] for name in names}

    def run(self, problem: Problem, field: Field, seeds: int) -> list[Run]:
        """The runs of a field, said first, then done if they are missing."""
        scale, title = (
            self.scale(problem),
            f"{problem.name}: {len(field) * seeds} runs, {_length(self, problem)}",
        )
        plan = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
        for heading in ("optimizer", "settings", "seeds"):
            plan.add_column(heading)
        for name, settings in field:
            values = ", ".join(f"{key} {value:g}" for key, value in settings.items())
            plan.add_row(ENTRANTS[name].label, values, str(seeds))
        self.console.print(plan)
        return do_runs(
            problem, field, seeds, scale, self.folder(problem), self.data_dir, self.console, PAPER.loss
        )


def _length(shop: Workshop, problem: Problem) -> str:
    scale = shop.scale(problem)
    limits = [f"{scale.epochs} epochs"] if scale.epochs else []
    limits += [f"{scale.budget:g} CPU seconds"] if scale.budget else []
    return " or ".join(limits) + f" each, {scale.jobs} at a time"


def workshop(options: argparse.Namespace, problems: Sequence[Problem]) -> Workshop:
    """Ready to train on these problems; Failure for data that is not there or a scale that cannot be."""
    console = terminal()
    for problem in problems:
        scale_of(options, problem)
    out = options.out or Path("runs")
    return Workshop(options, out, data_folder(options, problems, console), console)


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
    shop = workshop(options, problems)
    runs = {problem.name: shop.run(problem, _field(shop, problem), options.seeds) for problem in problems}
    path = shop.out / f"figure-{options.number}.png"
    blocks = [(title_of(of), standings_of(of, PAPER)) for of in runs.values()]
    draw(blocks, spec.title, path)
    for heading, standings in blocks:
        table = rows(standings)
        print_table(table, heading, shop.console)
        shop.console.print(verdict(table, common_target(standings)))
    everything = [run for of in runs.values() for run in of]
    for name, reason, _ in losses_of(everything):
        shop.console.print(f"{name}: {reason}", style="red", highlight=False, markup=False)
    for key, value in conditions_of(everything):
        shop.console.print(f"{key}: {value}", style="dim", highlight=False)
    shop.console.print(f"figure  {path}", highlight=False, soft_wrap=True)
    return exit_status(everything)


def _field(shop: Workshop, problem: Problem) -> Field:
    """The optimizers of the figure on a problem, with their settings."""
    names = shop.options.optimizers
    if shop.options.number == 3:
        return _dampings(shop, problem)
    if shop.options.number == 4:
        points = shop.points(problem, names, "test_error")
        return [
            (name, _found(problem, name, sweeping.best(name, points[name], "test_error"))) for name in names
        ]
    sweep = shop.folder(problem) / "sweep.json"
    return [(name, best_settings(problem.name, name, sweep)) for name in names]


def _dampings(shop: Workshop, problem: Problem) -> Field:
    """KF-BFGS with every damping of Figure 3 that was swept and its best learning rate, and SGD-m."""
    points = shop.points(problem, ["kfbfgs", "sgd"], "average_loss")
    found = [
        sweeping.best("kfbfgs", points["kfbfgs"], "average_loss", damping=damping)
        for damping in FIGURE_3_DAMPING
    ]
    sgd = sweeping.best("sgd", points["sgd"], "average_loss")
    return [*(("kfbfgs", s) for s in found if s), ("sgd", _found(problem, "sgd", sgd))]


def _found(problem: Problem, name: str, settings: dict[str, float] | None) -> dict[str, Any]:
    if settings is None:
        raise Failure(
            f"the sweep of {name} on {problem.name} has no point that finished: sweep again, with more "
            "epochs or without --coarse."
        )
    return settings
