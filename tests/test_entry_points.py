"""Three ways into a step: a closure, a second pass of the user's own, and no second pass at all."""

import contextlib
import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import batches, mlp, odd_cnn, recurrent
from test_contract import OPTIMIZERS, TWO_PASS, Noisy, snapshot, train, unchanged
from torch import nn
from torch.utils.checkpoint import checkpoint

import kfqn


@pytest.fixture(params=TWO_PASS)
def make(request):
    """With a learning rate of its own; doors with an automatic one: `test_automatic`."""
    return lambda model, **settings: TWO_PASS[request.param](model, **({"lr": 3.0} | settings))


def backward(model, x, target):
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def by_hand(model, optimizer, x, target):
    """The second door."""
    optimizer.zero_grad()
    loss = backward(model, x, target)
    optimizer.step()
    with optimizer.second_pass():
        backward(model, x, target)
    return loss


@pytest.mark.parametrize("build", [odd_cnn, recurrent], ids=["cnn", "recurrent"])
def test_both_doors_lead_to_the_same_weights_and_state_to_the_bit(make, build):
    model = build()
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model, lr=0.3), make(twin, lr=0.3)
    for x, target in batches((2, 6, 6), 6):
        first = train(model, optimizer, [(x, target)])[0]
        assert torch.equal(by_hand(twin, theirs, x, target), first)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_second_pass_of_ones_own_leaves_no_trace_and_draws_the_same_masks(make):
    model = Noisy()
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model, lr=0.3), make(twin, lr=0.3)
    for x, target in batches((1, 6, 6), 4):
        start = torch.get_rng_state()
        train(model, optimizer, [(x, target)])
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        by_hand(twin, theirs, x, target)
        assert torch.equal(torch.get_rng_state(), end)
        assert torch.equal(*twin.masks[-2:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    assert unchanged(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_other_random_numbers_between_the_passes_do_not_matter(make):
    model, ((x, target),) = Noisy(), batches((1, 6, 6), 1)
    optimizer = make(model)
    backward(model, x, target)
    torch.rand(3)
    optimizer.step()
    with optimizer.second_pass():
        backward(model, x + 0 * torch.rand(1), target)
    assert torch.equal(*model.masks[-2:])


@pytest.mark.parametrize("door", ["closure", "by hand"])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 4, 3]], ids=["equal", "uneven"])
@pytest.mark.usefixtures("double")
def test_micro_batches_are_one_large_batch(make, sizes, door):
    model = recurrent()
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model, lr=0.3, damping=1.0), make(twin, lr=0.3, damping=1.0)
    for _ in range(4):
        x, target = torch.randn(12, 2, 6, 6), torch.randint(3, (12,))
        parts = list(zip(x.split(sizes), target.split(sizes), strict=True))

        def one_after_the_other(parts=parts):
            total = 0.0
            for a, b in parts:
                loss = F.cross_entropy(twin(a), b) * len(a) / 12
                loss.backward()
                total = total + loss.detach()
            return total

        train(model, optimizer, [(x, target)])
        twin.zero_grad()
        if door == "closure":
            theirs.step(lambda: (twin.zero_grad(), one_after_the_other())[1])
        else:
            one_after_the_other()
            theirs.step()
            with theirs.second_pass():
                one_after_the_other()
    torch.testing.assert_close(snapshot(twin, theirs), snapshot(model, optimizer), rtol=1e-9, atol=1e-11)


def test_inputs_that_nobody_holds_teach_the_same(make):
    """To the bit what they teach when they are held until the step, as in the first one."""
    model = odd_cnn()
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    for x, target in batches((2, 6, 6), 6):
        theirs.training.context.used_once.clear()
        train(model, optimizer, [(x, target)])
        train(twin, theirs, [(x, target)])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_what_inputs_have_taught_follows_the_model_to_another_type(make):
    model, (first, second) = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), batches((2, 6, 6), 2)
    optimizer = make(model)
    train(model, optimizer, [first])
    optimizer.zero_grad()
    backward(model, *second)
    model.double()
    optimizer.step()
    with optimizer.second_pass():
        backward(model, second[0].double(), second[1])
    assert optimizer.state[model[1].weight]["H_A"].dtype == torch.float64


