"""What less memory saves and costs: triangles of A and H_A, D̂W in bfloat16, and both, beside the default.

    python -m benchmarks.cost.memory [--rounds 20]

Bytes of the optimizer's state for each weight, and the CPU time of a pass and a step over that of the
default: the least of some steps, taken in turn. On the character GPT with its 48 windows of 64, and on an
MLP with a batch of 128, where a pass is short beside a step. What they cost in loss is for
`benchmarks.claims.ablation --problems char-gpt --variants "as it is" "less memory: …"` to say.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn
from benchmarks.timing import in_turn, show_conditions
from kfqn.curvature.input_factor import AveragedRoot
from kfqn.race.problems.transformers import CharacterGPT
from kfqn.steps.average import Nesterov

VARIANTS = {
    "as it is": kfqn.Parts(),
    "triangles": kfqn.Parts(input=AveragedRoot(triangles=True)),
    "bfloat16": kfqn.Parts(average=Nesterov(bfloat16=True)),
    "both": kfqn.Parts(input=AveragedRoot(triangles=True), average=Nesterov(bfloat16=True)),
}
Loss = Callable[[nn.Module], Tensor]


def mlp() -> tuple[nn.Module, Loss]:
    """784-1024-1024-10 on 128 random images."""
    pairs = itertools.pairwise((784, 1024, 1024, 10))
    *layers, _ = (part for n, m in pairs for part in (nn.Linear(n, m), nn.ReLU()))
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    return nn.Sequential(*layers), lambda model: F.cross_entropy(model(x), y)


def gpt() -> tuple[nn.Module, Loss]:
    """The character GPT on random characters."""
    x, y = torch.randint(101, (2, 48, 64))
    return CharacterGPT(101), lambda model: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Loss) -> float:
    """CPU seconds of a pass and a step."""
    start = time.process_time()
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    return time.process_time() - start


def price(model: nn.Module, loss_of: Loss, rounds: int) -> Mapping[str, tuple[float, float]]:
    """By variant: bytes of state a weight, and CPU time over that of the default."""
    models = {name: copy.deepcopy(model) for name in VARIANTS}
    optimizers = {name: kfqn.KFBFGS(models[name], parts=parts) for name, parts in VARIANTS.items()}
    ways = {name: partial(step, models[name], optimizers[name], loss_of) for name in VARIANTS}
    seconds = {name: min(found for _, found in of) for name, of in in_turn(ways, rounds, 2).items()}
    weights = sum(p.numel() for p in model.parameters())
    held = {
        name: sum(x.nbytes for state in optimizer.state.values() for x in state.values()) / weights
        for name, optimizer in optimizers.items()
    }
    return {name: (held[name], seconds[name] / seconds["as it is"]) for name in VARIANTS}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    show_conditions(threads=1, rounds=rounds)
    prices = [price(*made, rounds) for made in (gpt(), mlp())]
    print("| | GPT: bytes a weight | time | MLP: bytes a weight | time |\n| --- | --- | --- | --- | --- |")
    for name in VARIANTS:
        cells = [cell for of in prices for cell in (f"{of[name][0]:.1f}", f"{of[name][1]:.3f}")]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
