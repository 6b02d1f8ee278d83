"""Compiled models: a graph for each kind of pass, no break, nothing compiled again, the steps of eager code.

Traced by Dynamo and by AOTAutograd, functions and gradients apart, and then run by eager kernels, in float64.
"""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import Checkpointed, batches, mixer, mlp, odd_cnn, recurrent
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import kfqn

pytestmark = [
    pytest.mark.usefixtures("double", "fresh"),
    pytest.mark.filterwarnings(  # what Dynamo does with tensors while it traces
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]
MAKERS = {
    "KFBFGS": kfqn.KFBFGS,
    "KFLBFGS": partial(kfqn.KFLBFGS, history_size=3),
    "with a number": partial(kfqn.KFBFGS, lr=0.03, damping=1.0),
}


@pytest.fixture
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs():
    """Counts graphs as a backend that is given them."""
    return CompileCounterWithBackend("aot_eager")


class Whole(nn.Module):
    """Of a class of one's own, as most models: its hooks are not in its graph, those of a container are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def loop(model, optimizer, x, target, parts=1):
    """A loop of one's own; parts are micro-batches."""

    def passes():
        losses = []
        for of_x, of_target in zip(x.chunk(parts), target.chunk(parts), strict=True):
            losses.append(F.cross_entropy(model(of_x), of_target) / parts)
            losses[-1].backward()
        return sum(loss.detach() for loss in losses)

    optimizer.zero_grad()
    loss = passes()
    optimizer.step()
    if optimizer.second_pass_due:
        with optimizer.second_pass(loss):
            passes()
    return loss


def with_closure(model, optimizer, x, target):
    return optimizer.step(kfqn.closure(model, x, target, F.cross_entropy))


def in_both(make, model, graphs, order="after", fullgraph=True):
    """The model as it is and compiled, each with an optimizer."""
    twin, options = copy.deepcopy(model), {"backend": graphs, "fullgraph": fullgraph}
    if order == "before":
        compiled = torch.compile(twin, **options)
        return model, make(model), compiled, make(compiled)
    theirs = make(twin)
    if order == "in place":
        twin.compile(**options)
        return model, make(model), twin, theirs
    return model, make(model), torch.compile(twin, **options), theirs


def alike(runs, graphs, data, step=with_closure):
    """Train both: losses are equal, and in the end weights. How many graphs there were after each step."""
    model, optimizer, compiled, theirs = runs
    counts = []
    for batch in data:
        found, expected = step(compiled, theirs, *batch), step(model, optimizer, *batch)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        counts.append(graphs.frame_count)
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-9)
    return counts


def new(counts):
    """The steps, from 1, in which graphs were made, and how many."""
    return {k + 1: n - before for k, (before, n) in enumerate(pairwise([0, *counts])) if n > before}


# Of KFBFGS(model): inputs kept, at the first step; nothing; A, where H_A learns. Of those with pairs also the
# second pass. Beside them, but in a container of torch, that of weights which go ahead.
KINDS = {
    "KFBFGS": {1: 1, 2: 2, 41: 1},
    "KFLBFGS": {1: 2, 2: 2, 41: 1},
    "with a number": {1: 2, 2: 1, 22: 1},
}


@pytest.mark.parametrize(
    ("name", "order"),
    [("KFBFGS", "before"), ("KFBFGS", "in place"), ("KFLBFGS", "after"), ("with a number", "before")],
)
def test_a_graph_for_each_kind_of_pass_and_then_no_more(name, order, graphs):
    """``fullgraph`` allows no break; steps 41 and 81 learn."""
    runs = in_both(MAKERS[name], Whole(odd_cnn()), graphs, order)
    data = batches((2, 6, 6), 85)[:-1]
    counts = alike(runs, graphs, data)
    assert new(counts) == KINDS[name]
    assert runs[1].diagnostics()["inner.0"]["A taken"] >= 3


@pytest.mark.parametrize("order", ["after", "in place"])
def test_a_container_of_torch_is_one_graph_with_the_weights_that_go_ahead(order, graphs):
    counts = alike(in_both(kfqn.KFBFGS, odd_cnn(), graphs, order), graphs, batches((2, 6, 6), 50)[:-1], loop)
    assert sum(new(counts).values()) <= (3 if order == "after" else 4)  # in place of torch 2.14 also 3


@pytest.mark.parametrize("wrap", [Whole, nn.Sequential])
def test_statistics_of_batches_are_averaged_too(wrap, graphs):
    model = wrap(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    )
    runs = in_both(kfqn.KFBFGS, model, graphs)
    counts = alike(runs, graphs, batches((2, 6, 6), 50)[:-1], loop)
    assert new(counts).keys() == {1, 2, 41}
    for own, theirs in zip(model.buffers(), runs[2].buffers(), strict=True):
        torch.testing.assert_close(theirs, own, rtol=1e-8, atol=1e-9)


