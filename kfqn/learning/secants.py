"""What factors learn after a step: lines 14 to 18 of Algorithm 2, many layers at a time."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfqn.curvature.pairs import First, averaged_pairs, changes
from kfqn.formulas.rows import Rows
from kfqn.formulas.secant import dot, double_damping
from kfqn.parameters.groups import Group, State, lasting
from kfqn.parameters.layers import Layer
from kfqn.parts import Chosen
from kfqn.training import Records, Training


def learn_from(
    training: Training, firsts: Mapping[Layer, First], records: Records, loss_scale: float
) -> None:
    """H_A of every layer, and H_G of those with pairs, given what a second pass has shown of them."""
    groups, with_pairs = training.groups, [layer for layer, first in firsts.items() if first.h_Dh]
    means: Mapping[Any, Tensor] = {}
    if with_pairs:
        own = {(layer, "h"): records[layer].h() for layer in with_pairs if layer in records}
        own |= {(layer, "Dh"): records[layer].Dh() for layer in with_pairs if layer in records}
        rows = {(layer, key): (*layer.groups, layer.rows) for layer in with_pairs for key in ("h", "Dh")}
        means = training.ranks.means(own, rows, groups.layers[0].empty())
    for layers in groups.alike([layer for layer in firsts if training.states.of(layer)]):
        _learn_together(training, layers, firsts, means, loss_scale)


def _learn_together(
    training: Training,
    layers: list[Layer],
    firsts: Mapping[Layer, First],
    means: Mapping[Any, Tensor],
    scale: float,
) -> None:
    """The same for layers of one group; ``means`` are those of the second pass."""
    parts, group = training.of(layers[0]), lasting(training.groups.of(layers[0]))
    states = [training.states.of(layer) for layer in layers]
    moved, before = [], []  # those with a pair, and their h̄ and Dh̄ of the first pass
    for i, layer in enumerate(layers):
        if (h_Dh := firsts[layer].h_Dh) and (layer, "h") in means:
            moved.append(i)
            before.append(h_Dh)
    factors = [firsts[layers[i]].factor / scale for i in moved]

    def learn(given: Sequence[Tensor]) -> list[Tensor]:
        steps, *rest = given
        s, As, h, Dh, h_after, Dh_after = _in_parts(rest, [len(layers)] * 2 + [len(moved)] * 4)
        there = [state | {"step": step} for state, step in zip(states, steps, strict=True)]
        learn_A(training, parts, group, there, s, As)
        if moved:
            pairs, own = changes(h, Dh, h_after, Dh_after, factors), [there[i] for i in moved]
            learn_G(training, parts, group, own, *averaged_pairs(*pairs, own, group))
        return []

    given = [_steps(layers[0], states)]
    given += [firsts[layer].s for layer in layers] + [firsts[layer].As for layer in layers]
    given += [h for h, _ in before] + [Dh for _, Dh in before]
    given += [means[layers[i], key] for key in ("h", "Dh") for i in moved]
    if parts.input.reads:
        learn(given)
        return
    kept = [x for state in states for x in state.values()]
    place = training.groups.places[layers[0]], layers[0].dtype, layers[0].weight.device
    training.graphs.run(("learn", bool(moved), *place), learn, given, kept, (layers, group, moved, factors))


def _steps(layer: Layer, states: Sequence[State]) -> Tensor:
    """The steps that every layer has taken, where factors are."""
    steps = torch.stack([state["step"] for state in states])
    return steps.to(layer.weight.device, layer.dtype, non_blocking=True)


def learn_A(
    training: Training, parts: Chosen, group: Group, states: list[State], s: list[Tensor], As: list[Tensor]
) -> None:
    """Line 14, for layers of one group."""
    lambda_A = parts.damping.lambda_A_rows(group, states)
    rows, used = parts.input.learn_(states, s, As, lambda_A)
    training.states.count_rows(states, rows, {"A taken": used, "A skipped": ~used})


def learn_G(
    training: Training, parts: Chosen, group: Group, states: list[State], s: list[Tensor], y: list[Tensor]
) -> None:
    """Lines 17 and 18, for layers of one group; the averaged pairs s and y are zeros if not finite."""
    output = parts.output
    y, mu2 = parts.damping.units_of_G(group, s, y, states)  # λ_G
    Hy = [*map(output.damps_with, states, y)]
    s, y, Hy = ([*map(output.blocks, x, states)] for x in (s, y, Hy))
    rows = Rows.of(s)
    s_G, y_G, Hy_G = map(rows.join, (s, y, Hy))
    ratio = dot(s_G, y_G) / dot(y_G, Hy_G)
    if parts.curved_only:  # one without curvature says nothing
        s_G, y_G, Hy_G = (torch.where(ratio > 0, x, 0.0) for x in (s_G, y_G, Hy_G))
    damped = double_damping(s_G, y_G, Hy_G, mu1=group["mu1"], mu2=mu2)  # line 17
    used = output.learn_(states, rows, *damped)  # line 18
    flags = {"G taken": used, "G damped": used & (ratio < group["mu1"]), "G skipped": ~used}
    training.states.count_rows(states, rows, flags)
    _note_ratio(states, rows, ratio)


def _note_ratio(states: list[State], rows: Rows, ratio: Tensor) -> None:
    """Keep sᵀy/yᵀHy before damping, (rows, 1), for `diagnostics`: of every layer the smallest."""
    ratio = ratio.nan_to_num(0.0)  # 0/0 where nothing changes
    least = [of_layer[0, 0] if len(of_layer) == 1 else of_layer.min() for of_layer in rows.by_layer(ratio)]
    torch._foreach_copy_([state["last"][1] for state in states], least)


def _in_parts(x: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(x)
    return [[*itertools.islice(rest, size)] for size in sizes]
