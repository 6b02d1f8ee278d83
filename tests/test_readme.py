"""The code of the README and of every page runs as printed."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfqn
from kfqn.parameters.groups import note
from kfqn.steps.rule import StepRule

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")} | {"README.md"}
READ_ON = [
    ["README.md", "docs/guide.md"],
    ["docs/coming_from.md"],
    ["docs/parts.md"],
    ["docs/distributed.md"],
]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def alone(tmp_path):
    """A group of one process, for what is wrapped in `DistributedDataParallel`."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("pages", READ_ON, ids=lambda pages: pages[-1])
def test_the_code_of_a_page_runs(pages, alone):
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, target = torch.randn(8, 5), torch.randint(3, (8,))
    scope = {"__name__": "page", "kfqn": kfqn, "torch": torch, "F": F}  # what a reader has
    scope |= {"net": net, "model": net, "loader": [(x, target)] * 2}
    scope |= {"DistributedDataParallel": DistributedDataParallel, "fully_shard": fully_shard}
    scope |= {"math": math, "dataclass": dataclass, "StepRule": StepRule, "note": note}
    for code in [code for page in pages for code in blocks(page)]:  # each goes on where the one before ended
        if "optim.Muon" not in code or hasattr(torch.optim, "Muon"):  # not in older versions of torch
            exec(code, scope)
    assert isinstance(scope["optimizer"], torch.optim.Optimizer)
    assert all(p.isfinite().all() for p in scope["model"].parameters())


def test_no_page_with_code_is_left_out():
    raced = {"docs/race_your_own.md"}  # by test_race_own
    assert {page for page in PAGES if blocks(page)} == {page for pages in READ_ON for page in pages} | raced
