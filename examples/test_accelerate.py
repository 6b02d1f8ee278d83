"""Accelerate itself: steps are those of a loop of one's own, with accumulation and a scaler; runs go on."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
import torch.nn.functional as F
from test_lightning import alike, data, network, pairs_learnt, without_closures

import kfqn
from kfqn.integrations.accelerate import SecondPasses

HERE = Path(__file__).parent
MAKERS = {
    "KFBFGS": kfqn.KFBFGS,
    "KFLBFGS": partial(kfqn.KFLBFGS, curvature_interval=2),
    "paper": partial(kfqn.KFBFGS, lr=0.3, damping=1.0, curvature_interval=1),
}


@pytest.fixture(autouse=True)
def _anew():
    """Its state is one for a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(make, accumulate=1, scaler=None):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    accelerator.scaler = scaler  # Accelerate itself has none on the CPU
    net = network()
    return accelerator, net, *accelerator.prepare(net, make(net), data())


def run(accelerator, model, optimizer, loader, passes, epochs=2):
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                losses.append(passes(x, y).item())
                optimizer.step()
                optimizer.zero_grad()
    return losses


def by_hand(make, accumulate, scaler=None, epochs=2):
    """The same training in a loop of one's own, in which every micro-batch is run again."""
    model, losses = network(), []
    optimizer = make(model)
    scale = scaler.scale if scaler is not None else (lambda loss: loss)
    for _ in range(epochs):
        batches = [*data()]
        for start in range(0, len(batches), accumulate):
            some = batches[start : start + accumulate]
            for x, y in some:
                loss = F.cross_entropy(model(x), y)
                losses.append(loss.item())
                scale(loss / accumulate).backward()
            scaler.step(optimizer) if scaler is not None else optimizer.step()
            if optimizer.second_pass_due:
                with optimizer.second_pass(loss_scale=scaler.get_scale() if scaler is not None else 1.0):
                    for x, y in some:
                        scale(F.cross_entropy(model(x), y) / accumulate).backward()
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
    return model, optimizer, losses


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("accumulate", "scaled"), [(1, False), (4, False), (1, True), (4, True)])
def test_second_passes_are_those_of_a_loop(make, accumulate, scaled):
    accelerator, net, model, optimizer, loader = prepared(make, accumulate, scaler() if scaled else None)
    passes = SecondPasses(accelerator, optimizer, lambda x, y: F.cross_entropy(model(x), y))
    losses = run(accelerator, model, optimizer, loader, passes)
    wanted, theirs, first = by_hand(make, accumulate, scaler() if scaled else None)
    assert alike(net, wanted)
    assert losses == pytest.approx(first, rel=1e-6)
    assert pairs_learnt(optimizer) == pairs_learnt(theirs)
    assert (pairs_learnt(theirs) > 0) == (make is not kfqn.KFBFGS)


def test_a_step_that_the_scaler_skips_leaves_nothing_to_the_next():
    """Its micro-batches are not run again by the second pass of another step."""
    accelerator, _, model, optimizer, _ = prepared(MAKERS["paper"], 2, scaler())
    passes = SecondPasses(
        accelerator, optimizer, lambda x, y: calls.append(x) or F.cross_entropy(model(x), y)
    )
    batches, calls, skipped = [*data()][:6], [], []
    batches[1][0][0, 0] = torch.inf
    for x, y in batches:
        with accelerator.accumulate(model):
            passes(x, y)
            optimizer.step()
            skipped.append(optimizer.step_was_skipped)
            optimizer.zero_grad()
    order = [next(i for i, (x, _) in enumerate(batches) if x is call) for call in calls]
    assert order == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
    assert skipped[1::2] == [True, False, False]


@pytest.mark.parametrize("make", [MAKERS["paper"], partial(kfqn.KFAC, lr=0.3, damping=1.0)])
def test_closures_work_as_they_are_with_kfac_too(make):
    """Accelerate does not return their loss."""
    _, net, model, optimizer, loader = prepared(make)
    x, y = next(iter(loader))
    before = F.cross_entropy(net(x), y).item()
    for batch in loader:
        optimizer.step(kfqn.closure(model, *batch, F.cross_entropy))
    assert F.cross_entropy(net(x), y).item() < 0.8 * before


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_run_goes_on_to_the_bit(tmp_path, make):
    for part in range(2):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, net, model, optimizer, loader = prepared(make)
        if part:
            accelerator.load_state(tmp_path / "half")
        passes = SecondPasses(accelerator, optimizer, lambda x, y, model=model: F.cross_entropy(model(x), y))
        run(accelerator, model, optimizer, loader, passes)
        accelerator.save_state(tmp_path / "half")
    assert alike(net, without_closures(make, epochs=4))


def test_the_optimizer_of_another_is_refused_in_a_sentence():
    accelerator, _, _, optimizer, _ = prepared(lambda model: torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"only optimizers of kfqn .* is a AdamW: give"):
        SecondPasses(accelerator, optimizer, F.cross_entropy)


TWO = """
import sys
import accelerate, torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
from test_accelerate import MAKERS
from test_lightning import data, network, pairs_learnt
from kfqn.integrations.accelerate import SecondPasses

torch.set_num_threads(1)
accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
net = network().double()
make = MAKERS[sys.argv[2]]
model, optimizer, loader = accelerator.prepare(net, make(net), data())
passes = SecondPasses(accelerator, optimizer, lambda x, y: F.cross_entropy(model(x.double()), y))
for x, y in loader:
    with accelerator.accumulate(model):
        passes(x, y)
        optimizer.step()
        optimizer.zero_grad()
weights = torch.cat([p.detach().flatten() for p in net.parameters()])
both = accelerator.gather(weights[None])
if accelerator.is_main_process:
    torch.save((both, pairs_learnt(optimizer)), sys.argv[3])
accelerator.end_training()
"""


@pytest.mark.parametrize("make", ["KFLBFGS", "paper"])
def test_two_processes_are_one_on_the_joint_batch(tmp_path, make):
    """Their micro-batches are dealt out in turn, so that a step is of four in either case."""
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "two.py"), str(HERE), make, str(tmp_path / "two.pt")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    weights, taken = torch.load(tmp_path / "two.pt")
    assert torch.equal(weights[0], weights[1])
    model = network().double()
    optimizer = MAKERS[make](model)
    batches = [*data()]
    for start in range(0, len(batches), 4):
        some = [(x.double(), y) for x, y in batches[start : start + 4]]
        for x, y in some:
            (F.cross_entropy(model(x), y) / 4).backward()
        optimizer.step()
        if optimizer.second_pass_due:
            with optimizer.second_pass():
                for x, y in some:
                    (F.cross_entropy(model(x), y) / 4).backward()
        optimizer.zero_grad()
    one = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert taken == pairs_learnt(optimizer) > 0
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if make == "paper" else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(
        weights[0], one, **tolerance
    )  # of others A is of some data of each micro-batch
