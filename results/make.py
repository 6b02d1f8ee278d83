"""Races as compact files, and the tables that are made of them.

    kfqn race --problem digits                           # trains, in runs/digits
    python results/make.py collect runs/digits           # runs/digits → results/digits.json
    python results/make.py write                         # results/*.json → docs/results.md, README's table
    python results/make.py pictures                      # → docs/race-*.svg, which README and the site show
    python results/make.py draw digits docs/digits.png   # a race's four panels
    python results/make.py unpack digits FOLDER          # its run folders again, as `kfqn race` reads them

A file holds the command, the settings, the conditions, and of every run, lost ones included, what each epoch
ended with. What differs between runs stands with the run, all else once. ``tests/test_documents.py`` makes
the tables anew and compares.
"""

import argparse
import hashlib
import json
import math
import re
import shlex
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from kfqn.race.entrants import ENTRANTS, entrant_of
from kfqn.race.entrants.settings import format_value
from kfqn.race.problems import DEVELOPMENT, PROBLEMS
from kfqn.race.problems.measures import TRAIN_LOSS, Quantity
from kfqn.race.report.figure import draw
from kfqn.race.report.palette import COLORS
from kfqn.race.report.results import RACE, Result, common_target
from kfqn.race.runs import Config, Run

ROOT = Path(__file__).parents[1]
FOLDER, PAGE, README = ROOT / "results", ROOT / "docs" / "results.md", ROOT / "README.md"
ON_CPU = replace(RACE, time="cpu_seconds", time_label="CPU time, s", second="CPU s")
KEPT = ("train_loss", "average_loss", "test_error", "cpu_seconds", "seconds")  # of an epoch
ENDS = ("warm_start_seconds", "reason")
EVALUATED = 10_000  # images, unless --eval-size says otherwise
WIDTH = 118
SIZE = (2.5, 2.6)  # inches: three stand side by side in a page, and one is as wide as a phone
MARKS = "<!-- made by results/make.py: -->", "<!-- until here -->"
FIRST_ORDER = ("sgd", "adam", "adamw")
SHOWN = (("SGD-m, Adam, AdamW: the best", FIRST_ORDER), ("Muon", ("muon",)), ("SOAP", ("soap",)))

INTRODUCTION = """
Made by `python results/make.py write` from the files in [results](../results), each of one race with its
command, conditions and epochs; edit nothing here. What was tried on the way, and the paper's own figures,
is in the [notebook](notebook/README.md). **KF-BFGS, auto** is `kfqn.KFBFGS(model)` without a setting, its
weight decay its own and not the one that is named; the others have the best values of a grid
([tuned.json](../kfqn/race/entrants/tuned.json), [sweeps](sweeps)), on the development set their usual ones
and others, under warm-up and cosine. Training loss: of the last weights, over the training images without
augmentation. Losses and errors: means over seeds ± standard error. Seconds: of training alone, on a CPU
those of the process; medians to a loss. *To X*: to the lowest loss that all who learned have reached. *To
its lowest : ours*: to the lowest loss that an optimizer had, its own seconds and ours to that same loss.
*Level*: closer than twice the standard error of the difference.
Conditions, where nothing else is said:"""


@dataclass(frozen=True)
class Race:
    """One file: its name, what it says of all runs, and the runs by optimizer and settings."""

    name: str
    config: Config
    conditions: dict[str, str]
    field: list[Result]

    @property
    def title(self) -> str:
        """The problem and how much of it."""
        problem, config = PROBLEMS[self.config.problem], self.config
        width = f", width {config.width}" if config.width != problem.width else ""
        images = f", {config.train_size:,} images" if config.train_size else ""
        return f"{problem.title}{width}{images}"

    @property
    def seeds(self) -> int:
        """Of the optimizer with the most."""
        return max(len(standing.ends) for standing in self.field)

    @property
    def ours(self) -> Result | None:
        """The optimizer without settings."""
        automatic = [s for s in self.field if entrant_of(s.config.entrant).automatic]
        return next((s for s in automatic if not s.config.settings), None)


