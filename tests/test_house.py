"""The structure that the documentation promises."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import kfqn

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "kfqn").rglob("*.py"))
MAP = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")

# A module may import only what stands to the left of it; race may import everything.
ORDER = [
    "rows",
    "secant",
    "settings",
    "inputs",
    "layers",
    "rules",
    "curvature",
    "damping",
    "orthogonal",
    "closures",
    "second_pass",
    "seen",
    "gate",
    "hooks",
    "capture",
    "ranks",
    "others",
    "groups",
    "pairs",
    "moves",
    "scale_free",
    "graphs",
    "factors",
    "update",
    "optimizer",
    "first_look",
    "two_pass",
    "step_size",
    "trust",
    "self_tuning",
    "quasi_newton",
    "convergent",
    "kfac",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kfqn"):
            yield from (
                [f"{node.module}.{a.name}" for a in node.names] if node.module == "kfqn" else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("kfqn"))


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    for imported in imports(ROOT / "kfqn" / f"{name}.py"):
        module = imported.split(".")[1]
        assert module in ORDER[: ORDER.index(name)], f"{name} imports {imported}"


@pytest.mark.parametrize("name", ["__init__", *ORDER])
def test_the_core_needs_torch_alone(name):
    tree = ast.parse((ROOT / "kfqn" / f"{name}.py").read_text(encoding="utf-8"))
    named = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module.split(".")[0] for module in named} <= {"torch", "kfqn", *sys.stdlib_module_names}


def test_every_module_has_its_place():
    modules = {m.name for m in pkgutil.iter_modules(kfqn.__path__)}
    assert modules == {*ORDER, "race", "__main__"}


# The lab: what stands for a folder is its ``__init__``, which names what others need of it.
RACE_ORDER = [
    *("failure", "cores", "process_group", "timing"),
    *(f"problems.{name}" for name in ("data", "cifar", "models", "resnet", "registry")),
    "problems",
    *(
        f"entrants.{name}"
        for name in ("settings", "grids", "peers", "ours", "registry", "sweep_file", "tuned")
    ),
    "entrants",
    *("options", "arguments", "parser"),
    *(f"runs.{name}" for name in ("files", "config", "run", "plan", "conditions", "averaging", "checkpoint")),
    *(f"runs.{name}" for name in ("trainer", "warm_up", "train", "workers")),
    "runs",
    *(f"report.{name}" for name in ("results", "table", "sentences", "figure", "page", "live_view")),
    "report",
    *("sweep", "session", "commands"),
    *(f"paper.{name}" for name in ("cost", "experiment", "figures", "tables")),
    "paper",
    "cli",
]


def race_modules(path):
    """What a file imports of the lab, as it is called in the order."""
    places = {f"kfqn.race.{name}": name for name in RACE_ORDER}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kfqn.race"):
            for alias in node.names:
                yield places.get(f"{node.module}.{alias.name}") or places[node.module]


@pytest.mark.parametrize("name", RACE_ORDER)
def test_imports_of_the_lab_point_one_way(name):
    path = (ROOT / "kfqn" / "race").joinpath(*name.split("."))
    for imported in race_modules(path / "__init__.py" if path.is_dir() else path.with_suffix(".py")):
        assert imported in RACE_ORDER[: RACE_ORDER.index(name)], f"{name} imports {imported}"


def test_every_module_of_the_lab_has_its_place_and_fits_the_eye():
    found = [p for p in SOURCES if "race" in p.parts and p.parent.name + p.name != "race__init__.py"]
    names = {".".join(p.with_suffix("").parts[p.parts.index("race") + 1 :]) for p in found}
    assert {name.removesuffix(".__init__") for name in names} == {*RACE_ORDER}
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path}: {node.name}"


def test_the_lab_knows_no_class_of_optimizer():
    """It asks an optimizer what it offers; what a step costs inside, `paper.cost` alone has to know."""
    public = {"", "__version__", "closures", "race"}
    for path in SOURCES:
        if "race" in path.parts and path.parts[-2:] != ("paper", "cost.py"):
            assert {"".join(name.split(".")[1:2]) for name in imports(path)} <= public, path


def resolve(path):
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{path} does not exist")


ROWS = re.findall(r"^\| (.+?) \| .*\| `(kfqn[\w.]*)` \|$", MAP, re.MULTILINE)


@pytest.mark.parametrize(("label", "home"), ROWS, ids=[label for label, _ in ROWS])
def test_the_map_of_the_paper_is_true(label, home):
    found = resolve(home)
    if re.fullmatch(r"\(\d+\)", label):
        assert f"eq. {label}" in inspect.getsource(found)
        elsewhere = [p for p in SOURCES if f"eq. {label}" in p.read_text(encoding="utf-8")]
        assert elsewhere == [Path(inspect.getsourcefile(found))]
    elif label.startswith("Algorithm"):
        assert re.match(r"Algorithm \d", label)[0] in inspect.getsource(found)


def test_tests_that_the_map_names_exist():
    named = re.findall(r"\| `((?:tests|benchmarks)/[\w.]+)` \|$", MAP, re.MULTILINE)
    assert named
    assert all((ROOT / path).is_file() for path in named)


def test_nothing_of_the_paper_is_missing():
    """Every equation, algorithm, lemma, figure and table has a row, and every row a home."""
    for kind, count in (("Algorithm", 5), ("Figure", 4), ("Table", 3)):
        for n in range(1, count + 1):
            assert re.search(rf"\| {kind}s? [\d–, ]*?{n}|\| {kind}s 1–{count}", MAP), f"{kind} {n}"
    assert "not built" not in MAP


def test_every_equation_named_in_the_code_is_in_the_map():
    named = {n for p in SOURCES for n in re.findall(r"eq\. (\(\d+\))", p.read_text(encoding="utf-8"))}
    assert named == {label for label, _ in ROWS if re.fullmatch(r"\(\d+\)", label)}


def test_decisions_that_the_code_points_to_exist():
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    for source in SOURCES:
        for numbers in re.findall(r"decisions\.md`?, ([\d ,and]+)", source.read_text(encoding="utf-8")):
            for number in re.findall(r"\d+", numbers):
                assert f"\n{number}. **" in text, f"{source.name} points to decision {number}"
