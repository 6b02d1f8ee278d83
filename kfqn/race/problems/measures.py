"""What is read of a run at the end of an epoch, as people read it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A key of the records, its name, and whether it is shown as a percentage."""

    key: str
    name: str
    percent: bool = False

    @property
    def scale(self) -> int:
        """What a value is times where it is shown."""
        return 100 if self.percent else 1

    @property
    def label(self) -> str:
        """The name with its unit."""
        return f"{self.name}, %" if self.percent else self.name

    def short(self, value: float) -> str:
        """A value in a sentence."""
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"

    def told(self, value: float) -> str:
        """A value with its name: "training loss 0.15"."""
        return f"{self.name} {self.short(value)}"

    def text(self, value: float, error: float | None = None) -> str:
        """A value with its unit's digits, and a standard error if there is one."""
        if self.percent:
            return f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")
        return f"{value:.3g}" + (f" ± {error:.1g}" if error is not None else "")


@dataclass(frozen=True)
class Guess:
    """Who knows nothing, and its loss and error: whoever stays near it has not learned."""

    who: str
    loss: float
    error: float

    def of(self, key: str) -> float:
        """What it has under a key of the records."""
        return self.error if key == "test_error" else self.loss


def among(classes: int) -> Guess:
    """Guessing among so many classes, with equal logits."""
    return Guess(f"guessing among {classes} classes", math.log(classes), 1 - 1 / classes)


AVERAGE_LOSS = Quantity("average_loss", "moving average of the loss")
TRAIN_LOSS = Quantity("train_loss", "training loss")
TEST_LOSS = Quantity("test_loss", "test loss")
TEST_ERROR = Quantity("test_error", "test error", percent=True)
