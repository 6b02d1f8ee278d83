"""Curvature at every so manyth step only, after a start with more."""

import copy
import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import batches, closure, odd_cnn
from test_contract import TWO_PASS, snapshot, train, unchanged
from test_entry_points import backward

import kfqn
from kfqn.steps.cadence import Regular, gap

INTERVAL = 3
LEARNT = [*range(20), *range(20, 30, 2), *range(30, 40, 3)]  # steps with a second pass, of the first 40
START = 34  # steps before those with the full interval are tried


@pytest.fixture(params=TWO_PASS)
def make(request):
    fixed = {"lr": 3.0, "curvature_interval": INTERVAL}
    return lambda model, **settings: TWO_PASS[request.param](model, **(fixed | settings))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("history", [None, 2])
def test_what_is_learnt_is_what_the_oracle_learns_at_those_steps(history):
    model = odd_cnn()
    settings = {"lr": 0.5, "damping": 0.3, "beta": 0.8, "mu1": 0.25, "weight_decay": 0.01}
    reference = oracle.Algorithm2(model, F.cross_entropy, **settings, history=history)
    reference.interval = INTERVAL
    method = kfqn.KFBFGS if history is None else kfqn.KFLBFGS
    options = {} if history is None else {"history_size": history}
    optimizer = method(model, **settings, **options, curvature_interval=INTERVAL)
    for x, target in batches((2, 6, 6), 45):
        reference.step(x, target)
        train(model, optimizer, [(x, target)])
        for got, W in zip(oracle.matrices(model), reference.W, strict=True):
            torch.testing.assert_close(got, W, rtol=1e-9, atol=1e-9 * W.abs().max().item())


def test_other_steps_take_one_pass_and_look_at_nothing(make):
    model, data = odd_cnn(), batches((2, 6, 6), 40)
    optimizer, calls = make(model), []
    for x, target in data:
        before = optimizer.state[model[0].weight].get("counts", torch.zeros(6)).clone()
        calls.append(0)

        def evaluate(x=x, target=target):
            calls[-1] += 1
            return closure(model, optimizer, x, target)()

        optimizer.step(evaluate)
        learnt = optimizer.state[model[0].weight]["counts"].sum() - before.sum()
        assert (learnt > 0) == (calls[-1] == 2)
    assert [k for k, passes in enumerate(calls) if passes == 2] == LEARNT


def test_gaps_grow_to_the_interval_however_long():
    """None is much more than a tenth of the steps so far, and every tenfold has as many steps learnt from."""
    for interval in (1, 7, 10, 25, 40, 1000):
        due = [k for k in range(30_000) if k % gap(k, interval) == 0]
        gaps = {k: after - k for k, after in itertools.pairwise(due)}
        assert max(gaps.values()) == interval
        assert all(length <= max(1, k / 5) for k, length in gaps.items())
        assert [k for k in due if k < 20] == [*range(20)]
    tenfolds = [sum(k % gap(k, 10**6) == 0 for k in range(n, 10 * n)) for n in (100, 1000, 10_000)]
    assert len({*tenfolds}) == 1


def test_with_an_automatic_rate_every_third_gap_is_one_longer():
    assert [k for k in range(80) if Regular().is_due(k, 10)] == [0, 10, 20, 31, 41, 51, 62, 72]
    assert [k for k in range(15) if Regular().is_due(k, 2)] == [0, 2, 4, 7, 9, 11, 14]
    assert all(Regular().is_due(k, 1) for k in range(100))


@pytest.mark.parametrize("period", [2, 3, 5, 10])
@pytest.mark.parametrize("interval", [2, 5, 10, 40])
def test_of_tasks_in_turn_each_is_met(interval, period):
    due = [k for k in range(300 * interval) if Regular().is_due(k, interval)]
    counts = [sum(k % period == task for k in due) for task in range(period)]
    assert min(counts) > 0.4 * max(counts)  # of an odd gap two thirds are of one parity


def test_new_factors_learn_at_every_step_again(make):
    model, data = odd_cnn(), batches((2, 6, 6), 40)
    optimizer = make(model)
    train(model, optimizer, data[:35])
    optimizer.warm_start(x for x, _ in data)
    train(model, optimizer, data[35:])
    assert optimizer.diagnostics()["0"]["A taken"] == 5


@pytest.mark.parametrize("k", [0, 1, *range(START, START + 4)])
def test_resuming_is_bit_identical_at_any_step(make, k):
    data = batches((2, 6, 6), k + 5)
    model = odd_cnn()
    optimizer = make(model, lr=0.2)
    train(model, optimizer, data[:k])
    twin = copy.deepcopy(model)
    theirs = make(twin, lr=0.2)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data[k:])
    train(twin, theirs, data[k:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_loop_of_ones_own_is_told_when_a_second_pass_is_due(make):
    model = odd_cnn()
    twin = copy.deepcopy(model)
    optimizer, theirs, due = make(model), make(twin), []
    for x, target in batches((2, 6, 6), 40):
        train(model, optimizer, [(x, target)])
        theirs.zero_grad()
        backward(twin, x, target)
        theirs.step()
        due.append(theirs.second_pass_due)
        if theirs.second_pass_due:
            with theirs.second_pass():
                backward(twin, x, target)
    assert [k for k, there in enumerate(due) if there] == LEARNT
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_layer_that_joins_between_starts_at_once(make):
    model, data = odd_cnn(), batches((2, 6, 6), 40)
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, data[:36])
    model[0].requires_grad_(True)
    optimizer.add_param_group({"modules": "0"})
    train(model, optimizer, data[36:])
    assert optimizer.diagnostics()["0"]["steps"] == 4
    assert optimizer.diagnostics()["0"]["A taken"] == 4  # the first steps of its own group
    assert optimizer.diagnostics()["2"]["A taken"] == len(LEARNT)


def test_a_refused_step_does_not_count(make):
    model, data = odd_cnn(), batches((2, 6, 6), 4)
    optimizer = make(model)
    train(model, optimizer, data[:1])
    with pytest.warns(RuntimeWarning, match="the step was refused"):
        optimizer.step(closure(model, optimizer, *data[1], lambda o, y: F.cross_entropy(o, y) * float("nan")))
    assert optimizer.param_groups[0]["progress"]["k"] == 1


@pytest.mark.parametrize("interval", [0, -1, 2.5])
def test_an_interval_out_of_range(interval):
    with pytest.raises(ValueError, match="curvature_interval must be a whole number >= 1"):
        kfqn.KFBFGS(odd_cnn(), curvature_interval=interval)
