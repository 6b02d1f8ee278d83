"""``kfqn table 1`` to ``3``: the paper's tables, with what is measured here beside what is printed there."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import kfqn
from kfqn.closures import Closure
from kfqn.race import sweep as sweeping
from kfqn.race.entrants import ENTRANTS, PAPER_FIELD
from kfqn.race.entrants.grids import TABLE_3, in_print
from kfqn.race.entrants.settings import Settings
from kfqn.race.options import PaperOptions
from kfqn.race.paper.cost import COLUMNS, PHASES, Cost, Shape, computation, samples, shape, storage
from kfqn.race.paper.experiment import experiments
from kfqn.race.problems import PROBLEMS, Problem
from kfqn.race.report.results import PAPER
from kfqn.race.runs.conditions import conditions_of
from kfqn.race.session import check_device, search_of, terminal
from kfqn.race.timing import waiter

STORAGE = {  # Table 1 as printed, and SGD-m, which it leaves out
    "kfbfgs": {"DW": "IJ|Δ|", "A": "J²|Δ|²", "G": "I²"},
    "kflbfgs": {"DW": "IJ|Δ|", "A": "J²|Δ|²", "G": "pI"},
    "kfac": {"DW": "IJ|Δ|", "A": "J²|Δ|²", "G": "I²"},
    "adam": {"DW": "IJ|Δ|", "DW⊙DW": "IJ|Δ|"},
    "sgd": {"DW": "IJ|Δ|"},
}
COMPUTATION = {  # Table 2 as printed
    "kfbfgs": {
        "pass": "mIJ|Δ||T|",
        "curvature": "mJ|Δ||T| + J²|Δ|² + mI|T| + I²",
        "step": "IJ²|Δ|² + I²J|Δ|",
    },
    "kflbfgs": {
        "pass": "mIJ|Δ||T|",
        "curvature": "mJ|Δ||T| + J²|Δ|² + mI|T| + pI",
        "step": "IJ²|Δ|² + pIJ|Δ|",
    },
    "kfac": {
        "pass": "mIJ|Δ||T|",
        "curvature": "m(J²|Δ|² + I²)|T| + (J³|Δ|³ + I³)/T",
        "step": "IJ²|Δ|² + I²J|Δ|",
    },
    "adam": {"curvature": "IJ|Δ|", "step": "IJ|Δ|"},
    "sgd": {"step": "IJ|Δ|"},
}
REPEATS = 7


def table(options: PaperOptions) -> int:
    """``kfqn table``."""
    if options.number == 3:
        return best_values(options)
    console, names = terminal(), options.optimizers or PAPER_FIELD
    check_device(options.training.device)
    for problem in (PROBLEMS[name] for name in options.problems or ["cifar10-allcnn", "cifar10-vgg16"]):
        batch = 2 if options.number == 1 else options.batch_size
        model, closure = model_and_batch(problem, options, batch)
        shapes = [shape(sample) for sample in samples(model, closure)]
        title = f"{problem.title} of width {options.training.width or problem.width}"
        if options.number == 1:
            print_storage(storage(model, names, closure), shapes, title, console)
        else:
            costs = computation(model, names, closure, REPEATS, waiter(options.training.device))
            print_computation(costs, shapes, f"{title}, m = {batch}", console)
    conditions = conditions_of(torch.device(options.training.device)) | {
        "threads": str(torch.get_num_threads())
    }
    for key, value in conditions.items():
        console.print(f"{key}: {value}", style="dim", highlight=False)
    return 0


def model_and_batch(problem: Problem, options: PaperOptions, batch: int) -> tuple[nn.Module, Closure]:
    """The problem's network and random images of its size: cost does not depend on what they show."""
    torch.manual_seed(0)
    model = problem.network(options.training.width).to(options.training.device)
    images, device = problem.images, options.training.device
    assert images is not None  # the parser knows no others
    x = torch.randn(batch, images.channels, images.side, images.side, device=device)
    y = torch.randint(images.classes, (batch,), device=device)
    return model, kfqn.closure(model, x, y, F.cross_entropy)


