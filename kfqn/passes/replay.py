"""A forward-backward pass that leaves no trace in the model, for line 10 of Algorithm 2.

Buffers and random numbers start where the first pass did: queues, code books and spectral norms hold what
they held, or the loss after a step would differ from that before it without any step.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Rewind = Callable[[], None]


def random_state(devices: Iterable[torch.device]) -> Rewind:
    """Remember where random numbers are: torch's on the CPU and on ``devices``, Python's and NumPy's.

    The result puts them back. Of NumPy the global state is meant, if anybody has imported it; generators of
    somebody's own are not known here.
    """
    rewinds = [partial(torch.set_rng_state, torch.get_rng_state())]
    rewinds.append(partial(random.setstate, random.getstate()))
    for device in (device for device in devices if device.type != "cpu"):
        of_kind = torch.get_device_module(device)
        rewinds.append(partial(of_kind.set_rng_state, of_kind.get_rng_state(device), device))
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        rewinds.append(partial(numpy.set_state, numpy.get_state(legacy=False)))
    return partial(_one_by_one, rewinds)


def start_of(model: nn.Module, devices: Iterable[torch.device]) -> Rewind:
    """Remember what a pass starts from beside the weights: the random state and the model's buffers.

    Queues, code books and running statistics are such buffers, which a pass moves. The result puts both back.
    """
    return partial(_one_by_one, [random_state(devices), buffers_of(model)])


def _one_by_one(rewinds: Sequence[Rewind]) -> None:
    for rewind in rewinds:
        rewind()


@contextlib.contextmanager
def second_pass(model: nn.Module, rewind: Rewind, *, frozen: bool = True) -> Iterator[None]:
    """Run another pass over the same batch as if it had never been run.

    Inside, ``rewind`` has put random state and buffers back to where the first pass started, so
    dropout draws the same mask and a queue holds what it held; every ``.grad`` is None; and if ``frozen`` no
    parameter requires a gradient, so none is computed for weights. Afterwards ``.grad``, buffers (the running
    statistics of BatchNorm among them) and the random state are what they were before,
    also when the pass fails. Buffers are copied, parameters are not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    advance = random_state({p.device for p in parameters})
    with unmoved_buffers(model):
        try:
            for p in parameters:
                p.requires_grad_(not frozen)
                p.grad = None
            rewind()
            yield
        finally:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.requires_grad_(True)
                p.grad = gradient
            advance()


@contextlib.contextmanager
def unmoved_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer of the model back afterwards: the same tensor with the same content."""
    restore = buffers_of(model)
    try:
        yield
    finally:
        restore()


def buffers_of(model: nn.Module) -> Rewind:
    """Remember every buffer of the model, the tensor and its content; the result puts both back.

    The content of one that shares the memory of a parameter is the parameter's, and left alone.
    """
    # Version counters do not tell which buffers moved: BatchNorm's kernels do not count.
    before = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    of_parameters = {_memory(p) for p in model.parameters()} if before else set()
    written = [b for *_, b in before if not _is_expanded(b) and _memory(b) not in of_parameters]
    contents = [torch.empty_like(buffer) for buffer in written]
    _copy(written, contents)

    def restore() -> None:
        _copy(contents, written)
        for module, name, buffer in before:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)

    return restore


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy each source into its target; those of one kind together."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        of_kind = kinds.setdefault((target.device, target.dtype), ([], []))
        of_kind[0].append(source)
        of_kind[1].append(target)
    for of_one_kind in kinds.values():
        torch._foreach_copy_(of_one_kind[1], of_one_kind[0])


def _memory(x: Tensor) -> Any:
    """What tells whether tensors share memory; of one whose entries are nowhere, itself."""
    try:
        return x.untyped_storage().data_ptr() or id(x)
    except (NotImplementedError, RuntimeError):  # sparse, lazy, or of a subclass that hides it
        return id(x)


def _is_expanded(buffer: Tensor) -> bool:
    """Whether entries share memory, so that nothing can have written to it."""
    return any(step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True))
