"""The price of one step of every optimizer, in time and memory, as a ratio to torch.optim.SGD.

Every optimizer trains its own copy of one network on one batch. In each round every one of them takes a
step, so that a machine that slows down slows all of them; a ratio is the median over the rounds of a
step's time over SGD's in the same round. Memory is what the allocator is asked for in one more
step, at its peak, and what the state holds afterwards.

Curvature is learnt at some steps only, so KF-BFGS is here three times: at a step with a second pass, at one
with a second pass for the loss alone, and at one without. With curvature_interval=k the price is the mean of
one of the first kind and k - 1 of the last; of the first hundred steps 10 are of the first kind and 32 of the
second.

    python benchmarks/step_time.py [--problems allcnn vgg16 resnet20 small] [--rounds 5] [--threads 2]
"""

import argparse
import copy
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn
from kfqn.race.entrants import peers
from kfqn.race.failure import Failure
from kfqn.race.problems.models import all_cnn_c, vgg16
from kfqn.race.problems.resnet import resnet20
from kfqn.race.runs.conditions import conditions_of
from kfqn.steps.cadence import gap

Make = Callable[[nn.Module], torch.optim.Optimizer]
Method = Callable[..., torch.optim.Optimizer]

OTHER_SIZE = 512  # max_factor_size beside the default, 256
INTERVAL = 10  # the default curvature_interval
NEVER = 10**6


