"""Lightning itself: steps are those of a loop of one's own, second passes are not logged, runs go on."""

import csv
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import kfqn
from kfqn.integrations.lightning import SecondPasses, Watch
from kfqn.integrations.watch import inner

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
MAKERS = {
    "KFBFGS": kfqn.KFBFGS,
    "KFLBFGS": partial(kfqn.KFLBFGS, curvature_interval=2),
    "paper": partial(kfqn.KFBFGS, lr=0.3, damping=1.0, curvature_interval=1),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(count=24, size=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 6, generator=generator)
    y = (x[:, :3] + x[:, 3:]).argmax(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), size)


class Plain(lightning.LightningModule):
    """Counts its calls, and keeps the loss of each first pass."""

    def __init__(self, make):
        super().__init__()
        self.network, self.make, self.calls, self.losses = network(), make, 0, []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.calls += 1
        if not getattr(self, "is_second_pass", False):
            self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make(self)


class Module(SecondPasses, Plain):
    pass


def trainer(folder, callbacks=(), **options):
    options = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks],
        **options,
    )


def by_hand(make, epochs=2, accumulate=1, clip=None, half=False):
    """The same training in a loop of one's own, whose closure is of the last micro-batch."""
    model = network()
    optimizer = make(model)
    for _ in range(epochs):
        for i, (x, y) in enumerate(data()):

            def closure(i=i, x=x, y=y):
                with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                    loss = F.cross_entropy(model(x), y) / accumulate
                if i % accumulate == 0:
                    optimizer.zero_grad()
                loss.backward()
                return loss

            def clipped(closure=closure):
                loss = closure()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                return loss

            if (i + 1) % accumulate:
                closure()
            else:
                optimizer.step(clipped)
    return model, optimizer


def without_closures(make, epochs=2):
    """The same, with second passes by hand."""
    model = network()
    optimizer = make(model)
    for x, y in [*data()] * epochs:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if optimizer.second_pass_due:
            with optimizer.second_pass():
                F.cross_entropy(model(x), y).backward()
    return model


def alike(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def pairs_learnt(optimizer):
    return sum(numbers.get("G taken", 0) for numbers in inner(optimizer).diagnostics().values())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("accumulate", "clip", "precision"),
    [
        (1, None, "32-true"),
        (4, None, "32-true"),
        (1, 0.5, "32-true"),
        (1, None, "bf16-mixed"),
        (4, 0.5, "bf16-mixed"),
    ],
)
def test_automatic_optimization_takes_the_steps_of_a_loop(tmp_path, make, accumulate, clip, precision):
    module = Module(make)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "precision": precision}
    trainer(tmp_path, **options).fit(module, data())
    wanted, theirs = by_hand(make, 2, accumulate, clip, precision == "bf16-mixed")
    assert alike(module.network, wanted)
    assert pairs_learnt(module.optimizers()) == pairs_learnt(theirs)
    assert (pairs_learnt(theirs) > 0) == (make is not kfqn.KFBFGS)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_is_logged_once_whatever_is_run_again(tmp_path, accumulate):
    logged = {}
    for kind in (Plain, Module):
        module = kind(MAKERS["KFLBFGS"])
        logger = CSVLogger(tmp_path, name=kind.__name__)
        options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
        trainer(tmp_path, accumulate_grad_batches=accumulate, **options).fit(module, data())
        metrics = Path(logger.log_dir, "metrics.csv").read_text(encoding="utf-8")
        rows = [*csv.DictReader(metrics.splitlines())]
        assert module.calls > len(data())
        (mean,) = (float(row["loss_epoch"]) for row in rows if row.get("loss_epoch"))
        steps = [float(row["loss_step"]) for row in rows if row.get("loss_step")]
        logged[kind] = mean, steps
    first = module.losses
    assert len(first) == len(data())
    mean, steps = logged[Module]
    assert mean == pytest.approx(sum(first) / len(first), rel=1e-6)
    assert steps == pytest.approx(first[accumulate - 1 :: accumulate], rel=1e-6)
    assert logged[Plain][0] != pytest.approx(mean, rel=1e-4)  # or the mixin would be of no use


def test_under_a_scaler_there_are_second_passes_too(tmp_path):
    """Lightning gives no optimizer a closure then; the scale changes at every other step."""
    make = MAKERS["KFLBFGS"]

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    module = Module(make)
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    trainer(tmp_path, plugins=[plugin]).fit(module, data())
    model, scaling = network(), scaler()
    optimizer = make(model)
    for _ in range(2):
        for x, y in data():
            for second in (False, True):
                with torch.autocast("cpu", torch.half, cache_enabled=False):
                    if not second:
                        optimizer.zero_grad()
                        scaling.scale(F.cross_entropy(model(x), y)).backward()
                        scaling.step(optimizer)
                    elif optimizer.second_pass_due:
                        with optimizer.second_pass(loss_scale=scaling.get_scale()):
                            scaling.scale(F.cross_entropy(model(x), y)).backward()
            scaling.update()
    assert scaling.get_scale() > 8.0
    assert alike(module.network, model)
    assert pairs_learnt(module.optimizers()) == pairs_learnt(optimizer) > 0
    assert len(module.losses) == 2 * len(data())


