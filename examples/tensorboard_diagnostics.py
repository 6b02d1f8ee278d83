"""What curvature is doing, in TensorBoard and as a page: loss, rate, and the factors of every layer.

python examples/tensorboard_diagnostics.py
tensorboard --logdir runs/tensorboard       # or open run.html

If ``refused`` grows, losses or gradients were not finite; if ``resets`` does, a factor was not.
"""

import torch.nn.functional as F
from digits import batches, digits, network, report
from torch.utils.tensorboard import SummaryWriter

import kfqn
from kfqn.integrations.loggers import TensorBoard

train, test = digits()
model, losses = network(), []
optimizer = kfqn.KFBFGS(model)
watchers = TensorBoard(SummaryWriter("runs/tensorboard"), every=10), kfqn.Report("run.html")
for _ in range(10):
    for x, y in batches(train, 128):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for watcher in watchers:
            watcher.update(optimizer, loss)
for watcher in watchers:
    watcher.write()
report(losses, model, test)
