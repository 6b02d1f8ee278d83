"""Layers and networks the tests run over: name -> maker, with an input that fits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from foreign import Conv1D
from torch import nn
from torch.utils.checkpoint import checkpoint

import kfqn


@dataclass(frozen=True)
class LayerCase:
    make: type
    arguments: tuple
    options: dict
    shape: tuple  # of one input, without the batch

    def __call__(self):
        return self.make(*self.arguments, **self.options)


class Checkpointed(nn.Module):
    """Its inside is computed again in the backward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Kept(nn.Linear):
    """Another initialisation, and what the layer computes as it was."""

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.ones_(self.bias)


class KeptConvolution(nn.Conv2d):
    """Nothing of its own but a method."""

    def norm(self):
        return self.weight.norm()


LAYERS = {
    "linear": LayerCase(nn.Linear, (4, 3), {}, (4,)),
    "linear, no bias": LayerCase(nn.Linear, (4, 3), {"bias": False}, (4,)),
    "linear, one more dimension": LayerCase(nn.Linear, (4, 3), {}, (5, 4)),
    "linear, two more, no bias": LayerCase(nn.Linear, (4, 3), {"bias": False}, (2, 3, 4)),
    "transposed": LayerCase(Conv1D, (3, 4), {}, (4,)),
    "transposed, two more dimensions": LayerCase(Conv1D, (3, 4), {}, (2, 3, 4)),
    "a subclass that keeps forward": LayerCase(Kept, (4, 3), {}, (5, 4)),
    "a subclass of a convolution": LayerCase(KeptConvolution, (2, 3, 3), {"stride": 2}, (2, 5, 4)),
    "conv": LayerCase(nn.Conv2d, (2, 3, 3), {"padding": 1}, (2, 4, 5)),
    "conv, no bias": LayerCase(nn.Conv2d, (2, 3, 3), {"bias": False}, (2, 4, 5)),
    "conv 1x1": LayerCase(nn.Conv2d, (3, 2, 1), {}, (3, 3, 2)),
    "conv, one location": LayerCase(nn.Conv2d, (2, 3, 3), {}, (2, 3, 3)),
    "conv, stride 2": LayerCase(nn.Conv2d, (2, 3, 3), {"stride": 2, "padding": 1}, (2, 5, 4)),
    "conv, stride leaves a rest": LayerCase(nn.Conv2d, (2, 2, 2), {"stride": 3}, (2, 7, 6)),
    "conv, dilation": LayerCase(nn.Conv2d, (2, 3, 3), {"dilation": 2, "padding": 2}, (2, 5, 6)),
    "conv, all uneven": LayerCase(
        nn.Conv2d, (2, 3, (3, 2)), {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}, (2, 6, 5)
    ),
    "conv, padding beyond the kernel": LayerCase(
        nn.Conv2d, (2, 3, (2, 1)), {"stride": (1, 3), "padding": (4, 5)}, (2, 3, 4)
    ),
    "conv, same, even kernel": LayerCase(nn.Conv2d, (2, 3, (2, 4)), {"padding": "same"}, (2, 5, 5)),
    "conv, valid": LayerCase(nn.Conv2d, (2, 3, 3), {"padding": "valid"}, (2, 4, 5)),
    "conv, circular": LayerCase(nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (2, 4, 5)),
    "conv, reflect": LayerCase(nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 5)),
    "conv, replicate": LayerCase(
        nn.Conv2d, (2, 3, 3), {"padding": 2, "padding_mode": "replicate", "stride": 2}, (2, 4, 5)
    ),
    "conv, groups": LayerCase(nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1}, (4, 4, 5)),
    "conv, depthwise": LayerCase(nn.Conv2d, (3, 3, 3), {"groups": 3, "padding": 1, "bias": False}, (3, 4, 5)),
    "conv, depthwise, two a channel": LayerCase(
        nn.Conv2d,
        (3, 6, (2, 3)),
        {"groups": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
        (3, 5, 4),
    ),
    "conv1d, groups": LayerCase(nn.Conv1d, (4, 4, 3), {"groups": 2, "dilation": 2}, (4, 9)),
    "conv1d": LayerCase(nn.Conv1d, (2, 3, 3), {"padding": 1, "stride": 2}, (2, 7)),
    "conv3d": LayerCase(nn.Conv3d, (2, 2, 2), {"padding": 1}, (2, 2, 3, 2)),
}


AUTOMATIC = {  # the optimizers with lr="auto", name -> maker
    "KFBFGS": kfqn.KFBFGS,
    "KFLBFGS": lambda model, **settings: kfqn.KFLBFGS(model, history_size=3, **settings),
}


def odd_cnn():
    """Stride 2, dilation, no bias, 1×1, in-place ReLU and a Linear head; input (2, 6, 6)."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 3),
    )


def grouped():
    """Grouped and depthwise convolutions; input (4, 5, 5)."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def recurrent():
    """One module used twice, on different locations, and two that share parameters; input (2, 6, 6)."""
    conv, linear, tied = nn.Conv2d(2, 2, 3, padding=1, stride=2), nn.Linear(2, 2), nn.Linear(2, 2)
    tied.weight, tied.bias = linear.weight, linear.bias
    flat = [nn.Tanh(), nn.Flatten(), nn.Linear(8, 2), nn.Tanh()]
    return nn.Sequential(conv, nn.Tanh(), conv, *flat, linear, nn.Tanh(), tied, nn.Tanh(), nn.Linear(2, 3))


def mixer():
    """Linear layers on locations, then across them; input (4, 5)."""
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )


def transposed():
    """Layers with the weight of a `Linear` transposed, one of them used twice; input (3, 5)."""
    twice = Conv1D(6, 6)
    body = [Conv1D(6, 5), nn.Tanh(), twice, nn.Tanh(), twice, nn.Tanh()]
    return nn.Sequential(*body, nn.Flatten(), Conv1D(3, 18))


def mlp():
    """Two Linear layers, the first without a bias; input (5,)."""
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))


def batches(shape, count, size=4, classes=3, dtype=None):
    """``count`` random labelled batches; the last one is smaller."""
    sizes = [size] * (count - 1) + [size - 1]
    return [(torch.randn(n, *shape, dtype=dtype), torch.randint(classes, (n,))) for n in sizes]


def closure(model, optimizer, x, target, loss_fn=F.cross_entropy):
    """One closure for every optimizer; the same as a user's own for all but KFAC."""
    del optimizer
    return kfqn.closure(model, x, target, loss_fn)


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution with BatchNorm, and a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.pointwise(F.relu(self.norm(self.depthwise(x)), inplace=True))


def separable_net(classes=10):
    """A small MobileNet-like net for the digits; input (1, 8, 8)."""
    blocks = [SeparableBlock(12), nn.MaxPool2d(2), SeparableBlock(12)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(12, classes)]
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), *blocks, *head)


class Attention(nn.Module):
    """Self-attention with a packed `Linear` projection, two heads."""

    def __init__(self, width):
        super().__init__()
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer's block, normalised before."""

    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Patches of 2×2, a class token, learnt positions, two blocks, for the digits; input (1, 8, 8)."""

    def __init__(self, classes=10, width=16):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])
