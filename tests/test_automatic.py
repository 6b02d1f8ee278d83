"""The method without a learning rate: one pass a step, lengths that are shares, falls, and schedules."""

import copy
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, batches, closure, grouped, mlp, odd_cnn
from test_contract import train
from torch import nn

import kfqn
from kfqn.formulas.statistics import damped_root
from kfqn.parameters.groups import note
from kfqn.steps.weight_average import Latest

LATEST = kfqn.Parts(weights=Latest())  # the model holds the weights that steps are taken with


@pytest.fixture(params=AUTOMATIC)
def make(request):
    return AUTOMATIC[request.param]


def conv_net(bias):
    """More a_t than ten times their entries in the first layer, less in the last; input (2, 6, 6)."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(75, 3, bias=bias)
    ).double()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moves(model, optimizer, data):
    """How far every layer moves at each step."""
    found = []
    for batch in data:
        before = [layer.W() for layer in optimizer.layers]
        train(model, optimizer, [batch])
        after = [layer.W() for layer in optimizer.layers]
        found.append([float((a - b).detach().norm()) for a, b in zip(after, before, strict=True)])
    return found


def lengths(optimizer):
    """0.06 √(I/3) of every layer, two thirds of it where filters have one offset."""
    weights = [layer.modules[0].weight for layer in optimizer.layers]
    return [(0.06 if W[0, 0].numel() > 1 else 0.04) * math.sqrt(len(W) / 3) for W in weights]


# --- the whole method ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_thirty_steps_are_those_of_the_description(bias, weight_decay):
    model, data = conv_net(bias), batches((2, 6, 6), 31, size=9)
    reference = oracle.WithoutRate(model, F.cross_entropy, weight_decay, interval=4)
    optimizer = kfqn.KFBFGS(model, weight_decay=weight_decay, curvature_interval=4)
    for x, target in data[:30]:
        loss = optimizer.step(closure(model, optimizer, x, target))
        torch.testing.assert_close(loss, F.cross_entropy(reference.forward(x)[0], target).detach())
        reference.step(x, target)
        for layer, average, W in zip(optimizer.layers, reference.x, reference.W, strict=True):
            torch.testing.assert_close(layer.W().detach(), average, rtol=1e-9, atol=1e-11)
            ahead = [optimizer.state[p]["ahead"] for p in layer.parameters()]
            columns = [x.flatten(1) if x.ndim > 1 else x[:, None] for x in ahead]
            torch.testing.assert_close(torch.cat(columns, 1), W - average, rtol=1e-7, atol=1e-11)
    for i, layer in enumerate(optimizer.layers):
        torch.testing.assert_close(optimizer.state[layer.weight]["A"], reference.A[i])
        torch.testing.assert_close(optimizer.state[layer.weight]["H_A"], reference.root(i))
        torch.testing.assert_close(optimizer.state[layer.weight]["lambda_A"], reference.lam[i])


@pytest.mark.usefixtures("double")
def test_beyond_a_hundred_steps_and_under_a_schedule_too():
    model, data = mlp().double(), batches((5,), 131, size=3)
    reference = oracle.WithoutRate(model, F.cross_entropy)
    optimizer = kfqn.KFBFGS(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 115 else 1 - (k - 114) / 15)
    for x, target in data[:130]:
        reference.lr = optimizer.param_groups[0]["lr"]
        reference.step(x, target)
        train(model, optimizer, [(x, target)])
        schedule.step()
        for layer, average in zip(optimizer.layers, reference.x, strict=True):
            torch.testing.assert_close(layer.W().detach(), average, rtol=1e-8, atol=1e-10)
    assert reference.fall == (100 / 115) ** (1 / 3)


@pytest.mark.usefixtures("double")
def test_convolutions_move_by_more_than_layers_with_one_offset():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(24, 3))
    optimizer = kfqn.KFBFGS(model, parts=LATEST, weight_decay=0.0)
    data = batches((3, 4, 4), 2)
    train(model, optimizer, data[:1])
    (moved,) = moves(model, optimizer, data[1:])
    shares = [m / math.sqrt(len(layer.weight) / 3) for m, layer in zip(moved, optimizer.layers, strict=True)]
    assert shares == pytest.approx([0.06, 0.04, 0.04], rel=1e-9)


def test_closures_are_called_once_and_no_second_pass_is_due():
    model, data, calls = odd_cnn(), batches((2, 6, 6), 25), []
    optimizer = kfqn.KFBFGS(model, curvature_interval=10)

    def evaluate(x, target):
        calls.append(1)
        return closure(model, optimizer, x, target)()

    for batch in data:
        optimizer.step(lambda batch=batch: evaluate(*batch))
        assert not optimizer.second_pass_due
    assert len(calls) == 25
    assert optimizer.diagnostics()["0"]["A taken"] == 3  # steps 0, 10 and 20


def test_the_loop_without_closures_is_the_same_to_the_bit():
    model, data = odd_cnn(), batches((2, 6, 6), 25)
    twin = copy.deepcopy(model)
    optimizer, theirs = (kfqn.KFBFGS(net, curvature_interval=10) for net in (model, twin))
    for x, target in data:
        train(model, optimizer, [(x, target)])
        theirs.zero_grad()
        F.cross_entropy(twin(x), target).backward()
        theirs.step()
    assert torch.equal(weights(model), weights(twin))


# --- how far --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("build", [odd_cnn, grouped, mlp])
def test_every_layer_moves_by_its_share(make, build):
    """Those with groups by the share of all their outputs."""
    model, shape = build(), {odd_cnn: (2, 6, 6), grouped: (4, 5, 5), mlp: (5,)}[build]
    optimizer = make(model, parts=LATEST, weight_decay=0.0)
    for moved in moves(model, optimizer, batches(shape, 25)):
        assert moved == pytest.approx(lengths(optimizer), rel=1e-9)
    assert optimizer.diagnostics()[""]["rate"] == pytest.approx(0.04 if build is mlp else 0.06)


@pytest.mark.usefixtures("double")
def test_steps_fall_with_the_third_root_after_a_hundred(make):
    model, data = mlp(), batches((5,), 5)
    optimizer = make(model, parts=LATEST, weight_decay=0.0)
    train(model, optimizer, data[:1])
    for k in (99, 100, 101, 800, 10**6):
        note(optimizer.param_groups[0], steps=k - 1)
        (moved,) = moves(model, optimizer, data[1:2])
        fall = min(1, (100 / k) ** (1 / 3))
        assert moved == pytest.approx([fall * length for length in lengths(optimizer)], rel=1e-9)
        assert optimizer.diagnostics()[""]["rate"] == pytest.approx(0.04 * fall)


@pytest.mark.usefixtures("double")
def test_a_schedule_that_goes_down_freezes_the_fall_and_one_that_warms_up_does_not():
    model, data = mlp(), batches((5,), 2)
    optimizer = kfqn.KFBFGS(model, parts=LATEST, weight_decay=0.0)
    (group,) = optimizer.param_groups
    train(model, optimizer, data[:1])
    note(group, steps=0, last_lr=0.0)
    for lr, k, of in (  # the k-th step falls as the step ``of``
        (0.2, 150, 150),
        (0.6, 200, 200),
        (1.0, 400, 400),
        (0.9, 900, 400),
        (1.0, 2000, 400),
        (0.1, 2001, 400),
    ):
        note(group, steps=k - 1)
        group["lr"] = lr
        (moved,) = moves(model, optimizer, data[1:])
        share = lr * (100 / of) ** (1 / 3)
        assert moved == pytest.approx([share * length for length in lengths(optimizer)], rel=1e-9)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e6])
def test_the_scale_of_the_loss_does_not_matter(make, scale):
    model, data = odd_cnn(), batches((2, 6, 6), 15)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    for x, target in data:
        train(model, optimizer, [(x, target)])
        theirs.step(closure(twin, theirs, x, target, lambda o, y: scale * F.cross_entropy(o, y)))
    torch.testing.assert_close(weights(twin), weights(model), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("double")
def test_with_the_papers_damping_it_does():
    """Of pairs: so that the test above can fail."""
    model, data = odd_cnn(), batches((2, 6, 6), 15)
    twin = copy.deepcopy(model)
    optimizer, theirs = (AUTOMATIC["KFLBFGS"](net, damping=3.0) for net in (model, twin))
    for x, target in data:
        train(model, optimizer, [(x, target)])
        theirs.step(closure(twin, theirs, x, target, lambda o, y: 1e3 * F.cross_entropy(o, y)))
    assert not torch.allclose(weights(twin), weights(model), rtol=1e-3)


def test_a_constant_in_the_loss_changes_no_bit(make):
    model, data = odd_cnn(), batches((2, 6, 6), 15)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    for x, target in data:
        train(model, optimizer, [(x, target)])
        theirs.step(closure(twin, theirs, x, target, lambda o, y: F.cross_entropy(o, y) + 1000))
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.usefixtures("double")
def test_layers_that_start_at_zero_move(make):
    model, data = mlp(), batches((5,), 3)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    optimizer = make(model, parts=LATEST, weight_decay=0.0)
    first, second = moves(model, optimizer, data[:2])
    assert first == pytest.approx([0.0, lengths(optimizer)[1]])  # the last layer lets nothing through yet
    assert second == pytest.approx(lengths(optimizer))


def test_without_a_gradient_nothing_moves(make):
    model, data = mlp(), batches((5,), 4)
    optimizer = make(model)
    before = weights(model).clone()
    for x, target in data:
        optimizer.step(closure(model, optimizer, x, target, lambda o, y: 0.0 * F.cross_entropy(o, y)))
    assert torch.equal(weights(model), before)
    train(model, optimizer, data)
    assert weights(model).isfinite().all()
    assert not torch.equal(weights(model), before)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_row_or_one_column(make, bias):
    """A row keeps its direction: P is g H_A, whatever its singular value."""
    model = nn.Sequential(nn.Linear(4, 1, bias=bias), nn.Tanh(), nn.Linear(1, 3, bias=bias)).double()
    optimizer = make(model, parts=LATEST, weight_decay=0.0)
    for moved in moves(model, optimizer, batches((4,), 12)):
        assert moved == pytest.approx(lengths(optimizer), rel=1e-9)


@pytest.mark.usefixtures("double")
def test_weights_shrink_by_the_rate_times_the_decay(make):
    model, data = mlp(), batches((5,), 1)
    twin = copy.deepcopy(model)
    before = weights(model).clone()
    for net, decay in ((model, 0.0), (twin, 0.1)):
        optimizer = make(net, weight_decay=decay, parts=LATEST)
        optimizer.param_groups[0]["lr"] = 0.5
        train(net, optimizer, data)
    torch.testing.assert_close(weights(model) - weights(twin), 0.04 * 0.5 * 0.1 * before)


# --- groups and other parameters ------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
def test_groups_have_lengths_and_falls_of_their_own(make):
    model, data = odd_cnn(), batches((2, 6, 6), 2)
    groups = [{"modules": "7", "lr": 0.25, "damping": 1.0}, {"modules": "0"}]
    optimizer = make(model, groups=groups, parts=LATEST, weight_decay=0.0)
    assert sorted((group["lr"], group["automatic"]) for group in optimizer.param_groups) == [
        (0.25, False),
        (1.0, True),
        (1.0, True),
    ]
    of = {layer.name: optimizer.training.groups.of(layer) for layer in optimizer.layers}
    of["0"]["lr"] = 0.5
    train(model, optimizer, data[:1])
    note(of["2"], steps=799)
    (moved,) = moves(model, optimizer, data[1:])
    found = {
        layer.name: m / a for layer, m, a in zip(optimizer.layers, moved, lengths(optimizer), strict=True)
    }
    assert [found["0"], found["2"], found["4"]] == pytest.approx([0.5, 0.5, 0.5], rel=1e-9)
    assert of["2"]["progress"]["fall"] == 0.5
    assert of["0"]["progress"]["fall"] == 1.0


class Seen(torch.optim.SGD):
    """Notes the rates that it steps with; may fail."""

    fails = False

    def step(self, closure=None):
        self.seen = [group["lr"] for group in self.param_groups]
        if self.fails:
            raise ArithmeticError
        super().step()


def normed():
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("fails", [False, True])
def test_the_rate_of_other_parameters_falls_too_and_is_put_back(fails):
    model, data = normed(), batches((5,), 3)
    optimizer = kfqn.KFBFGS(model, others=lambda ps: Seen(ps, lr=0.3, momentum=0.9))
    ours, theirs = optimizer.param_groups
    fallback = optimizer.training.groups.fallback
    train(model, optimizer, data[:1])
    assert fallback.seen == [0.3]
    note(ours, steps=799)
    fallback.fails = fails
    if fails:
        with pytest.raises(ArithmeticError):
            train(model, optimizer, data[1:2])
    else:
        train(model, optimizer, data[1:2])
    assert fallback.seen == pytest.approx([0.15])
    assert theirs["lr"] == 0.3


def test_a_batch_that_is_empty_for_the_layers_has_the_others_step_at_the_rate_they_have_then():
    """Only the shift gets a gradient."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.shift = mlp(), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.body(x).sum(0) + self.shift

    model, data = Shifted(), batches((5,), 2)
    optimizer = kfqn.KFBFGS(model, others=lambda ps: Seen(ps, lr=0.3))
    fallback = optimizer.training.groups.fallback
    for x in (data[0][0], data[0][0][:0]):
        note(optimizer.param_groups[0], steps=799)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert fallback.seen == pytest.approx([0.15])


