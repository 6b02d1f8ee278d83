"""The hooks that `kfqn.passes.recorder` puts on modules: they hold it weakly, and end with it."""

import contextlib
import weakref
from typing import Any, Protocol, final

import torch
import torch._dynamo
from torch import Tensor, nn

from kfqn.parameters.layers import Layer


class Recording(Protocol):
    """Who is told."""

    def ahead(self) -> None:
        """A training pass through a module begins."""

    def start(self, model: nn.Module) -> None:
        """A pass through the whole model begins."""

    def observe(self, layer: Layer, a: Tensor, h: Tensor) -> Tensor | None:
        """A module of the layer has turned ``a`` into ``h``; what takes the place of h, if anything does."""


class Hook:
    """A hook on one module, of which copies of the model are free, and pickles hold what does nothing.

    A pickle needs the standard library alone to be read.
    """

    def __init__(self, recorder: Recording) -> None:
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


def noticed_by_compiled_code() -> None:
    """Have `torch.compile` notice hooks: it runs what it made of a model without any for one with them.

    It would not look whether there are hooks now in a model that it has compiled, or in another of the
    same classes. What it made before it was told to look is dropped, once in a process.
    """
    dynamo: Any = torch._dynamo
    if getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        dynamo.config.skip_nnmodule_hook_guards = False
        getattr(dynamo, "reset_code_caches", dynamo.reset)()


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
class Start(Hook):
    """Before a model's forward."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder = self.recorder()
        if recorder is not None:
            if module.training and torch.is_grad_enabled():
                recorder.ahead()  # of compiled code, in which `Ahead` does nothing
            recorder.start(module)


@final
class Ahead(Hook):
    """Before the forward of a module with parameters; nothing that a compiler would have to trace."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        recorder = self.recorder()
        if recorder is not None:
            recorder.ahead()


@final
class Observe(Hook):
    """After the forward of a layer's module."""

    def __init__(self, recorder: Recording, layer: Layer) -> None:
        super().__init__(recorder)
        self.layer = layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], h: Tensor) -> Tensor | None:
        recorder = self.recorder()
        return (
            recorder.observe(self.layer, args[0] if args else next(iter(kwargs.values())), h)
            if recorder
            else None
        )
