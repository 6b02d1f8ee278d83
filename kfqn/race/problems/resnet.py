"""The residual network for CIFAR of He et al. (2016), section 4.2, the one network here with BatchNorm."""

import torch.nn.functional as F
from torch import Tensor, nn

from kfqn.race.problems.models import initialise


class Block(nn.Module):
    """Two 3×3 convolutions F and a shortcut without parameters, option A: x becomes relu(F(x) + shortcut).

    ``x`` is (m, inputs, s, s), the result (m, outputs, s / stride, s / stride). The shortcut is every
    ``stride``-th location of x, with zeros for the channels that x lacks.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_convolution(inputs, outputs, stride), nn.ReLU(inplace=True), *_convolution(outputs, outputs)
        )
        self.stride, self.lacking = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.lacking))
        return F.relu(self.residual(x) + shortcut)


def resnet20(classes: int, channels: int = 3, width: int = 16) -> nn.Sequential:
    """ResNet-20: `resnet` with n = 3."""
    return resnet(3, classes, channels, width)


def resnet(n: int, classes: int, channels: int = 3, width: int = 16) -> nn.Sequential:
    """6n + 2 layers with weights: a stem, three stages of n blocks, and a `Linear`.

    ``width`` is the number of filters of the stem and of the first stage, 16 in the paper; the next stages
    have twice and four times as many, and start with stride 2. Convolutions have no bias, and each is
    followed by BatchNorm.
    """
    layers: list[nn.Module] = [*_convolution(channels, width), nn.ReLU(inplace=True)]
    inputs = width
    for outputs, first in ((width, 1), (2 * width, 2), (4 * width, 2)):
        for stride in (first, *[1] * (n - 1)):
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    initialise(model)
    return model


def _convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
