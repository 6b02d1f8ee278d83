"""The second pass starts where the first did: random numbers and buffers."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, batches
from test_contract import TWO_PASS, snapshot, unchanged
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import kfqn
from kfqn.passes.replay import buffers_of, random_state, second_pass

STILL = {  # no weight moves
    "lr": 1e-30,
    "damping": 1.0,
    "curvature_interval": 1,
    "others": lambda parameters: torch.optim.SGD(parameters, lr=0.0),
}
MAKERS = {f"{name}, paper": partial(make, **STILL) for name, make in TWO_PASS.items()} | AUTOMATIC
pytestmark = pytest.mark.filterwarnings("ignore:.*trainable parameters get factors")  # spectral_norm
STEPS = 12  # of which an automatic step size looks at all


class Queue(nn.Module):
    """A queue of the last codes, moved in place, and where it starts, replaced by another tensor."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("queue", torch.randn(16, 4))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        z = torch.tanh(self.encode(x))
        logits = self.head(z) + (z @ self.queue.T.clone()).logsumexp(1, keepdim=True) * z[:, :3]
        with torch.no_grad():
            at = int(self.at)
            self.queue[at : at + len(x)] = z.detach()[: 16 - at]
            self.at = (self.at + len(x)) % 16
        return logits


class CodeBook(nn.Module):
    """Means of the codes nearest to them, which every pass moves; a straight-through gradient."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("codes", torch.randn(6, 4))

    def forward(self, x):
        z = self.encode(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        with torch.no_grad():
            self.codes.index_copy_(0, nearest, self.codes[nearest].lerp(z, 0.5))
        return self.decode(z + (self.codes[nearest] - z).detach())


class Drawn(nn.Module):
    """Noise from Python's, NumPy's and torch's random numbers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        noise = random.gauss(0, 1) + np.random.standard_normal() + np.random.rand() + torch.randn(())
        return self.head(x + noise)


def normalised():
    return nn.Sequential(spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))


BUILD = [Queue, CodeBook, Drawn, normalised]


def losses_of(door, net, optimizer, parts):
    """The losses of both passes over these micro-batches; no second ones where no such pass is due."""

    def passes(told):
        total = 0.0
        for x, target in parts:
            loss = F.cross_entropy(net(x), target) / len(parts)
            loss.backward()
            told.append(loss.item())
            total = total + loss.detach()
        return total

    first, second = [], []
    if door == "closure":

        def evaluate():
            optimizer.zero_grad()
            return passes(second if first else first)

        optimizer.step(evaluate)
        return first, second
    optimizer.zero_grad()
    loss = passes(first)
    random.random(), np.random.rand(), torch.rand(())  # of somebody else
    optimizer.step()
    if optimizer.second_pass_due:
        with optimizer.second_pass(loss) as again:
            again.loss = passes(second)
    return first, second


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("door", ["closure", "by hand"])
@pytest.mark.parametrize("build", BUILD)
@pytest.mark.parametrize("name", [name for name in MAKERS if "paper" in name])
def test_without_a_step_the_same_batch_has_the_same_loss_to_the_bit(build, name, door, parts):
    """And buffers and random numbers go on as if there had been one pass."""
    random.seed(0)
    np.random.seed(0)
    model = build()
    twin = copy.deepcopy(model)
    optimizer, data = MAKERS[name](model), batches((5,), STEPS * parts)
    for k in range(STEPS):
        own = data[k * parts : (k + 1) * parts]
        starts = torch.get_rng_state(), random.getstate(), np.random.get_state()
        first, second = losses_of(door, model, optimizer, own)
        assert second == first
        ends = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        torch.set_rng_state(starts[0])
        random.setstate(starts[1])
        np.random.set_state(starts[2])
        with torch.no_grad():
            for x, _ in own:
                twin(x)
        if door == "by hand":
            random.random(), np.random.rand(), torch.rand(())
        assert torch.equal(ends[0], torch.get_rng_state())
        assert ends[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        for (key, own_buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(own_buffer, other, msg=key)


@pytest.mark.parametrize("build", BUILD)
@pytest.mark.parametrize("name", AUTOMATIC)
def test_both_doors_start_there(build, name):
    model = build()
    twin = copy.deepcopy(model)
    optimizer, theirs = AUTOMATIC[name](model), AUTOMATIC[name](twin)
    states = []
    for net, own, door in ((model, optimizer, "closure"), (twin, theirs, "by hand")):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        for batch in batches((5,), STEPS):
            drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()
            losses_of(door, net, own, [batch])
            torch.set_rng_state(drawn[0])
            random.setstate(drawn[1])
            np.random.set_state(drawn[2])
            torch.rand(7), random.random(), np.random.rand()
        states.append((snapshot(net, own), dict(net.named_buffers())))
    assert unchanged(*states)


def test_a_pass_that_fails_leaves_buffers_as_the_first_pass_did():
    model = Queue()
    rewind = buffers_of(model)
    queue, start = model.queue, model.queue.clone()
    model(torch.randn(3, 5))
    moved, at = model.queue.clone(), model.at

    def fail():
        with second_pass(model, rewind):
            assert model.queue is queue
            assert torch.equal(queue, start)
            assert model.at == 0
            model(torch.randn(4, 5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(model.queue, moved)
    assert model.at is at
    assert at == 3


def test_a_buffer_in_the_memory_of_a_parameter_is_the_parameters():
    """Or the second pass would be one before the step."""

    class Tied(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("same", self.weight.detach()[1:])

    model = Tied()
    rewind = buffers_of(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    moved = model.weight.clone()
    with second_pass(model, rewind):
        assert torch.equal(model.weight, moved)
    assert torch.equal(model.same, moved[1:])


def test_nothing_is_copied_where_no_second_pass_is_due(monkeypatch):
    """Nor, with a closure, for the single passes in it."""
    model, data, copies = Queue(), batches((5,), 130, size=4), []
    monkeypatch.setattr("kfqn.passes.recorder.start_of", lambda *_: copies.append("a pass") or (lambda: None))
    original = kfqn.first_pass.start_of
    monkeypatch.setattr("kfqn.first_pass.start_of", lambda *args: copies.append(0) or original(*args))
    optimizer = kfqn.KFBFGS(model, lr=0.1, damping=1.0, curvature_interval=10)
    counts = []
    for batch in data:
        copies.clear()
        losses_of("closure", model, optimizer, [batch])
        counts.append(copies.copy())
    assert counts[:20] == [[0]] * 20
    assert counts[110:] == ([[0]] + [[]] * 9) * 2


def test_numpy_that_draws_from_another_generator_is_put_back_too():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        rewind = random_state([])
        first = np.random.rand(3)
        rewind()
        assert (np.random.rand(3) == first).all()
    finally:
        np.random.set_bit_generator(before)
