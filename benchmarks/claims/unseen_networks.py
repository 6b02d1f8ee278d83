"""Networks that no race has: KF-BFGS without settings beside torch's optimizers, SOAP and Muon.

    python -m benchmarks.claims.unseen_networks --data-dir DIR [--networks residual plain …] [--seeds 1]

2,560 images of CIFAR-10, augmented as in the race, no weight decay, one thread, few rates of each. A line is
a run: the loss in evaluation at the end, the same with BatchNorm's statistics found anew, the test error, CPU
seconds, and the mean loss of every third epoch's batches.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn
from benchmarks.claims.networks import NETWORKS
from benchmarks.timing import Batches, epoch, evaluated
from kfqn.race.entrants import peers
from kfqn.race.problems.cifar import CIFAR_10
from kfqn.race.problems.data import Dataset

IMAGES = 2560
RATES: dict[str, tuple[float, ...]] = {
    "kfbfgs": (0.0,),
    "adam": (0.001, 0.003),
    "sgd": (0.03, 0.1),
    "soap": (0.003, 0.01),
    "muon": (0.02,),
}


def optimizer_of(name: str, rate: float, model: nn.Module) -> torch.optim.Optimizer:
    if name == "kfbfgs":
        return kfqn.KFBFGS(model)
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    if name == "soap":
        return peers.soap(model, {"lr": rate, "beta": 0.9}, 0.0)
    return peers.muon(model, {"lr": rate, "adam": 0.003}, 0.0)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) if target.ndim > 1 else F.cross_entropy(output, target)


def with_targets(batches: Batches, reconstruct: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, with the images as their own targets where these are to be reconstructed."""
    return ((x, x if reconstruct else y) for x, y in batches)


def share_of_errors(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) != target).double().mean()


@torch.no_grad()
def find_statistics_anew(model: nn.Module, data: Dataset, batch: int, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for x, _ in data.training_batches(batch, generator):
        model(x)


def run(network: str, name: str, rate: float, seed: int, epochs: int, data: Dataset) -> None:
    build, batch = NETWORKS[network]
    reconstruct = network == "autoencoder"
    torch.manual_seed(seed)
    model, generator = build(), torch.Generator().manual_seed(seed)
    optimizer, means, seconds = optimizer_of(name, rate, model), [], 0.0
    for _ in range(epochs):
        batches = with_targets(data.training_batches(batch, generator), reconstruct)
        mean, taken = epoch(model, optimizer, batches, loss_of)
        means.append(mean)
        seconds += taken

    def loss() -> float:
        return evaluated(model, with_targets(data.in_order(data.train), reconstruct), loss_of)

    at_the_end = loss()
    tested = data.in_order(data.test.first(IMAGES))
    wrong = 0.0 if reconstruct else evaluated(model, tested, share_of_errors)
    find_statistics_anew(model, data, batch, generator)
    anew = loss()
    label = f"{name} {rate:g}" if rate else name
    course = " ".join(f"{mean:.3f}" for mean in means[2::3])
    found = f"{at_the_end:>9.3f}{anew:>9.3f}"
    print(f"  {label:<12} seed {seed}{found}{100 * wrong:>7.1f} %{seconds:>7.1f} s   {course}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = CIFAR_10.load(options.data_dir).to(torch.device("cpu"), IMAGES)
    for network in options.networks:
        print(f"\n{network}{'':<12}loss, with new statistics, test error", flush=True)
        for seed in range(options.seeds):
            for name in options.optimizers:
                for rate in RATES[name]:
                    run(network, name, rate, seed, options.epochs, data)


if __name__ == "__main__":
    main()
