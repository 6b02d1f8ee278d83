"""What a closure, or a second pass of one's own, may do with gradients."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, batches, mlp
from test_contract import TWO_PASS, snapshot, train, unchanged
from torch import nn
from torch.func import functional_call

import kfqn

PAIRS = {"lr": 0.3, "damping": 1.0, "curvature_interval": 1}


MAKERS = {
    "one pass": kfqn.KFBFGS,
    "now and then two": partial(kfqn.KFLBFGS, curvature_interval=5),
    "always two": partial(kfqn.KFBFGS, **PAIRS),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-10)


def noisy():
    """Dropout, and BatchNorm, whose statistics every pass moves.

    Not behind a layer, whose Dh̄ would be zero but for rounding, and so would be what H_G learns there.
    """
    return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def scale(model):
    for p in model.parameters():
        p.grad.mul_(0.5)


def add_noise(model):
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p.grad), alpha=1e-3)


def replace(model):
    for p in model.parameters():
        p.grad = p.grad.sign() * p.grad.abs().mean()


TOUCHES = {
    "scaled": scale,
    "noisy": add_noise,
    "replaced": replace,
    "clipped by value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "clipped by norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("touch", TOUCHES)
def test_a_closure_may_change_gradients(make, touch):
    """The step is that of a loop which does so before it, whose second pass needs no such gradients.

    But for rounding: between a step and the second pass of a loop the model holds x, and z is x + (z − x).
    """
    model, twin = noisy(), noisy()
    twin.load_state_dict(model.state_dict())
    optimizer, theirs = make(model), make(twin)
    for x, target in batches((5,), 18):

        def passes(net, x=x, target=target):
            loss = F.cross_entropy(net(x), target)
            loss.backward()
            return loss

        def evaluate(passes=passes):
            optimizer.zero_grad()
            loss = passes(model)
            TOUCHES[touch](model)
            return loss

        start = torch.get_rng_state()
        optimizer.step(evaluate)
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        theirs.zero_grad()
        loss = passes(twin)
        TOUCHES[touch](twin)
        gradients = [p.grad.clone() for p in twin.parameters()]
        theirs.step()
        if theirs.second_pass_due:
            with theirs.second_pass(loss) as again:
                again.loss = passes(twin)
        assert torch.equal(torch.get_rng_state(), end)
        close([p.grad for p in model.parameters()], gradients)
        assert all(p.requires_grad for p in model.parameters())
    close(dict(model.named_buffers()), dict(twin.named_buffers()))
    close(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_gradient_that_is_read_in_the_second_call_is_that_of_the_new_weights():
    model, data, read = mlp(), batches((5,), 12), []
    optimizer = kfqn.KFBFGS(model, **PAIRS)

    def evaluate(x, target):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        own = torch.cat([p.grad.flatten() for p in model.parameters()])
        with torch.enable_grad():
            twin = copy.deepcopy(model).requires_grad_(True)
            expected = torch.autograd.grad(F.cross_entropy(twin(x), target), list(twin.parameters()))
        read.append((own.norm(), torch.cat([g.flatten() for g in expected]).norm()))
        return loss

    for batch in data:
        optimizer.step(partial(evaluate, *batch))
    assert len(read) == 24
    for own, expected in read:
        torch.testing.assert_close(own, expected)


def test_what_fails_without_gradients_is_tried_once():
    model, data, calls = mlp(), batches((5,), 12), []
    optimizer = kfqn.KFBFGS(model, **PAIRS)

    def evaluate(x, target):
        calls.append(0)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        return loss

    for batch in data:
        optimizer.step(partial(evaluate, *batch))
    assert len(calls) == 2 * 12 + 1


def test_a_closure_that_fails_in_every_second_call_leaves_all_as_it_was():
    model, data, calls = noisy(), batches((5,), 3), []
    optimizer = kfqn.KFBFGS(model, **PAIRS)
    train(model, optimizer, data[:1])
    twin = copy.deepcopy(model)

    def evaluate(net, optimizer, x, target):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        calls.append(0)
        if len(calls) > 1:
            raise ZeroDivisionError
        return loss

    start = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(partial(evaluate, model, optimizer, *data[1]))
    end = torch.get_rng_state()
    calls.clear()
    torch.set_rng_state(start)
    evaluate(twin, optimizer=torch.optim.SGD(twin.parameters()), x=data[1][0], target=data[1][1])
    assert torch.equal(torch.get_rng_state(), end)
    assert unchanged([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert unchanged(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert all(p.requires_grad for p in model.parameters())
    assert not optimizer.training.context.with_gradients


def test_a_second_pass_of_ones_own_says_what_it_lacks_and_can_have_it(make):
    model, ((x, target), *_) = mlp(), batches((5,), 2)
    optimizer = make(model)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    first = [p.grad.clone() for p in model.parameters()]

    def again(**settings):
        with optimizer.second_pass(loss, **settings) as second:
            second.loss = F.cross_entropy(model(x), target)
            second.loss.backward()
            return [p.grad.norm() for p in model.parameters()]

    with pytest.raises(AttributeError, match="norm") as caught:
        again()
    assert "second_pass(loss, gradients=True)" in caught.value.__notes__[0]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    first = [p.grad.clone() for p in model.parameters()]
    assert all(norm > 0 for norm in again(gradients=True))
    assert unchanged([p.grad for p in model.parameters()], first)


# Gradients in the loss.


def of_inputs(model, x, target):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), target)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 3 * slope.square().sum()


def of_hidden(model, x, target):
    hidden = model[:2](x)
    output = model[2:](hidden)
    (slope,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    return F.cross_entropy(output, target) + slope.square().mean()


def of_outputs(model, x, target):
    output = model(x)
    (slope,) = torch.autograd.grad(F.cross_entropy(output, target), output, create_graph=True)
    return F.cross_entropy(output, target) + 5 * slope.square().sum()


def laplacian(model, x, target):
    x = x.clone().requires_grad_()
    output = model(x)
    (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return F.cross_entropy(output, target) + sum(second).square().mean()


def batched(model, x, target):
    x = x.clone().requires_grad_()
    output = model(x)
    units = torch.eye(3)[:, None].expand(3, len(x), 3)
    (jacobian,) = torch.autograd.grad(output, x, units, create_graph=True, is_grads_batched=True)
    return F.cross_entropy(output, target) + jacobian.square().mean()


def adversarial(model, x, target):
    near = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(near), target), near)
    return F.cross_entropy(model(x), target) + F.cross_entropy(model(x + 0.1 * slope.sign()), target)


def of_weights(model, x, target):
    loss = F.cross_entropy(model(x), target)
    slopes = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    return loss + sum(slope.square().sum() for slope in slopes)


INSIDE = [of_inputs, of_hidden, of_outputs, laplacian, batched, adversarial, of_weights]


def smooth():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def Dh(model, loss_of):
    """For every layer Σ_n ∂L/∂h(n), a mean over data of Dh, as ∂L/∂e of h + e in every use."""
    model = copy.deepcopy(model).requires_grad_(True)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    added = [torch.zeros(layer.out_features, requires_grad=True) for layer in layers]
    for layer, e in zip(layers, added, strict=True):
        layer.register_forward_hook(lambda module, args, h, e=e: h + e)
    return torch.autograd.grad(loss_of(model), added)


@pytest.mark.parametrize("loss_of", INSIDE)
@pytest.mark.usefixtures("double")
def test_a_pair_is_the_change_of_the_whole_loss_whatever_gradients_are_in_it(loss_of):
    """A gradient that only goes into the loss is none of its Dh; what comes back through it is."""
    model, data = smooth(), batches((5,), 3, dtype=torch.float64)
    optimizer = kfqn.KFBFGS(model, beta=0.0, **PAIRS)
    for x, target in data:
        of_batch = partial(loss_of, x=x, target=target)
        before = Dh(model, of_batch)

        def evaluate(of_batch=of_batch):
            optimizer.zero_grad()
            loss = of_batch(model)
            loss.backward()
            return loss

        optimizer.step(evaluate)
        uses = 2 if loss_of is adversarial else 1  # Dh̄ is a mean over them
        for layer, old, new in zip(model[::2], before, Dh(model, of_batch), strict=True):
            assert (new - old).norm() > 1e-6
            torch.testing.assert_close(optimizer.state[layer.weight]["y_G"], (new - old) / uses)


@pytest.mark.parametrize("loss_of", INSIDE)
@pytest.mark.parametrize("name", AUTOMATIC)
def test_such_losses_train_without_a_learning_rate(loss_of, name):
    model, ((x, target), *_) = smooth(), batches((5,), 1, size=32)
    optimizer = AUTOMATIC[name](model)

    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(model, x, target)
        loss.backward()
        return loss

    losses = [optimizer.step(evaluate).item() for _ in range(150)]
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.training.context.with_gradients == (loss_of is of_weights and name == "KFLBFGS")


@pytest.mark.parametrize("first_order", [False, True])
def test_a_closure_may_take_steps_of_its_own(make, first_order):
    """MAML: parameters are differentiated inside, and the outer loss is that of weights that have moved."""
    model, ((x, target), *_) = mlp(), batches((5,), 1, size=20)
    optimizer, losses = make(model), []

    def outer(net):
        own = dict(net.named_parameters())
        inner = F.cross_entropy(functional_call(net, own, (x[:10],)), target[:10])
        slopes = torch.autograd.grad(inner, [*own.values()], create_graph=not first_order)
        fast = {name: p - 0.1 * slope for (name, p), slope in zip(own.items(), slopes, strict=True)}
        return F.cross_entropy(functional_call(net, fast, (x[10:],)), target[10:])

    def evaluate():
        optimizer.zero_grad()
        loss = outer(model)
        loss.backward()
        losses.append(loss.item())
        return loss

    start = outer(model).item()
    for _ in range(30):
        losses.clear()
        optimizer.step(evaluate)
        if make is MAKERS["always two"] and len(losses) > 1:  # nothing is taken back
            assert losses[-1] == pytest.approx(outer(model).item(), rel=1e-5)
    assert losses[0] < 0.9 * start


def test_gradients_may_come_from_autograd_grad(make):
    """A closure without ``backward`` that puts them in their places itself."""
    model, data = mlp(), batches((5,), 12)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)

    def evaluate(x, target):
        loss = F.cross_entropy(model(x), target)
        parameters = [*model.parameters()]
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        return loss

    for batch in data:
        optimizer.step(partial(evaluate, *batch))
        train(twin, theirs, [batch])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


class ByHand(torch.autograd.Function):
    """A layer inside a function of the user's own, which runs it again in its backward pass."""

    @staticmethod
    def forward(ctx, layer, x, *parameters):
        ctx.layer, ctx.parameters = layer, parameters
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            found = torch.autograd.grad(ctx.layer(x), (x, *ctx.parameters), gradient)
        return (None, *found)


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(ByHand.apply(self.inner, x, *self.inner.parameters())))


