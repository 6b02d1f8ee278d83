"""A picture of a run in one HTML file: loss, rate, and how far every layer moves, drawn while it trains."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from kfqn import Kronecker
from kfqn.integrations.page import Point, Run, page
from kfqn.integrations.watch import inner

MOST = 400  # points are kept, an even number


@final
class Report:
    """Draws a run into one HTML file that needs nothing beside it, for any screen, bright or dark.

    Example::

        report = kfqn.Report("run.html")
        for x, y in loader:
            ...
            optimizer.step()
            report.update(optimizer, loss)
        report.write()

    Args:
        path: of the file, whose folder has to be there.
        title: of the page; by default the name of the file.
        seconds: it is written anew at most this often, so that it can be looked at while the run goes on.

    Less than 400 points are kept. Of a long run each is the mean of several losses, and the optimizer is
    asked at as few steps, so that it hardly costs time. ``Watch`` of `kfqn.integrations.lightning` and
    `kfqn.integrations.transformers` calls `update` and `write` in these frameworks.
    """

    def __init__(self, path: str | Path, title: str = "", seconds: float = 10.0) -> None:
        self.path, self.seconds = Path(path), seconds
        self.run = Run(title or self.path.stem, [], {}, "")
        self._step, self._stride, self._written = 0, 1, time.monotonic()
        self._loss, self._count = torch.zeros(()), 0

    def update(self, optimizer: Any, loss: Tensor | float | None = None, step: int | None = None) -> None:
        """A step has been taken, with this loss; ``step`` is its number, by default one more than the last.

        Raises TypeError for an optimizer that is not kfqn's.
        """
        before, self._step = self._step, self._step + 1 if step is None else step
        if loss is not None:
            told = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss)
            self._loss, self._count = self._loss.to(told) + told, self._count + 1
        if self._step // self._stride == before // self._stride and self.run.points:
            return
        self._look(inner(optimizer))
        if time.monotonic() - self._written > self.seconds:
            self.write()

    def write(self) -> None:
        """Write the page as it is now. Readers never see half of it."""
        self._written = time.monotonic()
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(page(self.run), encoding="utf-8")
        partial.replace(self.path)

    def _look(self, optimizer: Kronecker) -> None:
        """Keep a point, and every second one where there are too many."""
        told = optimizer.diagnostics()
        loss = float(self._loss) / self._count if self._count else None
        self._loss, self._count = torch.zeros(()), 0
        norms = _norms(optimizer)
        moved = {name: told[name]["update"] / norms[name] for name in norms if name in told and norms[name]}
        rate = told[""].get("rate", float(optimizer.param_groups[0]["lr"]))
        points = [*self.run.points, Point(self._step, loss, rate, told[""]["refused"], moved)]
        if len(points) == MOST:
            self._stride *= 2
            points = [_merged(*pair) for pair in zip(points[::2], points[1::2], strict=False)]
        self.run = replace(self.run, points=points, told=told, optimizer=type(optimizer).__name__)


def _norms(optimizer: Kronecker) -> dict[str, float]:
    """‖W‖ of every layer; the device is read once."""
    layers = optimizer.layers
    with torch.no_grad():
        norms = [torch.stack([p.norm().float() for p in layer.parameters()]).norm() for layer in layers]
        read: list[float] = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
    return {layer.name: norm for layer, norm in zip(layers, read, strict=True)}


def _merged(first: Point, second: Point) -> Point:
    """Two points as one, at the second's step."""
    losses = [loss for loss in (first.loss, second.loss) if loss is not None]
    return replace(second, loss=sum(losses) / len(losses) if losses else None)
