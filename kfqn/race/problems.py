"""The problems of a race: a data set, a network that fits it, and how long to train."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from kfqn.race.cifar import Cifar
    from kfqn.race.data import Dataset


DEFAULT_DATA = Path("data")


@dataclass(frozen=True)
class Problem:
    """A task. ``data`` takes the folder of ``--data-dir`` (None without), ``model`` a width and a data set.

    ``source`` says which data set has to be found or downloaded first, for those that do.
    """

    name: str
    title: str
    data: Callable[[Path | None], "Dataset"]
    model: Callable[[int, "Dataset"], "nn.Module"]
    width: int
    epochs: int
    batch_size: int
    weight_decay: float
    source: Callable[[], "Cifar"] | None = None


def _digits(_: Path | None) -> "Dataset":
    from kfqn.race.data import digits

    return digits()


def _cifar_10() -> "Cifar":
    from kfqn.race.cifar import CIFAR_10

    return CIFAR_10


def _cifar_100() -> "Cifar":
    from kfqn.race.cifar import CIFAR_100

    return CIFAR_100


def _small_all_cnn(width: int, data: "Dataset") -> "nn.Module":
    from kfqn.race.models import small_all_cnn

    return small_all_cnn(data.classes, channels=data.train.x.shape[1], width=width)


def _all_cnn_c(width: int, data: "Dataset") -> "nn.Module":
    from kfqn.race.models import all_cnn_c

    return all_cnn_c(data.classes, channels=data.train.x.shape[1], width=width)


def _vgg16(width: int, data: "Dataset") -> "nn.Module":
    from kfqn.race.models import vgg16

    return vgg16(data.classes, channels=data.train.x.shape[1], width=width)


def _of_the_paper(
    name: str, source: Callable[[], "Cifar"], title: str, model: Callable[..., "nn.Module"], width: int
) -> Problem:
    """One of the four problems of section 6, with the fixed settings of appendix B.2."""

    def data(data_dir: Path | None) -> "Dataset":
        assert data_dir is not None
        return source().load(data_dir)

    return Problem(
        name=name,
        title=title,
        data=data,
        model=model,
        width=width,
        epochs=40,
        batch_size=256,
        weight_decay=5e-4,
        source=source,
    )


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
        _of_the_paper("cifar10-allcnn", _cifar_10, "CIFAR-10, All-CNN-C", _all_cnn_c, width=96),
        _of_the_paper("cifar10-vgg16", _cifar_10, "CIFAR-10, VGG16", _vgg16, width=64),
        _of_the_paper("cifar100-allcnn", _cifar_100, "CIFAR-100, All-CNN-C", _all_cnn_c, width=96),
        _of_the_paper("cifar100-vgg16", _cifar_100, "CIFAR-100, VGG16", _vgg16, width=64),
    )
}
