"""What curvature is doing, drawn by TensorBoard: `diagnostics` of every layer after every epoch.

    python examples/tensorboard_diagnostics.py --logdir runs/tensorboard
    tensorboard --logdir runs/tensorboard

One chart for each layer and number: how often its factor has learnt, the norm of the last update, the norm
of the factor. ``rate`` is the share that layers move. If ``refused`` grows, losses or gradients were not
finite; if ``resets`` does, a factor was not.
"""

import argparse

import torch.nn.functional as F
from digits import batches, digits, network, report
from torch.utils.tensorboard import SummaryWriter

import kfqn


def main():
    """Train for five epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--logdir", default="runs/tensorboard")
    args = parser.parse_args()
    train, test = digits()
    model, loader = network(), batches(train, 128)
    optimizer = kfqn.KFBFGS(model)
    losses = []
    with SummaryWriter(args.logdir) as writer:
        for epoch in range(5):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            writer.add_scalar("loss", sum(losses[-len(loader) :]) / len(loader), epoch)
            for layer, numbers in optimizer.diagnostics().items():
                for name, value in numbers.items():
                    writer.add_scalar(f"{layer or 'all layers'}/{name}", value, epoch)
    report(losses, model, optimizer, test)


if __name__ == "__main__":
    main()
