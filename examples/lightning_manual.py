"""Lightning's manual optimization: one step for several micro-batches, just as for one large batch.

    python examples/lightning_manual.py --micro-batches 4   # four batches of 64 a step
    python examples/lightning_manual.py                     # one of 256: the same, but for rounding
    python examples/lightning_manual.py --by-hand           # the same again, without a closure

Give ``self.optimizers()`` a closure that goes through all micro-batches of the step and returns their
loss, or do both passes yourself.
"""

import argparse

import lightning
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn


class Digits(lightning.LightningModule):
    """A network, trained with steps of several micro-batches of equal size."""

    def __init__(self, micro_batches, by_hand):
        super().__init__()
        self.automatic_optimization = False
        self.network, self.losses, self.waiting = network(), [], []
        self.micro_batches, self.by_hand = micro_batches, by_hand

    def forward(self, x):
        return self.network(x)

    def look(self):
        """Clear the gradients, go forward and backward through every micro-batch, return the mean loss."""
        self.optimizers().zero_grad()
        total = 0.0
        for x, y in self.waiting:
            loss = F.cross_entropy(self(x), y) / len(self.waiting)
            self.manual_backward(loss)
            total += loss.detach()
        return total

    def training_step(self, batch, batch_idx):
        self.waiting.append(batch)
        if len(self.waiting) < self.micro_batches:
            return
        optimizer = self.optimizers()
        if self.by_hand:
            loss = self.look()
            optimizer.step()
            if optimizer.second_pass_due:
                with optimizer.second_pass(loss) as again:
                    again.loss = self.look()
        else:
            loss = optimizer.step(self.look)
        self.losses.append(loss)
        self.waiting.clear()

    def configure_optimizers(self):
        return kfqn.KFBFGS(self)


def main():
    """Train for eight epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--by-hand", action="store_true")
    args = parser.parse_args()
    train, test = digits()
    model = Digits(args.micro_batches, args.by_hand)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=8, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(model, batches(train, 256 // args.micro_batches))
    report(model.losses, model, model.optimizers().optimizer, test)


if __name__ == "__main__":
    main()