@pytest.mark.parametrize("name", TWO_PASS)
def test_nobody_holds_the_inputs_after_the_backward_pass(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 64), nn.Tanh(), nn.Linear(64, 3))
    inputs, alive = [], []
    model[3].register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    optimizer = TWO_PASS[name](model, lr=0.3)
    for x, target in batches((2, 6, 6), 3):
        optimizer.zero_grad()
        backward(model, x, target)
        alive.append(inputs[-1]() is not None)
        optimizer.step()
        with optimizer.second_pass():
            backward(model, x, target)
    assert alive == [True, False, False]


@pytest.mark.usefixtures("double")
def test_a_second_micro_batch_that_nobody_expected_is_learnt_from():
    """A is then asked for the s of the first, whose input is gone; its answer is still that of both."""
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = kfqn.KFBFGS(model, lr=0.3, damping=4.0, curvature_interval=1)
    train(model, optimizer, [(torch.randn(8, 3), torch.randint(2, (8,)))])
    H_A, x, target = optimizer.state[model[0].weight]["H_A"], torch.randn(8, 3), torch.randint(2, (8,))
    a = torch.cat((x, torch.ones(8, 1)), dim=1)
    s = H_A @ a[:6].mean(0)

    def one_after_the_other():
        optimizer.zero_grad()
        total = 0.0
        for part in (slice(0, 6), slice(6, 8)):
            loss = F.cross_entropy(model(x[part]), target[part]) * len(x[part]) / 8
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(one_after_the_other)
    y = a.T @ (a @ s) / 8 + 2.0 * s
    torch.testing.assert_close(H_A @ y, s)
    held = H_A.clone()
    optimizer.step(one_after_the_other)  # now they are expected
    s = held @ a.mean(0)
    torch.testing.assert_close(H_A @ (a.T @ (a @ s) / 8 + 2.0 * s), s)


