"""What is KFAC's own: the Fisher where it is exact, the sampled targets, the options of KFC-pre."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import batches, mlp, odd_cnn
from torch import nn

import kfqn
from kfqn.learning import fisher

pytestmark = pytest.mark.usefixtures("double")
P = torch.tensor([0.5, 0.3, 0.2])  # a predictive distribution that ten labels hold exactly
LABELS = [0] * 5 + [1] * 3 + [2] * 2


def blocks(model, x):
    """The exact Fisher of every layer, Jᵀ (diag p − p pᵀ) J, for one datum, vec by columns of W."""
    names = [name for name, _ in model.named_parameters()]

    def logits(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), x)[0]

    J = torch.func.jacrev(logits, argnums=tuple(range(len(names))))(*model.parameters())
    p = logits(*model.parameters()).softmax(0)
    middle = p.diag() - torch.outer(p, p)
    for weight, bias in zip(J[::2], J[1::2], strict=True):
        Jl = torch.cat((weight.flatten(2), bias[:, :, None]), 2).mT.flatten(1)
        yield Jl.T @ middle @ Jl


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,)),
    "deep linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), (4,)),
    "deep": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolution, one location": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3)),
        (2, 3, 3),
    ),
}


@pytest.mark.parametrize("net", NETS)
def test_for_one_datum_at_one_location_omega_times_gamma_is_the_fisher(net):
    make, shape = NETS[net]
    model, x = make(), torch.randn(1, *shape)
    with torch.no_grad():
        model[-1].bias += P.log() - model(x)[0]
    labels = iter(LABELS)

    def each_in_turn(output, generator):
        return torch.tensor([next(labels)])

    target = torch.zeros(1, dtype=torch.long)
    closures = [kfqn.closure(model, x, target, F.cross_entropy, sample=each_in_turn) for _ in LABELS]
    optimizer = kfqn.KFAC(model)
    optimizer.warm_start(closures)
    layers = [m for m in model if hasattr(m, "weight")]
    for layer, block in zip(layers, blocks(model, x), strict=True):
        state = optimizer.state[layer.weight]
        torch.testing.assert_close(torch.kron(state["Omega"], state["Gamma"]), block)


def test_classes_are_drawn_from_the_predictions():
    model, x, generator = nn.Linear(2, 3, bias=False), torch.randn(1, 2), torch.Generator()
    with torch.no_grad():
        model.weight.copy_(torch.outer(P.log(), x[0]) / x.square().sum())
    batch = x.expand(20_000, 2)
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        made = kfqn.closure(model, batch, torch.zeros(len(batch), dtype=torch.long), loss)
        labels = made.sample(model(batch), generator)
        torch.testing.assert_close(labels.bincount(minlength=3) / len(batch), P.double(), rtol=0, atol=0.015)
    again = made.sample(model(batch), torch.Generator().manual_seed(3))
    assert torch.equal(again, made.sample(model(batch), torch.Generator().manual_seed(3)))


def test_numbers_are_drawn_so_that_gamma_is_the_gauss_newton_matrix():
    """mse_loss over d numbers: E[Dh Dhᵀ] = 2/d I, its Hessian in h."""
    d, m = 4, 50_000
    model, x = nn.Linear(3, d), torch.randn(m, 3)
    optimizer = kfqn.KFAC(model, seed=0)
    optimizer.warm_start([kfqn.closure(model, x, torch.zeros(m, d), F.mse_loss)])
    Gamma = optimizer.state[model.weight]["Gamma"]
    torch.testing.assert_close(Gamma, 2 / d * torch.eye(d), rtol=0, atol=0.02)


UNKNOWN = [
    lambda output, target: F.cross_entropy(output, target),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.CrossEntropyLoss(ignore_index=0),
    nn.MSELoss(reduction="sum"),
    nn.L1Loss(),
]


@pytest.mark.parametrize("loss", UNKNOWN)
def test_a_loss_whose_distribution_is_not_known_is_asked_for_it(loss):
    model, ((x, target),) = mlp(), batches((5,), 1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"give kfqn.closure a function sample\(output, generator\)"):
        kfqn.KFAC(model).step(kfqn.closure(model, x, target, loss))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_wrong_closures_and_batches():
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer = kfqn.KFAC(model)
    for wrong in (3, lambda: F.cross_entropy(model(x), target)):
        with pytest.raises(TypeError, match=r"make it with kfqn.closure\(model, x, target, loss_fn\)"):
            optimizer.step(wrong)
    with pytest.raises(TypeError, match="make it with"):
        optimizer.warm_start([x])
    with pytest.raises(ValueError, match="warm_start got no batches"):
        optimizer.warm_start([])
    deep = nn.Sequential(nn.Conv2d(2, 3, 1))
    with pytest.raises(ValueError, match=r"outputs of shape \(m, classes\), but got \(2, 3, 4, 4\)"):
        kfqn.KFAC(deep).warm_start(
            [kfqn.closure(deep, torch.randn(2, 2, 4, 4), torch.zeros(2, 4, 4).long(), F.cross_entropy)]
        )
    with pytest.raises(
        ValueError, match=r"'0' \(Linear\) has no H_Ω, because the matrix to invert is not finite"
    ):
        optimizer.warm_start(
            [kfqn.closure(model, x * math.nan, target, F.mse_loss, sample=lambda o, _: o * 0)]
        )
    assert not optimizer.state


def steps(optimizer, model, data):
    return [optimizer.step(kfqn.closure(model, x, y, F.cross_entropy)) for x, y in data]


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def W(layer):
    return torch.cat((layer.weight.flatten(1), layer.bias[:, None]), 1).detach()


def test_inverses_are_renewed_every_so_many_steps():
    model = mlp()
    optimizer = kfqn.KFAC(model, inverse_interval=3, damping=0.25)
    state = optimizer.state[model[0].weight]
    renewed = []
    for batch in batches((5,), 7):
        old = state["H_Omega"].clone() if "H_Omega" in state else None
        steps(optimizer, model, [batch])
        state = optimizer.state[model[0].weight]
        renewed.append(old is not None and not torch.equal(state["H_Omega"], old))
        if renewed[-1]:
            for name in ("Omega", "Gamma"):
                product = state[f"H_{name}"] @ (state[name] + 0.5 * torch.eye(len(state[name])))
                torch.testing.assert_close(product, torch.eye(len(product)))
    assert renewed == [False, False, True, False, False, True, False]


def test_pi_balances_the_factors_and_keeps_their_product():
    model = odd_cnn()
    optimizer = kfqn.KFAC(model, damping=0.3, pi=True)
    optimizer.warm_start([kfqn.closure(model, *batch, F.cross_entropy) for batch in batches((2, 6, 6), 2)])
    for module in (model[0], model[4], model[7]):
        state = optimizer.state[module.weight]
        dampings = []
        for name in ("Omega", "Gamma"):
            difference = torch.linalg.inv(state[f"H_{name}"]) - state[name]
            dampings.append(difference.diagonal().mean())
            torch.testing.assert_close(difference, dampings[-1] * torch.eye(len(difference)))
        traces = [state[name].diagonal().mean() for name in ("Omega", "Gamma")]
        torch.testing.assert_close(dampings[0] * dampings[1], torch.tensor(0.3))
        torch.testing.assert_close(dampings[0] / dampings[1], traces[0] / traces[1])


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_clipping_bounds_the_model_of_the_change(clip):
    model = odd_cnn()
    layers = [m for m in model if hasattr(m, "weight")]
    optimizer = kfqn.KFAC(model, lr=0.5, damping=0.3, beta=0.0, clip=clip)
    (batch,) = batches((2, 6, 6), 1)
    optimizer.warm_start([kfqn.closure(model, *batch, F.cross_entropy)])
    factors = [{k: v.clone() for k, v in optimizer.state[m.weight].items()} for m in layers]
    before = [p.detach().clone() for p in model.parameters()]
    steps(optimizer, model, [batch])
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    plain, slope = [], 0.0
    for layer, state in zip(layers, factors, strict=True):
        DW = layer.weight.grad.flatten(1)
        if layer.bias is not None:
            DW = torch.cat((DW, layer.bias.grad[:, None]), 1)
        P = state["H_Gamma"] @ DW @ state["H_Omega"]
        slope += (P * DW).sum()
        plain += [P[:, : layer.weight[0].numel()].reshape(layer.weight.shape)]
        plain += [] if layer.bias is None else [P[:, -1]]
    scale = min(1.0, math.sqrt(clip / (0.25 * slope)))
    assert (scale < 1) == (clip < 1)
    for step, P in zip(moved, plain, strict=True):
        torch.testing.assert_close(step, 0.5 * scale * P)


def test_momentum_accumulates_directions_of_plain_gradients():
    (batch,), lr, momentum = batches((5,), 1), 0.2, 0.6
    model = mlp()
    optimizer = kfqn.KFAC(model, lr=lr, momentum=momentum, inverse_interval=100)
    optimizer.warm_start([kfqn.closure(model, *batch, F.cross_entropy)])
    state = optimizer.state[model[2].weight]
    direction = torch.zeros_like(state["DW"])
    for _ in range(4):
        before = W(model[2])
        steps(optimizer, model, [batch])
        DW = torch.cat((model[2].weight.grad, model[2].bias.grad[:, None]), 1)
        direction = momentum * direction + state["H_Gamma"] @ DW @ state["H_Omega"]
        torch.testing.assert_close(before - W(model[2]), lr * direction)


def test_averaged_weights_take_the_place_of_the_weights_and_give_it_back():
    model, data = mlp(), batches((5,), 6)
    optimizer = kfqn.KFAC(model, averaging=0.7)
    mean = parameters_of(model)
    for batch in data:
        steps(optimizer, model, [batch])
        mean = 0.7 * mean + 0.3 * parameters_of(model)
    own = parameters_of(model)
    with optimizer.averaged():
        torch.testing.assert_close(parameters_of(model), mean)
    assert torch.equal(parameters_of(model), own)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        raise KeyboardInterrupt
    assert torch.equal(parameters_of(model), own)
    plain = kfqn.KFAC(mlp())
    with plain.averaged():
        pass


def test_a_second_moment_that_is_not_finite_is_left_out(monkeypatch):
    model, data = mlp(), batches((5,), 4)
    optimizer = kfqn.KFAC(model, inverse_interval=1)
    steps(optimizer, model, data[:2])
    state = optimizer.state[model[0].weight]
    before = {key: state[key].clone() for key in ("Gamma", "H_Gamma")}
    whole = fisher.second_moment_of_gradient
    monkeypatch.setattr(fisher, "second_moment_of_gradient", lambda g: whole(g) * math.inf)
    steps(optimizer, model, data[2:3])
    assert torch.equal(state["Gamma"], before["Gamma"])
    monkeypatch.setattr(fisher, "second_moment_of_gradient", whole)
    steps(optimizer, model, data[3:])
    assert state["H_Gamma"].isfinite().all()
    assert not torch.equal(state["H_Gamma"], before["H_Gamma"])


def test_a_layer_that_is_not_in_the_batch_of_the_inversion_is_inverted_too():
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    optimizer = kfqn.KFAC(model, inverse_interval=2)
    data = batches((5,), 6)
    starts = []
    for k, (x, y) in enumerate(data):
        head = model[1 - k % 2]  # the second head at k = 1, 3, 5; inversions are at 2, 4, 6
        optimizer.step(kfqn.closure(head, x, y, F.cross_entropy))
        starts.append(optimizer.state[model[1].weight]["H_Omega"].clone())
    assert torch.equal(starts[1], starts[2])
    assert not torch.equal(starts[2], starts[3])


def test_averaging_can_begin_and_end_on_the_way():
    model, data = mlp(), batches((5,), 6)
    optimizer = kfqn.KFAC(model)
    steps(optimizer, model, data[:2])
    optimizer.param_groups[0]["averaging"] = 0.5
    steps(optimizer, model, data[2:4])
    own = parameters_of(model)
    with optimizer.averaged():
        assert not torch.equal(parameters_of(model), own)
    optimizer.param_groups[0]["averaging"] = 0.0
    with optimizer.averaged():
        assert torch.equal(parameters_of(model), own)


def test_a_layer_without_gradient_from_sampled_targets_is_named():
    model, ((x, y),) = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), batches((5,), 1)

    passes = []

    def forward(inputs):
        passes.append(1)
        return model[1](model[0](inputs) if len(passes) == 1 else torch.ones(len(inputs), 4))

    model.forward = forward
    with pytest.raises(RuntimeError, match=r"'0' \(Linear\) got a gradient from the loss but none with"):
        kfqn.KFAC(model).step(kfqn.closure(model, x, y, F.cross_entropy))


def test_a_factor_that_is_not_finite_keeps_its_last_inverse():
    model, data = mlp(), batches((5,), 4)
    optimizer = kfqn.KFAC(model, inverse_interval=1)
    steps(optimizer, model, data[:2])
    state = optimizer.state[model[0].weight]
    state["Omega"][0, 0] = math.inf
    before = state["H_Omega"].clone()
    steps(optimizer, model, data[2:3])
    assert torch.equal(state["H_Omega"], before)


def test_targets_follow_the_seed_and_leave_torchs_random_state_alone():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model, data = mlp(), batches((5,), 3)
        optimizer = kfqn.KFAC(model, seed=seed)
        state = torch.get_rng_state()
        steps(optimizer, model, data)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(optimizer.state[model[0].weight]["Gamma"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_every_pass_runs_under_the_autocast_around_the_step():
    model, ((x, target),) = mlp(), batches((5,), 1)
    optimizer, seen = kfqn.KFAC(model.float()), []
    model[0].register_forward_hook(lambda _module, _inputs, h: seen.append(h.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(kfqn.closure(model, x.float(), target, F.cross_entropy))
    assert seen == [torch.bfloat16] * 3
    assert optimizer.state[model[0].weight]["Gamma"].dtype == torch.float32
