"""``lr`` as a factor of what is found, and told from a learning rate; schedulers that cycle the momentum."""

import copy
import math
import warnings

import pytest
import torch
from cases import AUTOMATIC, batches, mlp
from test_contract import OPTIMIZERS, same_weights, train
from torch import nn
from torch.optim import lr_scheduler

import kfqn
from kfqn.parameters.schedules import Factors, looks_absolute, with_factor


def first_warning(factors, **group):
    """The step, from 1, at which a run of factors is first taken for learning rates; None if never."""
    seen = Factors()
    for k, lr in enumerate(factors, start=1):
        seen = with_factor(seen, lr)
        if looks_absolute(seen, group):
            return k
    return None


N = 2000
FACTORS = {  # schedules of factors, as they are written down
    "1": [1.0] * N,
    "half": [0.5] * N,
    "cosine": [0.5 + 0.5 * math.cos(math.pi * k / N) for k in range(N)],
    "warm-up from 0": [min(1.0, k / 1000) for k in range(N)],
    "a long warm-up from 0": [k / 10000 for k in range(10001)],
    "warm-up from 0, cosine": [min(1.0, k / 100) * (0.5 + 0.5 * math.cos(math.pi * k / N)) for k in range(N)],
    "1/√k": [k**-0.5 for k in range(1, N)],
    "steps": [0.1 ** (k // 500) for k in range(N)],
    "at rest": [0.0] * N,
    "at rest, then 1": [0.0] * 100 + [1.0] * N,
    "one cycle": [0.04 + 0.48 * (1 - math.cos(math.pi * k / 1000)) for k in range(N)],
}
RATES = {  # learning rates of other optimizers, and the step at which that is known at the latest
    "Adam's": ([3e-4] * N, 20),
    "SGD's": ([0.01] * N, 20),
    "decaying": ([3e-3 * 0.99**k for k in range(N)], 20),
    "nanoGPT's": ([6e-4 * min(1.0, (k + 1) / 715) for k in range(N)], 20),
    "warm-up to 0.05": ([0.05 * min(1.0, (k + 1) / 100) for k in range(N)], 120),
    "after a rest": ([0.0] * 50 + [3e-4] * N, 71),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_left_alone(name):
    assert first_warning(FACTORS[name]) is None


@pytest.mark.parametrize("name", RATES)
def test_learning_rates_are_known(name):
    rates, latest = RATES[name]
    assert first_warning(rates) <= latest


def test_a_scheduler_says_itself_what_it_is_a_factor_of():
    low = [0.01] * 100
    assert first_warning(low, initial_lr=1.0) is None
    assert first_warning(low, initial_lr=4e-5, max_lr=1.0) is None
    assert first_warning(low, initial_lr=4e-5, max_lr=1e-3) == 20


SCHEDULES = {  # of factors
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=40),
    "LinearLR from nearly 0": lambda o: lr_scheduler.LinearLR(o, start_factor=1e-4, total_iters=1000),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: k / 1000),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [1.0, 1e-3], total_steps=1000),
    "nothing": lambda o: lr_scheduler.ConstantLR(o, 1.0),
}
ABSOLUTE = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 3e-4, total_steps=1000),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-5, 1e-3, step_size_up=10),
}


def run(make, schedule, steps=45):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer, (batch,) = make(model), batches((5,), 1, size=9)
    scheduler = schedule(optimizer)
    for _ in range(steps):
        train(model, optimizer, [batch])
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", AUTOMATIC)
def test_schedules_of_factors_run_without_a_word(method, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(AUTOMATIC[method], SCHEDULES[name])


@pytest.mark.parametrize("name", ABSOLUTE)
@pytest.mark.parametrize("method", AUTOMATIC)
def test_schedules_of_learning_rates_are_warned_of_once(method, name):
    with pytest.warns(
        RuntimeWarning, match=f"^{method}: lr in a group was at most .* 1 being all of it"
    ) as said:
        run(AUTOMATIC[method], ABSOLUTE[name])
    assert len(said) == 1


def test_rates_set_by_hand_are_warned_of_and_numbers_are_not():
    model, (batch,) = mlp(), batches((5,), 1)
    optimizer = kfqn.KFBFGS(model)
    optimizer.param_groups[0]["lr"] = 6e-4
    train(model, optimizer, [batch] * 19)
    with pytest.warns(RuntimeWarning, match=r"at most 0\.0006 in 20 steps"):
        train(model, optimizer, [batch])
    for method in (kfqn.KFBFGS, kfqn.KFAC, kfqn.ConvergentKFLBFGS):
        model = mlp()
        train(model, method(model, lr=1e-3), [batch] * 30)


def test_a_run_that_is_resumed_late_in_its_schedule_is_no_learning_rate():
    model, (batch,) = mlp(), batches((5,), 1)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, [batch] * 5)
    theirs = kfqn.KFBFGS(twin := copy.deepcopy(model))
    theirs.load_state_dict(optimizer.state_dict())
    theirs.param_groups[0]["lr"] = 0.02
    train(twin, theirs, [batch] * 30)


# The momentum that schedulers cycle.

CYCLES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=2),
}


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("others", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedulers_may_cycle_the_momentum(name, others, cycle):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = OPTIMIZERS[name](model, others=lambda p: others(p, lr=0.1))
    sgd = torch.optim.SGD([{"params": [*mlp().parameters()]} for _ in range(2)], momentum=0.5)
    schedulers = CYCLES[cycle](optimizer), CYCLES[cycle](sgd)
    for batch in batches((5,), 6):
        for ours, theirs in zip(optimizer.param_groups, sgd.param_groups, strict=True):
            assert (ours["lr"], ours["momentum"]) == (theirs["lr"], theirs["momentum"])
        train(model, optimizer, [batch])
        sgd.step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("method", "lr"), [(kfqn.KFBFGS, 0.3), (kfqn.KFLBFGS, 0.3), (kfqn.KFLBFGS, "auto")])
def test_momentum_in_a_group_takes_the_place_of_beta_for_gradients_alone(method, lr):
    model, data = mlp(), batches((5,), 8)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = method(model, lr=lr, beta=0.8), method(twin, lr=lr, beta=0.8), method(third, lr=lr, beta=0.8)
    optimizers[1].param_groups[0]["momentum"] = 0.8
    optimizers[2].param_groups[0]["momentum"] = 0.0
    for net, optimizer in zip((model, twin, third), optimizers, strict=True):
        train(net, optimizer, data)
    assert same_weights(model, twin)
    assert not same_weights(model, third)
    assert optimizers[2].state[third[2].weight]["s_G"].any()
