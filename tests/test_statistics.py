"""Statistics of A and G against the vectors a_t written out with loops."""

import oracle
import pytest
import torch
from cases import LAYERS
from torch import nn

from kfqn.formulas import statistics as curvature
from kfqn.parameters.discovery import layers_of

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),  # torch's own
]
SAME = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=LAYERS)
def case(request):
    case = LAYERS[request.param]
    module = case()
    (layer,) = layers_of(module)
    return module, layer, torch.randn(3, *case.shape)


def vectors(module, a):
    """The oracle's a_t, (m, *g, |T|, C), and T."""
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return oracle.vectors(module, a)
    parts = [oracle.vectors(module, part) for part in a.chunk(groups, 1)]
    return torch.stack([at for at, _ in parts], 1), parts[0][1]


def second_moment(module, a):
    """The oracle's A, (*g, C, C)."""
    at, _ = vectors(module, a)
    return (
        oracle.second_moment(at) if at.ndim == 3 else torch.stack([*map(oracle.second_moment, at.unbind(1))])
    )


def test_equation_1_the_layer_is_a_matrix(case):
    module, layer, a = case
    at, T = vectors(module, a)
    torch.testing.assert_close(layer.inputs.patches(a), at, **SAME)
    assert layer.inputs.locations(a) == T
    torch.testing.assert_close((at @ layer.W().mT).mT, layer.preactivation(module(a)), **SAME)
    assert (*layer.groups, layer.rows, layer.columns) == layer.W().shape


def test_the_gradient_is_a_matrix_and_a_step_moves_every_parameter(case):
    module, layer, a = case
    at, _ = vectors(module, a)
    h = module(a)
    Dh = torch.randn_like(h)
    h.backward(Dh)
    Dh = layer.preactivation(Dh).mT  # (m, *g, |T|, I)
    torch.testing.assert_close(
        layer.DW(layer.gradients()), torch.einsum("n...ti,n...tc->...ic", Dh, at), **SAME
    )
    W = layer.W()
    P = torch.randn_like(W)
    with torch.no_grad():
        layer.add_(P, alpha=-0.3)
    torch.testing.assert_close(layer.W(), W - 0.3 * P, **SAME)


def test_equation_8_and_its_inverse(case):
    module, layer, a = case
    A = second_moment(module, a)
    torch.testing.assert_close(curvature.second_moment(layer.inputs, a), A, **SAME)
    if module.bias is not None:
        assert A[..., -1, -1].flatten()[0] == pytest.approx(vectors(module, a)[0].shape[-2])  # |T|
    inverse = torch.linalg.inv(A + 0.7 * torch.eye(A.shape[-1]))
    torch.testing.assert_close(curvature.damped_inverse(A, 0.7), inverse, **SAME)


def test_equation_12_the_mean_activation(case):
    module, layer, a = case
    at, _ = vectors(module, a)
    torch.testing.assert_close(curvature.mean_activation(layer.inputs, a), at.mean((0, -2)), **SAME)


def test_equation_13_needs_no_matrix(case):
    module, layer, a = case
    at, _ = vectors(module, a)
    v = torch.randn(*layer.groups, layer.columns)
    products = (at @ v[..., None])[..., 0]
    torch.testing.assert_close(layer.inputs.inner(a, v).reshape(products.shape), products, **SAME)
    Av = (second_moment(module, a) @ v[..., None])[..., 0]
    torch.testing.assert_close(curvature.second_moment_matvec(layer.inputs, a, v), Av, **SAME)


@pytest.mark.parametrize("largest", [1, 5, 11])
def test_blocks_of_the_inputs_have_the_blocks_of_a(case, largest):
    module, layer, a = case
    inputs, (at, _), g = layer.inputs.in_blocks(largest), vectors(module, a), len(layer.groups)
    if layer.columns <= largest or layer.inputs.channels == 1:
        assert inputs is layer.inputs
        return
    assert inputs.columns <= max(largest, inputs.offsets + inputs.homogeneous) < layer.columns
    chosen = coordinates_of_blocks(inputs)
    A, whole = curvature.second_moment(inputs, a), second_moment(module, a)
    for n, E in enumerate(chosen):
        torch.testing.assert_close(A.select(g, n), E @ whole @ E.mT, **SAME)
    mean = torch.stack([at.mean((0, -2)) @ E.mT for E in chosen], dim=g)
    torch.testing.assert_close(curvature.mean_activation(inputs, a), mean, **SAME)
    x = torch.randn(*layer.groups, layer.columns)
    v = torch.stack([x @ E.mT for E in chosen], dim=g)
    torch.testing.assert_close(
        curvature.second_moment_matvec(inputs, a, v), (A @ v[..., None])[..., 0], **SAME
    )
    V, H = torch.randn(*layer.groups, 2, layer.columns), curvature.damped_inverse(A, 0.7)
    product = sum(V @ E.mT @ H.select(g, n) @ E for n, E in enumerate(chosen))
    torch.testing.assert_close(inputs.times(V, H), product, **SAME)


