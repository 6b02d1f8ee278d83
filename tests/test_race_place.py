"""Where a race runs: optimizers of the current folder, the images there are, the cores it may use."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import BATCH, config, here, one_line, write_toy_cifar

from kfqn.race import cores
from kfqn.race.runs import Run, workers
from kfqn.race.runs.plan import Scale
from kfqn.race.runs.train import train

SMALL = ["--epochs", 1, "--seeds", 1, "--width", 2, "--train-size", BATCH, "--eval-size", 20]
OWN = """
import torch
from of_mine import half  # beside it

class Half(torch.optim.SGD):
    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, lr=half(lr))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("")
    (tmp_path / "own" / "fast.py").write_text(OWN)
    (tmp_path / "of_mine.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "unfinished.py").write_text("class Half(\n")
    return tmp_path


def console_script(*arguments, cwd):
    """kfqn as an installed script starts it, the current folder not on its path, held to one core."""
    code = "import sys; sys.path.remove(''); from kfqn.race.cli import main; sys.exit(main())"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        preexec_fn=_on_one_core if hasattr(os, "sched_setaffinity") else None,
        capture_output=True,
        text=True,
        timeout=300,
    )


def forget(folder):
    """Let the next test import its own files."""
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def _on_one_core():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_optimizers_of_the_current_folder_race_from_the_console_script(folder):
    own = ["own.fast.Half:lr=0.2", "own.fast.Half"]
    result = console_script("race", "--optimizers", *own, *SMALL, "--jobs", 1, "--out", "out", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Half (lr 0.2)" in result.stdout
    runs = [Run(place) for place in (folder / "out" / "runs").iterdir()]
    assert [run.end()["status"] for run in runs] == ["finished"] * 2
    if hasattr(os, "sched_setaffinity"):
        assert [run.config.threads for run in runs] == [1, 1]


def test_optimizers_of_the_current_folder_are_swept_over_the_values_given_and_race_with_the_best(
    folder, monkeypatch
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    scale, out = [*SMALL, "--problem", "digits-mlp"], folder / "out"
    result = here(
        "sweep", "--optimizers", "own.fast.Half:lr=1e-9/0.2/1e9", *scale, "--by", "train_loss", "--out", out
    )
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads((out / "sweep.json").read_text())["digits-mlp"]
    assert [point["lr"] for point in entries["own.fast.Half"]["points"]] == [1e-9, 0.2, 1e9]
    assert entries["own.fast.Half"]["best"] == {"lr": 0.2}
    race = here("race", "--optimizers", "torch.optim.SGD:lr=0.1", "own.fast.Half", *scale, "--out", out)
    assert "Half (lr 0.2) " in race.stdout, race.stderr
    one_line(here("sweep", "--optimizers", "own.fast.Half"), "own.fast.Half has no grid: give the values")
    one_line(here("sweep", "--optimizers", "kfbfgs:auto"), "no optimizer with a grid is 'kfbfgs:auto'")
    one_line(
        here("sweep", "--optimizers", "own.fast.Half:lr=1/x"), "lr must be a number, true or false, got 'x'"
    )
    forget(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken.Half", "broken cannot be imported (ZeroDivisionError: division by zero): mend it"),
        ("unfinished.Half", "unfinished cannot be imported (SyntaxError: "),
        ("own.fast.Third", "own.fast has no Third: give the class's dotted name"),
        ("own.slow.Half", "own.slow cannot be imported (No module named 'own.slow')"),
        ("own.fast.half", "own.fast.half is no torch.optim.Optimizer"),
        (".Half", "the empty module has no Half"),
    ],
)
def test_what_cannot_be_had_of_the_current_folder_is_one_line(folder, monkeypatch, name, why):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    one_line(here("race", "--optimizers", name, *SMALL, "--out", folder / "out"), why)
    assert not (folder / "out").exists()
    forget(folder)


def test_sizes_beyond_the_data_are_refused_before_anything_runs(tmp_path):
    data = write_toy_cifar(tmp_path / "cifar")
    cifar = ["--problem", "cifar100-vgg16", "--data-dir", data]
    for command in ("race", "sweep"):
        for problem, there in ((["--problem", "digits-mlp"], 1437), (cifar, 260)):
            result = here(command, *problem, "--train-size", there + 1, "--out", tmp_path / "out")
            one_line(
                result, f"--train-size must be at most {there}, the training images of {problem[1]}, got"
            )
    figure = here("figure", 2, "--train-size", 50_001, "--data-dir", data, "--out", tmp_path / "out")
    one_line(figure, "must be at most 260, the training images of cifar100-allcnn, got 50001: leave it out")
    assert not [*tmp_path.glob("out/runs")]


@pytest.mark.parametrize(
    ("options", "trained", "read"),
    [
        ([], 1437, "first 1437 training and 360 test images"),
        (["--train-size", 1437, "--eval-size", 400], 1437, "first 400 training and 360 test images"),
        (["--train-size", 300, "--eval-size", 5000], 300, "first 300 training and 360 test images"),
        (["--eval-size", 7], 1437, "first 7 training and 7 test images"),
    ],
)
def test_the_report_says_how_many_images_were_read(tmp_path, options, trained, read):
    race = ["race", "--problem", "digits-mlp", "--optimizers", "sgd:lr=0.1", "--epochs", 1, "--seeds", 1]
    result = here(*race, *options, "--width", 2, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "race.html").read_text(encoding="utf-8")
    assert f"<dt>training images</dt><dd>{trained}</dd>" in page
    assert f"<dt>evaluated images</dt><dd>{read}</dd>" in page


CPU = {"epochs": 1, "budget": None, "width": None, "train_size": None, "evaluated": 1}


@pytest.mark.parametrize(
    ("told", "allowed", "jobs", "threads_alone", "threads_of_many"),
    [
        (None, 3, 3, 3, 1),
        ("", 1, 1, 1, 1),
        ("2", 6, 3, 2, 2),
        ("4,2", 2, 1, 4, 4),
        ("all", 2, 2, 2, 1),
        ("0", 2, 2, 2, 1),
    ],
)
def test_jobs_and_threads_go_by_the_cores_allowed_and_the_threads_told(
    monkeypatch, told, allowed, jobs, threads_alone, threads_of_many
):
    from kfqn.race.cli import training_of
    from kfqn.race.parser import parser
    from kfqn.race.problems import PROBLEMS
    from kfqn.race.session import scale_of

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(allowed)}, raising=False)
    assert scale_of(training_of(parser().parse_args(["race"])), PROBLEMS["digits"]).jobs == jobs
    assert scale_of(training_of(parser().parse_args(["race", "--jobs", "9"])), PROBLEMS["digits"]).jobs == 9
    assert Scale(**CPU, device="cpu", jobs=1).threads == threads_alone
    assert Scale(**CPU, device="cpu", jobs=2).threads == threads_of_many
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores.available_cores() == 5


