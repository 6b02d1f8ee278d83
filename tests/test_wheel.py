"""The wheel, built and installed where torch and what torch needs is all there is; what an import costs."""

import ast
import inspect
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import kfqn

ROOT = Path(__file__).parents[1]
TRAINING = """
import sys
import torch
import torch.nn.functional as F
import kfqn

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
x, target = torch.randn(64, 20), torch.randint(3, (64,))
for make in (kfqn.KFBFGS, kfqn.KFLBFGS, lambda model: kfqn.KFBFGS(model, lr=0.3)):
    optimizer, closure = make(model), kfqn.closure(model, x, target, F.cross_entropy)
    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0], losses
    make(model).load_state_dict(optimizer.state_dict())
print(kfqn.__file__)
assert "numpy" not in sys.modules
"""
PRICE = """
import sys, time
import kfqn
assert "torch" not in sys.modules
start = time.perf_counter()
import torch
of_torch = time.perf_counter() - start
torch.optim.AdamW((model := torch.nn.Linear(2, 2)).parameters())
before, start = {*sys.modules}, time.perf_counter()
[getattr(kfqn, name) for name in kfqn.__all__]
of_kfqn = time.perf_counter() - start
kfqn.KFBFGS(model)
print(*sorted(name for name in {*sys.modules} - before if name.split(".")[0] != "kfqn"))
assert of_kfqn < of_torch, (of_kfqn, of_torch)
"""


def run(*command, **kwargs):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **kwargs)


def closed(name, found):
    """A distribution and all that it needs, by name."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    if name not in found:
        found[name] = distribution(name)
        for need in map(requirement, found[name].requires or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                closed(need.name, found)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist, and the wheel that is made of it."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    """The folder of programs of an environment with the wheel and torch alone."""
    place = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", place)
    pip = (sys.executable, "-m", "pip", "--python", place)
    done = run(*pip, "install", "--no-index", "--no-deps", built[1])
    assert done.returncode == 0, done.stderr
    packages = next(place.glob("lib/python*/site-packages"))
    for needed in closed("torch", {}).values():
        for top in {file.parts[0] for file in needed.files} - {"..", "__pycache__"}:
            (packages / top).symlink_to(needed.locate_file(top))
    return place / "bin"


def test_the_wheel_holds_the_package_and_the_sdist_what_the_make_targets_need(built):
    with tarfile.open(built[0]) as sdist, zipfile.ZipFile(built[1]) as wheel:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
        packed = {name for name in wheel.namelist() if ".dist-info" not in name}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "kfqn").rglob("*") if p.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert "kfqn/py.typed" in packed
    assert {"Makefile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("*.py")} <= names


def test_with_torch_alone_it_trains(clean, tmp_path):
    done = run(clean / "python", "-W", "error", "-W", "ignore:Failed to init", "-c", TRAINING, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(clean.parent))


def test_with_torch_alone_the_command_helps_and_says_what_a_race_needs(clean, tmp_path):
    done = run(clean / "kfqn", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "race" in done.stdout
    done = run(clean / "kfqn", "race", cwd=tmp_path)
    assert done.returncode == 2
    assert "is missing: install the race with pip install 'kfqn[race]'" in done.stderr


def test_an_import_brings_nothing_that_an_optimizer_of_torch_does_not(tmp_path):
    """Nor does it take as long as torch's; of torch's own optimizers the first imports half of torch."""
    done = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PRICE}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


def test_a_type_checker_sees_the_names_that_there_are():
    tree = ast.parse(Path(kfqn.__file__).read_text(encoding="utf-8"))
    (seen,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test)[0] == "T"]
    assert {alias.name for node in seen.body for alias in node.names} == {*kfqn.__all__}
    assert {*kfqn.__all__} <= {*dir(kfqn)}


@pytest.mark.parametrize("name", kfqn.__all__)
def test_an_editor_shows_every_argument(name):
    """By name, with its type, and a text; no argument that takes whatever it is given."""
    found = getattr(kfqn, name)
    own = [x for key, x in inspect.getmembers(found, inspect.isfunction) if x.__module__.startswith("kfqn.")]
    public = [x for x in own if not x.__name__.startswith("_")]
    assert found.__doc__
    for function in [found, *public]:
        signature = inspect.signature(function)
        given = [p for key, p in signature.parameters.items() if key != "self"]
        assert all(p.annotation is not p.empty for p in given), function
        assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given), function
