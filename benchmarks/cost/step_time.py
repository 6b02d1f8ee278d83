"""The price of one step of every optimizer, in time and memory, as a ratio to torch.optim.SGD.

    python -m benchmarks.cost.step_time [--problems allcnn vgg16 resnet20 small] [--rounds 40] [--threads 2]
    python -m benchmarks.cost.step_time --first 40 --problems allcnn8 allcnn48 --optimizers KF-BFGS

Every optimizer trains its own copy of one network on the same batches of noise, a new one each step: one that
is learnt by heart has gradients too small for a CPU to be quick at. In each round every one of them takes a
step, so that a machine that slows down slows all of them; a ratio is the median over the rounds of a
step's time over SGD's in the same round. Memory is what the allocator is asked for in one more
step, at its peak, and what the state holds afterwards. With ``--first`` it is the first steps that are
timed, the setting up of the state among them: a ratio is of their sums, the median of five trainings.

KF-BFGS is as it comes, without settings, and its steps are filed by their kind: those in which H_A learns,
about every 40th, or in KF-BFGS(L) with a second pass, and those without learning. "At the cadence" is what
one of the former and 39 of the latter cost in the mean.
"""

import argparse
import copy
import gc
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn
from benchmarks.timing import in_turn, show_conditions, watched
from kfqn.race.entrants import peers
from kfqn.race.failure import Failure
from kfqn.race.problems.models import all_cnn_c, vgg16
from kfqn.race.problems.resnet import resnet20

Make = Callable[[nn.Module], torch.optim.Optimizer]
Batch = tuple[Tensor, Tensor]

OTHER_SIZE = 512  # max_factor_size beside the default, which cuts what has more than 1024 rows
INTERVAL = 40  # the default curvature_interval
WARM_UP = 2  # the first step sets up the state, the second warms caches
TRAININGS = 5  # of the first steps
*LEARNING, WITHOUT = KINDS = ("with a second pass", "with A learnt", "without learning")


OURS: Mapping[str, Make] = {
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
    **OURS,
}

PROBLEMS: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "allcnn": ("All-CNN-C", lambda: all_cnn_c(10), 256),
    "allcnn8": ("All-CNN-C of width 8", lambda: all_cnn_c(10, width=8), 64),
    "allcnn48": ("All-CNN-C of width 48", lambda: all_cnn_c(10, width=48), 64),
    "vgg16": ("VGG16", lambda: vgg16(10), 128),
    "resnet20": ("ResNet-20", lambda: resnet20(10), 256),
    "small": ("Sixteen small layers", lambda: small_layers(10), 4),
}
USUAL = ["allcnn", "vgg16", "resnet20", "small"]


def small_layers(classes: int) -> nn.Module:
    """A network whose step is all calls and no arithmetic."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 8, stride=8), nn.ReLU()]
    for _ in range(14):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch]) -> str:
    """What kind of step it was."""
    x, y = next(batches)
    closure = kfqn.closure(model, x, y, F.cross_entropy)
    with watched(model, optimizer) as watch:
        if type(optimizer).__module__.startswith("singd"):  # takes no closure
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)  # type: ignore[arg-type]
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return watch.kind


def peak_bytes(step: Callable[[], str], device: torch.device) -> tuple[int, str]:
    """The most that is allocated during a step beyond what there was before, and the kind of the step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kind = step()
        return torch.cuda.max_memory_allocated(device) - before, kind
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        kind = step()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, kind


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


@dataclass(frozen=True)
class Price:
    """Of one optimizer: the seconds of every round and the kind of its step; in bytes, by kind, the peak."""

    steps: list[tuple[float, str]]
    peaks: Mapping[str, int]
    state: int


@dataclass(frozen=True)
class Training:
    """One more step, and the optimizer that takes it."""

    step: Callable[[], str]
    optimizer: torch.optim.Optimizer


def trainings(
    model: nn.Module, batch: int, count: int, names: list[str], device: torch.device
) -> dict[str, Training]:
    """Of every optimizer that can be had here, on its own copy of the model; after ``count`` batches anew."""
    torch.manual_seed(0)
    batches = [
        (torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device))
        for _ in range(count)
    ]
    found: dict[str, Training] = {}
    for name in names:
        own = copy.deepcopy(model).to(device)
        try:
            optimizer = OPTIMIZERS[name](own)
        except Failure as failure:
            print(f"  {name}: {failure}")
            continue
        found[name] = Training(partial(one_step, own, optimizer, itertools.cycle(batches)), optimizer)
    return found


