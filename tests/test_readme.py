"""The README's code runs as printed."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

import kfqn

ROOT = Path(__file__).parents[1]


def test_the_ten_lines_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    loader = [(torch.randn(8, 5), torch.randint(3, (8,)))]
    scope = {"kfqn": kfqn, "F": F, "model": torch.nn.Linear(5, 3), "loader": loader}  # what a reader has
    for code in blocks:  # each goes on where the one before ended
        exec(code, scope)
    assert scope["loss"].isfinite()


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
