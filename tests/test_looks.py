"""Second passes that are asked for the loss alone: what they cost, and that nobody notices."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, batches, closure, odd_cnn
from test_cadence import LEARNT
from test_contract import Noisy, snapshot, train, unchanged
from test_doors import Checkpointed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kfqn
from kfqn.capture import LOSS_ALONE
from kfqn.second_pass import random_state, second_pass

INTERVAL = 3


@pytest.fixture(params=AUTOMATIC)
def make(request):
    return AUTOMATIC[request.param]


class Residual(nn.Module):
    """Branches that no single layer ends, and an in-place ReLU behind every layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(2, 4, 3),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(64, 3),
        )
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.3)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = x + F.relu(self.norm(self.second(x)), inplace=True)
        x = self.drop(x)
        return F.relu(self.head(x.flatten(1)), inplace=True) + x.mean((2, 3))[:, :3]


def judged(counts):
    return {key: int(value) for key, value in counts.items() if key[0] in "AG" and key != "G damped"}


def test_H_A_learns_from_every_step_that_is_judged_and_H_G_at_the_interval(make):
    model, data, passes = odd_cnn(), batches((2, 6, 6), 40), []
    optimizer = make(model, curvature_interval=INTERVAL)
    for k, (x, target) in enumerate(data):
        before = judged(optimizer.diagnostics().get("0", {}))
        passes.append(0)

        def evaluate(x=x, target=target):
            passes[-1] += 1
            return closure(model, optimizer, x, target)()

        rejected = optimizer.diagnostics()[""]["rejected"]
        optimizer.step(evaluate)
        now = judged(optimizer.diagnostics()["0"])
        if optimizer.diagnostics()[""]["rejected"] > rejected:
            assert now == before or not before
            continue
        learnt = {
            name: sum(n - before.get(key, 0) for key, n in now.items() if key[0] == name) for name in "AG"
        }
        assert learnt == {"A": passes[-1] - 1, "G": int(k % INTERVAL == 0)}
    expected = {*LEARNT} | {k for k in range(40) if k % INTERVAL == 0}
    assert expected <= {k for k, n in enumerate(passes) if n == 2}


def operations(call):
    """The result, and how many floating-point operations it took."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("build", [odd_cnn, Residual])
def test_the_loss_is_the_same_to_the_bit_for_the_operations_of_a_forward_pass(make, build):
    model, ((x, target), *_) = build(), batches((2, 6, 6), 2)
    optimizer, evaluate = make(model), kfqn.closure(model, x, target, F.cross_entropy)
    rewind = random_state([torch.device("cpu")])
    with second_pass(model, rewind), torch.no_grad():
        expected, forward = operations(lambda: F.cross_entropy(model(x), target))
    with second_pass(model, rewind), optimizer._watch.looking(LOSS_ALONE) as seen:
        loss, all_of_it = operations(evaluate)
    assert torch.equal(loss, expected)
    assert all_of_it == forward
    assert not seen


def adversarial(model, optimizer, x, target):
    """A closure that asks for the gradient of its input, as adversarial training does."""

    def evaluate():
        optimizer.zero_grad()
        near = x.clone().requires_grad_()
        (direction,) = torch.autograd.grad(F.cross_entropy(model(near), target), near)
        clean = F.cross_entropy(model(x), target)
        loss = clean + F.cross_entropy(model(x + 0.1 * direction.sign()), target)
        loss.backward()
        return loss

    return evaluate


def penalised(model, optimizer, x, target):
    """A closure whose loss has the gradient of its input in it."""

    def evaluate():
        optimizer.zero_grad()
        near = x.clone().requires_grad_()
        loss = F.cross_entropy(model(near), target)
        (gradient,) = torch.autograd.grad(loss, near, create_graph=True)
        loss = loss + gradient.square().sum()
        loss.backward()
        return loss

    return evaluate


@pytest.mark.parametrize("kind", [adversarial, penalised])
def test_the_gradient_of_an_input_may_be_asked_for(make, kind):
    model, (batch, *_) = odd_cnn(), batches((2, 6, 6), 2)
    optimizer = make(model)
    losses = [optimizer.step(kind(model, optimizer, *batch)).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.diagnostics()["0"]["A taken"] > 10


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_is_judged_as_it_is_without(make):
    torch._dynamo.reset()
    model, data = odd_cnn(), batches((2, 6, 6), 6)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    optimizer, theirs = make(model), make(compiled)
    train(model, optimizer, data)
    train(compiled, theirs, data)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    torch._dynamo.reset()


def test_a_group_with_a_number_learns_all_at_every_step_that_is_due(make):
    model, data = odd_cnn(), batches((2, 6, 6), 20)
    optimizer = make(model, groups=[{"modules": "7", "lr": 0.01}])
    train(model, optimizer, data)
    counts = {name: judged(found) for name, found in optimizer.diagnostics().items() if name in "07"}
    assert counts["7"]["G taken"] + counts["7"]["G skipped"] > 10
    assert counts["0"]["G taken"] + counts["0"]["G skipped"] == 2


def test_factors_that_break_at_a_step_without_a_pair_start_anew(make):
    model, data = odd_cnn(), batches((2, 6, 6), 8)
    optimizer = make(model)
    train(model, optimizer, data[:4])
    optimizer.state[model[0].weight]["H_A"].fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="start anew"):
        train(model, optimizer, data[4:])
    assert optimizer.diagnostics()["0"]["resets"] == 1
    assert torch.isfinite(optimizer.state[model[0].weight]["H_A"]).all()


def test_a_model_that_is_not_run_as_a_whole_is_judged_too(make):
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
