"""Functions of tensors that a GPU is told once and then repeats by itself: CUDA graphs.

Where layers are many and small, the host needs longer to ask for the work of a step than the GPU to do it.
What is asked for in every step alike, on tensors of one size, is recorded the first times and is one call
from then on. Only what can be repeated may be recorded: a function of tensors that reads no number back to
the host, and depends on no number but those that it is known by.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, final

import torch
from torch import Tensor

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_USES = 3  # in a row, after which a call is recorded
_SHARE = 0.005  # of a GPU's memory that what a function is given may take, since it is copied and kept


@final
class Graph:
    """A function, recorded with tensors like these; its results are in the same place every time."""

    def __init__(self, function: Function, given: Sequence[Tensor]) -> None:
        self._given = [torch.empty_like(x) for x in given]
        self._graph = torch.cuda.CUDAGraph()
        # what other threads do meanwhile, such as copying the next batch, is none of its concern
        with torch.cuda.device(given[0].device):
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._results = function(self._given)

    def __call__(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        torch._foreach_copy_(self._given, [*given])
        self._graph.replay()
        return self._results


@final
class Graphs:
    """Calls of functions, each under a name, recorded once they have been the same some times in a row."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, int, Graph | None]] = {}

    def run(
        self, name: Hashable, function: Function, given: Sequence[Tensor], kept: Sequence[Tensor], known: Any
    ) -> Sequence[Tensor]:
        """``function(given)``, whose results hold until the next call under this name.

        ``kept`` are the tensors that it reads or writes beside them, in their places; ``known`` is all else
        that it depends on. Where one of these changes, it is recorded anew.
        """
        if not _worth(given):
            return function(given)
        key = known, torch.get_float32_matmul_precision(), [*map(_kind, given)], [*map(_place, kept)]
        last, uses, graph = self._known.get(name, (None, 0, None))
        if key != last:
            uses, graph = 0, None
        if graph is None and uses >= _USES:
            graph = Graph(function, given)
        self._known[name] = key, uses + 1, graph
        return graph(given) if graph is not None else function(given)


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
