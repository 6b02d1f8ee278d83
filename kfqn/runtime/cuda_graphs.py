"""Functions of tensors that a GPU is told once and then repeats by itself: CUDA graphs.

Where layers are many and small, the host needs longer to ask for the work of a step than the GPU to do it.
What is asked for in every step alike, on tensors of one size, is recorded the first times and is one call
from then on. Only what can be repeated may be recorded: a function of tensors that reads no number back to
the host, and depends on no number but those that it is known by. All directions of a step are one recorded
call, and what all layers learn another; copies of gradients and directions stay, about twice the weights.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_USES = 3  # in a row, after which a call is recorded
_MOST = 10  # recordings under one name: each waits for the GPU
_SHARE = 0.005  # of a GPU's memory that what a function is given may take, since it is copied and kept


@final
class Graph:
    """A function, recorded with tensors like these; its results are in the same place every time."""

    def __init__(self, function: Function, given: Sequence[Tensor]) -> None:
        self._given = [torch.empty_like(x) for x in given]
        self._graph = torch.cuda.CUDAGraph()
        # what other threads do meanwhile, such as copying the next batch, is none of its concern
        recording = torch.cuda.graph(
            self._graph, stream=_stream(given[0].device), capture_error_mode="thread_local"
        )
        with torch.cuda.device(given[0].device), recording:
            self._results = function(self._given)

    def __call__(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        torch._foreach_copy_(self._given, [*given])
        self._graph.replay()
        return self._results


class _Known(NamedTuple):
    """What the last calls under a name were known by, how many in a row there were, how many recordings."""

    key: Any = None
    uses: int = 0
    recordings: int = 0
    graph: Graph | None = None


@final
class Graphs:
    """Calls of functions, each under a name, recorded once they have been the same some times in a row."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Known] = {}

    def run(
        self, name: Hashable, function: Function, given: Sequence[Tensor], kept: Sequence[Tensor], other: Any
    ) -> Sequence[Tensor]:
        """``function(given)``, whose results hold until the next call under this name.

        ``kept`` are the tensors that it reads or writes beside them, in their places; ``other`` is all else
        that it depends on. Where one of these changes, it is recorded anew, some times.
        """
        if not _worth(given):
            return function(given)
        key = other, _precision(), [*map(_kind, given)], [*map(_place, kept)]
        known = self._known.get(name, _Known())
        if key != known.key:
            known = known._replace(key=key, uses=0, graph=None)
        if known.graph is None and known.uses >= _USES and known.recordings < _MOST:
            known = _recorded(known, function, given)
        self._known[name] = known._replace(uses=known.uses + 1)
        return known.graph(given) if known.graph is not None else function(given)


def _recorded(known: _Known, function: Function, given: Sequence[Tensor]) -> _Known:
    """With a graph; without one, for good, where the GPU refuses."""
    try:
        return known._replace(recordings=known.recordings + 1, graph=Graph(function, given))
    except RuntimeError as error:
        message = f"steps go on without CUDA graphs, because one could not be recorded: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return known._replace(recordings=_MOST)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where a GPU records: one of its own, because torch's default is on whatever GPU came first."""
    return torch.cuda.Stream(device)


def _precision() -> tuple[Any, ...]:
    """What products are done in, also by a graph that is recorded now."""
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9, where the other question may be an error
        return torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return (torch.get_float32_matmul_precision(),)


def _worth(given: Sequence[Tensor]) -> bool:
    devices = {x.device for x in given}
    if len(devices) != 1 or (device := devices.pop()).type != "cuda":
        return False
    most = _SHARE * torch.cuda.get_device_properties(device).total_memory
    return sum(x.nbytes for x in given) <= most and not torch.cuda.is_current_stream_capturing()


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride()


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), *_kind(x)
