"""The optimizer: Algorithm 2 of Ren and Goldfarb, the loop, whatever parts it is made of."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfqn import diagnostics, first_pass, starts, update
from kfqn.learning import second_pass
from kfqn.learning.second_pass import Handle
from kfqn.parameters.fallback import Others
from kfqn.parameters.groups import Group, Groups
from kfqn.parameters.layers import Layer
from kfqn.parameters.shards import processes_of
from kfqn.parts import Parts
from kfqn.training import Curvature, Training, shapes_of
from kfqn.weights import averaged_weights

_PROGRESS = {"k": 0, "refused": 0, "drawn": 0, "ahead": False, "averaged": 0}
_DEFAULTS: Group = {"bias_decay": 1.0, "momentum": None, "progress": _PROGRESS}
_SAVED = ("_groups", "_curvature", "_parts", "_shard", "_error_if_nonfinite")


class Kronecker(torch.optim.Optimizer):
    """An optimizer with two Kronecker factors a layer, made of parts: W ← W − α H_G D̂W H_A.

    `KFBFGS`, `KFLBFGS`, `ConvergentKFLBFGS` and `KFAC` choose the parts of a method, and add nothing else.

    Args:
        model: the network, as for `KFBFGS`.
        curvature: what passes are run for curvature, and what is made of them.
        parts: those that are not to be what settings choose (`kfqn.parts.chosen`).
        settings: by name, what a group has unless it is told otherwise; checked already.
        groups, others, process_group, shard_factors, error_if_nonfinite: as for `KFBFGS`.

    A step of one process waits for the device once, to see that loss, gradients and directions are finite,
    when all of them have been asked for; where `kfqn.curvature.input_factor.AveragedRoot` learns, once more
    for each layer. What a group keeps while running is its ``progress``.

    Raises:
        TypeError, ValueError: as `KFBFGS`.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        parts: Parts,
        settings: Mapping[str, Any],
        *,
        groups: Sequence[Mapping[str, Any]],
        others: Others,
        process_group: Any,
        shard_factors: bool,
        error_if_nonfinite: bool,
    ) -> None:
        self._groups = Groups(model, type(self).__name__, others)
        self._curvature, self._parts = curvature, parts
        self._shard, self._error_if_nonfinite = shard_factors, error_if_nonfinite
        super().__init__([{"params": []}], {**_DEFAULTS, **settings})
        self.param_groups.clear()
        self._groups.bind(self)
        self._groups.start(groups, super().add_param_group, self._shapes)
        if shard_factors and any(layer.sharded for layer in self._groups.layers):
            raise ValueError(
                "shard_factors=True is for DistributedDataParallel: of a model that fully_shard has sharded "
                "every process needs all H_A for its own rows, so leave it out."
            )
        if process_group is None and isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        self._begin(process_group, set())

    @overload  # type: ignore[override]
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...

    @overload
    def step(self, closure: Callable[[], Tensor | None] | None) -> Tensor | None: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | None] | None = None) -> Tensor | None:
        """One step: a pass, the update of the weights, the update of curvature.

        ``closure`` clears the gradients, computes the loss as a mean over the batch,
        calls ``backward`` and returns the loss; `kfqn.closure` makes one. It is run once, and again where H_G
        or Γ learns, as with a number for ``lr``, in `KFLBFGS` and in `KFAC` (three times in KFAC's first step
        without a warm start). It must use the same batch every time; what else it must and may do:
        `kfqn.closure`. All runs but the first leave no trace in the model (`kfqn.passes.replay`). Several
        forward passes, each followed by its backward pass, are micro-batches of one batch. A layer that
        the batch gives no gradient is left as it is, and of an empty batch all are.

        Without a closure the gradients are those that are there; H_G, if any, learns in `second_pass`.

        With ``lr="auto"`` training passes see the weights z that steps are taken with; when the step has been
        taken, the model holds their average (`kfqn.iterates`).

        A step whose loss or gradients are not finite is refused: weights and state stay as they are,
        and it is counted, with a warning the first time; with ``error_if_nonfinite`` it raises
        FloatingPointError instead.

        Returns the loss of the first call. Raises TypeError for a closure that cannot be used
        or returns no tensor, RuntimeError if no layer ran or none got a gradient, and
        ValueError for an input of the wrong kind or a loss of more than one number; if the first
        call shows it, weights and state are then as before. If the second fails, the step is taken but
        nothing is learnt from it.
        """
        try:
            return self._step(self.training, closure)
        finally:
            self.training.iterates.fall_back()

    def _step(self, training: Training, closure: Callable[[], Tensor | None] | None) -> Tensor | None:
        """Algorithm 2."""
        loss = first_pass.run(training, closure)  # line 5
        if first_pass.was_empty(training):
            update.step_of_fallback(training, self._error_if_nonfinite)
            return loss
        closure = closure if loss is not None else None
        records, layers = first_pass.collect(training, closure)  # line 6: DW is in .grad
        missing, signs = training.states.missing(layers), first_pass.signs(training, loss, layers)
        proposals, told = update.propose(training, [] if missing else layers, signs=signs)  # lines 7 and 8
        if not first_pass.is_valid(training, told[0], loss, layers, self._error_if_nonfinite):
            training.record_next()
            return loss
        if missing:
            starts.start_from(training, missing, records, closure)  # line 2
            proposals, _ = update.propose(training, layers)
        proposals = starts.with_sound_factors(training, proposals, records, closure)
        update.take(training, layers, proposals)  # line 9
        try:
            moved = {layer: records[layer] for layer in layers if layer in records}
            if moved or (training.ranks.size > 1 and training.recorder.first):  # others may have seen layers
                training.curvature.learn(training, moved, closure)  # lines 10 to 18
        finally:  # the step has been taken
            training.record_next()
        return loss

    @property
    def layers(self) -> list[Layer]:
        """The layers with factors, in the order of their groups."""
        return self._groups.layers

    _layers = layers  # its name before 0.1.0, which scripts outside read

    @property
    def second_pass_due(self) -> bool:
        """Whether H_G would learn from a second pass over the last step's batch: never in `KFBFGS(model)`."""
        return bool(self.training.context.firsts)

    @contextlib.contextmanager
    def second_pass(
        self, loss: Tensor | float | None = None, *, loss_scale: float = 1.0, gradients: bool = False
    ) -> Iterator[Handle]:
        """Inside, run forward and backward again over the batch of the step just taken; it is learnt from.

        For a training loop without closures, where H_G learns: with a number for ``lr``, and in `KFLBFGS`::

            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if optimizer.second_pass_due:
                with optimizer.second_pass(loss) as again:
                    again.loss = F.cross_entropy(model(x), y)
                    again.loss.backward()

        The pass leaves no trace in the model (`kfqn.passes.replay`); dropout draws the masks of the first.
        Micro-batches are run again in the same order. ``loss_scale`` is the factor that both passes' losses
        were multiplied with before ``backward``, that of a `GradScaler`, whose ``update`` then comes after.
        ``loss`` and ``again.loss`` need not be told; they are there for logging.

        No parameter requires a gradient inside and ``.grad`` stays None. `torch.autograd.grad` with respect
        to anything else works as ever. A loss that needs gradients of parameters has them, at the
        price of a first pass, with ``gradients=True``; they are dropped afterwards.

        Where the step was refused, or skipped by a `GradScaler`, nothing is learnt. Raises RuntimeError if
        no step was taken before, or nothing ran inside.
        """
        try:
            with second_pass.again(self.training, loss_scale, gradients) as handle:
                yield handle
        finally:
            self.training.iterates.fall_back()

    @torch.no_grad()
    def warm_start(self, batches: Iterable[Any]) -> None:
        """Start every layer from means over ``batches``: line 2 of Algorithm 2, line 1 of Algorithm 5.

        ``batches`` yields inputs of the model: a tensor, or a tuple or list of positional
        arguments, the batch in the first dimension; or closures from `kfqn.closure`, which
        `KFAC` needs. The model is in the mode it is in; its buffers, BatchNorm's running
        statistics among them, do not move, nor do gradients. Earlier state of the layers that
        ran is dropped. Without a warm start, layers start from their first mini-batch.
        With several processes each gives its own batches, as many as the others.

        Raises ValueError without batches, and RuntimeError if no layer ran; state is
        then as it was.
        """
        starts.warm_start(self.training, batches)

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What the factors of every layer are doing, by the layer's name.

        Counts since the start: ``steps``, and what the method counts, always among them ``resets``, how
        often the layer started anew because a factor was no longer positive. Of the last step:
        ``update``, the norm of α P, and ``ratio``, sᵀy/yᵀHy before damping (of the group where it is
        smallest; 0 for a method without). Now: the Frobenius norm of every factor. The entry ``""`` has
        ``refused``, how many steps were refused because a loss or gradient was not finite.

        With ``lr="auto"`` also ``rate``, the share of a usual norm that layers move by, and ``rejected``, 0.
        """
        return diagnostics.report(self.training)

    def plan(self) -> str:
        """A table of what happens to every trainable parameter, and what compiled code has left out yet."""
        return self._groups.plan(self.training.states.bytes, self.training.recorder.not_in_graphs())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While inside, the model has averaged weights: of ``averaging``, or with ``lr="auto"`` always."""
        with averaged_weights(self.training):
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.training.recorder.drop()

    def add_param_group(self, param_group: Group) -> None:
        """Train more of the model, for example what was frozen when the optimizer was made.

        ``param_group`` has either ``"modules"``, a module of the model, its name, or a list of these,
        each with all below it; or ``"params"``, parameters of the model. Layers whose weight is among
        them get factors, the rest goes to the other parameters and keeps the settings of ``others``; with
        ``"first_order": True`` everything does. What else it holds are settings: of layers, or with
        ``"first_order"`` of the optimizer of the other parameters. A bias is in the group of its weight;
        where the groups given to the constructor have it in another one, that may differ in its
        ``weight_decay`` alone, which the bias keeps (``bias_decay``).

        Raises ValueError, with nothing changed, for a name or module that is not the model's, for
        an unknown setting or a value out of range, if nothing is left to add, for a layer too wide for whole
        factors, and for a model that is sharded.
        """
        if "training" not in self.__dict__:
            super().add_param_group(param_group)  # torch's constructor
            return
        before = {*self._groups.layers}
        self._groups.join([self._groups.read(param_group)], super().add_param_group, self._shapes)
        self.training.refresh()
        self.training.recorder.add([layer for layer in self._groups.layers if layer not in before])
        self.training.recorder.record_first(self.training.full_spec())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state saved by `state_dict`: copied, and in each layer's own `dtype`.

        A history of another size is taken as it is, and its ``history_size`` with it. A setting that a group
        was saved without is this optimizer's default. Raises ValueError, with nothing changed, for the state
        of another method, another model or an earlier version.
        """
        training = self.training
        saved = training.states.loaded(state_dict)
        super().load_state_dict(saved)
        self._groups.bind(self)
        training.states.take(saved)
        if self._groups.fallback is not None:
            self._groups.fallback.__setstate__({})  # what its own class makes of an earlier version's groups
        training.restart()

    def _shapes(self, layer: Layer, group: Group) -> Mapping[str, tuple[int, ...]]:
        return shapes_of(self._curvature, self._parts, layer, group)

    def __getstate__(self) -> dict[str, Any]:
        """All of it, for `copy.deepcopy` and `pickle`; torch would leave the model and the layers out."""
        self.training.iterates.note()
        kept = {key: self.__dict__[key] for key in _SAVED}
        return super().__getstate__() | kept | {"_warned": self.training.warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it here, and our groups do not have it
        self._groups.bind(self)
        if "training" not in self.__dict__:
            self._begin(None, self.__dict__.pop("_warned"))

    def _begin(self, process_group: Any, warned: set[str]) -> None:
        """What is not saved: hooks, and the memory of the last pass."""
        if process_group is None:
            process_group = processes_of(self._groups.layers[0].weight)
        self.training = Training(
            self._groups, self._curvature, self._parts, process_group, self._shard, warned
        )
        self.register_state_dict_pre_hook(_put_aside)


def _put_aside(optimizer: Any) -> None:
    optimizer.training.iterates.put_aside()