@pytest.mark.parametrize("name", TWO_PASS)
def test_a_layer_may_be_run_by_a_function_of_ones_own(name):
    model = Reversible()
    twin = nn.Sequential(copy.deepcopy(model.inner), nn.Tanh(), copy.deepcopy(model.head))
    optimizer, theirs = (TWO_PASS[name](net, **PAIRS) for net in (model, twin))
    for batch in batches((5,), 6):
        train(model, optimizer, [batch])
        train(twin, theirs, [batch])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


# torch.func.


def test_a_model_that_only_torch_func_runs_is_refused_by_name(make):
    model, x = mlp(), torch.randn(6, 5)
    optimizer = make(model)
    before = copy.deepcopy(model.state_dict())

    def evaluate():
        optimizer.zero_grad()
        loss = torch.func.vmap(torch.func.jacrev(model))(x).square().mean()
        loss.backward()
        return loss

    message = r"'.*' \(Linear\) ran inside vmap, grad or another .* of torch\.func.*torch\.autograd\.grad"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(evaluate)
    optimizer.zero_grad()
    torch.func.vmap(model)(x).square().mean().backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert unchanged(model.state_dict(), before)


def test_torch_func_may_be_part_of_the_loss(make):
    """Of the layers what runs outside of it is learnt from; the loss after the step is the right one."""
    model, (batch, *_) = mlp(), batches((5,), 1)
    optimizer, losses = make(model), []

    def loss_of(x, target):
        slopes = torch.func.vmap(torch.func.grad(lambda one: model(one[None]).square().sum()))(x)
        return F.cross_entropy(model(x), target) + 0.1 * slopes.square().mean()

    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(30):
        losses.clear()
        optimizer.step(evaluate)
        if make is MAKERS["always two"]:
            assert losses[-1] == pytest.approx(loss_of(*batch).item(), rel=1e-5)
    assert losses[0] < 0.8


