"""The parts that an optimizer is made of, and which ones the settings of a group choose (`docs/parts.md`)."""

from dataclasses import dataclass, fields, replace
from typing import final

from kfqn.curvature.damping import AbsoluteDamping, Damping, RelativeDamping
from kfqn.curvature.input_factor import AveragedRoot, HessianActionBFGS, InputFactor
from kfqn.curvature.output_factor import BFGS, NoOutputFactor, OutputFactor
from kfqn.parameters.groups import Group
from kfqn.steps.average import Averaged, GradientAverage, Nesterov
from kfqn.steps.cadence import Cadence, Regular, YoungOften
from kfqn.steps.direction import Direction, Orthogonalised, Plain
from kfqn.steps.relative import RelativeSteps
from kfqn.steps.rule import FixedRate, StepRule
from kfqn.steps.weight_average import Latest, PolynomialAverage, WeightAverage

_KINDS: dict[str, type] = {
    "input": InputFactor,
    "output": OutputFactor,
    "damping": Damping,
    "curved_only": bool,
    "average": GradientAverage,
    "direction": Direction,
    "steps": StepRule,
    "cadence": Cadence,
    "weights": WeightAverage,
}


@final
@dataclass(frozen=True)
class Parts:
    """One part of each kind. None stands for what the settings of a group choose, as in `chosen`.

    ``input`` and ``output`` are the factors H_A and H_G, ``damping`` what is added to both; ``curved_only``
    says that pairs with sᵀy ≤ 0 are left out, and not damped; ``average`` is what directions are taken of,
    and ``direction`` what becomes of them; ``steps`` says how long steps are, ``cadence`` when the factors
    learn, and ``weights`` which average of its weights the model holds between steps.
    """

    input: InputFactor | None = None
    output: OutputFactor | None = None
    damping: Damping | None = None
    curved_only: bool | None = None
    average: GradientAverage | None = None
    direction: Direction | None = None
    steps: StepRule | None = None
    cadence: Cadence | None = None
    weights: WeightAverage | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for what is no part of its kind, or cannot be compared."""
        for name, kind in _KINDS.items():
            part = getattr(self, name)
            if part.__hash__ is None:
                raise TypeError(
                    f"the part {name!r} must be hashable, as groups share it: freeze its dataclass."
                )
            if part is not None and not isinstance(part, kind):
                raise TypeError(
                    f"the part {name!r} must be a {kind.__module__}.{kind.__name__}, but is {part!r}: give "
                    "an object of such a class, or None for what lr and damping choose (docs/parts.md)."
                )


def checked_parts(parts: Parts) -> Parts:
    """The parts; TypeError if they are none."""
    if not isinstance(parts, Parts):
        raise TypeError(
            f"parts must be a kfqn.Parts, such as kfqn.Parts(direction=Plain()), but is {parts!r}."
        )
    return parts


@final
@dataclass(frozen=True)
class Chosen:
    """The parts of one group."""

    input: InputFactor
    output: OutputFactor
    damping: Damping
    curved_only: bool
    average: GradientAverage
    direction: Direction
    steps: StepRule
    cadence: Cadence
    weights: WeightAverage


def chosen(parts: Parts, group: Group) -> Chosen:
    """The parts of a group: those given, and else the paper's with a number for ``lr``, ours without.

    Ours may have no number for ``lr`` and one for ``damping``.
    """
    automatic, relative = group.get("automatic", False), group.get("relative", False)
    usual = Chosen(
        input=AveragedRoot() if automatic else HessianActionBFGS(),
        output=NoOutputFactor() if automatic else BFGS(),
        damping=RelativeDamping() if relative else AbsoluteDamping(),
        curved_only=automatic,
        average=Nesterov() if automatic else Averaged(),
        direction=Orthogonalised() if automatic else Plain(),
        steps=RelativeSteps() if automatic else FixedRate(),
        cadence=Regular() if automatic else YoungOften(),
        weights=PolynomialAverage() if automatic else Latest(),
    )
    given = {f.name: part for f in fields(parts) if (part := getattr(parts, f.name)) is not None}
    return replace(usual, **given)
