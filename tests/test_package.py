"""What a package index shows of a wheel, from ``pyproject.toml`` and the README it is made of."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest

import kfqn

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\(([^)]+)\)")


def long_description(text):
    """The text as the build makes it."""
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_the_long_description_has_no_link_that_leads_nowhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(not target.startswith("http") for target in LINK.findall(readme))
    described = long_description(readme)
    assert all(target.startswith("http") for target in LINK.findall(described))
    for link, text in re.findall(r"((?<!!)\[([^\]]+)\]\([^)]+\))", readme):
        assert text in described, link
    code = re.findall(r"```python\n.*?```", readme, re.DOTALL)
    assert all(block in described for block in code)


def test_links_that_lead_somewhere_stay():
    text = "[a](docs/a.md#b), [c](#d), ![e](f.png) and [g](https://h.org/i_(j)), [k](mailto:l@m.org)\n[n]: o"
    assert long_description(text) == (
        "a, c, *Figure, in the repository: e.* and [g](https://h.org/i_(j)), [k](mailto:l@m.org)\n[n]: o"
    )


def test_the_wheel_says_who_made_it_and_for_which_pythons():
    project = PROJECT["project"]
    assert project["authors"]
    assert all(address.startswith("https://") for address in project["urls"].values())
    oldest = int(re.fullmatch(r">=3\.(\d+)", project["requires-python"])[1])
    named = [int(n) for n in re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))]
    assert named == [*range(oldest, oldest + len(named))]
    assert (ROOT / "kfqn" / "py.typed").is_file()
    assert metadata("kfqn")["Version"] == kfqn.__version__
    assert {"readme", "version"} == {*project["dynamic"]}
    assert {"/kfqn", "/README.md"} <= {*PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}


def test_the_workflow_calls_make_over_all_pythons_and_from_the_oldest_torch_to_the_newest():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {make for make, *_ in commands} == {"make"}
    assert {"lint", "test", "wheel"} == {target for _, target, *_ in commands} <= {*targets}
    matrix = jobs["test"]["strategy"]["matrix"]
    named = "\n".join(PROJECT["project"]["classifiers"])
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", named)
    (oldest,), (newest,) = matrix["torch"], [point["torch"] for point in matrix["include"]]
    assert f"torch=={oldest}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"torch>={'.'.join(oldest.split('.')[:2])}" in PROJECT["project"]["dependencies"]
    assert version(oldest) < version(newest)


def version(text):
    return [int(part) for part in text.split(".")]


def test_the_citation_is_of_this_version_and_of_what_the_default_is_made_of():
    yaml = pytest.importorskip("yaml")
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["version"] == kfqn.__version__
    assert cff["preferred-citation"]["title"].startswith("Kronecker-factored Quasi-Newton Methods")
    for work in (cff["preferred-citation"], *cff["references"]):
        assert work["authors"]
        assert work["year"] <= 2026
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == kfqn.__version__