@pytest.mark.usefixtures("double")
def test_a_closure_may_run_the_last_micro_batch_alone(make):
    """Lightning's do, with accumulate_grad_batches: A is of all of them, the pair for H_G of the last."""
    model = odd_cnn()
    optimizer = make(model, lr=0.3, damping=1.0, beta=0.0)
    x, target = torch.randn(8, 2, 6, 6), torch.randint(3, (8,))
    weights = copy.deepcopy(model.state_dict())
    H_A = make(twin := copy.deepcopy(model), lr=0.3, damping=1.0, beta=0.0)
    train(twin, H_A, [(x, target)])

    def last():
        loss = F.cross_entropy(model(x[4:]), target[4:]) / 2
        loss.backward()
        return loss

    (F.cross_entropy(model(x[:4]), target[:4]) / 2).backward()
    optimizer.step(last)
    assert unchanged_within_rounding(model.state_dict(), twin.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key in {"H_A", "DW"} & optimizer.state[p].keys():
            torch.testing.assert_close(optimizer.state[p][key], H_A.state[q][key], rtol=1e-9, atol=1e-11)

    alone = copy.deepcopy(
        model
    )  # the changes that this micro-batch alone shows, from the same weights to the same
    expected = changes(alone, weights, model.state_dict(), x[4:], target[4:])
    for p, (dh, dDh) in zip([m.weight for m in model if hasattr(m, "weight")], expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["s_G"], dh, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(optimizer.state[p]["y_G"], dDh, rtol=1e-9, atol=1e-11)


def unchanged_within_rounding(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    return True


def changes(model, before, after, x, target):
    """How h̄ and Dh̄ of every layer change between two sets of weights."""
    found = []
    for weights in (before, after):
        model.load_state_dict(weights)
        outputs, h = [], x
        for module in model:
            h = module(h.clone())  # a ReLU in place would overwrite what is looked at
            outputs += [h] if hasattr(module, "weight") else []
        loss = F.cross_entropy(h, target)
        gradients = torch.autograd.grad(loss, outputs)
        found.append([(means(h), len(x) * means(g)) for h, g in zip(outputs, gradients, strict=True)])
    return [(h1 - h0, D1 - D0) for (h0, D0), (h1, D1) in zip(*found, strict=True)]


def means(h):
    return h.detach().flatten(2).mean((0, 2)) if h.ndim > 2 else h.detach().mean(0)


def test_a_closure_that_does_nothing_is_none(make):
    """Lightning's manual optimization passes one to step()."""
    model, data = mlp(), batches((5,), 3)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    for x, target in data:
        by_hand(model, optimizer, x, target)
        theirs.zero_grad()
        backward(twin, x, target)
        theirs.step(lambda: None)
        with theirs.second_pass():
            backward(twin, x, target)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_wrapper_that_shares_attributes_may_run_the_second_pass(make):
    """As Lightning's optimizers do: attributes are those of the time it was made."""
    model, data = mlp(), batches((5,), 3)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    wrapper = object.__new__(type("Wrapper", (type(theirs),), {}))
    wrapper.__dict__ = dict(theirs.__dict__)
    for x, target in data:
        by_hand(model, optimizer, x, target)
        theirs.zero_grad()
        backward(twin, x, target)
        theirs.step()
        with wrapper.second_pass():
            backward(twin, x, target)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_dropout_draws_the_masks_of_every_micro_batch_again(make):
    model, data = Noisy(), batches((1, 6, 6), 3)
    optimizer = make(model)
    for x, target in data:
        backward(model, x, target)
    optimizer.step()
    with optimizer.second_pass():
        for x, target in data:
            backward(model, x, target)
    assert all(torch.equal(a, b) for a, b in zip(model.masks[:3], model.masks[3:], strict=True))


def test_step_alone_uses_h_as_it_is_warns_once_and_learns_nothing(make):
    model, data = odd_cnn(), batches((2, 6, 6), 8)
    optimizer = make(model, lr=0.2)
    train(model, optimizer, data[:3])
    factors = ("H_A", "H_G", "S", "Y", "s_G", "y_G")

    def learnt():
        return [{k: v.clone() for k, v in s.items() if k in factors} for s in optimizer.state.values()]

    before, weights = learnt(), model[0].weight.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, target in data[3:]:
            optimizer.zero_grad()
            backward(model, x, target)
            optimizer.step()
    assert len(caught) == 1
    assert "without a second pass over the batch of the last step" in str(caught[0].message)
    assert unchanged(before, learnt())
    assert not torch.equal(model[0].weight, weights)


def test_step_alone_trains_from_the_start(make):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make(model)
    losses = []

    def step():
        optimizer.zero_grad()
        losses.append(backward(model, x, target))
        optimizer.step()

    step()
    with pytest.warns(RuntimeWarning, match="nothing is learnt about curvature"):
        step()
    for _ in range(30):
        step()
    assert losses[-1] < 0.5 * losses[0]


def test_kfac_alone_keeps_its_factors():
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = OPTIMIZERS["KFAC"](model)
    train(model, optimizer, [(x, target)])
    before = optimizer.state[model[0].weight]["Omega"].clone()
    backward(model, x, target)
    with pytest.warns(RuntimeWarning, match=r"without a closure of kfqn\.closure learns nothing"):
        optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["Omega"], before)
    fresh = OPTIMIZERS["KFAC"](mlp())
    backward(fresh.training.groups.model, x, target)
    with pytest.raises(RuntimeError, match=r"give its first step a closure of kfqn\.closure"):
        fresh.step()


def test_a_step_without_gradients_does_nothing(make):
    model = mlp()
    optimizer = make(model)
    before = snapshot(model, optimizer)
    optimizer.step()
    assert unchanged(before, snapshot(model, optimizer))


def test_a_second_pass_out_of_place_is_an_error(make):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make(model)
    with pytest.raises(RuntimeError, match="learns from the step just taken"):
        with optimizer.second_pass():
            pass
    by_hand(model, optimizer, x, target)
    with pytest.raises(RuntimeError, match="learns from the step just taken"):
        with optimizer.second_pass():
            pass
    backward(model, x, target)
    optimizer.step()
    with pytest.raises(RuntimeError, match="the second pass ran no layer"):
        with optimizer.second_pass():
            pass


def test_passes_whose_gradients_were_dropped_do_not_count(make):
    """A skipped step, a validation loss with gradients, another batch's graph: none of it is learnt from."""
    model, ((x, target), (x2, target2)) = odd_cnn(), batches((2, 6, 6), 2)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    train(model, optimizer, [(x, target)])
    F.cross_entropy(twin(x2), target2)  # no backward
    backward(twin, x2, target2)
    twin.zero_grad()
    backward(twin, x2, target2)
    twin.zero_grad(set_to_none=False)
    by_hand(twin, theirs, x, target)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_gradients_may_be_cleared_between_forward_and_backward(make):
    """As Lightning's closures do."""
    model, data = odd_cnn(), batches((2, 6, 6), 4)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)

    for x, target in data:

        def evaluate(x=x, target=target):
            loss = F.cross_entropy(twin(x), target)
            theirs.zero_grad()
            loss.backward()
            return loss

        train(model, optimizer, [(x, target)])
        theirs.step(evaluate)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_clearing_the_gradients_lets_go_of_what_was_seen(make):
    model, ((x, target),) = odd_cnn(), batches((2, 6, 6), 1)
    optimizer = make(model)
    backward(model, x, target)
    assert optimizer.training.recorder.waiting
    optimizer.zero_grad()
    assert not optimizer.training.recorder.waiting


def test_a_layer_used_without_its_module_is_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return F.linear(self.first(x), self.second.weight, self.second.bias)

    model, data = Functional(), batches((3,), 2, classes=2)
    optimizer = kfqn.KFBFGS(model)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'second' \(Linear\) got a gradient, but no call of its module"):
        train(model, optimizer, data)
    assert unchanged(before, snapshot(model, optimizer))
    optimizer = kfqn.KFBFGS(model, groups=[{"modules": "second", "first_order": True}])
    train(model, optimizer, data)


# Mixed precision.


def test_grad_scaler_through_the_second_door(make):
    """fp16 gradients scaled by 2¹⁰: the state is that of training without a scaler, in float32."""
    model, data = odd_cnn(), batches((2, 6, 6), 5)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model, lr=0.3, damping=1.0), make(twin, lr=0.3, damping=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, target in data:
        by_hand(model, optimizer, x, target)
        theirs.zero_grad()
        scaler.scale(F.cross_entropy(twin(x), target)).backward()
        scaler.step(theirs)
        with theirs.second_pass(loss_scale=scaler.get_scale()):
            scaler.scale(F.cross_entropy(twin(x), target)).backward()
        scaler.update()
    torch.testing.assert_close(snapshot(twin, theirs), snapshot(model, optimizer), rtol=1e-3, atol=1e-4)


def test_fp16_autocast_with_a_scaler_whose_first_steps_overflow(make):
    model, ((x, target),) = odd_cnn(), batches((2, 6, 6), 1, size=17)
    optimizer = make(model)
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**24), []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), target)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        with optimizer.second_pass(loss_scale=scaler.get_scale()):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), target)
            scaler.scale(loss).backward()
        scaler.update()
    assert scaler.get_scale() < 2.0**24
    assert losses[-1] < 0.5 * losses[0]
    steps = {name: found["steps"] for name, found in optimizer.diagnostics().items() if name}
    assert set(steps.values()) < {float(n) for n in range(60)}
    assert all(v.isfinite().all() for state in optimizer.state.values() for v in state.values())


