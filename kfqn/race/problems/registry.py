"""The problems of a race: a data set, a network that fits it, and how long to train."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfqn.race.problems import networks
from kfqn.race.problems.measures import TEST_ERROR, TEST_LOSS, TRAIN_LOSS, Guess, Quantity, among
from kfqn.race.problems.networks import Network, OfImages

if TYPE_CHECKING:
    from torch import nn

    from kfqn.race.problems.cifar import Cifar
    from kfqn.race.problems.task import Data

DEFAULT_DATA = Path("data")


@dataclass(frozen=True)
class Shape:
    """Images of ``channels`` × ``side`` × ``side``, in so many classes."""

    channels: int
    side: int
    classes: int


@dataclass(frozen=True)
class Problem:
    """A task, and a network for it.

    ``data`` takes the folder of ``--data-dir`` (None without), ``model`` a width, which is a multiple of
    ``heads``. ``quantities`` are what tables show, the first what they are sorted by and targets are set in;
    a sweep goes by ``criterion``; ``schedule`` is what learning rates follow unless told otherwise. At least
    ``smallest`` items are trained on, which is ``smallest_is``. ``source`` says which data set has to be
    found or downloaded first, if any; ``images`` what they are, on a problem of images; ``code`` is another
    for another problem of the same name.
    """

    name: str
    title: str
    data: Callable[[Path | None], "Data"]
    model: Network
    width: int
    epochs: int
    batch_size: int
    weight_decay: float
    guess: Guess
    smallest: int
    smallest_is: str = "one batch"
    quantities: tuple[Quantity, ...] = (TRAIN_LOSS, TEST_ERROR)
    criterion: str = "average_loss"
    schedule: tuple[tuple[str, Any], ...] = ()
    heads: int = 1
    images: Shape | None = None
    source: Callable[[], "Cifar"] | None = None
    code: str = ""

    def network(self, width: int | None) -> "nn.Module":
        """The network, freshly initialised, at the problem's own width or another."""
        return self.model(width or self.width)


def _digits(_: Path | None) -> "Data":
    from kfqn.race.problems.data import digits

    return digits()


def _text(_: Path | None) -> "Data":
    from kfqn.race.problems.text import standard_library

    return standard_library()


def _points(_: Path | None) -> "Data":
    from kfqn.race.problems.burgers import Points

    return Points()


def _cifar_10() -> "Cifar":
    from kfqn.race.problems.cifar import CIFAR_10

    return CIFAR_10


def _cifar_100() -> "Cifar":
    from kfqn.race.problems.cifar import CIFAR_100

    return CIFAR_100


def _of_images(name: str, title: str, model: OfImages, width: int, shape: Shape, **values: Any) -> Problem:
    """A problem of images, with batches of 256 unless told otherwise."""
    values = {"batch_size": 256} | values
    return Problem(
        name=name,
        title=title,
        model=lambda width: model(shape.classes, shape.channels, width),
        width=width,
        guess=among(shape.classes),
        smallest=values["batch_size"],
        images=shape,
        **values,
    )


def _on_digits(name: str, title: str, model: OfImages, width: int) -> Problem:
    """The digits that need no download, with a network for images of 8×8."""
    shape = Shape(channels=1, side=8, classes=10)
    return _of_images(name, title, model, width, shape, data=_digits, epochs=28, weight_decay=0.0)


def _on_cifar(name: str, title: str, classes: int, model: OfImages, width: int, **values: Any) -> Problem:
    """One of the four problems of section 6, or another under the fixed settings of appendix B.2."""
    source = _cifar_10 if classes == 10 else _cifar_100

    def data(data_dir: Path | None) -> "Data":
        assert data_dir is not None
        return source().load(data_dir)

    values = {"data": data, "epochs": 40, "weight_decay": 5e-4, "source": source} | values
    return _of_images(name, title, model, width, Shape(channels=3, side=32, classes=classes), **values)


SCHEDULE = (("schedule", "cosine"), ("warmup", 0.05))


