"""Every example as a user runs it: the loss falls, curvature is learnt, no warning comes up.

`make examples` runs this. `make test` does not: it has none of the packages that the examples are about.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import kfqn

HERE = Path(__file__).parent
EXAMPLES = [
    path.name
    for path in sorted(HERE.glob("*.py"))
    if path.name not in ("digits.py", "own_step_rule.py", "test_examples.py")  # tests/test_parts.py runs it
]

# All that the frameworks themselves warn of; any other warning ends the example.
FILTERS = [
    "error",
    "ignore:`isinstance(treespec, LeafSpec)` is deprecated",  # Lightning calls what torch deprecates
    "ignore:The 'train_dataloader' does not have many workers",  # Lightning, on machines of many cores
]

# In float64 what differs by rounding alone is printed the same.
IN_DOUBLE = """import runpy, sys, torch
torch.set_default_dtype(torch.float64)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")"""


@pytest.fixture
def run(tmp_path):
    """Runs an example in a process and a folder of its own, and returns what `report` printed."""

    def run(command, double=False):
        script, *options = command.split()
        filters = [part for rule in FILTERS for part in ("-W", rule)]
        start = ["-c", IN_DOUBLE] if double else []
        done = subprocess.run(
            [sys.executable, *filters, *start, str(HERE / script), *options],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return re.findall(r"^(?:loss|layer) .*", done.stdout, re.MULTILINE)

    return run


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_trains_and_learns_curvature(run, example):
    summary, *layers = run(example)
    first, last, accuracy = map(float, re.findall(r"\d[\d.e-]*", summary))
    assert last < 0.5 * first
    assert accuracy > 0.8
    assert layers
    found = [map(int, re.search(r"(\d+) steps, A taken (\d+)$", layer).groups()) for layer in layers]
    steps, taken = zip(*found, strict=True)
    assert len({*steps}) == len({*taken}) == 1
    assert taken[0] == sum(k % 121 in (0, 40, 80) for k in range(steps[0]))  # (M3)


def numbers(lines):
    """Loss at first and at last, and accuracy."""
    return [*map(float, re.findall(r"\d[\d.e-]*", lines[0]))]


def test_gpt2_takes_the_steps_that_it_would_take_with_linear_layers():
    """Whose weights are those of Transformers' Conv1D transposed."""
    settings = {"vocab_size": 20, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    config = GPT2Config(**settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).double()
    twin = copy.deepcopy(model)
    for module in [*twin.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, Conv1D):
                linear = torch.nn.Linear(layer.nx, layer.nf).double()
                linear.weight.data.copy_(layer.weight.T)
                linear.bias.data.copy_(layer.bias)
                setattr(module, name, linear)
    optimizers = kfqn.KFBFGS(model, weight_decay=0.01), kfqn.KFBFGS(twin, weight_decay=0.01)
    assert len(optimizers[0]._layers) == len(optimizers[1]._layers) == 8
    x = torch.randint(20, (9, 6))
    for _ in range(15):
        losses = []
        for net, optimizer in zip((model, twin), optimizers, strict=True):

            def closure(net=net, optimizer=optimizer):
                optimizer.zero_grad()
                loss = net(input_ids=x, labels=x).loss
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_steps_with_a_closure_and_without_are_the_same(run):
    assert run("plain_loop.py --closure") == run("plain_loop.py")


def test_a_resumed_run_ends_like_one_that_was_never_stopped(run):
    run("plain_loop.py --checkpoint run.pt --stop-after 2")
    assert run("plain_loop.py --checkpoint run.pt") == run("plain_loop.py")


@pytest.mark.parametrize("example", ["lightning_manual.py", "accelerate_loop.py", "huggingface_trainer.py"])
def test_micro_batches_are_nearly_one_large_batch(run, example):
    """Nearly: A is of every n-th datum of each micro-batch, or of the whole batch, which are others."""
    parts, whole = (numbers(run(f"{example}{more}", double=True)) for more in (" --micro-batches 4", ""))
    assert parts == pytest.approx(whole, rel=0.02)


def test_tensorboard_has_every_layers_numbers(run, tmp_path):
    run("tensorboard_diagnostics.py --logdir charts")
    events = EventAccumulator(str(tmp_path / "charts")).Reload()
    charts = set(events.Tags()["scalars"])
    assert {"loss", "all layers/rate", "0/A taken", "2/norm H_A", "5/update"} <= charts
    assert [event.step for event in events.Scalars("5/norm H_A")] == [0, 1, 2, 3, 4]
