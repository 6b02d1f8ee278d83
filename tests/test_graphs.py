"""What a GPU would repeat by itself, repeated here by a stand-in with a graph's memory and nothing else."""

import copy

import pytest
import torch
from cases import AUTOMATIC, batches, grouped, odd_cnn, recurrent
from test_contract import OPTIMIZERS, train
from torch.utils._python_dispatch import TorchDispatchMode

from kfqn import graphs

NETS = {
    "odd": (odd_cnn, (2, 6, 6)),
    "grouped": (grouped, (4, 5, 5)),
    "recurrent": (recurrent, (2, 6, 6)),
}
METHODS = OPTIMIZERS | {f"{name}, automatic": make for name, make in AUTOMATIC.items()}


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ != "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


class Repeated:
    """As `graphs.Graph`: what was recorded once, with tensors that stay, and results that do."""

    used = 0

    def __init__(self, function, given):
        self.function, self.given, self.results = function, [torch.empty_like(x) for x in given], None

    def __call__(self, given):
        Repeated.used += 1
        for kept, x in zip(self.given, given, strict=True):
            kept.copy_(x)
        with NothingIsRead():
            results = self.function(self.given)
        if self.results is None:
            self.results = [x.clone() for x in results]
        for kept, x in zip(self.results, results, strict=True):
            kept.copy_(x)
        return self.results


@pytest.fixture
def repeating(monkeypatch):
    monkeypatch.setattr(graphs, "Graph", Repeated)
    monkeypatch.setattr(graphs, "_worth", bool)
    Repeated.used = 0


def change(optimizer, model, k):
    """What may happen between two steps of a training loop."""
    own = [group for group in optimizer.param_groups if "k" in group]
    for group in own:
        group["lr"] *= 0.99
    if k == 8:
        for group in own:
            group["damping"] *= 2
            group["beta"] = 0.8
    if k == 14:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if k == 20:
        for p in model.parameters():
            p.data = p.data.clone()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_repeated_steps_are_the_same_steps(method, net, request):
    build, shape = NETS[net]
    model, data = build(), batches(shape, 26)
    twin = copy.deepcopy(model)
    optimizer, theirs = (METHODS[method](m) for m in (model, twin))
    for k, batch in enumerate(data):
        change(optimizer, model, k)
        train(model, optimizer, [batch])
    request.getfixturevalue("repeating")
    for k, batch in enumerate(data):
        change(theirs, twin, k)
        train(twin, theirs, [batch])
    assert Repeated.used >= 10
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
