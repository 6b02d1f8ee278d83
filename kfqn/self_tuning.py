"""Steps whose size is found on the way: a step with a second pass is judged, and taken back if bad."""

import contextlib
import math
import statistics
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfqn import trust as trusting
from kfqn.factors import LayersSeen
from kfqn.first_look import pair_gap
from kfqn.groups import Group
from kfqn.layers import Layer
from kfqn.moves import Move
from kfqn.scale_free import ByGroup, keep_norms, note_along, towards_W
from kfqn.settings import momentum
from kfqn.step_size import (
    FIRST,
    FORGOTTEN,
    REFUSED,
    TRUSTED,
    WITHOUT_LOSSES,
    Search,
    Trial,
    bounded,
    far_above,
    judged,
    left_by_gain,
    stepped,
    undone,
    with_loss,
    within_bounds,
)
from kfqn.trust import REASONS, Trust
from kfqn.two_pass import TwoPassOptimizer


@dataclass
class Pending:
    """A step that is to be judged by its second pass; one object that is changed in place, as `Memory`."""

    judged: bool = False
    at: float = 1.0  # how far along the step the second pass is run: below 1 it checks the losses
    before: dict[Tensor, Tensor] = field(default_factory=dict)  # the parameters before the step
    slopes: list[Tensor] = field(default_factory=list)  # without and with L2, and of everything
    norms: dict[Layer, float] = field(default_factory=dict)  # ‖W‖ before
    towards_W: list[Tensor] = field(default_factory=list)  # gradients, as `kfqn.scale_free.towards_W` says
    D: float = 0.0  # Σ ⟨P, D̂W⟩ over the automatic layers, P as scaled to the others, both of whole weight
    gone: float = 0.0  # Σ α ⟨P, D̂W⟩, of how much of P was gone
    scheduled: float = 0.0  # the same with what a scheduler and patience make of α
    share: float = 0.0  # of its size that an automatic layer moves

    def clear(self) -> None:
        self.judged, self.at = False, 1.0
        self.before.clear()
        self.slopes.clear()
        self.norms.clear()
        self.towards_W.clear()
        self.D = self.gone = self.scheduled = self.share = 0.0


def _is_paired(k: int, group: Group) -> bool:
    """Whether H_G is to learn from step k of an automatic group."""
    return k % pair_gap(k, group["curvature_interval"]) == 0


