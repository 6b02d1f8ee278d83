"""Accelerate with gradient accumulation: nothing here is particular to kfqn.

    python examples/accelerate_loop.py --micro-batches 4   # four batches of 64 a step
    python examples/accelerate_loop.py                     # one of 256: nearly the same
    accelerate launch examples/accelerate_loop.py          # devices, processes and precision as configured

Nearly, because each micro-batch's A is of some of its data, and so of others.
"""

import argparse

import accelerate
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn


def main():
    """Train for eight epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=1)
    args = parser.parse_args()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=args.micro_batches)
    train, test = digits()
    net = network()
    inner = kfqn.KFBFGS(net)
    loader = batches(train, 256 // args.micro_batches)
    model, optimizer, loader = accelerator.prepare(net, inner, loader)
    losses, total = [], 0.0
    for _ in range(8):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)  # divides by the number of micro-batches
                optimizer.step()  # does nothing before the last micro-batch, as does zero_grad
                optimizer.zero_grad()
            total += loss.item() / args.micro_batches
            if accelerator.sync_gradients:
                losses.append(total)
                total = 0.0
    if accelerator.is_main_process:
        report(losses, net, inner, test)


if __name__ == "__main__":
    main()
