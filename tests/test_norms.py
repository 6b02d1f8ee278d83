"""Layers before a normalisation: known by their gradients, and kept from growing with every step."""

import copy
import math

import pytest
import torch
from cases import (
    AUTOMATIC,
    VisionTransformer,
    batches,
    believe,
    closure,
    mlp,
    odd_cnn,
    recurrent,
    search_of,
    searched,
)
from torch import nn

from kfqn.parameters.discovery import layers_of
from kfqn.steps.norms import DECAY, NOTHING, averaged, keep_norms_, radial_share


@pytest.fixture(params=AUTOMATIC)
def make(request):
    return AUTOMATIC[request.param]


def normalised():
    """Each normalisation once, with and without a bias before it, and a head without; input (2, 6, 6)."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(216, 10),
        nn.LayerNorm(10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def trained(model, make, data, steps):
    """The optimizer after so many steps, and ‖W‖ of every layer after each."""
    optimizer, norms = make(model), []
    for k in range(steps):
        x, y = data[k % len(data)]
        optimizer.step(closure(model, optimizer, x, y))
        norms.append([float(layer.W().detach().norm()) for layer in optimizer.layers])
    return optimizer, torch.tensor(norms)


def free(optimizer):
    """The names of the layers whose norms are kept."""
    group = optimizer.training.groups.own()[0]
    return [
        layer.name
        for layer, x in zip(optimizer.layers, group["progress"]["radial"], strict=True)
        if x < NOTHING
    ]


@pytest.mark.usefixtures("double")
def test_along_is_what_it_says():
    w, v = torch.randn(15), torch.randn(15)
    expected = 15 * torch.cosine_similarity(w, v, dim=0) ** 2
    assert radial_share(15, float(w @ v), float(w.norm()), float(v.norm())) == pytest.approx(float(expected))
    assert math.isnan(radial_share(15, 0.0, 1.0, 0.0))
    assert math.isnan(radial_share(15, 0.0, 0.0, 1.0))
    assert math.isnan(radial_share(15, math.nan, 1.0, math.nan))
    assert averaged(0.5, math.nan) == 0.5
    assert averaged(0.5, 0.0) == DECAY * 0.5
    assert averaged(0.5, 1e9) == DECAY * 0.5 + (1 - DECAY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_norms_are_put_back(dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 5)).to(dtype)
    layers = layers_of(model)
    before = {layer: 2.0 + i for i, layer in enumerate(layers)}
    directions = [layer.W() / layer.W().norm() for layer in layers]
    with torch.no_grad():
        keep_norms_(before)
    for (layer, norm), direction in zip(before.items(), directions, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps * norm
        torch.testing.assert_close(layer.W(), norm * direction, rtol=0, atol=tolerance)


def test_layers_before_a_normalisation_keep_their_norms(make):
    torch.manual_seed(0)
    optimizer, norms = trained(normalised(), make, batches((2, 6, 6), 8), 60)
    assert free(optimizer) == ["0", "3", "7"]
    later = norms[45:]
    torch.testing.assert_close(later[:, :3], later[:1, :3].expand_as(later[:, :3]), rtol=1e-5, atol=0)
    assert (later[1:, 3] != later[:-1, 3]).all()


@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp, (5,)), (odd_cnn, (2, 6, 6)), (recurrent, (2, 6, 6)), (VisionTransformer, (1, 8, 8))],
    ids=["perceptron", "odd", "recurrent", "transformer"],
)
def test_other_layers_are_not_taken_for_them(make, build, shape):
    """A transformer's patches come closest, 0.08: positions are added, and then they are normalised."""
    least = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, data = build(), batches(shape, 8)
        optimizer = make(model)
        for k in range(60):
            optimizer.step(closure(model, optimizer, *data[k % 8]))
            least += optimizer.param_groups[0]["progress"]["radial"]
    assert min(least) > 1.5 * NOTHING


def test_steps_in_noise_do_not_make_them_grow(make):
    """Before, such a W became ten times as long in 300 steps."""
    torch.manual_seed(0)
    model, noise = normalised(), batches((2, 6, 6), 300)
    first = [float(layer.W().detach().norm()) for layer in layers_of(model)]
    _, norms = trained(model, make, noise, 300)
    assert all(norm < 2 * start for norm, start in zip(norms[-1, :3].tolist(), first, strict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_of_zero_stays_what_it_is(dtype):
    (layer,) = layers_of(nn.Linear(3, 2).to(dtype))
    with torch.no_grad():
        layer.set_(torch.zeros_like(layer.W()))
        keep_norms_({layer: 1e3})
    assert not layer.W().any()


def test_weights_in_half_precision_keep_their_norms_too(make):
    """A step makes W longer by less than a bfloat16 shows; what was not corrected is, sooner or later."""
    torch.manual_seed(0)
    model = normalised().to(torch.bfloat16)
    optimizer, norms = trained(model, make, batches((2, 6, 6), 200, dtype=torch.bfloat16), 200)
    assert free(optimizer)
    later = norms[60:]
    for i, layer in enumerate(optimizer.layers):
        if layer.name in free(optimizer):
            torch.testing.assert_close(later[:, i], later[:1, i].expand_as(later[:, i]), rtol=0.03, atol=0)


@pytest.mark.parametrize("k", [50, 55])
def test_resuming_is_bit_identical(make, k):
    torch.manual_seed(0)
    model, data = normalised(), batches((2, 6, 6), 70)
    optimizer, _ = trained(model, make, data[:k], k)
    twin = copy.deepcopy(model)
    theirs = make(twin)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert free(theirs) == free(optimizer) == ["0", "3", "7"]
    for m, o in ((model, optimizer), (twin, theirs)):
        for x, y in data[k:]:
            o.step(closure(m, o, x, y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_is_taken_back_leaves_them_as_they_were(make):
    torch.manual_seed(0)
    model, data = normalised(), batches((2, 6, 6), 80)
    optimizer, _ = trained(model, make, data, 50)
    norms = [float(layer.W().detach().norm()) for layer in optimizer.layers[:3]]
    search = search_of(optimizer)
    searched(optimizer, force_trial=True)
    believe(optimizer)
    optimizer.training.record_next()
    evaluate, losses = closure(model, optimizer, *data[60]), []

    def worse():
        losses.append(evaluate() * (1 + 100 * len(losses)))
        return losses[-1]

    optimizer.step(worse)
    assert optimizer.diagnostics()[""]["rejected"] == search.rejected + 1
    optimizer.step(closure(model, optimizer, *data[61]))
    after = [float(layer.W().detach().norm()) for layer in optimizer.layers[:3]]
    assert after == pytest.approx(norms, rel=1e-5)
