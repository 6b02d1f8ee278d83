"""What eager code shows of a pass that is recorded: hooks on gradients, each of one call.

So it is known of each call whether its gradient came, and from a backward pass for the weights or for
something else. Where no parameter requires a gradient a graph has to start somewhere: there are gates
(`kfqn.passes.gate`). What compiled code shows: `kfqn.passes.traced`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfqn.passes.gate import gated, is_for
from kfqn.passes.record import Call
from kfqn.passes.spec import PassSpec
from kfqn.passes.traced import Slot, call_of, reduced
from kfqn.runtime.private import in_backward, in_jit_trace, in_transform

_HIDES = (
    "which hides what goes through it: run the model outside of them, and take derivatives with "
    "torch.autograd.grad"
)


def observe(recorder: Any, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
    """A module of the layer has turned ``a`` into ``h``; what takes the place of h, if anything does."""
    spec, with_gradients, layer = recorder.spec, torch.is_grad_enabled(), slot.layer
    if in_transform():
        recorder.blind = f"{layer} ran inside vmap, grad or another transform of torch.func, {_HIDES}"
        return None
    if in_jit_trace():
        return None
    if not h.numel():
        recorder.empty |= with_gradients
        return None
    recorder.ran |= spec is not None and spec is not recorder.first
    if with_gradients != (spec is None or spec.Dh is not None):
        recorder.hidden.add(layer)
        return None
    if spec is None:
        recorder.ran = True
        return None
    if with_gradients and not spec.frozen and not (h.requires_grad and layer.weight.requires_grad):
        recorder.ran |= h.requires_grad  # of another optimizer's second pass, or for the inputs alone
        return None
    recorder.ran = True
    return _keep(recorder, spec, slot, a, h)


def _keep(recorder: Any, spec: PassSpec, slot: Slot, a: Tensor, h: Tensor) -> Tensor | None:
    """Keep of this call what is asked for; what takes the place of ``h``."""
    again = in_backward()
    if again and slot.open:  # checkpointing computes again what was seen
        return gated(h, lambda gradient: None) if spec.frozen else None
    if not again:
        recorder.begin_batch()
    call = replace(call_of(spec, slot.layer, a, h), batch=recorder.batch, start=recorder.starts.last)
    if call.wrong is not None and spec is not recorder.first:
        raise ValueError(call.wrong)
    if spec.Dh is None:
        recorder.count(slot.layer, [call])
        return None
    slot.open.add(call)
    arrive = _arrival(recorder, spec, slot, call)
    if spec.frozen:
        return gated(h, arrive)
    h.register_hook(arrive)
    return None


def _arrival(recorder: Any, spec: PassSpec, slot: Slot, call: Call) -> Callable[[Tensor | None], None]:
    """What to do with the gradient of a call's pre-activation, if the backward pass is for the weight."""
    recorded, layer, Dh_of = recorder.recorded, slot.layer, spec.Dh
    weight = layer.modules[0].weight  # of fully_shard another tensor while the module runs
    assert Dh_of is not None

    def arrive(gradient: Tensor | None) -> None:
        if gradient is None or recorded is not recorder.recorded:
            return  # behind a gate, or of a pass that is forgotten
        if not spec.frozen:
            if not layer.weight.requires_grad:
                return  # of another optimizer's second pass
            # of torch.autograd.grad with respect to the weight: to be its .grad, or to go into the loss
            if not is_for(weight, itself=not torch.is_grad_enabled()):
                if call.Dh is None and call.wrong is None:
                    recorder.aside.setdefault(layer, {})[call] = None
                return
        recorder.aside.pop(layer, None)
        gradient = gradient.detach()  # of a backward pass with create_graph
        Dh = reduced(Dh_of, layer, gradient) if call.wrong is None else gradient
        if call.Dh is not None:  # a closure may call backward for each part of its loss
            call.Dh = call.Dh + Dh
            return
        call.Dh = Dh
        slot.reduce(call, recorded[layer].calls if layer in recorded else ())
        slot.open.discard(call)
        recorder.count(layer, [call])
        recorder.arrived = True

    return arrive
