"""What optimizers are set to: read from the command line, kept in runs, shown; and misspelt names."""

import functools
import json

import pytest
import torch
from lab import TINY, config, here, one_line

from kfqn.race.entrants import ENTRANTS, Entrant, peers
from kfqn.race.runs import Run
from kfqn.race.runs.trainer import Trainer


@pytest.fixture
def paced(monkeypatch):
    """An entrant with a setting that is one of some words, and what it was built with."""
    built = []

    def build(model, settings, weight_decay):
        built.append(dict(settings))
        return peers.sgd(model, settings, weight_decay)

    choices = {"pace": ("slow", "quick"), "end": ("sharp", "none")}
    entrant = Entrant("paced", "Paced", build, ("lr",), ("clip",), choices=choices)
    monkeypatch.setitem(ENTRANTS, "paced", entrant)
    return built


def test_settings_that_are_words_are_read_kept_and_shown(paced, tmp_path):
    texts = ["paced:pace=slow,lr=0.05", "paced:lr=0.05,pace=quick,schedule=cosine", "paced:lr=0.05"]
    result = here("race", "--optimizers", *texts, *TINY, "--seeds", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for label in ("Paced (lr 0.05, pace slow)", "Paced (lr 0.05, pace quick, cosine)", "Paced (lr 0.05)"):
        assert label in result.stdout
        assert label in (tmp_path / "race.html").read_text(encoding="utf-8")
    slow, quick = (Run(next((tmp_path / "runs").glob(f"*pace{pace}*"))) for pace in ("slow", "quick"))
    assert slow.folder.name.startswith("paced-lr0.05-paceslow-seed0-")
    assert json.loads((slow.folder / "config.json").read_text())["settings"] == {"lr": 0.05, "pace": "slow"}
    assert quick.config.settings == {"lr": 0.05, "pace": "quick", "schedule": "cosine"}
    assert {"lr": 0.05, "pace": "quick"} in paced


def test_a_word_that_is_none_of_the_choices_is_answered_with_them(paced):
    def answer(text, *parts):
        one_line(here("race", "--optimizers", text), *parts)

    answer("paced:lr=1,pace=quik", "pace must be slow or quick, got 'quik', did you mean quick?")
    answer("paced:lr=1,pace=3", "pace must be slow or quick, got '3'")
    answer(
        "paced:lr=1,pase=slow",
        "paced takes lr=... and, if you like, clip=...,pace=slow|quick,end=sharp|none,schedule=",
        "got 'lr=1,pase=slow', did you mean pace?",
    )
    answer("paced:pace=slow", "paced takes lr=... and", "got 'pace=slow'")
    answer("paced:lr=1,pace=slow,pace=slow", "paced takes lr=... and")
    answer("paced:lr=slow", "'lr=slow' is not of the form key=number")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["race", "--problem", "digit"], ["no problem 'digit', did you mean digits? (choose from digits,"]),
        (["race", "--optimizers", "kfbgfs"], ["no optimizer 'kfbgfs', did you mean kfbfgs? (choose from"]),
        (["race", "--optimizers", "kfbfgs:atuo"], ["no optimizer 'kfbfgs:atuo', did you mean kfbfgs:auto?"]),
        (["race", "--optimizers", "kflbfsg:auto:decay=0"], ["'kflbfsg:auto', did you mean kflbfgs:auto?"]),
        (["race", "--optimizers", "kfbfgs:auto:input=rot"], ["got 'rot', did you mean root?"]),
        (["race", "--optimizers", "kfbfgs:auto:inptu=root"], ["got 'inptu=root', did you mean input?"]),
        (["race", "--optimizers", "torch.optm.SGD"], ["'torch.optm'), did you mean optim? give the class's"]),
        (["race", "--optimizers", "torch.optim.SGD:shedule=cosine"], ["did you mean schedule?"]),
        (["race", "--optimizers", "torch.optim.SGD:nesterov=ture"], ["'ture', did you mean true?"]),
        (["race", "--schedule", "cosin"], ["did you mean cosine?"]),
        (["race", "--optimisers", "adam"], ["--optimisers adam, did you mean --optimizers?"]),
        (["race", "--device", "cud"], ["did you mean cuda? leave it out"]),
        (["rcae"], ["'rcae'", "did you mean race?"]),
        (["sweep", "--by", "test_eror"], ["did you mean test_error?"]),
        (["sweep", "--coarse", "dampin"], ["did you mean damping?"]),
        (["figure", 5], ["invalid choice: 5"]),
        (["runs", "--cvs"], ["--cvs, did you mean --csv?"]),
        (["race", "--optimizers", "kfbfgs:auto:dampin=1"], ["got 'dampin=1', did you mean damping?"]),
        (
            ["sweep", "--optimizers", "soup"],
            ["no optimizer with a grid is 'soup', did you mean soap? (choose"],
        ),
        (["sweep", "--optimizers", "adam:lr=1/2"], ["adam has a grid of its own: leave 'lr=1/2' out"]),
        (["figure", 1, "--problem", "cifar10-vgg19"], ["'cifar10-vgg19', did you mean cifar10-vgg16?"]),
        (["table", 1, "--optimizers", "adamm"], ["no optimizer 'adamm', did you mean adam? (choose from"]),
    ],
)
def test_what_is_misspelt_is_answered_with_what_is_meant(arguments, parts):
    one_line(here(*arguments), *parts)


def test_folders_and_files_that_are_near_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "ours_of_here.py").write_text("")
    one_line(here("runs", "rnus"), "there are no runs in rnus, did you mean runs? name a folder")
    one_line(here("race", "--problem", "uors_of_here:problem"), "did you mean ours_of_here? name it as FILE:")


def test_folders_of_runs_keep_their_names():
    """A race of an earlier version is gone on with: its runs are found by these names, with a digest."""
    digits = functools.partial(config, width=32, epochs=1, train_size=None)
    adam, kfac = {"lr": 0.008, "eps": 1e-8}, {"lr": 3.0, "damping": 1.0}
    assert digits(entrant="kfbfgs:auto", settings={}).identity == "kfbfgs-auto-seed0-345062b2"
    assert digits(entrant="adam", settings=adam).identity == "adam-lr0.008-eps1e-08-seed0-a58707a1"
    assert digits(entrant="kfac", settings=kfac).identity == "kfac-lr3-damping1-seed0-f0e4fb70"


class Offering(torch.optim.SGD):
    """No class of kfqn, but it offers what ours do."""

    def warm_start(self, batches):
        self.started = [closure().item() for closure in batches]

    def step(self, closure=None):
        loss = closure()
        super().step()
        return loss

    def diagnostics(self):
        return {"": {"refused": 0}, "layer": {"steps": len(self.started)}}


def test_an_optimizer_is_asked_what_it_offers_and_not_which_class_it_is(monkeypatch, tmp_path):
    def build(model, settings, weight_decay):
        return Offering(model.parameters(), lr=settings["lr"])

    monkeypatch.setitem(ENTRANTS, "offering", Entrant("offering", "Offering", build, ("lr",)))
    run = Run.create(tmp_path, config(entrant="offering", settings={"lr": 0.05}, epochs=1))
    trainer = Trainer(run, None)
    assert trainer.needs_closure
    trainer.train()
    assert len(trainer.optimizer.started) == trainer.task.steps == 2  # one epoch, before the clock runs
    assert run.end()["warm_start_seconds"] > 0
    assert run.epochs()[0]["diagnostics"]["layer"] == {"steps": 2}
    plain = Run.create(tmp_path, config(entrant="sgd", settings={"lr": 0.05}, epochs=1))
    assert not Trainer(plain, None).needs_closure
