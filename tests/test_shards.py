"""Models sharded by `fully_shard`: real processes on gloo, started by torchrun, against one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from of_a_shard import FEW, STEPS, build, data, load, optimizer_of, result, save, sharded, train
from test_contract import OPTIMIZERS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import kfqn
from kfqn.curvature.output_factor import NoOutputFactor

KINDS = ["cnn", "normed", "transformer"]
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]


def processes(count, cases, folder):
    """What all of so many have after each case, MODEL:HOW; starting them takes longer than most cases."""
    script = Path(__file__).with_name("of_a_shard.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run([*run, script, folder, *cases], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: [torch.load(folder / f"{case}:{rank}.pt") for rank in range(count)] for case in cases}


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def of_one(kind, steps):
    model = build(kind)
    optimizer = optimizer_of(model, kind)
    return model, optimizer, train(model, optimizer, data(kind)[:steps], kind)


def test_two_processes_are_one_and_checkpoints_go_from_one_to_two_and_back(tmp_path):
    """Through A's second lesson, with clipping, micro-batches, evaluations between them, checkpointing, and
    the statistics of BatchNorm, for which all processes have the same data."""
    alone = {}
    for kind in KINDS:
        model, optimizer, seen = of_one(kind, STEPS)
        before = result(model, optimizer, seen)
        save(model, optimizer, tmp_path / f"{kind}:one")
        seen = train(model, optimizer, data(kind)[STEPS:], kind)
        alone[kind] = before, result(model, optimizer, seen)
    cases = [f"{kind}:{how}" for kind in KINDS for how in ("saved", "resumed")]
    for case, (first, second) in processes(2, cases, tmp_path).items():
        kind, how = case.split(":")
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        same(first, alone[kind][how == "resumed"])
    for kind in KINDS:
        model = build(kind)
        optimizer = optimizer_of(model, kind)
        load(model, optimizer, tmp_path / f"{kind}:two")
        seen = train(model, optimizer, data(kind)[STEPS:], kind)
        same(result(model, optimizer, seen), alone[kind][1])


def test_four_processes_of_which_some_have_no_rows_or_two_copies_of_two_parts_are_one(tmp_path):
    expected = result(*of_one("cnn", FEW))
    for of_ranks in processes(4, ["cnn:hybrid", "cnn:few"], tmp_path).values():
        for of_rank in of_ranks:
            same(of_rank, expected)


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def of_tensor_parallelism(mesh):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Shard(0)]))
    return model


def in_part(mesh):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fully_shard(model[0], mesh=mesh)
    return model


def of_both(mesh):
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), both["tensor"], [Replicate()]))
    return fully_shard(model, mesh=both["data"])


REFUSED = {
    r"'1\.weight' is a DTensor that is not fully_shard's": of_tensor_parallelism,
    r"'1\.weight' is not, so that nobody averages its gradient": in_part,
    r"'0\.weight' is a DTensor of placements": of_both,
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_sharded_in_another_way_is_refused(why, alone):
    with pytest.raises(ValueError, match=f"^KFBFGS cannot train a sharded model.*{why}.*DistributedDataP"):
        kfqn.KFBFGS(REFUSED[why](alone))


def test_what_needs_whole_rows_is_refused_before_anything_moves(alone):
    model = sharded(build("cnn"), alone)
    for method in OPTIMIZERS.values():
        with pytest.raises(ValueError, match=r"^'0\.0' \(Conv2d\) is sharded.*KFBFGS\(model\)"):
            method(model, lr=0.1, damping=1.0)
    with pytest.raises(ValueError, match=r"^shard_factors=True is for DistributedDataParallel"):
        kfqn.KFBFGS(model, shard_factors=True)
    with pytest.raises(ValueError, match=r"^'1\.0' .* is sharded"):
        kfqn.KFBFGS(model, groups=[{"modules": "1", "lr": 0.1}])
    with pytest.raises(
        ValueError, match=r"^split=5 would cut the rows of '0\.0' \(Conv2d\) where other proc"
    ):
        kfqn.KFBFGS(model, groups=[{"modules": "0", "split": 5}])
    optimizer = kfqn.KFBFGS(model, lr=0.1, damping=1.0, parts=kfqn.Parts(output=NoOutputFactor()))
    train(model, optimizer, data("cnn")[:2], "cnn")
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_model_that_is_sharded_when_the_optimizer_is_there_is_refused_at_the_step(alone):
    model = build("cnn")
    optimizer = kfqn.KFBFGS(model)
    sharded(model, alone)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    with pytest.raises(
        ValueError, match=r"'0\.0'.* was sharded after KFBFGS was built.*call fully_shard first"
    ):
        optimizer.step()


def test_a_whole_state_is_not_taken_for_a_part(alone):
    _, optimizer, _ = of_one("cnn", 2)
    other = sharded(build("cnn"), alone)
    theirs = optimizer_of(other, "cnn")
    for own, saved, was in ((theirs, optimizer, "whole"), (optimizer, theirs, "sharded")):
        if was == "sharded":
            train(other, theirs, data("cnn")[:2], "cnn")
        with pytest.raises(ValueError, match=f"of a model that was {was}.*torch.distributed.checkpoint"):
            own.load_state_dict(saved.state_dict())


def test_mixed_precision_closures_and_a_warm_start(alone):
    """Factors are kept in the weights' type, and the root, which evaluation gathers, is sharded again."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float64)
    model = build("cnn")
    fully_shard(model, mesh=alone, mp_policy=half)
    optimizer = kfqn.KFBFGS(model)
    (x, y), *_ = data("cnn")
    optimizer.warm_start([x, x])
    losses = [optimizer.step(kfqn.closure(model, x, y, F.cross_entropy)).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    tensors = [v for state in optimizer.state.values() for key, v in state.items() if key in ("DW", "H_A")]
    assert {v.dtype for v in tensors} == {torch.float64}
    with torch.no_grad():
        model(x)
    assert optimizer.plan().count("KFBFGS") == len(optimizer.layers)
    with torch.no_grad():
        model(x)
    assert all(layer.sharded for layer in kfqn.KFBFGS(model).layers)
