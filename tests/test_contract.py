"""What every optimizer here promises its user, whatever the mathematics."""

import copy
import gc
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import batches, closure, mlp, odd_cnn
from torch import nn

import kfqn

TWO_PASS = {
    "KFBFGS": kfqn.KFBFGS,
    "KFLBFGS": lambda model, **settings: kfqn.KFLBFGS(model, history_size=3, **settings),
    "ConvergentKFLBFGS": lambda model, **settings: kfqn.ConvergentKFLBFGS(model, history_size=3, **settings),
}
OPTIMIZERS = TWO_PASS | {
    "KFAC": lambda model, **settings: kfqn.KFAC(model, inverse_interval=2, seed=1, **settings),
    "KFAC with all options": lambda model, **settings: kfqn.KFAC(
        model, inverse_interval=3, pi=True, clip=0.1, momentum=0.5, averaging=0.9, seed=1, **settings
    ),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    """Every optimizer."""
    return OPTIMIZERS[request.param]


@pytest.fixture(params=TWO_PASS)
def make_two_pass(request):
    """Those that take a closure of the user's own."""
    return TWO_PASS[request.param]


@pytest.fixture(params=TWO_PASS)
def make_paired(request):
    """Those with a second pass in their first step."""
    number = {"lr": 0.3, "damping": 1.0} if request.param == "KFBFGS" else {}
    return lambda model, **settings: TWO_PASS[request.param](model, **(number | settings))


def train(model, optimizer, data):
    return [optimizer.step(closure(model, optimizer, x, target)) for x, target in data]


def same_weights(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def snapshot(model, optimizer):
    """Copies of all weights and all state, to see that nothing moved."""
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in list(optimizer.state)]
    return [p.detach().clone() for p in model.parameters()], state


def unchanged(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    return True


def test_one_loop_serves_every_optimizer(make):
    """What kfqn.closure gives is a closure for torch's optimizers too."""
    for build in (make, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)):
        model, data = mlp(), batches((5,), 1) * 5
        losses = train(model, build(model), data)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_falls(make, dtype):
    model = odd_cnn().to(dtype)
    ((x, target),) = batches((2, 6, 6), 1, size=17, dtype=dtype)
    losses = train(model, make(model), [(x, target)] * 60)
    assert losses[-1] < 0.5 * losses[0]
    assert losses[0].dtype == dtype


def test_the_loss_returned_is_that_before_the_step(make):
    model, data = mlp(), batches((5,), 3)
    optimizer = make(model)
    for x, target in data:
        expected = F.cross_entropy(model(x), target)
        assert torch.equal(optimizer.step(closure(model, optimizer, x, target)), expected)


# Resuming.


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_resuming_is_bit_identical_through_a_file(make, k, warm, tmp_path):
    data = batches((2, 6, 6), 8)
    model = odd_cnn()
    optimizer = make(model, lr=0.2)
    if warm:
        optimizer.warm_start(closure(model, optimizer, x, target) for x, target in data)
    train(model, optimizer, data[:k])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, data[k:])

    resumed_model = odd_cnn()
    resumed = make(resumed_model, lr=99.0)
    saved = torch.load(tmp_path / "saved.pt")  # weights_only=True is its default
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.2
    train(resumed_model, resumed, data[k:])
    assert same_weights(model, resumed_model)
    assert unchanged(snapshot(model, optimizer), snapshot(resumed_model, resumed))


def test_loaded_state_shares_no_memory_with_the_dictionary(make):
    model, data = mlp(), batches((5,), 4)
    optimizer = make(model)
    train(model, optimizer, data[:2])
    saved = optimizer.state_dict()
    twin = copy.deepcopy(model)
    other = make(twin)
    other.load_state_dict(saved)
    before = snapshot(model, optimizer)[1]
    train(twin, other, data[2:])
    assert unchanged(before, snapshot(model, optimizer)[1])


