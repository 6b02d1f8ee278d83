"""Two sets of weights: z, which a training pass and its step see, and their average x, which all others see.

Between steps the model holds x, so that whoever evaluates, saves or copies it has the average, and nobody has
to switch anything. z is put in its place when a training pass begins: one with gradients, of a module in
training mode (`kfqn.passes.hooks.Ahead`); x is back when the step has been taken. Where no such pass was seen
before a step, its gradients are those of x, and there is no other.

``state[p]["ahead"]`` is z − x while the model holds x, and x while it holds z, as ``ahead`` in a group's
progress says whenever that is saved. So what is done to the weights between steps is done to both.
"""

from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from kfqn.parameters.groups import Group, Groups, note
from kfqn.steps.weight_average import WeightAverage

KEY = "ahead"


@final
class Iterates:
    """z and x of every parameter; ``rules`` are the averages by the place of a group of layers."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.rules = groups, dict[int, WeightAverage]()
        self.stepped = False  # whether a step has been taken since x was put back
        self.behind = False  # whether there is a z that the model does not hold
        self._averaged: list[Tensor] = []  # parameters of which something is kept,
        self._apart: list[Tensor] = []  # and what

    def use(self, rules: Mapping[int, WeightAverage]) -> None:
        """Average by these rules."""
        self.rules = {place: rule for place, rule in rules.items() if rule.averages}
        self._prepare(ahead=any(group["progress"][KEY] for _, group in self._groups()))

    def go_ahead(self) -> None:
        """A training pass begins: put z in the model. Compilers trace it.

        The weights without autograd's count of versions, so that a graph made of them before a training pass
        can still be differentiated after it.
        """
        self.behind = False
        with torch.no_grad():
            weights = [p.data for p in self._averaged]
            apart = [kept.to(p) for p, kept in zip(weights, self._apart, strict=True)]
            x = [p.clone() for p in weights]  # to have it back to the bit
            torch._foreach_add_(weights, apart)
            torch._foreach_copy_(self._apart, x)

    def note(self) -> None:
        """Say in the groups what the model holds, before that is saved."""
        for _, group in self._groups():
            note(group, ahead=bool(self._averaged) and not self.behind)

    @torch.no_grad()
    def fall_back(self) -> None:
        """Put x back in the model, and have it follow z if a step has been taken."""
        stepped, self.stepped, ahead = self.stepped, False, not self.behind
        for place, group in self._groups():
            weights, kept = self._kept(place)
            if stepped:
                note(group, averaged=group["progress"]["averaged"] + 1)
            if weights and ahead:
                if stepped:
                    share = self.rules[place].share(group, group["progress"]["averaged"])
                    torch._foreach_lerp_(kept, weights, share)
                apart = torch._foreach_sub(weights, kept)  # z − x
                torch._foreach_copy_(weights, kept)
                torch._foreach_copy_(kept, apart)
            elif weights and stepped:
                torch._foreach_zero_(kept)
            if stepped:
                self._begin(place)
        self._prepare(ahead=False)

    def _prepare(self, ahead: bool) -> None:
        """Where z is for the next training pass, unless the model holds it."""
        state = self.groups.state
        averaged = [p for place, _ in self._groups() for p in self._weights(place) if KEY in state.get(p, {})]
        self._averaged, self._apart = averaged, [state[p][KEY] for p in averaged]
        self.behind = bool(averaged) and not ahead
        self.note()

    def _groups(self) -> Iterator[tuple[int, Group]]:
        for place in self.rules:
            yield place, self.groups.param_groups[place]

    def _weights(self, place: int) -> list[Tensor]:
        """The parameters of a group; of the first also those without factors."""
        places = [place, *(self.groups.fallback_places if place == min(self.rules) else ())]
        return [p for at in places for p in self.groups.param_groups[at]["params"]]

    def _kept(self, place: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of which something is kept, and what, which follows them to another type or device."""
        state = self.groups.state
        weights = [p for p in self._weights(place) if KEY in state.get(p, {})]
        for p in weights:
            state[p][KEY] = state[p][KEY].to(p)
        return [p.data for p in weights], [state[p][KEY] for p in weights]

    def _begin(self, place: int) -> None:
        """From the first step of a parameter on something is kept of it: z = x at first.

        Not of one in half precision, whose average would be lost in rounding, nor of one with sparse
        gradients, most of which does not move.
        """
        state = self.groups.state
        for p in self._weights(place):
            dense = p.grad is not None and not p.grad.is_sparse
            if dense and KEY not in state.get(p, {}) and p.element_size() >= 4:
                state[p][KEY] = torch.zeros_like(p)
