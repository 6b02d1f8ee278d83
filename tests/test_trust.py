"""When losses can judge steps, how that is lost, and that training goes on without them."""

import functools
import itertools
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, believe, search_of, trust_of
from torch import nn

import kfqn
from kfqn.steps import trust
from kfqn.steps.parabola import LARGEST, LEAST_REACH, MOST_REACH, REFUSED, WITHOUT_LOSSES, bounded
from kfqn.steps.trust import DOUBTS, LOSSES, MISSED, ON_THE_WAY, REJECTED, Trust


@pytest.fixture(params=AUTOMATIC)
def make(request):
    return AUTOMATIC[request.param]


# --- the rule -------------------------------------------------------------------------------------------


def after_checks(found, start=None):
    """After checks in which the loss changed by these multiples of what the slope, −1, says."""
    state = start or Trust(checks=1)
    for ratio in found:
        state = trust.checked(state, ON_THE_WAY, -ON_THE_WAY * ratio, -1.0, 5.0, 1e-6)
    return state


def test_the_first_two_checks_are_of_either_kind_and_later_ones_are_rarer():
    state, at = Trust(), []
    for _ in range(200):
        at.append(trust.point(state))
        change = at[-1] * -1.0
        state = trust.passed(state) if at[-1] == 1 else trust.checked(state, at[-1], change, -1.0, 5.0, 1e-6)
    assert at[:2] == [0.0, ON_THE_WAY]
    checks = [i for i, share in enumerate(at) if share < 1]
    gaps = [b - a for a, b in itertools.pairwise(checks[1:])]
    assert gaps == sorted(gaps)
    assert len(checks) < 12
    assert {at[i] for i in checks} == {0.0, ON_THE_WAY}


@pytest.mark.parametrize("ratio", [0.01, 0.25, 3.0, 40.0])
def test_a_steady_ratio_is_taken_over_and_checked_often(ratio):
    state = after_checks([ratio] * 3)
    assert not state.lost
    assert state.ratio == pytest.approx(ratio)
    assert state.wait == 1
    assert trust.point(state._replace(wait=0)) == ON_THE_WAY


def test_a_ratio_of_about_one_is_one():
    assert after_checks([0.95, 1.1]).ratio == 1


@pytest.mark.parametrize("found", [[-1.0] * DOUBTS, [0.0] * DOUBTS, [100.0, -3.0], [100.0, 0.01]])
def test_ratios_that_nothing_confirms_cost_the_trust(found):
    assert not after_checks(found[:-1]).lost
    assert after_checks(found).lost == "slope"


def test_what_is_below_the_resolution_of_losses_says_nothing():
    state = trust.checked(Trust(checks=1), ON_THE_WAY, 1e-9, -1e-9, 5.0, 1e-6)
    assert (state.lost, state.doubts, state.ratio) == ("", 0, 1.0)


@pytest.mark.parametrize(("change", "lost"), [(0.0, ""), (1e-4, ""), (0.5, "same"), (math.nan, "same")])
def test_the_same_batch_has_to_have_the_same_loss(change, lost):
    assert trust.checked(Trust(), 0.0, change, -1.0, 5.0, 1e-6).lost == lost


def test_rejected_steps_ask_for_a_check_and_then_cost_the_trust():
    state = Trust(checks=2, wait=10)
    for _ in range(2):
        state = trust.with_verdict(state, True)
    assert trust.point(state) < 1
    for _ in range(REJECTED - 2):
        assert not state.lost
        state = trust.with_verdict(state, True)
    assert state.lost == "rejected"
    mixed = Trust()
    for k in range(100):
        mixed = trust.with_verdict(mixed, k % 2 == 0)
    assert not mixed.lost


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("seed", range(20))
def test_losses_that_stay_or_fall_never_cost_the_trust(seed, shift):
    noise, flat, falling = random.Random(seed), Trust(), Trust()
    for k in range(400):
        flat = trust.with_loss(flat, shift + 2 + noise.gauss(0, 0.5))
        falling = trust.with_loss(falling, shift + 2 * 0.98**k + noise.gauss(0, 0.1))
    assert not flat.lost
    assert not falling.lost


def test_losses_above_where_they_began_and_without_a_floor_do():
    rising, sinking = Trust(), Trust()
    for k in range(60):
        rising = trust.with_loss(rising, 2 + 0.2 * k + 0.1 * (-1) ** k)
        sinking = trust.with_loss(sinking, -(1.3**k))
    assert (rising.lost, sinking.lost) == ("rising", "falling")
    early = Trust()
    for k in range(LOSSES - 1):
        early = trust.with_loss(early, 2.0 + k)
    assert not early.lost
    assert trust.with_loss(early, math.nan) == early


