"""Two sets of weights: z, which a training pass and its step see, and their average x, which all others see.

Between steps the model holds x, so that whoever evaluates, saves or copies it has the average, and nobody has
to switch anything. z is put in its place when a training pass begins (`kfqn.lending`): one with
gradients, of a module in training mode; x is back when the step has been taken. Where no such pass was seen
before a step, its gradients are those of x, and there is no other.

``state[p]["ahead"]`` is z − x while the model holds x, and x while it holds z, as ``ahead`` in a group's
progress says whenever that is saved. So what is done to the weights between steps is done to both.

Passes without gradients in evaluation mode, what `Kronecker.averaged` encloses, and saved models have x while
the model holds z too: x and z change places for as long, to the bit (`lend`, `give_back`, `averages_of`).

BatchNorm's running statistics go with the weights: what training passes keep of z is averaged for x, in the
state of the module's weight under their names. Without, x would be evaluated with the statistics of z.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

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
        self.awaited = False  # whether it has been put aside between a training pass and its step
        self.lent = dict[Averaged, None]()  # of which the model has x for the time being, and the state z
        self._averaged = dict[int, list[Averaged]]()  # all there are, by the place of a group
        self._parameters = list[Tensor]()  # of which something is kept,
        self._statistics = list[tuple[nn.Module, str]]()  # and of which buffers,
        self._apart = list[Tensor]()  # and what, in this order

    def use(self, rules: Mapping[int, WeightAverage]) -> None:
        """Average by these rules."""
        self.rules = {place: rule for place, rule in rules.items() if rule.averages}
        self.normalising = {m for m in self.groups.model.modules() if _keeps_statistics(m)}
        self.sharded = any(layer.sharded for layer in self.groups.layers)
        self._averaged = {place: [*self._of_group(place)] for place in self.rules}
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

    @property
    def ahead(self) -> bool:
        """Whether the model holds z."""
        return bool(self._parameters) and not self.behind

    def note(self) -> None:
        """Say in the groups what the model holds, before both are copied."""
        if self.lent:
            self.put_aside()
        for _, group in self._groups():
            note(group, ahead=self.ahead)

    def put_aside(self) -> None:
        """Put x back before the state is saved, until the next training pass, or the step of the last one."""
        awaited = self.awaited or self.ahead
        if self.ahead:
            self.fall_back()
            increment_version(self._parameters)  # a graph that waits for its backward pass is of z
        self.awaited = awaited

    def go_on(self) -> None:
        """A step begins: what training passes have seen is to move."""
        self.give_back([*self.lent])
        if self.awaited and self.behind:
            self.go_ahead()

    def lend(self, module: nn.Module) -> list[Averaged]:
        """Put x for z in a module and all below it, where that has not been done: `give_back` takes it.

        Nothing is lent to a part of a model of which another part is in training mode.
        """
        if not self.ahead:
            return []
        if self.sharded and not self.lent:
            reshard(self.groups.model)
        found = [own for own in self._of(module) if own not in self.lent and _is_kept(own, self.groups.state)]
        self._swap(found)
        self.lent |= dict.fromkeys(found)
        return found

    def give_back(self, found: Sequence[Averaged]) -> None:
        """Put z where it was before `lend`, to the bit."""
        found = [own for own in found if own in self.lent]
        if found and self.sharded:
            reshard(self.groups.model)
        self._swap(found)
        for own in found:
            del self.lent[own]

    @property
    def evaluating(self) -> bool:
        """Whether no module with parameters is in training mode, as frozen ones may be for themselves."""
        modules = (m for m in self.groups.model.modules() if m.training)
        return not any(True for module in modules for _ in module.parameters(recurse=False))

    def averages_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of x of a module's own weights and statistics, by their names, where it holds z."""
        state, own = self.groups.state, dict[str, Averaged]()
        if self.ahead:
            own |= {name: (p, KEY, None) for name, p in module.named_parameters(recurse=False)}
            if module in self.normalising:
                own |= {name: (module.get_parameter("weight"), name, module) for name in STATISTICS}
        held = {name: of for name, of in own.items() if of not in self.lent and _is_kept(of, state)}
        return {name: state[of[0]][of[1]].to(_tensor(of), copy=True) for name, of in held.items()}

    @torch.no_grad()
    def fall_back(self) -> None:
        """Put x back in the model, and have it follow z if a step has been taken."""
        self.give_back([*self.lent])
        stepped, self.stepped, self.awaited, ahead = self.stepped, False, False, not self.behind
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
        found = [own for place, _ in self._groups() for own in self._averaged[place] if _is_kept(own, state)]
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

    def _of_group(self, place: int) -> Iterator[Averaged]:
        """All that is averaged with a group."""
        for p in self._weights(place):
            yield p, KEY, None
        if place == min(self.rules):
            for module in self.normalising:
                for name in STATISTICS:
                    yield module.get_parameter("weight"), name, module

    def _of(self, module: nn.Module) -> Iterator[Averaged]:
        """All that is averaged of a module and those below it."""
        for p in module.parameters():
            yield p, KEY, None
        for below in (m for m in module.modules() if m in self.normalising):
            for name in STATISTICS:
                yield below.get_parameter("weight"), name, below

    @torch.no_grad()
    def _swap(self, found: Iterable[Averaged]) -> None:
        """What the model holds and what the state keeps, without autograd's count of versions."""
        for p, key, module in found:
            held, of = _tensor((p, key, module)), self.groups.state[p]
            of[key] = of[key].to(held)
            weights, kept = local(held).data, local(of[key])
            before = weights.clone()
            weights.copy_(kept)
            kept.copy_(before)

    def _kept(self, place: int) -> tuple[list[Tensor], list[Tensor]]:
        """What is averaged and what is kept of it, which follows it to another type or device."""
        state = self.groups.state
        found = [(_tensor(own), *own) for own in self._averaged[place] if _is_kept(own, state)]
        for x, p, key, _ in found:
            state[p][key] = state[p][key].to(x)
        return [local(x).data for x, _, _, _ in found], [local(state[p][key]) for _, p, key, _ in found]

    def _begin(self, place: int) -> None:
        """From the first step of a parameter on something is kept of it: z = x at first.

        Not of one in half precision, whose average would be lost in rounding, nor of one with sparse
        gradients, most of which does not move.
        """
        state = self.groups.state
        for own in self._averaged[place]:
            p, key, _ = own
            if p.grad is None or p.grad.is_sparse or _is_kept(own, state):
                continue
            x = _tensor(own)
            if min(p.element_size(), x.element_size()) >= 4:
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
