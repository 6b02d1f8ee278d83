"""One process of trainings of sharded models, started by torchrun: ``of_a_shard.py FOLDER MODEL:HOW ...``.

Writes whole weights and state after each to the folder, and what distributed checkpoints hold.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from foreign import Conv1D
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import kfqn

STEPS, MORE, FEW = 45, 4, 5  # through the second time that A is learnt, after 40 steps; from a checkpoint on


class Gate(nn.Module):
    """A layer of one row, so that all processes but the first have none."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.gate = nn.Parameter(torch.ones(())[None]), nn.Linear(channels, 1)

    def forward(self, x):
        return x * self.scale * self.gate(x.mean((2, 3)))[..., None, None].sigmoid()


def cnn():
    """Rows that two processes do not divide, groups, depthwise filters, more columns than rows and fewer."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.ReLU(), Gate(5)),
        nn.Sequential(nn.Conv2d(5, 10, 3, groups=5, bias=False), nn.ReLU(), nn.Conv2d(10, 12, 1, groups=2)),
        nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 9), nn.ReLU()),
        nn.Linear(9, 4),
    )


def normed():
    """With BatchNorm, also without a weight. λ_A is of the batch size where columns outnumber locations."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        nn.Sequential(nn.Conv2d(5, 6, 2), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


class Block(nn.Module):
    """Attention and a multi-layer perceptron, in part made of GPT-2's layer, whose weights are transposed."""

    def __init__(self, width):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), Conv1D(width, width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        q, k, v = self.qkv(self.before(x))[:, None].chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Embeddings, two blocks, the second of which is computed again in the backward pass."""

    def __init__(self, width=12):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(7, width), nn.Parameter(torch.randn(5, width))
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7)

    def forward(self, x):
        x = self.blocks[0](self.embedding(x) + self.positions)
        x = self.norm(checkpoint(self.blocks[1], x, use_reentrant=False))
        return self.head(x).flatten(0, 1).clone()  # of which FSDP wants no view


def build(kind):
    torch.manual_seed(0)
    return {"cnn": cnn, "normed": normed, "transformer": Transformer}[kind]()


def data(kind):
    """The joint batches, the same in every process."""
    torch.manual_seed(1)
    if kind != "transformer":
        return [(torch.randn(8, 3, 4, 4), torch.randint(4, (8,))) for _ in range(STEPS + MORE)]
    return [(torch.randint(7, (8, 5)), torch.randint(7, (8, 5))) for _ in range(STEPS + MORE)]


def sharded(model, mesh):
    """As is usual: block by block, and what is left of the root; the head of the CNN for itself."""
    for block in getattr(model, "blocks", model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model, kind):
    """Factors and directions of the transformer in blocks, some of which are in two processes."""
    largest = {"max_factor_size": 8} if kind == "transformer" else {}
    return kfqn.KFBFGS(model, weight_decay=0.01, decoupled_weight_decay=kind == "cnn", **largest)


def train(model, optimizer, batches, kind, share=slice(None)):
    """Micro-batches, clipped gradients, and what evaluations between them and between steps have given."""
    seen = []
    for k, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        micro = [(x[:4], y[:4]), (x[4:], y[4:])] if k % 4 == 0 else [(x, y)]
        for i, (x_i, y_i) in enumerate(micro):
            if i:
                seen.append(evaluated(model, x))
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(i + 1 == len(micro))
            if kind != "transformer" and k % 40 == 0:  # of which A is nothing
                moved = (x_i[share] + 1).requires_grad_()
                torch.autograd.grad(model(moved).square().sum(), moved)
            output = model(x_i[share])
            (F.cross_entropy(output, y_i[share].flatten()) / len(micro)).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if k % 5 == 2:
            seen.append(evaluated(model, x))
    return seen


@torch.no_grad()
def evaluated(model, x):
    """Which leaves the root gathered."""
    output = model.eval()(x)
    model.train()
    return output


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def result(model, optimizer, seen):
    """Weights and state, whole, and what was seen."""
    if hasattr(model, "reshard"):
        model.reshard()
    names = {p: name for name, p in model.named_parameters()}
    state = {
        names[p]: {key: whole(v) if isinstance(v, torch.Tensor) else v for key, v in of.items()}
        for p, of in optimizer.state.items()
    }
    weights = {name: whole(v) for name, v in model.state_dict().items()}
    return {"model": weights, "state": state, "seen": seen}


def save(model, optimizer, folder):
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=folder)


def load(model, optimizer, folder):
    found = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])


def main(folder, kind, how):
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    if how == "hybrid":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "parts"))
    batches, share = data(kind), slice(None) if kind == "normed" else slice(rank, None, size)
    model = sharded(build(kind), mesh)
    optimizer = optimizer_of(model, kind)
    if how == "resumed":  # from what one process has saved
        load(model, optimizer, folder / f"{kind}:one")
        seen = train(model, optimizer, batches[STEPS:], kind, share)
    else:
        seen = train(model, optimizer, batches[: FEW if how in ("hybrid", "few") else STEPS], kind, share)
        if how == "saved":
            save(model, optimizer, folder / f"{kind}:two")
    torch.save(result(model, optimizer, seen), folder / f"{kind}:{how}:{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in sys.argv[2:]:
        main(Path(sys.argv[1]), *case.split(":"))
    dist.destroy_process_group()
