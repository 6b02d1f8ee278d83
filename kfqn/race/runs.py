"""A run on disk: one folder with its configuration, its epochs and, while it lasts, a checkpoint.

``config.json`` says what is to be run, ``epochs.jsonl`` holds one line an epoch and a last
line that says how the run ended. Every file is replaced whole, so it can be read at any
time and a killed run leaves nothing half-written. Figures and tables need these files alone.

What a full disk, an interrupted copy or a power cut does to a file is found when it is read: of
``epochs.jsonl`` the sound lines at its start count, and a run whose end is not among them is not over.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kfqn.race.failure import Failure


@dataclass(frozen=True)
class Config:
    """All that decides the outcome of a run, and the device and threads that decide its seconds.

    A run ends after ``epochs``, or at the end of the epoch in which its CPU seconds of training
    reach ``budget``, whichever is first; None is no limit. Loss and error are read on the
    first ``evaluated`` training and test images. Each of ``processes`` takes its share of every batch.
    """

    problem: str
    entrant: str
    settings: dict[str, float]
    seed: int
    epochs: int | None
    budget: float | None
    evaluated: int
    width: int
    batch_size: int
    weight_decay: float
    train_size: int | None
    device: str
    threads: int
    processes: int = 1

    @property
    def identity(self) -> str:
        """The name of the run's folder: readable, and different for different configurations."""
        values = [f"{key}{value:g}" for key, value in self.settings.items()]
        every = asdict(self)
        if self.processes == 1:  # as it was named before there could be several
            del every["processes"]
        digest = hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()[:8]
        name = "-".join([self.entrant.replace(":", "-"), *values, f"seed{self.seed}"])
        return f"{name}-{digest}"


Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The files of one run in ``folder``."""

    folder: Path

    @classmethod
    def create(cls, parent: Path, config: Config) -> "Run":
        """The run with this configuration, old or new; Failure if it cannot be written."""
        run = cls(parent / config.identity)
        check_writable(run.folder)
        write_atomically(run.folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
        return run

    @property
    def config(self) -> Config:
        """The configuration the run was created with; Failure if the file is damaged: `create` mends it."""
        path = self.folder / "config.json"
        try:
            return Config(**json.loads(path.read_bytes()))
        except (OSError, TypeError, ValueError) as error:
            raise Failure(f"{path} is damaged ({error}): repeat the command that made it.") from error

    @property
    def checkpoint(self) -> Path:
        """Where the trainer keeps what it needs to go on."""
        return self.folder / "checkpoint.pt"

    def records(self) -> list[Record]:
        """All lines so far: one an epoch, then one with ``status``; of a damaged file the sound start."""
        return self._read()[0]

    def damaged(self) -> bool:
        """Whether ``epochs.jsonl`` holds anything else than `records`."""
        return not self._read()[1]

    def _read(self) -> tuple[list[Record], bool]:
        """The sound lines at the start of ``epochs.jsonl``, and whether they are all of it."""
        path, records = self.folder / "epochs.jsonl", list[Record]()
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return [], True
        except OSError as error:
            raise Failure(f"cannot read {path} ({error.strerror}): delete it to repeat its run.") from error
        for line in lines:
            record = _record(line)
            over = bool(records) and "status" in records[-1]
            ends = "status" in record and (record["status"] != "finished" or bool(records))
            if over or not (ends or record.get("epoch") == len(records) + 1):
                return records, False
            records.append(record)
        return records, True

    def epochs(self) -> list[Record]:
        """The lines of finished epochs."""
        return [record for record in self.records() if "epoch" in record]

    def end(self) -> Record | None:
        """How the run ended: ``status`` is finished, diverged or failed; None while it has not."""
        records = self.records()
        return records[-1] if records and "status" in records[-1] else None

    def forget_failure(self) -> None:
        """Let a run that failed be tried again."""
        end = self.end()
        if end is not None and end["status"] == "failed":
            self.write(self.epochs())

    def write(self, records: list[Record]) -> None:
        """Replace all lines."""
        write_atomically(
            self.folder / "epochs.jsonl", "".join(json.dumps(record) + "\n" for record in records)
        )

    def fraction(self) -> float:
        """How much of an unfinished run is done, 0 to 1."""
        with contextlib.suppress(OSError, ValueError):
            told = float((self.folder / "progress").read_text())
            return told if 0 <= told <= 1 else 0.0
        return 0.0

    def show_progress(self, fraction: float) -> None:
        """Tell whoever watches the folder how much is done."""
        write_atomically(self.folder / "progress", f"{fraction:.4f}")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Hold the run so that no other process does it too; False if another one has it.

        The lock is the operating system's: it ends with the process that holds it.
        """
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def held(self) -> bool:
        """Whether some process has claimed the run."""
        with self.claimed() as ours:
            return not ours


def _record(line: bytes) -> Record:
    """A line as it was written; empty if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def check_writable(folder: Path) -> None:
    """Make the folder if need be; Failure if nothing can be written there."""
    probe = folder / f".probe-{os.getpid()}"  # another command may probe the same folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Failure(
            f"cannot write to {folder} ({error.strerror}): choose another folder with --out."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is seen old or new, never in between."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, moved over it at the end, or removed on an error.

    Failure, which names ``path``, where the disk is full or something is in the way; the old file then stays.
    """
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise Failure(
            f"cannot write {path} ({error.strerror or error}): make room, delete what is in the way, or "
            "choose another folder with --out."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
