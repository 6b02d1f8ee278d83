"""Random small models of all supported layers: statistics and factors against dense oracles."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import closure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import kfqn

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),  # torch's own
]
SIDE = 5


@st.composite
def convolutions(draw, channels):
    """A convolution of any kind on ``channels`` channels, that fits images of side SIDE."""
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 2))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.integers(1, 2))
    same = draw(st.booleans())
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    padding = "same" if same else draw(st.integers(0, 2))
    stride = 1 if same else draw(st.integers(1, 2))
    bias = draw(st.booleans())
    return nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias, mode)


@st.composite
def models(draw):
    """Up to three convolutions, then one or two linear layers; input (2, SIDE, SIDE)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    modules, x = [], torch.zeros(1, 2, SIDE, SIDE)
    for _ in range(draw(st.integers(0, 3))):
        conv = draw(convolutions(x.shape[1]))
        try:
            with torch.no_grad():
                x = conv(x)
        except RuntimeError:  # the kernel or the padding does not fit what is left of the image
            break
        modules += [conv, draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.Softplus]))()]
        if draw(st.booleans()) and isinstance(conv, nn.Conv2d) and conv.in_channels == conv.out_channels:
            try:
                with torch.no_grad():
                    x = conv(x)
            except RuntimeError:
                continue
            modules += [conv, nn.Tanh()]  # the same module once more
    if draw(st.booleans()):
        width = x.shape[-1]
        modules += [nn.Linear(width, 3, bias=draw(st.booleans())), nn.Tanh()]  # on locations
        x = x.new_zeros(*x.shape[:-1], 3)
    modules += [nn.Flatten(), nn.Linear(x[0].numel(), 3, bias=draw(st.booleans()))]
    return nn.Sequential(*modules)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(
    model=models(),
    history=st.sampled_from([None, 2]),
    m=st.integers(1, 3),
    largest=st.sampled_from([None, 3, 8]),
)
def test_three_steps_of_any_model_are_those_of_the_oracle(model, history, m, largest):
    options = {"lr": 0.2, "damping": 0.5, "beta": 0.7, "mu1": 0.2, "weight_decay": 0.01}
    reference = oracle.Algorithm2(model, F.cross_entropy, **options, history=history, largest=largest)
    options["max_factor_size"] = largest
    if history is None:
        optimizer = kfqn.KFBFGS(model, **options)
    else:
        optimizer = kfqn.KFLBFGS(model, **options, history_size=history)
    for _ in range(3):
        x, target = torch.randn(m, 2, SIDE, SIDE), torch.randint(3, (m,))
        reference.step(x, target)
        optimizer.step(closure(model, optimizer, x, target))
    for got, W in zip(oracle.matrices(model), reference.W, strict=True):
        torch.testing.assert_close(got, W, rtol=1e-7, atol=1e-9)
    if largest is not None:
        return
    H_A = [
        H
        for m in optimizer.layers
        for H in optimizer.state[m.weight]["H_A"].reshape(-1, m.columns, m.columns)
    ]
    for got, expected in zip(H_A, reference.H_A, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8 * expected.abs().max().item())
