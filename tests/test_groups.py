"""Settings for some modules, modules sent to the first-order rule, groups that come later."""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import batches, grouped, mlp, odd_cnn, transposed
from test_contract import OPTIMIZERS, snapshot, train, unchanged
from torch import nn

import kfqn


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


@pytest.mark.usefixtures("double")
def test_every_layer_follows_the_settings_of_its_group():
    """Against optimizers that have the same settings for all layers."""
    model = odd_cnn()
    names = ["0", "2", "4", "7"]
    settings = [
        {"lr": 0.5, "damping": 0.3, "weight_decay": 0.0},
        {"lr": 0.1, "damping": 2.0, "weight_decay": 0.01},
        {"lr": 0.5, "damping": 0.3, "weight_decay": 0.0},
        {"lr": 1.5, "damping": 1.0, "weight_decay": 0.1},
    ]
    groups = [{"modules": names[i], **settings[i]} for i in (1, 3)]
    optimizer = kfqn.KFBFGS(model, **settings[0], groups=groups)
    assert len(optimizer.param_groups) == 3
    for x, target in batches((2, 6, 6), 6):
        before = copy.deepcopy(model)
        states = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, [(x, target)])
        for of_layer, name in zip(settings, names, strict=True):
            # An optimizer with this layer's settings for all, from the same state, moves it alike.
            twin = copy.deepcopy(before)
            alone = kfqn.KFBFGS(twin, **settings[0], groups=copy.deepcopy(groups))
            alone.load_state_dict(states)
            for group in alone.param_groups:
                group |= of_layer
            train(twin, alone, [(x, target)])
            got, expected = model.get_submodule(name).weight, twin.get_submodule(name).weight
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def by_dimension(model, of_biases=0.0, **settings):
    """Two groups as nanoGPT makes them: matrices with weight decay, and the rest without or with less."""
    return [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1, **settings},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": of_biases, **settings},
    ]


