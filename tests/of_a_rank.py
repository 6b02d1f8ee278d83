"""One process of data-parallel trainings, started by torchrun: ``of_a_rank.py FOLDER METHOD:HOW ...``.

Writes weights, state and diagnostics of this rank after each to the folder.
"""

import io
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import batches, grouped
from test_contract import OPTIMIZERS
from torch.nn.parallel import DistributedDataParallel

import kfqn

STEPS = 5


def data():
    """The joint batches, the same in every process."""
    torch.manual_seed(1)
    return batches((4, 5, 5), STEPS + 1, size=8)[:STEPS]


def by_hand(model, optimizer, x, target):
    optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()
    with optimizer.second_pass():
        F.cross_entropy(model(x), target).backward()


def train(method, how, folder):
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = grouped()
    wrapped = DistributedDataParallel(model)
    options = {"lr": 0.3, "damping": 1.0, "weight_decay": 0.01}
    if "automatic" in how:
        options["lr"] = "auto"
    if how.startswith("sharded"):
        options["shard_factors"] = True
    if how.endswith("uneven"):
        options["max_factor_size"] = 2
    optimizer = OPTIMIZERS[method](wrapped if how == "wrapper" else model, **options)
    joint = data()
    if how == "wrapper":
        optimizer.warm_start(
            kfqn.closure(model, x[rank::size], y[rank::size], F.cross_entropy) for x, y in joint
        )
    for step, (x, y) in enumerate(joint):
        if how == "joined" and step < 2:
            optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))
            continue
        x, y = x[rank::size], y[rank::size]
        if how == "not finite" and step == 2 and rank == 1:
            x = x * float("inf")
        if how.endswith("resumed") and step == 2:  # as another process would, from what each rank has saved
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], saved)
            saved.seek(0)
            weights, state = torch.load(saved)
            model = grouped()
            model.load_state_dict(weights)
            wrapped = DistributedDataParallel(model)
            optimizer = OPTIMIZERS[method](model, **options)
            optimizer.load_state_dict(state)
        if how in ("by hand", "joined"):
            by_hand(wrapped, optimizer, x, y)
        else:
            optimizer.step(kfqn.closure(wrapped, x, y, F.cross_entropy))
    names = {p: name for name, p in model.named_parameters()}
    state = {names[p]: dict(of) for p, of in optimizer.state.items()}
    saved = {
        "model": model.state_dict(),
        "state": state,
        "diagnostics": optimizer.diagnostics(),
    }
    torch.save(saved, Path(folder) / f"{method}:{how}:{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in sys.argv[2:]:
        train(*case.split(":"), sys.argv[1])
    dist.destroy_process_group()
