"""What a step costs, counted instead of timed: operations, memory, and how often it waits for the device."""

import copy
import gc
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import batches, closure, odd_cnn
from torch.utils.flop_counter import FlopCounterMode

import kfqn
from kfqn import update
from kfqn.race.problems.models import all_cnn_c, vgg16
from kfqn.race.problems.resnet import resnet20

LEARNING, BETWEEN = 80, 101  # steps that are learnt from, by either cadence, and that are not


def at(optimizer, k):
    """The optimizer as if k steps had been taken."""
    state = optimizer.state_dict()
    state["param_groups"][0]["progress"] |= {"k": k}
    optimizer.load_state_dict(state)
    return optimizer


def operations(model, unwatched, optimizer, m):
    """Floating-point operations in a step of SGD, and in both kinds of steps here."""
    batch = torch.randn(m, 3, 32, 32), torch.randint(10, (m,)), F.cross_entropy
    evaluate, counts = kfqn.closure(model, *batch), []
    for step in (
        lambda: torch.optim.SGD(unwatched.parameters(), lr=1e-3).step(kfqn.closure(unwatched, *batch)),
        *(partial(lambda k: at(optimizer, k).step(evaluate), k) for k in (LEARNING, BETWEEN)),
    ):
        with FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_total_flops())
    return counts


AUTOMATIC = {"lr": "auto"}


# Everything but the passes: at most 8 % of SGD's step on All-CNN-C, 10 % on VGG16 with small factors; a
# second pass without weight gradients is at most 0.67 of a first. (VGG16's head of 4096 × 4096 weights
# costs no more than its products with a and Dh; hence 128 there, as 256 makes 13 %. An automatic step has one
# pass and a direction that is orthogonalised; one in forty, that is learnt from, also makes A, of some of the
# data: at most a fifth of SGD's step on ResNet-20, whose factors of 577 rows are whole. Directions of 512
# outputs are whole on VGG16, a tenth of the step; a GPT of width 384 needs a tenth fewer steps for it.)
@pytest.mark.parametrize(
    ("make", "m", "settings", "most", "most_between"),
    [
        (lambda: all_cnn_c(10), 256, {}, 1.70, 1.02),
        (lambda: resnet20(10), 256, {}, 1.72, 1.02),
        (lambda: vgg16(10), 128, {"max_factor_size": 128}, 1.77, 1.10),
        (lambda: vgg16(10), 128, {"max_factor_size": 256}, 1.81, 1.14),
        (lambda: all_cnn_c(10), 256, AUTOMATIC, 1.07, 1.02),
        (lambda: resnet20(10), 256, AUTOMATIC, 1.20, 1.02),
        (lambda: vgg16(10), 128, AUTOMATIC | {"max_factor_size": 128}, 1.15, 1.11),
        (lambda: vgg16(10), 128, AUTOMATIC, 1.46, 1.34),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else None,
)
def test_floating_point_operations_relative_to_sgd(make, m, settings, most, most_between):
    torch.manual_seed(0)
    model = make()
    unwatched, optimizer = copy.deepcopy(model), kfqn.KFBFGS(model, **{"lr": 1e-3} | settings)
    optimizer.step(kfqn.closure(model, torch.randn(2, 3, 32, 32), torch.randint(10, (2,)), F.cross_entropy))
    two, four = (operations(model, unwatched, optimizer, n) for n in (2, 4))
    affine = (b + (b - a) / 2 * (m - 4) for a, b in zip(two, four, strict=True))  # in m
    sgd, learning, between = affine
    assert 1.0 < between / sgd <= most_between
    assert between < learning <= most * sgd


@pytest.fixture
def only_new_objects():
    """The garbage collector knows of what is made from here on alone: it is asked at every step."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def bytes_alive():
    """The memory of all tensors that Python knows of."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("lr", ["auto", 0.1])
@pytest.mark.parametrize("method", [kfqn.KFBFGS, kfqn.KFLBFGS])
def test_no_step_leaves_memory_behind(method, lr):
    model, data = odd_cnn(), batches((2, 6, 6), 40)
    optimizer, alive = method(model, lr=lr, curvature_interval=3), []
    for x, target in data[:-1]:
        optimizer.step(closure(model, optimizer, x, target))
        alive.append(bytes_alive())
    assert max(alive[30:]) <= min(alive[5:20])  # with a second pass at every third step, and at every step


def peak_bytes(step):
    """The most that is allocated during a step beyond what there was before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize(("interval", "most"), [(1, 1.2), (10, 1.1)], ids=["that learns", "between"])
@pytest.mark.parametrize("method", [kfqn.KFBFGS, kfqn.KFLBFGS])
def test_a_step_peaks_where_sgds_does(method, interval, most):
    """It holds neither inputs nor a copy of the parameters: with either it is at 1.4 times as much.

    One that learns holds A of each layer, which with whole factors is 15 % of SGD's peak on so small a net.
    """
    torch.manual_seed(0)
    model = all_cnn_c(10, width=16)
    unwatched = copy.deepcopy(model)
    batch = torch.randn(64, 3, 32, 32), torch.randint(10, (64,)), F.cross_entropy
    optimizer = method(model, curvature_interval=interval)
    sgd = torch.optim.SGD(unwatched.parameters(), lr=1e-3)
    ours, theirs = (kfqn.closure(net, *batch) for net in (model, unwatched))
    for _ in range(2):
        optimizer.step(ours)
        sgd.step(theirs)
    assert peak_bytes(lambda: optimizer.step(ours)) < most * peak_bytes(lambda: sgd.step(theirs))


@pytest.mark.parametrize("lr", [0.1, "auto"])
def test_directions_take_the_memory_of_the_weights_once(lr):
    """On the way to them that of a layer or some small ones is held: all together took 9 times as much."""
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(40)))
    optimizer, x = kfqn.KFBFGS(model, lr=lr, max_factor_size=256), torch.randn(4, 256)
    optimizer.step(kfqn.closure(model, x, x, F.mse_loss))
    F.mse_loss(model(x), x).backward()
    with torch.no_grad():
        peak = peak_bytes(lambda: update.propose(optimizer.training, optimizer.layers))
    assert peak < 1.3 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("lr", [0.1, "auto"])
@pytest.mark.parametrize("method", [kfqn.KFBFGS, kfqn.KFLBFGS])
def test_a_step_waits_for_the_device_once(method, lr, monkeypatch):
    """To see that loss, gradients and directions are sound; to learn (A + λI)^(−½) once a layer more."""
    model, ((x, target), *_) = odd_cnn(), batches((2, 6, 6), 2)
    optimizer, reads = method(model, lr=lr), []
    evaluate = closure(model, optimizer, x, target)
    optimizer.step(evaluate)
    on_the_host = [state["step"] for state in optimizer.state.values()]  # kept, so that no id comes again
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def read(self, original=original, name=name):
            if not any(self is step for step in on_the_host):
                reads.append(name)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, read)
    optimizer.step(evaluate)
    assert reads == ["tolist"]
    reads.clear()
    at(optimizer, LEARNING)
    on_the_host += [state["step"] for state in optimizer.state.values()]
    optimizer.step(evaluate)
    assert reads == ["tolist"] + (["__bool__"] * 4 if lr == "auto" else [])
