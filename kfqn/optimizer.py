"""The step that every method here takes: look at a mini-batch, move the weights, look again, learn.

What differs between the methods is left to a few holes: what is watched, the state a layer
starts with, the direction, and what is learnt of the two factors.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from kfqn.capture import Look
from kfqn.factors import LayersSeen
from kfqn.layers import Layer
from kfqn.moves import Move, are_finite
from kfqn.second_pass import Rewind, start_of
from kfqn.update import UpdatingOptimizer


def _nothing() -> None:
    """Without a closure that is put back where a pass through the model starts."""


@dataclass
class Memory:
    """What has to be known from the first pass of a step to the end of its second.

    One object that is changed in place: Lightning hands out optimizers that share its attributes, but
    not what is assigned to them later.
    """

    loss: Tensor | None = None  # of the first pass, if a closure told
    rewind: Rewind = _nothing  # to where the closure started
    rewinds: list[Rewind] = field(default_factory=list)  # to where each pass through the model started
    since: int = 0  # the first micro-batch that the closure runs, and so will run again
    stepped: bool = False  # whether there was a step since the last second pass
    used_once: set[Layer] = field(default_factory=set)  # in the last pass that was learnt from
    whole: bool = False  # whether second passes can do with no less than the first
    broken: set[Layer] = field(default_factory=set)  # what has to start anew, but could not in the last step

    def forget_starts(self) -> None:
        """Let go of copies of buffers."""
        self.rewind = _nothing
        self.rewinds.clear()


class KroneckerOptimizer(UpdatingOptimizer):
    """An optimizer with two Kronecker factors a layer, which looks at each mini-batch twice.

    A step of one process waits for the device once, to see that loss, gradients and directions are sound,
    when all of them have been asked for.
    """

    def _begin(self) -> None:
        super()._begin()
        self._memory = Memory()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._watch.forget()
        self._memory.stepped = False
        self._memory.used_once.clear()

    @abstractmethod
    def _check_closure(self, closure: Any) -> None:
        """Raise TypeError or ValueError for a closure that cannot be used, before it is called."""

    @abstractmethod
    def _learn(self, seen: LayersSeen, closure: Any) -> None:
        """After the step: look again with the closure if there is one, and take in both looks."""

    @overload  # type: ignore[override]
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...

    @overload
    def step(self, closure: Callable[[], Tensor | None] | None) -> Tensor | None: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | None] | None = None) -> Tensor | None:
        """One step: a pass, the update of the weights, a second pass, the update of curvature.

        ``closure`` clears the gradients, computes the loss as a mean over the batch,
        calls ``backward`` and returns the loss; `kfqn.closure` makes one. It is run twice (three times in
        KFAC's first step without a warm start, and now and then to check losses that judge steps) and must
        use the same batch every time; what else it must
        and may do: `kfqn.closure`. All runs but the first leave no trace in the model (`kfqn.second_pass`).
        Several forward passes, each followed by its backward pass, are micro-batches of one batch. A
        layer that the batch gives no gradient is left as it is, and of an empty batch all are.

        Without a closure the gradients are those that are there, and nothing is learnt before `second_pass`.

        A step whose loss or gradients are not finite is refused: weights and state stay as they are,
        and it is counted, with a warning the first time; with ``error_if_nonfinite`` it raises
        FloatingPointError instead.

        Returns the loss of the first call. Raises TypeError for a closure that cannot be used
        or returns no tensor, RuntimeError if no layer ran or none got a gradient, and
        ValueError for an input of the wrong kind or a loss of more than one number; if the first
        call shows it, weights and state are then as before. If the second fails, the step is taken but
        nothing is learnt from it.
        """
        self._check_factors()
        loss, self._memory.rewind, self._memory.since = None, _nothing, 0
        self._memory.loss = None
        if closure is not None:
            self._check_closure(closure)
            loss = self._first_call(closure)
        if self._watch.empty and not self._watch.ran and self._ranks.size == 1:
            self._step_of_others()
            return loss
        closure = closure if loss is not None else None
        seen = self._move(loss, closure)
        elsewhere = self._ranks.size > 1 and self._watch.first  # another process may have seen layers
        try:
            if seen or (seen is not None and elsewhere):
                self._learn(seen, closure)
        finally:  # the step has been taken
            self._watch.look_first(self._next_look())
        return loss

    def _next_look(self) -> Look | None:
        """What is to be kept of the next first pass, if anything is to be learnt from it."""
        return self._full_look()

    def _first_call(self, closure: Callable[[], Any]) -> Tensor | None:
        """The loss, from a pass that is watched; None from a closure that does nothing, as Lightning's."""
        watch, before = self._watch, self._watch.ran or self._watch.waiting
        watch.ran, self._memory.since = False, watch.next_batch
        if watch.first is not None:  # there will be a second pass
            self._memory.rewind = start_of(self._model, {layer.weight.device for layer in self._layers})
        watch.in_closure = True
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            watch.in_closure = False
        ran = watch.ran
        watch.ran |= before and (watch.empty or loss is None)  # of micro-batches before
        if loss is None and not ran:
            self._memory.rewind, self._memory.since = _nothing, 0
            return None
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure given to {self._name}.step must return the loss as a tensor, but "
                f"returned {type(loss).__name__}: end it with 'return loss'."
            )
        if loss.numel() != 1:
            raise ValueError(
                f"the closure given to {self._name}.step must return the loss as one number, its mean over "
                f"the batch, but returned a tensor of shape {tuple(loss.shape)}: end it with 'return "
                "loss.mean()'."
            )
        if before and not (ran or watch.empty or watch.blind):
            raise RuntimeError(
                f"the closure given to {self._name}.step ran no layer, while the model ran before it: the "
                "closure is called again after the step, so compute the loss and call backward inside it, or "
                "call step() without one."
            )
        self._memory.loss = loss.detach()
        return loss

    def _step_of_others(self) -> None:
        """The step of a batch that was empty for every layer: only other parameters may have gradients."""
        self._watch.forget()
        self._memory.stepped = False
        if self._others is not None and self._goes_on(float(self._signs(None, [])), None, []):
            self._others.step()

    def _move(self, loss: Tensor | None, closure: Any) -> LayersSeen | None:
        """Update the weights; what was seen of every layer that moved, or None if nothing did."""
        ran, seen = self._watch.ran, self._watch.take()
        if closure is not None and not seen and not ran:
            raise RuntimeError(self._nothing_ran)
        self._meet()
        layers = self._with_gradients(seen)
        if closure is not None and not layers:
            raise RuntimeError(
                f"the closure given to {self._name}.step left no gradient on any layer: call "
                "loss.backward() inside it, on a loss that depends on the model."
            )
        self._memory.stepped = bool(layers)
        missing, signs = self._missing(layers), self._signs(loss, layers)
        moves, told = self._moves([] if missing else layers, signs=signs)
        finite, *known = told
        sound = self._goes_on(finite, loss, layers)
        if self._went_wrong(sound, *known):
            moves.clear()  # what takes their place are steps back
            self._undo()
            return None
        if not sound:
            return None
        if missing:
            self._start_from(missing, seen, closure)
            moves, _ = self._moves(layers)
        self._note_loss(*known)
        self._update(layers, moves, seen, closure)
        return {layer: seen[layer] for layer in layers if layer in seen}

    def _with_gradients(self, seen: LayersSeen) -> list[Layer]:
        """The layers that got a gradient."""
        layers = []
        for layer in self._layers:
            gradients = layer.gradients()
            if not gradients:
                continue
            unseen = layer not in seen and self._watch.first and self._ranks.size == 1
            if unseen and not any(g.any() for g in gradients):
                if not self.state.get(layer.weight):  # torch.distributed.checkpoint asks for states this way
                    self._enter(layer, self._empty_state(layer))
                continue
            layers.append(layer)
        return layers

    def _values(self, loss: Tensor | None, layers: Iterable[Layer]) -> list[Tensor]:
        """All that has to be finite."""
        others = self._others.param_groups if self._others is not None else []
        gradients_of_others = (p.grad for group in others for p in group["params"])
        values = [g.coalesce().values() if g.is_sparse else g for g in gradients_of_others if g is not None]
        values = [g for g in values if g.numel()]
        values += (g for layer in layers for g in layer.gradients())
        return values + ([] if loss is None else [loss.detach()])

    def _signs(self, loss: Tensor | None, layers: Iterable[Layer]) -> Tensor:
        """1 if all is finite, as far as a norm tells, and the loss, if a closure told."""
        like = self._layers[0].empty()
        signs = [are_finite(self._values(loss, layers) or [like.new_zeros(1)], 2.0)]
        signs += [] if loss is None else [loss.detach().reshape(())]
        return torch.stack([sign.to(like) for sign in signs])

    def _goes_on(self, finite: float, loss: Tensor | None, layers: Iterable[Layer]) -> bool:
        """Whether the step can be taken, given the mean over the processes of the first of `_signs`.

        If not, that is counted, or FloatingPointError raised.
        """
        if finite == 1 or self._ranks.all(are_finite(self._values(loss, layers), math.inf)):
            return True
        message = "the loss or a gradient is not finite, so the step was refused and nothing was changed"
        if self._error_if_nonfinite:
            raise FloatingPointError(f"{message}: look for too large a learning rate or bad data.")
        for group in self._own_groups():
            group["refused"] += 1
        self._warn(f"{message}; this is said once, and diagnostics() counts how often it happens.")
        return False

    def _went_wrong(self, sound: bool, *loss: float) -> bool:
        """Whether this batch, its loss if told, shows that the last step is to be taken back."""
        return False

    def _undo(self) -> None:
        """Take the last step back."""

    def _note_loss(self, *loss: float) -> None:
        """Take in the loss of a batch whose step is taken, if a closure told."""

    def _update(
        self, layers: Sequence[Layer], moves: dict[Layer, Move], seen: LayersSeen, closure: Any
    ) -> None:
        """Move every parameter; a layer whose factors turn out to be broken starts anew first, if it can."""
        waiting = self._memory.broken if self._ranks.size == 1 else set()
        broken = [layer for layer, move in moves.items() if not move.sound or layer in waiting]
        self._memory.broken.clear()
        if broken:
            self._reset(broken, seen, closure)
            moves |= self._moves(broken)[0]
        sound = {layer: move for layer, move in moves.items() if move.sound}  # the rest is left where it is
        scales = self._scales(sound)
        for group in self._own_groups():
            group["k"] += bool(layers)
        self._keep_averages([layer for layer in layers if self._owns(layer)])
        rates = self._rates()
        for layer, move in sound.items():
            self._apply(layer, move, rates[self._places[layer]], scales[layer])
        self._note_moves(
            {layer: rates[self._places[layer]] * scales[layer] * move.norm for layer, move in sound.items()}
        )
        if self._others is not None:
            self._others.step()

    def _reset(self, layers: Sequence[Layer], seen: LayersSeen, closure: Any) -> None:
        """Start these layers anew from this mini-batch; what is averaged over steps is kept.

        One whose inputs are too large even for that keeps its state, and does not move; nor does one whose
        inputs are not there, which starts anew from the next mini-batch.
        """
        for group in (self._group(layer) for layer in layers):
            group["k"] = 0  # young factors: see `curvature_interval`
        for layer in layers:
            self._memory.broken.add(layer)
            old = self.state.get(layer.weight, {})
            kept = {key: old[key] for key in ("DW", "lambda_G", "step", "counts", "last") if key in old}
            with contextlib.suppress(ValueError):
                if (layer in seen and seen[layer].has_inputs) or self._ranks.size > 1:
                    self._start_from([layer], seen, closure)
                    if self._owns(layer):
                        self._enter(layer, self.state[layer.weight] | kept)
                        self._count(self.state[layer.weight], {"resets": 1})
                    self._memory.broken.discard(layer)
        self._warn(
            f"the factors of {layers[0]} were no longer finite and positive and start anew; this is said "
            "once, and diagnostics() counts how often it happens."
        )
