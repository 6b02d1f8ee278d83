"""The images an optimizer is raced on, as tensors on the device, batches of them, their classification."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn
from kfqn.race import process_group
from kfqn.race.problems.task import Closure, Data, Evaluation, Size, Task


@dataclass(frozen=True)
class Images:
    """Labelled images: ``x`` (n, channels, height, width) as uint8, ``y`` (n,) as int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> "Images":
        """The same images on another device."""
        return Images(self.x.to(device), self.y.to(device))

    def first(self, count: int | None) -> "Images":
        """The first ``count`` images; all with None."""
        return Images(self.x[:count], self.y[:count])

    def pooled(self) -> "Images":
        """The same at half the side: means of 2×2 pixels, rounded."""
        n, channels, height, width = self.x.shape
        quarters = self.x.view(n, channels, height // 2, 2, width // 2, 2)
        return Images(
            (quarters.sum((3, 5), dtype=torch.int16) + 2).div(4, rounding_mode="floor").byte(), self.y
        )


@final
@dataclass(frozen=True)
class Dataset(Data):
    """Training and test images, and what they are normalised by: one number a channel, of 0..1 pixels."""

    train: Images
    test: Images
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int  # 0: no augmentation
    items = "training images"

    def __len__(self) -> int:
        return len(self.train)

    def task(self, device: torch.device, size: Size) -> "Classification":
        return Classification(self.to(device, size.train), size)

    def pooled(self) -> "Dataset":
        """The same images at half the side, cropped from half the padding."""
        train, test = self.train.pooled(), self.test.pooled()
        return replace(self, train=train, test=test, crop_padding=self.crop_padding // 2)

    def to(self, device: torch.device, train_size: int | None = None) -> "Dataset":
        """The data set on a device, with only the first ``train_size`` training images."""
        train = self.train.first(train_size).to(device)
        return Dataset(train, self.test.to(device), self.classes, self.mean, self.std, self.crop_padding)

    def normalised(self, x: Tensor) -> Tensor:
        """Bytes as floats of mean 0 and standard deviation 1 per channel."""
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x.float() / 255 - mean) / std

    def training_batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, augmented, normalised batches; a rest smaller than ``size`` is dropped."""
        order = torch.randperm(len(self.train), generator=generator)
        for indices in order[: len(order) // size * size].split(size):
            indices = indices.to(self.train.x.device)
            x = self.train.x[indices]
            if self.crop_padding:
                x = crop_and_flip(x, self.crop_padding, generator)
            yield self.normalised(x), self.train.y[indices]

    def in_order(self, images: Images, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """The images as they are, normalised, in batches of ``size`` and a rest."""
        for x, y in zip(images.x.split(size), images.y.split(size), strict=True):
            yield self.normalised(x), y


@final
class Classification(Task):
    """Images to be told apart: cross entropy on shuffled batches, and the share that is taken for another."""

    def __init__(self, data: Dataset, size: Size) -> None:
        self.data, self.batch = data, size.batch
        self.steps = len(data.train) // size.batch
        self.read = [images.first(size.evaluated) for images in (data.train, data.test)]
        self.conditions = {
            "training images": str(len(data.train)),
            "evaluated images": f"first {len(self.read[0])} training and {len(self.read[1])} test images",
        }

    def epoch(self, model: nn.Module, generator: torch.Generator) -> Iterator[Closure]:
        share = process_group.share()
        for x, y in self.data.training_batches(self.batch, generator):
            yield kfqn.closure(model, x[share], y[share], F.cross_entropy)

    def evaluate(self, model: nn.Module) -> Evaluation:
        train_loss, _ = self.loss_and_error(model, self.read[0])
        return Evaluation(train_loss, *self.loss_and_error(model, self.read[1]))

    @torch.no_grad()
    def loss_and_error(self, model: nn.Module, images: Images) -> tuple[float, float]:
        """Means over the images."""
        loss = error = 0.0
        for x, y in self.data.in_order(images):
            output = model(x)
            loss += F.cross_entropy(output, y, reduction="sum").item()
            error += (output.argmax(1) != y).sum().item()
        return loss / len(images), error / len(images)


def crop_and_flip(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image of a batch cropped at random from its zero-padded self, and mirrored every other time.

    One gather on the device for the whole batch; the random numbers come from the CPU
    ``generator``, so every device sees the same crops.
    """
    n, _, height, width = x.shape
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator).to(x.device)
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5).to(x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    padded = F.pad(x, (padding,) * 4)
    data = torch.arange(n, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[data, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def digits() -> Dataset:
    """scikit-learn's 1797 real 8×8 digits: 1437 to train, 360 to test, no network needed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(bunch.images)[order, None] * (255 / 16)
    y = torch.from_numpy(bunch.target)[order]
    images = Images(x.round().to(torch.uint8), y.to(torch.int64))
    return Dataset(
        train=images.first(1437),
        test=Images(images.x[1437:], images.y[1437:]),
        classes=10,
        mean=(0.305,),
        std=(0.376,),
        crop_padding=0,
    )
