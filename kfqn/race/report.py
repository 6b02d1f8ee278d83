"""A race told to a person: one self-contained HTML page, and the same table in the terminal."""

import base64
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

import jinja2
from rich.console import Console
from rich.table import Table

from kfqn.race.figure import draw
from kfqn.race.problems import PROBLEMS
from kfqn.race.runs import Run, write_atomically
from kfqn.race.summary import RACE, Measure, Row, Standing, common_target, headings, learned, rows

EXPLANATION = (
    "Means over the seeds, ± the standard error; the lowest final loss on top. Training loss: of the final "
    "weights, over the training images without augmentation. Target: the lowest training loss that every "
    "optimizer that learned has reached at the end of an epoch in the median over its seeds; epochs and "
    "seconds to it are medians too. An optimizer has learned if its lowest loss is at least half the way "
    "from guessing, ln(classes), to the lowest of all. Seconds are training alone: neither evaluation nor "
    "the warm start is in them."
)


UNFINISHED = "unfinished: its process was killed, or another command is doing it; run the same command again"


def write_report(runs: Sequence[Run], out: Path, console: Console) -> None:
    """Draw ``race.png`` and ``race.html`` in ``out`` from the files of the runs, and print the table."""
    standings = standings_of(runs)
    table = rows(standings)
    title = title_of(runs)
    draw([("", standings)], title, out / "race.png")
    page = jinja2.Environment(loader=jinja2.PackageLoader("kfqn.race", "."), autoescape=True)
    html = page.get_template("report.html.jinja").render(
        title=title,
        verdict=verdict(standings),
        figure=base64.b64encode((out / "race.png").read_bytes()).decode(),
        headings=astuple(headings(RACE)),
        rows=[astuple(row) for row in table],
        explanation=EXPLANATION,
        losses=losses_of(runs),
        factors=factors_of(standings),
        conditions=conditions_of(runs),
    )
    write_atomically(out / "race.html", html)
    print_table(table, title, console, RACE)
    console.print(verdict(standings), soft_wrap=not console.is_terminal)
    for name, reason, _ in losses_of(runs):
        console.print(f"{name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"figure  {out / 'race.png'}\nreport  {out / 'race.html'}", highlight=False, soft_wrap=True)


def standings_of(runs: Sequence[Run], measure: Measure = RACE) -> list[Standing]:
    """The runs gathered by entrant and settings, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = run.config
        groups.setdefault(f"{config.entrant} {sorted(config.settings.items())}", []).append(run)
    return [Standing(group, measure) for group in groups.values()]


@dataclass(frozen=True)
class Factors:
    """`diagnostics` of an optimizer at the end of a run, as a table of its layers."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def factors_of(standings: Sequence[Standing]) -> list[Factors]:
    """What the factors did in the first finished run of every optimizer that tells."""
    found = []
    for standing in standings:
        last = standing.epochs[0][-1].get("diagnostics") if standing.epochs else None
        if last:
            layers = {name: values for name, values in last.items() if name}
            headings = [*next(iter(layers.values()))]
            rows = [[name, *(f"{values[key]:.4g}" for key in headings)] for name, values in layers.items()]
            refused = f"{last['']['refused']:g} steps refused"
            found.append(Factors(f"{standing.label}: {refused}", ["layer", *headings], rows))
    return found


def title_of(runs: Sequence[Run]) -> str:
    """The problem and how much of it."""
    config = runs[0].config
    problem = PROBLEMS[config.problem]
    seeds = len({run.config.seed for run in runs})
    parts = [f"{problem.title} of width {config.width}", f"batch {config.batch_size}"]
    if config.train_size is not None:
        parts.append(f"{config.train_size} training images")
    return ", ".join([*parts, f"{seeds} seed{'s' if seeds > 1 else ''}"])


def verdict(standings: Sequence[Standing]) -> str:
    """The race in a few sentences: who was first at the common target, who ended lowest, who has no say."""
    measure, target = standings[0].measure, common_target(standings)
    finished = [s for s in standings if math.isfinite(s.lowest)]
    if not finished:
        return "No run finished." if not any(s.epochs for s in standings) else "Most runs were lost."
    able = sorted(learned(standings), key=lambda s: (s.reached(target, measure.time), s.final))
    if not able:
        classes = PROBLEMS[standings[0].config.problem].classes
        return f"Nobody learned: guessing among {classes} classes has a loss of {math.log(classes):.3g}."
    times = [f"{s.reached(target, measure.time):.2f} {measure.second}" for s in able]
    first = f"{able[0].label} was first at the common target, {measure.loss_label} {target:.3g}"
    sentences = [
        f"{first}: after {times[0]}, before {able[1].label} after {times[1]}."
        if len(able) > 1
        else f"{first}, after {times[0]}."
    ]
    if len(able) > 1:
        lowest = min(able, key=lambda s: s.final)
        sentences.append(f"{lowest.label} ended lowest, at {lowest.final:.3g}.")
    too_little = [s.label for s in finished if s not in able]
    sentences += [f"Learned too little to have a say: {', '.join(too_little)}."] if too_little else []
    return " ".join(sentences)


def losses_of(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Every run that did not finish: its name, why, and the traceback of a failed one."""
    ends = [(run, run.end()) for run in runs]
    return [
        (run.config.identity, UNFINISHED if end is None else end["reason"], (end or {}).get("traceback", ""))
        for run, end in ends
        if end is None or end["status"] != "finished"
    ]


def conditions_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the figures hold for; where runs differ, every value."""
    ends = [run.end() or {} for run in runs]
    merged: dict[str, dict[str, None]] = {}
    for run, end in zip(runs, ends, strict=True):
        config = run.config
        facts = {"evaluated images": f"first {config.evaluated}"} | end.get("conditions", {})
        facts |= {
            "threads": str(config.threads),
            "seeds": str(config.seed),
            "epochs": str(config.epochs or "no limit"),
            "CPU seconds": f"{config.budget:g}" if config.budget else "no limit",
            "weight decay": f"{config.weight_decay:g}",
        }
        for key, value in facts.items():
            merged.setdefault(key, {})[value] = None
    return [(key, ", ".join(values)) for key, values in merged.items()]


def print_table(table: Sequence[Row], title: str, console: Console, measure: Measure) -> None:
    """The table, the winner first and bold."""
    view = Table(title=title, title_justify="left", header_style="dim", box=None, pad_edge=False)
    shown = [f.name for f in fields(Row) if f.name != "lost" or any(row.lost != "–" for row in table)]
    for name in shown:
        justify: Literal["left", "right"] = "left" if name == "label" else "right"
        view.add_column(getattr(headings(measure), name), justify=justify, overflow="fold")
    for n, row in enumerate(table):
        view.add_row(*(getattr(row, name) for name in shown), style="bold" if n == 0 else None)
    console.print(view)