DECAYED = {
    "KFBFGS": (kfqn.KFBFGS, oracle.Algorithm2, {}),
    "KFLBFGS": (kfqn.KFLBFGS, oracle.Algorithm2, {"history_size": 6}),
    "ConvergentKFLBFGS": (kfqn.ConvergentKFLBFGS, oracle.Algorithm3, {"history_size": 6}),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("of_biases", [0.0, 0.04])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("net", [odd_cnn, grouped, transposed])
@pytest.mark.parametrize("name", DECAYED)
def test_biases_may_have_a_weight_decay_of_their_own(name, net, decoupled, of_biases):
    (method, algorithm, more), model = DECAYED[name], net()
    settings = {"lr": 0.5, "damping": 0.3, "beta": 0.8, "mu1": 0.25}
    decays = (0.0, 0.5 * 0.1) if decoupled else (0.1, 0.0)
    history = {"history": 6} if more else {}
    reference = algorithm(model, F.cross_entropy, **settings, weight_decay=decays[0], **history)
    reference.decoupled, reference.bias_decay = decays[1], of_biases / 0.1
    groups = by_dimension(model, of_biases)
    optimizer = method(model, **settings, **more, decoupled_weight_decay=decoupled, groups=groups)
    assert all(layer.bias is not None for layer in optimizer.layers if layer.modules[0].bias is not None)
    shape = {odd_cnn: (2, 6, 6), grouped: (4, 5, 5), transposed: (3, 5)}[net]
    for x, target in batches(shape, 8):
        reference.step(x, target)
        train(model, optimizer, [(x, target)])
    for got, W in zip(oracle.matrices(model), reference.W, strict=True):
        torch.testing.assert_close(got, W, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_pulls_on_what_it_is_given_for(make, decoupled):
    """Without a loss that could tell: gradients of zero, and the decay is all there is."""
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    nn.init.ones_(model[2].bias)
    twins = copy.deepcopy(model), copy.deepcopy(model)
    data = batches((5,), 6)
    for twin, of_biases in zip(twins, (0.0, 0.1), strict=True):
        groups = by_dimension(twin, of_biases, decoupled_weight_decay=decoupled)
        train(twin, make(twin, lr=0.05, groups=groups), data)
    assert twins[0][2].bias.norm() > twins[1][2].bias.norm()


def test_groups_by_dimension_train_and_resume(make):
    model, data = mlp(), batches((5,), 8)
    optimizer = make(model, groups=by_dimension(model))
    assert len(optimizer.layers) == 2
    assert [group["bias_decay"] for group in optimizer.param_groups] == [0.0]
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    theirs = make(twin, groups=by_dimension(twin))
    train(model, optimizer, data[:4])
    twin.load_state_dict(model.state_dict())
    theirs.load_state_dict(optimizer.state_dict())
    train(model, optimizer, data[4:])
    train(twin, theirs, data[4:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_weights_and_biases_whose_groups_differ_in_more_are_refused_by_name():
    model = mlp()
    wrong = by_dimension(model)
    wrong[1]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"weight and bias of '2' \(Linear\) .* differ in lr, .*automatic"):
        kfqn.KFBFGS(model, groups=wrong)
    with pytest.raises(ValueError, match=r"'2' \(Linear\) .* differ in beta: put both into one group"):
        kfqn.KFBFGS(model, groups=[{"params": model[2].weight, "beta": 0.5}])
    with pytest.raises(ValueError, match=r"'2' \(Linear\) .* weight_decay, and the weight has none"):
        kfqn.KFBFGS(model, weight_decay=0.0, groups=[{"params": model[2].bias, "weight_decay": 0.5}])
    with pytest.raises(ValueError, match="some parameters appear in more than one group"):
        kfqn.KFBFGS(model, groups=[{"modules": "2"}, {"params": model[2].bias}])


def test_a_bias_for_the_other_rule_leaves_the_layer_its_factors(make):
    model, data = mlp(), batches((5,), 4)
    optimizer = make(model, groups=[{"params": model[2].bias, "first_order": True, "lr": 0.01}])
    assert [layer.columns for layer in optimizer.layers] == [5, 6]
    before = model[2].bias.clone()
    losses = train(model, optimizer, data[:1] * 20)
    assert losses[-1] < losses[0]
    assert "exp_avg" in optimizer.state[model[2].bias]
    assert not torch.equal(before, model[2].bias)


@pytest.mark.usefixtures("double")
def test_decoupled_weight_decay_shrinks_the_weights_and_stays_out_of_the_gradient():
    model = odd_cnn()
    settings = {"lr": 0.5, "damping": 0.3, "beta": 0.8, "mu1": 0.25}
    reference = oracle.Algorithm2(model, F.cross_entropy, **settings, weight_decay=0.0)
    reference.decoupled = 0.5 * 0.1
    optimizer = kfqn.KFBFGS(model, **settings, weight_decay=0.1, decoupled_weight_decay=True)
    for x, target in batches((2, 6, 6), 8):
        reference.step(x, target)
        train(model, optimizer, [(x, target)])
    for got, W in zip(oracle.matrices(model), reference.W, strict=True):
        torch.testing.assert_close(got, W, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("by", ["name", "module", "list"])
def test_modules_can_be_sent_to_the_first_order_rule(make, by):
    model = odd_cnn()
    modules = {"name": "7", "module": model[7], "list": [model[7], "2"]}[by]
    optimizer = make(model, groups=[{"modules": modules, "first_order": True, "lr": 0.02}])
    twin = copy.deepcopy(model[7])
    train(model, optimizer, batches((2, 6, 6), 1))
    assert model[7].weight in optimizer.state
    assert "exp_avg" in optimizer.state[model[7].weight]
    assert optimizer.param_groups[-1]["lr"] == 0.02
    for p, q in zip(model[7].parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close((p - q).abs(), torch.full_like(p, 0.02))  # the first step of AdamW
    assert optimizer.plan().count("AdamW") == (3 if by == "list" else 2)


def test_what_is_unfrozen_later_can_be_added(make):
    model, data = odd_cnn(), batches((2, 6, 6), 8)
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, data[:2])
    before = model[0].weight.clone()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"modules": "0", "weight_decay": 0.3})
    train(model, optimizer, data[2:])
    assert not torch.equal(model[0].weight, before)
    assert optimizer.param_groups[1]["weight_decay"] == 0.3
    assert optimizer.param_groups[1]["damping"] == optimizer.param_groups[0]["damping"]
    assert optimizer.state[model[0].weight].keys() == optimizer.state[model[2].weight].keys()


def test_parameters_can_be_added_as_torch_does(make):
    """Those of a whole layer become one; a batch normalisation goes to the fallback optimizer."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[:2].requires_grad_(False)
    optimizer = make(model)
    model.requires_grad_(True)
    optimizer.add_param_group({"params": [*model[:2].parameters()]})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]
    losses = train(model, optimizer, batches((5,), 1) * 20)
    assert losses[-1] < losses[0]
    for key in ("0.weight", "1.weight"):
        assert model.get_parameter(key) in optimizer.state


def test_groups_resume_with_their_settings_and_without_a_trace(make, tmp_path):
    def build():
        model = odd_cnn()
        groups = [{"modules": "4", "lr": 0.1}, {"modules": "7", "first_order": True}]
        return model, make(model, lr=0.2, groups=groups)

    data = batches((2, 6, 6), 6)
    model, optimizer = build()
    train(model, optimizer, data[:3])
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    train(model, optimizer, data[3:])
    twin, theirs = build()
    weights, state = torch.load(tmp_path / "saved.pt")
    twin.load_state_dict(weights)
    theirs.load_state_dict(state)
    train(twin, theirs, data[3:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_layer_that_is_added_is_watched_in_copies_too():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = kfqn.KFBFGS(model)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"modules": "0"})
    twin, theirs = copy.deepcopy((model, optimizer))
    data = batches((5,), 3)
    train(model, optimizer, data)
    train(twin, theirs, data)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


WRONG_GROUPS = {
    "the model has no module named 'nine'": {"modules": "nine"},
    "this Linear is not a module of the optimizer's model": {"modules": nn.Linear(2, 2)},
    "lr must be > 0 and finite, got -1": {"modules": "2", "lr": -1},
    "KFBFGS has no setting 'eps' for a group of layers": {"modules": "2", "eps": 1e-8},
    "a group has either 'modules' or 'params'": {"lr": 1.0},
    r"the group \['modules'\] adds nothing": {"modules": "1"},
}


@pytest.mark.parametrize("message", WRONG_GROUPS)
def test_a_wrong_group_gets_one_sentence_and_changes_nothing(message):
    with pytest.raises(ValueError, match=message):
        kfqn.KFBFGS(mlp(), groups=[WRONG_GROUPS[message]])
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = kfqn.KFBFGS(model)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(WRONG_GROUPS[message])
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="adds nothing: its parameters are frozen, or are trained already"):
        optimizer.add_param_group({"modules": "0"})


@pytest.mark.usefixtures("double")
def test_clipping_is_over_the_layers_of_a_group():
    """α² Σ ⟨P, D̂W⟩ is brought down to κ, by one factor for all layers."""
    model = mlp()
    plain, clipped = copy.deepcopy(model), copy.deepcopy(model)
    data = batches((5,), 1)
    kappa = 1e-6
    for twin, settings in ((plain, {}), (clipped, {"clip": kappa})):
        train(twin, kfqn.KFBFGS(twin, lr=30.0, beta=0.0, **settings), data)
    models = (m.parameters() for m in (model, plain, clipped))
    start, *ends = map(nn.utils.parameters_to_vector, models)
    long, short = (end - start for end in ends)
    gradient = torch.cat([p.grad.flatten() for p in clipped.parameters()])
    model_change = -(long @ gradient) * 30.0  # α² ⟨P, D̂W⟩
    scale = (kappa / model_change).sqrt()
    assert scale < 1
    torch.testing.assert_close(short, scale * long, rtol=1e-9, atol=1e-12)
