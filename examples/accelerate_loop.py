"""Accelerate with gradient accumulation: the micro-batches of a step are run again after it.

    python examples/accelerate_loop.py --micro-batches 4   # four batches of 64 a step
    python examples/accelerate_loop.py                     # one of 256: the same, but for rounding
    accelerate launch examples/accelerate_loop.py          # devices, processes and precision as configured

Accelerate wraps the optimizer. The second pass is a hook after the step of the one inside, because with
float16 the scale of the loss may change right after, and both passes must have the same.
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
    waiting, losses, total = [], [], 0.0

    def look(x, y):
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss)  # divides by the number of micro-batches
        return loss.item() / args.micro_batches

    def look_again(*_):
        scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
        with inner.second_pass(total, loss_scale=scale) as again:
            again.loss = sum(look(x, y) for x, y in waiting)

    inner.register_step_post_hook(look_again)
    for _ in range(8):
        for x, y in loader:
            waiting.append((x, y))
            with accelerator.accumulate(model):
                total += look(x, y)
                optimizer.step()  # does nothing before the last micro-batch, as does zero_grad
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                losses.append(total)
                waiting, total = [], 0.0
    if accelerator.is_main_process:
        report(losses, net, inner, test)


if __name__ == "__main__":
    main()
