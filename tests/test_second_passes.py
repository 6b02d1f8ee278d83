"""Second passes without gradients of the weights: that nobody notices."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, batches, closure, odd_cnn
from test_contract import Noisy, snapshot, train, unchanged
from test_entry_points import Checkpointed
from torch import nn
from torch.autograd import forward_ad

import kfqn

MAKERS = {
    "KFBFGS": partial(kfqn.KFBFGS, lr=0.3, damping=1.0, curvature_interval=1),
    "KFLBFGS": partial(AUTOMATIC["KFLBFGS"], curvature_interval=1),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


class Parts(nn.Module):
    """A body and a head, and a condition that enters first and goes around them."""

    def __init__(self):
        super().__init__()
        self.condition, self.head = nn.Linear(5, 3), nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(inplace=True))

    def forward(self, x, c):
        return self.condition(c) + self.head(self.body(x)) + x[:, :3]


def adversarial(model, x, target):
    near = x.clone().requires_grad_()
    (direction,) = torch.autograd.grad(F.cross_entropy(model(near, x), target), near)
    return F.cross_entropy(model(x, x), target) + F.cross_entropy(model(x + direction.sign(), x), target)


def adversarial_by_parts(model, x, target, clean_first=True):
    near, clean = x.clone().requires_grad_(), 0.0
    if clean_first:
        clean = F.cross_entropy(model.head(model.body(x)), target)
    (direction,) = torch.autograd.grad(F.cross_entropy(model.head(model.body(near)), target), near)
    return clean + F.cross_entropy(model.head(model.body(x + direction.sign())), target)


def penalised(model, x, target):
    near = x.clone().requires_grad_()
    loss = F.cross_entropy(model(near, x), target)
    (gradient,) = torch.autograd.grad(loss, near, create_graph=True)
    return loss + 10 * gradient.square().sum()


def penalised_inside(model, x, target):
    hidden = model.body(x)
    loss = F.cross_entropy(model.head(hidden), target)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    return loss + 10 * gradient.square().sum()


def tangent(model, x, target):
    with forward_ad.dual_level():
        output, change = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)), x))
        return F.cross_entropy(output, target) + 0.1 * change.square().mean()


def with_unused(model, x, target):
    model.condition(x.clone().requires_grad_())
    return F.cross_entropy(model.head(model.body(x)), target)


KINDS = {
    "adversarial": adversarial,
    "by parts": adversarial_by_parts,
    "by parts, without the clean loss": partial(adversarial_by_parts, clean_first=False),
    "penalised": penalised,
    "penalised inside": penalised_inside,
    "forward mode": tangent,
    "a layer for nothing": with_unused,
}


def is_whole_in_the_end(make, compute):
    """Train with closures that compute and call backward; the steps are those with whole second passes."""
    model, data = Parts(), batches((5,), 12)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    theirs.training.context.with_gradients = True
    for x, target in data:
        for net, own in ((model, optimizer), (twin, theirs)):

            def evaluate(net=net, own=own, x=x, target=target):
                own.zero_grad()
                return compute(net, x, target)

            own.step(evaluate)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    return optimizer.training.context.with_gradients


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch's forward mode uses
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_may_have_gradients_in_it(make, kind):
    """It is to the bit what a pass of which all is kept would tell, and with it are all steps."""

    def compute(*batch):
        loss = KINDS[kind](*batch)
        loss.backward()
        return loss

    assert not is_whole_in_the_end(make, compute)


def kept(model, x, target):
    """A closure that looks at the gradient of what is hidden."""
    hidden = model.body(x)
    hidden.retain_grad()
    loss = F.cross_entropy(model.head(hidden), target)
    loss.backward()
    assert hidden.grad.norm() > 0
    return loss.detach()


def split(model, x, target):
    """A closure that calls backward for each half of the model."""
    hidden = model.body(x)
    leaf = hidden.detach().requires_grad_()
    loss = F.cross_entropy(model.head(leaf), target)
    loss.backward()
    hidden.backward(leaf.grad)
    return loss.detach()


@pytest.mark.parametrize("kind", [kept, split])
def test_a_closure_may_work_with_gradients_of_what_is_hidden(make, kind):
    assert not is_whole_in_the_end(make, kind)


def test_a_closure_that_fails_anyway_says_why(make):
    model, data = odd_cnn(), batches((2, 6, 6), 4)
    optimizer, calls = make(model), []

    def evaluate(x, target):
        calls.append(x)
        if len(calls) > 1:
            raise ZeroDivisionError("of the user's own")
        return closure(model, optimizer, x, target)()

    train(model, optimizer, data[:2])
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        optimizer.step(partial(evaluate, *data[2]))
    train(model, optimizer, data[3:])
    assert optimizer.diagnostics()["0"]["steps"] == 4


def test_hooks_of_the_users_own_may_come_before(make):
    """They have saved what the layers give, which nobody may overwrite then."""
    model, data, given = odd_cnn(), batches((2, 6, 6), 6), []
    for module in (model[0], model[2]):
        module.register_forward_hook(lambda module, args, h: given.append(h.pow(2).mean()))
    model[1].inplace = model[3].inplace = False
    optimizer = make(model)

    def evaluate(x, target):
        given.clear()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target) + sum(given)
        loss.backward()
        return loss

    for batch in data:
        optimizer.step(partial(evaluate, *batch))
    assert optimizer.diagnostics()["0"]["A taken"] == 6


@pytest.mark.parametrize("run", ["without backward", "without gradients", "nothing"])
def test_a_pair_without_gradients_is_an_error(make, run):
    model, ((x, target), *_) = odd_cnn(), batches((2, 6, 6), 2)
    optimizer = make(model)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()

    def again():
        with optimizer.second_pass(loss), torch.set_grad_enabled(run == "without backward"):
            if run != "nothing":
                model(x)

    done = "ran no layer" if run == "nothing" else "computed no gradient"
    with pytest.raises(RuntimeError, match=f"the second pass {done}"):
        again()


def test_masks_and_micro_batches_are_those_of_the_first_pass_through_both_doors(make):
    model = Noisy()
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    for (x, target), (x2, target2) in zip(batches((1, 6, 6), 6), batches((1, 6, 6), 6)[::-1], strict=True):
        start = torch.get_rng_state()

        def both(net, x=x, target=target, x2=x2, target2=target2):
            parts = [F.cross_entropy(net(x), target) / 2]
            parts[0].backward()
            parts.append(F.cross_entropy(net(x2), target2) / 2)
            parts[1].backward()
            return sum(part.detach() for part in parts)

        def evaluate(both=both):
            optimizer.zero_grad()
            return both(model)

        model.masks.clear()
        optimizer.step(evaluate)
        first, second, *again = model.masks
        assert all(map(torch.equal, again, (first, second)))
        torch.set_rng_state(start)
        theirs.zero_grad()
        loss = both(twin)
        theirs.step()
        torch.rand(3)  # of somebody else
        assert theirs.second_pass_due
        with theirs.second_pass(loss) as second_look:
            second_look.loss = both(twin)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(make, reentrant):
    plain = Checkpointed(odd_cnn())
    model = Checkpointed(copy.deepcopy(plain.inner), use_reentrant=reentrant)
    optimizer, theirs = make(plain), make(model)
    for x, target in batches((2, 6, 6), 12):
        x.requires_grad_(reentrant)  # torch's own condition for it
        train(plain, optimizer, [(x, target)])
        train(model, theirs, [(x, target)])
    assert unchanged(snapshot(plain, optimizer), snapshot(model, theirs))
    assert theirs.training.context.with_gradients == optimizer.training.context.with_gradients == False  # noqa: E712


def test_groups_have_cadences_of_their_own():
    model, data = odd_cnn(), batches((2, 6, 6), 20)
    optimizer = AUTOMATIC["KFLBFGS"](model, curvature_interval=10, groups=[{"modules": "7", "lr": 0.01}])
    train(model, optimizer, data)
    pairs = {name: of["G taken"] + of["G skipped"] for name, of in optimizer.diagnostics().items() if name}
    assert pairs == {"7": 20, "0": 2, "2": 2, "4": 2}  # the paper's at each young step, ours at 0 and 10


def test_a_model_that_is_not_run_as_a_whole_learns_too(make):
    model, data = odd_cnn(), batches((2, 6, 6), 30)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)

    def evaluate(x, target):
        theirs.zero_grad()
        loss = F.cross_entropy(twin[4:](twin[:4](x)), target)
        loss.backward()
        return loss

    for batch in data:
        train(model, optimizer, [batch])
        theirs.step(partial(evaluate, *batch))
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
