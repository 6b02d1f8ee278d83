"""The structure that the documentation promises."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "kfqn").rglob("*.py"))
MAP = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")

# A module may import only what stands to the left of it; race may import everything.
ORDER = [
    "runtime.private",
    "runtime.module_hooks",
    "formulas.rows",
    "formulas.blocks",
    "formulas.secant",
    "formulas.inputs",
    "formulas.roots",
    "formulas.statistics",
    "formulas.damping",
    "formulas.orthogonal",
    "formulas.symmetric",
    "formulas.rounding",
    "parameters.settings",
    "parameters.schedules",
    "parameters.shards",
    "parameters.layers",
    "parameters.discovery",
    "parameters.fallback",
    "parameters.groups",
    "closures",
    "passes.replay",
    "passes.record",
    "passes.calls",
    "passes.recorder",
    "runtime.ranks",
    "runtime.cuda_graphs",
    "curvature.pairs",
    "curvature.damping",
    "curvature.input_factor",
    "curvature.output_factor",
    "steps.cadence",
    "steps.average",
    "steps.direction",
    "steps.rule",
    "steps.relative",
    "steps.weight_average",
    "parts",
    "state",
    "context",
    "iterates",
    "lending",
    "training",
    "weights",
    "learning.queries",
    "learning.secants",
    "learning.fisher",
    "learning.second_pass",
    "learning.quasi_newton",
    "first_pass",
    "update",
    "starts",
    "diagnostics",
    "optimizer",
    "kf_bfgs",
    "convergent",
    "kfac",
]
PACKAGES = sorted({name.split(".")[0] for name in ORDER if "." in name})


def file_of(name):
    return ROOT / "kfqn" / f"{name.replace('.', '/')}.py"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kfqn"):
            package = node.module == "kfqn" or node.module.removeprefix("kfqn.") in PACKAGES
            yield from [f"{node.module}.{a.name}" for a in node.names] if package else [node.module]
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("kfqn"))


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    before = {f"kfqn.{module}" for module in ORDER[: ORDER.index(name)]}
    for imported in imports(file_of(name)):
        assert imported in before, f"{name} imports {imported}"


@pytest.mark.parametrize("name", ["__init__", *ORDER])
def test_the_core_needs_torch_alone(name):
    tree = ast.parse(file_of(name).read_text(encoding="utf-8"))
    named = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module.split(".")[0] for module in named} <= {"torch", "kfqn", *sys.stdlib_module_names}


def test_every_module_has_its_place():
    found = {path.relative_to(ROOT / "kfqn").with_suffix("").as_posix() for path in SOURCES}
    core = {name.replace("/", ".") for name in found if not name.startswith(("race/", "integrations/"))}
    packages = {f"{package}.__init__" for package in PACKAGES}
    assert core == {*ORDER, *packages, "__init__", "__main__"}


CORE = [file_of(name) for name in ORDER]


def classes():
    """Every class of the library and the lab, with the names of its bases and its concrete methods."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield node


def is_abstract(function):
    return any("abstractmethod" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_overload(function):
    return any("overload" in ast.unparse(decorator) for decorator in function.decorator_list)


def methods(node):
    found = [x for x in node.body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {x.name for x in found if not is_abstract(x) and not is_overload(x)}


CONSTRUCTION = {"__init__", "__post_init__"}


def test_no_class_overrides_a_concrete_method():
    """A call means exactly one body."""
    known = {node.name: node for node in classes()}
    protocols = {name for name, node in known.items() if "Protocol" in map(ast.unparse, node.bases)}

    def concrete_above(node):
        for base in (ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases):
            if base in known and base not in protocols:
                yield from ((base, name) for name in methods(known[base]))
                yield from concrete_above(known[base])

    overridden = [
        f"{node.name}.{name} overrides that of {base}"
        for node in known.values()
        for base, name in concrete_above(node)
        if name in methods(node) - CONSTRUCTION
    ]
    assert not overridden


def test_one_class_is_an_optimizer_and_methods_only_choose_its_parts():
    known = {node.name: node for node in classes()}
    optimizers = {n for n, node in known.items() if "torch.optim.Optimizer" in map(ast.unparse, node.bases)}
    assert optimizers == {"Kronecker", "AdamWAndSparseAdam"}  # the second is one of torch's for a fallback
    constructors = {n for n, node in known.items() if "Kronecker" in map(ast.unparse, node.bases)}
    assert constructors == {"KFBFGS", "KFLBFGS", "ConvergentKFLBFGS", "KFAC"}
    assert all(methods(known[name]) == {"__init__"} for name in constructors)


@pytest.mark.parametrize("path", CORE, ids=ORDER)
def test_no_file_over_300_lines_and_no_function_over_40(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            told = ast.get_docstring(node) is not None
            body = node.body[1:] if told else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{node.name} has {length} lines"


# The integrations: what one of them imports of kfqn stands to its left, or is public.
INTEGRATIONS = [
    "__init__",
    "watch",
    "loggers",
    "page",
    "report",
    "accelerate",
    "transformers",
    "lightning",
    "skorch",
]


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_integrations_import_one_way_and_are_small(name):
    """Frameworks are foreign to each other, and the core knows none: `test_imports_point_one_way`."""
    path = ROOT / "kfqn" / "integrations" / f"{name}.py"
    before = {f"kfqn.integrations.{module}" for module in INTEGRATIONS[: INTEGRATIONS.index(name)]}
    assert {*imports(path)} <= {*before, *(f"kfqn.{public}" for public in ("Kronecker",)), "kfqn"}
    tree, lines = ast.parse(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8").count("\n")
    named = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {module.split(".")[0] for module in named} - {*sys.stdlib_module_names, "kfqn", "torch"}
    assert foreign <= {name}
    assert lines <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


def test_every_integration_has_its_place():
    assert {path.stem for path in (ROOT / "kfqn" / "integrations").glob("*.py")} == {*INTEGRATIONS}


# The lab: what stands for a folder is its ``__init__``, which names what others need of it.
RACE_ORDER = [
    *("failure", "lookup", "cores", "process_group", "timing"),
    *(
        f"problems.{name}"
        for name in ("measures", "task", "data", "cifar", "models", "resnet", "convnext", "transformers")
    ),
    *(f"problems.{name}" for name in ("supervised", "text", "burgers", "networks", "registry", "own")),
    "problems",
    *(
        f"entrants.{name}"
        for name in ("settings", "grids", "peers", "ours", "registry", "sweep_file", "tuned")
    ),
    "entrants",
    *("options", "arguments", "parser"),
    *(f"runs.{name}" for name in ("files", "config", "run", "plan", "conditions", "averaging", "checkpoint")),
    *(f"runs.{name}" for name in ("schedule", "trainer", "warm_up", "train", "workers")),
    "runs",
    *(f"report.{name}" for name in ("palette", "results", "axes", "table", "sentences", "listing", "figure")),
    *(f"report.{name}" for name in ("panels", "page", "live_view")),
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
    """It asks an optimizer what it offers. `paper.cost` measures inside, and entrants are made of parts."""
    public = {"", "__version__", "closures", "race"}
    for path in SOURCES:
        if "race" in path.parts and path.name not in ("cost.py", "ours.py"):
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
    named = re.findall(r"\| `((?:tests|benchmarks)/[\w./]+)` \|$", MAP, re.MULTILINE)
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
