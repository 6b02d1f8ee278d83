"""The race end to end, as a user runs it: real processes, real files, the command line itself."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lab import BATCH, TINY, config, here, hold, kfqn, one_line, without_clock, write_toy_cifar
from torch import nn

from kfqn.race import entrants
from kfqn.race.entrants import grids
from kfqn.race.failure import Failure
from kfqn.race.report.results import Result, common_target
from kfqn.race.report.sentences import unfinished
from kfqn.race.report.table import rows
from kfqn.race.runs import Run, workers
from kfqn.race.runs.averaging import polynomial_average
from kfqn.race.runs.train import train
from kfqn.race.runs.trainer import Trainer


def test_a_race_from_the_command_line_and_two_commands_share_it(tmp_path):
    race = ["race", *TINY, "--seeds", 2, "--out", tmp_path]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "kfqn", *map(str, race), "--jobs", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        for label in ("KF-BFGS (", "KF-BFGS(L) (", "KFAC (", "SGD-m (", "Adam ("):
            assert label in output
        assert "was first at the common target" in output
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "race.html").read_text(encoding="utf-8")
    for condition in ("threads", "torch", "commit", "seeds"):
        assert f"<dt>{condition}</dt>" in html

    before = {p: p.read_text(encoding="utf-8") for p in tmp_path.rglob("epochs.jsonl")}
    assert len(before) == 12
    assert [Run(path.parent).end()["status"] for path in before] == ["finished"] * 12
    again = here(*race, "--jobs", 1)
    assert "12 of 12 runs are done already" in again.stdout
    assert before == {p: p.read_text(encoding="utf-8") for p in tmp_path.rglob("epochs.jsonl")}


def test_everybody_trains_resnet20_with_the_settings_of_the_package(tmp_path):
    """BatchNorm belongs to no layer, shortcuts join two: the paper's networks have neither."""
    scale = ["--width", 2, "--eval-size", 10, "--epochs", 2, "--seeds", 1, "--jobs", 2]
    data = write_toy_cifar(tmp_path / "cifar")
    result = here("race", "--problem", "cifar10-resnet20", *scale, "--data-dir", data, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CIFAR-10, ResNet-20 of width 2" in result.stdout
    runs = [Run(folder) for folder in (tmp_path / "runs").iterdir()]
    assert {run.config.entrant for run in runs} == {*entrants.DEFAULT_FIELD}
    for run in runs:
        name, (first, second) = run.config.entrant, run.epochs()
        assert run.config.settings == entrants.best_settings("cifar10-resnet20", name, Path("none"))[0]
        assert run.end()["status"] == "finished"
        assert first["train_loss"] != second["train_loss"]


def test_a_run_that_diverges_is_a_result_and_is_shown(tmp_path):
    arguments = [
        "--optimizers",
        "sgd:lr=1e30",
        "kfbfgs:lr=1,damping=1",
        *TINY,
        "--seeds",
        1,
        "--out",
        tmp_path,
    ]
    result = here("race", *arguments)
    assert result.returncode == 0, result.stderr
    assert "1 diverged" in result.stdout
    assert "is not finite" in (tmp_path / "race.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("entrant", "of_trainer"),
    [
        *((name, {}) for name in entrants.ENTRANTS),
        *((name, {"schedule": "cosine", "warmup": 0.3, "averaged": 3.0}) for name in ("kfbfgs:auto", "adam")),
    ],
)
def test_an_interrupted_run_resumes_as_if_nothing_had_happened(entrant, of_trainer, tmp_path, monkeypatch):
    swept = {*grids.DIGITS, *grids.PEERS}
    grid = grids.grid("digits", entrant) if entrant in swept else [grids.USUAL.get(entrant, {})]
    settings = grid[len(grid) // 2] | of_trainer
    whole = Run.create(tmp_path / "whole", config(entrant=entrant, settings=settings))
    train(whole, None)
    assert whole.end()["status"] == "finished"

    monkeypatch.setattr("kfqn.race.runs.trainer.CHECKPOINT_SECONDS", 0.0)
    cut = Run.create(tmp_path / "cut", config(entrant=entrant, settings=settings))
    trainer, evaluate = Trainer(cut, None), Trainer.evaluate

    def stop_at_three(self, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return evaluate(self, epoch)

    monkeypatch.setattr(Trainer, "evaluate", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(cut.epochs()) == 2
    assert cut.checkpoint.exists()
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    train(cut, None)
    assert without_clock(cut.records()) == without_clock(whole.records())
    assert not cut.checkpoint.exists()


def test_an_average_of_the_weights_gives_late_steps_more_and_forgets_the_start():
    model, power, history = nn.Linear(1, 1), 3.0, []
    average = polynomial_average(model, power)
    for n in range(1, 8):
        with torch.no_grad():
            model.weight.fill_(n**2)
        average.update_parameters(model)
        history.append(float(n**2))
    # Shamir and Zhang (2013), section 4: with p = 3 the n-th of N weights counts as (n)(n + 1)(n + 2)
    shares = [n * (n + 1) * (n + 2) for n in range(1, 8)]
    expected = sum(share * W for share, W in zip(shares, history, strict=True)) / sum(shares)
    assert average.module.weight.item() == pytest.approx(expected)


def test_a_cosine_ends_at_nothing_and_the_average_is_what_is_read(tmp_path):
    settings = {"lr": 0.1, "schedule": "cosine", "averaged": 8.0}
    trainer = Trainer(Run.create(tmp_path, config(entrant="sgd", settings=settings)), None)
    start = trainer.model.state_dict()["0.weight"].clone()
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    loss = trainer.task.evaluate(trainer.averaged_model.module).train_loss
    assert trainer.records[-1]["train_loss"] == pytest.approx(loss)
    assert loss != trainer.task.evaluate(trainer.model).train_loss
    assert not start.equal(trainer.model.state_dict()["0.weight"])


def test_any_torch_optimizer_races_by_its_dotted_name(tmp_path):
    names = [
        "torch.optim.RMSprop:lr=1e-3,centered=true,schedule=cosine",
        "torch.optim.LBFGS:lr=0.1,max_iter=2",
        "kfqn.KFLBFGS",
    ]
    result = here("race", "--optimizers", *names, *TINY, "--seeds", 1, "--jobs", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for label in ("RMSprop (lr 0.001, centered 1, cosine)", "LBFGS (lr 0.1, max_iter 2)", "KFLBFGS  "):
        assert label in result.stdout
    (run,) = (Run(f) for f in (tmp_path / "runs").iterdir() if f.name.startswith("torch.optim.RMSprop"))
    assert run.config.settings == {"lr": 0.001, "centered": True, "schedule": "cosine"}
    trainer = Trainer(run, None)
    assert trainer.optimizer.defaults["centered"] is True
    assert trainer.optimizer.defaults["weight_decay"] == run.config.weight_decay


def test_what_cannot_be_built_is_refused_before_anything_runs(tmp_path):
    for text, why in {
        "torch.optim.Nadam": "has no Nadam",
        "torch.nn.Linear": "is no torch.optim.Optimizer",
        "nowhere.Adam": "cannot be imported",
        "torch.optim.SGD:lr=0.1,betas=3": "cannot be built with",
        "torch.optim.SGD:lr=-1": "Invalid learning rate",
        "kfbfgs:lr=1,damping=1,warm=-1": "warm must be a whole number of batches >= 0, got -1",
        "torch.optim.SGD:lr=high": "lr must be a number, true or false, got 'high'",
    }.items():
        one_line(here("race", "--optimizers", text, "--out", tmp_path), why)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_stops_at_once_and_the_same_command_goes_on(tmp_path):
    arguments = [
        "race",
        "--optimizers",
        "sgd:lr=0.05",
        "--epochs",
        "40",
        "--seeds",
        "4",
        "--jobs",
        "2",
        "--out",
        ".",
    ]
    command = [sys.executable, "-m", "kfqn", *arguments]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 120
    while not any(Run(p).epochs() for p in (tmp_path / "runs").glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.strip() == "kfqn: interrupted; the same command goes on from here"
    left = [p for p in tmp_path.rglob(".*") if p.is_file()]
    assert not left, "half-written files"
    for line in (p for f in tmp_path.rglob("epochs.jsonl") for p in f.read_text().splitlines()):
        json.loads(line)


def test_a_claimed_run_is_left_to_its_owner(tmp_path):
    run = Run.create(tmp_path, config(epochs=1))
    with run.claimed() as ours:
        assert ours
        with Run(run.folder).claimed() as theirs:
            assert not theirs
        workers.work([run.folder], None)  # must not touch it
        assert run.end() is None
        assert Run(run.folder).held()
    assert not run.held()


@pytest.mark.parametrize("when", ["while the workers run", "once they are over"])
def test_a_run_that_another_command_leaves_behind_is_taken_over(tmp_path, monkeypatch, when):
    run = Run.create(tmp_path, config(epochs=1))
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run.folder, held, leave))
    other.start()
    assert held.wait(60)
    one_round = workers._work_and_update

    def and_then_leave(*args):
        came_back = one_round(*args)
        leave.set()
        other.join(20)
        return came_back

    if when == "once they are over":
        monkeypatch.setattr(workers, "_work_and_update", and_then_leave)
        workers.run_all([run], 1, None, lambda: None)
    else:
        workers.run_all([run], 1, None, leave.set)
        other.join(20)
    assert other.exitcode == 0
    assert run.end()["status"] == "finished"


def test_a_killed_worker_leaves_its_run_unfinished_and_said_so(tmp_path):
    def kill():
        for child in multiprocessing.active_children():
            child.kill()

    run = Run.create(tmp_path, config(epochs=1))
    workers.run_all([run], 1, None, kill)
    assert run.end() is None
    ((name, reason, _),) = unfinished([run])
    assert name == run.folder.name
    assert "its process was killed" in reason


def test_the_table_is_made_from_the_files_alone(tmp_path):
    """Three runs written by hand: the target is what all finished runs reach, medians and all."""
    losses = {"kfbfgs": [0.5, 0.1, 0.02], "sgd": [0.9, 0.6, 0.3]}
    results = []
    for entrant, values in losses.items():
        runs = []
        for seed in range(2):
            run = Run.create(tmp_path, config(entrant=entrant, settings={"lr": 1.0}, seed=seed))
            lines = [
                {"epoch": k + 1, "train_loss": v, "test_error": v / 2, "seconds": 2.0 * (k + 1) + seed}
                for k, v in enumerate(values)
            ]
            run.write([*lines, {"status": "finished", "warm_start_seconds": 0.5}])
            runs.append(run)
        results.append(Result(runs))
    assert common_target(results) == 0.3
    first, second = rows(results)
    assert first.label == "KF-BFGS (lr 1)"
    assert (first.epochs_to_target, first.seconds_to_target) == ("2", "5.00")
    assert (second.epochs_to_target, second.seconds_to_target) == ("3", "7.00")
    assert first.quantities == ("0.02 ± 0", "1.00 ± 0.00")
    assert first.seconds == "6.5"


def test_a_lost_seed_counts_against_its_optimizer(tmp_path):
    results = []
    for entrant, ends in {"sgd": ["finished"] * 3, "adam": ["finished", "diverged", "failed"]}.items():
        runs = [Run.create(tmp_path, config(entrant=entrant, settings={"lr": 1.0}, seed=k)) for k in range(3)]
        for run, status in zip(runs, ends, strict=True):
            record = {
                "epoch": 1,
                "train_loss": 0.1 if entrant == "adam" else 0.2,
                "test_error": 0.5,
                "seconds": 1.0,
            }
            run.write([record, {"status": status, "reason": ""}])
        results.append(Result(runs))
    assert common_target(results) == 0.2
    first, second = rows(results)
    assert first.label == "SGD-m (lr 1)"
    assert second.seconds_to_target == "–"
    assert second.lost == "1 diverged, 1 failed"


# Wrong use: one line that says what to do, status 2.


def test_wrong_use_from_the_command_line(tmp_path):
    one_line(kfqn("race", "--problem", "nothing"), "no problem 'nothing' (choose from digits, digits-mlp")
    one_line(here("race", "--optimizers", "lion"), "no optimizer 'lion' (choose from kfbfgs,")
    one_line(
        here("race", "--optimizers", "kfbfgs:lr"),
        "kfbfgs takes lr=...,damping=... and, if you like, clip=...,",
        "warm=...,",
        "schedule=constant|cosine,warmup=...,floor=...,averaged=..., got 'lr'",
    )
    one_line(here("race", "--optimizers", "sgd:lr=fast"), "'lr=fast' is not of the form key=number")
    one_line(here("race", "--optimizers", "sgd:lr=-1"), "settings must be > 0 and finite, got 'lr=-1'")
    one_line(
        here("race", "--optimizers", "sgd:lr=1,lr=2"), "sgd takes lr=... and, if you like, nesterov=...,"
    )
    one_line(
        here("race", "--optimizers", "sgd:lr=1,averaged=-1", "--out", tmp_path / "new"),
        "averaged must be a power >= 0, got -1",
    )
    one_line(
        here("race", "--optimizers", "sgd:lr=1,schedule=linear", "--out", tmp_path / "new"),
        "schedule must be constant or cosine, got 'linear'",
    )
    for setting, why in {
        "schedule=cosine": "a cosine needs to know where it ends: give --epochs",
        "warmup=0.1": "a warm-up by a share of the steps needs to know where it ends: give --epochs",
        "warmup=1.5": "warmup must be a share of the steps below 1, or a number of them, got 1.5",
        "floor=2": "floor must be a share, 0 to 1, got 2",
    }.items():
        race = ["race", "--optimizers", f"sgd:lr=1,{setting}", "--budget", "5", "--out", tmp_path / "new"]
        one_line(here(*race), why)
    one_line(
        here("race", "--optimizers", "kfbfgs:lr=1"),
        "interval=...,largest=...,decay=...,warm=...,input=",
        "schedule=constant|cosine,warmup=...,floor=...,averaged=..., got 'lr=1'",
    )
    one_line(
        here("race", "--optimizers", "kfac:lr=1,damping=1,momentum=1.5", "--out", tmp_path / "new"),
        "kfac cannot run with these settings: momentum must be >= 0 and < 1, got 1.5",
    )
    one_line(
        here("race", "--optimizers", "kfbfgs:auto:lr=1"),
        "kfbfgs:auto takes only damping=...,clip=...,interval=...,largest=...,decay=...,warm=...,input=",
    )
    one_line(here("race", "--optimizers", "kfac:lr=1,damping=1,pi"), "is not of the form key=number")
    one_line(here("race", "--seeds", "0"), "argument --seeds: must be a whole number >= 1, got '0'")
    one_line(
        here("race", "--train-size", "20"), f"--train-size must be at least one batch, {BATCH} here, got 20"
    )
    one_line(
        here("race", "--device", "toaster"), "--device toaster cannot be used", "leave it out for the CPU"
    )
    missing = here(
        "race", "--problem", "cifar10-allcnn", "--data-dir", tmp_path, "--optimizers", "sgd:lr=0.1"
    )
    one_line(missing, f"no CIFAR-10 in {tmp_path}: give --data-dir a folder")
    (tmp_path / "file").write_text("in the way")
    one_line(here("sweep", "--train-size", "20", "--save", tmp_path / "new.json"), "--train-size must be")
    one_line(
        here("sweep", "--save", tmp_path / "file"), "file is no sweep file, or damaged", "choose another"
    )
    one_line(here("race", "--out", tmp_path / "file"), "cannot write to", "choose another folder with --out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_help_is_instant_and_needs_no_torch():
    code = (
        "import sys\nfrom kfqn.race.cli import main\n"
        "try: main(['race', '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--optimizers" in result.stdout


def test_settings_that_no_sweep_has_found_are_asked_for():
    with pytest.raises(Failure, match=r"no settings are known for adam on elsewhere.*adam:lr=...,eps=..."):
        entrants.best_settings("elsewhere", "adam", Path("none"))


# Several processes, and what the records tell of the factors.


def test_two_processes_race_as_one_does(tmp_path):
    """Each trains on its half of every batch; started by torchrun, as on several machines."""
    race = ["race", "--optimizers", "kfbfgs", "sgd", "--seeds", "1", *TINY]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = subprocess.run(
        [*command, "-m", "kfqn", *race, "--out", tmp_path / "two"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert together.returncode == 0, together.stderr[-3000:]
    assert together.stdout.count("was first at the common target") == 1  # only the first process speaks
    alone = here(*race, "--jobs", "2", "--out", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    for name in ("kfbfgs", "sgd"):
        two, one = (Run(next((tmp_path / of / "runs").glob(f"{name}-*"))) for of in ("two", "one"))
        assert two.config.processes == 2
        assert two.end()["conditions"]["processes a run"] == "2"
        for a, b in zip(two.epochs(), one.epochs(), strict=True):
            for key in ("train_loss", "average_loss", "test_loss"):
                assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_torchrun_starts_a_race_with_a_number_of_processes_that_divides_the_batch(tmp_path, monkeypatch):
    alone = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0"}
    result = kfqn("sweep", "--out", tmp_path, env=os.environ | alone | {"WORLD_SIZE": "2"})
    one_line(result, "torchrun can start a race, not a sweep")
    for key, value in (alone | {"WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(key, value)
    one_line(here("race", "--out", tmp_path), "a batch of 256 cannot be shared by 3 processes")
    assert not [*tmp_path.iterdir()]


def test_records_and_report_tell_what_the_factors_did(tmp_path):
    result = here("race", "--optimizers", "kfbfgs", "kfac", "sgd", "--seeds", "1", *TINY, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    (ours,) = (Run(folder) for folder in (tmp_path / "runs").glob("kfbfgs-*"))
    first, last = (record["diagnostics"] for record in ours.epochs())
    assert last["0"]["steps"] == 2 * first["0"]["steps"] == 4
    assert last["0"]["A taken"] + last["0"]["A skipped"] == 4
    (plain,) = (Run(folder) for folder in (tmp_path / "runs").glob("sgd-*"))
    assert "diagnostics" not in plain.epochs()[0]
    page = (tmp_path / "race.html").read_text(encoding="utf-8")
    assert "What the factors did" in page
    assert page.count("steps refused") == 2