def factored(every: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is the same in all, and what each has beside it."""
    same = {key: value for key, value in every[0].items() if all(one.get(key) == value for one in every)}
    return same, [{key: value for key, value in one.items() if key not in same} for one in every]


def command_of(configs: Sequence[Config]) -> str:
    """The command that trains these runs again."""
    first, problem = configs[0], PROBLEMS[configs[0].problem]
    parts = ["kfqn", "race", "--problem", first.problem]
    told = {
        "width": first.width if first.width != problem.width else None,
        "train-size": first.train_size,
        "eval-size": first.evaluated if first.evaluated != EVALUATED else None,
        "epochs": first.epochs,
        "budget": first.budget,
        "device": first.device if first.device != "cpu" else None,
        "seeds": len({config.seed for config in configs}),
    }
    parts += [f"--{key} {value}" for key, value in told.items() if value is not None]
    entrants = []
    for config in configs:
        values = ",".join(f"{key}={format_value(value)}" for key, value in config.settings.items())
        entrants.append(f"{config.entrant}:{values}" if values else config.entrant)
    return " ".join([*parts, "--optimizers", *map(shlex.quote, dict.fromkeys(entrants))])


def collect(folder: Path, name: str, note: str) -> Path:
    """Write the file of a race from its folder; unfinished runs have to be finished first."""
    runs = [Run(place) for place in sorted((folder / "runs").iterdir())]
    unfinished = [run.folder.name for run in runs if run.end() is None]
    if unfinished or not runs:
        raise SystemExit(f"{folder} is not over ({', '.join(unfinished) or 'no runs'}): race on.")
    runs.sort(key=lambda run: (run.config.entrant, str(run.config.settings), run.config.seed))
    ends = [run.end() or {} for run in runs]
    config, own_configs = factored([_told(run.config) for run in runs])
    known: dict[str, Any] = next((end["conditions"] for end in ends if end.get("conditions")), {})
    told = {"note": note} if note else {}
    conditions, own_conditions = factored([(end.get("conditions") or known) | told for end in ends])
    lines = []
    for run, end, settings, others in zip(runs, ends, own_configs, own_conditions, strict=True):
        kept: dict[str, Any] = settings | {"status": end["status"]}
        kept |= {key: end[key] for key in ENDS if end.get(key)}
        kept |= {"conditions": others} if others else {}
        keys = kept_of(run.config.problem)
        kept |= {key: [float(f"{record[key]:.6g}") for record in run.epochs()] for key in keys}
        lines.append(json.dumps(kept))
    head = {"command": command_of([run.config for run in runs]), "config": config, "conditions": conditions}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    target = FOLDER / f"{name}.json"
    target.write_text(text + ',\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n", encoding="utf-8")
    return target


def _told(config: Config) -> dict[str, Any]:
    """All of it; the ``code`` only of a problem or an optimizer that is somebody's own."""
    return {key: value for key, value in asdict(config).items() if key != "code" or value}


def kept_of(problem: str) -> tuple[str, ...]:
    """What a file holds of an epoch on a problem: `KEPT`, and what else its tables show."""
    shown = (quantity.key for quantity in PROBLEMS[problem].quantities)
    return tuple(dict.fromkeys((*KEPT, *shown)))


def unpack(file: Path, folder: Path) -> list[Run]:
    """The run folders that a file was collected from, without diagnostics."""
    race, runs = json.loads(file.read_text(encoding="utf-8")), []
    for kept in race["runs"]:
        keys = kept_of({**race["config"], **kept}["problem"])
        rest = ("status", "conditions", *ENDS, *keys)
        settings = {key: value for key, value in kept.items() if key not in rest}
        run = Run.create(folder, Config(**race["config"] | settings))
        columns = zip(*(kept[key] for key in keys), strict=True)
        records: list[dict[str, Any]] = [
            {"epoch": n} | dict(zip(keys, values, strict=True)) for n, values in enumerate(columns, start=1)
        ]
        end = {key: kept[key] for key in ("status", *ENDS) if key in kept}
        run.write([*records, end | {"conditions": race["conditions"] | kept.get("conditions", {})}])
        runs.append(run)
    return runs


def read(file: Path) -> Race:
    """A file as the functions of `kfqn.race.summary` see it."""
    with tempfile.TemporaryDirectory() as folder:
        groups: dict[str, list[Run]] = {}
        for run in unpack(file, Path(folder)):
            groups.setdefault(f"{run.config.entrant} {run.config.settings}", []).append(run)
        config = next(iter(groups.values()))[0].config
        measure = replace(
            ON_CPU if config.device == "cpu" else RACE, quantities=PROBLEMS[config.problem].quantities
        )
        field = [Result(runs, measure) for runs in groups.values()]
    race = json.loads(file.read_text(encoding="utf-8"))
    conditions = race["conditions"]
    for key in ("commit", "date"):  # of runs that were done again they are others
        own = [run.get("conditions", {}).get(key) for run in race["runs"]]
        conditions.setdefault(key, " and ".join(sorted({value for value in own if value})))
    return Race(file.stem, config, conditions, sorted(field, key=lambda s: s.final))


def finite(value: float, form: str) -> str:
    """A number, or a dash."""
    return f"{value:{form}}" if math.isfinite(value) else "–"


def last(standing: Result, key: str) -> tuple[float, float]:
    """What the last epoch ended with: mean and standard error; ∞ where most runs were lost."""
    if not math.isfinite(standing.lowest):
        return math.inf, 0.0
    curve = standing.curve(key)
    return float(curve.mean[-1]), float(curve.error[-1])


def number(mean: float, error: float, form: str, form_of_error: str) -> str:
    """Mean ± standard error, if there is one."""
    return finite(mean, form) + (f" ± {error:{form_of_error}}" if error else "")


def final(standing: Result, quantity: Quantity) -> str:
    """What the last epoch ended with, as a table shows it."""
    mean, error = (quantity.scale * value for value in last(standing, quantity.key))
    return number(mean, error, *((".1f", ".1f") if quantity.percent else (".3g", ".1g")))


def row(*cells: str) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def table(race: Race) -> list[str]:
    """One line an optimizer, the lowest loss first."""
    measure, ours, target = race.field[0].measure, race.ours, common_target(race.field)
    unit = measure.second
    lines = [
        row(
            "optimizer",
            *(quantity.label for quantity in measure.quantities),
            unit,
            f"to {finite(target, '.3g')}",
            "to its lowest : ours",
        ),
        row(*["---"] * (4 + len(measure.quantities))),
    ]
    for s in race.field:
        own, same = (finite(time, ".3g") for time in to_lowest(s, ours or s))
        label = f"**{s.label}**" if s is ours else shortened(s.label)
        lines.append(
            row(
                label + (f", {s.lost}" if s.lost else ""),
                *(final(s, quantity) for quantity in measure.quantities),
                finite(last(s, measure.time)[0], ".3g"),
                finite(s.reached(target, measure.time), ".3g"),
                own if s is (ours or s) else f"{own} : {same}",
            )
        )
    return lines


def shortened(label: str) -> str:
    """A label without the schedule that all rivals of the development set have."""
    return re.sub(r", cosine, warmup [\d.]+(, floor [\d.]+)?", "", label)


def to_lowest(s: Result, ours: Result) -> tuple[float, float]:
    """Seconds to the lowest loss of an optimizer, its own and ours; ∞ where most of its runs were lost."""
    if not math.isfinite(s.lowest):
        return math.inf, math.inf
    return s.reached(s.lowest, s.measure.time), ours.reached(s.lowest, s.measure.time)


def compared(race: Race, key: str) -> dict[str, list[str]]:
    """Who ends above, level with and below ours in this key of the records."""
    assert race.ours is not None
    (mean, error), found = last(race.ours, key), dict[str, list[str]]()
    for s in race.field:
        if s is race.ours:
            continue
        its, its_error = last(s, key)
        near = abs(its - mean) <= 2 * math.hypot(error, its_error) if math.isfinite(its) else False
        found.setdefault("level with" if near else "lower than" if its > mean else "higher than", []).append(
            name_of(s)
        )
    return found


def name_of(standing: Result) -> str:
    """Without settings, but for those of ours, which are what tells it from ours without."""
    entrant = entrant_of(standing.config.entrant)
    return shortened(standing.label) if entrant.automatic else entrant.label


def verdict(race: Race) -> str:
    """What holds of ours, and what does not, from the numbers of the table."""
    measure, target = race.field[0].measure, common_target(race.field)
    if race.ours is None:
        return ""
    leader = min(race.field, key=lambda s: s.reached(target, measure.time))
    first = f"First at {target:.3g}: {name_of(leader)}" if math.isfinite(target) else "Nobody learned"
    told = [
        ("loss" if quantity == TRAIN_LOSS else quantity.name, compared(race, quantity.key))
        for quantity in measure.quantities[:2]
    ]
    parts = [f"*{what}* {classes(found)}" for what, found in told if found]
    hint = " One seed is a hint, not more." if race.seeds == 1 else ""
    return f"Ours: {'; '.join(parts)}. {first}.{hint}"


def classes(found: dict[str, list[str]]) -> str:
    """Who is in which class; those of the largest, if there are some, as "all others"."""
    there = sorted(((what, names) for what, names in found.items() if names), key=lambda one: len(one[1]))
    parts = [f"{what} {', '.join(dict.fromkeys(names))}" for what, names in there]
    if len(there[-1][1]) > 3:
        parts[-1] = f"{there[-1][0]} {'all others' if len(there) > 1 else 'all'}"
    return ", ".join(parts)


def machine(race: Race) -> str:
    """Where a race was run, and by what."""
    said, threads = race.conditions, race.config.threads
    parts = [said.get("device", ""), f"{threads} thread{'s' * (threads > 1)}", f"torch {said.get('torch')}"]
    return ", ".join(filter(None, [*parts, said.get("note", "")]))


def wrapped(text: str) -> list[str]:
    """Lines that are no longer than `WIDTH`."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def section(race: Race, usual: str) -> list[str]:
    """One problem: a table, its conditions, and what it says."""
    config = race.config
    parts = [f"{config.epochs} epochs" if config.epochs else f"{config.budget:g} CPU seconds"]
    parts += [f"batches of {config.batch_size}", f"weight decay {config.weight_decay:g}"]
    parts += [f"{race.seeds} seed{'s' * (race.seeds > 1)}", race.conditions.get("evaluated images", "")]
    parts += [f"commit {race.conditions.get('commit')}", race.conditions.get("date", "")]
    parts += [machine(race)] if machine(race) != usual else []
    told = f"[{race.name}](../results/{race.name}.json): {', '.join(filter(None, parts))}."
    return [f"## {race.title}", "", *table(race), "", *wrapped(f"{told} {verdict(race)}"), ""]


def page(races: Sequence[Race]) -> str:
    """docs/results.md."""
    ((usual, _),) = Counter(map(machine, races)).most_common(1)
    lines = ["# Results", "", *wrapped(f"{INTRODUCTION.strip()} {usual}.")]
    for race in races:
        lines += ["", *section(race, usual)[:-1]]
    return "\n".join(lines) + "\n"


def cell(s: Result | None, ours: Result) -> str:
    """What counts, at the end, and our seconds to the best that it had over its own."""
    if s is None or not math.isfinite(s.lowest):
        return "–" if s is None else "lost"
    told = final(s, s.measure.first)
    if s is ours:
        return told
    own, same = to_lowest(s, ours)
    return f"{told}; {finite(same / own, '.2g')}"


def claims(races: Sequence[Race]) -> str:
    """README's table: one line a problem of the development set."""
    lines = [row("problem", "KF-BFGS, untuned", *(name for name, _ in SHOWN)), row(*["---"] * 5)]
    races = [race for race in races if race.config.problem in DEVELOPMENT]
    for race in races:
        ours = race.ours
        if ours is not None:
            best = [next((s for s in race.field if s.config.entrant in names), None) for _, names in SHOWN]
            title = race.title + r"\*" * (race.seeds == 1)
            lines.append(row(title, cell(ours, ours), *(cell(s, ours) for s in best)))
    hint = ["", r"\* One seed: a hint, not more."] if any(race.seeds == 1 for race in races) else []
    return "\n".join([*lines, *hint])


def development() -> dict[Path, Path]:
    """The races of the development set, and the picture of each."""
    problems = {file: json.loads(file.read_text(encoding="utf-8"))["config"]["problem"] for file in files()}
    return {
        file: PAGE.parent / f"race-{file.stem}.svg"
        for file, problem in problems.items()
        if problem in DEVELOPMENT
    }


def pictures() -> str:
    """README's lines of pictures, three side by side."""
    told = []
    for file, path in development().items():
        race = read(file)
        what = race.field[0].measure.first.name
        told.append(f"![{race.title}: {what} by {race.field[0].measure.time_label}](docs/{path.name})")
    lines = ["\n".join(told[n : n + 3]) for n in range(0, len(told), 3)]
    return "\n\n".join(lines)


def fingerprint(file: Path) -> str:
    """What a picture keeps of the file that it was drawn from."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def draw_race(file: Path, path: Path) -> None:
    """One panel: what counts by time, each optimizer's best line in front, those of its other settings thin.

    Of ours it is the one without settings.
    """
    race = read(file)
    measure, shown = race.field[0].measure, dict[str, list[Result]]()
    for s in race.field:
        if s.epochs and (s is race.ours or not entrant_of(s.config.entrant).automatic):
            shown.setdefault(s.config.entrant, []).append(s)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kfqn", "font.size": 7.5}):
        figure = Figure(figsize=SIZE, layout="constrained")
        panel = figure.subplots()
        for entrant, results in sorted(shown.items(), key=lambda one: [*ENTRANTS].index(one[0])):
            ours, color = results[0] is race.ours, COLORS[entrant]
            label = entrant_of(entrant).label.removesuffix(", auto")
            for n, s in enumerate(results):
                x, y = s.curve(measure.time).mean, measure.first.scale * s.curve(measure.loss).mean
                width, opacity = (2.2 if ours else 1.3, 1.0) if n == 0 else (0.8, 0.45)
                over = 3 if ours else 2
                panel.plot(
                    x, y, color=color, linewidth=width, alpha=opacity, label="" if n else label, zorder=over
                )
        panel.set_title(race.title, fontsize=8)
        panel.set_xlabel(measure.time_label)
        panel.set_ylabel(measure.first.label)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=1.2, columnspacing=1)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": fingerprint(file)})


def files() -> list[Path]:
    """All races, those of the development set first, in the order of the problems, small ones first."""
    return sorted(FOLDER.glob("*.json"), key=_place)


def _place(file: Path) -> tuple[bool, int, int, str]:
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    problem = config["problem"]
    return problem not in DEVELOPMENT, [*PROBLEMS].index(problem), config["train_size"] or 10**9, file.stem


def documents() -> dict[Path, str]:
    """The documents as the files in ``results`` have them."""
    races = [read(file) for file in files()]
    start, end = map(re.escape, MARKS)
    table = f"{MARKS[0]}\n\n{claims(races)}\n\n{pictures()}\n\n{MARKS[1]}"
    readme = README.read_text(encoding="utf-8")
    return {PAGE: page(races), README: re.sub(f"{start}.*?{end}", lambda _: table, readme, flags=re.DOTALL)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect")
    one.add_argument("folder", type=Path)
    one.add_argument("--name", help="of the file (default: that of the folder)")
    one.add_argument("--note", default="", help="a condition that the runs do not know")
    commands.add_parser("write")
    commands.add_parser("pictures")
    for name in ("draw", "unpack"):
        one = commands.add_parser(name)
        one.add_argument("name")
        one.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.command == "collect":
        print(collect(options.folder, options.name or options.folder.resolve().name, options.note))
    elif options.command == "write":
        for path, text in documents().items():
            path.write_text(text, encoding="utf-8")
            print(path)
    elif options.command == "pictures":
        for file, path in development().items():
            draw_race(file, path)
            print(path)
    elif options.command == "unpack":
        unpack(FOLDER / f"{options.name}.json", options.target / "runs")
    else:
        race = read(FOLDER / f"{options.name}.json")
        draw([("", race.field)], race.title, options.target)


if __name__ == "__main__":
    main()
