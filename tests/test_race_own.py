"""A model, data and an optimizer of one's own, from the current folder; lists of runs; misspelt names."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lab import config, here, kfqn, one_line
from test_race_place import console_script, forget
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from kfqn.race.problems.supervised import Pairs, distance, wrong
from kfqn.race.problems.task import Size
from kfqn.race.runs import Run

PAGE = Path(__file__).parents[1] / "docs" / "race_your_own.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
OWN = """
class MySGD(torch.optim.SGD):
    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, lr=lr)
"""
QUICK = ["--epochs", 1, "--seeds", 1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(EXAMPLE)
    (tmp_path / "steps.py").write_text(f"import torch\n{OWN}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file of the same second and size is stale
    yield tmp_path
    forget(tmp_path)


def test_the_ten_lines_of_the_document_race_from_the_console_script(folder):
    lines = EXAMPLE.partition("def problem")[2].strip().splitlines()
    assert len(lines) <= 10
    names = ["kfbfgs:auto", "sgd", "steps.MySGD:lr=0.05"]
    race = ["race", "--problem", "mine:problem", "--optimizers", *names, "--seeds", 2, "--epochs", 2]
    result = console_script(*race, "--jobs", 2, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mine:problem, batch 64, 2 seeds" in result.stdout
    runs = [Run(place) for place in (folder / "runs" / "mine-problem" / "runs").iterdir()]
    assert len(runs) == 6
    assert {run.end()["status"] for run in runs} == {"finished"}
    assert {run.end()["conditions"]["evaluated data"] for run in runs} == {
        "first 128 to train on and 50 to test"
    }
    assert all(run.config.settings["schedule"] == "cosine" for run in runs if run.config.entrant == "sgd")


def test_torchs_own_rivals_race_unless_told_otherwise(folder):
    result = here("race", "--problem", "mine:problem", *QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {Run(place).config.entrant for place in (folder / "runs/mine-problem/runs").iterdir()}
    assert found == {"kfbfgs:auto", "adamw", "sgd"}
    sweep = ["sweep", "--problem", "mine:problem", "--optimizers", "steps.MySGD:lr=0.01/0.1", "--epochs", 1]
    assert here(*sweep).returncode == 0
    entry = json.loads((folder / "runs/mine-problem/sweep.json").read_text())["mine:problem"]["steps.MySGD"]
    assert entry["by"] == "test_error"


def again(*arguments):
    """A race on files that may have changed since the last: how many of its runs were done already."""
    forget(Path.cwd())
    result = here(
        "race", "--problem", "mine:problem", "--optimizers", "sgd", "steps.MySGD", *QUICK, *arguments
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return int((re.search(r"(\d+) of \d+ runs are done", result.stdout) or "00")[1])


def test_what_was_changed_races_anew_and_nothing_else(folder):
    assert again() == 0
    mine, steps = folder / "mine.py", folder / "steps.py"
    mine.write_text("# a remark\n" + EXAMPLE)
    assert again() == 2
    steps.write_text(steps.read_text().replace("lr=lr", "lr=lr / 2"))
    assert again() == 1  # SGD's own run stands
    for change in (
        ("ReLU", "Tanh"),
        ("test, F.cross_entropy", "test, lambda o, y: 2 * F.cross_entropy(o, y)"),
        ("128, 50", "129, 49"),
    ):
        assert change[0] in EXAMPLE
        mine.write_text(EXAMPLE.replace(*change))
        assert again() == 0, change
    mine.write_text(EXAMPLE)
    assert again() == 2


def test_a_problem_that_changes_while_it_races_is_said(folder):
    assert again() == 0
    (run,) = (Run(p) for p in (folder / "runs/mine-problem/runs").glob("sgd-*"))
    run.write([])
    (folder / "mine.py").write_text(EXAMPLE.replace("ReLU", "Tanh"))
    forget(folder)
    from kfqn.race.runs.train import train

    train(run, None)
    assert run.end()["status"] == "failed"
    assert "mine:problem or sgd was changed while it raced" in run.end()["reason"]


ARGUMENTS = "lambda: nn.Linear(2, 3), data, data, F.cross_entropy"
HEAD = """
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from kfqn.race import Supervised
data = TensorDataset(torch.randn(64, 2), torch.randint(3, (64,)))
number = 3
"""


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("3", "bad:problem returned what is of type int: return kfqn.race.Supervised(model=..., train=...,"),
        ("1 / 0", "bad:problem failed (ZeroDivisionError: division by zero): mend it"),
        ("Supervised()", "bad:problem failed (TypeError: Supervised.__init__() missing 4 required"),
        (f"Supervised({ARGUMENTS.replace('lambda: ', '')})", "model is of type Linear: give a function"),
        (f"Supervised({ARGUMENTS.replace('nn.Linear(2, 3)', '3')})", "has a model() that returns what is of"),
        (f"Supervised({ARGUMENTS.replace('Linear(2', 'Linear(5')})", "its first batch (RuntimeError: mat1"),
        (f"Supervised({ARGUMENTS}, batch_size=65)", "train has 64 items, and must have 65 or more"),
        (f"Supervised({ARGUMENTS}, epochs=0)", "epochs must be a whole number >= 1, got 0"),
        (f"Supervised({ARGUMENTS.replace('data, data', 'iter(data), data')})", "train is of type"),
        (f"Supervised({ARGUMENTS.replace('F.cross_entropy', 'lambda o, y: o')})", "a loss that is no single"),
        (f"Supervised({ARGUMENTS.replace('F.cross_entropy', 'lambda o, y: o.sum() / 0')})", "is not finite"),
        (
            "Supervised(lambda: nn.Linear(2, 1), *2 * [TensorDataset(torch.ones(64, 2), torch.ones(64))], "
            "lambda o, y: o.mean())",
            "has outputs (64, 1) and targets (64,), which do not fit: mend their shapes, or give an error=",
        ),
    ],
)  # fmt: skip
def test_a_problem_that_cannot_be_run_is_one_line(folder, given, why):
    (folder / "bad.py").write_text(f"{HEAD}\ndef problem():\n    return {given}\n")
    one_line(here("race", "--problem", "bad:problem"), why)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mine:probelm", "mine has no probelm, did you mean problem? name it as FILE:FUNCTION"),
        (
            "nothing:problem",
            "nothing cannot be imported (No module named 'nothing'): name it as FILE:FUNCTION",
        ),
        ("mine.problem", "no problem 'mine.problem' (choose from digits"),
        ("mine.problem", "or name your own as FILE:FUNCTION, mine:problem for mine.py"),
        ("mine:", "no problem 'mine:'"),
        ("steps:torch", "steps:torch is of type module, no function: let it be one that returns Supervised("),
    ],
)
def test_a_name_that_is_no_problem_is_one_line(folder, name, why):
    one_line(here("race", "--problem", name), why)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--optimizers", "MUON"], "no optimizer 'MUON', did you mean muon? (choose from"),
        (
            ["--optimizers", "torch.optim.Adamw"],
            "torch.optim has no Adamw, did you mean AdamW? give the class's",
        ),
        (["--optimizers", "steps.MySDG"], "steps has no MySDG, did you mean MySGD?"),
        (["--optimizers", "torch.optim.SGD:momentm=0.9"], "'momentm', did you mean momentum?"),
        (["--optimizers", "kfbfgs:auto:direction=plian"], "got 'plian', did you mean plain?"),
        (["--problem", "mine:problem", "--width", 3], "mine:problem has no --width: leave it out"),
        (
            ["--problem", "mine:problem", "--optimizers", "kfac"],
            "no settings are known for kfac on mine:",
        ),
    ],
)
def test_what_is_misspelt_or_not_to_be_had_is_one_line(folder, arguments, why):
    one_line(here("race", *arguments), why)


class Squares(Dataset):
    """Not of tensors, but of Python's numbers."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, n):
        x, y = self.data[n]
        return x, y.item()


