"""Two sets of weights: z, which a training pass and its step see, and their average x, which all others see.

Between steps the model holds x, so that whoever evaluates, saves or copies it has the average, and nobody has
to switch anything. z is put in its place when a training pass begins: one with gradients, of a module in
training mode (`kfqn.passes.hooks.Ahead`); x is back when the step has been taken. Where no such pass was seen
before a step, its gradients are those of x, and there is no other.

``state[p]["ahead"]`` is z − x while the model holds x, and x while it holds z, as ``ahead`` in a group's
progress says. So what is done to the weights between steps is done to both.

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


@final
class Iterates:
    """z and x of every parameter; ``rules`` are the averages by the place of a group of layers."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.rules = groups, dict[int, WeightAverage]()
        self.stepped = False  # whether a step has been taken since x was put back

    def use(self, rules: Mapping[int, WeightAverage]) -> None:
        """Average by these rules."""
        self.rules = {place: rule for place, rule in rules.items() if rule.averages}
        self.normalising = [m for m in self.groups.model.modules() if _keeps_statistics(m)]

    @torch.no_grad()
    def go_ahead(self) -> None:
        """A training pass begins: put z in the model."""
        behind = [(place, group) for place, group in self._groups() if not group["progress"][KEY]]
        if behind:
            self._reshard()
        for place, group in behind:
            note(group, ahead=True)
            weights, kept = self._kept(place)
            if weights:
                x = [p.clone() for p in weights]  # to have it back to the bit
                torch._foreach_add_(weights, kept)
                torch._foreach_copy_(kept, x)

    @torch.no_grad()
    def fall_back(self) -> None:
        """Put x back in the model, and have it follow z if a step has been taken."""
        stepped, self.stepped = self.stepped, False
        self._reshard()
        for place, group in self._groups():
            weights, kept = self._kept(place)
            if stepped:
                note(group, averaged=group["progress"]["averaged"] + 1)
            if weights and group["progress"][KEY]:
                if stepped:
                    share = self.rules[place].share(group, group["progress"]["averaged"])
                    torch._foreach_lerp_(kept, weights, share)
                apart = torch._foreach_sub(weights, kept)  # z − x
                torch._foreach_copy_(weights, kept)
                torch._foreach_copy_(kept, apart)
            elif weights and stepped:
                torch._foreach_zero_(kept)
            note(group, ahead=False)
            if stepped:
                self._begin(place)

    def _reshard(self) -> None:
        """What `fully_shard` has gathered of the model is not what it is to hold."""
        if any(layer.sharded for layer in self.groups.layers):
            reshard(self.groups.model)

    def _groups(self) -> Iterator[tuple[int, Group]]:
        for place in self.rules:
            yield place, self.groups.param_groups[place]

    def _weights(self, place: int) -> list[Tensor]:
        """The parameters of a group; of the first also those without factors."""
        places = [place, *(self.groups.fallback_places if place == min(self.rules) else ())]
        return [p for at in places for p in self.groups.param_groups[at]["params"]]

    def _kept(self, place: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and statistics of which something is kept, and what.

        The weights without autograd's count of versions, so that a graph made of them before a training pass
        can still be differentiated after it; what is kept follows them to another type or device.
        """
        found = [
            (x, self.groups.state[p], key)
            for p, key, x in self._averaged(place)
            if key in self.groups.state.get(p, {})
        ]
        for x, state, key in found:
            state[key] = state[key].to(x)
        return [local(x).data for x, _, _ in found], [local(state[key]) for _, state, key in found]

    def _averaged(self, place: int) -> Iterator[tuple[Tensor, str, Tensor]]:
        """All that is averaged with a group: in whose state, by what name, and the tensor itself."""
        for p in self._weights(place):
            yield p, KEY, p
        if place == min(self.rules):
            for module in self.normalising:
                for name in STATISTICS:
                    yield module.get_parameter("weight"), name, module.get_buffer(name)

    def _begin(self, place: int) -> None:
        """From the first step of a parameter on something is kept of it: z = x at first.

        Not of one in half precision, whose average would be lost in rounding, nor of one with sparse
        gradients, most of which does not move.
        """
        state = self.groups.state
        for p, key, x in self._averaged(place):
            dense = p.grad is not None and not p.grad.is_sparse
            if dense and key not in state.get(p, {}) and min(p.element_size(), x.element_size()) >= 4:
                state[p][key] = torch.zeros_like(x)


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it has running statistics and a weight of its own, as torch's have unless told not to."""
    own = {
        name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    return own >= {"weight", *STATISTICS}