def test_a_model_that_was_compiled_in_one_function_with_its_loss(graphs):
    model = odd_cnn()
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    compiled = torch.compile(lambda x, y: F.cross_entropy(twin(x), y), backend=graphs, fullgraph=True)
    for x, target in batches((2, 6, 6), 50)[:-1]:
        theirs.zero_grad()
        loss = compiled(x, target)
        loss.backward()
        theirs.step()
        torch.testing.assert_close(loss, loop(model, optimizer, x, target), rtol=1e-9, atol=1e-9)
    assert graphs.frame_count == 3


@pytest.mark.parametrize("name", ["KFBFGS", "KFLBFGS"])
def test_loops_of_ones_own_are_those_of_eager_code(name, graphs):
    """Where a pass started that is repeated without a closure has to be known: a break before the model."""
    runs = in_both(MAKERS[name], Whole(odd_cnn()), graphs, fullgraph=name == "KFBFGS")
    counts = alike(runs, graphs, batches((2, 6, 6), 60)[:-1], loop)
    assert counts[-1] == counts[41]


@pytest.mark.parametrize("name", ["KFBFGS", "KFLBFGS"])
def test_micro_batches_add_up(name, graphs):
    make = partial(MAKERS[name], curvature_interval=5)
    runs = in_both(make, Whole(odd_cnn()), graphs, fullgraph=name == "KFBFGS")
    counts = alike(runs, graphs, batches((2, 6, 6), 40)[:-1], partial(loop, parts=2))
    assert counts[-1] == counts[25]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("build", [recurrent, mixer])
def test_shared_modules_and_locations(build, name, graphs):
    shape = (2, 6, 6) if build is recurrent else (4, 5)
    make = partial(MAKERS[name], curvature_interval=3)
    alike(in_both(make, build(), graphs), graphs, batches(shape, 12, size=6)[:-1])


def test_a_batch_of_another_size_is_compiled_once_more(graphs):
    data = batches((2, 6, 6), 100, size=6)
    for k in range(9, 100, 10):
        data[k] = [part[: 2 + k % 3] for part in data[k]]
    counts = alike(in_both(kfqn.KFBFGS, Whole(odd_cnn()), graphs), graphs, data)
    assert counts[-1] == counts[45]


def test_evaluation_and_passes_that_nobody_differentiates_change_nothing(graphs):
    def step(model, optimizer, x, target):
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        loss = with_closure(model, optimizer, x, target)
        model(x + 1)
        return loss

    counts = alike(in_both(kfqn.KFBFGS, Whole(odd_cnn()), graphs), graphs, batches((2, 6, 6), 85)[:-1], step)
    assert counts[-1] == counts[41]


def test_weights_go_ahead_and_come_back(graphs):
    runs = in_both(kfqn.KFBFGS, odd_cnn(), graphs)
    alike(runs, graphs, batches((2, 6, 6), 10), loop)
    model, optimizer, compiled, theirs = runs
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        assert optimizer.state[p]["ahead"].any()
        torch.testing.assert_close(
            theirs.state[q]["ahead"], optimizer.state[p]["ahead"], rtol=1e-9, atol=1e-9
        )
    compiled(batches((2, 6, 6), 1)[0][0])
    assert theirs.training.iterates.ahead  # also where compiled code has put them in


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_computed_again_in_the_backward_pass_is_in_the_graph(name, graphs):
    make = partial(MAKERS[name], curvature_interval=3)
    runs = in_both(make, Checkpointed(odd_cnn()), graphs)
    counts = alike(runs, graphs, batches((2, 6, 6), 20)[:-1])
    assert counts[-1] == counts[8]
    assert "compiled" not in runs[3].plan()


def blocks():
    """Blocks of one class, as those of transformers."""
    return nn.Sequential(nn.Linear(5, 8), *(Whole(nn.Linear(8, 8)) for _ in range(3)), nn.Linear(8, 3))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_whose_blocks_are_compiled(wrapped, graphs):
    """All blocks share their graphs; ``plan`` names the layers beside them."""
    model, make = blocks(), partial(kfqn.KFBFGS, curvature_interval=3)
    twin = copy.deepcopy(model)
    for name, block in twin.named_children():
        if isinstance(block, Whole) and wrapped:
            setattr(twin, name, torch.compile(block, backend=graphs, fullgraph=True))
        elif isinstance(block, Whole):
            block.compile(backend=graphs, fullgraph=True)
    optimizer, theirs = make(model), make(twin)
    assert "compiled" not in theirs.plan()
    counts = alike((model, optimizer, twin, theirs), graphs, batches((5,), 14)[:-1], loop)
    assert counts[-1] == counts[4] <= 3
    *_, told = theirs.plan().splitlines()
    assert told.startswith("compiled code: run by eager code")
    assert told.endswith(": 0, 4")
    assert "compiled" not in optimizer.plan()


