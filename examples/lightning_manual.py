"""Lightning's manual optimization.

python examples/lightning_manual.py
"""

import lightning
import torch.nn.functional as F
from digits import batches, digits, network, report

import kfqn


class Digits(lightning.LightningModule):
    """A network and how it is trained."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.network, self.losses = network(), []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return kfqn.KFBFGS(self)


train, test = digits()
model = Digits()
quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
lightning.Trainer(max_epochs=10, accelerator="cpu", **quiet).fit(model, batches(train, 128))
report(model.losses, model.network, test)
