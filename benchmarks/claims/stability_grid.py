r"""Every point of the paper's grid (appendix B.2) on the digits, however hard: what becomes of the weights.

    python -m benchmarks.claims.stability_grid [--clip 1 ...] [--epochs 28] [--width 32] \
        [--methods kfbfgs kflbfgs]

One run a point, one seed, one thread. Prints the training loss at the end of each run, n for a loss that
is not finite, and how many runs had steps refused or factors reset; ends with status 1 if a weight is
not finite.
"""

import argparse
import math
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import kfqn
from benchmarks.timing import epoch, evaluated, show_conditions
from kfqn.race.entrants.grids import PRINTED
from kfqn.race.problems.data import digits
from kfqn.race.problems.models import small_all_cnn

METHODS = {"kfbfgs": kfqn.KFBFGS, "kflbfgs": kfqn.KFLBFGS}


@dataclass(frozen=True)
class End:
    """How a run ended."""

    loss: float
    finite: bool
    refused: int
    resets: int


def run(method: str, lr: float, damping: float, clip: float | None, epochs: int, width: int) -> End:
    torch.manual_seed(0)
    data = digits()
    model = small_all_cnn(10, 1, width)
    optimizer = METHODS[method](model, lr=lr, damping=damping, clip=clip)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        epoch(model, optimizer, data.training_batches(256, generator), F.cross_entropy)
    loss = evaluated(model, data.in_order(data.train), F.cross_entropy)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    found = optimizer.diagnostics()
    resets = sum(int(layer["resets"]) for name, layer in found.items() if name)
    return End(loss, finite, int(found[""]["refused"]), resets)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clip", type=float, nargs="*", default=[], help="besides none")
    parser.add_argument("--only-clipped", action="store_true", help="leave out the method to the letter")
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["kfbfgs"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    show_conditions(threads=1, epochs=options.epochs)
    grid = PRINTED["kfbfgs"]
    all_finite = True
    for method in options.methods:
        for clip in [*([] if options.only_clipped else [None]), *options.clip]:
            print(f"\n{method}, clip {clip}: training loss after {options.epochs} epochs")
            print("damping \\ lr" + "".join(f"{lr:>9g}" for lr in grid["lr"]))
            ends: list[End] = []
            for damping in grid["damping"]:
                print(f"{damping:>12g}", end="", flush=True)
                for lr in grid["lr"]:
                    end = run(method, lr, damping, clip, options.epochs, options.width)
                    ends.append(end)
                    loss = f"{end.loss:.2g}" if math.isfinite(end.loss) else "n"
                    print(f"{loss:>9}", end="", flush=True)
                print()
            trained = sum(end.loss < 1 for end in ends)
            refused, reset = sum(end.refused > 0 for end in ends), sum(end.resets > 0 for end in ends)
            infinite = sum(not end.finite for end in ends)
            print(f"{len(ends)} points: {trained} below a loss of 1, {refused} with steps refused,", end=" ")
            print(f"{reset} with factors reset, {infinite} with weights that are not finite")
            all_finite &= infinite == 0
    return 0 if all_finite else 1


if __name__ == "__main__":
    sys.exit(main())