def test_the_plan_says_what_broke_graphs(graphs):
    model, ((x, target), *_) = odd_cnn(), batches((2, 6, 6), 1)
    optimizer, compiled = kfqn.KFLBFGS(model), torch.compile(model, backend=graphs)
    loop(compiled, optimizer, x, target)
    assert "compiled code: broken before the model: a second pass without a closure" in optimizer.plan()


def warm_start(runs, data):
    """Each optimizer by closures of its own form of the model."""
    model, optimizer, compiled, theirs = runs
    for net, its in ((model, optimizer), (compiled, theirs)):
        its.warm_start(kfqn.closure(net, *batch, F.cross_entropy) for batch in data)


def test_kfacs_sampled_passes_are_run_by_eager_code(graphs):
    """A graph for first passes is all there is, and ``plan`` says so."""
    runs = in_both(partial(kfqn.KFAC, lr=0.1, damping=1.0), Whole(odd_cnn()), graphs)
    data = batches((2, 6, 6), 12)[:-1]
    warm_start(runs, data[:2])
    assert graphs.frame_count == 0
    assert new(alike(runs, graphs, data)) == {1: 1}
    assert not counters["graph_break"]
    assert "compiled code: left out of KFAC's sampled passes" in runs[3].plan()


def test_warm_starts_are_run_by_eager_code(graphs):
    runs, data = in_both(kfqn.KFBFGS, Whole(odd_cnn()), graphs), batches((2, 6, 6), 6)[:-1]
    warm_start(runs, data[:2])
    assert graphs.frame_count == 0
    alike(runs, graphs, data)


def test_a_step_that_is_compiled_as_a_whole(graphs):
    """It breaks where torch's own do, around backward and step; nothing of ours is compiled apart."""
    model, make = mlp(), partial(kfqn.KFBFGS, curvature_interval=3)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    step = torch.compile(loop, backend=graphs)
    for x, target in batches((5,), 10)[:-1]:
        found, expected = step(twin, theirs, x, target), loop(model, optimizer, x, target)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    counted = counters["graph_break"]
    assert not any("recompile_limit" in reason or "kfqn.passes" in reason for reason in counted)
    assert graphs.frame_count <= 12


@pytest.fixture
def one_process(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_compiled_model_in_data_parallel_is_whole(graphs):
    """Also where the optimizer was given the model inside, and finds out by itself."""
    model, make = Whole(odd_cnn()), partial(kfqn.KFBFGS, curvature_interval=3)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    wrapped = DistributedDataParallel(torch.compile(twin, backend=graphs, fullgraph=True))
    counts = alike((model, optimizer, wrapped, theirs), graphs, batches((2, 6, 6), 14)[:-1], loop)
    assert counts[-1] == counts[4]
    assert theirs.training.states.process_group is wrapped.process_group
    assert not counters["graph_break"]


def test_gradients_from_autograd_grad_are_learnt_from(graphs):
    def step(model, optimizer, x, target):
        loss, parameters = F.cross_entropy(model(x), target), [*model.parameters()]
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        optimizer.step()
        return loss.detach()

    alike(in_both(kfqn.KFBFGS, Whole(odd_cnn()), graphs), graphs, batches((2, 6, 6), 45)[:-1], step)


@pytest.mark.parametrize("compiled", [False, True])
def test_means_under_autocast_have_the_digits_of_float32(compiled, graphs):
    """h̄ and Dh̄ of a pass in bfloat16, from a compiled model as from one that is not."""
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 3))
    x, target = torch.randn(512, 64), torch.randint(3, (512,))
    seen, gradient = [], []
    optimizer = kfqn.KFBFGS(model, lr=0.1, damping=1.0)

    def watch(module, args, h):
        seen.append(h.detach().double().mean(0))
        h.register_hook(lambda g: gradient.append(g.double().sum(0)))

    run = torch.compile(model, backend=graphs, fullgraph=True) if compiled else model
    with optimizer.training.recorder.in_closure():
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(run(x).float(), target).backward()
        record = next(iter(optimizer.training.recorder.take().values()))
    torch.compiler.reset()
    model[0].register_forward_hook(watch)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(x).float(), target).backward()
    torch.testing.assert_close(record.h().double(), seen[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(record.Dh().double(), gradient[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_are_the_weights_that_the_model_holds(strict):
    model, data = odd_cnn(), batches((2, 6, 6), 3)
    optimizer = kfqn.KFBFGS(model)
    for batch in data:
        with_closure(model, optimizer, *batch)
    x = torch.randn(4, 2, 6, 6)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor's own
def test_inductor_makes_the_same_of_it():
    """The compiler that people use."""
    model, data = mlp(), batches((5,), 4)[:-1]
    runs = in_both(partial(kfqn.KFBFGS, curvature_interval=2), model, "inductor")
    model, optimizer, compiled, theirs = runs
    for batch in data:
        found, expected = loop(compiled, theirs, *batch), loop(model, optimizer, *batch)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
