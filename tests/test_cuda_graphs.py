"""What a GPU would repeat by itself, repeated here by a stand-in with a graph's memory and nothing else."""

import copy

import pytest
import torch
from cases import AUTOMATIC, batches, grouped, odd_cnn, recurrent
from test_contract import OPTIMIZERS, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kfqn.runtime import cuda_graphs as graphs

NETS = {
    "odd": (odd_cnn, (2, 6, 6)),
    "grouped": (grouped, (4, 5, 5)),
    "recurrent": (recurrent, (2, 6, 6)),
}
METHODS = OPTIMIZERS | {f"{name}, automatic": make for name, make in AUTOMATIC.items()}


class Log(TorchDispatchMode):
    """What was done to which tensors, with which numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ != "_local_scalar_dense", "read back to the host"
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results


def tensors(x):
    return [y for y in tree_flatten(x)[0] if isinstance(y, torch.Tensor)]


class Repeated:
    """As `graphs.Graph`: a call is logged, and later ones do the same to the same tensors, without Python."""

    used = 0

    def __init__(self, function, given):
        self.function, self.given, self.results = function, [torch.empty_like(x) for x in given], None

    def __call__(self, given):
        Repeated.used += 1
        for kept, x in zip(self.given, given, strict=True):
            kept.copy_(x)
        if self.results is None:
            with Log() as log:
                self.results = self.function(self.given)
            self.calls = log.calls
            return self.results
        for func, args, kwargs, recorded in self.calls:
            for kept, x in zip(tensors(recorded), tensors(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != x.data_ptr():
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


def test_products_may_be_set_to_tf32_in_the_newer_way(repeating):
    settings, model = torch.backends.cuda.matmul, odd_cnn()
    optimizer, before = AUTOMATIC["KFBFGS"](model), settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        train(model, optimizer, batches((2, 6, 6), 6))
    finally:
        settings.fp32_precision = before
    assert Repeated.used


def test_what_cannot_be_recorded_is_done_without(repeating, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no memory for a graph")

    monkeypatch.setattr(graphs, "Graph", refuse)
    model = odd_cnn()
    optimizer = AUTOMATIC["KFBFGS"](model)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs, because one could not be recorded: no mem"):
        train(model, optimizer, batches((2, 6, 6), 12))


def test_what_changes_ever_again_is_not_recorded_ever_again(repeating):
    known, recordings = graphs.Graphs(), []
    for k in range(400):
        known.run("name", lambda given: [given[0] + 1], [torch.ones(2)], [], k // 10)
        recordings.append(known._known["name"].recordings)
    assert recordings[-1] == 10
