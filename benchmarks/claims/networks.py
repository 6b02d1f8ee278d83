"""Small networks for images of 32 × 32 that no race has, with the batches they are trained with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions beside the identity, or a convolution of 1 × 1 where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *convolution(inputs, outputs, stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.identity = nn.Sequential()
        if inputs != outputs:
            self.identity.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.identity.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.identity(x))


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    filters = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [filters, nn.BatchNorm2d(outputs), nn.ReLU()]


def residual() -> nn.Module:
    first = convolution(3, 8)
    blocks = [Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2)]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def plain() -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(10):
        layers += [nn.Conv2d(12 if i else 3, 12, 3, 2 if i in (2, 5) else 1, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10))


def autoencoder() -> nn.Module:
    down = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    code = [nn.Linear(1024, 32), nn.Linear(32, 1024), nn.ReLU(), nn.Unflatten(1, (16, 8, 8))]
    up = [nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*down, *code, *up, nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3, padding=1))


def perceptron() -> nn.Module:
    hidden = [nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def tutorial() -> nn.Module:
    """As in many a first lesson: pairs of convolutions, pooling, dropout, two dense layers."""
    first = [*convolution(3, 16), *convolution(16, 16), nn.MaxPool2d(2), nn.Dropout(0.1)]
    second = [*convolution(16, 32), *convolution(32, 32), nn.MaxPool2d(2), nn.Dropout(0.2)]
    dense = [nn.Linear(2048, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)]
    return nn.Sequential(*first, *second, nn.Flatten(), *dense)


def separable() -> nn.Module:
    """Depthwise and pointwise convolutions with GroupNorm and SiLU, as in mobile networks."""

    def normalised(filters: nn.Conv2d) -> list[nn.Module]:
        return [filters, nn.GroupNorm(4, filters.out_channels), nn.SiLU()]

    layers = normalised(nn.Conv2d(3, 16, 3, padding=1, bias=False))
    for inputs, outputs, stride in ((16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += normalised(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False))
        layers += normalised(nn.Conv2d(inputs, outputs, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Mixing(nn.Module):
    """Two layers over the patches, then two over their channels, each beside the identity."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.of_patches = nn.Sequential(nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches))
        self.of_channels = nn.Sequential(nn.Linear(channels, 64), nn.GELU(), nn.Linear(64, channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.of_patches(self.norms[0](x).mT).mT
        mixed: Tensor = x + self.of_channels(self.norms[1](x))
        return mixed


class Attention(nn.Module):
    """A block of a transformer whose layers are all `Linear`."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.dense = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, patches, channels = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, patches, 3, self.heads, channels // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(attended.transpose(1, 2).reshape(n, patches, channels))
        transformed: Tensor = x + self.dense(self.norms[1](x))
        return transformed


class OfPatches(nn.Module):
    """Patches of 4 × 4 of images of 32 × 32, the blocks, and a layer for their mean."""

    def __init__(self, channels: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, channels))
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.patches(x).flatten(2).mT + self.places).mean(1))
        return logits


def mixer() -> nn.Module:
    return OfPatches(32, Mixing(64, 32), Mixing(64, 32))


def transformer() -> nn.Module:
    return OfPatches(48, *(Attention(48, heads=4) for _ in range(3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the batch
    "residual": (residual, 128),
    "residual, batches of 32": (residual, 32),
    "plain": (plain, 128),
    "autoencoder": (autoencoder, 128),
    "perceptron": (perceptron, 128),
    "tutorial": (tutorial, 128),
    "separable": (separable, 128),
    "mixer": (mixer, 128),
    "transformer": (transformer, 128),
}
