"""Lightning's automatic optimization: return the optimizer, and everything else is as ever.

    python examples/lightning_automatic.py

In checkpoints and in validation the model has its averaged weights. With a number for ``lr`` `KFBFGS` runs
``training_step`` again after some steps, and what it logs is then counted twice: log what ``optimizer.step``
returns, in ``optimizer_step``.
"""

import lightning
import torch
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn


class Digits(lightning.LightningModule):
    """A network and how it is trained."""

    def __init__(self):
        super().__init__()
        self.network, self.losses = network(), []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        optimizer = kfqn.KFBFGS(self)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main():
    """Train for ten epochs."""
    train, test = digits()
    model = Digits()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(model, batches(train, 128))
    report(model.losses, model, model.optimizers().optimizer, test)


if __name__ == "__main__":
    main()
