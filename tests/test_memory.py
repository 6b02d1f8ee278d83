"""Less memory, for those who ask: triangles of A and H_A, and D̂W in bfloat16, rounded at random."""

import copy

import pytest
import torch
import torch.distributed.checkpoint.state_dict as checkpoint
from cases import AUTOMATIC, batches, grouped, odd_cnn
from test_contract import train

import kfqn
from kfqn.curvature.input_factor import AveragedRoot
from kfqn.formulas.rounding import rounded_at_random
from kfqn.formulas.symmetric import packed, packed_shape, unpacked
from kfqn.state import NOTES
from kfqn.steps.average import Nesterov

TRIANGLES, BFLOAT16 = AveragedRoot(triangles=True), Nesterov(bfloat16=True)
SMALL = kfqn.Parts(input=TRIANGLES, average=BFLOAT16)


def of(optimizer, key):
    return [optimizer.state[layer.weight][key] for layer in optimizer.layers]


@pytest.mark.parametrize("g", [(), (3,), (2, 3)])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_a_triangle_is_all_of_a_symmetric_matrix(n, g):
    H = torch.randn(*g, n, n)
    H = H + H.mT
    assert packed(H).shape == (*g, *packed_shape(n))
    assert packed(H)[..., 0, 0].numel() * packed(H)[(0,) * len(g)].numel() * 2 == H[..., 0, 0].numel() * n * (
        n + 1
    )
    assert torch.equal(unpacked(packed(H), n), H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_what_is_rounded_at_random_is_what_was_there(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 50, dtype=dtype) * torch.logspace(-30, 30, 50, dtype=dtype)
    many = torch.stack([rounded_at_random(x, generator) for _ in range(4000)])
    near = x.to(torch.bfloat16).double()
    assert ((many.double() - x).abs() <= x.abs() * 2**-7).all()  # one of two neighbours
    assert (many.unique(dim=0).shape[0]) > 1
    error = (many.double().mean(0) - x).abs() / x.abs()
    assert error.max() < 2**-7 * 0.05 < ((near - x).abs() / x.abs()).max()
    exact = x.to(torch.bfloat16).to(dtype)
    assert torch.equal(rounded_at_random(exact, generator), exact.to(torch.bfloat16))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("net", "channels"), [(odd_cnn, 2), (grouped, 4)])
@pytest.mark.parametrize("largest", ["auto", 7])
@pytest.mark.parametrize("name", AUTOMATIC)
def test_with_triangles_steps_are_the_same(name, net, channels, largest):
    model, data = net(), batches((channels, 6, 6), 9)
    twin, settings = copy.deepcopy(model), {"curvature_interval": 2, "max_factor_size": largest}
    optimizer = AUTOMATIC[name](model, **settings)
    small = AUTOMATIC[name](twin, **settings, parts=kfqn.Parts(input=TRIANGLES))
    for one, its in ((model, optimizer), (twin, small)):
        train(one, its, data)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    sizes = [sum(x.numel() for key in ("A", "H_A") for x in of(its, key)) for its in (optimizer, small)]
    assert 0.5 < sizes[1] / sizes[0] < 0.61  # half, and half of the diagonal


def test_with_bfloat16_steps_are_nearly_the_same():
    model, data = odd_cnn().float(), batches((2, 6, 6), 5, dtype=torch.float32)
    twin = copy.deepcopy(model)
    optimizer, small = kfqn.KFBFGS(model), kfqn.KFBFGS(twin, parts=kfqn.Parts(average=BFLOAT16))
    start = model[0].weight.detach().clone()
    for one, its in ((model, optimizer), (twin, small)):
        train(one, its, data)
    assert {DW.dtype for DW in of(small, "DW")} == {torch.bfloat16}
    moved, apart = (model[0].weight - start).norm(), (model[0].weight - twin[0].weight).norm()
    assert 0 < apart < 0.1 * moved


def trained(make, steps):
    model, data = odd_cnn().float(), batches((2, 6, 6), 8, dtype=torch.float32)
    optimizer = make(model)
    train(model, optimizer, data[:steps])
    return model, optimizer, data[steps:]


@pytest.mark.parametrize("way", ["torch.save", "checkpoint"])
def test_it_goes_on_to_the_bit(way, tmp_path):
    def make(model):
        return kfqn.KFBFGS(model, parts=SMALL, curvature_interval=2)

    model, optimizer, rest = trained(make, 4)
    twin, again, _ = trained(make, 0)
    if way == "torch.save":
        torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
        saved = torch.load(tmp_path / "run.pt")
        twin.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
    else:
        saved = copy.deepcopy(checkpoint.get_state_dict(model, optimizer))
        checkpoint.set_state_dict(twin, again, model_state_dict=saved[0], optim_state_dict=saved[1])
    for one, its in ((model, optimizer), (twin, again)):
        train(one, its, rest)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert all(map(torch.equal, of(optimizer, "DW"), of(again, "DW")))
    assert {DW.dtype for DW in of(again, "DW")} == {torch.bfloat16}


def test_a_state_goes_into_the_type_of_who_loads_it_and_triangles_are_told_apart():
    _, optimizer, _ = trained(kfqn.KFBFGS, 3)
    _, halved, rest = trained(lambda model: kfqn.KFBFGS(model, parts=kfqn.Parts(average=BFLOAT16)), 3)
    state, half = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(halved.state_dict())
    optimizer.load_state_dict(half)
    assert {DW.dtype for DW in of(optimizer, "DW")} == {torch.float32}
    halved.load_state_dict(state)
    assert {DW.dtype for DW in of(halved, "DW")} == {torch.bfloat16}
    model, small, _ = trained(lambda model: kfqn.KFBFGS(model, parts=SMALL), 3)
    with pytest.raises(ValueError, match="belongs; load it into the optimizer and model it was saved from"):
        small.load_state_dict(state)
    train(model, small, rest)


def test_the_plan_tells_the_bytes_that_the_state_has():
    for make in (kfqn.KFBFGS, lambda model: kfqn.KFBFGS(model, parts=SMALL)):
        _, optimizer, _ = trained(make, 1)
        told = {line.split()[0]: float(line.split()[-1]) for line in optimizer.plan().splitlines()[1:]}
        for layer in optimizer.layers:
            kept = optimizer.state[layer.weight]
            size = sum(x.nbytes for key, x in kept.items() if key not in NOTES)
            assert told[layer.name] == pytest.approx(size / 1e6, rel=5e-3)


def test_copies_on_another_type_keep_it():
    """A model that becomes float64 takes its factors along, and D̂W stays in half."""
    model, optimizer, _ = trained(lambda model: kfqn.KFBFGS(model, parts=SMALL), 2)
    model.double()
    train(model, optimizer, batches((2, 6, 6), 2, dtype=torch.float64))
    assert {x.dtype for x in of(optimizer, "H_A")} == {torch.float64}
    assert {x.dtype for x in of(optimizer, "DW")} == {torch.bfloat16}
