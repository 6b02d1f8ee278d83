"""What the examples share: scikit-learn's digits, a small network for them, and the line at the end."""

from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1280 images to train with, 517 to test with: x (1, 8, 8) between 0 and 1, y the digit."""
    found = load_digits()
    x = torch.as_tensor(found.images / 16, dtype=torch.get_default_dtype()).unsqueeze(1)
    y = torch.as_tensor(found.target)
    train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([1280, 517])
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def batches(data: TensorDataset, size: int) -> DataLoader:
    """Shuffled batches; two halves of a batch of 2n are two batches of n."""
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    """Two convolutions and a linear layer, the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


@torch.no_grad()
def report(losses: Sequence[float], model: Callable[[Tensor], Tensor], test: TensorDataset) -> None:
    """First and last loss, and test accuracy."""
    x, y = test.tensors
    accuracy = (model(x).argmax(1) == y).double().mean()
    print(f"loss {losses[0]:.6g} at first, {losses[-1]:.6g} at last; test accuracy {accuracy:.3f}")
