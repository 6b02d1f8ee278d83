"""A training loop of one's own: nothing in it is particular to kfqn.

python examples/plain_loop.py
"""

import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn

train, test = digits()
model, loader = network(), batches(train, 128)
optimizer = kfqn.KFBFGS(model)
losses = []
for _ in range(10):
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
report(losses, model, test)
