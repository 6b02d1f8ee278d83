"""A run on disk: one folder with its configuration, its epochs and, while it lasts, a checkpoint.

``config.json`` says what is to be run, ``epochs.jsonl`` holds one line an epoch and a last
line that says how the run ended. Every file is replaced whole, so it can be read at any
time and a killed run leaves nothing half-written. Figures and tables need these files alone.

What a full disk, an interrupted copy or a power cut does to a file is found when it is read: of
``epochs.jsonl`` the sound lines at its start count, and a run whose end is not among them is not over.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kfqn.race.failure import Failure
from kfqn.race.runs.config import Config
from kfqn.race.runs.files import check_writable, write_atomically

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
            fraction = float((self.folder / "progress").read_text())
            return fraction if 0 <= fraction <= 1 else 0.0
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
