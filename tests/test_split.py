"""Fused weights, of queries, keys and values or of heads, that are cut into layers of their own."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from foreign import Conv1D
from test_contract import snapshot, unchanged
from torch import nn

import kfqn

WIDTH, HEADS = 6, 2
pytestmark = pytest.mark.usefixtures("double")


class Attention(nn.Module):
    """Causal, with queries, keys and values of all heads from ``project``, which is told the input."""

    def __init__(self, project):
        super().__init__()
        self.project, self.out, self.head = project, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)).tanh().mean(1))


class Side(nn.Module):
    """The same projection by layers side by side, equal to the rows of a fused one."""

    def __init__(self, fused, parts):
        super().__init__()
        weight = fused.weight.T if isinstance(fused, Conv1D) else fused.weight
        self.layers = nn.ModuleList()
        for i, rows in enumerate(weight.detach().chunk(parts)):
            layer = nn.Linear(WIDTH, len(rows), bias=fused.bias is not None)
            layer.weight.data.copy_(rows)
            if fused.bias is not None:
                layer.bias.data.copy_(fused.bias.detach().chunk(parts)[i])
            self.layers.append(layer)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


FUSED = {
    "linear": lambda: nn.Linear(WIDTH, 3 * WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, 3 * WIDTH, bias=False),
    "GPT-2": lambda: Conv1D(3 * WIDTH, WIDTH),
}


def data(n):
    torch.manual_seed(1)
    return [(torch.randn(8, 5, WIDTH), torch.randint(3, (8,))) for _ in range(n)]


def train(model, optimizer, batches):
    for x, target in batches:
        optimizer.step(kfqn.closure(model, x, target, F.cross_entropy))


def make(model, split, **settings):
    return kfqn.KFBFGS(model, groups=[{"modules": "project", "split": split}], **settings)


@pytest.mark.parametrize("largest", ["auto", 4])
@pytest.mark.parametrize("split", [3, 3 * HEADS])
@pytest.mark.parametrize("kind", FUSED)
def test_parts_move_as_layers_of_their_own(kind, split, largest):
    torch.manual_seed(0)
    model = Attention(FUSED[kind]())
    twin = copy.deepcopy(model)
    twin.project = Side(model.project, split)
    settings = {"curvature_interval": 3, "weight_decay": 0.01, "max_factor_size": largest}
    optimizer, reference = make(model, split, **settings), kfqn.KFBFGS(twin, **settings)
    whole = copy.deepcopy(model)
    for batch in data(12):
        train(model, optimizer, [batch])
        train(twin, reference, [batch])
        weight = model.project.weight.T if kind == "GPT-2" else model.project.weight
        parts = torch.cat([layer.weight for layer in twin.project.layers])
        torch.testing.assert_close(weight, parts, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.out.weight, twin.out.weight, rtol=1e-9, atol=1e-11)
    train(whole, kfqn.KFBFGS(whole, **settings), data(12))  # in one they would go elsewhere
    assert (whole.project.weight - model.project.weight).abs().max() > 1e-5
    assert f"{split} × {18 // split} × {optimizer.layers[-1].columns}" in optimizer.plan()


def test_groups_of_a_convolution_are_cut_each():
    """Into parts that hold as many rows of every group, of one length."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 12, 2, groups=2), nn.Flatten(), nn.Linear(48, 3))
    parts = kfqn.Parts(weights=kfqn.steps.weight_average.Latest())
    optimizer = kfqn.KFBFGS(model, weight_decay=0.0, groups=[{"modules": "0", "split": 3}], parts=parts)
    before = optimizer.layers[1].W().detach()
    assert before.shape == (2, 6, 5)
    train(model, optimizer, [(torch.randn(9, 4, 5), torch.randint(3, (9,)))])
    moved = (optimizer.layers[1].W().detach() - before).unflatten(1, (3, 2))
    norms = torch.linalg.vector_norm(moved, dim=(0, 2, 3))
    torch.testing.assert_close(norms, torch.full((3,), 0.06 * (12 / 3 / 3) ** 0.5))


def test_it_goes_on_to_the_bit_and_is_kept_with_the_state(tmp_path):
    torch.manual_seed(0)
    model, batches = Attention(FUSED["linear"]()), data(8)
    optimizer = make(model, 3)
    train(model, optimizer, batches[:4])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    twin = Attention(FUSED["linear"]())
    again = make(twin, 1)
    for one, saved in zip((twin, again), torch.load(tmp_path / "run.pt"), strict=True):
        one.load_state_dict(saved)
    assert sorted(group.get("split", 0) for group in again.param_groups) == [1, 3]
    for one, its in ((model, optimizer), (twin, again)):
        train(one, its, batches[4:])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


WRONG = {
    "split must be a whole number >= 1, got 0": {"split": 0},
    "'project' (Linear) has 18 outputs, which split=4 does not divide": {"split": 4},
    "those of 'project' (Linear) are not, whose lr is a number": {"split": 3, "lr": 1.0},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_cut_is_one_sentence_before_anything_is_changed(said):
    model = Attention(FUSED["linear"]())
    with pytest.raises(ValueError, match=re.escape(said)):
        kfqn.KFBFGS(model, groups=[{"modules": "project", **WRONG[said]}])
    model.project.requires_grad_(False)
    optimizer = kfqn.KFBFGS(model)
    model.project.requires_grad_(True)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=re.escape(said)):
        optimizer.add_param_group({"modules": "project", **WRONG[said]})
    assert unchanged(before, snapshot(model, optimizer))


def test_others_do_not_have_it():
    with pytest.raises(ValueError, match="KFAC has no setting 'split'"):
        kfqn.KFAC(nn.Linear(6, 6), groups=[{"modules": "", "split": 3}])