def between(method: Method, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer all of whose steps are without a second pass: an old one, with a long interval."""
    optimizer = method(model, curvature_interval=NEVER)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["k"] = 10 * NEVER + 1
    optimizer.load_state_dict(state)
    return optimizer


def looking(method: Method, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer all of whose steps are young ones that are judged by their loss alone."""
    optimizer = method(model, curvature_interval=NEVER)

    def stay_young(*_: object) -> None:
        for group in optimizer.param_groups:
            if "k" in group:  # not one of other parameters
                group["k"] = min(group["k"], 1)

    optimizer.register_step_pre_hook(stay_young)
    return optimizer


def learning(method: Method, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer all of whose steps have a second pass."""
    return method(model, curvature_interval=1)


OURS: Mapping[str, Method] = {
    "KF-BFGS": kfqn.KFBFGS,
    "KF-BFGS(L)": kfqn.KFLBFGS,
    "KF-BFGS, whole factors": partial(kfqn.KFBFGS, max_factor_size=None),
    f"KF-BFGS, factors up to {OTHER_SIZE}": partial(kfqn.KFBFGS, max_factor_size=OTHER_SIZE),
}

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
    "SOAP": lambda model: peers.soap(model, {"lr": 1e-4, "beta": 0.95}, 0.0),
    "Muon": lambda model: peers.muon(model, {"lr": 1e-4, "adam": 1e-4}, 0.0),
    "Shampoo": lambda model: peers.shampoo(model, {"lr": 1e-4, "eps": 1e-4}, 0.0),
    "SINGD": lambda model: peers.singd(model, {"lr": 1e-4, "lr_cov": 1e-3}, 0.0),
    "KFAC": lambda model: kfqn.KFAC(model, lr=0.1),
}
for _name, _method in OURS.items():
    OPTIMIZERS[f"{_name}: with a second pass"] = partial(learning, _method)
    OPTIMIZERS[f"{_name}: for the loss alone"] = partial(looking, _method)
    OPTIMIZERS[f"{_name}: without"] = partial(between, _method)

PROBLEMS: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "allcnn": ("All-CNN-C", lambda: all_cnn_c(10), 256),
    "vgg16": ("VGG16", lambda: vgg16(10), 128),
    "resnet20": ("ResNet-20", lambda: resnet20(10), 256),
    "small": ("Sixteen small layers", lambda: small_layers(10), 4),
}


def small_layers(classes: int) -> nn.Module:
    """A network whose step is all calls and no arithmetic."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 8, stride=8), nn.ReLU()]
    for _ in range(14):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    closure = kfqn.closure(model, x, y, F.cross_entropy)
    if type(optimizer).__module__.startswith("singd"):  # takes no closure
        closure()
        optimizer.step()
    else:
        optimizer.step(closure)  # type: ignore[arg-type]
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def seconds_of(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most that is allocated during a step beyond what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """The tensors of an optimizer's state, wherever it keeps them."""
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for part in value.values():
                visit(part)
        elif isinstance(value, list | tuple):
            for part in value:
                visit(part)
        elif type(value).__module__.split(".")[0] in ("singd", "pytorch_optimizer"):
            visit(vars(value))

    visit(dict(optimizer.state))
    for key in getattr(optimizer, "STATE_ATTRIBUTES", ()):
        visit(getattr(optimizer, key))
    return sum(storages.values())


def measure(
    model: nn.Module, batch: int, names: list[str], rounds: int, device: torch.device
) -> dict[str, tuple[list[float], int, int]]:
    """The seconds of every round, the peak and the state, in bytes, of every optimizer."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    models = {name: copy.deepcopy(model).to(device) for name in names}
    steps, optimizers = {}, {}
    for name in names:
        try:
            optimizers[name] = OPTIMIZERS[name](models[name])
        except Failure as failure:
            print(f"  {name}: {failure}")
            continue
        steps[name] = partial(one_step, models[name], optimizers[name], x, y)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            seconds = seconds_of(step)
            if round_ >= 2:  # the first sets up the state, the second warms caches
                times[name].append(seconds)
    found = {}
    for name, step in steps.items():
        gc.collect()
        found[name] = (times[name], peak_bytes(step, device), bytes_of_state(optimizers[name]))
    return found


def show(found: Mapping[str, tuple[list[float], int, int]]) -> None:
    """A line an optimizer, and one for ours at the default cadence."""
    sgd, sgd_peak, _ = found["SGD"]
    print(f"{'':<48}{'× SGD':>7}  {'quartiles':<13}{'peak, MB':>9}{'× SGD':>7}{'state, MB':>11}")
    medians = {}
    for name, (seconds, peak, state) in found.items():
        ratios = [t / s for t, s in zip(seconds, sgd, strict=True)]
        low, medians[name], high = statistics.quantiles(ratios, n=4)
        quartiles = f"({low:.2f}–{high:.2f})"
        memory = f"{peak / 1e6:>9.0f}{peak / sgd_peak:>7.2f}{state / 1e6:>11.1f}"
        print(f"  {name:<46}{medians[name]:>7.2f}  {quartiles:<13}{memory}", flush=True)
    for name in OURS:
        kinds = [f"{name}: {kind}" for kind in ("with a second pass", "for the loss alone", "without")]
        if not {kinds[0], kinds[2]} <= found.keys():
            continue
        once, looked, else_ = (medians.get(kind, math.nan) for kind in kinds)
        mean = (once + (INTERVAL - 1) * else_) / INTERVAL
        print(f"  {f'{name}: curvature_interval={INTERVAL}':<46}{mean:>7.2f}", flush=True)
        if kinds[1] in found:
            full, alone = kinds_of_the_first_hundred()
            mean = (full * once + alone * looked + (100 - full - alone) * else_) / 100
            print(f"  {f'{name}: the first hundred steps':<46}{mean:>7.2f}", flush=True)


def kinds_of_the_first_hundred() -> tuple[int, int]:
    """How many of the first hundred steps have a second pass, and how many one for the loss alone."""
    full = [k for k in range(100) if k % INTERVAL == 0]
    judged = {k for k in range(100) if k % gap(k, INTERVAL) == 0}
    return len(full), len(judged - {*full})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = conditions_of(device) | {"threads": str(options.threads), "rounds": str(options.rounds)}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    names = ["SGD", *(name for name in options.optimizers if name != "SGD")]
    for problem in options.problems:
        title, make, batch = PROBLEMS[problem]
        found = measure(make(), batch, names, options.rounds, device)
        print(f"\n{title}, batch {batch}: SGD {statistics.median(found['SGD'][0]):.4f} s a step")
        show(found)


if __name__ == "__main__":
    main()
