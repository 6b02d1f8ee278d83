"""What only a GPU can show: the same steps there, masks that come again, and when the host waits."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, VisionTransformer, batches, closure, odd_cnn, separable_net
from lab import TINY
from lab import kfqn as command
from test_contract import train
from test_cuda_graphs import METHODS, NETS
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def there(data):
    return [(x.cuda(), y.cuda()) for x, y in data]


@pytest.fixture(params=AUTOMATIC)
def make(request):
    return AUTOMATIC[request.param]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_cpu(method, net):
    """KFAC draws its targets on the device, so only its first pair of factors can differ: not compared."""
    build, shape = NETS[net]
    model, data = build(), batches(shape, 12)
    twin = copy.deepcopy(model).cuda()
    optimizer, theirs = (METHODS[method](m) for m in (model, twin))
    losses, on_the_gpu = train(model, optimizer, data), train(twin, theirs, there(data))
    if "KFAC" in method:
        assert all(loss.isfinite() for loss in on_the_gpu)
        return
    torch.testing.assert_close(torch.stack(on_the_gpu).cpu(), torch.stack(losses), rtol=1e-7, atol=1e-9)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-6, atol=1e-8)


def test_dropout_draws_the_same_masks_in_the_second_pass(make):
    model = nn.Sequential(nn.Linear(50, 400), nn.Dropout(0.5), nn.Linear(400, 3)).cuda()
    optimizer = make(model, lr=1e-12, damping=1.0)
    ((x, y),) = there(batches((50,), 2, size=32)[:1])
    losses = []

    def evaluate():
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(evaluate)
    firsts, seconds = losses[::2], losses[1::2]
    assert seconds == pytest.approx(firsts, rel=1e-6)
    assert len({round(loss, 4) for loss in firsts}) == 3


def test_half_precision_with_a_grad_scaler(make):
    model, data = separable_net().cuda(), there(batches((1, 8, 8), 2, size=64, classes=10)[:1])
    optimizer, scaler = make(model), torch.amp.GradScaler()
    ((x, y),) = data
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        if optimizer.second_pass_due:
            scale = scaler.get_scale()
            with optimizer.second_pass(loss, loss_scale=scale) as again:
                with torch.autocast("cuda", torch.float16):
                    again.loss = F.cross_entropy(model(x), y)
                scaler.scale(again.loss).backward()
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    counted = optimizer.diagnostics()
    assert sum(of.get("G taken", 0) for of in counted.values()) > 0


@pytest.mark.parametrize("build", [separable_net, VisionTransformer])
def test_bfloat16_under_autocast(make, build):
    model, ((x, y),) = build().cuda(), there(batches((1, 8, 8), 2, size=64, classes=10)[:1])
    optimizer = make(model)

    def evaluate():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(evaluate).item() for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_products_in_tf32_do_no_harm(make):
    model, ((x, y),) = separable_net().cuda(), there(batches((1, 8, 8), 2, size=64, classes=10)[:1])
    optimizer, before = make(model), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        losses = [optimizer.step(closure(model, optimizer, x, y)).item() for _ in range(60)]
    finally:
        torch.set_float32_matmul_precision(before)
    assert losses[-1] < 0.5 * losses[0]
    assert sum(of.get("resets", 0) for of in optimizer.diagnostics().values()) == 0


def waits(step):
    """Where the host waited for the device, by file and line, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{warning.filename.rsplit('/', 2)[-1]}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    ]


@pytest.mark.parametrize(("lr", "learnt", "between"), [(0.1, 1, 1), ("auto", 25, 1)])
def test_the_host_waits_no_oftener_than_the_documents_say(make, lr, learnt, between):
    """An automatic rate's H_A = (A + λI)^(−½) waits a few times for each of four layers."""
    model, data = odd_cnn().cuda(), there(batches((2, 6, 6), 36)[:35])
    optimizer = make(model, lr=lr, damping=1.0, curvature_interval=10)
    train(model, optimizer, data[:25])
    counts = []
    for x, y in data[25:]:
        step = closure(model, optimizer, x, y)
        due = optimizer.training.inputs_due(0)
        places = waits(lambda step=step: optimizer.step(step))
        counts.append((due, len(places)))
        assert len(places) <= (learnt if due else between), places
    assert {due for due, _ in counts} == {True, False}


def test_no_step_leaves_memory_behind(make):
    model, data = odd_cnn().cuda(), there(batches((2, 6, 6), 2)[:1]) * 60
    optimizer = make(model)
    train(model, optimizer, data[:40])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    train(model, optimizer, data)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_what_every_step_asks_for_is_recorded(make):
    model = odd_cnn().cuda()
    optimizer = make(model)
    train(model, optimizer, there(batches((2, 6, 6), 12)))
    known = [of_name for of_name in optimizer.training.graphs._known.values() if of_name.uses > 3]
    assert 1 <= len(known) <= 2  # directions, and what is learnt unless H_A reads numbers
    assert all(of_name.graph is not None and of_name.recordings == 1 for of_name in known)


def test_a_graph_of_the_users_own_is_left_alone(make):
    """A step inside a capture records nothing of its own, which would end the user's."""
    model = odd_cnn().cuda()
    optimizer = make(model, lr=0.1, damping=1.0)
    train(model, optimizer, there(batches((2, 6, 6), 12)))
    known, x = dict(optimizer.training.graphs._known), torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = optimizer.training.graphs.run("ours", lambda given: [given[0] + 1], [x], [], None)
    graph.replay()
    assert optimizer.training.graphs._known == known
    assert y.tolist() == [2.0] * 3


def test_a_race(tmp_path):
    done = command("race", *TINY, "--device", "cuda", "--seeds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "race.png").exists()
