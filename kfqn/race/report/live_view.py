"""A live view of runs, read from their files: one bar an optimizer."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kfqn.race.entrants import entrant_of
from kfqn.race.entrants.settings import format_settings
from kfqn.race.runs import Run

LABEL = 24  # characters of a name, which may be that of anybody's class
ELAPSED = 7  # characters of hours, minutes and seconds


@contextlib.contextmanager
def live_view(runs: Sequence[Run], console: Console, by: str) -> Iterator[Callable[[], None]]:
    """Show bars while inside; the result brings them up to date. Off a terminal, one line a finished run.

    ``by`` is the key of the records of which the lowest value is shown, and whose it is.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.config.entrant, []).append(run)
    most = min(LABEL, console.width // 4)
    labels = {name: _cut(entrant_of(name).label, most) for name in groups}
    bar = min(30, max(8, console.width - 84))
    room = console.width - max(map(len, labels.values())) - bar - ELAPSED - 3  # a space between columns
    progress = _bars(console, bar)
    tasks = {name: progress.add_task(labels[name], total=len(of), state="") for name, of in groups.items()}
    ended: dict[Path, State] = {}
    news = False  # runs that had ended before are none

    def update() -> None:
        for name, of in groups.items():
            states = [ended.get(run.folder) or _state(run, by) for run in of]
            for run, state in zip(of, states, strict=True):
                if state.status and run.folder not in ended:
                    ended[run.folder] = state
                    if news and not console.is_terminal:
                        console.print(
                            f"[{len(ended)}/{len(runs)}] {run.folder.name}: {state.status}", markup=False
                        )
            done = sum(state.fraction for state in states)
            progress.update(tasks[name], completed=done, state=_summary(states, by, room))

    update()
    news = True
    if not console.is_terminal:
        yield update
        return
    with progress:
        yield update


def _bars(console: Console, width: int) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=width),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        console=console,
    )


@dataclass(frozen=True)
class State:
    """A run as its files show it; ``status`` is empty while it lasts, ``lowest`` ∞ without an epoch."""

    status: str
    fraction: float
    lowest: float
    settings: str


def _state(run: Run, by: str) -> State:
    records = run.records()
    status = records[-1].get("status", "") if records else ""
    kept = records if status in ("", "finished") else []
    lowest = min((record[by] for record in kept if "epoch" in record), default=math.inf)
    settings = format_settings(run.config.settings)
    return State(status, 1.0 if status else run.fraction(), lowest, settings)


def _summary(states: Sequence[State], by: str, room: int) -> str:
    """Done, running, lost, and the best so far: "12 of 63, 2 running, best train loss 0.12 at lr 30".

    With less than that many characters of ``room``, as much of the best as there is room for.
    """
    running = sum(not s.status and s.fraction > 0 for s in states)
    lost = sum(s.status not in ("", "finished") for s in states)
    best = min(states, key=lambda s: s.lowest)
    parts = [f"{sum(bool(s.status) for s in states)} of {len(states)}"]
    parts += [f"{running} running"] if running else []
    parts += [f"{lost} lost"] if lost else []
    counts = ", ".join(parts)
    if not math.isfinite(best.lowest):
        return _cut(counts, room)
    whole = f"{counts}, best {by.replace('_', ' ')} {best.lowest:.3g}"
    shorter = [whole, f"{counts}, best {best.lowest:.3g}", f"{parts[0]}, best {best.lowest:.3g}"]
    if best.settings:  # an automatic optimizer has none
        shorter.insert(0, f"{whole} at {best.settings}")
    return next((text for text in shorter if len(text) <= room), _cut(counts, room))


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(0, room - 1)] + "…"
