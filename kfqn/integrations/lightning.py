"""Lightning: second passes of automatic optimization, and watchers.

`KFBFGS(model)` takes one pass a step: return it in ``configure_optimizers``, and that is all. In manual
optimization others run second passes as in any loop: by a closure, or in ``with optimizer.second_pass()``.
"""

from collections.abc import Callable, Mapping
from typing import Any, final

import lightning
import torch
from torch import Tensor

from kfqn import Kronecker
from kfqn.integrations.watch import Watcher, inner


class SecondPasses(lightning.LightningModule):
    """Before `LightningModule` among the bases, for methods that learn from second passes.

    `KFLBFGS`, and a number for ``lr``, run ``training_step`` again after some steps. With this `log` does
    nothing then, and the batch's loss is that of the first pass. Under a `GradScaler`, which gives optimizers
    no closure, there is a second pass all the same. What else ``training_step`` counts, the state of a metric
    for one, it should count only where ``not self.is_second_pass``. ``on_before_optimizer_step`` is called in
    second passes too, where ``.grad`` is None.

    With ``accumulate_grad_batches`` the second pass is over the last micro-batch alone; together with a
    `GradScaler` there is none, so H_G does not learn, which a warning says.
    """

    is_second_pass = False

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """The step of a batch; see `LightningModule.optimizer_step`."""
        both = _BothPasses(self, optimizer_closure)
        handle = inner(optimizer).register_step_post_hook(both.after_step)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, both)
        finally:
            handle.remove()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As in `LightningModule`, in first passes."""
        if not self.is_second_pass:
            super().log(*args, **kwargs)


@final
class _BothPasses:
    """Lightning's closure: at its first call as it is, then as a second pass, which leaves no result."""

    def __init__(self, module: SecondPasses, closure: Any) -> None:
        self.module, self.closure, self.is_first = module, closure, True

    def __call__(self) -> Any:
        if self.is_first:
            self.is_first = False
            return self.closure()
        self.module.is_second_pass = True
        try:
            return self.closure.closure().loss
        finally:
            self.module.is_second_pass = False

    def after_step(self, optimizer: Kronecker, args: Any, kwargs: Any) -> None:
        """The second pass of an optimizer that has not been given the closure, before the scale changes."""
        trainer = self.module.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and optimizer.second_pass_due and trainer.accumulate_grad_batches == 1:
            with optimizer.second_pass(loss_scale=scaler.get_scale()):
                self()


@final
class Watch(lightning.Callback):
    """Tells watchers of the steps of a module's first kfqn optimizer: ``callbacks=[Watch(report)]``."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers, self._losses, self._step = watchers, list[Tensor](), 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found = [own for own in trainer.optimizers if isinstance(own, Kronecker)]
        if isinstance(outputs, Mapping) and "loss" in outputs:
            self._losses.append(outputs["loss"])
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        loss = torch.stack(self._losses).sum() if self._losses else None
        if loss is not None and not pl_module.automatic_optimization:  # which divides by their number
            loss = loss / len(self._losses)
        self._losses.clear()
        for watcher in self.watchers if trainer.is_global_zero else ():
            watcher.update(found[0] if found else trainer.optimizers[0], loss, self._step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for watcher in self.watchers if trainer.is_global_zero else ():
            watcher.write()
