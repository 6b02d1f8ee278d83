"""Losses that are not one function: a single datum at a time, two tasks in turn. `KFBFGS(model)` as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC
from torch import nn

import kfqn


def single_images(seed, steps):
    """A convolutional network, and noisy images in which the class says which rows are brighter."""
    torch.manual_seed(seed)
    y = torch.randint(3, (steps,))
    x = 0.7 * torch.randn(steps, 1, 8, 8)
    for label in range(3):
        x[y == label, 0, 2 * label : 2 * label + 2] += 1
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )
    return model, x, y


# Measured over 12 seeds: 0.004 to 0.117 where it begins at 1.06 to 1.16 and a guess has 1.10 (AdamW: 0.31 to
# 0.98). The loss of all images is asked for, those of the steps are of one image each.
@pytest.mark.filterwarnings("ignore:.*very small batches:RuntimeWarning")  # said where losses cannot judge
@pytest.mark.parametrize("make", AUTOMATIC.values(), ids=AUTOMATIC)
@pytest.mark.parametrize("seed", [0, 3])  # on which the first version ended at 0.61 and 1.47
def test_batches_of_one_train(make, seed):
    model, x, y = single_images(seed, 150)
    optimizer, before = make(model), F.cross_entropy(model(x), y).item()
    for one in range(len(y)):
        datum = slice(one, one + 1)
        loss = optimizer.step(kfqn.closure(model, x[datum], y[datum], F.cross_entropy))
        assert loss.isfinite()
    after = F.cross_entropy(model(x), y).item()
    assert all(p.isfinite().all() for p in model.parameters())
    assert after < 0.5 * min(before, math.log(3))


class TwoHeads(nn.Module):
    """A regression and a classification on one body."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(24, 3), nn.Linear(24, 4)])
        self.truth = torch.randn(12, 7, generator=torch.Generator().manual_seed(5))

    def loss(self, x, task):
        found, z = self.heads[task](self.body(x)), x @ self.truth
        return (
            F.cross_entropy(found, z[:, 3:].argmax(1)) if task else F.mse_loss(found, torch.sin(z[:, :3] / 2))
        )


def tasks_in_turn(make, task_of, steps=100, seed=0):
    """The losses of both tasks on data of their own, before and after."""
    torch.manual_seed(seed)
    model, test = TwoHeads(), torch.randn(500, 12)
    optimizer = make(model)

    def losses():
        with torch.no_grad():
            return [model.loss(test, task).item() for task in (0, 1)]

    before = losses()
    for k in range(steps):
        x, task = torch.randn(32, 12), task_of(k)

        def closure(x=x, task=task):
            optimizer.zero_grad()
            loss = model.loss(x, task)
            loss.backward()
            return loss

        optimizer.step(closure)
    return before, losses()


# The default cadence is ten at most, a number that the periods of all of these divide or are a multiple of.
IN_TURN = {
    "one after the other": lambda k: k % 2,
    "five and five": lambda k: k % 10 // 5,
    "ten and ten": lambda k: k // 10 % 2,
    "one in ten": lambda k: int(k % 10 == 0),
}


# Measured over 8 seeds: both end at 0.23 to 0.83 of where they began, and at 0.32 to 0.95 of AdamW's.
@pytest.mark.parametrize("make", AUTOMATIC.values(), ids=AUTOMATIC)
@pytest.mark.parametrize("task_of", IN_TURN.values(), ids=IN_TURN)
def test_tasks_in_turn_both_train(make, task_of):
    before, ours = tasks_in_turn(make, task_of)
    _, adamw = tasks_in_turn(lambda model: torch.optim.AdamW(model.parameters()), task_of)
    for started, ended, theirs in zip(before, ours, adamw, strict=True):
        assert ended < 0.9 * started
        assert ended < 1.2 * theirs


# The classification over 5 seeds, medians after 600 steps: 1.06, where random order ends at 0.28,
# curvature_interval=7 at 0.29 and AdamW at 0.30; after 300, when gaps have been of ten for a while,
# 0.67, 0.32, 0.29 and 0.55. To be made strict, or a plain test, when that is mended.
@pytest.mark.xfail(strict=False, reason="gaps of ten: every judged step is of one task, the other suffers")
def test_tasks_in_turn_end_where_the_same_in_random_order_does():
    torch.manual_seed(0)
    drawn = torch.randint(2, (300,)).tolist()
    _, in_turn = tasks_in_turn(kfqn.KFBFGS, lambda k: k % 2, steps=300, seed=1)
    _, random = tasks_in_turn(kfqn.KFBFGS, lambda k: drawn[k], steps=300, seed=1)
    assert all(a < 1.5 * b for a, b in zip(in_turn, random, strict=True))
