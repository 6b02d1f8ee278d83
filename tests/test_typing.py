"""What a type checker tells a user: mypy --strict on a script, the errors it must find and no others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]
SCRIPT = """
from collections.abc import Callable
from typing import assert_type

import torch
import torch.nn.functional as F
from kfqn import KFLBGS  # error
import kfqn

model = torch.nn.Linear(2, 2)
closure = kfqn.closure(model, torch.randn(4, 2), torch.randint(2, (4,)), F.cross_entropy)


def mine() -> torch.Tensor:
    return closure()


def perhaps() -> torch.Tensor | None:
    return None


def optional(given: Callable[[], torch.Tensor] | None) -> None:
    assert_type(kfqn.KFLBFGS(model).step(given), torch.Tensor | None)


assert_type(kfqn.KFBFGS(model).step(closure), torch.Tensor)
assert_type(kfqn.KFLBFGS(model).step(mine), torch.Tensor)
assert_type(kfqn.ConvergentKFLBFGS(model, lr=1.0, damping=1.0).step(closure), torch.Tensor)
assert_type(kfqn.KFAC(model).step(closure), torch.Tensor)
assert_type(kfqn.KFBFGS(model).step(perhaps), torch.Tensor | None)
kfqn.KFBFGS(model).step()
kfqn.KFAC(model).step(None)
report = kfqn.Report("run.html", title="first")
report.update(kfqn.KFBFGS(model), torch.ones(()), step=3)
report.update(kfqn.KFBFGS(model), "low")  # error
report.draw()  # error
print(f"{kfqn.KFAC(model).step(closure).item():.3f}")
kfqn.KFBFGS(model).step().item()  # error
kfqn.KFBFGS(model).step(3)  # error
kfqn.Closure(model)  # error
kfqn.KFLBFGS(model, damping="none")  # error
kfqn.KFLBFGS(model, history=3)  # error
kfqn.KFAC(model, lr="auto")  # error
schedule: torch.optim.Optimizer = kfqn.KFAC(model)
"""


def test_a_users_script_has_the_errors_that_are_there_and_no_others(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", str(script)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = {int(line) for line in re.findall(r"script\.py:(\d+): error", said)}
    wanted = {n for n, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# error")}
    assert found == wanted, said
