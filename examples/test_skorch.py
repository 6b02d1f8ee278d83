"""skorch itself: its net gives the optimizer the module, and settings by name."""

from functools import partial

import numpy as np
import pytest
import skorch
import torch
from torch import nn

import kfqn
from kfqn.integrations.skorch import TakesModule


class Net(TakesModule, skorch.NeuralNetClassifier):
    pass


@pytest.mark.parametrize("make", [kfqn.KFBFGS, partial(kfqn.KFLBFGS, curvature_interval=2)])
def test_a_classifier_is_fitted_with_settings_by_name(make):
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(320, 6)).astype(np.float32)
    y = (x[:, :3] + x[:, 3:]).argmax(1)
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    options = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0}
    net = Net(module, optimizer=make, optimizer__weight_decay=0.01, max_epochs=15, batch_size=32, **options)
    net.fit(x, y)
    assert net.score(x, y) > 0.95
    assert isinstance(net.optimizer_, kfqn.Kronecker)
    assert {group["lr"] for group in net.optimizer_.param_groups} == {1.0}
    assert {group["weight_decay"] for group in net.optimizer_.param_groups} == {0.01}
    net.set_params(optimizer__weight_decay=0.1)
    assert net.optimizer_.param_groups[0]["weight_decay"] == 0.1