class Manual(Plain):
    """Second passes by a closure, or by hand."""

    def __init__(self, make, closures):
        super().__init__(make)
        self.automatic_optimization, self.closures = False, closures

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        if self.closures:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
            if optimizer.second_pass_due:
                with optimizer.second_pass():
                    self.manual_backward(F.cross_entropy(self.network(batch[0]), batch[1]))
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("closures", [False, True])
def test_manual_optimization_takes_the_steps_of_a_loop(tmp_path, make, closures):
    module = Manual(make, closures)
    trainer(tmp_path).fit(module, data())
    assert alike(module.network, by_hand(make)[0] if closures else without_closures(make))


class WithKFAC(Plain):
    """KFAC needs the closure itself, which Lightning's optimizers wrap."""

    def __init__(self):
        super().__init__(partial(kfqn.KFAC, lr=0.3, damping=1.0))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.losses.append(optimizer.step(kfqn.closure(self.network, *batch, F.cross_entropy)).item())


def test_kfac_runs_in_manual_optimization(tmp_path):
    module = WithKFAC()
    trainer(tmp_path).fit(module, data())
    assert sum(module.losses[-8:]) < 0.7 * sum(module.losses[:8])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_run_goes_on_to_the_bit(tmp_path, make):
    checkpoint = ModelCheckpoint(tmp_path, filename="half")
    half = Module(make)
    trainer(tmp_path, [checkpoint], enable_checkpointing=True).fit(half, data())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert alike(half, _loaded(Module(make), saved["state_dict"]))
    again = Module(make)
    options = {"max_epochs": 4, "enable_checkpointing": True}
    trainer(tmp_path, [ModelCheckpoint(tmp_path)], **options).fit(
        again, data(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert alike(again.network, by_hand(make, epochs=4)[0])


def _loaded(module, state):
    module.load_state_dict(state)
    return module


class Validated(Module):
    """Keeps whether the model held z where a validation began."""

    def __init__(self, make):
        super().__init__(make)
        self.ahead = []

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.ahead.append(inner(self.optimizers()).training.iterates.ahead)

    def validation_step(self, batch, batch_idx):
        self.log("validation", F.cross_entropy(self.network(batch[0]), batch[1]))


def test_validation_and_checkpoints_between_micro_batches_have_the_average(tmp_path):
    saving = ModelCheckpoint(
        tmp_path, filename="{step}-{validation:.9f}", save_top_k=-1, monitor="validation"
    )
    module = Validated(kfqn.KFBFGS)
    options = {"accumulate_grad_batches": 4, "val_check_interval": 6, "enable_checkpointing": True}
    trainer(tmp_path, [saving], **options, max_epochs=1).fit(module, data(), data(2))
    assert module.ahead == [True, False, True, False]
    paths = [*tmp_path.glob("*.ckpt")]
    assert len(paths) == 4
    for path in paths:
        saved = _loaded(Plain(kfqn.KFBFGS), torch.load(path, weights_only=True)["state_dict"]).network
        loss = sum(F.cross_entropy(saved(x), y).item() for x, y in data(2)) / len(data(2))
        assert loss == pytest.approx(float(path.stem.split("=")[-1]), abs=1e-6)


class Kept:
    """A watcher that keeps what it is told."""

    def __init__(self):
        self.told, self.written = [], 0

    def update(self, optimizer, loss=None, step=None):
        self.told.append((type(optimizer), loss if loss is None else float(loss), step))

    def write(self):
        self.written += 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_watchers_are_told_of_every_step_and_the_mean_of_its_losses(tmp_path, accumulate):
    kept, report = Kept(), kfqn.Report(tmp_path / "run.html")
    module = Module(MAKERS["KFLBFGS"])
    trainer(tmp_path, [Watch(kept, report)], accumulate_grad_batches=accumulate).fit(module, data())
    count = len(module.losses) // accumulate
    means = torch.tensor(module.losses).reshape(count, accumulate).mean(1).tolist()
    assert [kind for kind, *_ in kept.told] == [kfqn.KFLBFGS] * count
    assert [step for *_, step in kept.told] == [*range(1, count + 1)]
    assert [loss for _, loss, _ in kept.told] == pytest.approx(means, rel=1e-6)
    assert kept.written == 1
    assert "network.<wbr>0" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_watchers_are_told_of_manual_steps(tmp_path):
    kept, module = Kept(), Manual(MAKERS["KFBFGS"], closures=False)
    trainer(tmp_path, [Watch(kept)], max_epochs=1).fit(module, data())
    assert len(kept.told) == len(data())
    assert kept.told[0][1] == pytest.approx(by_hand_loss(), rel=1e-6)


def by_hand_loss():
    x, y = next(iter(data()))
    return F.cross_entropy(network()(x), y).item()
