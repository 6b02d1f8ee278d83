"""A command that torchrun started in several processes: they train every run as a group, and rank 0 speaks.

A run's batch is the joint one; each process takes its share of it, so that several processes
do what one would do.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

TIMEOUT = datetime.timedelta(minutes=10)  # of a process that waits for another, which may be reading data


def size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0 on."""
    return int(os.environ.get("RANK", "0"))


def share() -> slice:
    """Which data of a joint batch are this process's: all of them alone."""
    return slice(rank(), None, size())


def local_device(device: str) -> str:
    """The device of this process: each on a machine has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if size() > 1 and device == "cuda" else device


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes are one group of `torch.distributed`; alone, there is nothing to do."""
    if size() == 1 or dist.is_initialized():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(local_device(device))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over the processes of a value that each has."""
    if size() > 1:
        dist.all_reduce(value)
        value /= size()
    return value


def from_rank_0(value: Value) -> Value:
    """What ``value`` is in the process of rank 0, in all of them; each waits for it."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
