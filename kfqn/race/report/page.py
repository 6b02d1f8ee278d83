"""The report of a race: one self-contained HTML page, and the same table in the terminal."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from rich.console import Console

from kfqn.race.problems import problem_of
from kfqn.race.report.figure import draw
from kfqn.race.report.listing import csv_of
from kfqn.race.report.palette import DARK, GREY
from kfqn.race.report.panels import LINE, SIDE, data_of, entries_of, panels_of
from kfqn.race.report.results import Measure, Result, race_measure, results_of
from kfqn.race.report.sentences import merged_conditions, title_of, unfinished, verdict
from kfqn.race.report.table import columns_of, headings, print_table, rows
from kfqn.race.runs import Run
from kfqn.race.runs.files import write_atomically

EXPLANATION = (
    "Means over the seeds, ± the standard error; the lowest final {name} on top. Training loss: of the final "
    "weights, over the training data without augmentation. Target: the lowest {name} that every optimizer "
    "that learned has reached at the end of an epoch in the median over its seeds; epochs and seconds to it "
    "are medians too. An optimizer has learned if its lowest {name} is at least half the way from guessing "
    "to the lowest of all. Seconds are training alone: neither evaluation nor the warm start is in them. A "
    "step of L-BFGS is some iterations of its own: it is compared by seconds."
)


def explanation(measure: Measure) -> str:
    """What the table's columns are."""
    return EXPLANATION.format(name=measure.first.name)


def write_report(runs: Sequence[Run], out: Path, console: Console) -> None:
    """Draw ``race.png`` and ``race.html`` in ``out`` from the files of the runs, and print the table."""
    problem = problem_of(runs[0].config.problem)
    measure = race_measure(problem)
    results = results_of(runs, measure)
    table = rows(results)
    title = title_of(runs)
    draw([("", results)], title, out / "race.png")
    write_atomically(out / "race.html", html_of(runs, results))
    print_table(table, title, console, measure)
    console.print(verdict(results), soft_wrap=not console.is_terminal)
    for name, reason, _ in unfinished(runs):
        console.print(f"{name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"figure  {out / 'race.png'}\nreport  {out / 'race.html'}", highlight=False, soft_wrap=True)


def html_of(runs: Sequence[Run], results: Sequence[Result]) -> str:
    """The page: curves, table, what did not finish, conditions, and the data to download, all in one file."""
    measure = results[0].measure
    page = jinja2.Environment(loader=jinja2.PackageLoader("kfqn.race", "report"), autoescape=True)
    return page.get_template("report.html.jinja").render(
        title=title_of(runs),
        verdict=verdict(results),
        entries=entries_of(results),
        panels=panels_of(results),
        data=data_of(results),
        name=runs[0].config.problem.replace(":", "-"),
        csv=base64.b64encode(csv_of(runs).encode()).decode(),
        headings=headings(measure).cells,
        rows=rows(results),
        columns=columns_of(rows(results)),
        explanation=explanation(measure),
        unfinished=unfinished(runs),
        factors=factors_of(results),
        conditions=merged_conditions(runs),
        look={"dark": DARK, "grey": GREY, "line": LINE, "side": SIDE},
    )


@dataclass(frozen=True)
class Factors:
    """`diagnostics` of an optimizer at the end of a run, as a table of its layers."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def factors_of(results: Sequence[Result]) -> list[Factors]:
    """What the factors did in the first finished run of every optimizer that has diagnostics."""
    found = []
    for result in results:
        last = result.epochs[0][-1].get("diagnostics") if result.epochs else None
        if last:
            layers = {name: values for name, values in last.items() if name}
            headings = [*next(iter(layers.values()))]
            rows = [[name, *(f"{values[key]:.4g}" for key in headings)] for name, values in layers.items()]
            refused = f"{last['']['refused']:g} steps refused"
            found.append(Factors(f"{result.label}: {refused}", ["layer", *headings], rows))
    return found
