"""A small ConvNeXt (Liu et al. 2022): depthwise and 1×1 convolutions, LayerNorm, GELU."""

from typing import final

from torch import Tensor, nn


@final
class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (m, channels, s, s)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.movedim(1, -1))
        return normed.movedim(-1, 1)


@final
class Block(nn.Module):
    """x + F(x), F a depthwise 5×5 convolution, a norm, and a perceptron of each location."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            ChannelNorm(width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.residual(x)
        return out


def convnext(classes: int, channels: int = 3, width: int = 32) -> nn.Sequential:
    """Patches of 2×2, two blocks, a 2×2 convolution of stride 2 to twice the width, two more, a `Linear`.

    As torch initialises. Without the original's scales of residuals and stochastic depth, which matter to
    deep networks.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 2, stride=2),
        ChannelNorm(width),
        Block(width),
        Block(width),
        ChannelNorm(width),
        nn.Conv2d(width, 2 * width, 2, stride=2),
        Block(2 * width),
        Block(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(2 * width),
        nn.Linear(2 * width, classes),
    )