# What is no closure, and what is no batch.


def test_a_loss_that_was_computed_before_is_refused_at_once(make):
    model, ((x, target), *_) = mlp(), batches((5,), 2)
    optimizer = make(model)
    before = copy.deepcopy(model.state_dict())
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    with pytest.raises(RuntimeError, match="compute the loss and call backward inside it, or call step"):
        optimizer.step(lambda: loss)
    assert unchanged(model.state_dict(), before)
    optimizer.step()  # what the message says
    assert optimizer.diagnostics()["0"]["steps"] == 1


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, partial(F.cross_entropy, reduction="sum")])
@pytest.mark.parametrize("door", ["closure", "by hand"])
def test_an_empty_batch_changes_nothing(make, loss_fn, door):
    """Training goes on as if it had not been; a mean over nothing is NaN, a sum 0."""
    model, data = mlp(), batches((5,), 36)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    nothing = torch.randn(0, 5), torch.zeros(0, dtype=torch.long)
    for k, batch in enumerate(data):
        if k % 5 == 4:
            evaluate = kfqn.closure(model, *nothing, loss_fn)
            if door == "closure":
                loss = optimizer.step(evaluate)
                assert loss.isnan() if loss_fn is F.cross_entropy else loss == 0
            else:
                evaluate()
                optimizer.step()
                assert not optimizer.second_pass_due
        train(model, optimizer, [batch])
        train(twin, theirs, [batch])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    assert optimizer.diagnostics()[""]["refused"] == 0


def test_of_a_batch_that_is_empty_for_every_layer_other_parameters_may_learn():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.shift = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.head(x).sum(0) + self.shift

    model = Shifted()
    before = copy.deepcopy(model.state_dict())
    optimizer = kfqn.KFBFGS(model, others=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    optimizer.step(kfqn.closure(model, torch.randn(0, 5), torch.zeros(3), F.mse_loss))
    assert torch.equal(model.head.weight, before["head.weight"])
    torch.testing.assert_close(model.shift, torch.full((3,), 1 - 0.5 * 2 / 3))


def test_an_empty_micro_batch_among_others_costs_nothing():
    """Nor does it where a closure that does nothing comes last, as Lightning's."""
    model, ((x, target),) = mlp(), batches((5,), 1)
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    for part in (x[:0], x):
        F.cross_entropy(model(part), target[: len(part)], reduction="sum").backward()
    F.cross_entropy(twin(x), target, reduction="sum").backward()
    optimizer.step(lambda: None)
    theirs.step()
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    assert optimizer.diagnostics()["0"]["steps"] == 1
