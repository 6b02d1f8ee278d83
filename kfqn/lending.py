"""Hooks that choose which weights a pass sees, z or x (`kfqn.iterates`): compilers trace them."""

from typing import Any, final

import torch
from torch import nn

from kfqn.iterates import Averaged, Iterates
from kfqn.parameters.shards import is_fully_sharded
from kfqn.runtime.module_hooks import Hook, handles_of
from kfqn.runtime.private import in_jit_trace, in_transform


def put_hooks(iterates: Iterates) -> None:
    """Have passes choose weights, and saved models hold x, on the model and each module with parameters."""
    model, handles = iterates.groups.model, handles_of(iterates)
    for module in model.modules():
        sharded = is_fully_sharded(module)
        if module is model or sharded or any(True for _ in module.parameters(recurse=False)):
            chooses = _Chooses(iterates, handles)
            chooses.put(handles, module.register_forward_pre_hook, prepend=sharded)  # before it gathers
            _Saved(iterates).put(handles, module.register_state_dict_post_hook)


@final
class _Chooses(Hook):
    """Before the forward of a module: z for a pass that trains, x for one that measures."""

    def __init__(self, iterates: Iterates, handles: list[Any]) -> None:
        super().__init__(iterates)
        self.handles = handles

    def __call__(self, module: nn.Module, args: Any) -> None:
        iterates, compiled = self.owner(), torch.compiler.is_compiling()
        if iterates is None or torch.compiler.is_exporting():
            return
        if not torch.is_grad_enabled():
            if not (compiled or module.training) and iterates.ahead:
                self._lend(iterates, module)
            return
        if not compiled and module.training and iterates.lent:  # of a pass that was interrupted
            iterates.give_back([*iterates.lent])
        if iterates.behind and module.training and (compiled or not (in_transform() or in_jit_trace())):
            iterates.go_ahead()

    def _lend(self, iterates: Iterates, module: nn.Module) -> None:
        """A pass that measures begins: until it ends the model has x."""
        if in_transform() or in_jit_trace() or not iterates.evaluating:
            return
        lent = iterates.lend(module)
        if lent:
            measured = _Measured(iterates, lent, self.handles)
            measured.put(self.handles, module.register_forward_hook, always_call=True)


@final
class _Measured(Hook):
    """After a forward pass, or its failure, for which x was lent; once."""

    def __init__(self, iterates: Iterates, lent: list[Averaged], handles: list[Any]) -> None:
        super().__init__(iterates)
        self.lent, self.handles = lent, handles

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        iterates = self.owner()
        if iterates is None or torch.compiler.is_compiling():
            return
        iterates.give_back(self.lent)
        self.lent = []
        if output is not None:  # after a failure torch goes through the hooks themselves
            self.handles.remove(self.handle)
            self.handle.remove()


@final
class _Saved(Hook):
    """After a module has put its own parameters and buffers in a ``state_dict``."""

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        iterates = self.owner()
        if iterates is not None:
            averages = iterates.averages_of(module)
            state_dict.update({prefix + name: x for name, x in averages.items()})
