"""The problems' networks; torch is imported when one is built, which the parser and its help do not need."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

Network = Callable[[int], "nn.Module"]  # of a width, freshly initialised
OfImages = Callable[[int, int, int], "nn.Module"]  # of classes, channels and width


def small_all_cnn(classes: int, channels: int, width: int) -> "nn.Module":
    """For 8×8 images."""
    from kfqn.race.problems.models import small_all_cnn

    return small_all_cnn(classes, channels, width)


def mlp(classes: int, channels: int, width: int) -> "nn.Module":
    """For 8×8 images."""
    from kfqn.race.problems.models import mlp

    return mlp(classes, channels, width)


def lenet5(classes: int, channels: int, width: int) -> "nn.Module":
    """For 32×32 images."""
    from kfqn.race.problems.models import lenet5

    return lenet5(classes, channels, width)


def all_cnn_c(classes: int, channels: int, width: int) -> "nn.Module":
    """For images of any size."""
    from kfqn.race.problems.models import all_cnn_c

    return all_cnn_c(classes, channels, width)


def vgg16(classes: int, channels: int, width: int) -> "nn.Module":
    """For 32×32 images."""
    from kfqn.race.problems.models import vgg16

    return vgg16(classes, channels, width)


def resnet20(classes: int, channels: int, width: int) -> "nn.Module":
    """For images of any size."""
    from kfqn.race.problems.resnet import resnet20

    return resnet20(classes, channels, width)


def resnet8(classes: int, channels: int, width: int) -> "nn.Module":
    """For images of any size: n = 1."""
    from kfqn.race.problems.resnet import resnet

    return resnet(1, classes, channels, width)


def plain_cnn(classes: int, channels: int, width: int) -> "nn.Module":
    """For images of any size."""
    from kfqn.race.problems.models import plain_cnn

    return plain_cnn(classes, channels, width)


def convnext(classes: int, channels: int, width: int) -> "nn.Module":
    """For images of 16×16 or more."""
    from kfqn.race.problems.convnext import convnext

    return convnext(classes, channels, width)


def vision_transformer(classes: int, channels: int, width: int) -> "nn.Module":
    """For 16×16 images."""
    from kfqn.race.problems.transformers import VisionTransformer

    return VisionTransformer(classes, channels, width)


def character_gpt(width: int) -> "nn.Module":
    """For the characters of `text`."""
    from kfqn.race.problems.text import CONTEXT, KNOWN
    from kfqn.race.problems.transformers import CharacterGPT

    return CharacterGPT(KNOWN + 1, width, CONTEXT)


def solver(width: int) -> "nn.Module":
    """From (t, x) to u, for `burgers`."""
    from kfqn.race.problems.models import tanh_mlp

    return tanh_mlp(2, 1, width, hidden=4)
