"""Rounding to bfloat16 at random, so that what is averaged over many steps does not stand still."""

import torch
from torch import Tensor

_BELOW = 2**16  # what the bits that bfloat16 lacks of float32 can say


def rounded_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (…, C) in bfloat16: the number below or above, each with such a probability that the mean is x.

    ``generator`` is on x's device. Of every entry the noise is uniform, and of any two independent, as the
    sum of one number for its row and one for its column: drawing one for each would cost several times more.
    """
    bits, shapes = x.to(torch.float32).view(torch.int32), ((*x.shape[:-1], 1), x.shape[-1:])
    of_row, of_column = (
        torch.randint(0, _BELOW, shape, generator=generator, dtype=torch.int32, device=x.device)
        for shape in shapes
    )
    noise = (of_row + of_column).bitwise_and_(_BELOW - 1)
    return noise.add_(bits).bitwise_and_(-_BELOW).view(torch.float32).to(torch.bfloat16)
