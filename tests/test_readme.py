"""The code of the README and of the guide runs as printed."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

import kfqn

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_ten_lines_run():
    assert len(blocks("README.md")) == 3
    assert len(blocks("docs/guide.md")) == 2
    loader = [(torch.randn(8, 5), torch.randint(3, (8,)))]
    scope = {"kfqn": kfqn, "F": F, "model": torch.nn.Linear(5, 3), "loader": loader}  # what a reader has
    for code in [*blocks("README.md"), *blocks("docs/guide.md")]:  # each goes on where the one before ended
        exec(code, scope)
    assert scope["loss"].isfinite()
