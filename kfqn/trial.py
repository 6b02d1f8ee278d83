"""The trial of a step: what is kept of it, the losses before and after, and putting weights back."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kfqn.parameters.layers import Layer
from kfqn.parameters.settings import l2
from kfqn.steps.norms import radial_products
from kfqn.steps.rule import Members, Proposal, StepRule, Trial
from kfqn.training import Training, with_complaints


def measure(training: Training, rule: StepRule, proposals: Mapping[Layer, Proposal]) -> None:
    """After a step that is judged: slopes and norms, of which nothing is read yet."""
    members, flight = dict(training.rules)[rule], training.context.flight
    flight.slopes.extend(_slopes(training, members))
    flight.norms_W.update({layer: proposal.norm_W for layer, proposal in proposals.items()})
    flight.radial.extend(radial_products(members, flight.before))


def _slopes(training: Training, members: Members) -> list[Tensor]:
    """⟨∇f, ΔW⟩ of the rule's layers, the same with L2, and of everything that moved."""
    layers, before = training.groups.layers, training.context.flight.before
    zero = layers[0].empty().new_zeros(())
    of_loss, of_decay, of_rest = [zero], [zero], [zero]
    biases, own = {layer.bias for layer in layers}, {id(member.group) for member in members}
    for group in training.groups.param_groups:
        judged = id(group) in own
        decay = l2(group) if judged else 0.0
        for p in group["params"]:
            if p not in before or p.grad is None:
                continue
            DW = p.grad.to_dense() if p.grad.is_sparse else p.grad
            W, now, DW = (x.flatten().to(zero) for x in (before[p], p, DW))
            moved = now - W
            (of_loss if judged else of_rest).append(torch.linalg.vecdot(DW, moved))
            if decay:
                share = group["bias_decay"] if p in biases else 1.0
                of_decay.append(decay * share * torch.linalg.vecdot(W, moved))
    slope, decayed, rest = (torch.stack(terms).sum() for terms in (of_loss, of_decay, of_rest))
    return [slope, slope + decayed, slope + rest]


@contextlib.contextmanager
def on_the_way(training: Training) -> Iterator[None]:
    """With what moved put where the second pass is to look, if that is not the end of the step."""
    flight = training.context.flight
    at = flight.judged[1].at if flight.judged is not None else 1.0
    if at == 1:
        yield
        return
    ends = {p: p.detach().clone() for p in flight.before}
    try:
        with torch.no_grad():
            for p, W in flight.before.items():
                p.copy_(W.lerp(p.to(W.dtype), at))
        yield
    finally:
        with torch.no_grad():
            for p, end in ends.items():
                p.copy_(end)


def judging(training: Training) -> StepRule | None:
    """The rule that is to be told the losses of the step just taken, if one still wants to know them."""
    judged = training.context.flight.judged
    return judged[0] if judged is not None and training.second_pass_wanted(judged[0]) else None


def check_told(training: Training, loss: Tensor | float | None) -> None:
    """Raise RuntimeError, before the second pass, if it needs the loss of the first."""
    if loss is None and judging(training) is not None:
        raise RuntimeError(
            "lr='auto' judges a step by the loss before and after it: write 'with "
            "optimizer.second_pass(loss) as again:' with the loss of the first pass, and set again.loss "
            "inside to that of the second."
        )


def stays(training: Training, before: Tensor | float | None, after: Tensor | float | None) -> bool:
    """Whether the step stays, given the losses of both passes; if not, it has been taken back."""
    flight, rule = training.context.flight, judging(training)
    if rule is None or flight.judged is None:
        return True
    if before is None or after is None:
        raise RuntimeError(
            "the second pass has ended without its loss, so the step was taken without learning from it: "
            "set again.loss inside 'with optimizer.second_pass(loss) as again:'."
        )
    device = training.groups.layers[0].weight.device
    before, after = torch.as_tensor(before, device=device), torch.as_tensor(after, device=device)
    f0, f1, slope, regularised, of_all, *radial = training.mean(
        [before, after, *flight.slopes, *flight.radial]
    )
    resolution = 4 * torch.finfo(before.dtype).eps * max(abs(f0), abs(f1))
    if training.context.loss is None:  # a loop without closures tells losses here only
        training.observe(f0)
    coarse = any(p.element_size() < 4 for p in flight.before)
    trial = Trial(f0, f1, slope, regularised, of_all, resolution, coarse, flight.norms_W, radial)
    plan, members = flight.judged[1], dict(training.rules)[rule]
    on_way = plan.at < 1
    share = with_complaints(training, rule, members, lambda: rule.judge(members, plan, trial))
    if on_way:
        return True
    if share < 1:
        _put_back(training, share)
    flight.clear()
    return bool(share == 1)


def _put_back(training: Training, share: float) -> None:
    """Leave this share of the step."""
    for p, W in training.context.flight.before.items():
        p.copy_(W.lerp_(p.to(W.dtype), share) if share else W)
    for layer in training.groups.layers:
        if training.states.of(layer):
            training.states.of(layer)["last"][0] *= share
