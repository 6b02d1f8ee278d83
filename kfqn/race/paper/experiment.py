"""The runs and the sweeps that a figure or a table of the paper needs, done if they are missing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from kfqn.race import sweep as sweeping
from kfqn.race.entrants import ENTRANTS
from kfqn.race.entrants.grids import grid
from kfqn.race.entrants.settings import Settings, format_settings
from kfqn.race.options import PaperOptions, Training, Tuning
from kfqn.race.problems import Problem
from kfqn.race.report.results import PAPER
from kfqn.race.runs import Run
from kfqn.race.runs.plan import Scale
from kfqn.race.session import Session, open_session, scale_of, search_of

BUDGET = 2000.0  # CPU seconds of a run in the paper, for its 50,000 training images
IMAGES = 50_000


@dataclass(frozen=True)
class Choice:
    """An optimizer of a figure with its settings, and where they come from."""

    name: str
    settings: Settings
    source: str


@dataclass(frozen=True)
class Experiment:
    """One problem of a figure or of Table 3: its scale, and a session in a folder of its own."""

    tuning: Tuning
    problem: Problem
    scale: Scale
    session: Session

    @property
    def sweep_file(self) -> Path:
        """Where sweeps of this problem are kept."""
        return self.session.out / "sweep.json"

    def entries(self, names: Sequence[str], by: str) -> dict[str, sweeping.Entry]:
        """The sweeps of these optimizers; one that is missing or not complete is done now."""
        key = sweeping.key(self.problem, by)
        known = sweeping.load(self.sweep_file).get(key, {})
        missing = [name for name in names if name not in known or not sweeping.complete(known[name])]
        if missing:
            self.session.console.print(
                f"{key}: no complete sweep of {', '.join(missing)} in {self.sweep_file}; running it",
                highlight=False,
                soft_wrap=True,
            )
            search = search_of(self.tuning, self.scale, by)
            field = [
                (name, s)
                for name in missing
                for s in grid(self.problem.name, name, search.coarse, search.max_points)
            ]
            new, _ = self.session.tune(self.problem, field, self.scale, search)
            sweeping.save(new, key, self.sweep_file)
            known = known | new
        return {name: known[name] for name in names}

    def run(self, choices: Sequence[Choice], seeds: int) -> list[Run]:
        """The runs of these choices: said first, then done if they are missing."""
        scale, count = self.scale, len(choices) * seeds
        limits = [_counted(scale.epochs, "epoch")] if scale.epochs else []
        limits += [f"{scale.budget:g} CPU seconds"] if scale.budget else []
        self.session.console.print(
            f"{self.problem.name}: {_counted(count, 'run')}, {' or '.join(limits)} each, "
            f"{min(scale.jobs, count)} at a time"
        )
        plan = Table(box=None, header_style="dim", pad_edge=False)
        for heading in ("optimizer", "settings", "from", "seeds"):
            plan.add_column(heading)
        for choice in choices:
            values = format_settings(choice.settings)
            plan.add_row(ENTRANTS[choice.name].label, values, choice.source, str(seeds))
        self.session.console.print(plan)
        field = [(choice.name, choice.settings) for choice in choices]
        return self.session.run(self.problem, field, seeds, scale, PAPER.loss)


def experiments(options: PaperOptions, problems: Sequence[Problem]) -> list[Experiment]:
    """Ready to train on these problems; Failure for data that is not there or a scale that cannot be."""
    scales = [paper_scale(options.training, problem) for problem in problems]
    session = open_session(options.training, problems, options.out)
    return [
        Experiment(options.tuning, problem, scale, replace(session, out=session.out / problem.name))
        for problem, scale in zip(problems, scales, strict=True)
    ]


def paper_scale(training: Training, problem: Problem) -> Scale:
    """The scale asked for; the paper's budget, by the share of its training images, unless told."""
    scale = scale_of(training, problem)
    if training.epochs or training.budget:
        return scale
    return replace(scale, epochs=None, budget=BUDGET * min(1.0, (training.train_size or IMAGES) / IMAGES))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
