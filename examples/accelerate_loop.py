"""Accelerate with gradient accumulation: nothing here is particular to kfqn.

python examples/accelerate_loop.py
accelerate launch examples/accelerate_loop.py   # devices, processes and precision as configured
"""

import accelerate
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn

accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
train, test = digits()
net = network()
model, optimizer, loader = accelerator.prepare(net, kfqn.KFBFGS(net), batches(train, 64))
losses = []
for _ in range(10):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
if accelerator.is_main_process:
    report(losses, net, test)
