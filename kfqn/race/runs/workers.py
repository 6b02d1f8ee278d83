"""Do many runs in parallel processes, each run once, and watch them.

A worker takes the next run that is neither over nor claimed. Claims are locks in the run
folders, so workers of other commands, or of other machines that share the folder, are
respected too; and whoever watches reads the folders, so it sees them all.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from kfqn.race import process_group
from kfqn.race.failure import Failure
from kfqn.race.runs.run import Run

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0


def work(folders: Sequence[Path], data_dir: Path | None) -> None:
    """One worker: whatever is left to do, in the given order."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from kfqn.race.runs.train import train

    try:
        for folder in folders:
            run = Run(folder)
            with run.claimed() as ours:
                if ours and run.end() is None:
                    train(run, data_dir)
    except Failure as failure:  # not of a run, which would be written down, but of writing
        print(f"kfqn: {failure}", file=sys.stderr)
        sys.exit(1)


def run_all(runs: Sequence[Run], jobs: int, data_dir: Path | None, update: Callable[[], None]) -> None:
    """Do all runs with ``jobs`` processes, calling ``update`` twice a second.

    Waits for runs that another command has in hand, and takes over those it leaves. Ends the
    workers at once on Ctrl-C, on SIGTERM, or on any error in ``update``; the same call goes on
    from there. A run whose worker was killed from outside is left unfinished.
    """
    if process_group.size() > 1:
        _run_as_group(runs, data_dir, update)
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        unfinished = [run for run in runs if run.end() is None]
        while unfinished:
            all_ended = _work_and_update(unfinished, jobs, data_dir, update)
            unfinished = [run for run in unfinished if run.end() is None and (all_ended or run.held())]
            while any(run.end() is None and run.held() for run in unfinished):
                update()
                time.sleep(POLL_SECONDS)
            unfinished = [run for run in unfinished if run.end() is None]
    finally:
        signal.signal(signal.SIGTERM, previous)
    update()


def _run_as_group(runs: Sequence[Run], data_dir: Path | None, update: Callable[[], None]) -> None:
    """Do the runs one after the other, all processes that torchrun started at each of them."""
    from kfqn.race.runs.train import train

    first = process_group.rank() == 0
    for run in runs:
        with run.claimed() if first else contextlib.nullcontext(False) as ours:
            if process_group.from_rank_0(ours and run.end() is None):
                with _updated(update) if first else contextlib.nullcontext():
                    train(run, data_dir)
        process_group.from_rank_0(None)  # its last record is written before another process looks
    update()


@contextlib.contextmanager
def _updated(update: Callable[[], None]) -> Iterator[None]:
    """Call ``update`` twice a second while inside."""
    over = threading.Event()

    def poll() -> None:
        while not over.wait(POLL_SECONDS):
            update()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _work_and_update(
    unfinished: Sequence[Run], jobs: int, data_dir: Path | None, update: Callable[[], None]
) -> bool:
    """Whether every worker came to its end, so that what is left undone was in the hands of others."""
    context = multiprocessing.get_context("spawn")
    folders = [run.folder for run in unfinished]
    workers = [
        context.Process(target=work, args=(folders, data_dir)) for _ in range(min(jobs, len(unfinished)))
    ]
    try:
        _start(workers)
        while any(worker.is_alive() for worker in workers):
            update()
            time.sleep(POLL_SECONDS)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
        for worker in workers:
            if worker.pid is not None:
                worker.join(GRACE_SECONDS)
                worker.kill()
    return all(worker.exitcode == 0 for worker in workers)


def _start(workers: Sequence[BaseProcess]) -> None:
    """Start them deaf to Ctrl-C from their first instruction on; it reaches every process of a terminal."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for worker in workers:
            worker.start()
    finally:
        signal.signal(signal.SIGINT, previous)