def _on_small_cifar(
    name: str, title: str, classes: int, model: OfImages, width: int, **values: Any
) -> Problem:
    """All images at 16×16: of the development set, where test error counts, under a schedule."""
    source = _cifar_10 if classes == 10 else _cifar_100

    def data(data_dir: Path | None) -> "Data":
        assert data_dir is not None
        return source().load(data_dir).pooled()

    whole = _on_cifar(name, title, classes, model, width, data=data, batch_size=128, **values)
    return replace(
        whole,
        images=Shape(channels=3, side=16, classes=classes),
        quantities=(TEST_ERROR, TRAIN_LOSS, TEST_LOSS),
        criterion="test_error",
        schedule=SCHEDULE,
    )


_CHAR_GPT = Problem(
    name="char-gpt",
    title="Python's library, character GPT",
    data=_text,
    model=networks.character_gpt,
    width=96,
    heads=4,
    epochs=10,
    batch_size=48,
    weight_decay=0.0,
    guess=among(101),
    smallest=65,
    smallest_is="one window and its next character",
    quantities=(
        replace(TEST_LOSS, name="validation loss"),
        TRAIN_LOSS,
        replace(TEST_ERROR, name="wrong characters"),
    ),
    criterion="test_loss",
    schedule=(*SCHEDULE, ("floor", 0.1)),
)

_BURGERS = Problem(
    name="burgers",
    title="Burgers' equation, perceptron",
    data=_points,
    model=networks.solver,
    width=20,
    epochs=30,
    batch_size=2000,
    weight_decay=0.0,
    guess=Guess("u = 0", loss=0.25, error=1.0),
    smallest=1,
    smallest_is="one point",
    quantities=(
        Quantity("test_error", "relative error"),
        TRAIN_LOSS,
        replace(TEST_LOSS, name="mean squared error"),
    ),
    criterion="test_error",
    schedule=SCHEDULE,
)

DEVELOPMENT = {  # a task of each kind, at a scale where a run takes minutes
    problem.name: problem
    for problem in (
        _on_small_cifar(
            "cifar10-small-resnet", "CIFAR-10 at 16×16, ResNet-8", 10, networks.resnet8, 16, epochs=6
        ),
        _on_small_cifar(
            "cifar100-small-resnet", "CIFAR-100 at 16×16, ResNet-8", 100, networks.resnet8, 16, epochs=6
        ),
        _on_small_cifar(
            "cifar10-small-plain", "CIFAR-10 at 16×16, plain CNN", 10, networks.plain_cnn, 16, epochs=3
        ),
        _on_small_cifar(
            "cifar100-small-plain", "CIFAR-100 at 16×16, plain CNN", 100, networks.plain_cnn, 16, epochs=3
        ),
        _on_small_cifar(
            "cifar10-small-convnext", "CIFAR-10 at 16×16, ConvNeXt", 10, networks.convnext, 32, epochs=3
        ),
        _on_small_cifar(
            "cifar10-small-vit",
            "CIFAR-10 at 16×16, ViT",
            10,
            networks.vision_transformer,
            64,
            epochs=6,
            heads=4,
        ),
        _CHAR_GPT,
        _BURGERS,
    )
}

PROBLEMS = {
    problem.name: problem
    for problem in (
        _on_digits("digits", "8×8 digits, small All-CNN", networks.small_all_cnn, 32),
        _on_digits("digits-mlp", "8×8 digits, perceptron", networks.mlp, 64),
        _on_cifar("cifar10-allcnn", "CIFAR-10, All-CNN-C", 10, networks.all_cnn_c, 96),
        _on_cifar("cifar10-vgg16", "CIFAR-10, VGG16", 10, networks.vgg16, 64),
        _on_cifar("cifar10-resnet20", "CIFAR-10, ResNet-20", 10, networks.resnet20, 16),
        _on_cifar("cifar10-lenet5", "CIFAR-10, LeNet-5", 10, networks.lenet5, 6),
        _on_cifar("cifar100-allcnn", "CIFAR-100, All-CNN-C", 100, networks.all_cnn_c, 96),
        _on_cifar("cifar100-vgg16", "CIFAR-100, VGG16", 100, networks.vgg16, 64),
        *DEVELOPMENT.values(),
    )
}
