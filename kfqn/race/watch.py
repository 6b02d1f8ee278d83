"""A live view of runs, read from their files: one bar an optimizer."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kfqn.race.entrants import ENTRANTS
from kfqn.race.runs import Run


@contextlib.contextmanager
def live_view(runs: Sequence[Run], console: Console) -> Iterator[Callable[[], None]]:
    """Show bars while inside; the result brings them up to date. Off a terminal, one line a finished run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.config.entrant, []).append(run)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[state]}", justify="right"),
        TimeElapsedColumn(),
        console=console,
    )
    tasks = {
        name: progress.add_task(ENTRANTS[name].label, total=len(of), state="") for name, of in groups.items()
    }
    ended: dict[Path, State] = {}
    news = False  # runs that had ended before are none

    def update() -> None:
        for name, of in groups.items():
            states = [ended.get(run.folder) or _state(run) for run in of]
            for run, state in zip(of, states, strict=True):
                if state.status and run.folder not in ended:
                    ended[run.folder] = state
                    if news and not console.is_terminal:
                        console.print(
                            f"[{len(ended)}/{len(runs)}] {run.folder.name}: {state.status}", markup=False
                        )
            progress.update(tasks[name], completed=sum(s.fraction for s in states), state=_summary(states))

    update()
    news = True
    if not console.is_terminal:
        yield update
        return
    with progress:
        yield update


@dataclass(frozen=True)
class State:
    """A run as its files show it; ``status`` is empty while it lasts."""

    status: str
    fraction: float
    loss: float | None


def _state(run: Run) -> State:
    records = run.records()
    status = records[-1].get("status", "") if records else ""
    losses = [record["train_loss"] for record in records if "epoch" in record]
    return State(status, 1.0 if status else run.fraction(), losses[-1] if losses else None)


def _summary(states: Sequence[State]) -> str:
    text = f"{sum(bool(s.status) for s in states)} of {len(states)} runs"
    losses = [s.loss for s in states if s.loss is not None]
    lost = sum(s.status not in ("", "finished") for s in states)
    return text + (f", best loss {min(losses):.3g}" if losses else "") + (f", {lost} lost" if lost else "")
