"""Lightning's manual optimization: one step for several micro-batches.

    python examples/lightning_manual.py --micro-batches 4   # four batches of 64 a step
    python examples/lightning_manual.py                     # one of 256: nearly the same

Nearly, because each micro-batch's A is of some of its data, and so of others.
"""

import argparse

import lightning
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn


class Digits(lightning.LightningModule):
    """A network, trained with steps of several micro-batches of equal size."""

    def __init__(self, micro_batches):
        super().__init__()
        self.automatic_optimization = False
        self.network, self.losses, self.micro_batches = network(), [], micro_batches

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        if batch_idx % self.micro_batches == 0:
            optimizer.zero_grad()
            self.losses.append(0.0)
        loss = F.cross_entropy(self(x), y) / self.micro_batches
        self.manual_backward(loss)
        self.losses[-1] += loss.item()
        if (batch_idx + 1) % self.micro_batches == 0:
            optimizer.step()

    def configure_optimizers(self):
        return kfqn.KFBFGS(self)


def main():
    """Train for eight epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--by-hand", action="store_true", help="without a closure, as it is anyway")
    args = parser.parse_args()
    train, test = digits()
    model = Digits(args.micro_batches)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=8, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(model, batches(train, 256 // args.micro_batches))
    report(model.losses, model, model.optimizers().optimizer, test)


if __name__ == "__main__":
    main()
