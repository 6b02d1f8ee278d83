"""What is said when an optimizer is built: of models it cannot train or finds few layers in, of arguments."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import batches, mlp, odd_cnn
from foreign import Conv1D, DTensor, FullyShardedDataParallel
from test_contract import OPTIMIZERS, train
from torch import nn

import kfqn


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


# No model.

INSTEAD = {
    "parameters": lambda model: model.parameters(),
    "a list of parameters": lambda model: [*model.parameters()],
    "one parameter": lambda model: model[0].weight,
    "named parameters": lambda model: model.named_parameters(),
    "groups": lambda model: [{"params": model.parameters(), "lr": 0.1}],
    "a dictionary": lambda model: model.state_dict(),
    "two models": lambda model: (model, mlp()),
    "a class": lambda model: nn.Linear,
    "nothing": lambda model: None,
    "a number": lambda model: 3,
    "an empty list": lambda model: [],
}


@pytest.mark.parametrize("name", INSTEAD)
def test_the_model_is_asked_for_in_one_sentence(make, name):
    with pytest.raises(TypeError, match=r"^KF\w+|^Conv\w+ takes the model itself") as raised:
        make(INSTEAD[name](mlp()))
    assert "(model), not" in str(raised.value)


@pytest.mark.parametrize("setting", ["lr", "damping", "beta", "weight_decay"])
@pytest.mark.parametrize("value", [None, "large", (0.9, 0.999), {}])
def test_a_setting_that_is_no_number_is_refused(make, setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must be "):
        make(mlp(), **{setting: value})


# Sharded models.


def sharded_later():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = DTensor(torch.randn(3, 3))
    return model


SHARDED = {
    "'the model itself' is a FullyShardedDataParallel": lambda: FullyShardedDataParallel(mlp()),
    "'1' is a FullyShardedDataParallel": lambda: nn.Sequential(
        nn.Linear(3, 3), FullyShardedDataParallel(mlp())
    ),
    r"'1\.weight' is a DTensor": sharded_later,
}


@pytest.mark.parametrize("where", SHARDED)
def test_a_sharded_model_is_refused_by_name(make, where):
    with pytest.raises(ValueError, match=f"cannot train a sharded model.*{where}.*DistributedDataParallel"):
        make(SHARDED[where]())


def test_a_model_that_is_sharded_later_gets_no_group():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = kfqn.KFBFGS(model)
    model[0].weight = DTensor(model[0].weight.detach())
    with pytest.raises(ValueError, match="cannot train a sharded model"):
        optimizer.add_param_group({"modules": "0"})
    assert len(optimizer.param_groups) == 1


# Layers too wide for factors.


@pytest.mark.parametrize("arguments", [(2**15, 2), (2, 2**15 + 1)])
def test_a_factor_that_nobody_can_mean_is_refused_before_it_is_made(arguments):
    model = nn.Sequential(nn.Linear(*arguments), nn.Tanh(), nn.Linear(arguments[1], 2, bias=False))
    for method in (kfqn.KFBFGS, kfqn.KFAC):
        with pytest.raises(
            ValueError, match=r"'[02]' \(Linear\) needs a factor of 32769 × 32769, 4 GiB"
        ) as error:
            method(model, lr=0.1, damping=1.0)
        instead = "max_factor_size" if method is kfqn.KFBFGS else "'first_order': True"
        assert instead in str(error.value)
    kfqn.KFBFGS(model)
    for largest in (256, 2**16):
        assert "32769" in kfqn.KFBFGS(model, lr=0.1, max_factor_size=largest).plan()
    wide = {"modules": ["0", "2"], "first_order": True}
    with pytest.raises(ValueError, match="no trainable Linear"):
        kfqn.KFAC(model, groups=[wide])


# Models of which most gets no factors.


class Recurrent(nn.Module):
    """An LSTM, and a head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


