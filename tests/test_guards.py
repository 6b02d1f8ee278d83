"""Whatever comes in, no weight and no factor becomes something else than a number."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import batches, closure, mlp, odd_cnn
from test_contract import OPTIMIZERS, TWO_PASS, snapshot, train, unchanged
from torch import nn

import kfqn
from kfqn import first_pass
from kfqn.race.entrants.grids import PRINTED
from kfqn.race.problems.data import digits
from kfqn.race.problems.models import small_all_cnn

REFUSED = "ignore:.*the step was refused and nothing was changed:RuntimeWarning"
ANEW = "ignore:.*start anew:RuntimeWarning"


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def all_finite(model, optimizer):
    values = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    return all(bool(v.isfinite().all()) for v in values)


def poisoned(model, where, bad):
    """A batch and a loss of which one entry is not a number one can learn from."""
    ((x, target),) = batches((5,), 1)
    if where == "input":
        x[0, 0] = bad
    loss_fn = F.cross_entropy if where == "input" else lambda o, y: F.cross_entropy(o, y) * bad
    return kfqn.closure(model, x, target, loss_fn, sample=lambda o, g: torch.zeros(len(o), dtype=torch.long))


@pytest.mark.parametrize("where", ["input", "loss"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_refused_counted_and_said_once(make, where, bad):
    model, data = mlp(), batches((5,), 6)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    train(model, optimizer, data[:3])
    train(twin, theirs, data[:3])
    before = snapshot(model, optimizer)
    with pytest.warns(RuntimeWarning, match="the step was refused and nothing was changed"):
        optimizer.step(poisoned(model, where, bad))
    optimizer.step(poisoned(model, where, bad))  # not said again, or the suite's filter would raise
    assert unchanged(before, snapshot(model, optimizer))
    assert optimizer.diagnostics()[""]["refused"] == 2
    train(model, optimizer, data[3:])
    train(twin, theirs, data[3:])
    assert unchanged(snapshot(twin, theirs), snapshot(model, optimizer))


def test_gradients_whose_squares_overflow_are_finite(make):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make(model)
    (F.cross_entropy(model(x), target) * 1e25).backward()
    assert model[0].weight.grad.square().isinf().any()
    assert first_pass.signs(optimizer.training, None, optimizer.layers).tolist() == [0.0]
    assert first_pass.is_valid(optimizer.training, 0.0, None, optimizer.layers, False)
    model[0].weight.grad[0, 0] = math.inf
    with pytest.warns(RuntimeWarning, match="is not finite"):
        assert not first_pass.is_valid(optimizer.training, 0.0, None, optimizer.layers, False)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_raises_instead_if_asked_to(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model, error_if_nonfinite=True)
    before = snapshot(model, optimizer)
    with pytest.raises(FloatingPointError, match="the loss is not finite, so the step was refused"):
        optimizer.step(poisoned(model, "loss", math.nan))
    assert unchanged(before, snapshot(model, optimizer))


@pytest.mark.parametrize("name", TWO_PASS)
def test_a_second_door_refuses_as_well_and_its_second_pass_learns_nothing(name):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = TWO_PASS[name](model)
    train(model, optimizer, [(x, target)])
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    (F.cross_entropy(model(x), target) * math.nan).backward()
    with pytest.warns(RuntimeWarning, match="the step was refused"):
        optimizer.step()
    with optimizer.second_pass():
        F.cross_entropy(model(x), target).backward()
    assert unchanged(before, snapshot(model, optimizer))


BREAKS = {
    "nan": lambda H: H.fill_(math.nan),
    "inf": lambda H: H.fill_(math.inf),
    "not positive": lambda H: H.neg_(),
    "huge": lambda H: H.mul_(1e38),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("name", ["KFBFGS", "KFLBFGS", "KFAC"])
def test_a_broken_factor_starts_anew_and_the_rest_goes_on(name, how):
    model, ((x, target),) = odd_cnn(), batches((2, 6, 6), 1, size=17)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, [(x, target)] * 5)
    state = optimizer.state[model[4].weight]
    with torch.no_grad():
        BREAKS[how](state["H_Omega" if name == "KFAC" else "H_A"])
    with pytest.warns(
        RuntimeWarning, match=r"the factors of '4' \(Conv2d\) were no longer finite and positive"
    ):
        train(model, optimizer, [(x, target)] * 2)  # nobody holds the inputs of the first
    found = optimizer.diagnostics()
    assert found["4"]["resets"] == 1
    assert all(values["resets"] == 0 for name, values in found.items() if name not in ("", "4"))
    losses = train(model, optimizer, [(x, target)] * 60)
    assert losses[-1] < 0.5 * losses[0]
    assert all_finite(model, optimizer)


def test_a_factor_that_is_broken_for_some_gradients_only_starts_anew_too():
    """Sound in the next step, where there are inputs to start from, it would be left as it is."""
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(16, 4)
    optimizer = kfqn.KFBFGS(model, lr=0.01, damping=1.0, beta=0.0, curvature_interval=1)

    def step(row):
        def evaluate():
            optimizer.zero_grad()
            h = model(x)  # once, so that nobody holds x
            loss = h[:, row].mean() + 1e-3 * h.square().mean()
            loss.backward()
            return loss

        optimizer.step(evaluate)

    for _ in range(3):
        step(1)
    H_G = optimizer.state[model[0].weight]["H_G"]
    H_G.copy_(torch.diag(torch.tensor([-1.0, 1.0, 1.0])))
    with pytest.warns(RuntimeWarning, match="no longer finite and positive"):
        step(0)
    step(1)
    assert optimizer.diagnostics()["0"]["resets"] == 1
    assert torch.linalg.eigvalsh(optimizer.state[model[0].weight]["H_G"]).min() > 0


@pytest.mark.filterwarnings(REFUSED, ANEW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_stay_in_their_range(dtype):
    """A step far too large for the type is not taken."""
    model = mlp().to(dtype)
    optimizer = kfqn.KFBFGS(model, lr=1e6, damping=0.1)
    train(model, optimizer, batches((5,), 20, dtype=dtype))
    assert all_finite(model, optimizer)


@pytest.mark.filterwarnings(REFUSED, ANEW)
@pytest.mark.parametrize("name", TWO_PASS)
def test_no_point_of_the_paper_s_grid_ends_with_a_weight_that_is_not_finite(name):
    """All 63, on real digits, where most large steps diverge; `benchmarks/` has all of it in full."""
    data = digits()
    ((x, y),) = data.in_order(data.train.first(96))
    refused = 0
    for lr, damping in itertools.product(PRINTED["kfbfgs"]["lr"], PRINTED["kfbfgs"]["damping"]):
        torch.manual_seed(0)
        model = small_all_cnn(10, 1, width=2)
        optimizer = TWO_PASS[name](model, lr=lr, damping=damping)
        for half in (slice(0, 48), slice(48, 96)) * 4:
            optimizer.step(closure(model, optimizer, x[half], y[half]))
        assert all_finite(model, optimizer), (lr, damping)
        refused += optimizer.diagnostics()[""]["refused"]
    assert name == "ConvergentKFLBFGS" or refused > 0


def test_diagnostics_count_what_happened():
    model, data = mlp(), batches((5,), 7)
    optimizer = kfqn.KFBFGS(model, lr=0.3)
    train(model, optimizer, data)
    for name in ("0", "2"):
        found = optimizer.diagnostics()[name]
        state = optimizer.state[model.get_submodule(name).weight]
        assert found["steps"] == 7
        assert found["A taken"] + found["A skipped"] == 7
        assert found["G taken"] + found["G skipped"] == 7
        assert 0 <= found["G damped"] <= 7
        assert found["norm H_A"] == pytest.approx(state["H_A"].norm().item())
        assert found["update"] > 0
        assert math.isfinite(found["ratio"])


def test_diagnostics_leave_no_trace():
    model, data = mlp(), batches((5,), 4)
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    for batch in data:
        train(model, optimizer, [batch])
        optimizer.diagnostics()
        train(twin, theirs, [batch])
    assert unchanged(snapshot(twin, theirs), snapshot(model, optimizer))