def test_a_step_skipped_between_second_passes_asks_for_none(make):
    """As by a `GradScaler`; the first pass is then not looked at, but it was there."""
    model, ((x, target),) = odd_cnn(), batches((2, 6, 6), 1)
    optimizer = make(model, curvature_interval=10)
    by_hand(model, optimizer, x, target)
    state = optimizer.state_dict()
    state["param_groups"][0]["progress"] |= {"k": 101}
    optimizer.load_state_dict(state)
    by_hand(model, optimizer, x, target)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, x, target)  # and no step
    with optimizer.second_pass():
        backward(model, x, target)
    assert str(before) == str(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="there was none since the last"):
        with optimizer.second_pass():
            backward(model, x, target)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_second_pass_that_is_not_finite_skips_curvature_only(make, bad):
    model, ((x, target),) = odd_cnn(), batches((2, 6, 6), 1)
    optimizer = make(model, lr=0.3)
    by_hand(model, optimizer, x, target)
    before = copy.deepcopy(optimizer.state_dict())["state"]
    optimizer.zero_grad()
    backward(model, x, target)
    optimizer.step()
    with optimizer.second_pass():
        (F.cross_entropy(model(x), target) * bad).backward()
    states = optimizer.state_dict()["state"].items()
    for i, state in states:
        for key in ("H_G", "S", "Y", "s_G", "y_G"):
            if key in state:
                assert torch.equal(state[key], before[i][key])
    assert all(torch.isfinite(state["H_A"]).all() for _, state in states if "H_A" in state)
    assert all(found["G skipped"] == 1 for name, found in optimizer.diagnostics().items() if name)


