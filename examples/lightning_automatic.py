"""Lightning's automatic optimization: return the optimizer, and everything else is as ever.

    python examples/lightning_automatic.py

Lightning gives ``step`` a closure that runs ``training_step`` and the backward pass. It is run twice, so what
``training_step`` logs is counted twice, before the step and after. The loss before it is what ``step``
returns: log that, in ``optimizer_step`` as here. With ``accumulate_grad_batches`` the closure runs the
last batch only, so H_G learns from that one, and all else from all of them: for steps that equal those of one
large batch see ``lightning_manual.py``.
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
        return F.cross_entropy(self(x), y)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        loss = optimizer.step(closure=optimizer_closure)
        self.log("loss", loss)
        self.losses.append(loss)

    def configure_optimizers(self):
        optimizer = kfqn.KFBFGS(self)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main():
    """Train for five epochs."""
    train, test = digits()
    model = Digits()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(model, batches(train, 128))
    report(model.losses, model, model.optimizers().optimizer, test)


if __name__ == "__main__":
    main()
