"""Hooks on the modules of a model: they hold who they serve weakly, end with it, and are not copied."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, final


class Hook:
    """A hook on one module, of which copies of the model are free, and pickles hold what does nothing.

    ``owner()`` is who it serves, None if that is gone. Pickles need the standard library alone to be read.
    """

    def __init__(self, owner: object) -> None:
        self.owner: Callable[[], Any] = weakref.ref(owner)
        self.handle: Any = None

    def put(self, handles: list[Any], register: Callable[..., Any], **options: Any) -> None:
        """Register it by a method of its module; its handle is one of ``handles`` from `handles_of`."""
        self.handle = register(self, **options)
        handles.append(self.handle)

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


def handles_of(owner: object) -> list[Any]:
    """A list for the handles of hooks that end with their owner."""
    handles: list[Any] = []
    weakref.finalize(owner, _remove, handles).atexit = False
    return handles


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