def test_batches_and_means_are_those_of_the_data():
    data = TensorDataset(torch.randn(50, 3), torch.randint(4, (50,)))
    model, size = nn.Linear(3, 4), Size(40, 30, 16)
    for train in (data, Squares(data)):
        task = Pairs(train, data, F.cross_entropy, wrong).task(torch.device("cpu"), size)
        batches = [*task.epoch(model, torch.Generator().manual_seed(1))]
        assert [len(batch.target) for batch in batches] == [16, 16] == task.steps * [16]
        order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:32]
        assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), data[order][0])
        assert torch.equal(torch.cat([batch.target for batch in batches]), data[order][1])
        found = task.evaluate(model)
        output, target = model(data.tensors[0][:30]), data.tensors[1][:30]
        loss = F.cross_entropy(output, target).item()
        assert (found.train_loss, found.test_loss) == (pytest.approx(loss), pytest.approx(loss))
        assert found.test_error == pytest.approx((output.argmax(1) != target).double().mean().item())


def test_numbers_are_compared_by_their_distance(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that headings are not broken
    x = torch.randn(7, 2)
    assert distance(x, x + 0.5).item() == pytest.approx(0.5)
    problem = (
        "def problem():\n    x = torch.randn(100, 2)\n    data = TensorDataset(x, x.sum(1, keepdim=True))\n"
        "    return Supervised(lambda: nn.Linear(2, 1), data, data, F.mse_loss, None, 10, 20, title='Sums')\n"
    )
    (folder / "sums.py").write_text(f"{HEAD}\n{problem}")
    result = here("race", "--problem", "sums:problem", "--optimizers", "sgd:lr=0.1", *QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Sums, batch 20, 1 seed" in result.stdout
    heading = result.stdout.partition("optimizer")[2].splitlines()[0]
    assert heading.index("test loss") < heading.index("training loss") < heading.index("mean absolute error")


# kfqn runs


@pytest.fixture
def listed(tmp_path):
    """Three runs: finished, diverged at once, unfinished."""
    values = [{"entrant": "sgd", "settings": {"lr": 0.05, "schedule": "cosine"}, "seed": n} for n in range(3)]
    runs = [Run.create(tmp_path / "runs" / "digits" / "runs", config(**value)) for value in values]
    epochs = [
        {"epoch": n, "train_loss": 1 / n, "average_loss": 1.5 / n, "test_loss": 2 / n, "test_error": 0.5 / n}
        | {"seconds": 2.0 * n, "cpu_seconds": 3.0 * n}
        for n in (1, 2)
    ]
    runs[0].write([*epochs, {"status": "finished", "conditions": {}}])
    runs[1].write([{"status": "diverged", "reason": "the loss is not finite"}])
    runs[2].write(epochs[:1])
    return tmp_path


@pytest.mark.parametrize("below", [".", "runs", "runs/digits/runs"])
def test_runs_as_csv_have_a_line_an_epoch(listed, below):
    result = kfqn("runs", listed / below, "--csv")
    assert result.returncode == 0, result.stderr
    lines = [*csv.DictReader(io.StringIO(result.stdout))]
    told = "problem,optimizer,settings,seed,epoch,train_loss,average_loss,test_loss,test_error,seconds,"
    assert result.stdout.startswith(f"{told}cpu_seconds,status\n")
    by_seed = sorted(lines, key=lambda line: (line["seed"], line["epoch"]))
    told = [(line["seed"], line["epoch"], line["test_error"], line["status"]) for line in by_seed]
    assert told == [
        ("0", "1", "0.5", "finished"),
        ("0", "2", "0.25", "finished"),
        ("1", "", "", "diverged"),
        ("2", "1", "0.5", "unfinished"),
    ]
    assert {line["settings"] for line in lines} == {"lr=0.05,schedule=cosine"}
    assert by_seed[1]["train_loss"] == "0.5"
    assert by_seed[1]["cpu_seconds"] == "6.0"


def test_runs_are_listed_a_line_each_and_a_folder_without_is_one_line(listed, monkeypatch):
    monkeypatch.chdir(listed)
    result = here("runs")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4
    assert re.search(r"digits +sgd:lr=0.05,schedule=cosine +0 +2 +0\.5 +0\.25 +finished", result.stdout)
    one_line(here("runs", listed / "nowhere", "--csv"), "there are no runs in", "name a folder that a race")


def test_a_reader_that_goes_away_is_no_error(listed):
    run = Run.create(listed / "many", config(entrant="sgd", settings={"lr": 1.0}))
    run.write([{"epoch": n + 1, "train_loss": 0.123456789012345} for n in range(5000)])  # no pipe holds it
    command = f"'{sys.executable}' -m kfqn runs '{listed / 'many'}' --csv | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("problem,optimizer")
    assert result.stderr == ""


def test_a_list_of_runs_needs_no_torch(listed):
    code = (
        f"import sys\nfrom kfqn.race.cli import main\nmain(['runs', {str(listed)!r}, '--csv'])\n"
        "heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
