"""``damping="auto"``: what it measures, and what may be rescaled without the training curve noticing."""

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, batches, mlp, odd_cnn
from test_contract import train
from torch import nn

import kfqn
from kfqn.formulas.damping import damping_A, damping_G, in_units_of

ENOUGH = torch.tensor(1.0)


@pytest.fixture(params=AUTOMATIC)
def make(request):
    return AUTOMATIC[request.param]


# --- λ_A and λ_G ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(), (2,), (2, 3)])
def test_lambda_A_is_a_hundredth_of_the_norm_of_A(groups):
    a = torch.randn(*groups, 20, 4, dtype=torch.float64)
    A = a.mT @ a
    expected = torch.linalg.eigvalsh(A).square().sum(-1).sqrt() / 100
    torch.testing.assert_close(damping_A(A, ENOUGH), expected)
    torch.testing.assert_close(damping_A(1e200 * A, ENOUGH), 1e200 * expected)


def test_where_nothing_comes_in_lambda_A_is_one():
    A = torch.stack([torch.zeros(3, 3), 2 * torch.eye(3)])
    torch.testing.assert_close(damping_A(A, ENOUGH), torch.tensor([1.0, 0.02 * 3**0.5]))


@pytest.mark.parametrize(("for_each", "times"), [(0.125, 8.0), (0.5, 2.0), (1.0, 1.0), (100.0, 1.0)])
def test_where_a_batch_has_fewer_vectors_than_these_have_entries_lambda_A_is_larger_in_proportion(
    for_each, times
):
    A = torch.eye(3) + torch.ones(3, 3)
    torch.testing.assert_close(damping_A(A, torch.tensor(for_each)), times * damping_A(A, ENOUGH))


@pytest.mark.parametrize("start", ["first batch", "micro-batches", "warm start"])
def test_the_vectors_of_a_mini_batch_are_counted_over_data_and_locations(make, start):
    """Of ten inputs the `Linear` layer has ten a_t, the convolution, with 4 × 4 locations, 160."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    optimizer, x, y = make(model), torch.randn(10, 1, 6, 6), torch.randint(3, (10,))
    if start == "warm start":
        optimizer.warm_start([x, x.flip(0)])
    for part in [slice(0, 4), slice(4, 10)] if start == "micro-batches" else [slice(None)]:
        (F.cross_entropy(model(x[part]), y[part]) * len(x[part]) / 10).backward()
    with torch.no_grad():
        h = torch.cat((model[:2](x), torch.ones(10, 1)), 1)
    optimizer.step()
    A = h.mT @ h / 10
    lambda_A = [optimizer.state[model[place].weight]["lambda_A"] for place in (0, 2)]
    torch.testing.assert_close(lambda_A[1], damping_A(A, ENOUGH) * 33 / 10)
    patches = torch.cat((F.unfold(x, 3).mT.flatten(0, 1), torch.ones(160, 1)), 1)
    torch.testing.assert_close(lambda_A[0], damping_A(patches.mT @ patches / 10, ENOUGH))


def test_lambda_G_averages_the_curvature_that_is_met():
    s, y = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 20.0])  # ‖y‖/‖s‖ = 4
    first = damping_G(torch.zeros(1), s, y, torch.tensor([30.0]))
    assert first == pytest.approx(4.0)
    second = damping_G(first, s, 2 * y, torch.tensor([2.0]))
    assert second == pytest.approx((4 + 8) / 2)
    late = damping_G(second, s, 2 * y, torch.tensor([1000.0]))
    assert late == pytest.approx(6 + 0.05 * 2)


@pytest.mark.parametrize(("s", "y"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (torch.nan, 1.0), (1.0, torch.inf)])
def test_a_pair_without_a_size_leaves_lambda_G(s, y):
    known, unknown = torch.tensor([[2.0], [0.0]])
    pair = torch.full((3,), s), torch.full((3,), y)
    assert damping_G(known, *pair, torch.tensor([5.0])) == 2.0
    assert damping_G(unknown, *pair, torch.tensor([5.0])) == 0.0


def test_units():
    y = torch.tensor([[2.0, 4.0], [6.0, 8.0]])
    torch.testing.assert_close(in_units_of(torch.tensor([[2.0], [0.0]]), y), y / torch.tensor([[2.0], [1.0]]))


# --- which optimizer has it -----------------------------------------------------------------------------


def test_it_is_the_default_of_an_automatic_rate_alone(make):
    assert {"lambda_A", "lambda_G"} <= state_of(make(mlp())).keys()
    assert not {"lambda_A", "lambda_G"} & state_of(make(mlp(), lr=1.0)).keys()
    assert not {"lambda_A", "lambda_G"} & state_of(make(mlp(), damping=0.3)).keys()
    assert make(mlp(), lr=1.0).param_groups[0]["damping"] == 3.0
    assert make(mlp(), damping=0.3).param_groups[0]["damping"] == 0.3


def state_of(optimizer):
    model = optimizer.training.groups.model
    train(model, optimizer, batches((5,), 2))
    return optimizer.state[model[0].weight]


def test_groups_choose_for_themselves(make):
    groups = [{"modules": "0", "damping": 0.3}, {"modules": "4", "lr": 0.1}]
    optimizer = make(odd_cnn(), groups=groups)
    found = {(g["automatic"], g["relative"], g["damping"]) for g in optimizer.param_groups}
    assert found == {(True, False, 0.3), (False, False, 3.0), (True, True, 1.0)}
    train(optimizer.training.groups.model, optimizer, batches((2, 6, 6), 3))


def test_wide_layers_have_their_factors_in_blocks_unless_the_rate_is_a_number(make):
    def blocks_of(width=1200, **settings):
        model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
        optimizer = make(model, **settings)
        train(model, optimizer, batches((5,), 1))
        return optimizer.state[model[2].weight]["H_A"].shape

    assert blocks_of() == (5, 241, 241)
    assert blocks_of(1023) == (1024, 1024)
    assert blocks_of(damping=0.3) == (5, 241, 241)
    assert blocks_of(lr=1.0) == blocks_of(max_factor_size=None) == (1201, 1201)
    assert blocks_of(max_factor_size=1201) == (1201, 1201)
    assert blocks_of(600, max_factor_size=201, lr=1.0) == (3, 201, 201)
    assert blocks_of(600, max_factor_size=201) == (3, 201, 201)
    assert blocks_of(groups=[{"modules": "2", "lr": 1.0}]) == (1201, 1201)
    assert blocks_of(groups=[{"modules": "2", "max_factor_size": 700}]) == (2, 601, 601)
    assert blocks_of(lr=1.0, groups=[{"modules": "2", "lr": "auto"}]) == (5, 241, 241)


def test_a_word_that_is_not_auto_is_an_error(make):
    for setting in ("lr", "damping", "max_factor_size"):
        with pytest.raises(ValueError, match=f"^{setting} must be a number or \"auto\", got 'none'\\.$"):
            make(mlp(), **{setting: "none"})


def test_a_reset_keeps_lambda_G():
    model = mlp()
    optimizer = kfqn.KFLBFGS(model, curvature_interval=1)
    train(model, optimizer, batches((5,), 5))
    state = optimizer.state[model[0].weight]
    known = state["lambda_G"].clone()
    state["H_A"].fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="start anew"):
        train(model, optimizer, batches((5,), 2))  # in the first the layer waits for inputs
    state = optimizer.state[model[0].weight]
    met = state["y_G"].norm() / state["s_G"].norm()
    torch.testing.assert_close(state["lambda_G"], known.lerp(met, 1 / 6))  # not met alone, as at first
