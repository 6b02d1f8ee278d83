"""A forward-backward pass that leaves no trace in the model, for line 10 of Algorithm 2."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Rewind = Callable[[], None]


def random_state(devices: Iterable[torch.device]) -> Rewind:
    """Remember torch's random state on the CPU and on ``devices``; the result puts it back."""
    cpu = torch.get_rng_state()
    states = {
        device: torch.get_device_module(device).get_rng_state(device)
        for device in devices
        if device.type != "cpu"
    }

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for device, state in states.items():
            torch.get_device_module(device).set_rng_state(state, device)

    return rewind


@contextlib.contextmanager
def second_pass(model: nn.Module, rewind: Rewind) -> Iterator[None]:
    """Run another pass over the same batch as if it had never been run.

    Inside, ``rewind`` has put the random state back to where the first pass started, so
    dropout draws the same mask; no parameter requires a gradient, so none is computed for
    weights; and every ``.grad`` is None. Afterwards ``.grad``, buffers (the running
    statistics of BatchNorm among them) and the random state are what they were before,
    also when the pass fails. Buffers are copied, parameters are not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    advance = random_state({p.device for p in parameters})
    with unmoved_buffers(model):
        try:
            for p in parameters:
                p.requires_grad_(False)
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
    # Version counters do not tell which buffers moved: BatchNorm's kernels do not count.
    before = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    written = [buffer for *_, buffer in before if not _is_expanded(buffer)]
    contents = [torch.empty_like(buffer) for buffer in written]
    _copy(written, contents)
    try:
        yield
    finally:
        _copy(contents, written)
        for module, name, buffer in before:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)


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


def _is_expanded(buffer: Tensor) -> bool:
    """Whether entries share memory, so that nothing can have written to it."""
    return any(step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True))
