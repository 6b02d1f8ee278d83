"""Algorithms 2, 3 and 5 as a whole: every weight of twenty steps against the oracle, in float64."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import batches, closure, grouped, mixer, mlp, odd_cnn, recurrent, transposed

import kfqn

pytestmark = pytest.mark.usefixtures("double")
NETS = {"cnn": (odd_cnn, (2, 6, 6)), "mlp": (mlp, (5,)), "mixer": (mixer, (4, 5))}
NETS |= {"grouped": (grouped, (4, 5, 5)), "recurrent": (recurrent, (2, 6, 6))}
NETS |= {"transposed": (transposed, (3, 5))}
HISTORY = 6  # wraps round three times in twenty steps


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("method", [kfqn.KFBFGS, kfqn.KFLBFGS, kfqn.ConvergentKFLBFGS])
@pytest.mark.parametrize("net", NETS)
def test_twenty_steps_of_every_weight(net, method, warm):
    make, shape = NETS[net]
    model = make()
    settings = {"lr": 0.5, "damping": 0.3, "beta": 0.8, "mu1": 0.25, "weight_decay": 0.01}
    history = None if method is kfqn.KFBFGS else HISTORY
    algorithm = oracle.Algorithm3 if method is kfqn.ConvergentKFLBFGS else oracle.Algorithm2
    reference = algorithm(model, F.cross_entropy, **settings, history=history)
    optimizer = method(model, **settings, **({"history_size": HISTORY} if history else {}))
    data = batches(shape, count=20)
    if warm:
        reference.start([x for x, _ in data])
        optimizer.warm_start(x for x, _ in data)
    for x, target in data:
        reference.step(x, target)
        optimizer.step(closure(model, optimizer, x, target))
        for got, W in zip(oracle.matrices(model), reference.W, strict=True):
            torch.testing.assert_close(got, W, rtol=1e-9, atol=1e-9 * W.abs().max().item())
    for got, H_A in zip(factors(optimizer, "H_A"), reference.H_A, strict=True):
        torch.testing.assert_close(got, H_A, rtol=1e-8, atol=1e-8 * H_A.abs().max().item())


@pytest.mark.parametrize("largest", [2, 4])  # with 4 some H_G stay whole
@pytest.mark.parametrize("history", [None, HISTORY])
@pytest.mark.parametrize("net", NETS)
def test_twenty_steps_with_factors_in_blocks(net, history, largest):
    make, shape = NETS[net]
    model = make()
    settings = {"lr": 0.5, "damping": 0.3, "beta": 0.8, "mu1": 0.25, "weight_decay": 0.01}
    reference = oracle.Algorithm2(model, F.cross_entropy, **settings, history=history, largest=largest)
    method = kfqn.KFBFGS if history is None else kfqn.KFLBFGS
    optimizer = method(
        model, **settings, **({"history_size": HISTORY} if history else {}), max_factor_size=largest
    )
    for x, target in batches(shape, count=20):
        reference.step(x, target)
        optimizer.step(closure(model, optimizer, x, target))
        for got, W in zip(oracle.matrices(model), reference.W, strict=True):
            torch.testing.assert_close(got, W, rtol=1e-9, atol=1e-9 * W.abs().max().item())
    assert any(len(cut) > 1 for cut in reference.blocks_A)


def factors(optimizer, key):
    """One square factor of every layer, group by group, in the order of the oracle."""
    states = [state for state in optimizer.state.values() if key in state]
    return [H for state in states for H in state[key].view(-1, *state[key].shape[-2:])]


class Sampler:
    """Draws labels as kfqn.closure does for cross_entropy, and remembers them."""

    def __init__(self):
        self.drawn = []

    def __call__(self, output, generator):
        self.drawn.append(torch.multinomial(output.softmax(1), 1, generator=generator)[:, 0])
        return self.drawn[-1]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("net", NETS)
def test_twenty_steps_of_kfac(net, warm):
    make, shape = NETS[net]
    model, sampler = make(), Sampler()
    settings = {"lr": 0.3, "damping": 0.3, "beta": 0.8, "weight_decay": 0.01}
    reference = oracle.Algorithm5(model, F.cross_entropy, **settings, T=3)
    optimizer = kfqn.KFAC(model, **settings, inverse_interval=3, seed=7)
    data = batches(shape, count=20)

    def with_sampler(x, target):
        return kfqn.closure(model, x, target, F.cross_entropy, sample=sampler)

    if warm:
        optimizer.warm_start(with_sampler(x, target) for x, target in data)
        reference.start([(x, sampled) for (x, _), sampled in zip(data, sampler.drawn, strict=True)])
    for x, target in data:
        sampler.drawn = []
        optimizer.step(with_sampler(x, target))
        *at_start, sampled = sampler.drawn
        reference.step(x, target, sampled, *at_start)
        for got, W in zip(oracle.matrices(model), reference.W, strict=True):
            torch.testing.assert_close(got, W, rtol=1e-9, atol=1e-9 * W.abs().max().item())
    for key, expected in (("Omega", reference.Omega), ("Gamma", reference.Gamma)):
        torch.testing.assert_close(factors(optimizer, key), expected, rtol=1e-9, atol=1e-9)


def test_weight_decay_reaches_gradients_not_the_reported_loss():
    model, (x, target) = mlp(), batches((5,), 1)[0]
    optimizer = kfqn.KFBFGS(model, weight_decay=10.0)
    expected = F.cross_entropy(model(x), target)
    assert torch.equal(optimizer.step(closure(model, optimizer, x, target)), expected)


def test_settings_are_read_at_every_step():
    model, data = mlp(), batches((5,), 2)
    optimizer = kfqn.KFBFGS(model, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    optimizer.step(closure(model, optimizer, *data[0]))
    scheduler.step()
    before = [p.clone() for p in model.parameters()]
    optimizer.step(closure(model, optimizer, *data[1]))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_damping_and_weight_decay_are_read_at_every_step():
    model, data = mlp(), batches((5,), 4)
    settings = {"lr": 0.5, "damping": 0.3, "beta": 0.9, "mu1": 0.2, "weight_decay": 0.0}
    reference = oracle.Algorithm2(model, F.cross_entropy, **settings)
    optimizer = kfqn.KFBFGS(model, **settings)
    for k, (x, target) in enumerate(data):
        if k == 2:
            optimizer.param_groups[0].update(damping=4.0, weight_decay=0.1)
            reference.lam, reference.decay = 2.0, 0.1
        reference.step(x, target)
        optimizer.step(closure(model, optimizer, x, target))
    for W, module in zip(reference.W, (model[0], model[2]), strict=True):
        torch.testing.assert_close(oracle.matrix(module), W, rtol=1e-9, atol=1e-12)


def test_quadratic_regression_is_solved_where_the_approximation_is_exact():
    """A linear model, one location: with f = ½‖Wa − y‖², G = I, and H_A is the whole inverse."""
    model = torch.nn.Linear(4, 2, bias=False)
    x, W = torch.randn(64, 4), torch.randn(2, 4)
    target = x @ W.T
    optimizer = kfqn.KFBFGS(model, lr=1.0, damping=1e-20, beta=0.0)

    def half_squares(output, target):
        return 0.5 * (output - target).square().sum(1).mean()

    optimizer.step(closure(model, optimizer, x, target, half_squares))
    torch.testing.assert_close(model.weight.detach(), W, rtol=1e-8, atol=1e-8)
