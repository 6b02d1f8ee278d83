"""The problems of a race: a data set, a network that fits it, and how long to train."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from kfqn.race.problems.cifar import Cifar
    from kfqn.race.problems.data import Dataset


DEFAULT_DATA = Path("data")


@dataclass(frozen=True)
class Problem:
    """A task: images of ``channels`` × ``side`` × ``side`` in some ``classes``, and a network for them.

    ``data`` takes the folder of ``--data-dir`` (None without), ``model`` classes, channels and
    width. ``source`` says which data set has to be found or downloaded first, if any.
    """

    name: str
    title: str
    data: Callable[[Path | None], "Dataset"]
    channels: int
    side: int
    classes: int
    model: Callable[[int, int, int], "nn.Module"]
    width: int
    epochs: int
    batch_size: int
    weight_decay: float
    source: Callable[[], "Cifar"] | None = None

    def network(self, width: int | None) -> "nn.Module":
        """The network, freshly initialised, at the problem's own width or another."""
        return self.model(self.classes, self.channels, width or self.width)


def _digits(_: Path | None) -> "Dataset":
    from kfqn.race.problems.data import digits

    return digits()


def _cifar_10() -> "Cifar":
    from kfqn.race.problems.cifar import CIFAR_10

    return CIFAR_10


def _cifar_100() -> "Cifar":
    from kfqn.race.problems.cifar import CIFAR_100

    return CIFAR_100


def _small_all_cnn(classes: int, channels: int, width: int) -> "nn.Module":
    from kfqn.race.problems.models import small_all_cnn

    return small_all_cnn(classes, channels, width)


def _mlp(classes: int, channels: int, width: int) -> "nn.Module":
    from kfqn.race.problems.models import mlp

    return mlp(classes, channels, width)


def _lenet5(classes: int, channels: int, width: int) -> "nn.Module":
    from kfqn.race.problems.models import lenet5

    return lenet5(classes, channels, width)


def _all_cnn_c(classes: int, channels: int, width: int) -> "nn.Module":
    from kfqn.race.problems.models import all_cnn_c

    return all_cnn_c(classes, channels, width)


def _vgg16(classes: int, channels: int, width: int) -> "nn.Module":
    from kfqn.race.problems.models import vgg16

    return vgg16(classes, channels, width)


def _resnet20(classes: int, channels: int, width: int) -> "nn.Module":
    from kfqn.race.problems.resnet import resnet20

    return resnet20(classes, channels, width)


def _on_digits(name: str, title: str, model: Callable[[int, int, int], "nn.Module"], width: int) -> Problem:
    """The digits that need no download, with a network for images of 8×8."""
    return Problem(
        name=name,
        title=title,
        data=_digits,
        channels=1,
        side=8,
        classes=10,
        model=model,
        width=width,
        epochs=28,
        batch_size=256,
        weight_decay=0.0,
    )


def _on_cifar(
    name: str,
    title: str,
    source: Callable[[], "Cifar"],
    classes: int,
    model: Callable[[int, int, int], "nn.Module"],
    width: int,
) -> Problem:
    """One of the four problems of section 6, or another under the fixed settings of appendix B.2."""

    def data(data_dir: Path | None) -> "Dataset":
        assert data_dir is not None
        return source().load(data_dir)

    return Problem(
        name=name,
        title=title,
        data=data,
        channels=3,
        side=32,
        classes=classes,
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
        _on_digits("digits", "8×8 digits, small All-CNN", _small_all_cnn, 32),
        _on_digits("digits-mlp", "8×8 digits, perceptron", _mlp, 64),
        _on_cifar("cifar10-allcnn", "CIFAR-10, All-CNN-C", _cifar_10, 10, _all_cnn_c, 96),
        _on_cifar("cifar10-vgg16", "CIFAR-10, VGG16", _cifar_10, 10, _vgg16, 64),
        _on_cifar("cifar10-resnet20", "CIFAR-10, ResNet-20", _cifar_10, 10, _resnet20, 16),
        _on_cifar("cifar10-lenet5", "CIFAR-10, LeNet-5", _cifar_10, 10, _lenet5, 6),
        _on_cifar("cifar100-allcnn", "CIFAR-100, All-CNN-C", _cifar_100, 100, _all_cnn_c, 96),
        _on_cifar("cifar100-vgg16", "CIFAR-100, VGG16", _cifar_100, 100, _vgg16, 64),
    )
}
