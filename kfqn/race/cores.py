"""How many CPU cores this process may use, and how many threads it is asked to use."""

import os


def available_cores() -> int:
    """The cores that the affinity (`taskset`, a batch system) leaves; all where the system has none."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def requested_threads() -> int | None:
    """OMP_NUM_THREADS, the first number of a list; None without it, or if it is no whole number ≥ 1."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
