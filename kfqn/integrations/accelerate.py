"""Second passes in a loop of Accelerate, for methods that learn from them: `KFLBFGS`, a number for ``lr``.

`KFBFGS(model)` takes one pass a step and needs nothing of this. Nor does `optimizer.step(closure)`, with
which any optimizer here works, `KFAC` too, where gradients are not accumulated; Accelerate does not return
its loss. ::

    model, optimizer, loader = accelerator.prepare(net, kfqn.KFLBFGS(net), loader)
    passes = SecondPasses(accelerator, optimizer, lambda x, y: F.cross_entropy(model(x), y))
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = passes(x, y)  # and accelerator.backward
            optimizer.step()
            optimizer.zero_grad()
"""

from collections.abc import Callable
from typing import Any, final

import accelerate
from torch import Tensor

import kfqn
from kfqn.integrations.watch import inner


@final
class SecondPasses:
    """Runs micro-batches forward and backward, and again after a step that something is learnt from.

    Args:
        accelerator: which says where a step ends, and scales losses.
        optimizer: the one that it has prepared.
        loss: the loss of a micro-batch, of whatever `__call__` is given; with ``backward`` it has also
            called backward.

    The second pass is run as the optimizer's step ends, before a `GradScaler` changes its scale.

    Raises TypeError for `KFAC`, whose passes are not those of the loss.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        optimizer: Any,
        loss: Callable[..., Tensor],
        *,
        backward: bool = False,
    ) -> None:
        if isinstance(inner(optimizer), kfqn.KFAC):
            raise TypeError(
                "KFAC learns from targets drawn from the model's predictions, which no loss of a micro-batch "
                "has: give its step a closure of kfqn.closure, in a loop of your own."
            )
        self.accelerator, self.loss, self.backward = accelerator, loss, backward
        self._batches: list[tuple[Any, ...]] = []
        self._is_last = False  # whether a step was to follow the last micro-batch
        inner(optimizer).register_step_post_hook(self._after_step)

    def __call__(self, *batch: Any) -> Tensor:
        """The loss of a micro-batch, without its graph; gradients are added up as `accelerate` has it."""
        if self._is_last:
            self._batches.clear()
        self._batches.append(batch)
        self._is_last = self.accelerator.sync_gradients
        return self._run(*batch)

    def _run(self, *batch: Any) -> Tensor:
        loss = self.loss(*batch)
        if not self.backward:
            self.accelerator.backward(loss)
        return loss.detach()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if optimizer.second_pass_due:
            scaler = self.accelerator.scaler
            with optimizer.second_pass(loss_scale=scaler.get_scale() if scaler is not None else 1.0):
                for batch in self._batches:
                    self._run(*batch)
        self._batches.clear()
