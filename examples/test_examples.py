"""Every example as a user runs it: it ends below an untuned AdamW in the same lines, and nothing warns.

`make examples` runs this. `make test` does not: it has none of the packages that the examples are about.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
EXAMPLES = [
    path.name
    for path in sorted(HERE.glob("*.py"))
    if path.name not in ("digits.py", "own_step_rule.py") and not path.name.startswith("test_")
]
WATCHED = ("lightning_automatic.py", "tensorboard_diagnostics.py")  # watchers are of kfqn's optimizers alone

# All that the frameworks themselves warn of; any other warning ends the example.
FILTERS = [
    "error",
    "ignore:`isinstance(treespec, LeafSpec)` is deprecated",  # Lightning calls what torch deprecates
    "ignore:The 'train_dataloader' does not have many workers",  # Lightning, on machines of many cores
]

WITH_ADAMW = """import runpy, sys, kfqn, torch
kfqn.KFBFGS = lambda model: torch.optim.AdamW(model.parameters())
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")"""


@pytest.fixture
def run(tmp_path):
    """Runs an example in a process and a folder of its own, and returns what `report` printed."""

    def run(command, adamw=False):
        script, *options = command.split()
        filters = [part for rule in FILTERS for part in ("-W", rule)]
        start = ["-c", WITH_ADAMW] if adamw else []
        done = subprocess.run(
            [sys.executable, *filters, *start, str(HERE / script), *options],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (said,) = re.findall(r"^loss .*", done.stdout, re.MULTILINE)
        return [*map(float, re.findall(r"\d[\d.e-]*", said))]

    return run


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_trains_below_an_untuned_adamw(run, tmp_path, example):
    first, last, accuracy = run(example)
    assert last < 0.1 * first
    assert accuracy > 0.95
    (tmp_path / "run.pt").unlink(missing_ok=True)
    _, adamw, accuracy_of_adamw = run("plain_loop.py" if example in WATCHED else example, adamw=True)
    assert last < 0.7 * adamw
    assert accuracy > accuracy_of_adamw


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_is_what_a_user_types(example):
    assert len((HERE / example).read_text(encoding="utf-8").splitlines()) <= 40


def test_a_resumed_run_ends_like_one_that_was_never_stopped(run, tmp_path):
    run("checkpoint.py 2")
    resumed = run("checkpoint.py 4")
    (tmp_path / "run.pt").unlink()
    assert run("checkpoint.py 4") == resumed


def test_tensorboard_has_every_layers_numbers_and_the_page_every_layer(run, tmp_path):
    run("tensorboard_diagnostics.py")
    events = EventAccumulator(str(tmp_path / "runs" / "tensorboard")).Reload()
    charts = set(events.Tags()["scalars"])
    assert {"loss", "all layers/rate", "0/A taken", "2/norm H_A", "5/update"} <= charts
    assert [event.step for event in events.Scalars("5/norm H_A")] == [1, *range(10, 101, 10)]
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert all(f"<th>{layer}</th>" in page for layer in ("0", "2", "5"))
