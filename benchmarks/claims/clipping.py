"""Whether gradients that are clipped train as others do: steps have one length, so only averages can differ.

    python -m benchmarks.claims.clipping [--seeds 12]

320 noisy images of 8 × 8 in 4 classes, 40 steps of 32; the loss at the end, in evaluation mode, by seed.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn

Clip = Callable[[nn.Module], object]
CLIPS: dict[str, Clip] = {
    "unclipped": lambda model: None,
    "norm 1": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "value 0.5": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.5),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "KF-BFGS, auto": lambda model: kfqn.KFBFGS(model),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
}


def trained(seed: int, make: Callable[[nn.Module], torch.optim.Optimizer], clip: Clip) -> float:
    """The loss after 40 steps."""
    x = torch.randn(320, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long()
    torch.manual_seed(seed)
    head = [nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), *head)
    optimizer = make(model)
    for k in range(40):
        part = slice(k % 10 * 32, k % 10 * 32 + 32)

        def closure(part: slice = part) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[part]), y[part])
            loss.backward()
            clip(model)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'loss at the end: quartiles':<32}{'lower':>8}{'median':>8}{'upper':>8}")
    for name, make in OPTIMIZERS.items():
        for label, clip in CLIPS.items():
            quartiles = statistics.quantiles([trained(seed, make, clip) for seed in seeds], n=4)
            print(f"{name + ', ' + label:<32}" + "".join(f"{q:>8.3f}" for q in quartiles), flush=True)


if __name__ == "__main__":
    main()
