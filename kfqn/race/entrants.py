"""The optimizers that race, and the settings each takes unless told otherwise."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfqn.race import peers, sweep_file
from kfqn.race.failure import Failure
from kfqn.race.grids import TABLE_3, Settings, in_torch

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Entrant:
    """``build`` makes the optimizer from a model, settings and weight decay.

    ``tuned`` names the settings that must be given; ``options`` those that may be. An ``automatic`` one
    needs none, and starts from its first mini-batch, as the optimizer does by default.
    """

    name: str
    label: str
    build: Callable[["nn.Module", Settings, float], "torch.optim.Optimizer"]
    tuned: tuple[str, ...]
    options: tuple[str, ...] = ()
    automatic: bool = False


def _kfbfgs(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import kfqn

    return kfqn.KFBFGS(model, **_two_pass(settings), weight_decay=weight_decay)


def _kflbfgs(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import kfqn

    return kfqn.KFLBFGS(model, **_two_pass(settings), weight_decay=weight_decay)


def _automatic(method: str) -> Callable[["nn.Module", Settings, float], "torch.optim.Optimizer"]:
    """What builds our optimizer with its defaults, and what is given beyond them."""

    def build(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
        import kfqn

        given = {_NAMES.get(key, key): _whole(value) for key, value in settings.items() if key != "warm"}
        optimizer: torch.optim.Optimizer = getattr(kfqn, method)(model, **given, weight_decay=weight_decay)
        return optimizer

    return build


def _two_pass(settings: Settings) -> dict[str, Any]:
    """Settings as arguments; ``interval`` and ``largest`` are short for two. Without, it is the paper's."""
    warm = settings.get("warm", 0)
    if warm < 0 or int(warm) != warm:
        raise ValueError(f"warm must be a whole number of batches >= 0, got {warm:g}.")
    return {
        "lr": settings["lr"],
        "damping": settings["damping"],
        "clip": settings.get("clip"),
        "curvature_interval": _whole(settings.get("interval", 1)),
        "max_factor_size": _whole(settings.get("largest")),
    }


def _whole(value: float | None) -> Any:
    """A number from the command line as an integer if it is one; the optimizer refuses others."""
    return int(value) if value is not None and float(value).is_integer() else value


def _kfac(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import kfqn

    return kfqn.KFAC(
        model,
        lr=settings["lr"],
        damping=settings["damping"],
        weight_decay=weight_decay,
        pi=bool(settings.get("pi", 0)),
        clip=settings.get("clip"),
        momentum=settings.get("momentum", 0.0),
        averaging=settings.get("averaging", 0.0),
    )


def _sgd(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import torch

    return torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9, weight_decay=weight_decay)


def _adam(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    import torch

    return torch.optim.Adam(
        model.parameters(),
        lr=settings["lr"],
        betas=(0.9, settings.get("beta2", 0.999)),
        eps=settings["eps"],
        weight_decay=weight_decay,
    )


OF_TRAINER = ("cosine", "averaged")  # settings of any optimizer, which the trainer and not it takes
_OPTIONS = ("clip", "interval", "largest", "warm")  # the trainer takes the last
_NAMES = {"interval": "curvature_interval", "largest": "max_factor_size"}
_AUTOMATIC = ("damping", *_OPTIONS)

ENTRANTS: Mapping[str, Entrant] = {
    entrant.name: entrant
    for entrant in (
        Entrant("kfbfgs", "KF-BFGS", _kfbfgs, ("lr", "damping"), _OPTIONS),
        Entrant("kflbfgs", "KF-BFGS(L)", _kflbfgs, ("lr", "damping"), _OPTIONS),
        Entrant("kfbfgs:auto", "KF-BFGS, auto", _automatic("KFBFGS"), (), _AUTOMATIC, automatic=True),
        Entrant("kflbfgs:auto", "KF-BFGS(L), auto", _automatic("KFLBFGS"), (), _AUTOMATIC, automatic=True),
        Entrant("kfac", "KFAC", _kfac, ("lr", "damping"), ("pi", "clip", "momentum", "averaging")),
        Entrant("adam", "Adam", _adam, ("lr", "eps"), ("beta2",)),
        Entrant("sgd", "SGD-m", _sgd, ("lr",)),
        Entrant("adamw", "AdamW", peers.adamw, ("lr", "decay")),
        Entrant("soap", "SOAP", peers.soap, ("lr", "beta"), ("interval",)),
        Entrant("muon", "Muon", peers.muon, ("lr", "adam")),
        Entrant("shampoo", "Shampoo", peers.shampoo, ("lr", "eps"), ("interval",)),
        Entrant("singd", "SINGD", peers.singd, ("lr", "lr_cov"), ("damping",)),
    )
}

SWEPT = tuple(name for name, entrant in ENTRANTS.items() if not entrant.automatic)
RACE = ("kfbfgs:auto", "kfbfgs", "kflbfgs", "kfac", "adam", "sgd")  # what races unless told otherwise
FIELD = ("kfbfgs", "kflbfgs", "kfac", "adam", "sgd")  # that of the paper's section 6


def entrant_of(name: str) -> Entrant:
    """An entrant, or any torch optimizer by its dotted name, with its arguments as options."""
    if name in ENTRANTS:
        return ENTRANTS[name]
    return Entrant(name, name.rpartition(".")[-1], functools.partial(peers.from_class, name), ())


def best_settings(problem: str, entrant: str, sweep: Path) -> tuple[Settings, str]:
    """The settings an entrant races with unless told otherwise, and where they come from.

    From ``sweep``, a file of `kfqn sweep`, if it is there; else from the sweep committed in
    ``tuned.json``; else from the paper. Raises Failure if none of them knows the entrant.
    """
    committed = Path(__file__).with_name("tuned.json")
    if entrant in ENTRANTS and ENTRANTS[entrant].automatic:
        return {}, "the optimizer's defaults"
    for file, source in ((sweep, str(sweep)), (committed, "the package's own sweep")):
        entry = sweep_file.read(file).get(problem, {}).get(entrant, {})
        if entry.get("best"):
            return dict(entry["best"]), source
    if entrant in TABLE_3.get(problem, {}):
        return in_torch(entrant, TABLE_3[problem][entrant]), "the paper's Table 3"
    if entrant not in ENTRANTS:
        return {}, "the defaults of its class"
    raise Failure(
        f"no settings are known for {entrant} on {problem}: give them, as in --optimizers "
        f"{entrant}:{','.join(f'{key}=...' for key in ENTRANTS[entrant].tuned)}, or run 'kfqn sweep "
        f"--problem {problem}' with the same --out first."
    )


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
