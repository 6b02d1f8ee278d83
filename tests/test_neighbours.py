"""What else may be on the model: other optimizers, hooks, copies, scripts, compiled code."""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, batches, mlp, odd_cnn
from test_contract import TWO_PASS, snapshot, train, unchanged
from torch import nn

import kfqn
from kfqn.steps.weight_average import Latest

MAKERS = AUTOMATIC | {
    f"{name}, paper": partial(make, lr=0.3, damping=1.0, curvature_interval=1)
    for name, make in TWO_PASS.items()
}
DOORS = ["closure", "by hand"]
LATEST = kfqn.Parts(weights=Latest())


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def by_hand(model, optimizer, x, target):
    optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()
    if optimizer.second_pass_due:
        with optimizer.second_pass():
            F.cross_entropy(model(x), target).backward()


def through(door, model, optimizer, x, target):
    if door == "closure":
        train(model, optimizer, [(x, target)])
    else:
        by_hand(model, optimizer, x, target)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("part", [7, 0])
def test_an_optimizer_of_a_part_that_lives_on_changes_nothing(make, door, part):
    model, data = odd_cnn(), batches((2, 6, 6), 36)
    of_part = make(model[part], **({"parts": LATEST} if make in AUTOMATIC.values() else {}))
    for batch in data[:3]:
        through(door, model, of_part, *batch)
    twin = copy.deepcopy(model)
    assert of_part is not None
    before = [copy.deepcopy(dict(state)) for state in of_part.state.values()]
    optimizer, theirs = make(model), make(twin)
    for batch in data[3:]:
        through(door, model, optimizer, *batch)
        through(door, twin, theirs, *batch)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    assert unchanged([dict(state) for state in of_part.state.values()], before)


def test_one_that_averages_and_lives_on_puts_its_latest_weights_back_once():
    """In the next training pass of whoever trains the model then, and never again."""
    model, data = mlp(), batches((5,), 8)
    old = kfqn.KFBFGS(model)
    train(model, old, data[:4])
    z = [p.detach() + old.state[p]["ahead"] for p in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    for batch in data[4:]:
        train(model, sgd, [batch])
        torch.testing.assert_close([p.detach() for p in model.parameters()], z)


@pytest.mark.parametrize("door", DOORS)
def test_two_optimizers_may_take_turns(make, door):
    """Each learns from its own passes; what frozen layers show in the other's second pass is none."""
    model = mlp()
    ((x, target),) = batches((5,), 1, size=32)
    both = make(model[0]), make(model[-1])
    losses = []
    for k in range(80):
        optimizer = both[k % 2]
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), target).item())
        through(door, model, optimizer, x, target)
    assert losses[-1] < 0.9 * losses[0]


# Hooks of the user's own.


class Hooked(nn.Module):
    """Hooks on modules, and on tensors before, between and behind the layers."""

    def __init__(self, told):
        super().__init__()
        self.told = told
        self.a, self.b, self.act = nn.Linear(5, 8), nn.Linear(8, 3), nn.Tanh()
        for module in (self.a, self.b, self.act):
            module.register_full_backward_hook(lambda module, into, out: told.append(out[0].norm()))
            module.register_full_backward_pre_hook(lambda module, out: told.append(out[0].norm()))

    def forward(self, x):
        h = self.act(self.a(x))
        y = self.b(h)
        for z in (h, y):
            if z.requires_grad:
                z.register_hook(lambda gradient: self.told.append(gradient.norm()))
        return y


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed with respect to")
@pytest.mark.parametrize("door", DOORS)
def test_hooks_are_given_gradients_or_are_not_called(make, door):
    told = []
    model, plain = Hooked(told), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    optimizer, theirs = make(model), make(plain)
    for batch in batches((5,), 24):
        through(door, model, optimizer, *batch)
        through(door, plain, theirs, *batch)
        assert told
        assert all(norm > 0 for norm in told)
        told.clear()
    assert unchanged(snapshot(model, optimizer), snapshot(plain, theirs))
    assert not optimizer.training.context.with_gradients