def coordinates_of_blocks(inputs):
    """For every block the matrix (C of the block, C) that picks its coordinates out of the whole."""
    size, offsets, total = inputs.blocks.size, inputs.offsets, inputs.blocks.total
    chosen = torch.zeros(inputs.blocks.count, inputs.columns, total * offsets + inputs.homogeneous)
    for channel in range(total):
        block, place = divmod(channel, size)
        for k in range(offsets):
            chosen[block, place * offsets + k, channel * offsets + k] = 1
    if inputs.homogeneous:
        chosen[-1, -1, -1] = 1
    return chosen


@pytest.mark.parametrize("padding", [0, 1])  # without padding a block is a view of the input
def test_the_second_moment_is_formed_in_blocks(padding, monkeypatch):
    monkeypatch.setattr(curvature, "_BLOCK", 1)
    module = nn.Conv2d(2, 3, 3, padding=padding)
    (layer,), a = layers_of(module), torch.randn(5, 2, 4, 4)
    expected = oracle.second_moment(oracle.vectors(module, a)[0])
    torch.testing.assert_close(curvature.second_moment(layer.inputs, a), expected, **SAME)


def test_any_memory_layout_gives_the_same_statistics():
    module = nn.Conv2d(3, 2, 3, stride=2)
    (layer,), a, v = layers_of(module), torch.randn(4, 3, 6, 7), torch.randn(28)
    layouts = [a.to(memory_format=torch.channels_last), a.mT.contiguous().mT, torch.cat((a, a), 1)[:, 3:]]
    for other in layouts:
        assert not other.is_contiguous()
        torch.testing.assert_close(layer.inputs.patches(other), layer.inputs.patches(a), **SAME)
        for statistic in (curvature.mean_activation, curvature.second_moment):
            torch.testing.assert_close(statistic(layer.inputs, other), statistic(layer.inputs, a), **SAME)
        Av = curvature.second_moment_matvec(layer.inputs, other, v)
        torch.testing.assert_close(Av, curvature.second_moment_matvec(layer.inputs, a, v), **SAME)
        h = curvature.mean_preactivation(other.flatten(2))
        torch.testing.assert_close(h, curvature.mean_preactivation(a.flatten(2)), **SAME)


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 3, 5)])
def test_equations_10_and_11_are_means_over_data_and_locations(shape):
    h, target = torch.randn(*shape, requires_grad=True), torch.randn(*shape)

    def loss_of_one(hn, yn):
        return ((hn - yn) ** 4).sum()

    Dh = [torch.autograd.grad(loss_of_one(h, target), h)[0][n] for n in range(4)]
    per_location = [D.reshape(3, -1).mean(1) for D in Dh]
    batch_mean = sum(loss_of_one(h[n], target[n]) for n in range(4)) / 4
    (gradient,) = torch.autograd.grad(batch_mean, h)
    torch.testing.assert_close(curvature.mean_preactivation_gradient(gradient), sum(per_location) / 4, **SAME)
    expected = sum(hn.reshape(3, -1).mean(1) for hn in h) / 4
    torch.testing.assert_close(curvature.mean_preactivation(h), expected, **SAME)


def test_the_root_of_a_damped_matrix_has_its_eigenvectors_and_about_the_roots_of_its_eigenvalues():
    """Of groups, each with a damping of its own."""
    x = torch.randn(2, 5, 7)
    A = x.mT @ x
    damping = 0.01 * torch.linalg.matrix_norm(A)[:, None] * torch.tensor([[1.0], [3.0]])
    root = curvature.damped_root(A, damping)
    for R, of, own in zip(root, A, damping, strict=True):
        values, vectors = torch.linalg.eigh(of + own * torch.eye(7))
        found = vectors.T @ R @ vectors
        assert (found - found.diagonal().diag()).abs().max() < 1e-12 * found.abs().max()
        assert (found.diagonal() * values.sqrt() - 1).abs().max() < 0.09
    torch.testing.assert_close(curvature.damped_root(A[0], damping[0]), root[0])