def print_storage(costs: Sequence[Cost], shapes: Sequence[Shape], title: str, console: Console) -> None:
    """Table 1: the paper's orders and the bytes of the whole model, then the bytes of every layer."""
    view = _table(f"Table 1. Storage of the optimizer: {title}", ["optimizer", *COLUMNS, "total"])
    for cost in costs:
        totals = {column: sum(layer[column] for layer in cost.bytes) for column in COLUMNS}
        cells = [
            f"O({STORAGE[cost.entrant][column]}) {_megabytes(totals[column])}" if totals[column] else "–"
            for column in COLUMNS
        ]
        view.add_row(ENTRANTS[cost.entrant].label, *cells, _megabytes(sum(totals.values())))
    console.print(view)
    per_layer = _table("Per layer, total", [*LAYER, *(ENTRANTS[cost.entrant].label for cost in costs)])
    for n, layer in enumerate(shapes):
        per_layer.add_row(*_sizes(layer), *(_megabytes(sum(cost.bytes[n].values())) for cost in costs))
    console.print(per_layer)


def print_computation(costs: Sequence[Cost], shapes: Sequence[Shape], title: str, console: Console) -> None:
    """Table 2: the paper's orders and the seconds of the whole model, then those of every layer."""
    headings = ["optimizer", "additional pass", "curvature", "step", "iteration", "to SGD-m"]
    view = _table(f"Table 2. Computation beyond the mini-batch gradient: {title}", headings)
    for cost in costs:
        cells = []
        for phase in PHASES:
            order, total = COMPUTATION[cost.entrant].get(phase), sum(layer[phase] for layer in cost.seconds)
            cells.append(
                "–" if order is None else f"O({order}) {_milliseconds(total)}" if total else f"O({order})"
            )
        whole = [_milliseconds(cost.iteration), f"{cost.ratio:.2f}"]
        view.add_row(ENTRANTS[cost.entrant].label, *cells, *whole)
    console.print(view)
    per_layer = _table(
        "Per layer: additional pass + curvature + step",
        [*LAYER, *(ENTRANTS[cost.entrant].label for cost in costs)],
    )
    for n, layer in enumerate(shapes):
        cells = []
        for cost in costs:
            parts = [cost.seconds[n][phase] for phase in PHASES if cost.seconds[n][phase]]
            cells.append(" + ".join(f"{1000 * part:.2f}" for part in parts) + " ms")
        per_layer.add_row(*_sizes(layer), *cells)
    console.print(per_layer)


LAYER = ["layer", "I", "J", "|Δ|", "|T|"]


def _sizes(layer: Shape) -> list[str]:
    return [layer.name, *map(str, (layer.I, layer.J, layer.offsets, layer.locations))]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count else "–"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _table(title: str, headings: Sequence[str]) -> Table:
    view = Table(title=title, title_justify="left", header_style="dim", box=None, pad_edge=False)
    for n, heading in enumerate(headings):
        view.add_column(heading, justify="right" if n else "left", overflow="fold")
    return view


def best_values(options: PaperOptions) -> int:
    """Table 3: the best settings of a sweep here beside those the paper found, in its convention."""
    problems = [PROBLEMS[name] for name in options.problems or TABLE_3]
    names = options.optimizers or PAPER_FIELD
    of_all = experiments(options, problems)
    for experiment in of_all:
        search_of(options.tuning, experiment.scale, PAPER.loss)
    headings = ["problem", *(ENTRANTS[name].label for name in names)]
    view = _table("Table 3. Best (learning rate, damping): here / paper", headings)
    complete, tuned = True, []
    for experiment in of_all:
        problem, entries = experiment.problem, experiment.entries(names, PAPER.loss)
        cells = []
        for name, entry in entries.items():
            found, printed = entry["best"], TABLE_3.get(problem.name, {}).get(name)
            ours = _values(name, in_print(name, found)) if found else "none finished"
            cells.append(f"{ours} / {_values(name, printed) if printed else '–'}")
            complete = complete and sweeping.complete(entry)
            tuned.append(f"{problem.name}, {ENTRANTS[name].label}: {sweeping.describe(entry)}")
        view.add_row(problem.title, *cells)
    console = of_all[0].session.console
    console.print(view)
    console.print(
        "In the paper's convention: SGD-m averages the gradient, its lr is ten times torch's; Adam's damping "
        "is ε.",
        style="dim",
    )
    for line in tuned:
        console.print(f"tuned at: {line}", style="dim", highlight=False)
    return 0 if complete else 1


def _values(name: str, settings: Settings) -> str:
    return "(" + ", ".join(f"{settings[key]:g}" for key in ENTRANTS[name].required) + ")"
