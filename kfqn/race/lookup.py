"""What a dotted name stands for: in an installed package, or in a file of the current folder."""

import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from kfqn.race.failure import Failure, did_you_mean

_PEERS = ("pytorch_optimizer", "singd", "einops", "einconv")
_INSTALLED = {"site-packages", "dist-packages"}


def named(module: str, name: str, advice: str) -> Any:
    """What is called ``name`` in a module; Failure, which ends with the advice, if it is not there."""
    try:
        found = importlib.import_module(module) if module else None
    except ImportError as error:
        if (error.name or "").split(".")[0] in _PEERS:
            raise Failure(
                f"{error.name} is missing: install the peers with 'make peers', or pip install --no-deps "
                "-c constraints.txt --group peers."
            ) from error
        near = did_you_mean(module.rpartition(".")[-1], _beside(module)) if error.name == module else ""
        raise Failure(f"{module} cannot be imported ({error}){near or ':'} {advice}.") from error
    except Exception as error:  # whatever its own lines raise
        raise Failure(f"{module} cannot be imported ({first_line(error)}): mend it.") from error
    if not hasattr(found, name):
        known = [word for word in vars(found or object) if not word.startswith("_")]
        near = did_you_mean(name, known)
        raise Failure(f"{module or 'the empty module'} has no {name}{near or ':'} {advice}.")
    return getattr(found, name)


def _beside(module: str) -> list[str]:
    """The modules of its package, or of the current folder."""
    package = sys.modules.get(module.rpartition(".")[0])
    if package is None:
        return [path.stem for path in Path.cwd().glob("*.py")]
    return [name for name, thing in vars(package).items() if inspect.ismodule(thing)]


def first_line(error: Exception) -> str:
    """What was raised, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def digest_of_source(thing: type) -> str:
    """Of the file that a class stands in, if that belongs to the current folder; else empty.

    What is installed has a version instead, and torch and this package are known by theirs.
    """
    if thing.__module__.split(".")[0] in ("torch", "kfqn"):
        return ""
    try:
        file = Path(inspect.getsourcefile(thing) or "").resolve()
        inside = file.is_relative_to(Path.cwd().resolve()) and not _INSTALLED & {*file.parts}
        return digest(file.read_bytes()) if inside else ""
    except (OSError, TypeError):  # typed at a prompt, or written in C
        return ""


def digest(content: bytes) -> str:
    """Eight letters that are others for other contents."""
    return hashlib.sha256(content).hexdigest()[:8]
