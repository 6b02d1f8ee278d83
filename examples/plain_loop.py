"""A training loop of one's own: two ways into a step, a scheduler, and a checkpoint to resume from.

    python examples/plain_loop.py                       # steps with a closure
    python examples/plain_loop.py --by-hand             # the same weights, to the bit, without closures
    python examples/plain_loop.py --checkpoint run.pt --stop-after 2; \
    python examples/plain_loop.py --checkpoint run.pt   # goes on where the first stopped
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn


def step_with_closure(model, optimizer, x, y):
    """The optimizer calls the closure before the step and, where it learns curvature, after it."""
    return optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))


def step_by_hand(model, optimizer, x, y):
    """The usual three lines, then at some steps the same batch once more, from which it learns."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if optimizer.second_pass_due:
        with optimizer.second_pass(loss) as again:
            again.loss = F.cross_entropy(model(x), y)
            again.loss.backward()
    return loss


def main():
    """Train for some epochs, or for those that the checkpoint has left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--by-hand", action="store_true")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--stop-after", type=int, help="stop after this many epochs, of a longer run")
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch, resumed from if there")
    args = parser.parse_args()

    train, test = digits()
    model, loader = network(), batches(train, 128)
    optimizer = kfqn.KFBFGS(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    step, losses, first = step_by_hand if args.by_hand else step_with_closure, [], 0
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
