"""What an unfinished run keeps on disk to go on from, and what may be wrong with it."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from kfqn.race.failure import Failure
from kfqn.race.runs.files import atomic_path


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint, whole."""
    with atomic_path(path) as partial:
        torch.save(state, partial)


def read(path: Path, *, plain: bool) -> dict[str, Any] | None:
    """What the checkpoint holds; None without one, or if it is damaged: the run then starts anew.

    Unless it is ``plain``, tensors and numbers alone, it may hold objects of other packages, as the state of
    some optimizers does, which only they can read; Failure where such a package is not there.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch does not look at the checksums
                return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=plain)
    except (ImportError, AttributeError) as error:
        raise unfit(path, error) from error
    except Exception:  # empty, cut short or overwritten: zipfile, pickle and torch each say so in their way
        return None
    return state


def unfit(path: Path, error: Exception) -> Failure:
    """What to say of a sound checkpoint that this run cannot go on from."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Failure(
        f"cannot go on from {path} ({reason}): another version of the optimizer wrote it, "
        "so delete it to start the run anew, or go on with that version."
    )
