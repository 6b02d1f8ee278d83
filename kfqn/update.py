"""The update of the weights: a proposal for every layer, how much of it is taken, and taking it.

Directions are asked for before anything is read: `propose` waits for the device once.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kfqn import first_pass
from kfqn.formulas.orthogonal import of_own_layers
from kfqn.formulas.rounding import rounded_at_random
from kfqn.parameters.groups import Group, lasting, note
from kfqn.parameters.layers import Layer, average_DW_
from kfqn.parameters.settings import l2, largest_block, shrinkage
from kfqn.parameters.shards import local
from kfqn.state import full_precision
from kfqn.steps.direction import Direction
from kfqn.steps.rule import Proposal
from kfqn.training import Training

_SMALL = 2**16  # numbers in the weights that are worked on together


def propose(
    training: Training, layers: Iterable[Layer], signs: Tensor | None = None
) -> tuple[dict[Layer, Proposal], list[float]]:
    """The steps of these layers before they are taken; P is empty where the factors are elsewhere (line 8).

    With ``signs`` also their means over the processes, read with the rest.
    """
    states, ranks = training.states, training.ranks
    directions = {layer: layer.empty() for layer in layers}
    own: dict[Layer | None, Tensor] = {} if signs is None else {None: signs}
    for layer, P, norms in _directions(training, [*filter(states.owns, directions)]):
        directions[layer], own[layer] = P, norms
    if not own and ranks.size == 1:
        return {}, []
    sizes: dict[Layer | None, int] = {} if signs is None else {None: len(signs)}
    sizes |= {layer: 3 + len(layer.parameters()) for layer in directions}
    shapes = {key: (size,) for key, size in sizes.items()}
    like = training.groups.layers[0].empty()
    shared = ranks.means(own, shapes, like.double() if any(x.sharded for x in directions) else like)
    numbers = iter(torch.cat([shared[key] for key in sizes]).tolist())
    read = {key: [*itertools.islice(numbers, size)] for key, size in sizes.items()}
    for layer in [layer for layer in directions if layer.sharded]:
        read[layer][1:] = map(math.sqrt, read[layer][1:])
    proposals = {x: proposal(x, training.rate(x), P, *read[x]) for x, P in directions.items()}
    return proposals, read.get(None, [])


def proposal(
    layer: Layer, rate: float, P: Tensor, slope: float, norm: float, norm_DW: float, *norms_W: float
) -> Proposal:
    """A positive H has ⟨P, D̂W⟩ ≥ 0, up to rounding; weights must stay in the range of their type."""
    norm_W = math.hypot(*norms_W)
    rounding = math.sqrt(torch.finfo(layer.dtype).eps) * norm * norm_DW
    length, limit = norm_W + rate * norm, torch.finfo(layer.weight.dtype).max
    is_valid = math.isfinite(slope) and slope >= -rounding and length < limit
    return Proposal(P, slope, norm, norm_W, is_valid)


def _directions(training: Training, layers: Sequence[Layer]) -> Iterable[tuple[Layer, Tensor, Tensor]]:
    """P of every layer, with ⟨P, D̂W⟩, ‖P‖, ‖D̂W‖ and the norms of its parameters as one tensor."""
    places, states = training.groups.places, [training.states.of(layer) for layer in layers]
    groups = {place: lasting(training.groups.param_groups[place]) for place in training.chosen}
    gradients = {layer: layer.gradients() for layer in layers}

    def of(given: Sequence[Tensor]) -> list[Tensor]:
        rest, results = iter(given), []
        for some in _small_together(layers):
            own = {layer: [*itertools.islice(rest, len(gradients[layer]))] for layer in some}
            results += _of_some(training, {x: groups[places[x]] for x in some}, own)
        return results

    given = [*itertools.chain(*gradients.values())]
    with full_precision(training.groups.layers):
        if any(layer.sharded for layer in layers):  # what processes exchange is no part of a graph
            found: Sequence[Tensor] = of(given)
        else:
            kept = [x for layer in layers for x in layer.parameters()]
            kept += [x for state in states for x in state.values()]
            found = training.graphs.run("directions", of, given, kept, (layers, groups))
    return zip(layers, found[::2], found[1::2], strict=True)


def _of_some(
    training: Training,
    groups: Mapping[Layer, Group],
    gradients: Mapping[Layer, Sequence[Tensor]],
) -> list[Tensor]:
    """P and norms of each of these layers, in turn (lines 7 and 8)."""
    averages, directions, results = {}, {}, []
    for layer, group in groups.items():
        state = training.states.of(layer)
        averages[layer] = training.of(layer).average.of(layer, gradients[layer], state, group)
        directions[layer] = training.curvature.direction(training, averages[layer], layer)
    alike: dict[tuple[Direction, int | None, int], list[Layer]] = {}
    for layer, group in groups.items():
        split = group.get("split", 1)
        largest = largest_block(group, min(layer.rows // split, layer.columns))
        alike.setdefault((training.of(layer).direction, largest, split), []).append(layer)
    for (direction, largest, split), members in alike.items():
        given, cuts = [directions[layer] for layer in members], [layer.cut for layer in members]
        if split == 1:
            directions.update(zip(members, direction.of(given, largest, cuts), strict=True))
        else:
            parts = direction.of([P.unflatten(-2, (split, -1)) for P in given], largest, cuts)
            directions.update(zip(members, map(of_own_layers, parts), strict=True))
    for layer, DW in averages.items():
        P = directions[layer]
        norms = torch._foreach_norm([P, DW, *layer.held()], 2, P.dtype)
        of_layer = torch.stack([torch.linalg.vecdot(P.flatten(), DW.flatten()), *norms])
        results += [P, _shares(layer, of_layer) if layer.sharded else of_layer]
    return results


def _shares(layer: Layer, numbers: Tensor) -> Tensor:
    """What a process has of ⟨P, D̂W⟩ and of squared norms, as numbers whose means are those of the whole.

    Of a layer without a cut P and D̂W are whole. In float64, whose range squares do not leave.
    """
    shares = numbers.double()
    shares[1:].square_()
    shares[3 if layer.cut is None else 0 :].mul_(layer.processes)
    return shares


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


def take(training: Training, layers: Sequence[Layer], proposals: Mapping[Layer, Proposal]) -> None:
    """W ← W − α P for every layer (line 9), and the step of the fallback; the rules say how much of P."""
    groups = training.groups
    training.states.forget_lengths({*groups.layers} - {*layers})
    shares: dict[Layer, float] = {}
    for rule, members in training.rules:
        rule.begin(members)
        shares |= rule.shares(members, proposals)
    for group in groups.own():
        note(group, k=group["progress"]["k"] + bool(layers))
    keep_averages(training, [layer for layer in layers if training.states.owns(layer)])
    rates = {layer: training.rate(layer) for layer in proposals}
    for layer, own in proposals.items():
        _apply(training, layer, own, rates[layer], shares[layer])
    _note_steps(training, {x: rates[x] * shares[x] * own.norm for x, own in proposals.items()})
    _step_fallback(training)
    training.iterates.stepped = True


def _step_fallback(training: Training) -> None:
    """The step of the parameters without factors, by what the rule of the layers makes of their rate."""
    fallback, place = training.groups.fallback, min(training.chosen)
    if fallback is None:
        return
    scale = training.chosen[place].steps.scale(training.groups.param_groups[place])
    rated = [(group, group["lr"]) for group in fallback.param_groups if "lr" in group]
    for group, rate in rated:
        group["lr"] = scale * rate
    try:
        fallback.step()
    finally:
        for group, rate in rated:
            group["lr"] = rate


def step_of_fallback(training: Training, raises: bool) -> None:
    """The step of a batch that was empty for every layer."""
    fallback = training.groups.fallback
    training.recorder.forget()
    training.context.stepped = False
    if fallback is not None:
        finite = float(first_pass.signs(training, None, []))
        if first_pass.is_valid(training, finite, None, [], raises):
            _step_fallback(training)
            training.iterates.stepped = True


def keep_averages(training: Training, layers: Sequence[Layer]) -> None:
    """Average the gradients into every D̂W that is kept, before W moves (line 7)."""
    for place, parts in training.chosen.items():
        group = training.groups.param_groups[place]
        beta = parts.average.beta(group)
        of_group = [layer for layer in layers if training.groups.places[layer] == place]
        if beta is not None:
            kept = {layer: local(training.states.of(layer)["DW"]) for layer in of_group}
            if parts.average.bfloat16:
                _average_in_bfloat16(kept, beta, group)
            else:
                average_DW_(kept, beta, l2(group), group["bias_decay"])


def _average_in_bfloat16(kept: Mapping[Layer, Tensor], beta: float, group: Group) -> None:
    """The same, a layer at a time because of memory; the noise is that of the step, whoever resumes."""
    generators = {DW.device: torch.Generator(DW.device) for DW in kept.values()}
    for generator in generators.values():
        generator.manual_seed(group["progress"]["k"])
    for layer, DW in kept.items():
        exact = {layer: DW.to(layer.dtype)}
        average_DW_(exact, beta, l2(group), group["bias_decay"])
        DW.copy_(rounded_at_random(exact[layer], generators[DW.device]))


def _apply(training: Training, layer: Layer, own: Proposal, rate: float, share: float) -> None:
    """W ← (1 − decay) W − α P of one layer."""
    group, parts, P = training.groups.of(layer), training.of(layer), own.P
    momentum = parts.average.momentum(group)
    if not training.states.owns(layer):
        P = layer.W()
    elif momentum:
        P = local(training.states.of(layer)["DW"]).mul_(momentum).add_(P, alpha=share)
    P = P.contiguous()
    training.ranks.send(P, training.states.owners.get(layer))
    if share and (decay := shrinkage(group)):
        layer.shrink_(rate * decay, group["bias_decay"])
    layer.add_(P, -rate if momentum else -rate * share)


def _note_steps(training: Training, norms: Mapping[Layer, float]) -> None:
    """Count the step, and keep these ‖α P‖, in the states of the layers that moved."""
    own = [layer for layer in norms if training.states.owns(layer)]
    if own:
        steps = [training.groups.state[p]["step"] for layer in own for p in layer.parameters()]
        torch._foreach_add_(steps, 1)
        last = [training.states.of(layer)["last"][0] for layer in own]
        torch._foreach_zero_(last)
        torch._foreach_add_(last, [norms[layer] for layer in own])
