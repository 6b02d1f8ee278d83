"""The optimizers that race, and the settings each takes unless told otherwise."""

import functools
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
    """

    name: str
    label: str
    build: Callable[["nn.Module", Settings, float], "torch.optim.Optimizer"]
    required: tuple[str, ...]
    options: tuple[str, ...] = ()
    automatic: bool = False
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[str, ...]:
        """All that it takes, what must be given first."""
        return (*self.required, *self.options, *self.choices)


OF_TRAINER = ("cosine", "averaged")  # settings of any optimizer, which the trainer and not it takes

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
        ),
        Entrant(
            "kflbfgs:auto",
            "KF-BFGS(L), auto",
            ours.automatic("KFLBFGS"),
            (),
            ours.AUTOMATIC_OPTIONS,
            choices=ours.PARTS,
            automatic=True,
        ),
        Entrant("kfac", "KFAC", ours.kfac, ("lr", "damping"), ("pi", "clip", "momentum", "averaging")),
        Entrant("adam", "Adam", peers.adam, ("lr", "eps"), ("beta2",)),
        Entrant("sgd", "SGD-m", peers.sgd, ("lr",)),
        Entrant("adamw", "AdamW", peers.adamw, ("lr", "decay")),
        Entrant("soap", "SOAP", peers.soap, ("lr", "beta"), ("interval",)),
        Entrant("muon", "Muon", peers.muon, ("lr", "adam")),
        Entrant("shampoo", "Shampoo", peers.shampoo, ("lr", "eps"), ("interval",)),
        Entrant("singd", "SINGD", peers.singd, ("lr", "lr_cov"), ("damping",)),
    )
}

SWEPT = tuple(name for name, entrant in ENTRANTS.items() if not entrant.automatic)
PAPER_FIELD = ("kfbfgs", "kflbfgs", "kfac", "adam", "sgd")  # that of the paper's section 6
DEFAULT_FIELD = ("kfbfgs:auto", *PAPER_FIELD)  # what races unless told otherwise


def entrant_of(name: str) -> Entrant:
    """An entrant, or any torch optimizer by its dotted name, with its arguments as options."""
    if name in ENTRANTS:
        return ENTRANTS[name]
    return Entrant(name, name.rpartition(".")[-1], functools.partial(peers.from_class, name), ())


def of_optimizer(settings: Settings) -> Settings:
    """The settings without the trainer's."""
    return {key: value for key, value in settings.items() if key not in OF_TRAINER}


def check_settings(entrant: str, settings: Settings, epochs: int | None) -> None:
    """Failure for settings that the optimizer or the trainer refuses, before anything is trained."""
    from torch import nn

    if settings.get("averaged", 0.0) < 0:
        raise Failure(f"averaged must be a power >= 0, got {settings['averaged']:g}.")
    if settings.get("cosine", 0.0) not in (0, 1):
        raise Failure(f"cosine must be 1, or 0 for none, got {settings['cosine']:g}.")
    if settings.get("cosine", 0.0) and epochs is None:
        raise Failure("cosine needs to know where it ends: give --epochs.")
    try:
        small = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        entrant_of(entrant).build(small, of_optimizer(settings), 0.0)
    except ValueError as error:
        raise Failure(f"{entrant} cannot run with these settings: {error}") from error
