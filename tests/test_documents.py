"""Every document: lines that fit, links that lead somewhere, tables that are what the committed races say."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import kfqn
from kfqn.race.runs import Config, Run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(
        part.startswith(".") or part in ("runs", "data", "_build") for part in path.relative_to(ROOT).parts
    )
]
LINK = re.compile(r"(?:\]\(|^\[[^\]]+\]: )(?!\w+:)([^)#\s]*)(?:#([^)\s]+))?", re.MULTILINE)


def load():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "results" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load()


def anchors(page):
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_fits_and_its_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    long = [n for n, line in enumerate(text.splitlines(), start=1) if len(line) >= 120]
    assert not long, f"{page.name} has lines of 120 characters or more: {long}"
    for target, anchor in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        led = page.parent / target if target else page
        assert led.exists(), f"{page.name} links to {target}"
        if anchor and led.suffix == ".md":
            assert anchor in anchors(led), f"{page.name} links to {target}#{anchor}"


def test_results_are_what_the_committed_races_say():
    for path, text in make.documents().items():
        told = "edit results/*.json and run 'python results/make.py write'"
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs: {told}"


@pytest.mark.parametrize("file", make.development(), ids=lambda file: file.stem)
def test_the_picture_of_a_race_was_drawn_from_it(file, tmp_path):
    """Not of earlier figures: run 'python results/make.py pictures'."""
    path = make.development()[file]
    assert make.fingerprint(file) in path.read_text(encoding="utf-8")
    make.draw_race(file, tmp_path / "race.svg")
    drawn = (tmp_path / "race.svg").read_text(encoding="utf-8")
    raced = {make.entrant_of(s.config.entrant).label for s in make.read(file).field}
    assert {"KF-BFGS, auto", "AdamW", "Muon", "SOAP"} <= raced
    for label in raced:
        assert f">{label.removesuffix(', auto')}</text>" in drawn


def test_results_are_short():
    """About twenty lines a race, of which there are nine: a page that is still read from top to bottom."""
    assert len(make.PAGE.read_text(encoding="utf-8").splitlines()) <= 170


def test_the_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(mark in text for mark in make.MARKS)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|])", prose):
        assert len(paragraph.splitlines()) <= 5 or paragraph.startswith("    "), paragraph


@pytest.mark.parametrize("file", make.files(), ids=lambda file: file.stem)
def test_a_race_is_what_its_folder_was(file, tmp_path):
    """Out of a file come run folders, of which the same file is made."""
    make.unpack(file, tmp_path / "runs")
    before, make.FOLDER = make.FOLDER, tmp_path
    try:
        again = make.collect(tmp_path, file.stem, "")
    finally:
        make.FOLDER = before
    assert json.loads(again.read_text(encoding="utf-8")) == json.loads(file.read_text(encoding="utf-8"))


def test_every_public_name_is_on_the_pages_of_the_api():
    api, parts = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "api_parts.md"))
    assert {*re.findall(r"auto\w+:: kfqn\.(\w+)$", api, re.MULTILINE)} >= {*kfqn.__all__}
    table = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    modules = re.findall(r"^\| `\w+`: .*?, `((?:curvature|steps)\.\w+)` \|", table, re.MULTILINE)
    assert len(modules) == 8
    assert {*re.findall(r"automodule:: kfqn\.(\S+)$", parts, re.MULTILINE)} >= {*modules}


def test_every_entry_of_the_notebook_is_in_its_index_and_says_what_it_has_to():
    folder = ROOT / "docs" / "notebook"
    index = (folder / "README.md").read_text(encoding="utf-8")
    entries = sorted({*folder.glob("*.md")} - {folder / "README.md"})
    assert entries
    for entry in entries:
        text = entry.read_text(encoding="utf-8")
        assert f"]({entry.name})" in index
        assert entry.name[:10] in text.splitlines()[2]
        assert "kept:" in text.split("\n\n")[1].replace("\n", " ")
        assert "**Question.**" in text


def test_a_race_at_any_scale_with_lost_runs_makes_a_section(tmp_path, monkeypatch):
    """On a GPU seconds count; who is lost stays in the table, and claims nothing."""
    shared = {"problem": "cifar10-allcnn", "epochs": None, "budget": 60.0, "evaluated": 10_000, "width": 96}
    shared |= {"batch_size": 128, "weight_decay": 5e-4, "train_size": None, "device": "cuda", "threads": 1}
    rivals = {"soap": {"lr": 0.01, "beta": 0.8}, "sgd": {"lr": 1e3}}
    for entrant, settings in {"kfbfgs:auto": {}, **rivals}.items():
        run = Run.create(tmp_path / "runs", Config(entrant=entrant, settings=settings, seed=0, **shared))
        losses = [2.0, 1.0, 0.5] if entrant != "soap" else [1.9, 1.4]
        epochs = [
            {"epoch": n, "train_loss": loss, "average_loss": loss, "test_error": loss / 4}
            | {"cpu_seconds": 9.0 * n, "seconds": 1.0 * n}
            for n, loss in enumerate(losses, start=1)
        ]
        lost = {"status": "diverged", "reason": "the loss was nan"}
        run.write([*epochs, lost if entrant == "sgd" else {"status": "finished", "conditions": {}}])
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    race = make.read(make.collect(tmp_path, "large", "one H100"))
    text = make.page([race])
    assert max(map(len, text.splitlines())) < 120
    assert "## CIFAR-10, All-CNN-C\n" in text
    assert "60 CPU seconds" in text
    assert "| **KF-BFGS, auto** | 0.5 | 12.5 | 3 | 2 | 3 |" in text
    assert "| SOAP (lr 0.01, beta 0.8) | 1.4 | 35.0 | 2 | 2 | 2 : 2 |" in text
    assert "| SGD-m (lr 1000), 1 diverged | – | – | – | – | – : – |" in text
    assert "*loss* lower than SOAP, SGD-m; *test error* lower" in " ".join(text.split())
    assert len(make.claims([race]).splitlines()) == 2  # README shows the development set alone
    large = replace(race, config=replace(race.config, problem="cifar10-small-plain"))
    assert make.claims([large]).splitlines()[2] == (
        r"| CIFAR-10 at 16×16, plain CNN, width 96\* | 0.5 | lost | – | 1.4; 1 |"
    )
    command = json.loads((tmp_path / "large.json").read_text(encoding="utf-8"))["command"]
    assert command == (
        "kfqn race --problem cifar10-allcnn --budget 60.0 --device cuda --seeds 1 "
        "--optimizers kfbfgs:auto sgd:lr=1000 soap:lr=0.01,beta=0.8"
    )
