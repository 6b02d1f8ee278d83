"""Two real processes on gloo, started by torchrun, against one process on the joint batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import grouped
from of_a_rank import STEPS, data
from test_contract import OPTIMIZERS

import kfqn

METHODS = ["KFBFGS", "KFLBFGS", "ConvergentKFLBFGS"]
pytestmark = pytest.mark.usefixtures("double")


def two_processes(cases, folder):
    """What both ranks have after each case, METHOD:HOW; starting processes takes longer than all cases."""
    script = Path(__file__).with_name("of_a_rank.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*run, script, folder, *cases], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return {case: [torch.load(folder / f"{case}:{rank}.pt") for rank in (0, 1)] for case in cases}


def one_process(method, warm=False, skip=None, lr=0.3, **options):
    joint = data()
    torch.manual_seed(0)
    model = grouped()
    optimizer = OPTIMIZERS[method](model, lr=lr, damping=1.0, weight_decay=0.01, **options)
    closures = [kfqn.closure(model, x, y, F.cross_entropy) for x, y in joint]
    if warm:
        optimizer.warm_start(closures)
    for step, closure in enumerate(closures):
        if step != skip:
            optimizer.step(closure)
    names = {p: name for name, p in model.named_parameters()}
    return model.state_dict(), {names[p]: dict(of) for p, of in optimizer.state.items()}


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_two_processes_are_one_on_the_joint_batch(tmp_path):
    """``wrapper``: with a warm start, and given the wrapped model; otherwise the model is given bare.

    ``joined``: each trains by itself first, and the first joint backward pass comes before they have met.
    """
    cases = [f"{method}:{how}" for method in METHODS for how in ("wrapper", "by hand", "joined")]
    for case, (first, second) in two_processes(cases, tmp_path).items():
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        method, how = case.split(":")
        model, state = one_process(method, warm=how == "wrapper")
        same(first["model"], model)
        same(first["state"], state)


def test_the_factors_can_be_shared_out_and_a_step_refused_by_one_is_refused_by_all(tmp_path):
    cases = ["KFBFGS:sharded", "KFLBFGS:sharded", "KFAC:closure", "KFBFGS:not finite"]
    resumed, uneven = ["KFBFGS:resumed", "KFBFGS:sharded resumed"], "KFBFGS:sharded uneven"
    found = two_processes([*cases, *resumed, uneven], tmp_path)
    for case, plain in zip(resumed, ["KFBFGS:sharded"] * 2, strict=True):
        torch.testing.assert_close(found[case][0]["model"], found[case][1]["model"], rtol=0, atol=0)
        same(found[case][0]["model"], found[plain][0]["model"])
    torch.testing.assert_close(found["KFBFGS:sharded resumed"], found["KFBFGS:sharded"], rtol=0, atol=0)
    for case in cases[:2]:
        first, second = found[case]
        torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
        assert first["state"]
        assert second["state"]
        assert not first["state"].keys() & second["state"].keys()
        model, state = one_process(case.split(":")[0])
        same(first["model"], model)
        together = first["state"] | second["state"]
        same({key: together[key] for key in state}, state)
    for case in cases[2:]:  # KFAC draws targets for each half, so no single process does the same
        torch.testing.assert_close(*found[case], rtol=0, atol=0)
    for of_rank in found[uneven]:  # blocks that are filled up make a P that is not contiguous
        same(of_rank["model"], one_process("KFBFGS", max_factor_size=2)[0])
    refused = found["KFBFGS:not finite"][0]
    assert refused["diagnostics"][""]["refused"] == 1
    assert refused["diagnostics"]["0"]["steps"] == STEPS - 1
    same(refused["model"], one_process("KFBFGS", skip=2)[0])


def test_without_a_learning_rate_both_sets_of_weights_are_the_same_in_all_processes(tmp_path):
    """x, which the model holds, and z − x; of layers whose factors are elsewhere, too, and after resuming."""
    hows = ("automatic", "sharded automatic", "sharded automatic resumed")
    cases = [f"{method}:{how}" for method in METHODS[:2] for how in hows]
    for case, (first, second) in two_processes(cases, tmp_path).items():
        torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
        assert first["diagnostics"][""] == second["diagnostics"][""]
        model, state = one_process(case.split(":")[0], lr="auto")
        same(first["model"], model)
        for found in (first["state"], second["state"]):
            same(
                {name: found[name]["ahead"] for name in state}, {name: state[name]["ahead"] for name in state}
            )
