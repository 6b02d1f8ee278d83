"""The optimizers that race, and the settings each takes unless told otherwise."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kfqn.race.entrants import ours, peers
from kfqn.race.entrants.settings import Settings
from kfqn.race.failure import Failure

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Entrant:
    """``build`` makes the optimizer from a model, settings and weight decay.

    ``required`` names the settings that must be given, ``options`` those that may be; both are numbers.
    ``choices`` are options as well, each one of some words: {"direction": ("plain", "orthogonal")}. An
    ``automatic`` one needs none, and starts from its first mini-batch, as the optimizer does by default.
    One whose steps have lengths of their own is ``scheduled`` only where it says so itself.
    """

    name: str
    label: str
    build: Callable[["nn.Module", Settings, float], "torch.optim.Optimizer"]
    required: tuple[str, ...]
    options: tuple[str, ...] = ()
    automatic: bool = False
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scheduled: bool = True
    digest: Callable[[], str] = str  # another for another version of the code, where that may change

    def make(self, model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
        """The optimizer; a setting ``decay`` stands for the problem's weight decay, where it is one."""
        own = "decay" in self.settings
        return self.build(model, settings, settings.get("decay", weight_decay) if own else weight_decay)

    @property
    def settings(self) -> tuple[str, ...]:
        """All that it takes, what must be given first."""
        return (*self.required, *self.options, *self.choices)


SCHEDULE = ("schedule", "warmup", "floor")
OF_TRAINER = (*SCHEDULE, "averaged")  # settings of any optimizer, which the trainer and not it takes
OF_TRAINER_CHOICES: Mapping[str, tuple[str, ...]] = {"schedule": ("constant", "cosine")}

ENTRANTS: Mapping[str, Entrant] = {
    entrant.name: entrant
    for entrant in (
        Entrant("kfbfgs", "KF-BFGS", ours.kfbfgs, ("lr", "damping"), ours.OPTIONS, choices=ours.PARTS),
        Entrant("kflbfgs", "KF-BFGS(L)", ours.kflbfgs, ("lr", "damping"), ours.OPTIONS, choices=ours.PARTS),
        Entrant(
            "kfbfgs:auto",
            "KF-BFGS, auto",
            ours.automatic("KFBFGS"),
            (),
            ours.AUTOMATIC_OPTIONS,
            choices=ours.PARTS,
            automatic=True,
            scheduled=False,
        ),
        Entrant(
            "kflbfgs:auto",
            "KF-BFGS(L), auto",
            ours.automatic("KFLBFGS"),
            (),
            ours.AUTOMATIC_OPTIONS,
            choices=ours.PARTS,
            automatic=True,
            scheduled=False,
        ),
        Entrant(
            "kfac", "KFAC", ours.kfac, ("lr", "damping"), ("pi", "clip", "momentum", "averaging", "decay")
        ),
        Entrant("adam", "Adam", peers.adam, ("lr", "eps"), ("beta2", "decay")),
        Entrant("sgd", "SGD-m", peers.sgd, ("lr",), ("nesterov", "decay")),
        Entrant("adamw", "AdamW", peers.adamw, ("lr",), ("decay",)),
        Entrant("soap", "SOAP", peers.soap, ("lr", "beta"), ("interval", "decay")),
        Entrant("muon", "Muon", peers.muon, ("lr", "adam"), ("decay",)),
        Entrant("shampoo", "Shampoo", peers.shampoo, ("lr", "eps"), ("interval", "decay")),
        Entrant("singd", "SINGD", peers.singd, ("lr", "lr_cov"), ("damping", "decay")),
        Entrant("lbfgs", "L-BFGS", peers.lbfgs, ("lr",), ("history", "iterations"), scheduled=False),
    )
}

SWEPT = tuple(name for name, entrant in ENTRANTS.items() if not entrant.automatic)
PAPER_FIELD = ("kfbfgs", "kflbfgs", "kfac", "adam", "sgd")  # that of the paper's section 6
DEFAULT_FIELD = ("kfbfgs:auto", *PAPER_FIELD)  # what races unless told otherwise


def entrant_of(name: str) -> Entrant:
    """An entrant, or any torch optimizer by its dotted name, with its arguments as options."""
    if name in ENTRANTS:
        return ENTRANTS[name]
    build = functools.partial(peers.from_class, name)
    return Entrant(name, name.rpartition(".")[-1], build, (), digest=functools.partial(peers.digest_of, name))


def of_optimizer(settings: Settings) -> Settings:
    """The settings without the trainer's."""
    return {key: value for key, value in settings.items() if key not in OF_TRAINER}


def check_settings(entrant: str, settings: Settings, epochs: int | None, weight_decay: float) -> None:
    """Failure for settings that the optimizer or the trainer refuses, before anything is trained."""
    from torch import nn

    if settings.get("averaged", 0.0) < 0:
        raise Failure(f"averaged must be a power >= 0, got {settings['averaged']:g}.")
    _check_schedule(settings, epochs)
    try:
        small = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        entrant_of(entrant).make(small, of_optimizer(settings), weight_decay)
    except ValueError as error:
        raise Failure(f"{entrant} cannot run with these settings: {error}") from error


def _check_schedule(settings: Settings, epochs: int | None) -> None:
    schedule, warmup, floor = (settings.get(key, 0.0) for key in SCHEDULE)
    if schedule and schedule not in OF_TRAINER_CHOICES["schedule"]:
        raise Failure(f"schedule must be constant or cosine, got {schedule!r}.")
    if not (0 <= warmup < math.inf and (warmup < 1 or warmup == int(warmup))):
        raise Failure(f"warmup must be a share of the steps below 1, or a number of them, got {warmup:g}.")
    if not 0 <= floor <= 1:
        raise Failure(f"floor must be a share, 0 to 1, got {floor:g}.")
    if epochs is None and (schedule == "cosine" or 0 < warmup < 1):
        what = "a cosine" if schedule == "cosine" else "a warm-up by a share of the steps"
        raise Failure(f"{what} needs to know where it ends: give --epochs.")


def with_schedule(entrant: str, settings: Settings, default: Settings) -> Settings:
    """Settings with the default schedule, where they name none and the optimizer has no rule of its own."""
    if not entrant_of(entrant).scheduled or any(key in settings for key in SCHEDULE):
        return settings
    return {**settings, **default}
