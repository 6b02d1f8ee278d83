"""The hooks that `kfqn.passes.recorder` puts on modules: they hold it weakly, and end with it.

`torch.compile` traces them: none breaks a graph, unless a pass is wanted that cannot be traced.
"""

import contextlib
import weakref
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from kfqn.passes.spec import PassSpec
from kfqn.passes.traced import Slot, traced
from kfqn.runtime.private import in_transform


class Iterates(Protocol):
    """Who has other weights for training passes."""

    behind: bool  # whether the model does not hold them

    def go_ahead(self) -> None:
        """Put them in the model."""


class Recording(Protocol):
    """Who is told."""

    spec: PassSpec | None
    ran: bool
    empty: bool
    starts: bool  # whether `start` is wanted
    eager: bool  # whether what is wanted cannot be traced

    def start(self, model: nn.Module) -> None:
        """A pass through the whole model begins."""

    def observe(self, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
        """A module of the layer has turned ``a`` into ``h``; what takes the place of h, if anything does."""


class Hook:
    """A hook on one module, of which copies of the model are free, and pickles hold what does nothing.

    A pickle needs the standard library alone to be read.
    """

    def __init__(self, told: Any) -> None:
        self.told = weakref.ref(told)
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
class Ahead(Hook):
    """Before the forward of a module with parameters: a training pass begins."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        iterates: Iterates | None = self.told()
        if iterates is None or not (iterates.behind and module.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling() or not (in_transform() or torch.jit.is_tracing()):
            iterates.go_ahead()


@final
class Start(Hook):
    """Before a model's forward."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder: Recording | None = self.told()
        if recorder is None or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            recorder.ran = True
        if recorder.starts or not torch.compiler.is_compiling():
            _start(recorder, module)


@final
class Observe(Hook):
    """After the forward of a layer's module."""

    def __init__(self, recorder: Recording, slot: Slot) -> None:
        super().__init__(recorder)
        self.slot = slot

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], h: Tensor) -> Tensor | None:
        recorder: Recording | None = self.told()
        if recorder is None:
            return None
        a = args[0] if args else next(iter(kwargs.values()))
        if not torch.compiler.is_compiling():
            taken: Tensor | None = recorder.observe(self.slot, a, h)
            return taken
        if not h.numel():
            recorder.empty, recorder.ran = recorder.empty or torch.is_grad_enabled(), False
            return None
        if recorder.spec is not None and recorder.eager:
            return _observe(recorder, self.slot, a, h)
        return traced(recorder.spec, self.slot, a, h)


_WHY = "a second pass without a closure starts as the first did: give step a closure"


@torch.compiler.disable(reason=_WHY)  # type: ignore[untyped-decorator]
def _start(recorder: Recording, model: nn.Module) -> None:
    recorder.start(model)


@torch.compiler.disable(reason="KFAC's sampled pass cannot be traced")  # type: ignore[untyped-decorator]
def _observe(recorder: Recording, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
    return recorder.observe(slot, a, h)
