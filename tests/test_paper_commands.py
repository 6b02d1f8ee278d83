"""Every figure and table of the paper, end to end at toy scale, from the command line."""

import json

import pytest
from lab import config, here, kfqn, one_line, write_toy_cifar

from kfqn.race.cli import training_of
from kfqn.race.entrants import ENTRANTS, PAPER_FIELD
from kfqn.race.paper.cost import COLUMNS
from kfqn.race.paper.experiment import paper_scale
from kfqn.race.paper.tables import COMPUTATION, STORAGE
from kfqn.race.parser import parser
from kfqn.race.problems import PROBLEMS
from kfqn.race.runs import Run
from kfqn.race.runs.train import train

TOY = ["--width", 2, "--train-size", 256, "--eval-size", 10, "--epochs", 1, "--jobs", 1]
LABELS = [ENTRANTS[name].label for name in PAPER_FIELD]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy_cifar(tmp_path_factory.mktemp("cifar"))


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_figure_1_draws_all_five_optimizers_on_both_networks_and_then_only_draws(data, tmp_path):
    command = ["figure", 1, *TOY, "--seeds", 1, "--data-dir", data, "--out", tmp_path]
    result = here(*command)
    assert result.returncode == 0, result.stderr
    for label in LABELS:
        assert sum(line.startswith(f"{label} (") for line in result.stdout.splitlines()) >= 2
    for problem in ("cifar10-allcnn", "cifar10-vgg16"):
        assert f"{problem}: 5 runs, 1 epoch each" in result.stdout
        assert len(list((tmp_path / problem / "runs").iterdir())) == 5
    assert is_png(tmp_path / "figure-1.png")
    again = here(*command)
    assert again.stdout.count("5 of 5 runs are done already") == 2


