"""A training loop of one's own, with a scheduler, and a checkpoint to resume from.

    python examples/plain_loop.py
    python examples/plain_loop.py --closure             # the same weights, to the bit
    python examples/plain_loop.py --checkpoint run.pt --stop-after 2; \
    python examples/plain_loop.py --checkpoint run.pt   # goes on where the first stopped
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn


def usual_step(model, optimizer, x, y):
    """The usual lines."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def step_with_closure(model, optimizer, x, y):
    """The same in one line, which works with any optimizer of torch, too."""
    return optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))


def main():
    """Train for some epochs, or for those that the checkpoint has left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--closure", action="store_true")
    parser.add_argument("--by-hand", dest="closure", action="store_false", help="without a closure, as it is")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--stop-after", type=int, help="stop after this many epochs, of a longer run")
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch, resumed from if there")
    args = parser.parse_args()

    train, test = digits()
    model, loader = network(), batches(train, 128)
    optimizer = kfqn.KFBFGS(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    step, losses, first = step_with_closure if args.closure else usual_step, [], 0
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        losses, first = saved["losses"], saved["epochs"]

    for epoch in range(first, args.stop_after or args.epochs):
        loader.generator.manual_seed(epoch)  # the order of an epoch is the same after resuming
        for x, y in loader:
            losses.append(step(model, optimizer, x, y).item())
            scheduler.step()
        if args.checkpoint:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            saved = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**saved, "losses": losses, "epochs": epoch + 1}, args.checkpoint)
    report(losses, model, optimizer, test)


if __name__ == "__main__":
    main()