def test_factors_of_bfloat16_weights_stay_float32(make):
    model = mlp().to(torch.bfloat16)
    optimizer = make(model)
    train(model, optimizer, batches((5,), 3, dtype=torch.bfloat16))
    restored = make(model)
    restored.load_state_dict(optimizer.state_dict())
    assert {value.dtype for state in restored.state.values() for value in state.values()} == {torch.float32}
    assert unchanged(snapshot(model, optimizer), snapshot(model, restored))


def test_state_is_plain_tensors_under_the_weights(make):
    model = odd_cnn()
    optimizer = make(model)
    train(model, optimizer, batches((2, 6, 6), 2))
    assert {*optimizer.state} == {*model.parameters()}
    biases = [m.bias for m in model if getattr(m, "bias", None) is not None]
    assert all(optimizer.state[bias].keys() - {"ahead"} == {"step"} for bias in biases)
    assert all(type(v) is torch.Tensor for state in optimizer.state.values() for v in state.values())


@pytest.mark.parametrize("around", ["closure", "step"])
def test_statistics_are_float32_under_autocast(make_paired, around):
    """h is bfloat16 there, but its mean must not be: 1/m Σ h has more digits than h."""
    model, ((x, target),) = odd_cnn(), batches((2, 6, 6), 1, size=65)
    optimizer, outputs = make_paired(model, beta=0.0), []
    model[0].register_forward_hook(lambda *call: outputs.append(call[2].detach().double()))

    def evaluate():
        with torch.autocast("cpu", torch.bfloat16):
            return closure(model, optimizer, x, target)()

    with torch.no_grad():
        model[0].bias += 1.0  # so that a bfloat16 mean would be 2⁻⁸ off
    if around == "closure":
        optimizer.step(evaluate)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step(evaluate)
    state = optimizer.state[model[0].weight]
    assert {v.dtype for v in state.values()} == {torch.float32}
    change = (outputs[1] - outputs[0]).mean((0, 2, 3)).float()
    torch.testing.assert_close(state["s_G"], change, rtol=1e-4, atol=1e-6)


# The second pass leaves no trace.


