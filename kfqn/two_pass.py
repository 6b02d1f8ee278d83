"""Learning from the change between two passes of the same loss: what the quasi-Newton methods share."""

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfqn.capture import LOSS_ALONE, LOSS_WITHOUT_GRADIENTS, Look
from kfqn.factors import LayersSeen
from kfqn.first_look import LookingOptimizer
from kfqn.groups import Group, State, lasting
from kfqn.layers import Layer
from kfqn.pairs import First, averaged_pairs, changes
from kfqn.rows import Rows
from kfqn.second_pass import second_pass

_NO_SECOND_PASS = (
    "step() was called again without a second pass over the batch of the last step, so nothing is learnt "
    "about curvature: after each step for which "
    "optimizer.second_pass_due is true write 'with optimizer.second_pass(loss) as again: "
    "again.loss = loss_fn(model(x), y); again.loss.backward()', or give step a closure."
)
_NO_GRADIENTS = (
    "This happened in a second pass, where parameters require no gradient and .grad is None: leave out what "
    "only works with them, or write optimizer.second_pass(loss, gradients=True)."
)


@dataclass
class Again:
    """What `second_pass` gives: a place for the loss inside it."""

    loss: Tensor | float | None = None


class TwoPassOptimizer(LookingOptimizer):
    """The loop of Algorithm 2 and of Algorithm 3: the same loss before and after the step.

    H_G learns how h̄ and Dh̄ change from one pass to the other, H_A from the inputs of the first.

    The first pass is any forward and backward pass, the second one either that of the closure given to
    `step`, or what is done inside `second_pass`.
    """

    _counted = ("resets", "A taken", "A skipped", "G taken", "G damped", "G skipped")
    _reads = False  # whether `_learn_A` or `_learn_G` reads numbers back to the host

    def _begin(self) -> None:
        super()._begin()
        self._firsts: dict[Layer, First] = {}  # of a step whose second pass is to come; changed in place

    @abstractmethod
    def _learn_A(self, s: list[Tensor], answers: list[Tensor], states: list[State], group: Group) -> None:
        """Take in s and `_answer` of the first pass, after the step, for layers of one group.

        Like `_learn_G` it may run on a GPU from a record (`kfqn.graphs`), so ``group`` holds `lasting`
        settings only, and a state's ``step`` is where its factors are.
        """

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

    def _check_closure(self, closure: Any) -> None:
        if not callable(closure):
            raise TypeError(
                f"{self._name}.step takes a closure that clears the gradients, computes the loss, "
                f"calls backward and returns the loss, but got {type(closure).__name__}."
            )

    @property
    def second_pass_due(self) -> bool:
        """Whether a second pass over the last step's batch is learnt from (``curvature_interval``)."""
        return bool(self._firsts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._firsts.clear()

    def _pairs_due(self, k: int, group: Group) -> bool:
        """Whether H_G is to learn from step k too, and not H_A alone."""
        return self._is_due(k, group)

    def _next_look(self) -> Look | None:
        groups = self._own_groups()
        if any(self._pairs_due(group["k"], group) for group in groups):
            return self._full_look()
        due = any(self._is_due(group["k"], group) for group in groups) or self._missing(self._layers)
        return self._look_at_inputs() if due else None

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
            self._unserved()
        with self._full_precision():
            self._firsts.clear()
            self._firsts.update(self._first_of(seen, self._paired()))
        starts = {use.start for record in seen.values() for use in record.uses if use.start is not None}
        if closure is not None:  # which runs as a whole from where it started
            starts.clear()
        self._memory.rewinds[:] = [rewind for _, rewind in sorted(starts, key=lambda start: start[0])]
        for record in seen.values():
            record.let_go()
        if closure is not None and self._firsts:
            self._check(closure)
        if self._firsts and not self._needs_second_pass():
            firsts = dict(self._firsts)
            self._firsts.clear()
            with self._full_precision():
                self._learn_from(firsts, {}, 1.0)
        elif closure is not None and self._firsts:
            self._look_again(closure)

    def _needs_second_pass(self) -> bool:
        """Whether more is to be learnt than the first pass has shown of H_A."""
        return True

    def _unserved(self) -> None:
        """step() was called again, and nobody has run the second pass of the last step."""
        self._warn(_NO_SECOND_PASS)

    def _check(self, closure: Callable[[], Any]) -> None:
        """Run the closure as often as is needed before the second pass to know what its losses are worth."""

    def _on_the_way(self) -> contextlib.AbstractContextManager[None]:
        """Where the weights are while the second pass is run."""
        return contextlib.nullcontext()

    def _paired(self) -> set[Layer]:
        """The layers whose H_G is to learn from the step just taken, if its first pass shows h and Dh."""
        if self._watch.first is None or self._watch.first.h is None:
            return set()
        groups = {layer: self._group(layer) for layer in self._layers}
        return {layer for layer, group in groups.items() if self._pairs_due(group["k"] - 1, group)}

    def _look_again(self, closure: Callable[[], Any]) -> None:
        """The second pass of a closure, which need not be made for passes without gradients of weights.

        If it fails in one, because it works with such gradients itself, it is run again with them, and so
        are all second passes from now on.
        """
        firsts, memory, returned = dict(self._firsts), self._memory, False
        paired = [layer for layer, first in firsts.items() if first.h_Dh]
        try:
            with self.second_pass(memory.loss) as again:
                again.loss = closure()
                if not memory.whole and self._watch.misses(paired):
                    raise RuntimeError(_NO_GRADIENTS)
                returned = True
        except Exception:
            if returned or memory.whole:
                raise
            memory.stepped = True
            self._firsts.update(firsts)
            with self.second_pass(memory.loss, gradients=True) as again:
                again.loss = closure()
            memory.whole = True

    @contextlib.contextmanager
    def second_pass(
        self, loss: Tensor | float | None = None, *, loss_scale: float = 1.0, gradients: bool = False
    ) -> Iterator[Again]:
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

        No parameter requires a gradient inside and ``.grad`` stays None; where only the loss is wanted, as
        mostly with an automatic step size, ``backward`` computes nothing. `torch.autograd.grad` with respect
        to anything else works as ever. A loss that needs gradients of parameters has them, at the
        price of a first pass, with ``gradients=True``; they are dropped afterwards.

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
        pairs = any(first.h_Dh for first in firsts.values())
        whole = replace(self._first_look, inputs=False, frozen=True)
        alone = LOSS_ALONE if self._watch.differentiated else LOSS_WITHOUT_GRADIENTS
        frozen = not (gradients or memory.whole)
        look = replace(whole, frozen=frozen) if pairs or not frozen else alone
        with (
            self._on_the_way(),
            second_pass(self._model, memory.rewind, frozen=frozen),
            torch.enable_grad(),
            self._unsynchronised(),
            self._watch.looking(look, memory.rewinds) as seen,
        ):
            try:
                yield again
            except Exception as error:
                if frozen:
                    error.add_note(_NO_GRADIENTS)
                raise
            ran = self._watch.ran
        memory.forget_starts()
        if firsts and not (seen if pairs else ran) and self._ranks.size == 1:
            done = "computed no gradient" if ran else "ran no layer"
            raise RuntimeError(
                f"the second pass {done}, so the step was taken without learning from it: it must do "
                "the same as the first, in a closure as in second_pass()."
            )
        with torch.no_grad(), self._full_precision():
            if self._accepts(loss, again.loss):
                self._learn_from(firsts, seen, float(loss_scale))

    def _check_losses(self, loss: Tensor | float | None) -> None:
        """Raise RuntimeError, before the second pass, if it needs the loss of the first."""

    def _accepts(self, before: Tensor | float | None, after: Tensor | float | None) -> bool:
        """Whether the step stays, given the losses of both passes; if not, it has been taken back."""
        return True

    def _learn_from(self, firsts: dict[Layer, First], seen: LayersSeen, loss_scale: float) -> None:
        """Lines 11 to 14 of Algorithm 2 for every layer, 15 to 18 for those with pairs."""
        paired, means = [layer for layer, first in firsts.items() if first.h_Dh], {}
        if paired:
            own = {(layer, "h"): seen[layer].h() for layer in paired if layer in seen}
            own |= {(layer, "Dh"): seen[layer].Dh() for layer in paired if layer in seen}
            rows = {(layer, key): (*layer.groups, layer.rows) for layer in paired for key in ("h", "Dh")}
            means = self._ranks.means(own, rows, self._layers[0].empty())
        for layers in self._alike([layer for layer in firsts if self.state.get(layer.weight)]):
            self._learn_together(layers, firsts, means, loss_scale)

    def _learn_together(
        self, layers: list[Layer], firsts: Mapping[Layer, First], means: Mapping[Any, Tensor], scale: float
    ) -> None:
        """The same for layers that `_alike` puts together; ``means`` are those of the second pass."""
        group, states = lasting(self._group(layers[0])), [self.state[layer.weight] for layer in layers]
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
            self._learn_A(s, As, there, group)
            if moved:
                pairs, own = changes(h, Dh, h_after, Dh_after, factors), [there[i] for i in moved]
                self._learn_G(*averaged_pairs(*pairs, own, group), own, group)
            return []

        steps = torch.stack([state["step"] for state in states])
        given = [steps.to(layers[0].weight.device, layers[0].dtype, non_blocking=True)]
        given += [firsts[layer].s for layer in layers] + [firsts[layer].As for layer in layers]
        given += [h for h, _ in before] + [Dh for _, Dh in before]
        given += [means[layers[i], key] for key in ("h", "Dh") for i in moved]
        if self._reads:
            learn(given)
            return
        kept = [x for state in states for x in state.values()]
        self._graphs.run(
            ("learn", bool(moved), self._places[layers[0]], layers[0].dtype, layers[0].weight.device),
            learn,
            given,
            kept,
            (layers, group, moved, factors),
        )

    def _alike(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Those layers that are in one group, on one device and of one type, which are learnt together."""
        found: dict[Any, list[Layer]] = {}
        for layer in layers:
            found.setdefault((self._places[layer], layer.weight.device, layer.dtype), []).append(layer)
        return [*found.values()]


def _in_parts(x: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(x)
    return [[*itertools.islice(rest, size)] for size in sizes]
