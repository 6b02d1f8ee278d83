"""Transformers' Trainer, with second passes for methods that learn from them, and told to watchers.

`KFBFGS(model)` takes one pass a step and needs nothing of this but ``optimizers=(kfqn.KFBFGS(model), None)``.
The Trainer's own scheduler, by default a line from 1 to 0, is then a factor of the share that layers move.
"""

from typing import Any, final

import transformers
from torch import Tensor, nn

from kfqn.integrations.accelerate import SecondPasses
from kfqn.integrations.watch import Watcher, inner


class SecondPassTrainer(transformers.Trainer):
    """`Trainer` for `KFLBFGS`, and for numbers as ``lr``: ``optimizers=(kfqn.KFLBFGS(model), None)``.

    Micro-batches are run again after a step that something is learnt from; what is logged is of first passes.
    `KFAC` is not for it: it draws targets, which `kfqn.closure` alone can do.
    """

    _passes: SecondPasses | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a micro-batch; see `transformers.Trainer`."""
        if self._passes is None:
            run = super().training_step
            self._passes = SecondPasses(self.accelerator, self.optimizer, run, backward=True)
        return self._passes(model, inputs, num_items_in_batch)


@final
class Watch(transformers.TrainerCallback):
    """Tells watchers of what the Trainer logs, every ``logging_steps``: ``callbacks=[Watch(report)]``.

    The loss is the Trainer's mean since it logged last.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            for watcher in self.watchers:
                watcher.update(inner(kwargs["optimizer"]), (logs or {})["loss"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for watcher in self.watchers if state.is_world_process_zero else ():
            watcher.write()
