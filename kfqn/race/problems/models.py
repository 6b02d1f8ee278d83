"""The paper's networks (appendix B.2) as its authors coded them, and a small one for small images."""

import itertools
import math

from torch import nn


def all_cnn_c(classes: int, channels: int = 3, width: int = 96) -> nn.Sequential:
    """All-CNN-C (Springenberg et al. 2014): nine convolutions, two of stride 2, no dropout.

    ``width`` is the number of filters of the first three layers, 96 in the paper; the
    next five have twice as many. As coded, every 3×3 convolution has padding 1, every
    layer a bias, and the last 1×1 convolution is followed by ReLU before the global average.
    """
    w = width
    model = nn.Sequential(
        *_convolution(channels, w, 3),
        *_convolution(w, w, 3),
        *_convolution(w, w, 3, stride=2),
        *_convolution(w, 2 * w, 3),
        *_convolution(2 * w, 2 * w, 3),
        *_convolution(2 * w, 2 * w, 3, stride=2),
        *_convolution(2 * w, 2 * w, 3),
        *_convolution(2 * w, 2 * w, 1),
        *_convolution(2 * w, classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    initialise(model)
    return model


def vgg16(classes: int, channels: int = 3, width: int = 64) -> nn.Sequential:
    """VGG16, configuration D of Simonyan and Zisserman (2014), for 32×32 images: 13 convolutions, 3 `Linear`.

    ``width`` is the number of filters of the first block, 64 in the paper; the blocks have 1, 2,
    4, 8 and 8 times as many and the hidden `Linear` layers 64 times. As coded: no BatchNorm, no
    dropout, and five poolings that leave one location, so nothing else is pooled.
    """
    features: list[nn.Module] = []
    inputs = channels
    for outputs, depth in ((width, 2), (2 * width, 2), (4 * width, 3), (8 * width, 3), (8 * width, 3)):
        for _ in range(depth):
            features += _convolution(inputs, outputs, 3)
            inputs = outputs
        features.append(nn.MaxPool2d(2))
    hidden = 64 * width
    model = nn.Sequential(
        *features,
        nn.Flatten(),
        nn.Linear(inputs, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    )
    initialise(model)
    return model


def small_all_cnn(classes: int, channels: int = 1, width: int = 32) -> nn.Sequential:
    """All-CNN-C cut down for images of 8×8: six convolutions, one of stride 2, no ReLU on the logits."""
    w = width
    model = nn.Sequential(
        *_convolution(channels, w, 3),
        *_convolution(w, w, 3),
        *_convolution(w, w, 3, stride=2),
        *_convolution(w, 2 * w, 3),
        *_convolution(2 * w, 2 * w, 1),
        nn.Conv2d(2 * w, classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    initialise(model)
    return model


def plain_cnn(classes: int, channels: int = 3, width: int = 16) -> nn.Sequential:
    """Six 3×3 convolutions with bias and ReLU, and nothing that normalises: w, w, 2w, 2w, 4w, 4w filters.

    The third and the fifth have stride 2. Convolutions are initialised as He et al. (2015) say, biases at 0.
    """
    layers, inputs = list[nn.Module](), channels
    for outputs, first in ((width, 1), (2 * width, 2), (4 * width, 2)):
        for stride in (first, 1):
            layers += _convolution(inputs, outputs, 3, stride)
            inputs = outputs
    for module in layers:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def tanh_mlp(inputs: int, outputs: int, width: int, hidden: int) -> nn.Sequential:
    """A perceptron of so many hidden layers with tanh, as physics-informed networks are (Raissi et al. 2019).

    Weights are Glorot and Bengio's (2010), normal, and biases 0.
    """
    sizes = [inputs, *[width] * hidden]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise([*sizes, outputs])]
    for layer in layers:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.Tanh())), layers[-1])


def mlp(classes: int, channels: int = 1, width: int = 64, side: int = 8) -> nn.Sequential:
    """A perceptron for small images: two hidden `Linear` layers, ReLU, initialised as torch does."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * side**2, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def lenet5(classes: int, channels: int = 3, width: int = 6) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) for images of 32×32, with tanh, initialised as torch does.

    ``width`` is the number of filters of the first convolution, 6 there; the rest keeps its proportions.
    """
    filters, hidden, last = 8 * width // 3, 20 * width, 14 * width  # 16, 120 and 84
    return nn.Sequential(
        nn.Conv2d(channels, width, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, filters, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(25 * filters, hidden),
        nn.Tanh(),
        nn.Linear(hidden, last),
        nn.Tanh(),
        nn.Linear(last, classes),
    )


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2), nn.ReLU(inplace=True)


def initialise(model: nn.Module) -> None:
    """The authors' initialisation: convolutions N(0, 2/(k²·I)) with zero bias, the rest as torch does.

    With torch's own for convolutions, nine layers without BatchNorm do not move under
    SGD for epochs.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