def test_figure_2_for_one_of_its_problems(data, tmp_path):
    result = here(
        "figure", 2, "--problem", "cifar100-allcnn", *TOY, "--seeds", 1, "--data-dir", data, "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "CIFAR-100, All-CNN-C of width 2" in result.stdout
    assert is_png(tmp_path / "figure-2.png")


def test_figure_3_sweeps_first_and_shows_every_damping_with_its_best_rate(data, tmp_path):
    command = ["figure", 3, "--problem", "cifar10-allcnn", "--coarse", *TOY]
    result = here(*command, "--seeds", 1, "--data-dir", data, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no complete sweep of kfbfgs, sgd" in result.stdout
    entries = json.loads((tmp_path / "cifar10-allcnn" / "sweep.json").read_text())["cifar10-allcnn"]
    for damping in (1, 10, 100):
        scores = {
            p["lr"]: p["average_loss"]
            for p in entries["kfbfgs"]["points"]
            if p["damping"] == damping and p["average_loss"] is not None
        }
        assert f"KF-BFGS (lr {min(scores, key=scores.get):g}, damping {damping})" in result.stdout
    assert is_png(tmp_path / "figure-3.png")


def test_figure_4_goes_by_test_error(data, tmp_path):
    command = ["figure", 4, "--optimizers", "sgd", "adam", "--coarse", *TOY, "--seeds", 1]
    result = here(*command, "--data-dir", data, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "cifar100-vgg16" / "sweep.json").read_text())
    assert set(saved) == {"cifar100-vgg16 by test error"}
    assert {entry["by"] for entry in saved["cifar100-vgg16 by test error"].values()} == {"test_error"}
    assert is_png(tmp_path / "figure-4.png")


def test_table_3_prints_ours_beside_the_papers(data, tmp_path):
    command = ["table", 3, "--problem", "cifar10-allcnn", "--optimizers", "sgd", "--coarse", *TOY]
    result = here(*command, "--data-dir", data, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    entries = json.loads((tmp_path / "cifar10-allcnn" / "sweep.json").read_text())["cifar10-allcnn"]
    assert f"({10 * entries['sgd']['best']['lr']:g}) / (0.1)" in result.stdout
    assert "cifar10-allcnn, SGD-m: 1 epochs, width 2, 256 images, every second lr" in result.stdout


@pytest.mark.parametrize(("number", "orders"), [(1, STORAGE), (2, COMPUTATION)])
def test_tables_1_and_2_print_orders_and_measurements(number, orders):
    result = here("table", number, "--problem", "cifar10-allcnn", "--width", 2, "--batch-size", 4)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in PAPER_FIELD:
        entrant = ENTRANTS[name]
        (line,) = (line for line in lines if line.split("  ")[0] == entrant.label)
        for order in orders[name].values():
            assert f"O({order})" in line
    rows = [line.split() for line in lines if line.split()[1:4] == ["4", "2", "9"]]
    assert [row[0] for row in rows] == ["6"]  # the fourth convolution, the only one with I = 4, J = 2
    assert rows[0][4] == "256"
    assert ("MB" if number == 1 else "ms") in rows[0]


def test_the_bytes_of_table_1_are_those_of_the_state():
    import torch
    import torch.nn.functional as F

    import kfqn as package
    from kfqn.race.paper.cost import storage

    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
    closure = package.closure(model, torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), F.cross_entropy)
    costs = {cost.entrant: cost.bytes for cost in storage(model, list(PAPER_FIELD), closure)}
    C, I = (4, 5), (5, 2)  # noqa: E741
    for n in range(2):
        parameters = 4 * C[n] * I[n]
        expected = {
            "kfbfgs": (parameters, 0, 4 * C[n] ** 2, 4 * (I[n] ** 2 + 2 * I[n])),
            "kflbfgs": (parameters, 0, 4 * C[n] ** 2, 4 * (2 * 100 * I[n] + 2 * I[n])),
            "kfac": (parameters, 0, 8 * C[n] ** 2, 8 * I[n] ** 2),
            "adam": (parameters, parameters, 0, 0),
            "sgd": (parameters, 0, 0, 0),
        }
        for name, values in expected.items():
            assert costs[name][n] == dict(zip(COLUMNS, values, strict=True)), name


def test_a_budget_ends_a_run_with_the_epoch_that_uses_it_up(tmp_path):
    run = Run.create(tmp_path, config(epochs=None, budget=1e-6, entrant="sgd", settings={"lr": 0.1}))
    train(run, None)
    assert run.end()["status"] == "finished"
    assert len(run.epochs()) == 1
    longer = Run.create(tmp_path, config(epochs=50, budget=0.3, entrant="sgd", settings={"lr": 0.1}))
    train(longer, None)
    seconds = [record["cpu_seconds"] for record in longer.epochs()]
    assert seconds[-1] >= 0.3 or len(seconds) == 50
    assert all(second < 0.3 for second in seconds[:-1])


@pytest.mark.parametrize(
    ("options", "epochs", "budget"),
    [
        ([], None, 2000),
        (["--train-size", "5000"], None, 200),
        (["--train-size", "60000"], None, 2000),
        (["--epochs", "3"], 3, None),
        (["--budget", "7", "--train-size", "5000"], None, 7),
        (["--budget", "7", "--epochs", "3"], 3, 7),
    ],
)
def test_a_figure_takes_the_papers_budget_by_the_share_of_images_unless_told(options, epochs, budget):
    scale = paper_scale(
        training_of(parser().parse_args(["figure", "1", *options])), PROBLEMS["cifar10-vgg16"]
    )
    assert (scale.epochs, scale.budget) == (epochs, budget)


def test_wrong_use(data, tmp_path):
    one_line(kfqn("figure", 5), "invalid choice: 5 (choose from 1, 2, 3, 4)")
    one_line(here("table", "x"), "invalid int value: 'x'")
    one_line(
        here("figure", 1, "--problem", "digits"),
        "Figure 1 does not show digits: choose from cifar10-allcnn, cifar10-vgg16",
    )
    one_line(here("figure", 3, "--optimizers", "kfac"), "Figure 3 always shows KF-BFGS and SGD-m")
    one_line(here("figure", 1, "--budget", "0"), "must be a number of seconds > 0, got '0'")
    one_line(here("figure", 1, "--data-dir", tmp_path), f"no CIFAR-10 in {tmp_path}")
    one_line(here("figure", 1, "--train-size", 5), "--train-size must be at least one batch, 256 here")
    assert list(tmp_path.iterdir()) == []
