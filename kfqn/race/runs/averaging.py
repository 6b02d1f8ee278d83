"""An average of the weights, read in their place."""

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def polynomial_average(model: nn.Module, power: float) -> AveragedModel:
    """An average of the weights over all steps that gives late ones more: polynomial-decay averaging.

    Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization" (2013), section 4. The n-th
    weights enter with the share (p + 1) / (n + p), so that no length has to be known.
    """

    def enter(average: Tensor, weights: Tensor, n: Tensor | int) -> Tensor:
        return average + (weights - average) * ((power + 1) / (n + 1 + power))

    return AveragedModel(model, avg_fn=enter, use_buffers=True)