def measure(found: Mapping[str, Training], rounds: int, device: torch.device) -> dict[str, Price]:
    """Steps in turn, then their memory."""
    times = in_turn({name: training.step for name, training in found.items()}, rounds, WARM_UP)
    return {
        name: Price(
            times[name],
            peaks_of(training.step, {kind for _, kind in times[name]}, device),
            bytes_of_state(training.optimizer),
        )
        for name, training in found.items()
    }


def first_steps(start: Callable[[], Mapping[str, Training]], count: int) -> dict[str, list[float]]:
    """Seconds of the first ``count`` steps together, of several trainings; one before them warms caches."""
    found: dict[str, list[float]] = {}
    for training in range(1 + TRAININGS):
        times = in_turn({name: new.step for name, new in start().items()}, count, warm_up=0)
        for name, steps in times.items():
            if training:
                found.setdefault(name, []).append(sum(seconds for seconds, _ in steps))
    return found


def peaks_of(step: Callable[[], str], kinds: set[str], device: torch.device) -> dict[str, int]:
    """The peak of one step of every kind."""
    found: dict[str, int] = {}
    for _ in range(INTERVAL + 1):
        if kinds <= found.keys():
            break
        gc.collect()
        peak, kind = peak_bytes(step, device)
        found.setdefault(kind, peak)
    return found


def show(found: Mapping[str, Price]) -> None:
    """A line for every kind of step of every optimizer."""
    sgd = [seconds for seconds, _ in found["SGD"].steps]
    (sgd_peak,) = found["SGD"].peaks.values()
    print(f"{'':<46}{'steps':>6}{'× SGD':>7}  {'quartiles':<13}{'peak, MB':>9}{'× SGD':>7}{'state, MB':>11}")
    for name, price in found.items():
        ratios: dict[str, list[float]] = {}
        for (seconds, kind), of_sgd in zip(price.steps, sgd, strict=True):
            ratios.setdefault(kind, []).append(seconds / of_sgd)
        for kind in [kind for kind in KINDS if kind in ratios]:
            low, median, high = statistics.quantiles(ratios[kind] * 2, n=4)  # also of a single one
            quartiles = f"({low:.2f}–{high:.2f})"
            peak = price.peaks.get(kind)
            memory = f"{peak / 1e6:>9.0f}{peak / sgd_peak:>7.2f}" if peak else f"{'–':>9}{'–':>7}"
            label = name if len(ratios) == 1 else f"{name}: {kind}"
            line = f"  {label:<44}{len(ratios[kind]):>6}{median:>7.2f}  {quartiles:<13}{memory}"
            print(f"{line}{price.state / 1e6:>11.1f}", flush=True)
        learning = [kind for kind in LEARNING if kind in ratios]
        if learning and WITHOUT in ratios:
            once, without = statistics.median(ratios[learning[0]]), statistics.median(ratios[WITHOUT])
            mean = (once + (INTERVAL - 1) * without) / INTERVAL
            print(f"  {f'{name}: at the cadence of {INTERVAL}':<44}{'':>6}{mean:>7.2f}", flush=True)


def show_first(found: Mapping[str, list[float]], count: int) -> None:
    """A line for every optimizer."""
    for name, seconds in found.items():
        ratios = [own / of_sgd for own, of_sgd in zip(seconds, found["SGD"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"  {name}: the first {count} steps {median:.2f} × SGD ({low:.2f}–{high:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=USUAL)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--first", type=int, metavar="STEPS", help="time the first steps instead")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    show_conditions(device, threads=options.threads, rounds=options.rounds)
    names = ["SGD", *(name for name in options.optimizers if name != "SGD")]
    for problem in options.problems:
        title, make, batch = PROBLEMS[problem]
        start = partial(trainings, make(), batch, options.first or options.rounds, names, device)
        if options.first:
            print(f"\n{title}, batch {batch}")
            show_first(first_steps(start, options.first), options.first)
            continue
        found = measure(start(), options.rounds, device)
        sgd = statistics.median(seconds for seconds, _ in found["SGD"].steps)
        print(f"\n{title}, batch {batch}: SGD {sgd:.4f} s a step")
        show(found)


if __name__ == "__main__":
    main()