SLEEPY = """
import time
import torch

slept = []

class Sleepy(torch.optim.SGD):
    def step(self, closure=None):
        if not slept:  # as an import or a kernel at its first use
            slept.append(time.sleep(1.5))
        return super().step(closure)
"""


def test_the_first_run_of_every_worker_is_as_quick_as_its_next(tmp_path, monkeypatch):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    monkeypatch.syspath_prepend(tmp_path)
    sleepy = {"entrant": "sleepy.Sleepy", "settings": {"lr": 0.1}, "epochs": 1, "width": 2}
    runs = [Run.create(tmp_path / "runs", config(**sleepy, seed=seed)) for seed in range(3)]
    start = time.monotonic()
    workers.run_all(runs, 2, None, lambda: None)
    assert time.monotonic() - start > 1.5
    assert [run.end()["status"] for run in runs] == ["finished"] * 3
    assert all(run.epochs()[-1]["seconds"] < 1.4 for run in runs)


@pytest.mark.parametrize("entrant", ["kfbfgs:auto", "kfac", "sgd"])
def test_what_is_warmed_up_leaves_no_trace_in_a_run(tmp_path, monkeypatch, entrant):
    settings = {"kfac": {"lr": 1.0, "damping": 1.0}, "sgd": {"lr": 0.05}}.get(entrant, {})
    monkeypatch.setattr("kfqn.race.runs.warm_up._WARM", set())
    runs = [
        Run.create(tmp_path / name, config(entrant=entrant, settings=settings, epochs=2))
        for name in ("first", "next")
    ]
    for run in runs:
        train(run, None)
    first, after = ([record["train_loss"] for record in run.epochs()] for run in runs)
    assert first == after
    assert len(first) == 2