FEW = {
    "an LSTM": (Recurrent, r"KFBFGS: only 5% of 507 .* trains 'body' \(LSTM\) with 480: build"),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8),
        r"only \d+% of .* trains 'self_attn' \(MultiheadAttention\) with 216, "
        r"'self_attn.out_proj' \(NonDynamicallyQuantizableLinear\) with 72, 'norm1' \(LayerNorm\) with 16, "
        r"'norm2' \(LayerNorm\) with 16: build",
    ),
    "words": (
        lambda: nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(8, 3)),
        r"only 12% of 227 .* trains '0' \(Embedding\) with 200: build",
    ),
    "many": (
        lambda: nn.Sequential(nn.Linear(2, 2), *(nn.BatchNorm1d(n) for n in range(2, 9))),
        r"trains '7' \(BatchNorm1d\) with 16, '6' .*, '5' .*, '4' .* and 3 more modules",
    ),
}


@pytest.mark.parametrize("name", FEW)
def test_where_most_parameters_get_no_factors_that_is_said(name):
    make, message = FEW[name]
    with pytest.warns(RuntimeWarning, match=message) as said:
        kfqn.KFBFGS(make())
    assert len(said) == 1
    assert said[0].filename == __file__


def test_nothing_is_said_of_what_is_meant_or_frozen_or_has_factors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (odd_cnn(), nn.Sequential(Conv1D(4, 4), nn.LayerNorm(4)), nn.Linear(3, 3)):
            kfqn.KFBFGS(model)
        kfqn.KFBFGS(Recurrent(), groups=[{"modules": "body", "first_order": True, "lr": 1e-3}])
        model = Recurrent()
        kfqn.KFBFGS(model, groups=[{"params": model.body.parameters(), "first_order": True}])
        model.body.requires_grad_(False)
        kfqn.KFBFGS(model)


# A model that is one layer.


@pytest.mark.parametrize(
    ("build", "name"), [(lambda: nn.Linear(5, 3), "Linear"), (lambda: Conv1D(3, 5), "Conv1D")]
)
def test_a_model_that_is_a_layer_is_called_by_its_class(make, build, name):
    model = build()
    optimizer = make(model)
    losses = train(model, optimizer, batches((5,), 1) * 10)
    assert losses[-1] < losses[0]
    found = optimizer.diagnostics()
    assert found.keys() == {"", name}
    assert found[""]["refused"] == 0
    assert found[name]["steps"] == 10
    assert f"\n{name} " in optimizer.plan()


# Layers of which the loss does not reach everything.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_of_derivatives_alone_trains(dtype):
    """The last bias, and the output itself, then have no gradient."""
    model = nn.Sequential(nn.Linear(3, 16), nn.Softplus(), nn.Linear(16, 16), nn.Tanh(), Conv1D(1, 16)).to(
        dtype
    )
    x, forces = torch.randn(32, 3, dtype=dtype), torch.randn(32, 3, dtype=dtype)
    optimizer = kfqn.KFBFGS(model)

    def evaluate():
        optimizer.zero_grad()
        at = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(at).sum(), at, create_graph=True)
        loss = (slope - torch.sin(forces)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(evaluate).item() for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    taken = optimizer.diagnostics()
    assert taken["4"]["steps"] == 60
    assert taken["4"]["A taken"] > 0
    assert taken["0"]["A taken"] > 0


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.filterwarnings("ignore:.*learns nothing about curvature:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*nothing is learnt about curvature:RuntimeWarning")
def test_a_missing_gradient_is_a_gradient_of_zero(make, missing):
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    for model, zero in zip(models, (True, False), strict=True):
        torch.manual_seed(3)
        optimizer = make(model, lr=0.1)
        for k, (x, target) in enumerate(batches((5,), 8)):
            if k % 2 == 0:
                train(model, optimizer, [(x, target)])
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            p = getattr(model[2], missing)
            p.grad = torch.zeros_like(p) if zero else None
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
