"""Files that are seen whole or not at all, whatever happens while they are written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kfqn.race.failure import Failure


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
