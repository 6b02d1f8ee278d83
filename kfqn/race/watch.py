"""A live view of runs, read from their files: one bar an optimizer."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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
    announced = {run.folder for run in runs if run.end() is not None}

    def update() -> None:
        for name, of in groups.items():
            _update_task(progress, tasks[name], of)
        for run in runs:
            if run.folder not in announced and (end := run.end()) is not None:
                announced.add(run.folder)
                if not console.is_terminal:
                    console.print(
                        f"[{len(announced)}/{len(runs)}] {run.folder.name}: {end['status']}", markup=False
                    )

    if not console.is_terminal:
        yield update
        return
    with progress:
        yield update


def _update_task(progress: Progress, task: TaskID, runs: Sequence[Run]) -> None:
    ends = [run.end() for run in runs]
    done = sum(1.0 if end else run.fraction() for run, end in zip(runs, ends, strict=True))
    losses = [epochs[-1]["train_loss"] for run in runs if (epochs := run.epochs())]
    state = f"{sum(end is not None for end in ends)} of {len(runs)} runs"
    if losses:
        state += f", best loss {min(losses):.3g}"
    bad = sum(end is not None and end["status"] != "finished" for end in ends)
    if bad:
        state += f", {bad} lost"
    progress.update(task, completed=done, state=state)
