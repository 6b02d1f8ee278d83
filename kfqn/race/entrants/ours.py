"""Our optimizers, and KFAC as we have it, from settings of the command line."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kfqn.race.entrants.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kfqn.parts import Parts

OPTIONS = ("clip", "interval", "largest", "decay", "warm")  # the trainer takes the last
_NAMES = {"interval": "curvature_interval", "largest": "max_factor_size"}
AUTOMATIC_OPTIONS = ("damping", *OPTIONS)


PARTS = {  # words for parts, where they are not to be those that settings choose
    "input": ("action", "inverse", "root", "none", "triangles"),
    "output": ("bfgs", "none"),
    "pairs": ("all", "curved"),
    "average": ("ema", "nesterov", "none", "bfloat16"),
    "direction": ("plain", "orthogonal"),
    "cadence": ("young", "regular"),
    "steps": ("falling", "constant", "half", "twice"),
    "weights": ("latest", "average", "longer", "shorter"),
}


def parts(settings: Settings) -> "Parts":
    """The parts that settings name."""
    from kfqn.curvature.input_factor import AveragedRoot, BatchInverse, HessianActionBFGS, NoInputFactor
    from kfqn.curvature.output_factor import BFGS, NoOutputFactor
    from kfqn.parts import Parts
    from kfqn.steps.average import Averaged, Nesterov, NoAverage
    from kfqn.steps.cadence import Regular, YoungOften
    from kfqn.steps.direction import Orthogonalised, Plain
    from kfqn.steps.relative import SHARE, RelativeSteps
    from kfqn.steps.weight_average import Latest, PolynomialAverage

    made: Mapping[str, Sequence[Any]] = {  # in the order of `PARTS`
        "input": (
            HessianActionBFGS(),
            BatchInverse(),
            AveragedRoot(),
            NoInputFactor(),
            AveragedRoot(triangles=True),
        ),
        "output": (BFGS(), NoOutputFactor()),
        "pairs": (False, True),
        "average": (Averaged(), Nesterov(), NoAverage(), Nesterov(bfloat16=True)),
        "direction": (Plain(), Orthogonalised()),
        "cadence": (YoungOften(), Regular()),
        "steps": (
            RelativeSteps(),
            RelativeSteps(held=math.inf),
            RelativeSteps(share=SHARE / 2),
            RelativeSteps(share=2 * SHARE),
        ),
        "weights": (Latest(), PolynomialAverage(), PolynomialAverage(7.0), PolynomialAverage(31.0)),
    }
    named = {"pairs": "curved_only"}
    chosen = {key: made[key][PARTS[key].index(settings[key])] for key in PARTS if key in settings}
    return Parts(**{named.get(key, key): part for key, part in chosen.items()})


def kfbfgs(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    """KF-BFGS as the paper has it, unless told otherwise."""
    import kfqn

    return kfqn.KFBFGS(model, **_fixed(settings), weight_decay=weight_decay)


def kflbfgs(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    """KF-BFGS(L) as the paper has it, unless told otherwise."""
    import kfqn

    return kfqn.KFLBFGS(model, **_fixed(settings), weight_decay=weight_decay)


def automatic(method: str) -> Callable[["nn.Module", Settings, float], "torch.optim.Optimizer"]:
    """What builds our optimizer with its defaults, weight decay too, and what is given beyond them."""

    def build(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
        import kfqn

        others = (*PARTS, "decay", "warm")
        given = {_NAMES.get(key, key): _whole(value) for key, value in settings.items() if key not in others}
        if "decay" in settings:
            given["weight_decay"] = settings["decay"]
        optimizer: torch.optim.Optimizer = getattr(kfqn, method)(model, **given, parts=parts(settings))
        return optimizer

    return build


def _fixed(settings: Settings) -> dict[str, Any]:
    """Settings as arguments; ``interval`` and ``largest`` are short for two. Without, it is the paper's."""
    warm = settings.get("warm", 0)
    if warm < 0 or int(warm) != warm:
        raise ValueError(f"warm must be a whole number of batches >= 0, got {warm:g}.")
    return {
        "parts": parts(settings),
        "lr": settings["lr"],
        "damping": settings["damping"],
        "clip": settings.get("clip"),
        "curvature_interval": _whole(settings.get("interval", 1)),
        "max_factor_size": _whole(settings.get("largest")),
    }


def _whole(value: float | str | None) -> Any:
    """A number of the command line as an integer if it is one: some arguments must be. A word as it is."""
    return value if value is None or isinstance(value, str) or value % 1 else int(value)


def kfac(model: "nn.Module", settings: Settings, weight_decay: float) -> "torch.optim.Optimizer":
    """KFAC as in the paper, and with options of KFC-pre."""
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