class Noisy(nn.Module):
    """Dropout and BatchNorm between two layers, and a record of every output in train mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 16, 3)
        self.masks = []

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        kept = self.drop(torch.ones_like(x))
        self.masks.append(kept)
        return self.head((x * kept).flatten(1))


def test_the_second_pass_leaves_no_trace(make):
    (x, target), (x2, target2) = batches((1, 6, 6), 2)
    model, plain = Noisy(), Noisy()
    plain.load_state_dict(model.state_dict())
    optimizer, sgd = make(model, lr=0.3), torch.optim.SGD(plain.parameters(), lr=0.0)
    for step, (a, b) in enumerate([(x, target), (x2, target2)]):
        if step:
            plain.load_state_dict(model.state_dict())
        start = torch.get_rng_state()
        sgd.step(closure(plain, sgd, a, b))
        after_one_pass = torch.get_rng_state()
        torch.set_rng_state(start)
        optimizer.step(closure(model, optimizer, a, b))
        assert torch.equal(torch.get_rng_state(), after_one_pass)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            assert p.requires_grad
        for key, buffer in plain.named_buffers():
            assert torch.equal(buffer, dict(model.named_buffers())[key]), key
        first, second = model.masks[-2:]
        assert torch.equal(first, second)
        assert torch.equal(first, plain.masks[-1])


def test_a_buffer_that_a_module_replaces_is_put_back(make):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.layer(x)

    model = Model()
    optimizer = make(model)
    train(model, optimizer, batches((3,), 2, classes=2))
    assert model.calls == 2


def test_no_weight_gradient_is_computed_in_the_second_pass(make_paired):
    model, ((x, target),) = odd_cnn(), batches((2, 6, 6), 1)
    optimizer, flags = make_paired(model), []

    def evaluate():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        flags.append([p.grad is not None for p in model.parameters()])
        return loss

    optimizer.step(evaluate)
    assert [set(f) for f in flags] == [{True}, {False}]


def test_a_closure_that_zeroes_gradients_in_place_keeps_those_of_the_first_pass(make_two_pass):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make_two_pass(model)

    def evaluate():
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        return loss

    expected = torch.autograd.grad(F.cross_entropy(model(x), target), list(model.parameters()))
    optimizer.step(evaluate)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_warm_start_leaves_no_trace_in_the_model(make_two_pass):
    model = Noisy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    make_two_pass(model).warm_start([torch.randn(4, 1, 6, 6)])
    assert unchanged(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())


def test_a_warm_start_weighs_batches_by_their_size(make_two_pass):
    """Of batches with as many data as layers have columns; the damping of others depends on their size."""
    model, x = mlp(), torch.randn(17, 5)
    one, many = make_two_pass(model), make_two_pass(model)
    one.warm_start([x])
    many.warm_start([(x[:9],), [x[9:]]])
    weight = model[0].weight
    torch.testing.assert_close(many.state[weight]["H_A"], one.state[weight]["H_A"])


# Hooks.


def test_a_second_pass_that_fails_gives_everything_back(make_paired):
    model, ((x, target),) = Noisy(), batches((1, 6, 6), 1)
    model.register_buffer("expanded", torch.zeros(1).expand(3))
    optimizer, seen = make_paired(model), []

    def evaluate():
        if seen:
            model(x)
            raise KeyboardInterrupt
        loss = closure(model, optimizer, x, target)()
        gradients = [p.grad.clone() for p in model.parameters()]
        seen.extend([torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers())), gradients])
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(evaluate)
    now = [torch.get_rng_state(), dict(model.named_buffers()), [p.grad for p in model.parameters()]]
    assert unchanged(seen, now)
    assert all(p.requires_grad for p in model.parameters())


def test_a_failure_in_either_pass_leaves_the_model_as_it_was(make_paired):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make_paired(model)
    for failing in (1, 2):
        calls = 0

        def evaluate(failing=failing):
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            if calls == failing:
                raise KeyboardInterrupt
            loss.backward()
            return loss

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(evaluate)
        assert calls == failing
        assert all(p.requires_grad for p in model.parameters())
    losses = train(model, optimizer, [(x, target)] * 9)  # and what was seen of the failed passes is forgotten
    assert losses[-1] < losses[0]


def test_hooks_end_with_their_optimizer(make):
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, batches((5,), 1))
    assert any(m._forward_hooks for m in model.modules())
    del optimizer
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_pass_without_gradient_is_not_looked_at(make_two_pass):
    (x, target), (other, _) = batches((5,), 2)
    model = mlp()
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    optimizer, twin_optimizer = make_two_pass(model), make_two_pass(twin)

    def evaluate():
        with torch.no_grad():
            model(other)
        return closure(model, optimizer, x, target)()

    optimizer.step(evaluate)
    train(twin, twin_optimizer, [(x, target)])
    assert same_weights(model, twin)


def test_a_layer_the_batch_does_not_reach_is_left_alone(make):
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    optimizer = make(model)
    before = model[1].weight.clone()
    for head in (0, 1, 0):
        x, target = batches((5,), 2)[0]
        if head == 1:
            assert torch.equal(model[1].weight, before)
            assert model[1].weight not in optimizer.state
        optimizer.step(closure(model[head], optimizer, x, target))
    assert not torch.equal(model[1].weight, before)


def test_frozen_parts_stay_and_the_rest_trains(make):
    model = odd_cnn()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    losses = train(model, make(model), batches((2, 6, 6), 1) * 20)
    assert torch.equal(model[0].weight, before)
    assert losses[-1] < losses[0]


def test_scheduler_and_step_hooks_work(make):
    model, data = mlp(), batches((5,), 3)
    optimizer, calls = make(model, lr=0.4), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    for batch in data:
        train(model, optimizer, [batch])
        scheduler.step()
    assert len(calls) == 3
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.0, abs_tol=1e-12)


# Errors: one sentence, and nothing changed.

WRONG_ARGUMENTS = {
    "lr must be > 0 and finite, got -0.1": {"lr": -0.1},
    "lr must be > 0 and finite, got nan": {"lr": math.nan},
    "lr must be > 0 and finite, got inf": {"lr": math.inf},
    "damping must be > 0 and finite, got 0": {"damping": 0},
    "beta must be >= 0 and < 1, got 1.0": {"beta": 1.0},
    "beta must be >= 0 and < 1, got -0.5": {"beta": -0.5},
    "mu1 must be > 0 and < 1, got 0": {"mu1": 0},
    "mu1 must be > 0 and < 1, got 1.5": {"mu1": 1.5},
    "weight_decay must be >= 0 and finite, got -1": {"weight_decay": -1},
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_arguments_out_of_range(make_two_pass, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_two_pass(mlp(), **WRONG_ARGUMENTS[message])


KFAC_ARGUMENTS = {
    "lr must be > 0 and finite, got -0.1": {"lr": -0.1},
    "damping must be > 0 and finite, got 0": {"damping": 0},
    "weight_decay must be >= 0 and finite, got -1": {"weight_decay": -1},
    "inverse_interval must be a whole number >= 1, got 0": {"inverse_interval": 0},
    "momentum must be >= 0 and < 1, got 1": {"momentum": 1},
    "averaging must be >= 0 and < 1, got -0.1": {"averaging": -0.1},
    "clip must be > 0 and finite, got 0": {"clip": 0},
}


@pytest.mark.parametrize("message", KFAC_ARGUMENTS)
def test_arguments_of_kfac_out_of_range(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kfqn.KFAC(mlp(), **KFAC_ARGUMENTS[message])


@pytest.mark.parametrize("history_size", [0, -3, 2.5])
def test_history_size_out_of_range(history_size):
    with pytest.raises(ValueError, match="history_size must be a whole number >= 1, got"):
        kfqn.KFLBFGS(mlp(), history_size=history_size)


WRONG_MODELS = {
    r"no trainable Linear": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)),
    r"'0' \(LazyLinear\) has no shape yet": lambda: nn.Sequential(nn.LazyLinear(3)),
}


@pytest.mark.parametrize("message", WRONG_MODELS)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_model_without_layers_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(WRONG_MODELS[message]())


def lazy_closure(model, optimizer, x, target):
    optimizer.zero_grad()
    return F.cross_entropy(model(x), target)


def float_closure(model, optimizer, x, target):
    return closure(model, optimizer, x, target)().item()


def silent_closure(model, optimizer, x, target):
    closure(model, optimizer, x, target)()


def foreign_closure(model, optimizer, x, target):
    return closure(mlp(), optimizer, x, target)()


def single_closure(model, optimizer, x, target):
    loss = model(x[0]).mean()
    loss.backward()
    return loss


def unreduced_closure(model, optimizer, x, target):
    loss = F.cross_entropy(model(x), target, reduction="none")
    loss.mean().backward()
    return loss


WRONG_CLOSURES = {
    r"as one number, its mean over the batch, but returned a tensor of shape \(3,\)": (
        ValueError,
        unreduced_closure,
    ),
    "must return the loss as a tensor, but returned float": (TypeError, float_closure),
    "must return the loss as a tensor, but returned NoneType": (TypeError, silent_closure),
    "left no gradient on any layer": (RuntimeError, lazy_closure),
    "saw no forward pass through any of its 2 layers, the first being '0'": (RuntimeError, foreign_closure),
    "'0' \\(Linear\\) takes inputs of shape \\(batch, ..., features\\)": (ValueError, single_closure),
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("message", WRONG_CLOSURES)
def test_a_wrong_closure_gets_one_sentence_and_changes_nothing(make_two_pass, message, trained):
    model, data = mlp(), batches((5,), 3)
    optimizer = make_two_pass(model, curvature_interval=1)  # all passes are recorded
    if trained:
        train(model, optimizer, data[:2])
    before = snapshot(model, optimizer)
    error, wrong = WRONG_CLOSURES[message]
    with pytest.raises(error, match=message):
        optimizer.step(lambda: wrong(model, optimizer, *data[2]))
    assert unchanged(before, snapshot(model, optimizer))
    train(model, optimizer, data)  # and the optimizer still works


def test_a_loss_of_one_entry_is_a_number(make_two_pass):
    losses = []
    for shape in ((), (1,)):
        torch.manual_seed(0)
        model, data = mlp(), batches((5,), 4)
        optimizer = make_two_pass(model)
        for x, target in data:

            def evaluate(model=model, x=x, target=target, shape=shape):
                model.zero_grad()
                loss = F.cross_entropy(model(x), target).reshape(shape)
                loss.backward()
                return loss

            losses.append(optimizer.step(evaluate).item())
    assert losses[:4] == losses[4:]


def test_other_wrong_calls(make_two_pass):
    model = mlp()
    optimizer = make_two_pass(model)
    with pytest.raises(TypeError, match=r"step takes a closure that .* but got int"):
        optimizer.step(3)
    with pytest.raises(ValueError, match="warm_start got no batches"):
        optimizer.warm_start([])
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        optimizer.warm_start(_runs_nothing(model))
    with pytest.raises(
        ValueError, match=r"'0' \(Linear\) has no H_A, because the (matrix|second moment) .* is not finite"
    ):
        optimizer.warm_start([torch.full((3, 5), math.nan)])
    assert not optimizer.state
    with pytest.raises(ValueError, match="not a parameter of this optimizer's model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def _runs_nothing(model):
    """One batch, for which the model runs none of its layers."""
    model.forward = lambda x: x
    yield torch.zeros(2, 5)
    del model.forward


def test_state_of_another_method_or_model_is_refused_whole():
    model, other = mlp(), nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3))
    data = batches((5,), 2)
    ours, theirs, wider = kfqn.KFBFGS(model), kfqn.KFLBFGS(model), kfqn.KFBFGS(other)
    adam = torch.optim.Adam(model.parameters())
    adam.step(closure(model, adam, *data[0]))
    for m, optimizer in ((model, ours), (model, theirs), (other, wider)):
        train(m, optimizer, data)
    before = snapshot(model, ours)
    for foreign in (theirs, wider, adam):
        with pytest.raises(ValueError, match="this state is not KFBFGS's for '0' \\(Linear\\)"):
            ours.load_state_dict(foreign.state_dict())
        assert unchanged(before, snapshot(model, ours))
        assert ours.param_groups[0]["lr"] == 1.0


def test_a_layer_frozen_by_half_after_the_fact_is_named(make):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make(model)
    model[2].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'2' \(Linear\) got a gradient for only one of weight and bias"):
        optimizer.step(closure(model, optimizer, x, target))


def test_backward_may_be_called_for_each_part_of_the_loss(make_two_pass):
    model, ((x, target),) = mlp().double(), batches((5,), 1, dtype=torch.float64)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make_two_pass(model), make_two_pass(twin)

    def in_parts():
        optimizer.zero_grad()
        output = model(x)
        parts = F.cross_entropy(output, target), 0.1 * output.square().mean()
        for part in parts:
            part.backward(retain_graph=True)
        return sum(parts)

    optimizer.step(in_parts)
    twin_optimizer.step(
        closure(twin, twin_optimizer, x, target, lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().mean())
    )
    torch.testing.assert_close(
        snapshot(model, optimizer), snapshot(twin, twin_optimizer), rtol=1e-8, atol=1e-10
    )


def test_a_second_call_that_runs_nothing_is_an_error(make_paired):
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = make_paired(model)
    calls = iter([closure(model, optimizer, x, target), lambda: torch.zeros(())])
    with pytest.raises(RuntimeError, match="the second pass ran no layer"):
        optimizer.step(lambda: next(calls)())


def test_a_convolution_refuses_an_input_without_a_batch(make_two_pass):
    model = odd_cnn()
    optimizer = make_two_pass(model)
    with pytest.raises(ValueError, match=r"'0' \(Conv2d\) takes inputs of 4 dimensions"):
        optimizer.warm_start([torch.randn(2, 6, 6)])


def test_importing_the_package_does_not_import_torch():
    code = "import kfqn, sys; assert 'torch' not in sys.modules; kfqn.KFBFGS; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "KFBFGS" in dir(kfqn)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        kfqn.Nothing  # noqa: B018
