"""docs/method.md: every equation of our own algorithm has one home, which names it."""

import inspect
import re
from pathlib import Path

import pytest
from test_house import resolve

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "kfqn").rglob("*.py"))
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\(M\d+\)) \| .* \| `(kfqn[\w.]*)` \|$", METHOD, re.MULTILINE)


@pytest.mark.parametrize(("label", "home"), ROWS, ids=[label for label, _ in ROWS])
def test_the_map_of_the_method_is_true(label, home):
    assert label in inspect.getsource(resolve(home))


def test_every_equation_has_one_row_and_the_box_names_it():
    labels = [label for label, _ in ROWS]
    assert labels == [f"(M{n})" for n in range(1, len(labels) + 1)]
    box, _, equations = METHOD.split("## Equations")[0], *METHOD.partition("## Equations")[1:]
    assert labels == re.findall(r"^    (\(M\d+\))  ", equations, re.MULTILINE)
    spans = [(int(a), int(b or a)) for a, b in re.findall(r"\(M(\d+)\)(?:–\(M(\d+)\))?", box)]
    assert {n for a, b in spans for n in range(a, b + 1)} == {*range(1, len(labels) + 1)}


def test_every_equation_named_in_the_code_is_in_the_method():
    named = {n for source in SOURCES for n in re.findall(r"\(M\d+\)", source.read_text(encoding="utf-8"))}
    assert named == {label for label, _ in ROWS}


def test_equations_that_documents_name_exist():
    labels = {label for label, _ in ROWS}
    for page in sorted((ROOT / "docs").glob("*.md")):  # entries of the notebook name those of their day
        named = {*re.findall(r"\(M\d+\)", page.read_text(encoding="utf-8"))}
        assert named <= labels, f"{page.name} names {named - labels}"
