"""How many calls of torch a step makes: what it costs where calls, and not arithmetic, take the time.

    python -m benchmarks.cost.calls [--problems allcnn vgg16 resnet20 small]

Views and allocations are counted apart: they start no kernel, but are calls of the host all the same. Counted
on a CPU, with a batch of four images; on a GPU a call for many tensors starts several kernels, or few.
KF-BFGS is the default, as in `step_time`, and KF-BFGS(L), which has second passes; a line is the median step
of its kind among the 37th to the 45th. The same code prints the same numbers: compare the output of two
commits with `diff`.
"""

import argparse
from collections.abc import Mapping
from statistics import median_low
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfqn
from benchmarks.cost.step_time import KINDS, OPTIMIZERS, PROBLEMS
from benchmarks.timing import watched

FIRST, LAST = 36, 44  # of the steps that are counted, from 0: H_A learns in the 40th


class Calls(TorchDispatchMode):
    """Counts what is called inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        light = func.is_view or func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach"))
        self.views += light
        self.calls += not light
        return func(*args, **(kwargs or {}))


def calls_of(model: nn.Module, name: str) -> dict[str, list[tuple[int, int]]]:
    """Calls and views of every step that is counted, by the kind of the step."""
    torch.manual_seed(0)
    optimizer = OPTIMIZERS[name](model)
    step = kfqn.closure(model, torch.randn(4, 3, 32, 32), torch.randint(10, (4,)), F.cross_entropy)
    found: dict[str, list[tuple[int, int]]] = {}
    for k in range(FIRST + 1 if name == "SGD" else LAST + 1):
        if k < FIRST:
            optimizer.step(step)  # type: ignore[arg-type]
            continue
        with watched(model, optimizer) as watch, Calls() as calls:
            optimizer.step(step)  # type: ignore[arg-type]
        found.setdefault(watch.kind, []).append((calls.calls, calls.views))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    for problem in parser.parse_args().problems:
        title, make, _ = PROBLEMS[problem]
        print(f"\n{title:<40}{'calls':>7}{'views':>7}")
        for name in ("SGD", "KF-BFGS", "KF-BFGS(L)"):
            torch.manual_seed(0)
            found = calls_of(make(), name)
            for kind in [kind for kind in KINDS if kind in found]:
                calls, views = median_low(found[kind])
                label = name if name == "SGD" else f"{name}, {kind}"
                print(f"  {label:<38}{calls:>7}{views:>7}", flush=True)


if __name__ == "__main__":
    main()