# What else may surround a pass.


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Checkpointed(nn.Module):
    """The odd CNN in two checkpointed segments."""

    def __init__(self, inner, **options):
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, x):
        for part in (self.inner[:4], self.inner[4:]):
            x = checkpoint(part, x, **self.options) if self.options else part(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("door", [by_hand, lambda m, o, x, t: train(m, o, [(x, t)])], ids=["hand", "closure"])
def test_activation_checkpointing_changes_nothing(make, reentrant, door):
    plain = Checkpointed(odd_cnn())
    model = Checkpointed(copy.deepcopy(plain.inner), use_reentrant=reentrant)
    optimizer, theirs = make(plain, lr=0.3), make(model, lr=0.3)
    for x, target in batches((2, 6, 6), 4):
        x.requires_grad_(reentrant)  # torch's own condition for it
        door(plain, optimizer, x, target)
        door(model, theirs, x, target)
    assert unchanged(snapshot(plain, optimizer), snapshot(model, theirs))


@pytest.mark.usefixtures("double")
def test_channels_last_and_deterministic_algorithms(make):
    model, data = odd_cnn(), batches((2, 6, 6), 4)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    optimizer, theirs = make(model, lr=0.3), make(twin, lr=0.3)
    train(model, optimizer, data)
    with deterministic():
        train(twin, theirs, [(x.to(memory_format=torch.channels_last), y) for x, y in data])
    torch.testing.assert_close(snapshot(twin, theirs), snapshot(model, optimizer), rtol=1e-9, atol=1e-11)


def test_several_optimizers_may_watch_one_model(make):
    model, twin, data = odd_cnn(), odd_cnn(), batches((2, 6, 6), 4)
    twin.load_state_dict(model.state_dict())
    optimizer, idle = make(model), make(model)
    train(model, optimizer, data)
    train(twin, theirs := make(twin), data)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    assert not idle.state


# What is not a pass over the batch.


def test_gradients_for_something_else_are_not_learnt_from(make):
    """A saliency map, an adversarial input, a penalty on input gradients."""
    model, ((x, target), (x2, _)) = odd_cnn(), batches((2, 6, 6), 2)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    by_hand(model, optimizer, x, target)
    x2.requires_grad_()
    output = twin(x)
    torch.autograd.grad(twin(x2).sum(), x2)
    F.cross_entropy(output, target).backward()
    theirs.step()
    with theirs.second_pass():
        backward(twin, x, target)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_pass_without_backward_in_a_closure_keeps_the_masks():
    """A teacher of its own, detached."""
    model, ((x, target),) = Noisy(), batches((1, 6, 6), 1)
    optimizer = kfqn.KFLBFGS(model)

    def evaluate():
        model.zero_grad()
        teacher = model(x).detach()
        loss = F.mse_loss(model(x), teacher) + F.cross_entropy(model(x), target)
        loss.backward()
        return loss

    optimizer.step(evaluate)
    assert all(torch.equal(a, b) for a, b in zip(model.masks[:3], model.masks[3:], strict=True))


def test_graphs_that_are_kept_end_with_their_step(make):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer, alive = make(model), []
    for _ in range(3):
        optimizer.zero_grad()
        output = model(x)
        alive.append(weakref.ref(output))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of what create_graph does to .grad
            F.cross_entropy(output, target).backward(create_graph=True)
        del output
        optimizer.step()
        with optimizer.second_pass():
            backward(model, x, target)
    optimizer.zero_grad()
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0


def test_steps_of_another_optimizer_do_not_pile_up(make):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer, sgd = make(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        loss = F.cross_entropy(model(x), target)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert all(len(seen.calls) == 1 for seen in optimizer.training.recorder.recorded.values())


def test_an_expert_that_gets_no_data_is_left_alone(make):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

        def forward(self, x):
            first = torch.arange(len(x)) >= 0  # all of them
            return self.experts[0](x[first]) + self.experts[1](x[~first]).sum()

    model, data = Experts(), batches((5,), 3)
    before = model.experts[1].weight.clone()
    optimizer = make(model)
    train(model, optimizer, data)
    assert torch.equal(model.experts[1].weight, before)


def test_loading_forgets_a_step_that_waits_for_its_second_pass(make):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make(model)
    train(model, optimizer, [(x, target)])
    state = copy.deepcopy(optimizer.state_dict())
    backward(model, x, target)
    optimizer.step()
    optimizer.load_state_dict(state)
    assert not optimizer.second_pass_due
