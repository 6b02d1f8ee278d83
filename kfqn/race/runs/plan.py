"""What is to be run: a problem at some scale, by some optimizers, with some seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from kfqn.race import process_group
from kfqn.race.cores import available_cores, requested_threads
from kfqn.race.entrants.registry import entrant_of
from kfqn.race.entrants.settings import Settings
from kfqn.race.problems import Problem
from kfqn.race.runs.config import Config

EVALUATED = 10_000  # training and test images that loss and error are read on

Field = Sequence[tuple[str, Settings]]  # names of optimizers with settings; a name may come twice


@dataclass(frozen=True)
class Scale:
    """How much of a problem is run and for how long; None is the problem's own, or no limit."""

    epochs: int | None
    budget: float | None
    width: int | None
    train_size: int | None
    evaluated: int
    device: str
    jobs: int

    @property
    def threads(self) -> int:
        """Intra-op threads of a run: OMP_NUM_THREADS; else one, or every core if it has them to itself."""
        alone = self.jobs == 1 and self.device == "cpu" and process_group.size() == 1
        return requested_threads() or (available_cores() if alone else 1)


@dataclass(frozen=True)
class Search:
    """How a grid is gone through, and what its best point has the least of.

    ``coarse`` settings are tried at every second value only, and of more than ``max_points`` points so many
    drawn at random (None: all); see `kfqn.race.sweep` for halving.
    """

    by: str
    halving: bool
    coarse: tuple[str, ...]
    max_points: int | None
    seeds: int


def code_of(problem: Problem, entrant: str) -> str:
    """What tells versions apart of a problem or an optimizer that the current folder holds; else empty."""
    return "-".join(filter(None, (problem.code, entrant_of(entrant).digest())))


def configs(problem: Problem, field: Field, seeds: int, scale: Scale) -> list[Config]:
    """One configuration for every optimizer and seed, each once, all optimizers of a seed together."""
    wanted = [
        Config(
            problem=problem.name,
            entrant=name,
            settings=dict(settings),
            seed=seed,
            epochs=scale.epochs,
            budget=scale.budget,
            evaluated=scale.evaluated,
            width=scale.width or problem.width,
            batch_size=problem.batch_size,
            weight_decay=problem.weight_decay,
            train_size=scale.train_size,
            device=scale.device,
            threads=scale.threads,
            processes=process_group.size(),
            code=code_of(problem, name),
        )
        for seed in range(seeds)
        for name, settings in field
    ]
    return [*{config.identity: config for config in wanted}.values()]
