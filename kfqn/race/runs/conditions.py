"""Where and with what a run was done: a result carries its conditions."""

import datetime
import functools
import platform
import subprocess
from pathlib import Path

import torch

import kfqn
from kfqn.race import process_group


def conditions_of(device: torch.device) -> dict[str, str]:
    """Where and with what a run was done."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kfqn": kfqn.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processes a run": str(process_group.size()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


@functools.cache
def _commit() -> str:
    """The commit of the source the package runs from, '+' after it if changed; unknown without a checkout."""
    root = Path(__file__).parents[3]
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip() if (root / ".git").exists() else "unknown"
