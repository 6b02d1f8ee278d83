"""A problem of your own, ``mine:problem``: what a function in a file of the current folder returns."""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kfqn.race.failure import Failure
from kfqn.race.lookup import digest, first_line, named
from kfqn.race.problems.measures import TEST_ERROR, TEST_LOSS, TRAIN_LOSS, Guess, Quantity
from kfqn.race.problems.registry import PROBLEMS, SCHEDULE, Problem

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from kfqn.race.problems.supervised import Measure, Pairs

TRIED = 256  # items at most that the untrained model is tried on
KEYWORDS = "model=..., train=..., test=..., loss=..."


@dataclass(frozen=True)
class Supervised:
    """A model, the data it learns from and is tested on, and a loss: all that a race needs.

    ``model`` is a function without arguments, or a class, that gives the freshly initialised model; ``train``
    and ``test`` are data sets of torch, whose items are an input and a target. ``loss`` and ``error`` take
    outputs and targets of a batch and return a mean over it. Without an ``error`` it is the share of wrong
    classes, where targets are numbers of classes, else the mean absolute error.
    """

    model: "Callable[[], nn.Module]"
    train: "Dataset[Any]"
    test: "Dataset[Any]"
    loss: "Callable[[Tensor, Tensor], Tensor]"
    error: "Callable[[Tensor, Tensor], Tensor] | None" = None
    epochs: int = 10
    batch_size: int = 64
    weight_decay: float = 0.0
    title: str = ""


def is_own(name: str) -> bool:
    """Whether a name is that of somebody's own problem, ``mine:problem``."""
    return ":" in name


def problem_of(name: str) -> Problem:
    """A problem by its name; Failure for one's own that cannot be had, or not be run on a batch."""
    if name in PROBLEMS:
        return PROBLEMS[name]
    module, _, function = name.partition(":")
    return _built(name, named(module, function, "name it as FILE:FUNCTION, mine:problem for mine.py"))


@functools.cache
def _built(name: str, function: Any) -> Problem:
    """What the function returns, as a problem, after its first batch was tried.

    Random numbers start anew before, so that every process sees the same data.
    """
    import torch

    if not callable(function):
        raise Failure(
            f"{name} is {_a(function)}, no function: let it be one that returns Supervised({KEYWORDS})."
        )
    _seed()
    try:
        given = function()
    except Exception as error:
        raise Failure(f"{name} failed ({first_line(error)}): mend it.") from error
    _check(name, given)
    torch.manual_seed(0)
    try:
        data, quantities, guess, code = _tried(given)
    except Failure as failure:
        raise Failure(f"{name} {failure}") from failure
    except Exception as error:
        raise Failure(f"{name} cannot be run on its first batch ({first_line(error)}): mend it.") from error
    return Problem(
        name=name,
        title=given.title or name,
        data=lambda _: data,
        model=lambda _: given.model(),
        width=0,
        epochs=given.epochs,
        batch_size=given.batch_size,
        weight_decay=given.weight_decay,
        guess=guess,
        smallest=given.batch_size,
        quantities=quantities,
        criterion=quantities[0].key,
        schedule=SCHEDULE,
        code=code,
    )


def _seed() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # what others' data may be made of
    torch.manual_seed(0)


def _a(thing: Any) -> str:
    return f"of type {type(thing).__name__}"


def _check(name: str, given: Any) -> None:
    """Failure for what is no `Supervised`, or has what cannot be."""
    from torch import nn

    if not isinstance(given, Supervised):
        raise Failure(f"{name} returned what is {_a(given)}: return kfqn.race.Supervised({KEYWORDS}).")
    if isinstance(given.model, nn.Module) or not callable(given.model):
        raise Failure(
            f"{name}: model is {_a(given.model)}: give a function that builds it, for every run anew."
        )
    for key in ("epochs", "batch_size"):
        value = getattr(given, key)
        if not isinstance(value, int) or value < 1:
            raise Failure(f"{name}: {key} must be a whole number >= 1, got {value!r}.")
    for key, least in (("train", given.batch_size), ("test", 1)):
        data = getattr(given, key)
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise Failure(
                f"{name}: {key} is {_a(data)}: give a data set with a length, as TensorDataset(x, y)."
            )
        if len(data) < least:
            raise Failure(f"{name}: {key} has {len(data)} items, and must have {least} or more.")


def _tried(given: Supervised) -> "tuple[Pairs, tuple[Quantity, ...], Guess, str]":
    """The data, what counts, what the untrained model has of it, and a digest: others for other problems."""
    import torch

    from kfqn.race.problems.supervised import Pairs
    from kfqn.race.problems.task import Size

    model, size = given.model(), Size(None, TRIED, given.batch_size)
    if not isinstance(model, torch.nn.Module):
        raise Failure(f"has a model() that returns what is {_a(model)}: return a torch.nn.Module.")
    batch = Pairs(given.train, given.test, given.loss, given.loss).task(torch.device("cpu"), size)
    x, y = batch.items(given.train, torch.arange(given.batch_size))
    output = model(x)
    loss = given.loss(output, y)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise Failure("has a loss that is no single number to differentiate: return a mean over the batch.")
    error, quantities = _error_of(given, output, y)
    data = Pairs(given.train, given.test, given.loss, error)
    found = data.task(torch.device("cpu"), size).evaluate(model.eval())
    numbers = (found.train_loss, found.test_loss, found.test_error)
    if not math.isfinite(sum(numbers)):
        raise Failure("has an untrained model whose loss or error is not finite: mend the model or the loss.")
    shapes = [(key, *value.shape) for key, value in model.state_dict().items()]
    told = f"{shapes} {len(data)} {batch.read[1]} {[f'{number:.3g}' for number in numbers]}"
    guess = Guess("the untrained model", found.test_loss, found.test_error)
    return data, quantities, guess, digest(told.encode())


def _error_of(
    given: Supervised, output: "Tensor", target: "Tensor"
) -> "tuple[Measure, tuple[Quantity, ...]]":
    """The error that was given, or that the targets ask for, and what counts, that first."""
    from kfqn.race.problems.supervised import distance, wrong

    if given.error is not None:
        return given.error, (Quantity("test_error", "test error"), TRAIN_LOSS, TEST_LOSS)
    numbers = target.is_floating_point()
    if (output.shape if numbers else output.shape[:1] + output.shape[2:]) != target.shape:
        raise Failure(
            f"has outputs {tuple(output.shape)} and targets {tuple(target.shape)}, which do not fit: mend "
            "their shapes, or give an error=."
        )
    if numbers:
        return distance, (TEST_LOSS, TRAIN_LOSS, Quantity("test_error", "mean absolute error"))
    return wrong, (TEST_ERROR, TRAIN_LOSS, TEST_LOSS)
