"""Networks as people build them today, trained on the real digits by every optimizer."""

import pytest
import torch
from cases import VisionTransformer, closure, separable_net
from test_contract import OPTIMIZERS

from kfqn.race.problems.data import digits

NETS = {  # maker, a module with factors, a parameter without, learning rate of methods that invert exactly
    "vision transformer": (VisionTransformer, "blocks.0.attention.project", "positions", 0.3),
    "depthwise separable": (separable_net, "1.depthwise", "1.norm.weight", 1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_it_learns_the_digits(net, name):
    make, with_factors, without, lr_of_inverses = NETS[net]
    model, data = make(), digits()
    lr = 3.0 if name in ("KFBFGS", "KFLBFGS") else lr_of_inverses
    optimizer = OPTIMIZERS[name](model, lr=lr, damping=0.1)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(6):
        batches = data.training_batches(128, generator)
        losses += [optimizer.step(closure(model, optimizer, x, y)).item() for x, y in batches]
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert "resets" in optimizer.diagnostics()[with_factors]
    assert "exp_avg" in optimizer.state[model.get_parameter(without)]
    assert sum(found["resets"] for name, found in optimizer.diagnostics().items() if name) == 0
