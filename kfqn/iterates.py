"""Two sets of weights: z, which a training pass and its step see, and their average x, which all others see.

Between steps the model holds x, so that whoever evaluates, saves or copies it has the average, and nobody has
to switch anything. z is put in its place when a training pass begins (`kfqn.passes.hooks.Before`): one with
gradients, of a module in training mode; x is back when the step has been taken. Where no such pass was seen
before a step, its gradients are those of x, and there is no other.

``state[p]["ahead"]`` is z − x while the model holds x, and x while it holds z, as ``ahead`` in a group's
progress says whenever that is saved. So what is done to the weights between steps is done to both.

BatchNorm's running statistics go with the weights: what training passes keep of z is averaged for x, in the
state of the module's weight under their names. Without, x would be evaluated with the statistics of z.
"""

from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn

from kfqn.parameters.groups import Group, Groups, note
from kfqn.parameters.shards import local, reshard
from kfqn.steps.weight_average import WeightAverage

KEY = "ahead"
STATISTICS = ("running_mean", "running_var")  # buffers of modules that normalise by batches

Averaged = tuple[Tensor, str, nn.Module | None]  # in whose state, by what name; of a statistic the module


@final
class Iterates:
    """z and x of every parameter; ``rules`` are the averages by the place of a group of layers."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.rules = groups, dict[int, WeightAverage]()
        self.stepped = False  # whether a step has been taken since x was put back
        self.behind = False  # whether there is a z that the model does not hold
        self._parameters = list[Tensor]()  # of which something is kept,
        self._statistics = list[tuple[nn.Module, str]]()  # and of which buffers,
        self._apart = list[Tensor]()  # and what, in this order

    def use(self, rules: Mapping[int, WeightAverage]) -> None:
        """Average by these rules."""
        self.rules = {place: rule for place, rule in rules.items() if rule.averages}
        self.normalising = [m for m in self.groups.model.modules() if _keeps_statistics(m)]
        self.sharded = any(layer.sharded for layer in self.groups.layers)
        self._prepare(ahead=any(group["progress"][KEY] for _, group in self._groups()))

    def go_ahead(self) -> None:
        """A training pass begins: put z in the model. Compilers trace it.

        The weights without autograd's count of versions, so that a graph made of them before a training pass
        can still be differentiated after it.
        """
        self.behind, kept = False, self._apart
        tensors = self._parameters + [getattr(module, name) for module, name in self._statistics]
        if self.sharded:
            reshard(self.groups.model)  # what `fully_shard` has gathered is not what the model is to hold
            tensors, kept = [*map(local, tensors)], [*map(local, kept)]
        with torch.no_grad():
            weights = [x.data for x in tensors]
            apart = [own.to(x) for x, own in zip(weights, kept, strict=True)]
            x = [x.clone() for x in weights]  # to have it back to the bit
            torch._foreach_add_(weights, apart)
            torch._foreach_copy_(kept, x)

    def note(self) -> None:
        """Say in the groups what the model holds, before that is saved."""
        for _, group in self._groups():
            note(group, ahead=bool(self._parameters) and not self.behind)

    @torch.no_grad()
    def fall_back(self) -> None:
        """Put x back in the model, and have it follow z if a step has been taken."""
        stepped, self.stepped, ahead = self.stepped, False, not self.behind
        if self.sharded:
            reshard(self.groups.model)
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
        found = [own for place, _ in self._groups() for own in self._averaged(place) if _is_kept(own, state)]
        parameters = [own for own in found if own[2] is None]
        statistics = [own for own in found if own[2] is not None]
        self._parameters = [p for p, _, _ in parameters]
        self._statistics = [(module, key) for _, key, module in statistics if module is not None]
        self._apart = [state[p][key] for p, key, _ in (*parameters, *statistics)]
        self.behind = bool(found) and not ahead
        self.note()

    def _groups(self) -> Iterator[tuple[int, Group]]:
        for place in self.rules:
            yield place, self.groups.param_groups[place]

    def _weights(self, place: int) -> list[Tensor]:
        """The parameters of a group; of the first also those without factors."""
        places = [place, *(self.groups.fallback_places if place == min(self.rules) else ())]
        return [p for at in places for p in self.groups.param_groups[at]["params"]]

    def _averaged(self, place: int) -> Iterator[Averaged]:
        """All that is averaged with a group."""
        for p in self._weights(place):
            yield p, KEY, None
        if place == min(self.rules):
            for module in self.normalising:
                for name in STATISTICS:
                    yield module.get_parameter("weight"), name, module

    def _kept(self, place: int) -> tuple[list[Tensor], list[Tensor]]:
        """What is averaged and what is kept of it, which follows it to another type or device."""
        state = self.groups.state
        found = [(_tensor(own), *own) for own in self._averaged(place) if _is_kept(own, state)]
        for x, p, key, _ in found:
            state[p][key] = state[p][key].to(x)
        return [local(x).data for x, _, _, _ in found], [local(state[p][key]) for _, p, key, _ in found]

    def _begin(self, place: int) -> None:
        """From the first step of a parameter on something is kept of it: z = x at first.

        Not of one in half precision, whose average would be lost in rounding, nor of one with sparse
        gradients, most of which does not move.
        """
        state = self.groups.state
        for own in self._averaged(place):
            p, key, _ = own
            x, dense = _tensor(own), p.grad is not None and not p.grad.is_sparse
            if dense and not _is_kept(own, state) and min(p.element_size(), x.element_size()) >= 4:
                state[p][key] = torch.zeros_like(x)


def _tensor(own: Averaged) -> Tensor:
    p, key, module = own
    return p if module is None else module.get_buffer(key)


def _is_kept(own: Averaged, state: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    p, key, _ = own
    return key in state.get(p, {})


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it has running statistics and a weight of its own, as torch's have unless told not to."""
    own = {
        name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    return own >= {"weight", *STATISTICS}
