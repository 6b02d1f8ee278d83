"""The development set: what its problems are, how schedules and rivals are set, and races on each."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lab import config, here, one_line, without_clock, write_toy_cifar
from test_documents import make
from torch import nn

from kfqn.race import entrants
from kfqn.race.entrants import ENTRANTS, grids, peers
from kfqn.race.problems import DEVELOPMENT, PROBLEMS, burgers, text, transformers
from kfqn.race.problems.convnext import ChannelNorm
from kfqn.race.problems.data import Images
from kfqn.race.problems.resnet import resnet
from kfqn.race.problems.task import Size
from kfqn.race.runs import Run
from kfqn.race.runs.schedule import factor_of, schedule_of
from kfqn.race.runs.train import train
from kfqn.race.runs.trainer import Trainer

CIFAR = [name for name in DEVELOPMENT if name.startswith("cifar")]
CPU = torch.device("cpu")


def of(problem, **changes):
    """A tiny run on a problem of the set."""
    known = PROBLEMS[problem]
    values = {"problem": problem, "batch_size": known.batch_size, "train_size": 2 * known.batch_size}
    return config(**values | {"epochs": 3, "evaluated": 20} | changes)


@pytest.fixture
def short(monkeypatch):
    """Epochs of two steps where data do not say how many."""
    monkeypatch.setattr(text.NextCharacter, "steps", 2)
    monkeypatch.setattr(burgers.Burgers, "steps", 2)


# What is learned.


def test_images_at_half_the_side_are_means_of_four_pixels():
    x = torch.randint(256, (3, 2, 6, 4), dtype=torch.uint8)
    pooled = Images(x, torch.arange(3)).pooled()
    expected = torch.nn.functional.avg_pool2d(x.double(), 2)
    assert pooled.x.dtype == torch.uint8
    assert torch.equal(pooled.x.double(), (expected + 0.5).floor())


@pytest.mark.parametrize("name", CIFAR)
def test_the_images_are_all_of_cifars_at_sixteen_by_sixteen(name, tmp_path):
    problem = PROBLEMS[name]
    data = problem.data(write_toy_cifar(tmp_path))
    assert data.train.x.shape == (260, 3, 16, 16)
    assert data.crop_padding == 2
    assert data.classes == problem.images.classes
    task = data.task(CPU, Size(None, 7, problem.batch_size))
    assert task.steps == 2


def test_resnet_of_n_has_6n_plus_2_layers_with_weights():
    for n in (1, 2, 3):
        kinds = [type(module) for module in resnet(n, 10, width=2).modules()]
        assert kinds.count(nn.Conv2d) + kinds.count(nn.Linear) == 6 * n + 2


def test_the_plain_network_is_six_convolutions_as_he_initialises_them():
    convolutions = [
        m for m in PROBLEMS["cifar10-small-plain"].network(16).modules() if isinstance(m, nn.Conv2d)
    ]
    assert [m.out_channels for m in convolutions] == [16, 16, 32, 32, 64, 64]
    assert [m.stride[0] for m in convolutions] == [1, 1, 2, 1, 2, 1]
    for m in convolutions[1:]:
        assert m.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * m.in_channels)), rel=0.1)
        assert not m.bias.any()


def test_a_convnext_has_depthwise_filters_and_norms_over_channels():
    model = PROBLEMS["cifar10-small-convnext"].network(4)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [(m.groups, m.out_channels) for m in depthwise] == [(4, 4), (4, 4), (8, 8), (8, 8)]
    x = torch.randn(2, 4, 3, 3)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(ChannelNorm(4)(x), expected)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_a_character_is_predicted_from_those_before_it_alone():
    model, x = transformers.CharacterGPT(5, width=8, context=6), torch.randint(5, (2, 6))
    changed = x.clone()
    changed[:, 4] = (x[:, 4] + 1) % 5
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_attention_is_softmax_of_scaled_products():
    attention, x = transformers.Attention(8, causal=True), torch.randn(2, 5, 8)
    q, k, v = attention.qkv(x).split(8, -1)
    heads = []
    for h in range(transformers.HEADS):
        part = slice(2 * h, 2 * h + 2)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(2)
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)))


def test_a_text_becomes_numbers_by_how_common_its_characters_are(monkeypatch):
    monkeypatch.setattr(text, "KNOWN", 3)
    data = text.Text("aabac" * 200 + "dxyab" * 20)  # nine tenths, and 10 of 110 for validation
    assert data.train[:5].tolist() == [0, 0, 1, 0, 2]
    assert data.validation[-5:].tolist() == [3, 3, 3, 0, 1]
    assert len(data) == len(data.train) == 990


def test_windows_are_random_in_training_and_fixed_in_evaluation():
    data = text.standard_library()
    assert len(data) > 10 * len(data.validation) * 0.8 > 10**5
    assert int(data.train.max()) == text.KNOWN
    task = data.task(CPU, Size(5000, 30, 4))
    first, again, other = [
        next(task.epoch(nn.Identity(), torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
    ]
    assert torch.equal(first.inputs[0], again.inputs[0])
    assert not torch.equal(first.inputs[0], other.inputs[0])
    assert torch.equal(first.inputs[0][:, 1:], first.target[:, :-1])
    assert [len(read) for read in task.read] == [30, 30]
    assert task.conditions["training characters"] == "5000"
    whole = text.spread_windows(torch.arange(1000), 99)
    assert len(whole) == 15  # as many as do not overlap
    assert (whole[1:, 0] - whole[:-1, 0]).min() >= text.CONTEXT
    assert len(text.spread_windows(torch.arange(text.CONTEXT + 1), 9)) == 1


def test_validation_is_mean_cross_entropy_and_the_share_of_wrong_characters():
    read = torch.randint(text.KNOWN + 1, (150, text.CONTEXT + 1))
    model = transformers.CharacterGPT(text.KNOWN + 1, width=8).eval()
    output, target = model(read[:, :-1]), read[:, 1:]
    loss, error = text.loss_and_error(model, read)
    expected = -output.log_softmax(-1).gather(-1, target[..., None]).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert error == pytest.approx((output.argmax(-1) != target).float().mean().item())


def test_the_exact_solution_solves_burgers_equation():
    points = torch.rand(200, 2, dtype=torch.float64) * torch.tensor([0.9, 1.8]) + torch.tensor([0.05, -0.9])
    points.requires_grad_()
    u = burgers.solution(*points.unbind(1))
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 1].sum(), points)
    residual = first[:, 0] + u * first[:, 1] - burgers.NU * second[:, 1]
    assert residual.abs().max() < 1e-6 * first.abs().max()


def test_the_exact_solution_keeps_its_boundary_its_start_and_its_steepest_slope():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    ends, start = (burgers.solution(t, at) for t, at in ((x.abs(), x.sign()), (0 * x, x)))
    assert ends[x != 0].abs().max() < 1e-12
    torch.testing.assert_close(start, -torch.sin(math.pi * x))
    # Basdevant et al. (1986), table 1: the slope at x = 0 is steepest at t = 1.6037/π, and is 152.00516
    h = 1e-5
    near = torch.tensor([-h, h], dtype=torch.float64)
    left, right = burgers.solution(torch.full((2,), 1.6037 / math.pi, dtype=torch.float64), near)
    assert (left - right).item() / (2 * h) == pytest.approx(152.00516, rel=1e-4)


class Known(nn.Module):
    """u = -sin(πx) (1 - t), which keeps boundary and start."""

    def forward(self, points):
        t, x = points.unbind(1)
        return (-torch.sin(math.pi * x) * (1 - t))[:, None]


def test_the_loss_of_burgers_is_the_residual_and_what_is_known():
    task = burgers.Points().task(CPU, Size(50, 10_000, 2000))
    t, x = task.points[:50].double().unbind(1)
    s, c = torch.sin(math.pi * x), torch.cos(math.pi * x)
    residual = s + s * math.pi * c * (1 - t) ** 2 - burgers.NU * math.pi**2 * s * (1 - t)
    assert task.loss(Known()).item() == pytest.approx(residual.square().mean().item(), rel=1e-4)

    class Zero(nn.Module):
        def forward(self, points):
            return 0 * points[:, :1].square()

    guess = PROBLEMS["burgers"].guess
    assert task.loss(Zero()).item() == pytest.approx(guess.loss, rel=0.2)
    assert task.evaluate(Zero()).test_error == guess.error


# How it is trained.


def test_a_schedule_rises_then_falls_along_half_a_cosine():
    factor = factor_of(4, 20, 0.1)
    assert [factor(k) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(12) == pytest.approx(0.55)
    assert factor(20) == factor(25) == pytest.approx(0.1)
    assert factor_of(0, None, 0.0)(10**6) == 1.0


@pytest.mark.parametrize(("warmup", "first"), [(0.1, 1 / 10), (5.0, 1 / 5)])
def test_a_warm_up_is_a_share_of_the_steps_or_a_number_of_them(warmup, first):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    assert schedule_of(optimizer, {"lr": 2.0}, 100) is None
    assert schedule_of(optimizer, {"schedule": "constant"}, 100) is None
    schedule_of(optimizer, {"warmup": warmup}, 100)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * first)


def test_a_schedule_of_the_options_is_for_those_who_name_none_and_have_no_rule(tmp_path):
    names = [
        "sgd:lr=0.1",
        "adamw:lr=0.01,warmup=2",
        "kfbfgs:auto",
        "kfbfgs:auto:schedule=cosine",
        "lbfgs:lr=1",
    ]
    options = ["--schedule", "cosine", "--warmup", 0.5, "--floor", 0.1, "--epochs", 1, "--seeds", 1]
    race = ["race", "--problem", "digits-mlp", "--width", 2, "--train-size", 512, "--eval-size", 10]
    result = here(*race, *options, "--optimizers", *names, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = [Run(folder).config for folder in (tmp_path / "runs").iterdir()]
    found = sorted((run.entrant, json.dumps(run.settings, sort_keys=True)) for run in runs)
    assert [settings for _, settings in found] == [
        '{"lr": 0.01, "warmup": 2.0}',
        '{"schedule": "cosine"}',
        "{}",
        '{"lr": 1.0}',
        '{"floor": 0.1, "lr": 0.1, "schedule": "cosine", "warmup": 0.5}',
    ]
    assert "SGD-m (lr 0.1, cosine, warmup 0.5, floor 0.1)" in result.stdout


def test_decay_stands_for_the_problems_weight_decay_or_for_our_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for name, entrant in ENTRANTS.items():
        if "decay" not in entrant.settings:
            continue
        settings = {"lr": 0.1, "damping": 1.0, "eps": 1e-8, "beta": 0.9, "adam": 0.1, "lr_cov": 0.1}
        settings = {key: settings[key] for key in entrant.required}
        for given, decay in (({}, 0.03 if entrant.automatic else 0.2), ({"decay": 0.3}, 0.3)):
            optimizer = entrant.make(model, settings | given, 0.2)
            assert {group["weight_decay"] for group in optimizer.param_groups} == {decay}, name


def test_muons_decay_is_decoupled_where_it_is_a_setting():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for given, decoupled in (({}, False), ({"decay": 0.3}, True)):
        optimizer = ENTRANTS["muon"].make(model, {"lr": 0.1, "adam": 0.1} | given, 0.2)
        assert {group["weight_decouple"] for group in optimizer.param_groups} == {decoupled}


@pytest.mark.parametrize("name", DEVELOPMENT)
def test_muon_takes_hidden_matrices_and_no_embedding_position_vector_or_head(name):
    model = PROBLEMS[name].network(None)
    hidden = {id(weight) for weight in peers.hidden_weights(model)}
    left = [name for name, p in model.named_parameters() if id(p) not in hidden and p.ndim > 1]
    expected = {"char-gpt": ["embedding.weight", "positions.weight", "head.weight"]}
    expected["cifar10-small-vit"] = ["positions.weight", "head.weight"]
    assert left == expected.get(name, [[n for n, p in model.named_parameters() if p.ndim > 1][-1]])


@pytest.mark.parametrize("name", DEVELOPMENT)
def test_rivals_have_small_grids_that_hold_what_is_usual(name):
    field = entrants.default_field(name)
    assert field == ("kfbfgs:auto", *entrants.swept_field(name))
    for rival in entrants.swept_field(name):
        points = grids.grid(name, rival)
        usual, source = entrants.best_settings(name, rival, Path("none"))
        assert 3 <= len(points) <= 4
        assert usual in points
        assert source == "what is usual"
        assert {*ENTRANTS[rival].required} <= {*usual} <= {*ENTRANTS[rival].settings}


def test_lbfgs_takes_no_weight_decay():
    with pytest.raises(entrants.registry.Failure, match="lbfgs has no weight decay"):
        ENTRANTS["lbfgs"].make(nn.Linear(1, 1), {"lr": 1.0}, 0.1)


@pytest.mark.parametrize(
    ("name", "entrant"),
    [
        *itertools.product(("cifar10-small-vit", "char-gpt", "burgers"), ("kfbfgs:auto", "muon")),
        ("burgers", "lbfgs"),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(name, entrant, tmp_path, monkeypatch, short):
    """Windows are random, and resumed from the generator that the checkpoint holds."""
    data = write_toy_cifar(tmp_path / "cifar")
    schedule = dict(PROBLEMS[name].schedule) if entrant == "muon" else {}
    width = 8 if name == "burgers" else 2 * PROBLEMS[name].heads  # with 2 neurons factors start anew there
    settings = dict(grids.USUAL.get(entrant, {})) | schedule
    values = of(name, entrant=entrant, settings=settings, width=width)
    whole, cut = (Run.create(tmp_path / place, values) for place in ("whole", "cut"))
    train(whole, data)
    assert whole.end()["status"] == "finished", whole.end()

    monkeypatch.setattr("kfqn.race.runs.trainer.CHECKPOINT_SECONDS", 0.0)
    evaluate = Trainer.evaluate

    def stop_at_three(self, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return evaluate(self, epoch)

    monkeypatch.setattr(Trainer, "evaluate", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        train(cut, data)
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    assert len(cut.epochs()) == 2
    train(cut, data)
    assert without_clock(cut.records()) == without_clock(whole.records())


# From the command line.

COLUMNS = {
    "char-gpt": ["validation loss", "training loss", "wrong characters, %"],
    "burgers": ["relative error", "training loss", "mean squared error"],
}


@pytest.mark.parametrize("name", DEVELOPMENT)
def test_a_race_shows_what_counts_on_its_problem_first(name, tmp_path, short, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that headings are not broken
    problem = PROBLEMS[name]
    scale = ["--width", 2 * problem.heads, "--train-size", 2 * problem.batch_size, "--eval-size", 10]
    if name == "burgers":
        scale[3] = 100
    data = ["--data-dir", write_toy_cifar(tmp_path / "cifar")] if name in CIFAR else []
    result = here("race", "--problem", name, *scale, *data, "--epochs", 1, "--seeds", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    columns = COLUMNS.get(name, ["test error, %", "training loss", "test loss"])
    page = (tmp_path / "race.html").read_text(encoding="utf-8")
    for shown in (result.stdout, page.partition("<thead>")[2]):
        places = [shown.index(heading) for heading in ("optimizer", *columns)]
        assert places == sorted(places)
    runs = [Run(folder) for folder in (tmp_path / "runs").iterdir()]
    assert {run.config.entrant for run in runs} == {*entrants.default_field(name)}
    for run in runs:
        scheduled = ENTRANTS[run.config.entrant].scheduled
        assert ("schedule" in run.config.settings) == scheduled
        (record,) = run.epochs()
        assert all(np.isfinite(record[key]) for key in ("train_loss", "test_loss", "test_error"))


def test_a_sweep_goes_by_what_counts_and_a_race_takes_what_it_found(tmp_path, short):
    scale = ["--problem", "burgers", "--width", 4, "--train-size", 50, "--eval-size", 10, "--epochs", 1]
    result = here("sweep", *scale, "--optimizers", "adamw", "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    entry = json.loads((tmp_path / "sweep.json").read_text())["burgers"]["adamw"]
    assert entry["by"] == "test_error"
    lowest = min(entry["points"], key=lambda point: point["test_error"])
    assert entry["best"] == {key: lowest[key] for key in ("lr", "decay", "schedule", "warmup")}
    race = here("race", *scale, "--optimizers", "adamw", "--seeds", 1, "--out", tmp_path)
    assert "1 of 1 runs are done already" in race.stdout, race.stderr


def test_a_race_becomes_a_file_and_a_section_with_what_counts(tmp_path, monkeypatch, short):
    scale = ["--problem", "burgers", "--width", 4, "--train-size", 50, "--eval-size", 10, "--epochs", 2]
    here("race", *scale, "--optimizers", "kfbfgs:auto:warm=1", "adamw", "--seeds", 1, "--out", tmp_path)
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    file = make.collect(tmp_path, "equation", "")
    assert "adamw:lr=0.003,decay=0,schedule=cosine,warmup=0.05" in json.loads(file.read_text())["command"]
    section = "\n".join(make.section(make.read(file), ""))
    assert "| optimizer | relative error | training loss | mean squared error | CPU s | to " in section
    assert "| AdamW (lr 0.003, decay 0) | " in section  # the schedule of all rivals is said once, above


def test_what_a_problem_cannot_do_is_refused_in_a_sentence(tmp_path):
    gpt, equation = ["race", "--problem", "char-gpt"], ["race", "--problem", "burgers"]
    one_line(here(*gpt, "--width", 10), "--width must be a multiple of 4, the heads of attention, got 10")
    one_line(here(*gpt, "--train-size", 64), "at least one window and its next character, 65 here, got 64")
    one_line(here(*gpt, "--train-size", 10**8), "the training characters of char-gpt, got 100000000")
    one_line(
        here(*equation, "--train-size", 2001),
        "--train-size must be at most 2000, the interior points of burgers",
    )
    one_line(here(*equation, "--optimizers", "kfac"), "no settings are known for kfac on burgers")
    sweep = ["sweep", "--problem", "burgers", "--optimizers", "kfac", "--out", tmp_path]
    one_line(here(*sweep), "there is no grid of kfac on burgers")
    one_line(here("figure", 1, "--problem", "burgers"), "no problem 'burgers'")
