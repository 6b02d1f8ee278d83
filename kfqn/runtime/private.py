"""Names of torch that are not public, each with what happens without it; compiled models need none of them.

Where torch renames one, what is given here in its place is right for all but what is said beside it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch._dynamo
import torch._dynamo.utils
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_ALLOWS: Any = getattr(torch._dynamo.utils, "_disable_side_effect_safety_checks_for_current_subtracer", None)


def in_transform() -> bool:
    """Whether vmap, grad or another transform of `torch.func` is active.

    Without it: what runs inside is recorded, which fails there instead of being refused in one sentence.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


def in_jit_trace() -> bool:
    """Whether `torch.jit.trace` runs the model: public, but not for type checkers."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def in_backward() -> bool:
    """Whether a backward pass runs: then activation checkpointing computes again what has been seen.

    Without it: checkpointed layers are counted twice.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and bool(task() != -1)


def is_wanted(node: Any) -> bool:
    """Whether the running backward pass is for this node of autograd's graph.

    Of `torch.autograd.grad` with respect to a leaf itself: whether that is to be its ``.grad``, and not to go
    into the loss. Without it: what a loss with a gradient in it differentiates on the way counts for that
    loss's own gradient.
    """
    asked = getattr(torch._C, "_will_engine_execute_node", None)
    try:
        return asked is None or bool(asked(node))
    except RuntimeError:  # torch.autograd.grad with respect to the leaf itself
        return not torch.is_grad_enabled()


def running_data_parallel() -> DistributedDataParallel | None:
    """The `DistributedDataParallel` whose forward runs.

    Without it: give the optimizer the wrapped model, and not the model in it.
    """
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def have_hooks_noticed() -> None:
    """Have `torch.compile` notice hooks: it runs what it made of a model without any for one with them.

    It would not look whether there are hooks now in a model that it has compiled, or in another of the
    same classes. What it made before it was told to look is dropped, once in a process. Without it: build
    the optimizer before any model of the same classes is compiled, or call ``torch.compiler.reset()``.
    """
    dynamo: Any = torch._dynamo
    if getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        dynamo.config.skip_nnmodule_hook_guards = False
        getattr(dynamo, "reset_code_caches", dynamo.reset)()


def also_where_checkpointed(function: Callable[..., T], *given: Any) -> T:
    """The function of what is given, in whose traces Dynamo lets what it assigns leave a checkpointed part.

    It is run once then, and not again in the backward pass. Without it: a break at each checkpointed part.
    """
    return function(*given) if _ALLOWS is None else _ALLOWS(function, *given)


def version(x: Tensor) -> int:
    """How often a tensor was written to.

    Without it: gradients that another optimizer has used count for the next step unless they are cleared.
    """
    return getattr(x, "_version", 0)
