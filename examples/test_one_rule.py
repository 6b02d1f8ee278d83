"""Without a learning rate there is one rule: all ways to take steps lead to the same weights, to the bit."""

import accelerate
import pytest
import torch
import torch.nn.functional as F
from test_lightning import Plain, data, network, trainer
from torch import nn
from transformers import Trainer, TrainingArguments

import kfqn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]
EPOCHS = 2


def step_alone(model, folder):
    optimizer = kfqn.KFBFGS(model)
    for x, y in [batch for _ in range(EPOCHS) for batch in data()]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def with_closures(model, folder):
    optimizer = kfqn.KFBFGS(model)
    for x, y in [batch for _ in range(EPOCHS) for batch in data()]:
        optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))


def in_lightning(model, folder):
    module = Plain(kfqn.KFBFGS)
    module.network = model
    trainer(folder, max_epochs=EPOCHS).fit(module, data())


def in_accelerate(model, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer, loader = accelerator.prepare(model, kfqn.KFBFGS(model), data())
    for x, y in [batch for _ in range(EPOCHS) for batch in loader]:
        accelerator.backward(F.cross_entropy(prepared(x), y))
        optimizer.step()
        optimizer.zero_grad()


class Told(nn.Module):
    """As the Trainer wants a model: it returns its loss."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.network(x), labels)}


def in_transformers(model, folder):
    options = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=data().batch_size,
        lr_scheduler_type="constant",  # the Trainer has a line to 0 unless told otherwise
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    told, rows = Told(model), [{"x": x, "labels": y} for x, y in data().dataset]
    Trainer(told, options, train_dataset=rows, optimizers=(kfqn.KFBFGS(told), None)).train()


@pytest.mark.parametrize("way", [with_closures, in_lightning, in_accelerate, in_transformers])
def test_weights_are_those_of_step_alone(way, tmp_path):
    wanted, model = network(), network()
    step_alone(wanted, tmp_path)
    way(model.train(), tmp_path)
    assert all(map(torch.equal, wanted.parameters(), model.parameters()))
    assert not any(map(torch.equal, network().parameters(), model.parameters()))
