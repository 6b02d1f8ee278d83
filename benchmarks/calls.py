"""How many calls of torch a step makes: what it costs where calls, and not arithmetic, take the time.

    python benchmarks/calls.py [--problems allcnn vgg16 resnet20 small]

Views and allocations are counted apart: they start no kernel, but are calls of the host all the same. Counted
on a CPU, with a batch of four images; on a GPU a call for many tensors starts several kernels, or few.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from step_time import OPTIMIZERS, PROBLEMS
from torch.utils._python_dispatch import TorchDispatchMode

import kfqn

KINDS = ("SGD", "KF-BFGS: without", "KF-BFGS: with a second pass")


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


def calls_of(problem: str, kind: str) -> Calls:
    """Those of the fifth step."""
    _, make, _ = PROBLEMS[problem]
    torch.manual_seed(0)
    model = make()
    optimizer = OPTIMIZERS[kind](model)
    step = kfqn.closure(model, torch.randn(4, 3, 32, 32), torch.randint(10, (4,)), F.cross_entropy)
    for _ in range(4):
        optimizer.step(step)  # type: ignore[arg-type]
    calls = Calls()
    with calls:
        optimizer.step(step)  # type: ignore[arg-type]
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    for problem in parser.parse_args().problems:
        print(f"\n{PROBLEMS[problem][0]:<30}{'calls':>7}{'views':>7}")
        for kind in KINDS:
            counted = calls_of(problem, kind)
            print(f"  {kind:<28}{counted.calls:>7}{counted.views:>7}", flush=True)


if __name__ == "__main__":
    main()
