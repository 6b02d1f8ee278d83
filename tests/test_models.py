"""The paper's networks: sizes, shapes and initialisation."""

import pytest
import torch

from kfqn.race.problems import PROBLEMS
from kfqn.race.problems.models import all_cnn_c, small_all_cnn, vgg16
from kfqn.race.problems.resnet import Block, resnet20


def test_the_small_all_cnn_has_no_relu_on_its_logits():
    model = small_all_cnn(classes=10)
    assert model(torch.randn(50, 1, 8, 8)).min() < 0
    assert [m.stride[0] for m in model if isinstance(m, torch.nn.Conv2d)] == [1, 1, 2, 1, 1, 1]


def test_all_cnn_c_is_the_papers():
    model = all_cnn_c(classes=10)
    assert sum(p.numel() for p in model.parameters()) == 1_369_738
    convolutions = [m for m in model if isinstance(m, torch.nn.Conv2d)]
    assert [m.stride[0] for m in convolutions] == [1, 1, 2, 1, 1, 2, 1, 1, 1]
    assert [m.out_channels for m in convolutions] == [96, 96, 96, 192, 192, 192, 192, 192, 10]
    assert max(m.in_channels * m.kernel_size[0] ** 2 + 1 for m in convolutions) == 1729
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert convolutions[1].weight.std().item() == pytest.approx((2 / (9 * 96)) ** 0.5, rel=0.02)
    assert not convolutions[1].bias.any()


def test_vgg16_is_configuration_d_as_coded():
    model = vgg16(classes=10)
    assert sum(p.numel() for p in model.parameters()) == 33_638_218
    convolutions = [m for m in model if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert all(m.kernel_size == (3, 3) and m.padding == (1, 1) and m.bias is not None for m in convolutions)
    linear = [m for m in model if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(512, 4096), (4096, 4096), (4096, 10)]
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in model) == 5
    others = (torch.nn.BatchNorm2d, torch.nn.Dropout, torch.nn.AdaptiveAvgPool2d)
    assert not any(isinstance(m, others) for m in model)
    columns = [m.weight[0].numel() + 1 for m in (*convolutions, *linear)]
    assert max(columns) == 4609
    assert sum(c * c for c in columns) * 4 == pytest.approx(608 * 2**20, rel=0.001)  # all H_A
    assert convolutions[1].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_resnet20_is_he_et_als():  # section 4.2: 6n + 2 layers for n = 3, 0.27 M parameters (table 6)
    model = resnet20(classes=10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    modules = [*model.modules()]
    convolutions = [m for m in modules if isinstance(m, torch.nn.Conv2d)]
    linear = [m for m in modules if isinstance(m, torch.nn.Linear)]
    assert len(convolutions) + len(linear) == 20
    assert [m.out_channels for m in convolutions] == [16] * 7 + [32] * 6 + [64] * 6
    assert [m.stride[0] for m in convolutions] == [1] * 7 + [2] + [1] * 5 + [2] + [1] * 5
    assert all(m.kernel_size == (3, 3) and m.bias is None for m in convolutions)
    followers = [modules[modules.index(m) + 1] for m in convolutions]
    assert all(isinstance(m, torch.nn.BatchNorm2d) for m in followers)
    assert [m.num_features for m in followers] == [m.out_channels for m in convolutions]
    assert [(m.in_features, m.out_features) for m in linear] == [(64, 10)]
    shapes = [x.shape[1:] for x in stages(model, torch.zeros(2, 3, 32, 32))]
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    for m in convolutions:  # He et al. (2015), fan out
        assert m.weight.std().item() == pytest.approx((2 / (9 * m.out_channels)) ** 0.5, rel=0.1)


def stages(model, x):
    """What comes out of each of the nine blocks."""
    for module in model:
        x = module(x)
        if isinstance(module, Block):
            yield x


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(5, 5, 1), (4, 8, 2)])
def test_the_shortcut_of_a_block_is_every_other_location_and_zeros(inputs, outputs, stride):
    block, x = Block(inputs, outputs, stride), torch.rand(3, inputs, 6, 6)
    expected = torch.zeros(3, outputs, 6 // stride, 6 // stride)
    for i in range(6 // stride):
        for j in range(6 // stride):
            expected[:, :inputs, i, j] = x[:, :, stride * i, stride * j]
    assert torch.equal(block(x), torch.relu(block.residual(x) + expected))
    torch.nn.init.zeros_(block.residual[-1].weight)  # BatchNorm: F(x) = 0
    assert torch.equal(block(x), expected)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"residual"}


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if problem.images])
def test_a_network_of_any_width_fits_its_images(name):
    problem = PROBLEMS[name]
    images, widths = problem.images, (2 * problem.heads, 3 * problem.heads)
    x = torch.zeros(2, images.channels, images.side, images.side)
    narrow, wide = (problem.network(width) for width in widths)
    assert narrow(x).shape == (2, images.classes)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in narrow.parameters())
