"""Every document: lines that fit, links that lead somewhere, tables that are what the committed races say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in ("runs", "data") for part in path.relative_to(ROOT).parts)
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


def test_results_are_short():
    assert len(make.PAGE.read_text(encoding="utf-8").splitlines()) <= 150


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


def test_every_entry_of_the_notebook_is_in_its_index_and_says_what_it_has_to():
    folder = ROOT / "docs" / "notebook"
    index = (folder / "README.md").read_text(encoding="utf-8")
    entries = sorted(folder.glob("2*.md"))
    assert entries
    for entry in entries:
        text = entry.read_text(encoding="utf-8")
        assert f"]({entry.name})" in index
        assert text.splitlines()[2].startswith(f"{entry.name[:10]} · ")
        assert "kept:" in text.split("\n\n")[1].replace("\n", " ")
        assert "**Question.**" in text