class SelfTuningOptimizer(TwoPassOptimizer, ABC):
    """A `TwoPassOptimizer` with ``lr="auto"``, by the rule of `kfqn.step_size`.

    Such a group has ``automatic``, and its ``lr`` is a factor, 1 unless a scheduler changes it, of the rate
    that all these groups share and keep in ``search``. Their layers move by the same share of their size,
    or by less where P is shorter than it was of late (``usual``): how long the directions of two layers are
    against each other depends on the units of both, and the loss along a step says nothing of it. A state
    keeps the averaged gradient as ``DW``. Of a layer whose scale changes nothing (``along``) ‖W‖
    is kept (``norms``).

    Of a step that is to be judged the parameters before are kept, and put back to the bit if it is rejected;
    of a step in between most is taken back, along the direction of the averaged gradient, if the loss of the
    next batch is far above; the parameters of ``others`` then stay. Both losses are read by the host.

    Where losses turn out not to judge steps (`kfqn.trust`, kept in ``trust``), or none are told, every layer
    moves by `WITHOUT_LOSSES` of a usual initialisation's norm times ``lr``; there are then no second
    passes, and H_A alone learns.
    """

    def _begin(self) -> None:
        super()._begin()
        self._pending = Pending()

    @property
    def _automatic(self) -> list[Group]:
        return [group for group in self._own_groups() if group["automatic"]]

    @property
    def _search(self) -> Search:
        kept = self._automatic[0]["search"]
        return Search(*kept) if kept is not None else Search()

    @_search.setter
    def _search(self, search: Search) -> None:
        for group in self._automatic:
            group["search"] = tuple(search)

    @property
    def _trust(self) -> Trust:
        kept = self._automatic[0]["trust"] if self._automatic else None
        return Trust(*kept) if kept is not None else Trust()

    @_trust.setter
    def _trust(self, trust: Trust) -> None:
        lost = trust.lost and not self._trust.lost
        for group in self._automatic:
            group["trust"] = tuple(trust)
        if lost:
            self._search = self._search._replace(left=1.0, open=False, due=False)
            self._warn(REASONS[trust.lost].format(share=WITHOUT_LOSSES))

    def warm_start(self, batches: Any) -> None:
        super().warm_start(batches)
        self._search, self._trust = Search(), Trust()
        for group in self._automatic:
            group["usual"] = group["along"] = group["norms"] = ()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._pending.clear()

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """As in every method here; under ``""`` also what the steps are doing.

        ``rejected``, how many were taken back; ``rate``, α; ``left``, what halvings have left of the
        steps that are found; ``judging``, 1 while losses decide on steps and 0 where they cannot; and
        ``ratio``, of what losses change by to what the gradients that were stepped with say.
        """
        found = super().diagnostics()
        if self._automatic:
            search = self._search
            found[""] |= {"rejected": float(search.rejected), "rate": search.rate, "left": search.left}
            found[""] |= {"judging": float(not self._trust.lost), "ratio": self._trust.ratio}
        return found

    def _is_due(self, k: int, group: Group) -> bool:
        judged = bool(self._automatic) and self._search.due
        return judged or super()._is_due(k, group) or (group["automatic"] and _is_paired(k, group))

    def _pairs_due(self, k: int, group: Group) -> bool:
        """The first steps of an automatic group are judged more often than H_G learns from them."""
        if not group["automatic"]:
            return super()._pairs_due(k, group)
        return _is_paired(k, group) and not self._trust.lost

    def _needs_second_pass(self) -> bool:
        return not self._trust.lost or len(self._automatic) < len(self._own_groups())

    def _unserved(self) -> None:
        if not self._automatic:
            super()._unserved()
        elif not self._trust.lost:
            self._trust = trusting.unserved(self._trust)

    def _reset(self, layers: Sequence[Layer], seen: LayersSeen, closure: Any) -> None:
        """As everywhere; but the next step is the first, if this one shows no pairs of new factors."""
        super()._reset(layers, seen, closure)
        shown = self._watch.first is not None and self._watch.first.h is not None
        for layer in layers:
            group = self._group(layer)
            if group["automatic"] and (not shown or layer in self._memory.broken):
                group["k"] = -1

    def _rate(self, group: Group) -> float:
        return self._factor(group) * self._search.rate if group["automatic"] else super()._rate(group)

    def _factor(self, group: Group) -> float:
        """What a scheduler and the losses so far leave of the steps that are found."""
        return float(group["lr"]) * self._search.left

    def _shrinking(self, group: Group) -> float:
        """α has the units of P here, which differ from layer to layer."""
        if not group["automatic"]:
            return super()._shrinking(group)
        return self._factor(group) * self._pending.share

    def _move(self, loss: Tensor | None, closure: Any) -> LayersSeen | None:
        self._pending.clear()
        return super()._move(loss, closure)

    def _went_wrong(self, sound: bool, *loss: float) -> bool:
        if not self._automatic:
            return False
        self._search = search = self._search._replace(refused=0 if sound else self._search.refused + 1)
        if not sound:  # of one batch that may be the batch's own fault
            return search.open and search.refused >= REFUSED
        return bool(loss) and not self._trust.lost and far_above(search, *loss)

    def _note_loss(self, *loss: float) -> None:
        if self._automatic and loss and not self._trust.lost:
            self._search = with_loss(self._search, *loss)
            self._trust = trusting.with_loss(self._trust, *loss)

    def _undo(self) -> None:
        """Take back the last step, from which nothing has been learnt, as if D̂W had been its gradient.

        What the last batch itself added to the direction is not known any more, so a third to a half of the
        step stays.
        """
        self._memory.stepped = False
        missing = {*self._missing(self._layers)}
        layers = [layer for layer in self._layers if layer not in missing]
        moves, _ = self._moves(layers, lambda layer, gradients, state, group: state["DW"])
        for layer, move in moves.items():
            P = layer.W()
            if self._owns(layer):
                gone = self.state[layer.weight]["last"][0]
                P = (move.P * (gone / move.norm) if move.norm > 0 else move.P).contiguous()
                gone.zero_()
            self._ranks.send(P, self._owners.get(layer))
            layer.add_(P, alpha=1.0)
        self._search = undone(self._search)
        self._forget_norms()

    def _forget_norms(self) -> None:
        """After a step was taken back: norms are kept anew."""
        for group in self._automatic:
            group["norms"] = ()

    def _update(
        self, layers: Sequence[Layer], moves: dict[Layer, Move], seen: LayersSeen, closure: Any
    ) -> None:
        if not self._automatic:
            super()._update(layers, moves, seen, closure)
            return
        due = any(self._is_due(group["k"], group) for group in self._own_groups())
        judged = due and not self._trust.lost
        self._pending.judged = judged
        self._pending.at = trusting.point(self._trust) if judged else 1.0
        if judged and self._others is not None:
            moving = [p for group in self._others.param_groups for p in group["params"] if p.grad is not None]
            self._pending.before.update({p: p.clone() for p in moving})
        for layer in {*self._layers} - {*layers}:
            if layer.weight in self.state:
                self.state[layer.weight]["last"][0].zero_()
        super()._update(layers, moves, seen, closure)
        norms = {layer: move.norm_W for layer, move in moves.items() if move.sound}
        keep_norms(self._by_group, norms)
        self._search = stepped(self._search, judged and self._pending.at == 1)
        if judged:
            self._pending.slopes.extend(self._slopes())
            self._pending.norms.update(norms)
            self._pending.towards_W.extend(towards_W(self._by_group, self._pending.before))

    def _add(self, layer: Layer, P: Tensor, alpha: float, shrinking: float) -> None:
        """As everywhere; P then is the place where W is kept, should it have to be put back."""
        W = layer.W() if self._pending.judged else None
        super()._add(layer, P, alpha, shrinking)
        if W is not None:
            self._pending.before.update(layer.parts(P.copy_(W)))

    def _slopes(self) -> list[Tensor]:
        """⟨∇f, ΔW⟩ of the automatic layers, the same with L2, and of everything that moved."""
        zero = self._layers[0].empty().new_zeros(())
        of_loss, of_decay, of_rest = [zero], [zero], [zero]
        biases = {layer.bias for layer in self._layers}
        for group in self.param_groups:
            automatic = group.get("automatic", False)
            decay = self._decay(group) if automatic else 0.0
            for p in group["params"]:
                if p not in self._pending.before or p.grad is None:
                    continue
                DW = p.grad.to_dense() if p.grad.is_sparse else p.grad
                W, now, DW = (x.flatten().to(zero) for x in (self._pending.before[p], p, DW))
                moved = now - W
                (of_loss if automatic else of_rest).append(torch.linalg.vecdot(DW, moved))
                if decay:
                    share = group["bias_decay"] if p in biases else 1.0
                    of_decay.append(decay * share * torch.linalg.vecdot(W, moved))
        slope, decayed, rest = (torch.stack(terms).sum() for terms in (of_loss, of_decay, of_rest))
        return [slope, slope + decayed, slope + rest]

    @property
    def _by_group(self) -> ByGroup:
        """The automatic groups, each with its layers."""
        return [
            (group, [layer for layer in self._layers if self._group(layer) is group])
            for group in self._automatic
        ]

    def _scales(self, moves: Mapping[Layer, Move]) -> dict[Layer, float]:
        scales = super()._scales(moves)
        own = {layer: move for layer, move in moves.items() if self._group(layer)["automatic"]}
        longer = {layer: 1 / self._weight_of_averages(self._group(layer)) for layer in own}
        usual = {layer: longer[layer] * share for layer, share in self._usual(own).items()}
        reaches = [share for share in usual.values() if share > 0]
        if not reaches:
            return scales
        mean = math.exp(statistics.fmean(map(math.log, reaches)))
        even = {layer: mean / usual[layer] if usual[layer] > 0 else 0.0 for layer in own}
        if self._trust.lost:
            self._search = self._search._replace(rate=WITHOUT_LOSSES / mean)
            self._pending.share = WITHOUT_LOSSES
            return scales | {layer: even[layer] * longer[layer] for layer in own}
        found = self._search.rate * mean or FIRST * TRUSTED / len(own)
        reach = bounded(found, len(own))
        self._search = search = self._search._replace(rate=reach / mean)
        left = within_bounds(reach, len(own)) / reach if reach > 0 else 1.0
        slopes = {layer: even[layer] * longer[layer] ** 2 * move.slope for layer, move in own.items()}
        D = sum(slopes.values())
        scheduled = sum(slope * self._factor(self._group(layer)) for layer, slope in slopes.items())
        left *= left_by_gain(search, search.rate * left * scheduled)
        pending, rate = self._pending, search.rate * left
        pending.share, pending.D = left * reach, D
        pending.gone, pending.scheduled = rate * D, rate * scheduled
        return scales | {layer: even[layer] * longer[layer] * left for layer in own}

    def _weight_of_averages(self, group: Group) -> float:
        """What the weights in P sum up to: averages start from zero (docs/decisions.md, 32 and 34)."""
        return 1 - momentum(group) ** (self._search.steps + 2)

    def _usual(self, moves: Mapping[Layer, Move]) -> dict[Layer, float]:
        """‖P‖ of every layer as a share of its size, the largest of late; kept in its group."""
        usual = {}
        for group, layers in self._by_group:
            before = group["usual"] or (0.0,) * len(layers)
            for layer, old in zip(layers, before, strict=True):
                now = moves[layer].norm / self._size(layer, moves[layer]) if layer in moves else 0.0
                usual[layer] = max(now, FORGOTTEN * old) if now > 0 else old
            group["usual"] = tuple(usual[layer] for layer in layers)
        return {layer: usual[layer] for layer in moves}

    def _size(self, layer: Layer, move: Move) -> float:
        """What steps are shares of: ‖W‖, or without losses that of a usual initialisation, so that weights
        that grow by steps in noise do not grow faster and faster."""
        return math.sqrt(len(layer.weight) / 3) if self._trust.lost else move.size

    @contextlib.contextmanager
    def _on_the_way(self) -> Iterator[None]:
        """With what moved put where the second pass is to look, if that is not the end of the step."""
        before, at = self._pending.before, self._pending.at
        if at == 1:
            yield
            return
        ends = {p: p.detach().clone() for p in before}
        try:
            with torch.no_grad():
                for p, W in before.items():
                    p.copy_(W.lerp(p.to(W.dtype), at))
            yield
        finally:
            with torch.no_grad():
                for p, end in ends.items():
                    p.copy_(end)

    def _check_losses(self, loss: Tensor | float | None) -> None:
        if self._automatic and not self._trust.lost and loss is None:
            raise RuntimeError(
                "lr='auto' judges a step by the loss before and after it: write 'with "
                "optimizer.second_pass(loss) as again:' with the loss of the first pass, and set again.loss "
                "inside to that of the second."
            )

    def _accepts(self, before: Tensor | float | None, after: Tensor | float | None) -> bool:
        pending = self._pending
        if not pending.slopes or self._trust.lost:
            return True
        if before is None or after is None:
            raise RuntimeError(
                "the second pass has ended without its loss, so the step was taken without learning from it: "
                "set again.loss inside 'with optimizer.second_pass(loss) as again:'."
            )
        device = self._layers[0].weight.device
        before, after = torch.as_tensor(before, device=device), torch.as_tensor(after, device=device)
        f0, f1, slope, regularised, of_all, *found = self._mean(
            [before, after, *pending.slopes, *pending.towards_W]
        )
        rate = pending.gone / pending.D if pending.D > 0 else 0.0
        factor = pending.scheduled / pending.gone if pending.gone > 0 else 0.0
        resolution = 4 * torch.finfo(before.dtype).eps * max(abs(f0), abs(f1))
        if self._memory.loss is None:  # a loop without closures tells losses here only
            self._note_loss(f0)
        if pending.at < 1:
            self._note_check(pending.at, f1 - f0, of_all, f0, resolution)
            return True
        note_along(self._by_group, pending.norms, found)
        slope, regularised, of_all = (self._trust.ratio * x for x in (slope, regularised, of_all))
        trial = Trial(rate, factor, pending.D, slope, regularised, of_all, f0, f1, resolution)
        self._search, share = judged(self._search, trial)
        self._trust = trusting.with_verdict(trusting.passed(self._trust), share < 1)
        if share < 1:
            self._forget_norms()
            for p, W in pending.before.items():
                p.copy_(W.lerp_(p.to(W.dtype), share) if share else W)
            for layer in self._layers:
                if layer.weight in self.state:
                    self.state[layer.weight]["last"][0] *= share
        pending.clear()
        return share == 1

    def _check(self, closure: Callable[[], Any]) -> None:
        firsts, memory = dict(self._firsts), self._memory
        rewind = memory.rewind
        while self._pending.at < 1 and not self._trust.lost:
            self._firsts.clear()
            self._look_again(closure)
            memory.stepped, memory.rewind = True, rewind
            self._firsts.update(firsts)
            self._pending.at = trusting.point(self._trust) if self._trust.checks == 1 else 1.0

    def _note_check(self, at: float, change: float, slope: float, loss: float, resolution: float) -> None:
        """Take in a second pass that was run on the way."""
        coarse = at > 0 and any(p.element_size() < 4 for p in self._pending.before)
        found = math.nan if coarse else change  # so short a way is lost in the rounding of such weights
        before = self._trust.ratio
        self._trust = trusting.checked(self._trust, at, found, slope, loss, resolution)
        descent = self._search.descent * self._trust.ratio / before  # of gradients as they now come
        self._search = self._search._replace(descent=descent)

    def _mean(self, numbers: Sequence[Tensor]) -> list[float]:
        """Scalars as numbers, averaged over the processes."""
        like = self._layers[0].empty()
        own = {"": torch.stack([number.detach().to(like).reshape(()) for number in numbers])}
        values: list[float] = self._ranks.means(own, {"": (len(numbers),)}, like)[""].tolist()
        return values
