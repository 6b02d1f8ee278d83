"""Sweeps: the grids, what is best, halving, and that every point is done once whoever works on it."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from lab import BATCH, config, here, kfqn, one_line
from rich.console import Console

from kfqn.race import entrants, problems
from kfqn.race.entrants import grids
from kfqn.race.report.live_view import live_view
from kfqn.race.runs import Run, train, workers
from kfqn.race.runs.plan import Scale, Search
from kfqn.race.sweep import best, complete, points_of, save, scores_of, sweep

SMALL = ["--width", 2, "--train-size", BATCH, "--eval-size", 50, "--jobs", 1]


def test_the_ranges_of_appendix_b2():
    assert [len(grids.grid("cifar10-allcnn", name)) for name in grids.PRINTED] == [63, 63, 63, 45, 7]
    for name in ("kfbfgs", "kflbfgs", "kfac"):
        assert grids.PRINTED[name]["lr"] == (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
        assert grids.PRINTED[name]["damping"] == (0.1, 0.3, 1, 3, 10, 30, 100)
    assert grids.PRINTED["adam"]["lr"] == (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
    assert grids.PRINTED["adam"]["eps"] == (1e-12, 1e-8, 1e-4, 0.01, 0.1)
    assert grids.PRINTED["sgd"] == {"lr": (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1)}
    assert set(grids.PRINTED) == set(grids.DIGITS) == set(entrants.PAPER_FIELD)


def test_problems_that_are_not_the_papers_have_ranges_in_torchs_convention():
    assert set(grids.OURS) == set(problems.PROBLEMS) - set(grids.TABLE_3) - set(problems.DEVELOPMENT)
    assert all(set(ranges) == set(entrants.PAPER_FIELD) for ranges in grids.OURS.values())
    assert set(grids.PEERS) == set(entrants.SWEPT) - set(entrants.PAPER_FIELD) - {"lbfgs"}
    rates = [point["lr"] for point in grids.grid("cifar10-resnet20", "sgd")]
    assert min(rates) < 0.1 < max(rates)  # what He et al. (2016) took
    assert not any("beta2" in point for point in grids.grid("cifar10-resnet20", "adam"))


@pytest.mark.parametrize("problem", grids.TABLE_3)
def test_table_3_lies_on_the_printed_ranges(problem):
    assert problem in problems.PROBLEMS
    for name, settings in grids.TABLE_3[problem].items():
        assert all(value in grids.PRINTED[name][key] for key, value in settings.items())
        assert grids.in_torch(name, settings) in grids.grid(problem, name)
        assert grids.in_print(name, grids.in_torch(name, settings)) == settings
        found, source = entrants.best_settings(problem, name, Path("none"))
        assert found == grids.in_torch(name, settings)
        assert source == "the paper's Table 3"


def test_everybody_can_get_as_many_points():
    for name in (*grids.PRINTED, *grids.PEERS):
        whole, some = (grids.grid("cifar100-vgg16", name, max_points=most) for most in (None, 12))
        assert len(some) == min(12, len(whole))
        assert all(point in whole for point in some)
        assert some == grids.grid("cifar100-vgg16", name, max_points=12)


def test_a_coarse_grid_is_part_of_the_grid_and_keeps_the_largest_values():
    for name in grids.PRINTED:
        whole, coarse = (grids.grid("cifar100-vgg16", name, thinned) for thinned in ((), grids.SETTINGS))
        assert all(point in whole for point in coarse)
        assert whole[-1] in coarse
    assert len(grids.grid("cifar100-vgg16", "kfac", grids.SETTINGS)) == 20
    assert len(grids.grid("cifar100-vgg16", "kfac", ["damping"])) == 36


def finished(folder, loss, status="finished", count=1, **changes):
    run = Run.create(folder, config(**changes))
    record = {"train_loss": loss, "average_loss": 2 * loss, "test_error": 1 - loss}
    run.write([*({"epoch": k + 1} | record for k in range(count)), {"status": status, "reason": ""}])
    return run


def test_the_best_of_a_sweep_is_the_lowest_that_finished(tmp_path):
    cases = [(0.1, 0.5, "finished"), (1.0, 0.2, "finished"), (10.0, 0.01, "diverged")]
    runs = [
        finished(tmp_path, loss, status, settings={"lr": lr, "damping": 1.0}) for lr, loss, status in cases
    ]
    points = points_of(runs)["kfbfgs"]
    for by, lr in (("train_loss", 1.0), ("average_loss", 1.0), ("test_error", 0.1)):
        assert best("kfbfgs", points, by) == {"lr": lr, "damping": 1.0}
    assert [point["train_loss"] for point in points] == [0.5, 0.2, None]
    assert [point["status"] for point in points] == ["finished", "finished", "diverged"]
    assert complete({"points": points})
    assert not complete({"points": [*points, points[0] | {"status": "failed"}]})


WHOLE = Scale(epochs=9, budget=None, width=4, train_size=600, evaluated=50, device="cpu", jobs=1)


def fake_runs(folder, losses, epochs=lambda settings: 1):
    """What `sweep` asks to be run, written by hand: lr -> loss, None for diverged."""
    asked = []

    def do(field, scale):
        asked.append((scale.epochs, [settings["lr"] for _, settings in field]))
        runs = []
        for _, settings in field:
            loss = losses[settings["lr"]]
            values = {"entrant": "sgd", "settings": dict(settings), "epochs": scale.epochs}
            status = "finished" if loss is not None else "diverged"
            runs.append(finished(folder, loss or 9.0, status, epochs(settings), **values))
        return runs

    return do, asked


def test_halving_promotes_the_best_third_and_survives_a_field_that_is_lost(tmp_path):
    losses = {float(k): k / 10 for k in range(1, 10)}
    field = [("sgd", {"lr": lr}) for lr in losses]
    search = Search("train_loss", halving=True, coarse=(), max_points=None, seeds=1)
    do, asked = fake_runs(tmp_path / "a", losses)
    entries, runs = sweep(field, WHOLE, search, do)
    assert asked == [(1, [*losses]), (3, [1.0, 2.0, 3.0]), (9, [1.0])]
    assert len(runs) == 13
    assert entries["sgd"]["best"] == {"lr": 1.0}
    assert entries["sgd"]["scale"]["epochs"] == 9
    assert len(entries["sgd"]["points"]) == 9

    do, asked = fake_runs(tmp_path / "b", dict.fromkeys(losses))
    entries, _ = sweep(field, WHOLE, search, do)
    assert asked == [(1, [*losses])]
    assert entries["sgd"]["best"] is None
    assert complete(entries["sgd"])


def test_under_a_budget_the_lowest_wins_not_the_run_with_the_most_epochs(tmp_path):
    do, _ = fake_runs(tmp_path, {0.1: 0.9, 0.01: 0.1}, epochs=lambda s: 38 if s["lr"] == 0.1 else 37)
    search = Search("train_loss", halving=False, coarse=(), max_points=None, seeds=1)
    entries, _ = sweep([("sgd", {"lr": lr}) for lr in (0.1, 0.01)], WHOLE, search, do)
    assert entries["sgd"]["best"] == {"lr": 0.01}


def test_a_sweep_file_keeps_what_other_sweeps_found(tmp_path):
    path = tmp_path / "sweep.json"
    one, two, three, four = ([{"status": "finished", "lr": lr}] for lr in (1.0, 2.0, 3.0, 4.0))
    save({"sgd": {"scale": {"epochs": 1}, "points": one}}, "digits", path)
    save({"adam": {"scale": {"epochs": 40}, "points": two}}, "digits", path)
    save({"sgd": {"scale": {"epochs": 2}, "points": three}}, "cifar10-allcnn", path)
    save({"sgd": {"scale": {"epochs": 3}, "points": four}}, "digits", path)
    known = json.loads(path.read_text(encoding="utf-8"))
    assert {name: entry["points"] for name, entry in known["digits"].items()} == {"sgd": four, "adam": two}
    assert known["cifar10-allcnn"]["sgd"]["points"] == three


def test_means_over_seeds_decide_and_a_lost_seed_loses():
    points = [
        {"lr": lr, "seed": seed, "status": "finished", "share": 1.0, "train_loss": loss}
        for lr, losses in ((0.1, (0.5, 0.5)), (1.0, (0.1, None)), (3.0, (0.2, 0.6)))
        for seed, loss in enumerate(losses)
    ]
    assert [settings["lr"] for settings, _ in scores_of("sgd", points, "train_loss")] == [3.0, 0.1, 1.0]
    assert best("sgd", points, "train_loss", lr=1.0) is None


def test_a_sweep_from_the_command_line(tmp_path):
    common = ["--epochs", 1, "--coarse", *SMALL, "--out", tmp_path, "--save", tmp_path / "tuned.json"]
    for name, command in (("adam", here), ("sgd", kfqn)):
        result = command("sweep", "--optimizers", name, *common)
        assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8"))["digits"]
    for name in ("adam", "sgd"):
        points, entry = grids.grid("digits", name, grids.SETTINGS), saved[name]
        assert [{key: p[key] for key in points[0]} for p in entry["points"]] == points
        assert entry["best"] in points
        assert entry["by"] == "average_loss"


def test_halving_runs_all_points_shortly_and_the_best_in_full(tmp_path):
    command = ["sweep", "--optimizers", "sgd", "--epochs", 9, "--halving", "--coarse", "lr", *SMALL]
    result = here(*command, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["digits"]
    points = saved["sgd"]["points"]
    assert sorted(p["share"] for p in points) == [1 / 9] * 6 + [1 / 3] * 2 + [1.0] * 2
    longest = [p for p in points if p["share"] == 1.0]
    assert saved["sgd"]["best"]["lr"] == min(longest, key=lambda p: p["average_loss"])["lr"]
    assert saved["sgd"]["halving"]
    assert saved["sgd"]["coarse"] == ["lr"]
    one_line(
        here("sweep", "--epochs", 8, "--halving", "--out", tmp_path),
        "--halving starts with a ninth of the length, so --epochs must be at least 9",
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_sweep_killed_in_the_middle_and_resumed_does_each_point_once(tmp_path):
    arguments = ["sweep", "--optimizers", "sgd", "--epochs", 3, "--coarse", *SMALL, "--out", tmp_path]
    command = [sys.executable, "-m", "kfqn", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def done():
        return [folder for folder in (tmp_path / "runs").glob("*") if Run(folder).end()]

    deadline = time.monotonic() + 120
    while len(done()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while any(Run(p).held() for p in (tmp_path / "runs").glob("*")):  # its workers die a little later
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = {folder: (folder / "epochs.jsonl").read_text() for folder in done()}
    assert len(before) < 10
    result = here(*arguments)
    assert result.returncode == 0, result.stderr
    assert f"{len(before)} of 10 runs are done already" in result.stdout
    assert before == {folder: (folder / "epochs.jsonl").read_text() for folder in before}  # clocks and all
    assert len(done()) == len(list((tmp_path / "runs").iterdir())) == 10


def counting_worker(folders, log):
    """A worker as `workers.run_all` starts it, which also notes every run that it does."""
    whole = train.train

    def noted(run, data_dir):
        with log.open("a") as file:
            file.write(f"{run.folder.name}\n")
        whole(run, data_dir)

    train.train = noted
    workers.work(folders, None)


def test_two_workers_on_one_sweep_do_each_point_once(tmp_path):
    points = grids.grid("digits", "sgd")
    runs = [
        Run.create(tmp_path / "runs", config(entrant="sgd", settings=settings, epochs=1, width=2))
        for settings in points
    ]
    context, log = multiprocessing.get_context("spawn"), tmp_path / "log"
    folders = [run.folder for run in runs]
    both = [context.Process(target=counting_worker, args=(folders, log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert sorted(log.read_text().split()) == sorted(folder.name for folder in folders)
    assert all(run.end()["status"] == "finished" for run in runs)


def test_the_live_view_shows_what_is_done_running_lost_and_best(tmp_path):
    finished(tmp_path, 0.25, settings={"lr": 3.0, "damping": 1.0})
    finished(tmp_path, 0.01, "diverged", settings={"lr": 30.0, "damping": 1.0})
    Run.create(tmp_path, config(settings={"lr": 10.0, "damping": 1.0})).show_progress(0.5)
    Run.create(tmp_path, config(settings={"lr": 20.0, "damping": 1.0}))
    runs = [Run(folder) for folder in sorted(tmp_path.iterdir())]
    console = Console(file=StringIO(), force_terminal=True, width=200)
    with live_view(runs, console, "train_loss") as update:
        update()
    shown = console.file.getvalue()
    assert "KF-BFGS" in shown
    assert "2 of 4, 1 running, 1 lost, best train loss 0.25 at lr 3, damping 1" in shown


def lines_of_a_view(runs, width):
    """The lines of a live view on a terminal so wide."""
    console = Console(file=StringIO(), force_terminal=True, width=width)
    with live_view(runs, console, "train_loss") as update:
        update()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_live_view_fits_the_terminal_and_has_no_empty_place(tmp_path, width):
    long = {"lr": 0.123456, "damping": 1e-7, "interval": 10.0}
    others = [("own.AnOptimizerOfWhomTheNameIsVeryLong", {}), ("adam", long)]
    field, runs = [("kflbfgs:auto", {}), ("kfbfgs", long), *others], []
    for n, (entrant, settings) in enumerate(field):
        for seed in range(12):
            place = {"entrant": entrant, "settings": settings, "seed": seed}
            runs.append(finished(tmp_path, 0.012345 + n, "failed" if seed > 9 else "finished", **place))
        runs.append(Run.create(tmp_path, config(entrant=entrant, settings=settings, seed=12)))
        runs[-1].show_progress(0.5)
    lines = lines_of_a_view(runs, width)
    assert len({*lines}) == len(field)
    assert all(len(line) <= width for line in lines)
    assert not any(re.search(r"\bat +\d:", line) for line in lines)
    told = "\n".join(lines[-len(field) :])
    if width >= 80:
        assert len(re.findall(r"12 of 13, 1 running, 2 lost.* \d:\d\d:\d\d$", told, re.MULTILINE)) == 4
        assert "AnOptimizerOfWhomTh" in told
        assert re.search(r"best (train loss )?0\.0123 ", told)
    else:
        assert re.search(r"12 of 13, best 0\.0123 +\d:", told)
    if width == 160:
        assert "best train loss 1.01 at lr 0.123456, damping 1e-07, interval 10 " in told
        assert re.search(r"best train loss 0\.0123 +\d:", told)


def test_the_committed_settings_are_the_best_of_the_committed_grid():
    """tuned.json holds outcome and choice; they must agree with each other and with the grid in the code.

    The digits were swept whole, with two seeds, for either network; ResNet-20 and LeNet-5 cut down, by
    halving and with one.
    """
    sweeps = json.loads(Path(entrants.__file__).with_name("tuned.json").read_text(encoding="utf-8"))
    assert set(sweeps) == set(grids.OURS)
    for name, entries in sweeps.items():
        problem, whole = problems.PROBLEMS[name], name.startswith("digits")
        assert set(entries) == {*entrants.PAPER_FIELD, *(grids.PEERS if whole else ())}
        for entrant, entry in entries.items():
            for key in ("batch_size", "weight_decay", *(("width", "epochs") if whole else ())):
                assert entry["scale"][key] == getattr(problem, key)
            assert not (whole and (entry["halving"] or entry["coarse"]))
            grid = grids.grid(name, entrant, entry["coarse"])
            tried = [{key: p[key] for key in grid[0]} for p in entry["points"]]
            assert all(point in grid for point in tried)
            assert all(tried.count(point) == (2 if whole else 1) for point in grid)
            assert best(entrant, entry["points"], entry["by"]) == entry["best"] is not None
