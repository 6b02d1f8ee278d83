"""What a package index shows of a wheel, from ``pyproject.toml`` and the README it is made of."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

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
