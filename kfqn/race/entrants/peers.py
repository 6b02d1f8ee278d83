"""Optimizers of other packages, each built as its authors advise, and any other by its dotted name.

What is not torch's comes from the dependency group ``peers``.
"""

import inspect
from typing import TYPE_CHECKING, Any

from kfqn.race.entrants.settings import Settings
from kfqn.race.failure import Failure, did_you_mean
from kfqn.race.lookup import digest_of_source, named

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

ADVICE = "give the class's dotted name"


def sgd(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """torch's SGD with momentum 0.9, with ``nesterov`` of 1 Nesterov's."""
    import torch

    return torch.optim.SGD(
        model.parameters(),
        lr=settings["lr"],
        momentum=0.9,
        weight_decay=weight_decay,
        nesterov=bool(settings.get("nesterov", 0)),
    )


def adam(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """torch's Adam."""
    import torch

    return torch.optim.Adam(
        model.parameters(),
        lr=settings["lr"],
        betas=(0.9, settings.get("beta2", 0.999)),
        eps=settings["eps"],
        weight_decay=weight_decay,
    )


def adamw(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """torch's AdamW. Its weight decay is decoupled."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=weight_decay)


def lbfgs(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """torch's L-BFGS with a strong Wolfe line search, for problems without mini-batches.

    A step is ``iterations`` of its own, 20 as in torch, each of one pass or more: compare it by seconds.
    """
    import torch

    if weight_decay:
        raise Failure("lbfgs has no weight decay: race it on a problem without, as burgers.")
    return torch.optim.LBFGS(
        model.parameters(),
        lr=settings["lr"],
        max_iter=int(settings.get("iterations", 20)),
        history_size=int(settings.get("history", 100)),
        line_search_fn="strong_wolfe",
    )


def soap(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo, renewed at every tenth step."""
    optimizer: Optimizer = _peer("pytorch_optimizer", "SOAP")(
        model.parameters(),
        lr=settings["lr"],
        betas=(settings["beta"], settings["beta"]),
        weight_decay=weight_decay,
        precondition_frequency=int(settings.get("interval", 10)),
    )
    return optimizer


def shampoo(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """Shampoo (Gupta et al. 2018; Anil et al. 2020), grafted to SGD, its roots new at every tenth step."""
    optimizer: Optimizer = _peer("pytorch_optimizer", "ScalableShampoo")(
        model.parameters(),
        lr=settings["lr"],
        weight_decay=weight_decay,
        matrix_eps=settings["eps"],
        start_preconditioning_step=10,
        preconditioning_compute_steps=int(settings.get("interval", 10)),
    )
    return optimizer


def muon(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """Muon (Jordan et al. 2024) for hidden weights, of convolutions as matrices, AdamW for all others.

    Weight decay is decoupled, as its authors have it, where it is the setting ``decay``; the problem's is
    part of the gradient.
    """
    hidden = hidden_weights(model)
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}]
    optimizer: Optimizer = _peer("pytorch_optimizer", "Muon")(
        groups,
        lr=settings["lr"],
        adamw_lr=settings["adam"],
        weight_decay=weight_decay,
        adamw_wd=weight_decay,
        weight_decouple="decay" in settings,
    )
    return optimizer


def hidden_weights(model: "nn.Module") -> "list[Tensor]":
    """Weights of `Linear` and convolutions without the last: no embeddings, positions, vectors, no head."""
    from torch import nn

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return [m.weight for m in model.modules() if isinstance(m, kinds)][:-1]


def singd(model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """SINGD (Lin et al. 2024) with dense factors. It trains `Linear` and `Conv2d` layers alone."""
    from torch import nn

    left = [m for m in model.modules() if not isinstance(m, nn.Linear | nn.Conv2d)]
    if any(p.requires_grad for m in left for p in m.parameters(recurse=False)):
        raise Failure("singd leaves parameters of this problem's model untrained: race others on it.")
    optimizer: Optimizer = _peer("singd.optim.optimizer", "SINGD")(
        model,
        lr=settings["lr"],
        lr_cov=settings["lr_cov"],
        damping=settings.get("damping", 1e-3),
        weight_decay=weight_decay,
        normalize_lr_cov=True,
    )
    return optimizer


def by_dotted_name(path: str) -> "type[Optimizer]":
    """The class of this dotted name; Failure if it cannot be imported or is no torch optimizer."""
    import torch

    module, _, name = path.rpartition(".")
    found = named(module, name, ADVICE)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise Failure(f"{path} is no torch.optim.Optimizer: name such a class.")
    return found


def from_class(path: str, model: "nn.Module", settings: Settings, weight_decay: float) -> "Optimizer":
    """Any torch optimizer, with settings as arguments and others at their defaults.

    One whose first argument is called ``model`` gets the model, others its parameters. The
    problem's weight decay is used where the optimizer takes one and none is among the settings.
    """
    kind = by_dotted_name(path)
    arguments: dict[str, Any] = dict(settings)
    takes = [*inspect.signature(kind).parameters]
    if "weight_decay" in takes:
        arguments.setdefault("weight_decay", weight_decay)
    trained: Any = model if takes[:1] == ["model"] else model.parameters()
    try:
        optimizer: Optimizer = kind(trained, **arguments)
    except TypeError as error:
        wrong = next((key for key in settings if key not in takes), "")
        near = did_you_mean(wrong, takes[1:])
        raise Failure(f"{path} cannot be built with {arguments}: {error}{near or '.'}") from error
    return optimizer


def digest_of(path: str) -> str:
    """Another for another version of a class of the current folder; empty for one that is installed."""
    return digest_of_source(by_dotted_name(path))


def _peer(module: str, name: str) -> Any:
    return named(module, name, ADVICE)
