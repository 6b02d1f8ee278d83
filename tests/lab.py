"""What the tests of the lab share: the command line as a user runs it, toy configurations, toy images."""

import contextlib
import io
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np

from kfqn.race import cli, problems
from kfqn.race.runs import Config, Run

BATCH = problems.PROBLEMS["digits"].batch_size
TINY = ["--epochs", "2", "--width", "4", "--train-size", "600"]


def kfqn(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "kfqn", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def here(*arguments):
    """The same without new processes, which take seconds to import what is imported here already."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(error))
        stack.enter_context(mock.patch("kfqn.race.session.run_all", _run_all_here))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")  # as in a process of its own
        try:
            status = cli.main([*map(str, arguments)])
        except SystemExit as exit:  # argparse
            status = exit.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), error.getvalue())


def _run_all_here(runs, jobs, data_dir, watch):
    from kfqn.race.runs.train import train

    for run in runs:
        with run.claimed() as ours, mock.patch("kfqn.race.runs.train.warm_up"):  # nobody asks for seconds
            if ours and run.end() is None:
                train(run, data_dir)
    watch()


def hold(folder, held, leave):
    """Another process that has a run in hand; it imports no torch, which takes seconds."""
    with Run(folder).claimed():
        held.set()
        leave.wait(60)


def config(**changes):
    values = {
        "problem": "digits",
        "entrant": "kfbfgs",
        "settings": {"lr": 1.0, "damping": 1.0},
        "seed": 0,
        "epochs": 3,
        "budget": None,
        "evaluated": 10_000,
        "width": 4,
        "batch_size": BATCH,
        "weight_decay": 0.0,
        "train_size": 600,
        "device": "cpu",
        "threads": 1,
    }
    return Config(**values | changes)


def one_line(result, *parts):
    """Wrong use: one line that says what to do, status 2."""
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in last


def without_clock(records):
    """What of a run's records is the same whenever and wherever it is done."""
    return [{k: v for k, v in r.items() if "seconds" not in k and k != "conditions"} for r in records]


def write_toy_cifar(folder):
    """Both data sets, binary, with 260 training images and 10 to test: just one batch an epoch."""
    generator = np.random.default_rng(0)

    def images(count, labels, classes):
        y = generator.integers(classes, size=(count, labels), dtype=np.uint8)
        return np.hstack([y, generator.integers(256, size=(count, 3072), dtype=np.uint8)]).tobytes()

    ten, hundred = folder / "cifar-10-batches-bin", folder / "cifar-100-binary"
    ten.mkdir(parents=True)
    hundred.mkdir()
    for i in range(1, 6):
        (ten / f"data_batch_{i}.bin").write_bytes(images(52, 1, 10))
    (ten / "test_batch.bin").write_bytes(images(10, 1, 10))
    (hundred / "train.bin").write_bytes(images(260, 2, 100))
    (hundred / "test.bin").write_bytes(images(10, 2, 100))
    return folder
