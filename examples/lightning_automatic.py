"""Lightning's automatic optimization: return the optimizer, and everything else is as ever.

python examples/lightning_automatic.py

In validation and in checkpoints the model has its averaged weights. `Watch` draws the run, in run.html.
"""

import lightning
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn
from kfqn.integrations.lightning import Watch


class Digits(lightning.LightningModule):
    """A network and how it is trained."""

    def __init__(self):
        super().__init__()
        self.network, self.losses = network(), []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return kfqn.KFBFGS(self)


train, test = digits()
model = Digits()
quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
watch = Watch(kfqn.Report("run.html"))
trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", callbacks=[watch], **quiet)
trainer.fit(model, batches(train, 128))
report(model.losses, model.network, test)