def test_others_may_have_no_rate():
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad)

    model, data = normed(), batches((5,), 2)
    before = model[1].weight.detach().clone()
    optimizer = kfqn.KFBFGS(model, others=Rateless)
    train(model, optimizer, data)
    assert not torch.equal(model[1].weight, before)
    assert optimizer.param_groups[1].keys() == {"params"}


# --- H_A ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_input_that_is_not_finite_teaches_nothing(bad):
    model, data = mlp(), batches((5,), 2)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, data)
    layer = optimizer.layers[0]
    part, inputs, state = optimizer.training.of(layer).input, layer.inputs, optimizer.state[layer.weight]
    x, before = data[0][0], {key: state[key].clone() for key in ("A", "H_A")}
    for factor, learns in ((bad, False), (2.0, True)):
        _, used = part.learn_([state], [x.mean(0)], [part.respond(inputs, x * factor, x.mean(0))], 0.1)
        assert bool(used) == learns
        assert all(torch.equal(state[key], before[key]) != learns for key in before)


@pytest.mark.usefixtures("double")
def test_inputs_in_blocks_have_roots_of_their_blocks():
    model, data = mlp(), batches((5,), 1, size=20)
    optimizer = kfqn.KFBFGS(model, max_factor_size=3)
    train(model, optimizer, data)
    state, x = optimizer.state[model[0].weight], data[0][0]
    parts = [F.pad(part, (0, 3 - part.shape[1])) for part in x.split(3, 1)]
    torch.testing.assert_close(state["A"], torch.stack([part.T @ part for part in parts]) / len(x))
    for H, A_b, lam in zip(state["H_A"], state["A"], state["lambda_A"], strict=True):
        torch.testing.assert_close(H, damped_root(A_b, lam))
