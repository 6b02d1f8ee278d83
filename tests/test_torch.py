"""What PyTorch expects of any optimizer, and what its own tools do with one."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from cases import batches, closure, grouped, mlp, odd_cnn
from test_contract import OPTIMIZERS, TWO_PASS, same_weights, snapshot, train, unchanged
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

import kfqn


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


# Hooks, groups, gradients.


def test_hooks_of_torch_run_in_their_order(make):
    model = mlp()
    optimizer, calls = make(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after the step"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))
    train(model, optimizer, batches((5,), 1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [
        f"{when} {what}" for what in ("the step", "saving", "loading") for when in ("before", "after")
    ]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make, set_to_none):
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, batches((5,), 1))
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()


def test_gradients_of_zero_change_nothing_before_the_first_pass(make):
    model = mlp()
    optimizer = make(model)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert unchanged(before, model.state_dict())
    train(model, optimizer, batches((5,), 2))
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_parameters_that_are_not_contiguous(make):
    model, data = odd_cnn(), batches((2, 6, 6), 4)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data = (
            p.data.t().contiguous().t()
            if p.ndim == 2
            else p.data.transpose(0, -1).contiguous().transpose(0, -1)
        )
    assert any(not p.is_contiguous() for p in twin.parameters())
    optimizer, theirs = make(model, lr=0.1), make(twin, lr=0.1)
    train(model, optimizer, data)
    train(twin, theirs, data)
    torch.testing.assert_close(snapshot(twin, theirs)[0], snapshot(model, optimizer)[0], rtol=1e-3, atol=1e-5)


def test_state_dicts_are_deterministic_and_loading_changes_nothing(make):
    data, found = batches((2, 6, 6), 3), []
    for _ in range(2):
        torch.manual_seed(1)
        model = odd_cnn()
        optimizer = make(model)
        train(model, optimizer, data)
        optimizer.load_state_dict(optimizer.state_dict())
        found.append(optimizer.state_dict())
    assert repr(found[0]) == repr(found[1])
    assert [*found[0]["state"]] == [*found[1]["state"]]
    torch.load(io.BytesIO(_saved(found[0])), weights_only=True)


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_the_step_has_torch_s_signature():
    for method in (kfqn.KFBFGS, kfqn.KFLBFGS, kfqn.ConvergentKFLBFGS, kfqn.KFAC):
        assert [*inspect.signature(method.step).parameters] == ["self", "closure"]
        assert issubclass(method, torch.optim.Optimizer)


def test_a_learning_rate_may_be_a_tensor(make):
    model, data = mlp(), batches((5,), 3)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model, lr=0.5), make(twin, lr=torch.tensor(0.5))
    train(model, optimizer, data)
    train(twin, theirs, data)
    assert same_weights(model, twin)


# Schedulers.

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "OneCycleLR, lr alone": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_does_to_every_group_what_it_does_to_sgd(name):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = kfqn.KFBFGS(model, lr=0.4, others=lambda p: torch.optim.SGD(p, lr=0.2))
    alike = [{"params": [*mlp().parameters()], "lr": lr} for lr in (0.4, 0.2)]
    sgd = torch.optim.SGD(alike, momentum=0.9)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](sgd)
    for data in batches((5,), 4):
        train(model, optimizer, [data])
        sgd.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in sgd.param_groups]


# Copies of the model, and the model elsewhere.


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle"])
def test_a_copy_of_the_model_carries_nothing_of_the_optimizer(make, how):
    model, data = mlp(), batches((5,), 3)
    optimizer = make(model)
    train(model, optimizer, data)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        twin = torch.load(io.BytesIO(_saved(model)), weights_only=False)
        assert len(_saved(model)) < len(_saved(mlp())) + 2000
    before = snapshot(model, optimizer)
    F.cross_entropy(twin(data[0][0]), data[0][1]).backward()
    assert not optimizer.training.recorder.waiting
    theirs = make(twin)
    train(twin, theirs, data)
    assert unchanged(before, snapshot(model, optimizer))


def test_averaged_models_of_torch(make):
    model, data = mlp(), batches((5,), 4)
    optimizer, average = make(model), AveragedModel(model)
    for batch in data:
        train(model, optimizer, [batch])
        average.update_parameters(model)
    assert not same_weights(model, average.module)
    assert average(data[0][0]).isfinite().all()


def test_the_state_follows_the_model_into_another_type(make):
    model, data = mlp(), batches((5,), 4)
    optimizer = make(model)
    train(model, optimizer, data[:2])
    model.double()
    train(model, optimizer, [(x.double(), y) for x, y in data[2:]])
    factors = [
        v for s in optimizer.state.values() for k, v in s.items() if k.startswith(("H", "DW", "S", "s_"))
    ]
    assert {v.dtype for v in factors} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_state_follows_the_model_to_another_device(make):
    model, data = mlp(), batches((5,), 4)
    optimizer = make(model)
    train(model, optimizer, data[:2])
    model.cuda()
    losses = train(model, optimizer, [(x.cuda(), y.cuda()) for x, y in data[2:]])
    assert all(loss.isfinite() for loss in losses)


# Resuming by other means, and from other shapes.


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning")
def test_distributed_checkpoint_resumes_to_the_bit(make, k, tmp_path):
    data, build = batches((4, 5, 5), 6), grouped
    model = build()
    optimizer = make(model, lr=0.2)
    train(model, optimizer, data[:k])
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")
    train(model, optimizer, data[k:])

    twin = build()
    theirs = make(twin, lr=0.2)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(twin, theirs), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
    set_state_dict(twin, theirs, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(twin, theirs, data[k:])
    assert unchanged(snapshot(model, optimizer)[0], snapshot(twin, theirs)[0])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert unchanged(optimizer.state[p], theirs.state[q])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_asking_for_the_state_of_a_fresh_optimizer_leaves_it_fresh(make):
    """torch.distributed.checkpoint takes a step with lr 0 and gradients of zero to see the state."""
    data = batches((4, 5, 5), 3)
    model = grouped()
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model, lr=0.2), make(twin, lr=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, state = get_state_dict(twin, theirs)
    assert state["state"].keys() >= {"0.weight", "2.weight"}
    train(model, optimizer, data)
    train(twin, theirs, data)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_history_of_another_size_is_taken_as_it_is():
    model, data = mlp(), batches((5,), 12)
    optimizer = kfqn.KFLBFGS(model, history_size=3)
    train(model, optimizer, data[:6])
    twin = copy.deepcopy(model)
    theirs = kfqn.KFLBFGS(twin, history_size=9)
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.param_groups[0]["history_size"] == 3
    train(model, optimizer, data[6:])
    train(twin, theirs, data[6:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


LATER = ("clip", "decoupled_weight_decay", "bias_decay", "momentum", "mu1")


@pytest.mark.parametrize("missing", [*((key,) for key in LATER), LATER], ids=" ".join)
def test_a_state_of_an_earlier_version_has_the_defaults_of_what_it_lacks(make, missing):
    """In a group of layers; that of the others is what its own class makes of it."""
    model, data = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), batches((5,), 6)
    optimizer = make(model)
    train(model, optimizer, data[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    for key in missing:
        saved["param_groups"][0].pop(key, None)
    saved["param_groups"][1].pop("maximize")
    before = copy.deepcopy(saved)
    theirs = make(twin := copy.deepcopy(model))
    theirs.load_state_dict(saved)
    assert repr(saved) == repr(before)
    for key in missing:
        assert theirs.param_groups[0].get(key) == theirs.defaults.get(key)
    assert theirs.param_groups[1]["maximize"] is False
    assert theirs.param_groups[0].keys() == optimizer.param_groups[0].keys()
    losses = train(twin, theirs, data[3:])
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("name", TWO_PASS)
def test_the_state_of_another_method_is_refused_also_without_its_settings(name):
    """What a state lacks is filled in, and the shapes still tell whose it is."""
    model = mlp()
    kfac = kfqn.KFAC(model, averaging=0.9)
    train(model, kfac, batches((5,), 1))
    saved = kfac.state_dict()
    optimizer = TWO_PASS[name](mlp())
    before = snapshot(optimizer.training.groups.model, optimizer)
    saved["param_groups"][0] = {"params": saved["param_groups"][0]["params"]}
    with pytest.raises(ValueError, match="this state is not "):
        optimizer.load_state_dict(saved)
    assert unchanged(before, snapshot(optimizer.training.groups.model, optimizer))


def test_steps_that_were_saved_as_plain_numbers(make):
    model, data = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), batches((5,), 6)
    optimizer = make(model)
    train(model, optimizer, data[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    twin = copy.deepcopy(model)
    theirs = make(twin)
    theirs.load_state_dict(saved)
    train(model, optimizer, data[3:])
    train(twin, theirs, data[3:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


# Defaults of torch, and models of several types.


@pytest.fixture
def nowhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_the_default_device_is_none_of_an_optimizer_s_business(make, nowhere):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 4, device="cpu"), nn.BatchNorm1d(4, device="cpu"))
    optimizer = make(model)
    warm = torch.randn(7, 5, device="cpu"), torch.zeros(7, dtype=torch.long, device="cpu")
    optimizer.warm_start([closure(model, optimizer, *warm)])
    for _ in range(3):
        optimizer.step(closure(model, optimizer, *warm))
    optimizer.load_state_dict(optimizer.state_dict())
    loss = optimizer.step(closure(model, optimizer, *warm))
    assert loss.isfinite()
    assert {v.device.type for s in optimizer.state.values() for v in s.values()} == {"cpu"}
    if not isinstance(optimizer, kfqn.KFAC):
        loss = F.cross_entropy(model(warm[0]), warm[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if optimizer.second_pass_due:
            with optimizer.second_pass(loss.item()) as again:
                again.loss = F.cross_entropy(model(warm[0]), warm[1])
                again.loss.backward()


class Mixed(nn.Module):
    """Layers of several types, one after the other."""

    def __init__(self, types):
        super().__init__()
        sizes = [5, 6, 4, 3]
        self.layers = nn.ModuleList(
            nn.Linear(i, o, dtype=dtype) for i, o, dtype in zip(sizes[:-1], sizes[1:], types, strict=True)
        )
        self.norm = nn.LayerNorm(6, dtype=torch.float64)

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
            x = self.norm(x.double()) if k == 0 else x
        return x.double()


@pytest.mark.parametrize(
    "types",
    [
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float64),
    ],
)
def test_layers_of_several_types_in_one_model(make, types):
    model, ((x, target),) = Mixed(types), batches((5,), 1, size=17)
    optimizer = make(model, weight_decay=1e-3)
    losses = train(model, optimizer, [(x, target)] * 30)
    assert losses[-1] < losses[0]
    for layer, dtype in zip(optimizer.layers, types, strict=True):
        kept = torch.promote_types(dtype, torch.float32)
        assert {v.dtype for k, v in optimizer.state[layer.weight].items() if k.startswith("H_")} <= {kept}
        assert layer.weight.dtype == dtype
    train(model, optimizer, [(x, target)])
    twin, theirs = copy.deepcopy((model, optimizer))
    theirs.load_state_dict(optimizer.state_dict())
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_state_can_be_loaded_again_and_into_a_copy(make):
    model, data = mlp(), batches((5,), 4)
    optimizer = make(model)
    train(model, optimizer, data)
    state = copy.deepcopy(optimizer.state_dict())
    theirs = make(mlp())
    for target in (optimizer, optimizer, theirs, copy.deepcopy(theirs)):
        target.load_state_dict(state)
        assert repr(target.state_dict()) == repr(state)


def test_a_float32_model_goes_on_from_the_state_of_a_bfloat16_one(make):
    model = mlp().to(torch.bfloat16)
    optimizer = make(model)
    train(model, optimizer, batches((5,), 3, dtype=torch.bfloat16))
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    theirs = make(twin)
    theirs.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(value, theirs.state[q][key])
    train(twin, theirs, batches((5,), 3))


@pytest.mark.parametrize("method", TWO_PASS)
def test_torch_func_sees_the_model_as_if_nobody_watched(method):
    model, x = mlp(), torch.randn(4, 5)
    expected = torch.func.vmap(torch.func.jacrev(model))(x)
    optimizer = TWO_PASS[method](model)
    assert torch.equal(torch.func.vmap(torch.func.jacrev(model))(x), expected)
    assert not optimizer.training.recorder.waiting
