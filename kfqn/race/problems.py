"""The problems of a race: a data set, a network that fits it, and how long to train."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from kfqn.race.data import Dataset


DEFAULT_DATA = Path("data")


@dataclass(frozen=True)
class Problem:
    """``data`` takes the folder of ``--data-dir`` (None without), ``model`` a width and a data set."""

    name: str
    title: str
    data: Callable[[Path | None], "Dataset"]
    model: Callable[[int, "Dataset"], "nn.Module"]
    width: int
    epochs: int
    batch_size: int
    weight_decay: float
    downloads: bool = False


def _digits(_: Path | None) -> "Dataset":
    from kfqn.race.data import digits

    return digits()


def _cifar10(data_dir: Path | None) -> "Dataset":
    from kfqn.race.cifar import cifar10

    assert data_dir is not None
    return cifar10(data_dir)


def _small_all_cnn(width: int, data: "Dataset") -> "nn.Module":
    from kfqn.race.models import small_all_cnn

    return small_all_cnn(data.classes, channels=data.train.x.shape[1], width=width)


def _all_cnn_c(width: int, data: "Dataset") -> "nn.Module":
    from kfqn.race.models import all_cnn_c

    return all_cnn_c(data.classes, channels=data.train.x.shape[1], width=width)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            name="digits",
            title="8×8 digits, small All-CNN",
            data=_digits,
            model=_small_all_cnn,
            width=32,
            epochs=28,
            batch_size=256,
            weight_decay=0.0,
        ),
        Problem(
            name="cifar10-allcnn",
            title="CIFAR-10, All-CNN-C",
            data=_cifar10,
            model=_all_cnn_c,
            width=96,
            epochs=40,
            batch_size=256,
            weight_decay=5e-4,
            downloads=True,
        ),
    )
}
