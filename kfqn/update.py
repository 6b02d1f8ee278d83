"""The update of the weights: a direction for every layer, how much of it is taken, and taking it."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kfqn.factors import FactoredOptimizer
from kfqn.graphs import Graphs
from kfqn.groups import Group, State, lasting
from kfqn.layers import Layer, average_DW_
from kfqn.moves import Move, judged
from kfqn.settings import momentum

Average = Callable[[Layer, Sequence[Tensor], State, Group], Tensor]


_SMALL = 2**16  # numbers in the weights that are worked on together


def _small_together(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Runs of layers that are small, for fewer calls; a large one alone, because of memory."""
    some: list[Layer] = []
    size = 0
    for layer in layers:
        n = sum(p.numel() for p in layer.parameters())
        if some and size + n > _SMALL:
            yield some
            some, size = [], 0
        some.append(layer)
        size += n
    if some:
        yield some


class UpdatingOptimizer(FactoredOptimizer):
    """W ← W − α P for every layer, with P of the averaged gradient and the two factors.

    Directions are asked for before anything is read: `_moves` waits for the device once.
    """

    def _begin(self) -> None:
        super()._begin()
        self._graphs = Graphs()

    @abstractmethod
    def _average(self, layer: Layer, gradients: Sequence[Tensor], state: State, group: Group) -> Tensor:
        """What the direction is taken of: D̂W, (*g, I, C), with this mini-batch's gradients and `_decay` × W.

        The state is not changed: nobody knows yet whether the step is taken. Like `_direction` it may run on
        a GPU from a record (`kfqn.graphs`), so ``group`` holds `lasting` settings only.
        """

    def _beta(self, group: Group) -> float | None:
        """β of D̂W ← β D̂W + (1 − β) DW, kept as ``DW`` in the state; None if no average is kept."""
        return momentum(group)

    @abstractmethod
    def _direction(self, DW: Tensor, layer: Layer, state: State, group: Group) -> Tensor:
        """P in W ← W − α P, (*g, I, C), from D̂W."""

    def _finish(self, directions: list[Tensor], groups: Sequence[Group]) -> None:
        """Put in the places of several P, given the group of each, what becomes of them."""

    def _momentum(self, group: Group) -> float:
        """What share of the last step is taken again, after clipping; if any, ``DW`` keeps the steps."""
        return 0.0

    def _decay(self, group: Group) -> float:
        """What times W is added to gradients: L2 regularisation."""
        return 0.0 if group["decoupled_weight_decay"] else float(group["weight_decay"])

    def _rate(self, group: Group) -> float:
        """α."""
        return float(group["lr"])

    def _rates(self) -> dict[int, float]:
        """α of every group of layers, by its place."""
        return {place: self._rate(self.param_groups[place]) for place in {*self._places.values()}}

    def _shrinking(self, group: Group) -> float:
        """What decoupled weight decay is a multiple of."""
        return self._rate(group)

    def _moves(
        self, layers: Iterable[Layer], average: Average | None = None, signs: Tensor | None = None
    ) -> tuple[dict[Layer, Move], list[float]]:
        """The steps of these layers before they are taken; P is empty where the factors are elsewhere.

        ``average`` tells what the directions are taken of, if not of `_average`. With ``signs`` also their
        means over the processes, read with the rest.
        """
        directions = {layer: layer.empty() for layer in layers}
        own: dict[Layer | None, Tensor] = {} if signs is None else {None: signs}
        for layer, P, norms in self._directions([*filter(self._owns, directions)], average):
            directions[layer], own[layer] = P, norms
        if not own and self._ranks.size == 1:
            return {}, []
        sizes: dict[Layer | None, int] = {} if signs is None else {None: len(signs)}
        sizes |= {layer: 3 + len(layer.parameters()) for layer in directions}
        shapes = {key: (size,) for key, size in sizes.items()}
        shared = self._ranks.means(own, shapes, self._layers[0].empty())
        numbers = iter(torch.cat([shared[key] for key in sizes]).tolist())
        read = {key: [*itertools.islice(numbers, size)] for key, size in sizes.items()}
        rates = self._rates()
        moves = {
            layer: judged(layer, rates[self._places[layer]], P, *read[layer])
            for layer, P in directions.items()
        }
        return moves, read.get(None, [])

    def _directions(
        self, layers: Sequence[Layer], average: Average | None
    ) -> Iterable[tuple[Layer, Tensor, Tensor]]:
        """P of every layer, with ⟨P, D̂W⟩, ‖P‖, ‖D̂W‖ and the norms of its parameters as one tensor."""
        states = [self.state[layer.weight] for layer in layers]
        groups = {place: lasting(self.param_groups[place]) for place in {*self._places.values()}}
        gradients = {layer: layer.gradients() for layer in layers}

        def of_some(some: Sequence[Layer], rest: Iterator[Tensor]) -> list[Tensor]:
            averages, directions, results = [], [], []
            for layer in some:
                own = [*itertools.islice(rest, len(gradients[layer]))]
                state, group = self.state[layer.weight], groups[self._places[layer]]
                averages.append((average or self._average)(layer, own, state, group))
                directions.append(self._direction(averages[-1], layer, state, group))
            self._finish(directions, [groups[self._places[layer]] for layer in some])
            for layer, DW, P in zip(some, averages, directions, strict=True):
                norms = torch._foreach_norm([P, DW, *layer.parameters()], 2, P.dtype)
                results += [P, torch.stack([torch.linalg.vecdot(P.flatten(), DW.flatten()), *norms])]
            return results

        def of(given: Sequence[Tensor]) -> list[Tensor]:
            rest = iter(given)
            return [x for some in _small_together(layers) for x in of_some(some, rest)]

        given = [*itertools.chain(*gradients.values())]
        with self._full_precision():
            if average is not None:  # a rare step back
                found: Sequence[Tensor] = of(given)
            else:
                kept = [x for layer in layers for x in layer.parameters()]
                kept += [x for state in states for x in state.values()]
                found = self._graphs.run("directions", of, given, kept, (layers, groups))
        return zip(layers, found[::2], found[1::2], strict=True)

    def _scales(self, moves: Mapping[Layer, Move]) -> dict[Layer, float]:
        """How much of each step is taken."""
        scales: dict[Layer, float] = {}
        for group in self._own_groups():
            slopes = {layer: move.slope for layer, move in moves.items() if self._group(layer) is group}
            change, clip = self._rate(group) ** 2 * sum(slopes.values()), group["clip"]
            clipped = clip is not None and change > clip
            scales |= dict.fromkeys(slopes, math.sqrt(clip / change) if clipped else 1.0)
        return scales

    def _keep_averages(self, layers: Sequence[Layer]) -> None:
        """Average the gradients into every D̂W that is kept, before W moves."""
        for group in self._own_groups():
            beta = self._beta(group)
            of_group = [layer for layer in layers if self._group(layer) is group]
            if beta is not None:
                kept = {layer: self.state[layer.weight]["DW"] for layer in of_group}
                average_DW_(kept, beta, self._decay(group), group["bias_decay"])

    def _apply(self, layer: Layer, move: Move, rate: float, scale: float) -> None:
        """W ← W − α P."""
        group, P = self._group(layer), move.P
        momentum = self._momentum(group)
        if not self._owns(layer):
            P = layer.W()
        elif momentum:
            P = self.state[layer.weight]["DW"].mul_(momentum).add_(P, alpha=scale)
        P = P.contiguous()
        self._ranks.send(P, self._owners.get(layer))
        decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        shrinking = self._shrinking(group) * decay if decay else 0.0
        self._add(layer, P, -rate if momentum else -rate * scale, shrinking)

    def _add(self, layer: Layer, P: Tensor, alpha: float, shrinking: float) -> None:
        """W ← (1 − shrinking) W + alpha P."""
        if shrinking:
            layer.shrink_(shrinking, self._group(layer)["bias_decay"])
        layer.add_(P, alpha)

    def _note_moves(self, norms: Mapping[Layer, float]) -> None:
        """Count the step, and keep these ‖α P‖, in the states of the layers that moved."""
        own = [layer for layer in norms if self._owns(layer)]
        if own:
            torch._foreach_add_([self.state[p]["step"] for layer in own for p in layer.parameters()], 1)
            last = [self.state[layer.weight]["last"][0] for layer in own]
            torch._foreach_zero_(last)
            torch._foreach_add_(last, [norms[layer] for layer in own])
