"""Characters of Python's own standard library, to be predicted from those before them."""

import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfqn
from kfqn.race import process_group
from kfqn.race.problems.task import Closure, Data, Evaluation, Size, Task

KNOWN = 100  # the commonest characters; all others are one more symbol
CONTEXT = 64  # characters of a window
STEPS = 80  # of what is called an epoch
READ = 500  # windows of either part at most, evenly spread: 32,000 characters


@final
class Text(Data):
    """A text as numbers 0..`KNOWN`, its last tenth for validation."""

    items = "training characters"

    def __init__(self, text: str) -> None:
        first, last = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
        commonest = sorted(Counter(first).items(), key=lambda item: (-item[1], item[0]))[:KNOWN]
        numbers = np.full(0x110000, KNOWN, np.uint8)
        numbers[[ord(character) for character, _ in commonest]] = np.arange(len(commonest))
        self.train, self.validation = (_numbered(part, numbers) for part in (first, last))

    def __len__(self) -> int:
        return len(self.train)

    def task(self, device: torch.device, size: Size) -> "NextCharacter":
        train = self.train[: size.train]
        return NextCharacter(train.to(device), self.validation.to(device), size)


@final
class NextCharacter(Task):
    """Cross entropy of the next character, on random windows of the text."""

    steps = STEPS

    def __init__(self, train: Tensor, validation: Tensor, size: Size) -> None:
        self.train, self.batch = train, size.batch
        self.read = [spread_windows(part, min(READ, size.evaluated)) for part in (train, validation)]
        self.conditions = {
            "training characters": f"{len(train)}",
            "evaluated windows": f"{len(self.read[0])} for training, {len(self.read[1])} for validation",
        }

    def epoch(self, model: nn.Module, generator: torch.Generator) -> Iterator[Closure]:
        for _ in range(self.steps):
            starts = torch.randint(len(self.train) - CONTEXT, (self.batch,), generator=generator)
            window = windows(self.train, starts)[process_group.share()]
            yield kfqn.closure(model, window[:, :-1], window[:, 1:], loss_of)

    def evaluate(self, model: nn.Module) -> Evaluation:
        train_loss, _ = loss_and_error(model, self.read[0])
        return Evaluation(train_loss, *loss_and_error(model, self.read[1]))


def standard_library() -> Text:
    """The sorted top-level modules of the Python that runs, one after the other."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return Text("".join(file.read_text(encoding="utf-8", errors="replace") for file in files))


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """What `CONTEXT` characters and the one after them are, from these places on: (m, `CONTEXT` + 1)."""
    return text[(starts[:, None] + torch.arange(CONTEXT + 1)).to(text.device)].long()


def spread_windows(text: Tensor, count: int) -> Tensor:
    """So many windows, evenly spread and not overlapping; as many as there is room for."""
    count = max(1, min(count, (len(text) - 1) // CONTEXT))
    return windows(text, torch.arange(count) * (len(text) - 1) // count)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy over all places."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@torch.no_grad()
def loss_and_error(model: nn.Module, read: Tensor) -> tuple[float, float]:
    """Mean cross entropy, and the share of characters that were taken for others."""
    loss = error = 0.0
    for window in read.split(100):
        output, target = model(window[:, :-1]), window[:, 1:]
        loss += loss_of(output, target).item() * len(window)
        error += (output.argmax(-1) != target).float().mean().item() * len(window)
    return loss / len(read), error / len(read)


def _numbered(text: str, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers[np.frombuffer(text.encode("utf-32-le"), np.uint32)])