@pytest.mark.parametrize("door", DOORS)
def test_a_hook_may_change_gradients(make, door):
    """In both passes: what layers learn is what the hook leaves."""

    class Clipped(nn.Sequential):
        def forward(self, x):
            for i, module in enumerate(self):
                x = module(x)
                if i == 1 and x.requires_grad:
                    x.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
            return x

    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clamp(-1e-3, 1e-3)

    class Clipper(nn.Module):
        def forward(self, x):
            return Clip.apply(x)

    first, act, head = nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)
    model = Clipped(first, act, head)
    twin = nn.Sequential(copy.deepcopy(first), act, Clipper(), copy.deepcopy(head))
    optimizer, theirs = make(model), make(twin)
    for batch in batches((5,), 18):
        through(door, model, optimizer, *batch)
        through(door, twin, theirs, *batch)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


# Copies, scripts, files.


def tied():
    """Two modules that are one layer."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


def trained(build=mlp):
    model, (batch,) = build(), batches((5,), 1)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, [batch])
    return model, optimizer


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@pytest.mark.parametrize("build", [mlp, tied])
def test_a_copy_has_the_users_hooks_alone(build):
    model, optimizer = trained(build)

    def own(module, args, h):
        return h + 1

    model[-1].register_forward_hook(own)
    assert len(hooks_of(model)) > 2
    twin = copy.deepcopy(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert hooks_of(twin) == hooks_of(averaged) == [own]
    x = torch.randn(4, 5)
    assert torch.equal(twin(x), model(x))
    again = copy.deepcopy(optimizer)
    assert len(hooks_of(again.training.groups.model)) == len(hooks_of(model))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_copies_can_be_scripted_and_the_model_when_the_optimizer_is_gone():
    model, optimizer = trained()
    x = torch.randn(4, 5)
    with pytest.raises(AttributeError, match=r"copy\.deepcopy\(model\), or delete the optimizer first"):
        torch.jit.script(model)
    assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    del optimizer
    assert torch.equal(torch.jit.script(model)(x), model(x))


LOAD = """
import sys
sys.modules["kfqn"] = None
import copy, pickle, torch
for load in (lambda f: torch.load(f, weights_only=False), pickle.load):
    with open(sys.argv[1 if load is not pickle.load else 2], "rb") as file:
        model, x, y = load(file)
    assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    loss = model(x).sum()
    loss.backward()
    assert model[0].weight.grad is not None
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), y)
"""


def test_a_saved_model_is_read_where_there_is_no_kfqn(tmp_path):
    model, optimizer = trained()
    x = torch.randn(4, 5)
    saved = model, x, model(x).detach()
    torch.save(saved, tmp_path / "torch.pt")
    (tmp_path / "pickle").write_bytes(pickle.dumps(saved))
    assert b"kfqn" not in pickle.dumps(model)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "torch.pt"), str(tmp_path / "pickle")]
    subprocess.run(command, check=True)
    file = io.BytesIO(pickle.dumps(model))
    train(loaded := pickle.load(file), kfqn.KFBFGS(loaded), batches((5,), 2))
    assert optimizer.diagnostics()["0"]["steps"] == 1


# Compiled code.


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo
@pytest.mark.parametrize("ran", ["another", "itself", "another in turns"])
def test_what_was_compiled_before_does_not_matter(ran):
    """Neither before the optimizer was built nor between its steps."""
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as torch has it
    plain, model, data = odd_cnn(), odd_cnn(), batches((2, 6, 6), 6)
    model.load_state_dict(plain.state_dict())
    compiled, other = (torch.compile(net, backend="eager") for net in (model, odd_cnn()))

    def run(net):
        F.cross_entropy(net(data[0][0]), data[0][1]).backward()

    run(compiled if ran == "itself" else other)
    model.zero_grad()
    optimizer, theirs = kfqn.KFBFGS(compiled), kfqn.KFBFGS(plain)
    for batch in data:
        if ran == "another in turns":
            run(other)
            run(other)
        train(compiled, optimizer, [batch])
        train(plain, theirs, [batch])
    assert unchanged(snapshot(model, optimizer), snapshot(plain, theirs))
    assert all(not module._forward_hooks for module in other.modules())
    torch._dynamo.reset()
