"""The one way in which this package times calls."""

import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    calls: Mapping[str, Callable[[], object]], repeats: int, wait: Callable[[], None]
) -> dict[str, float]:
    """The median seconds of each call, all of them in turn so that what disturbs one disturbs all.

    ``wait`` returns when the device has done all it was given; see `waiter`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of) for name, of in times.items()}


def waiter(device: str) -> Callable[[], None]:
    """What waits until a device has done all it was given."""
    import torch

    if torch.device(device).type == "cpu":
        return lambda: None
    return lambda: torch.get_device_module(device).synchronize(device)
