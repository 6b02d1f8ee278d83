"""Learning from the change between two passes of the same loss: what the quasi-Newton methods share."""

import contextlib
import math
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfqn.capture import EarlyReduction, Look
from kfqn.closures import Closure
from kfqn.curvature import (
    mean_activation,
    mean_preactivation,
    mean_preactivation_gradient,
    second_moment,
)
from kfqn.factors import LayersSeen, Moments, inverse_factor
from kfqn.groups import Group, State
from kfqn.inputs import Inputs
from kfqn.layers import Layer
from kfqn.optimizer import KroneckerOptimizer
from kfqn.pairs import Early, First, averaged_pairs, changes
from kfqn.rows import Rows
from kfqn.second_pass import second_pass, unmoved_buffers
from kfqn.seen import Seen

_PATIENCE = 10  # steps until the gap between those that are learnt from may grow by one


@dataclass
class Again:
    """What `second_pass` gives: a place for the loss inside it."""

    loss: Tensor | float | None = None


class TwoPassOptimizer(KroneckerOptimizer):
    """The loop of Algorithm 2 and of Algorithm 3: the same loss before and after the step.

    H_G learns how h̄ and Dh̄ change from one pass to the other, H_A from the inputs of the first. A layer's
    first state has H_A = (A + λ_A I)⁻¹ and zeros elsewhere.

    The first pass is any forward and backward pass, the second one either that of the closure given to
    `step`, or what is done inside `second_pass`.
    """

    _counted = ("resets", "A taken", "A skipped", "G taken", "G damped", "G skipped")
    _first_look = Look(inputs=True, h=mean_preactivation, Dh=mean_preactivation_gradient)

    def _begin(self) -> None:
        super()._begin()
        self._firsts: dict[Layer, First] = {}  # of a step whose second pass is to come; changed in place
        early: EarlyReduction = weakref.WeakMethod(self._early)
        self._watch.look_first(replace(self._first_look, early=early))

    def _lambda_A(self, moments: Moments, group: Group) -> float | Tensor:
        """What is added to the A that H_A starts from, (*g, 1) or one number."""
        return math.sqrt(group["damping"])

    @abstractmethod
    def _probe(self, mean_a: Tensor, state: State) -> Tensor:
        """What A is asked for, (*g, C), given ā (*g, C): the s whose product A s is wanted."""

    @abstractmethod
    def _answer(self, layer: Layer, a: Tensor, s: Tensor) -> Tensor:
        """A s of an input of the layer, or what else of A the method learns from."""

    @abstractmethod
    def _answer_shape(self, layer: Layer) -> tuple[int, ...]:
        """The shape of `_answer`."""

    @abstractmethod
    def _learn_A(self, s: list[Tensor], answers: list[Tensor], states: list[State], group: Group) -> None:
        """Take in s and `_answer` of the first pass, after the step, for layers of one group."""

    @abstractmethod
    def _learn_G(self, s: list[Tensor], y: list[Tensor], states: list[State], group: Group) -> None:
        """Take in the averaged pairs s_G, y_G, (*g, I); zeros if this step's was not finite."""

    def _note_G(self, states: list[State], rows: Rows, ratio: Tensor, damped: Tensor, used: Tensor) -> None:
        """Count what became of every pair; ``ratio`` is sᵀy/yᵀHy before damping. All (rows, 1)."""
        self._count_rows(states, rows, {"G taken": used, "G damped": damped, "G skipped": ~used})
        ratio = ratio.nan_to_num(0.0)  # 0/0 where nothing changes
        kept = [state["last"][1] for state in states]
        least = [
            of_layer[0, 0] if len(of_layer) == 1 else of_layer.min() for of_layer in rows.by_layer(ratio)
        ]
        torch._foreach_copy_(kept, least)

    @abstractmethod
    def _start_G(self, state: State) -> None:
        """Turn what the state holds of H_G, zeros so far, into H_G = I, in place."""

    def _check_closure(self, closure: Any) -> None:
        if not callable(closure):
            raise TypeError(
                f"{self._name}.step takes a closure that clears the gradients, computes the loss, "
                f"calls backward and returns the loss, but got {type(closure).__name__}."
            )

    def _moment_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        inputs = self._inputs(layer)
        return {"A": (*inputs.groups, inputs.columns, inputs.columns), "vectors": ()}

    def _inputs(self, layer: Layer) -> Inputs:
        """The layer's inputs as H_A acts on them, cut into blocks where A would be too large."""
        return layer.inputs.in_blocks(self._group(layer).get("max_factor_size"))

    def _moments(self, record: Seen) -> Moments:
        """A of what was seen, or its blocks, and of how many a_t it is."""
        inputs = self._inputs(record.layer)
        A = record.sum(lambda use: second_moment(inputs, record.input(use)))
        return {"A": A, "vectors": A.new_full((), record.vectors)}

    def _first_moments(self, seen: LayersSeen, closure: Any) -> dict[Layer, Moments]:
        with self._full_precision():
            return {layer: self._moments(record) for layer, record in seen.items()}

    def _batch_moments(self, batch: Any) -> dict[Layer, tuple[Moments, int]]:
        with unmoved_buffers(self._model), self._watch.looking(Look(inputs=True)) as seen:
            if isinstance(batch, Closure):
                batch.output()
            else:
                self._model(*batch if isinstance(batch, tuple | list) else (batch,))
        with self._full_precision():
            return {layer: (self._moments(record), record.data) for layer, record in seen.items()}

    def _start(self, layer: Layer, moments: Moments, group: Group) -> State:
        A, shapes = moments["A"], self._shapes(layer, group)
        zeros = {key: A.new_zeros(shape) for key, shape in shapes.items() if key != "H_A"}
        state = {"H_A": inverse_factor(layer, A, self._lambda_A(moments, group), "H_A")} | zeros
        self._start_G(state)
        return state

    @property
    def second_pass_due(self) -> bool:
        """Whether a second pass over the last step's batch is learnt from (``curvature_interval``)."""
        return bool(self._firsts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._firsts.clear()

    def _looks_next(self) -> bool:
        due = any(self._is_due(group["k"], group) for group in self._own_groups())
        return due or bool(self._missing(self._layers))

    def _learn(self, seen: LayersSeen, closure: Any) -> None:
        groups = {layer: self._group(layer) for layer in seen}
        self._memory.used_once.clear()
        self._memory.used_once.update(layer for layer, record in seen.items() if len(record.uses) == 1)
        seen = {
            layer: record
            for layer, record in seen.items()
            if layer not in self._memory.broken and self._is_due(groups[layer]["k"] - 1, groups[layer])
        }
        if self._firsts and closure is None:
            self._warn(
                "step() was called again without a second pass over the batch of the last step, so nothing "
                "is learnt about curvature: run 'with optimizer.second_pass(): loss_fn(model(x), y)"
                ".backward()' after each step, or give step a closure."
            )
        with self._full_precision():
            self._firsts.clear()
            self._firsts.update(self._first_of(seen))
        starts = {use.start for record in seen.values() for use in record.uses if use.start is not None}
        if closure is not None:  # which runs as a whole from where it started
            starts.clear()
        self._memory.rewinds[:] = [rewind for _, rewind in sorted(starts, key=lambda start: start[0])]
        for record in seen.values():
            record.let_go()
        if closure is not None and self._firsts:
            with self.second_pass(self._memory.loss) as again:
                again.loss = closure()

    def _first_of(self, seen: LayersSeen) -> dict[Layer, First]:
        """What the first pass says of every layer, over all processes."""
        layers, like = self._layers, self._layers[0].empty()
        cut = {layer: self._inputs(layer) for layer in layers}
        columns = {layer: (*inputs.groups, inputs.columns) for layer, inputs in cut.items()}
        rows = {layer: (*layer.groups, layer.rows) for layer in layers}
        again = {layer: record.since(self._memory.since) for layer, record in seen.items()}
        again = {layer: record for layer, record in again.items() if record.uses}
        own = {(layer, "a"): self._mean_a(seen[layer]) for layer in again}
        own |= {(layer, "h"): record.h() for layer, record in again.items()}
        own |= {(layer, "Dh"): record.Dh() for layer, record in again.items()}
        shapes = {(layer, "a"): columns[layer] for layer in layers}
        shapes |= {(layer, key): rows[layer] for key in ("h", "Dh") for layer in layers}
        means = self._ranks.means(own, shapes, like)
        known = [layer for layer in layers if (layer, "h") in means]
        probes = {
            layer: self._probe(means[layer, "a"], self.state[layer.weight])
            for layer in known
            if layer.weight in self.state and (layer not in again or again[layer].has_inputs)
        }
        probes |= {
            layer: record.uses[0].early.like(layer).s
            for layer, record in again.items()
            if not record.has_inputs
        }
        probes = self._ranks.means(probes, columns, like)
        answers = {layer: self._answers(seen[layer], probes[layer]) for layer in known if layer in again}
        answers = self._ranks.means(answers, {layer: self._answer_shape(layer) for layer in layers}, like)
        factors = {layer: seen[layer].data / record.data for layer, record in again.items()}
        return {
            layer: First(
                means[layer, "h"], means[layer, "Dh"], probes[layer], answers[layer], factors.get(layer, 1.0)
            )
            for layer in known
        }

    def _mean_a(self, record: Seen) -> Tensor:
        """ā, (*g, C)."""
        inputs = self._inputs(record.layer)
        return record.mean(
            lambda use: (
                use.early.like(record.layer).a
                if use.early is not None
                else mean_activation(inputs, record.input(use))
            )
        )

    def _answers(self, record: Seen, s: Tensor) -> Tensor:
        """`_answer` of all the layer's inputs."""
        return record.sum(
            lambda use: (
                use.early.like(record.layer).As
                if use.early is not None
                else self._answer(record.layer, record.input(use), s)
            )
        )

    def _early(self, seen: Seen, a: Tensor) -> Early | None:
        """What is learnt from an input when its gradient arrives, so that nobody has to hold the input.

        Only where ā and A are likely to be this input's alone, because the layer was used once in the last
        pass that was learnt from, by one process. If it is used again after all, A is asked for the s of the
        first use, with which H_A learns no less.
        """
        first = seen.uses[0].early if seen.uses else None
        if first is None and (seen.uses or not self._likely_alone(seen.layer)):
            return None
        layer, state = seen.layer, self.state[seen.layer.weight]
        with torch.no_grad(), self._full_precision():
            a = a.to(layer.dtype)
            mean_a = mean_activation(self._inputs(layer), a)
            s = first.s if first is not None else self._probe(mean_a, state)
            return Early(mean_a, s, self._answer(layer, a, s))

    def _likely_alone(self, layer: Layer) -> bool:
        """Whether the next use of a layer is likely to be all that its H_A learns from."""
        H_A, group = self.state.get(layer.weight, {}).get("H_A"), self._group(layer)
        there = H_A is not None and (H_A.device, H_A.dtype) == (layer.weight.device, layer.dtype)
        met = self._watch.data_parallel is None or self._process_group is not None
        alone = layer in self._memory.used_once and met and self._ranks.size == 1
        return there and alone and layer not in self._memory.broken and self._is_due(group["k"], group)

    @contextlib.contextmanager
    def second_pass(self, loss: Tensor | float | None = None, *, loss_scale: float = 1.0) -> Iterator[Again]:
        """Inside, run forward and backward again over the batch of the step just taken; it is learnt from.

        For a training loop without closures::

            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if optimizer.second_pass_due:
                with optimizer.second_pass(loss) as again:
                    again.loss = F.cross_entropy(model(x), y)
                    again.loss.backward()

        The pass leaves no trace in the model (`kfqn.second_pass`); dropout draws the masks of the first.
        Micro-batches are run again in the same order. ``loss`` and ``again.loss`` are the losses of the whole
        batch in either pass, of micro-batches their sum; only an automatic step size needs them.
        ``loss_scale`` is the factor that both passes' losses were multiplied with before ``backward``, that
        of a `GradScaler`, whose ``update`` then comes after; ``loss`` and ``again.loss`` are without it.

        Where the step was refused, or skipped by a `GradScaler`, nothing is learnt. Raises RuntimeError if
        no step was taken before, nothing ran inside, or a loss that is needed is missing.
        """
        if not self._memory.stepped and not self._watch.waiting and not self._watch.ran:
            raise RuntimeError(
                "second_pass learns from the step just taken, but there was none since the last: call "
                f"{self._name}.step() first."
            )
        if self._firsts:
            self._check_losses(loss)
        firsts, memory, again = dict(self._firsts), self._memory, Again()
        self._firsts.clear()
        memory.stepped = self._watch.ran = False
        look = replace(self._first_look, inputs=False, frozen=True)
        with second_pass(self._model, memory.rewind), torch.enable_grad(), self._unsynchronised():
            with self._watch.looking(look, memory.rewinds) as seen:
                yield again
        if firsts and not seen and self._ranks.size == 1:
            raise RuntimeError(
                "the second pass ran no layer, so the step was taken without learning from it: it must do "
                "the same as the first, in a closure as in second_pass()."
            )
        with torch.no_grad(), self._full_precision():
            if self._accepts(loss, again.loss):
                self._learn_from(firsts, seen, loss_scale)

    def _is_due(self, k: int, group: Group) -> bool:
        """Whether step k, counted from 0, is to have a second pass; at first every one has."""
        gap: int = min(group["curvature_interval"], max(1, k // _PATIENCE))
        return k % gap == 0

    def _check_losses(self, loss: Tensor | float | None) -> None:
        """Raise RuntimeError, before the second pass, if it needs the loss of the first."""

    def _accepts(self, before: Tensor | float | None, after: Tensor | float | None) -> bool:
        """Whether the step stays, given the losses of both passes; if not, it has been taken back."""
        return True

    def _learn_from(self, firsts: dict[Layer, First], seen: LayersSeen, loss_scale: float) -> None:
        """Lines 11 to 18 of Algorithm 2 for every layer that both passes have shown."""
        own = {(layer, "h"): record.h() for layer, record in seen.items()}
        own |= {(layer, "Dh"): record.Dh() for layer, record in seen.items()}
        rows = {(layer, key): (*layer.groups, layer.rows) for layer in self._layers for key in ("h", "Dh")}
        means = self._ranks.means(own, rows, self._layers[0].empty())
        for layers in self._alike([layer for layer in firsts if self.state.get(layer.weight)]):
            group, states = self._group(layers[0]), [self.state[layer.weight] for layer in layers]
            known = [firsts[layer] for layer in layers]
            self._learn_A([first.s for first in known], [first.As for first in known], states, group)
            moved = [layer for layer in layers if (layer, "h") in means]
            if moved:
                h, Dh = ([means[layer, key] for layer in moved] for key in ("h", "Dh"))
                changed = changes([firsts[layer] for layer in moved], h, Dh, loss_scale)
                states = [self.state[layer.weight] for layer in moved]
                self._learn_G(*averaged_pairs(*changed, states, group), states, group)

    def _alike(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Those layers that are in one group, on one device and of one type, which are learnt together."""
        found: dict[Any, list[Layer]] = {}
        for layer in layers:
            found.setdefault((self._places[layer], layer.weight.device, layer.dtype), []).append(layer)
        return [*found.values()]
