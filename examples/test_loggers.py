"""Loggers themselves: TensorBoard, W&B offline."""

import torch
import torch.nn.functional as F
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_lightning import data, network
from torch.utils.tensorboard import SummaryWriter

import kfqn
from kfqn.integrations.loggers import TensorBoard, WandB
from kfqn.integrations.watch import scalars


def train(watcher):
    model = network()
    optimizer = kfqn.KFBFGS(model)
    for x, y in data():
        watcher.update(optimizer, optimizer.step(kfqn.closure(model, x, y, F.cross_entropy)))
    watcher.write()
    return optimizer


def test_tensorboard_has_every_number(tmp_path):
    optimizer = train(TensorBoard(SummaryWriter(tmp_path), every=8))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {*events.Tags()["scalars"]} == {"loss", *scalars(optimizer)}
    for name, value in scalars(optimizer).items():
        assert [event.step for event in events.Scalars(name)] == [1, 8, 16, 24]
        torch.testing.assert_close(events.Scalars(name)[-1].value, value)


def test_wandb_has_every_number_offline(tmp_path):
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        optimizer = train(WandB(run, every=8))
        found = dict(run.summary)
    assert {name: found[name] for name in scalars(optimizer)} == scalars(optimizer)
    assert found["step"] == 24
    assert [*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
