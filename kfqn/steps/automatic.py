"""``lr="auto"`` as a step rule: steps whose size is found on the way, and are taken back if bad."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from kfqn.parameters.groups import Group, note
from kfqn.parameters.layers import Layer
from kfqn.steps import trust as trusting
from kfqn.steps.norms import keep_norms, note_radial
from kfqn.steps.parabola import (
    FIRST,
    FORGOTTEN,
    REFUSED,
    TRUSTED,
    WITHOUT_LOSSES,
    Sample,
    Search,
    bounded,
    far_above,
    judged,
    left_by_gain,
    stepped,
    undone,
    with_loss,
    within_bounds,
)
from kfqn.steps.rule import Members, Plan, Proposal, StepRule, Trial
from kfqn.steps.trust import REASONS, Trust


class Promise(NamedTuple):
    """What a judged step is held to; P as scaled to the other layers, both it and D̂W of whole weight."""

    D: float  # Σ ⟨P, D̂W⟩ over the layers
    taken: float  # Σ α ⟨P, D̂W⟩, of how much of P was taken
    scheduled: float  # the same with what a scheduler and the plateau factor make of α
    share: float  # of its size that a layer moves


@final
@dataclass(frozen=True)
class Automatic(StepRule):
    """The rule of `kfqn.steps.parabola`; where losses cannot judge, that of `kfqn.steps.trust`.

    ``lr`` of a group is a factor, 1 unless a scheduler changes it, of the rate that all groups share and keep
    in ``search``. Their layers move by the same share of their size, or by less where P is shorter than it
    was of late (``update_norms``): how long the directions of two layers are against each other depends on
    the units of both, and the loss along a step says nothing of it. Of scale-invariant weights (``radial``)
    ‖W‖ is kept (``kept_norms``, `kfqn.steps.norms`).

    Where losses turn out not to judge steps (``trust``), or none are told, every layer moves by
    `WITHOUT_LOSSES` of a usual initialisation's norm times ``lr``; there are then no second passes, and H_A
    alone learns.
    """

    def rate(self, members: Members, group: Group) -> float:
        search = search_of(members)
        return _factor(search, group) * search.rate

    def decay_rate(self, members: Members, group: Group, plan: Plan) -> float:
        """α has the units of P here, which differ from layer to layer; the share of sizes has none."""
        return _factor(search_of(members), group) * Promise(*plan.promise).share

    def forces_trial(self, members: Members) -> bool:
        return search_of(members).force_trial

    def wants_second_pass(self, members: Members) -> bool:
        return not trust_of(members).lost

    def went_wrong(self, members: Members, valid: bool, loss: float | None) -> bool:
        search = search_of(members)
        search = _keep(members, search._replace(refused=0 if valid else search.refused + 1))
        if not valid:  # of one batch that may be the batch's own fault
            wrong = search.unverified and search.refused >= REFUSED
        else:
            wrong = loss is not None and not trust_of(members).lost and far_above(search, loss)
        if wrong:
            _keep(members, undone(search))
            _forget_norms(members)
        return wrong

    def observe(self, members: Members, loss: float) -> None:
        trust = trust_of(members)
        if not trust.lost:
            _keep(members, with_loss(search_of(members), loss))
            _believe(members, trusting.with_loss(trust, loss))

    def plan(self, members: Members, proposals: Mapping[Layer, Proposal], on_offer: bool) -> Plan:
        trust, search = trust_of(members), search_of(members)
        will_judge = on_offer and not trust.lost
        at = trusting.point(trust) if will_judge else 1.0
        own = {layer: member for member in members for layer in member.layers if layer in proposals}
        longer = {x: 1 / member.average.weight(member.group, search.steps) for x, member in own.items()}
        relative = {x: longer[x] * share for x, share in _update_norms(members, proposals, trust).items()}
        moving = [share for share in relative.values() if share > 0]
        if not moving:
            return Plan(dict.fromkeys(own, 1.0), will_judge, at, Promise(0.0, 0.0, 0.0, 0.0))
        mean = math.exp(statistics.fmean(map(math.log, moving)))
        even = {x: mean / relative[x] if relative[x] > 0 else 0.0 for x in own}  # (M4)
        if trust.lost:
            _keep(members, search._replace(rate=WITHOUT_LOSSES / mean))  # (M22)
            shares = {layer: even[layer] * longer[layer] for layer in own}
            return Plan(shares, promise=Promise(0.0, 0.0, 0.0, WITHOUT_LOSSES))
        found = search.rate * mean or FIRST * TRUSTED / len(own)
        wanted = bounded(found, len(own))
        search = _keep(members, search._replace(rate=wanted / mean))
        left = within_bounds(wanted, len(own)) / wanted if wanted > 0 else 1.0
        slopes = {layer: even[layer] * longer[layer] ** 2 * proposals[layer].slope for layer in own}
        D = sum(slopes.values())
        scheduled = sum(slope * _factor(search, own[layer].group) for layer, slope in slopes.items())
        left *= left_by_gain(search, search.rate * left * scheduled)
        rate = search.rate * left
        shares = {layer: even[layer] * longer[layer] * left for layer in own}
        return Plan(shares, will_judge, at, Promise(D, rate * D, rate * scheduled, left * wanted))

    def taken(self, members: Members, plan: Plan, norms_W: Mapping[Layer, float]) -> None:
        keep_norms(members, norms_W)
        _keep(members, stepped(search_of(members), plan.judged and plan.at == 1))

    def judge(self, members: Members, plan: Plan, trial: Trial) -> float:
        trust = trust_of(members)
        if plan.at < 1:
            _check(members, plan, trial)
            return 1.0
        note_radial(members, trial.norms_W, trial.radial)
        D, taken, scheduled, _ = promise = Promise(*plan.promise)
        rate = taken / promise.D if promise.D > 0 else 0.0
        factor = scheduled / taken if taken > 0 else 0.0
        slope, regularised, of_all = (
            trust.ratio * x for x in (trial.slope, trial.regularised, trial.slope_of_all)
        )
        losses = trial.before, trial.after, trial.resolution
        sample = Sample(rate, factor, D, slope, regularised, of_all, *losses)
        search, share = judged(search_of(members), sample)
        _keep(members, search)
        _believe(members, trusting.with_verdict(trusting.passed(trust), share < 1))
        if share < 1:
            _forget_norms(members)
        return share

    def missed(self, members: Members) -> str:
        trust = trust_of(members)
        if not trust.lost:
            _believe(members, trusting.unserved(trust))
        return ""

    def complaint(self, members: Members) -> str:
        lost = trust_of(members).lost
        return REASONS[lost].format(share=WITHOUT_LOSSES) if lost else ""

    def kept(self) -> dict[str, Any]:
        own: dict[str, Any] = {"search": Search()._asdict(), "trust": Trust()._asdict()}
        return own | {"update_norms": [], "radial": [], "kept_norms": []}

    def report(self, members: Members) -> dict[str, float]:
        """How many steps were taken back, α, and what is known of losses: see `Kronecker.diagnostics`."""
        search, trust = search_of(members), trust_of(members)
        found = {"rejected": float(search.rejected), "rate": search.rate}
        found["plateau factor"] = search.plateau_factor
        return found | {"judging": float(not trust.lost), "ratio": trust.ratio}


def search_of(members: Members) -> Search:
    """What is known of the step size."""
    return Search(**members[0].group["progress"]["search"])


def trust_of(members: Members) -> Trust:
    """How far losses are believed."""
    return Trust(**members[0].group["progress"]["trust"])


def _keep(members: Members, search: Search) -> Search:
    for group, _, _ in members:
        note(group, search=search._asdict())
    return search


def _believe(members: Members, trust: Trust) -> None:
    if trust.lost and not trust_of(members).lost:
        _keep(members, search_of(members)._replace(plateau_factor=1.0, unverified=False, force_trial=False))
    for group, _, _ in members:
        note(group, trust=trust._asdict())


def _check(members: Members, plan: Plan, trial: Trial) -> None:
    """Take in a second pass on the way, and say where the next is to be: of closures at once."""
    trust, search = trust_of(members), search_of(members)
    change = trial.after - trial.before
    found = math.nan if plan.at > 0 and trial.coarse else change  # lost in the rounding of such weights
    largest = max(abs(trial.before), abs(trial.after))
    whole = trial.resolution * max(1.0, abs(trust.first) / largest) if largest else math.inf
    after = trusting.checked(trust, plan.at, found, trial.slope_of_all, trial.before, whole)
    _believe(members, after)
    descent = search.descent * (after.ratio / trust.ratio if not trust.varies else 1.0)
    _keep(members, search_of(members)._replace(descent=descent))
    plan.at = trusting.point(after) if after.checks == 1 else 1.0


def _factor(search: Search, group: Group) -> float:
    """What a scheduler and the losses so far leave of the steps that are found."""
    return float(group["lr"]) * search.plateau_factor


def _update_norms(members: Members, proposals: Mapping[Layer, Proposal], trust: Trust) -> dict[Layer, float]:
    """‖P‖ of every layer that moves as a share of its size, the largest of late; kept in its group (M3)."""
    relative = {}
    for group, layers, _ in members:
        before = group["progress"]["update_norms"] or (0.0,) * len(layers)
        for layer, old in zip(layers, before, strict=True):
            there = proposals.get(layer)
            now = there.norm / _size(layer, there, trust) if there is not None else 0.0
            relative[layer] = max(now, FORGOTTEN * old) if now > 0 else old
        note(group, update_norms=[relative[layer] for layer in layers])
    return {layer: relative[layer] for layer in proposals if layer in relative}


def _size(layer: Layer, proposal: Proposal, trust: Trust) -> float:
    """What steps are shares of: ‖W‖, or without losses that of a usual initialisation, so that weights
    that grow by steps in noise do not grow faster and faster."""
    return math.sqrt(len(layer.weight) / 3) if trust.lost else proposal.size


def _forget_norms(members: Members) -> None:
    """After a step was taken back: norms are kept anew."""
    for group, _, _ in members:
        note(group, kept_norms=[])
