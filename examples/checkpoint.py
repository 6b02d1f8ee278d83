"""A run that goes on where it was stopped, to the bit.

python examples/checkpoint.py 2    # two epochs, and a file run.pt
python examples/checkpoint.py 10   # eight more
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
train, test = digits()
model, loader, losses, first = network(), batches(train, 128), [], 0
optimizer = kfqn.KFBFGS(model)
if Path("run.pt").exists():
    saved = torch.load("run.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    losses, first = saved["losses"], saved["epochs"]
for epoch in range(first, epochs):
    loader.generator.manual_seed(epoch)  # the order of an epoch is the same after resuming
    for x, y in loader:
        loss = optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))  # the five usual lines in one
        losses.append(loss.item())
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**saved, "losses": losses, "epochs": epoch + 1}, "run.pt")
report(losses, model, test)
