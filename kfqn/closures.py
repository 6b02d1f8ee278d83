"""One closure for every optimizer: the loss of a batch, and again with labels the model itself would draw."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
Sample = Callable[[Tensor, torch.Generator], Tensor]


@final
@dataclass(frozen=True)
class Closure:
    """What `closure` returns: call it for a forward-backward pass; the rest is for KFAC and warm starts."""

    model: nn.Module
    inputs: tuple[Any, ...]
    target: Tensor
    loss_fn: Loss
    sample: Sample | None

    def __call__(self) -> Tensor:
        """Clear the gradients, compute the loss, call backward, return the loss."""
        self.model.zero_grad()
        loss = self.loss_fn(self.output(), self.target)
        loss.backward()
        return loss

    def output(self) -> Tensor:
        """The model's output for the batch."""
        output: Tensor = self.model(*self.inputs)
        return output

    def sampled(self, generator: torch.Generator) -> None:
        """A forward-backward pass with a target drawn from the model's predictive distribution.

        ``generator`` is on the output's device. Gradients are not cleared before.
        """
        assert self.sample is not None
        output = self.output()
        with torch.no_grad():
            target = self.sample(output.detach(), generator)
        self.loss_fn(output, target).backward()


def closure(
    model: nn.Module, x: Any, target: Tensor, loss_fn: Loss, *, sample: Sample | None = None
) -> Closure:
    """The closure of one batch, for any optimizer here and in torch.optim.

    Example::

        for x, target in loader:
            loss = optimizer.step(kfqn.closure(model, x, target, F.cross_entropy))

    One of your own must clear the gradients, compute the loss as a mean over the batch, call ``backward`` and
    return the loss. `KFBFGS(model)` calls it once. With a number for ``lr``, and in `KFLBFGS` and `KFAC`, it
    is called again after some steps or all, and then must use the same batch, to the same effect. Buffers of
    the model, and the global random numbers of torch, Python and NumPy, are then where they were; generators
    and counters of your own are not.

    It may read, scale, clip or replace ``.grad`` after ``backward``, call ``backward`` several times, have
    gradients in the loss (`torch.autograd.grad`, also batched), and differentiate parameters (MAML). Second
    calls compute no gradient of a parameter, and ``.grad`` is None in them, until one fails for that
    reason: it is called once more with them, and so are all later ones, at the price of a first call. It may
    use torch.func, but what runs inside its transforms alone teaches a layer nothing.

    Args:
        model: the model, or its compiled form.
        x: the model's input, a tensor, or a tuple or list of positional arguments.
        target: what ``loss_fn`` compares the output with.
        loss_fn: output and target to the loss, a mean over the batch.
        sample: for `KFAC` only: output and a `torch.Generator` to a target drawn from the predictive
            distribution, of which ``loss_fn`` is the mean negative log-likelihood. Known by itself
            for `cross_entropy` on outputs (m, classes) and for `mse_loss`, as functions or modules
            with their default options.
    """
    inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
    return Closure(model, inputs, target, loss_fn, sample or _sample_of(loss_fn))


def _sample_of(loss_fn: Loss) -> Sample | None:
    """How to draw a target for a loss that is known, with default options; None for another."""
    if loss_fn is F.cross_entropy or (
        type(loss_fn) is nn.CrossEntropyLoss
        and loss_fn.weight is None
        and loss_fn.reduction == "mean"
        and loss_fn.ignore_index == -100
        and loss_fn.label_smoothing == 0
    ):
        return _categorical
    if loss_fn is F.mse_loss or (type(loss_fn) is nn.MSELoss and loss_fn.reduction == "mean"):
        return _normal
    return None


def _categorical(output: Tensor, generator: torch.Generator) -> Tensor:
    """One class a datum from softmax(output), (m,) from (m, classes)."""
    if output.ndim != 2:
        raise ValueError(
            f"classes can be sampled for outputs of shape (m, classes), but got {tuple(output.shape)}: give "
            "kfqn.closure a function sample(output, generator) that draws targets."
        )
    p = output.float().softmax(1)
    waits = torch.empty_like(p).exponential_(generator=generator)  # class i comes first with probability p_i
    return (p / waits).argmax(1)  # torch.multinomial would stop the program where p is NaN


def _normal(output: Tensor, generator: torch.Generator) -> Tensor:
    """A normal target: `mse_loss` is, up to a constant, −log N(output, ½ d I) for d numbers a datum."""
    variance = output[0].numel() / 2
    noise: Tensor = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
    return noise.mul_(variance**0.5).add_(output)
