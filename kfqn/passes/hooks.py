"""The hooks that `kfqn.passes.recorder` puts on modules: they hold it weakly, and end with it.

`torch.compile` traces them: none breaks a graph, unless a pass is wanted that cannot be traced.
"""

import contextlib
import weakref
from typing import Any, final

import torch
from torch import Tensor, nn

from kfqn.passes.eager import observe
from kfqn.passes.traced import Slot, traced
from kfqn.runtime.private import also_where_checkpointed, in_jit_trace, in_transform

_STARTS = "a second pass without a closure starts as the first did: give step a closure"
_SAMPLED = "what KFAC learns from gradients of single data cannot be traced"


class Hook:
    """A hook on one module, of which copies of the model are free, and pickles hold what does nothing.

    A pickle needs the standard library alone to be read.
    """

    def __init__(self, recorder: Any) -> None:
        self.recorder = weakref.ref(recorder)
        self.handle: Any = None

    def __deepcopy__(self, memo: Any) -> Any:
        taken_out = memo.setdefault(_TakenOut, _TakenOut())
        copied = memo.get(id(self.handle.hooks_dict_ref()))
        if copied is not None:
            taken_out.places.append((copied, self.handle.id))
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # which torch.jit.script asks for
            raise AttributeError(
                "a kfqn optimizer watches this model with hooks, which torch.jit.script cannot compile: give "
                "it copy.deepcopy(model), or delete the optimizer first."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@final
class _TakenOut:
    """Where the copy of a model has something in the place of hooks: it goes as soon as the copy is complete.

    Then `copy.deepcopy` lets go of its memo, and with it of this.
    """

    def __init__(self) -> None:
        self.places: list[tuple[dict[int, Any], int]] = []

    def __del__(self) -> None:
        for hooks, key in self.places:
            hooks.pop(key, None)


@final
class Before(Hook):
    """Before the forward of a module with parameters; ``whole`` if it is the model."""

    def __init__(self, recorder: Any, whole: bool) -> None:
        super().__init__(recorder)
        self.whole = whole

    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder, compiled = self.recorder(), torch.compiler.is_compiling()
        if recorder is None or torch.compiler.is_exporting():
            return
        if recorder.iterates is not None:
            _choose_weights(recorder, module, compiled)
        if self.whole and torch.is_grad_enabled():
            recorder.ran = recorder.ran or compiled
            if recorder.meets or not compiled:
                recorder.meet()
            if recorder.starts.matter:
                _start(recorder, module, compiled)


def _choose_weights(recorder: Any, module: nn.Module, compiled: bool) -> None:
    """z for a pass that trains, x for one that measures."""
    iterates = recorder.iterates
    if not torch.is_grad_enabled():
        if not (compiled or module.training) and iterates.ahead:
            _lend(recorder, module)
        return
    if not compiled and module.training and iterates.lent:  # of a pass that was interrupted
        iterates.give_back([*iterates.lent])
    if iterates.behind and module.training and (compiled or not (in_transform() or in_jit_trace())):
        iterates.go_ahead()


def _lend(recorder: Any, module: nn.Module) -> None:
    """A pass that measures begins: until it ends the model has x."""
    if in_transform() or in_jit_trace() or not recorder.iterates.evaluating:
        return
    lent = recorder.iterates.lend(module)
    if lent:
        hook = Measured(recorder, lent)
        hook.handle = module.register_forward_hook(hook, always_call=True)
        recorder.handles.append(hook.handle)


@final
class Measured(Hook):
    """After a forward pass, or its failure, for which x was lent; once."""

    def __init__(self, recorder: Any, lent: Any) -> None:
        super().__init__(recorder)
        self.lent = lent

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder()
        if recorder is None or torch.compiler.is_compiling():
            return
        recorder.iterates.give_back(self.lent)
        self.lent = ()
        if output is not None:  # after a failure torch goes through the hooks themselves
            recorder.handles.remove(self.handle)
            self.handle.remove()


@final
class Saved(Hook):
    """After a module has put its own parameters and buffers in a ``state_dict``."""

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        recorder = self.recorder()
        if recorder is not None and recorder.iterates is not None:
            averages = recorder.iterates.averages_of(module)
            state_dict.update({prefix + name: x for name, x in averages.items()})


@final
class After(Hook):
    """After the forward of a layer's module."""

    def __init__(self, recorder: Any, slot: Slot) -> None:
        super().__init__(recorder)
        self.slot = slot

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], h: Tensor) -> Any:
        recorder = self.recorder()
        if recorder is None or torch.compiler.is_exporting():
            return None
        a = args[0] if args else next(iter(kwargs.values()))
        if not torch.compiler.is_compiling():
            self.slot.in_graph &= recorder.spec is None or not torch.is_grad_enabled()
            return observe(recorder, self.slot, a, h)
        if not h.numel():
            recorder.empty, recorder.ran = recorder.empty or torch.is_grad_enabled(), False
            return None
        if recorder.spec is None:
            return None
        if not recorder.spec.linear:
            return _observe(recorder, self.slot, a, h)
        return also_where_checkpointed(traced, recorder, self.slot, a, h)


@torch.compiler.disable(reason=_STARTS)  # type: ignore[untyped-decorator]
def _start(recorder: Any, model: nn.Module, compiled: bool) -> None:
    recorder.breaks |= {f"broken before the model: {_STARTS}"} if compiled else set()
    recorder.start(model)


@torch.compiler.disable(reason=_SAMPLED)  # type: ignore[untyped-decorator]
def _observe(recorder: Any, slot: Slot, a: Tensor, h: Tensor) -> Any:
    recorder.breaks |= {f"broken at every layer: {_SAMPLED}"}  # and not said of each
    return observe(recorder, slot, a, h)