def test_a_share_is_kept_from_zero_and_infinity():
    assert bounded(0.0, 4) == LEAST_REACH / 4
    assert bounded(math.inf, 4) == MOST_REACH / 4
    assert bounded(0.1, 4) == 0.1
    assert MOST_REACH > LARGEST


# --- in training ----------------------------------------------------------------------------------------

TARGET = torch.randn(10, 6, generator=torch.Generator().manual_seed(5)) * 0.4


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6))


def noisy():
    torch.manual_seed(3)
    first = [nn.Linear(10, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(
        *first, nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 6)
    )


def batch(k, m=48):
    g = torch.Generator().manual_seed(1000 + k)
    x = torch.randn(m, 10, generator=g)
    return x, torch.sin(x @ TARGET)


def plain(model, x, y):
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


def trained(build, way=plain, steps=200):
    """The mean loss of the last 20 batches, the optimizer, and what it warned of."""
    model = network()
    optimizer, losses = build(model), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(steps):
            x, y = batch(k)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                return way(model, x, y)

            optimizer.step(closure)
            if k >= steps - 20:
                with torch.no_grad():
                    losses.append(F.mse_loss(model(x), y).item())
    return sum(losses) / 20, optimizer, [str(w.message) for w in caught]


def untuned(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@functools.cache
def loss_without_faults(make):
    """What training ends at where losses and gradients are what they should be."""
    loss, *_ = trained(make)
    return loss


def multiple(share):
    return lambda model, x, y: share * plain(model, x, y).detach()


def clipped(clip):
    def way(model, x, y):
        loss = plain(model, x, y)
        clip(model.parameters())
        return loss

    return way


def doubled_gradients(model, x, y):
    for p in model.parameters():
        p.grad = None
    handle = model[2].weight.register_hook(lambda gradient: 2 * gradient)
    loss = plain(model, x, y)
    handle.remove()
    return loss


SERVED = {
    "a part of the loss returned": multiple(0.2),
    "a multiple of the loss returned": multiple(7.0),
    "clipped by norm": clipped(lambda ps: nn.utils.clip_grad_norm_(ps, 0.05)),
    "clipped by value": clipped(lambda ps: nn.utils.clip_grad_value_(ps, 0.01)),
    "gradients changed by a hook": doubled_gradients,
}


@pytest.mark.parametrize("name", SERVED)
def test_where_losses_and_gradients_are_of_different_size_training_is_as_without(make, name):
    loss, optimizer, _ = trained(make, SERVED[name])
    adamw, *_ = trained(untuned, SERVED[name])
    assert optimizer.diagnostics()[""]["judging"] == 1
    assert loss < 5 * loss_without_faults(make)  # clipping by value changes the directions, too
    assert loss < adamw


def own_numbers():
    numbers = random.Random(0)  # of the user's own: nobody can put them back

    def way(model, x, y):
        return plain(model, x + 0.5 * numbers.gauss(0, 1), y)

    return way


def another_batch_at_every_call():
    calls = iter(range(10**6))

    def way(model, x, y):
        return plain(model, *batch(next(calls)))

    return way


def reversed_gradients(model, x, y):
    """The loss that is told is the negative of the one that is trained."""
    return -plain(model, x, y).detach()


UNSERVED = {
    "a generator of the user's own": (own_numbers, "same batch came out different"),
    "a batch drawn inside the closure": (another_batch_at_every_call, "same batch came out different"),
    "the negative loss told": (lambda: reversed_gradients, "does not change as its gradients say"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_where_losses_cannot_judge_that_is_said_once_and_training_goes_on(make, name):
    way, words = UNSERVED[name]
    loss, optimizer, said = trained(make, way())
    adamw, *_ = trained(untuned, way())
    assert [words in message for message in said] == [True], said
    assert optimizer.diagnostics()[""]["judging"] == 0
    assert loss < adamw


def test_without_losses_the_closure_is_run_once_and_layers_move_by_a_share(make):
    calls = []

    def way(model, x, y):
        calls.append(x)
        return plain(model, *batch(len(calls)))

    _, optimizer, _ = trained(make, way, 30)
    before = len(calls)
    model, x = optimizer.training.groups.model, batch(0)[0]
    weights = [layer.W().detach().clone() for layer in optimizer.layers]
    optimizer.step(lambda: (model.zero_grad(), way(model, x, None))[1])
    assert len(calls) == before + 1
    for layer, W in zip(optimizer.layers, weights, strict=True):
        size = math.sqrt(len(layer.weight) / 3)
        assert float((layer.W().detach() - W).norm()) <= 1.3 * WITHOUT_LOSSES * size
        assert float(optimizer.state[layer.weight]["counts"][1]) > 10  # H_A has learnt all the same
    assert not optimizer.second_pass_due


def test_a_scheduler_multiplies_the_share_of_a_loop_without_second_passes(make):
    model = network()
    optimizer, lengths = make(model), []

    def loop():
        for k in range(40):
            if k == 39:
                optimizer.param_groups[0]["lr"] = 0.5
            optimizer.zero_grad()
            plain(model, *batch(0))
            optimizer.step()
            lengths.append(optimizer.diagnostics()["2"]["update"])

    with pytest.warns(RuntimeWarning, match="without a second pass") as said:
        loop()
    assert len(said) == 1
    assert lengths[-1] == pytest.approx(0.5 * lengths[-2], rel=0.1)


def test_a_loop_without_second_passes_beats_adamw_as_it_is(make):
    def loop(build):
        model = network()
        optimizer, losses = build(model), []
        for k in range(200):
            optimizer.zero_grad()
            losses.append(plain(model, *batch(k)).item())
            optimizer.step()
        return sum(losses[-20:]) / 20

    with pytest.warns(RuntimeWarning, match="no losses are known to judge steps by"):
        assert loop(make) < loop(untuned)
    assert MISSED > 1  # one that is left out, as a GradScaler may, costs nothing


def test_one_second_pass_that_is_left_out_costs_nothing(make):
    model = network()
    optimizer = make(model)
    for k in range(30):
        optimizer.zero_grad()
        x, y = batch(k)
        loss = plain(model, x, y)
        optimizer.step()
        if k % 5:
            with optimizer.second_pass(loss) as again:
                again.loss = F.mse_loss(model(x), y)
                again.loss.backward()
    assert optimizer.diagnostics()[""]["judging"] == 1


@pytest.mark.parametrize("gap", [3, 10])
def test_batches_that_are_not_finite_are_refused_and_cost_nothing_of_before(make, gap):
    """As if they had not been there: to the bit, given the same good batches."""
    models = network(), network()
    optimizers = [make(model) for model in models]
    for k in range(60):
        if k % gap == 1 and k > 1:
            x, y = batch(k)
            x[0, 0] = math.inf if k % 2 else math.nan
            before = [p.detach().clone() for p in models[0].parameters()]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizers[0].step(kfqn.closure(models[0], x, y, F.mse_loss))
            assert all(map(torch.equal, before, models[0].parameters()))
            continue
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(kfqn.closure(model, *batch(k), F.mse_loss))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    told = optimizers[0].diagnostics()[""]
    assert told["refused"] == len([k for k in range(2, 60) if k % gap == 1])
    assert told["rejected"] == optimizers[1].diagnostics()[""]["rejected"]


def test_many_batches_in_a_row_that_are_not_finite_show_a_wrong_step(make):
    model = network()
    optimizer, k = make(model), 0
    while k < 40 or not search_of(optimizer).unverified:
        optimizer.step(kfqn.closure(model, *batch(k), F.mse_loss))
        k += 1
    before = optimizer.diagnostics()[""]["rejected"]
    x, y = batch(k)
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step(kfqn.closure(model, x * math.nan, y, F.mse_loss))
    for _ in range(REFUSED - 1):
        assert optimizer.diagnostics()[""]["rejected"] == before
        optimizer.step(kfqn.closure(model, x * math.nan, y, F.mse_loss))
    assert optimizer.diagnostics()[""]["rejected"] == before + 1


def test_two_networks_against_each_other_stay_bounded(make):
    """One maximises what the other minimises; the product has no floor and no ceiling."""
    torch.manual_seed(0)
    one, other = network(), network()
    optimizers = make(one), make(other)
    worst = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(150):
            x, _ = batch(k)
            for sign, mine, optimizer in ((1, one, optimizers[0]), (-1, other, optimizers[1])):

                def closure(sign=sign, mine=mine, x=x):
                    mine.zero_grad()
                    theirs = other if mine is one else one
                    loss = sign * (mine(x) * theirs(x).detach()).mean()
                    loss.backward()
                    return loss

                worst = max(worst, abs(optimizer.step(closure).item()))
    assert worst < 100
    assert all(p.isfinite().all() for model in (one, other) for p in model.parameters())


def test_what_is_trusted_is_saved(make):
    _, optimizer, _ = trained(make, another_batch_at_every_call(), 5)
    twin = network()
    theirs = make(twin)
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.diagnostics()[""]["judging"] == 0
    theirs.warm_start(batch(0)[0] for _ in range(1))
    assert theirs.diagnostics()[""]["judging"] == 1


def test_checks_leave_the_step_as_it_is(make):
    """A second pass on the way puts everything that moved back to the bit, and nothing learns from it."""
    models = noisy(), noisy()
    optimizers = [make(model) for model in models]
    believe(optimizers[1], Trust(checks=2, wait=10**6))
    for k in range(40):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(k)  # of the masks
            optimizer.step(kfqn.closure(model, *batch(k), F.mse_loss))
    assert trust_of(optimizers[0]).checks > trust_of(optimizers[1]).checks
    states = [model.state_dict() for model in models]
    assert all(map(torch.equal, states[0].values(), states[1].values()))
