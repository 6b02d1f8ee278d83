"""Parameters that belong to no layer: which they are, and that a torch optimizer trains them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import Kept, KeptConvolution, batches
from foreign import Conv1D
from test_contract import OPTIMIZERS, snapshot, train, unchanged
from torch import nn

import kfqn
from kfqn.parameters.discovery import layers_of


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


class Scaled(nn.Linear):
    """A subclass with its own forward may compute anything."""

    def forward(self, x):
        return 2 * super().forward(x)


class Padded(nn.Conv1d):
    """The same, where a convolution is done."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 0)), weight, bias)


def tied(biases=False):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    if biases:
        model[2].bias = model[0].bias
    return model


def tied_embedding():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    model[1].weight = model[0].weight
    return model


def tied_to_a_subclass():
    model = nn.Sequential(nn.Linear(3, 3), Kept(3, 3))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    return model


def tied_with_another_stride():
    model = nn.Sequential(nn.Conv1d(3, 3, 2), nn.Conv1d(3, 3, 2, stride=2), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def frozen(key):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    getattr(model[1], key).requires_grad_(False)
    return model


def with_extra_parameter():
    layer = nn.Linear(3, 3)
    layer.scale = nn.Parameter(torch.ones(()))
    return nn.Sequential(layer)


def beside(module):
    return lambda: nn.Sequential(nn.Linear(3, 3), module())


PLANS = {  # name: model, its layers, the other parameters
    "batch norm": (beside(lambda: nn.BatchNorm1d(3)), ["0"], ["1.weight", "1.bias"]),
    "groups": (beside(lambda: nn.Conv2d(4, 4, 1, groups=2)), ["0", "1"], []),
    "embedding": (beside(lambda: nn.Embedding(3, 2)), ["0"], ["1.weight"]),
    "transposed convolution": (beside(lambda: nn.ConvTranspose1d(2, 3, 2)), ["0"], ["1.weight", "1.bias"]),
    "subclass with its own forward": (beside(lambda: Scaled(3, 3)), ["0"], ["1.weight", "1.bias"]),
    "subclass with its own convolution": (beside(lambda: Padded(3, 3, 1)), ["0"], ["1.weight", "1.bias"]),
    "subclass": (beside(lambda: Kept(3, 3)), ["0", "1"], []),
    "subclass of a convolution": (beside(lambda: KeptConvolution(3, 3, 2)), ["0", "1"], []),
    "transposed": (beside(lambda: Conv1D(3, 3)), ["0", "1"], []),
    "transposed, subclass": (beside(lambda: type("Mine", (Conv1D,), {})(3, 3)), ["0", "1"], []),
    "transposed, another forward": (
        beside(lambda: type("Mine", (Conv1D,), {"forward": lambda self, x: x})(3, 3)),
        ["0"],
        ["1.weight", "1.bias"],
    ),
    "another package's": (
        beside(lambda: type("Conv1D", (nn.ConvTranspose1d,), {})(2, 3, 2)),
        ["0"],
        ["1.weight", "1.bias"],
    ),
    "attention": (
        beside(lambda: nn.MultiheadAttention(2, 1)),
        ["0"],
        ["1.in_proj_weight", "1.in_proj_bias", "1.out_proj.weight", "1.out_proj.bias"],
    ),
    "tied to a subclass": (tied_to_a_subclass, ["0, 1"], []),
    "spectral norm": (
        beside(lambda: nn.utils.spectral_norm(nn.Linear(3, 3))),
        ["0"],
        ["1.bias", "1.weight_orig"],
    ),
    "weight norm": (
        beside(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
        ["0"],
        ["1.bias", "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"],
    ),
    "a parameter more": (
        lambda: nn.Sequential(nn.Linear(3, 3), *with_extra_parameter()),
        ["0"],
        ["1.weight", "1.bias", "1.scale"],
    ),
    "tied": (tied, ["0, 2", "1"], ["0.bias", "2.bias"]),
    "tied, biases too": (lambda: tied(biases=True), ["0, 2", "1"], []),
    "tied to an embedding": (tied_embedding, ["2"], ["0.weight", "1.bias"]),
    "tied, not alike": (tied_with_another_stride, ["2"], ["0.weight", "0.bias", "1.bias"]),
    "frozen bias": (lambda: frozen("bias"), ["0", "1"], []),
    "frozen weight": (lambda: frozen("weight"), ["0"], ["1.bias"]),
}


@pytest.mark.filterwarnings("ignore:.*trainable parameters get factors:RuntimeWarning")
@pytest.mark.parametrize("name", PLANS)
def test_every_trainable_parameter_is_trained_by_one_rule(name):
    make, expected_layers, expected_others = PLANS[name]
    model = make()
    optimizer = kfqn.KFBFGS(model)
    assert [layer.name for layer in layers_of(model)] == expected_layers
    assert len(optimizer.param_groups) == 1 + bool(expected_others)
    names = {p: name for name, p in model.named_parameters()}
    others = [names[p] for group in optimizer.param_groups[1:] for p in group["params"]]
    assert sorted(others) == sorted(expected_others)
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, ours)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    plan = optimizer.plan()
    for layer in expected_layers:
        assert f"{layer} " in plan
    assert plan.count("KFBFGS") == len(expected_layers)
    assert plan.count("AdamW") == len(expected_others)


def resnet_like():
    """BatchNorm, a depthwise convolution and an affine head; input (2, 6, 6)."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True)


def test_others_follow_their_own_optimizer_to_the_bit(make):
    """With layers that cannot move (lr → 0), the others do what torch's optimizer does alone."""
    model, data = resnet_like(), batches((2, 6, 6), 5)
    twin = copy.deepcopy(model)
    optimizer = make(model, lr=1e-38, others=adam)
    names = ["1.weight", "1.bias"]
    alone = adam([dict(twin.named_parameters())[name] for name in names])
    for x, target in data:
        train(model, optimizer, [(x, target)])
        twin.zero_grad()
        F.cross_entropy(twin(x), target).backward()
        alone.step()
    for name in names:
        assert torch.equal(dict(model.named_parameters())[name], dict(twin.named_parameters())[name])
    for key, value in twin.state_dict().items():  # BatchNorm's statistics moved once a step
        assert torch.equal(model.state_dict()[key], value), key


def test_a_net_with_batch_norm_trains(make):
    model, ((x, target),) = resnet_like(), batches((2, 6, 6), 1, size=17)
    losses = train(model, make(model, others=adam), [(x, target)] * 60)
    assert losses[-1] < 0.3 * losses[0]


def test_the_groups_hold_what_each_rule_reads_and_schedulers_reach_all(make):
    optimizer = make(resnet_like(), lr=0.4, others=adam)
    ours, theirs = optimizer.param_groups
    assert "damping" in ours
    assert "damping" not in theirs
    assert "amsgrad" in theirs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    data = batches((2, 6, 6), 1)
    train(optimizer.training.groups.model, optimizer, data)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.005]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_resuming_is_bit_identical_with_others(make, k, tmp_path):
    data = batches((2, 6, 6), 6)
    model = resnet_like()
    optimizer = make(model, lr=0.2, others=adam)
    train(model, optimizer, data[:k])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, data[k:])
    resumed_model = resnet_like()
    resumed = make(resumed_model, lr=99.0, others=adam)
    saved = torch.load(tmp_path / "saved.pt")
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed_model, resumed, data[k:])
    for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert unchanged(snapshot(model, optimizer)[1], snapshot(resumed_model, resumed)[1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_goes_on_by_itself(make, how):
    data = batches((2, 6, 6), 6)
    model = resnet_like()
    optimizer = make(model, lr=0.2, others=torch.optim.Adam)
    train(model, optimizer, data[:3])
    pair = (model, optimizer)
    twin, theirs = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = snapshot(model, optimizer)
    train(twin, theirs, data[3:])
    assert unchanged(before, snapshot(model, optimizer))
    train(model, optimizer, data[3:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_state_without_the_others_is_refused(make):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    plain = make(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make(model).load_state_dict(plain.state_dict())


def test_a_frozen_bias_leaves_a_layer_without_homogeneous_coordinate():
    model, data = frozen("bias"), batches((3,), 3)
    before = model[1].bias.clone()
    optimizer = kfqn.KFBFGS(model, lr=0.1)
    losses = train(model, optimizer, data[:1] * 20)
    assert losses[-1] < losses[0]
    assert torch.equal(model[1].bias, before)
    assert optimizer.state[model[1].weight]["H_A"].shape == (3, 3)
    assert optimizer.state[model[0].weight]["H_A"].shape == (4, 4)


def test_sparse_gradients_of_an_embedding(make):
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = make(model, others=lambda p: torch.optim.SparseAdam(p, lr=0.1))
    before = model[0].weight.clone()
    words, target = torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1])
    train(model, optimizer, [(words, target)] * 2)
    moved = (model[0].weight != before).any(1)
    assert moved.tolist() == [True] * 3 + [False] * 3


class Words(nn.Module):
    """Bags of words with sparse gradients, and a normalisation with dense ones."""

    def __init__(self, module):
        super().__init__()
        self.words, self.norm = module, nn.LayerNorm(4)
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        words = self.words(x) if isinstance(self.words, nn.EmbeddingBag) else self.words(x).mean(1)
        return self.head(torch.tanh(self.hidden(self.norm(words))))


@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_without_a_word_about_others(make, module, tmp_path):
    """Sparse gradients do what they do under SparseAdam alone, and those of the rest what AdamW does."""
    model = Words(module(9, 4, sparse=True))
    twin, data = copy.deepcopy(model), [(torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1]))] * 4
    optimizer = make(model, lr=1e-38)
    alone = (
        torch.optim.SparseAdam([twin.words.weight], lr=1e-3),
        torch.optim.AdamW(twin.norm.parameters(), lr=1e-3, weight_decay=0.0),
    )
    for x, target in data:
        train(model, optimizer, [(x, target)])
        twin.zero_grad()
        F.cross_entropy(twin(x), target).backward()
        for theirs in alone:
            theirs.step()
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-7)
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    other = copy.deepcopy(model)
    resumed = make(other, lr=1e-38)
    resumed.load_state_dict(torch.load(tmp_path / "saved.pt"))
    train(model, optimizer, data[:2])
    train(other, resumed, data[:2])
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("others", [torch.optim.AdamW, torch.optim.NAdam])
def test_others_that_take_no_sparse_gradients_are_refused_at_once(others):
    message = rf"others makes {others.__name__}, which takes no sparse gradients, and 'words' \(Embedding\)"
    model = Words(nn.Embedding(9, 4, sparse=True))
    with pytest.raises(ValueError, match=message):
        kfqn.KFBFGS(model, others=others)
    model.words.requires_grad_(False)
    kfqn.KFBFGS(model, others=others)


@pytest.mark.parametrize("wrong", [3, torch.optim.LBFGS, torch.optim.SGD([torch.zeros(1)], lr=0.1)])
def test_others_that_cannot_be_used_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^others (must be a function|cannot be torch\.optim\.LBFGS)"):
        kfqn.KFBFGS(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), others=wrong)
