"""Two sets of weights: z, which training passes and steps see, and their average x, which all others see."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import AUTOMATIC, Checkpointed, batches, closure, mlp, odd_cnn, recurrent
from test_contract import same_weights, snapshot, train, unchanged
from torch import nn
from torch.func import functional_call

import kfqn
from kfqn.steps.weight_average import Latest, PolynomialAverage

DYNAMO = pytest.mark.filterwarnings(  # what it does with tensors while it traces
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
LATEST = kfqn.Parts(weights=Latest())


@pytest.fixture(params=AUTOMATIC)
def make(request):
    return AUTOMATIC[request.param]


def normed():
    """With parameters that have no factors; input (5,)."""
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def held(model):
    """Copies of the weights that the model holds."""
    return [p.detach().clone() for p in model.parameters()]


def latest(model, optimizer):
    """z, while the model holds x."""
    return [p.detach() + optimizer.state[p].get("ahead", 0) for p in model.parameters()]


def same(left, right):
    return all(map(torch.equal, left, right))


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    return True


def backward(model, x, target):
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss


def by_hand(model, optimizer, batch):
    optimizer.zero_grad()
    backward(model, *batch)
    optimizer.step()


# --- what is seen where ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("others", [torch.optim.AdamW, torch.optim.SGD])
def test_x_is_the_average_of_z_and_z_goes_as_without_it(make, others):
    """x_k = Σ_j z_j w_j/Σ w_j with w_j = j (j+1) … (j+14), which c = 16/(k+15) comes to; parameters without
    factors are averaged too."""
    model, data = normed(), batches((5,), 13)
    twin = copy.deepcopy(model)
    optimizer = make(model, others=lambda ps: others(ps, lr=0.01))
    theirs = make(twin, others=lambda ps: others(ps, lr=0.01), parts=LATEST)
    path, weights = [], []
    for k, batch in enumerate(data[:12], start=1):
        train(model, optimizer, [batch])
        train(twin, theirs, [batch])
        path.append(held(twin))
        weights.append(float(torch.arange(k, k + 15, dtype=torch.double).prod()))
        assert close(latest(model, optimizer), path[-1])
        shares = torch.tensor(weights) / sum(weights)
        mean = [torch.tensordot(shares, torch.stack(of), 1) for of in zip(*path, strict=True)]
        assert close(held(model), mean)


@pytest.mark.parametrize("power", [0.0, 3.0])
@pytest.mark.usefixtures("double")
def test_with_power_zero_it_is_the_mean_of_all_steps(power):
    model, data = mlp(), batches((5,), 9)
    optimizer = kfqn.KFBFGS(model, parts=kfqn.Parts(weights=PolynomialAverage(power)))
    path = []
    for batch in data:
        train(model, optimizer, [batch])
        path.append(latest(model, optimizer))
    x = path[0]
    for k, z in enumerate(path[1:], start=2):
        x = [a + (power + 1) / (k + power) * (b - a) for a, b in zip(x, z, strict=True)]
    assert close(held(model), x)
    if not power:
        assert close(held(model), [sum(z) / len(path) for z in zip(*path, strict=True)])


@pytest.mark.usefixtures("double")
def test_training_passes_see_z_and_all_others_x(make):
    model, data = normed(), batches((5,), 6)
    optimizer, seen = make(model), []
    train(model, optimizer, data[:5])
    x, z = held(model), latest(model, optimizer)
    assert not same(x, z)

    def look(module, args):
        seen.append(held(model))

    model[0].register_forward_pre_hook(look)
    with torch.no_grad():
        model(data[5][0])  # of a module in training mode
    model.eval()
    model(data[5][0])
    with torch.inference_mode():
        model(data[5][0])
    model.train()
    for weights in seen:
        assert same(weights, x)
    backward(model, *data[5])
    assert close(seen[3], z)
    with torch.no_grad():
        model(data[5][0])  # between a training pass and its step it is z that there is
    assert same(seen[4], seen[3])
    optimizer.step()
    assert close(
        held(model), [a + 16 / 21 * (b - a) for a, b in zip(x, latest(model, optimizer), strict=True)]
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_between_steps_hold_x(make, how):
    model, data = normed(), batches((5,), 6)
    optimizer = make(model)
    train(model, optimizer, data[:5])
    x = held(model)
    if how == "state_dict":
        other = normed()
        other.load_state_dict(model.state_dict())
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    other(data[5][0])  # its own hooks are gone
    assert same(held(other), x)
    assert same(held(model), x)


def test_a_model_that_is_run_by_its_parts_goes_ahead_too(make):
    model, data = odd_cnn(), batches((2, 6, 6), 8)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    for x, target in data:
        train(model, optimizer, [(x, target)])

        def evaluate(x=x, target=target):
            theirs.zero_grad()
            a = x
            for module in twin:
                a = module(a)
            loss = F.cross_entropy(a, target)
            loss.backward()
            return loss

        theirs.step(evaluate)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_a_module_used_twice_goes_ahead_once(make):
    model, data = recurrent(), batches((2, 6, 6), 8)
    optimizer = make(model)
    for batch in data:
        train(model, optimizer, [batch])
        before = latest(model, optimizer)
        model(batch[0])
        model(batch[0])
        torch.testing.assert_close(held(model), before)
        optimizer.zero_grad()


# --- statistics of BatchNorm ----------------------------------------------------------------------------


def batch_normed(affine=True):
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=affine), nn.Tanh(), nn.Linear(6, 3))


def statistics(model):
    return [model[1].running_mean.clone(), model[1].running_var.clone()]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_are_averaged_as_the_weights_are(make, affine):
    """Those that training passes leave go on as without averages; without a weight they have no state."""
    model, data = batch_normed(affine), batches((5,), 12)
    twin = copy.deepcopy(model)
    optimizer, theirs, x = make(model), make(twin, parts=LATEST), statistics(model)
    for k, batch in enumerate(data, start=1):
        by_hand(model, optimizer, batch)
        by_hand(twin, theirs, batch)
        share = 16 / (k + 15) if affine else 1.0
        x = [a + share * (z - a) for a, z in zip(x, statistics(twin), strict=True)]
        assert close(statistics(model), x)
    assert same(statistics(model), statistics(twin)) != affine


def test_they_fit_the_averaged_weights_better_than_those_of_the_last_steps():
    """Squared distance, over ten trainings, of the running means from those of x's pre-activations."""
    averaged = latest = 0.0
    for seed in range(10):
        torch.manual_seed(seed)
        model, data = batch_normed(), batches((5,), 160)
        twin = copy.deepcopy(model)
        optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin, parts=LATEST)
        for batch in data:
            by_hand(model, optimizer, batch)
            by_hand(twin, theirs, batch)
        with torch.no_grad():
            wanted = model[0](torch.cat([x for x, _ in data])).mean(0)
        averaged += float((statistics(model)[0] - wanted).square().sum())
        latest += float((statistics(twin)[0] - wanted).square().sum())
    assert averaged < 0.7 * latest


@pytest.mark.parametrize("k", [1, 7])
def test_resuming_and_copies_go_on_with_both_statistics(make, k):
    model, data = batch_normed(), batches((5,), k + 9)
    optimizer = make(model)
    train(model, optimizer, data[:k])
    weights, state = through_a_file(model, optimizer)
    twin = batch_normed()
    twin.load_state_dict(weights)
    theirs = make(twin)
    theirs.load_state_dict(state)
    others = copy.deepcopy((model, optimizer))
    for those in ((model, optimizer), (twin, theirs), others):
        train(*those, data[k:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    assert unchanged(snapshot(model, optimizer), snapshot(*others))


def test_frozen_statistics_stay_to_the_bit():
    model, data = batch_normed(), batches((5,), 9)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, data[:4])
    before = statistics(model)
    model[1].eval()
    optimizer.state[model[1].weight]["running_mean"].zero_()  # as where it was frozen from the start
    optimizer.state[model[1].weight]["running_var"].zero_()
    train(model, optimizer, data[4:])
    assert same(statistics(model), before)


# --- what is done to the weights between steps ----------------------------------------------------------


def clamp(model):
    for p in model.parameters():
        p.clamp_(-0.1, 0.1)


def scale(model):
    for p in model.parameters():
        p.copy_(0.5 * p)


def load(model):
    torch.manual_seed(7)
    model.load_state_dict(normed().to(next(model.parameters()).dtype).state_dict())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("change", [clamp, scale, load])
def test_what_is_done_to_weights_between_steps_is_done_to_z_too(make, change):
    model, data = normed(), batches((5,), 6)
    optimizer = make(model)
    train(model, optimizer, data[:4])
    before, ahead = held(model), latest(model, optimizer)
    with torch.no_grad():
        change(model)
    after = held(model)
    wanted = [z + b - a for z, a, b in zip(ahead, before, after, strict=True)]
    backward(model, *data[4])
    assert close(held(model), wanted)
    optimizer.step()
    moved = zip(after, latest(model, optimizer), strict=True)
    assert close(held(model), [x + 16 / 20 * (z - x) for x, z in moved])


# --- resuming -------------------------------------------------------------------------------------------


def through_a_file(*what):
    file = io.BytesIO()
    torch.save([of.state_dict() for of in what], file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("between", [True, False], ids=["between steps", "before a step"])
@pytest.mark.parametrize("k", [0, 1, 11])
def test_resuming_is_bit_identical(make, k, between):
    model, data = normed(), batches((5,), k + 14)
    optimizer = make(model)
    train(model, optimizer, data[:k])
    if not between:
        model(data[k][0])
    weights, state = through_a_file(model, optimizer)
    twin = normed()
    twin.load_state_dict(weights)
    theirs = make(twin)
    theirs.load_state_dict(state)
    train(model, optimizer, data[k:])
    train(twin, theirs, data[k:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_both_go_on_as_one(make, how):
    model, data = normed(), batches((5,), 14)
    optimizer = make(model)
    train(model, optimizer, data[:5])
    both = (model, optimizer)
    twin, theirs = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(model, optimizer, data[5:])
    train(twin, theirs, data[5:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


# --- steps without a training pass ----------------------------------------------------------------------


@pytest.mark.usefixtures("double")
def test_steps_in_evaluation_mode_are_plain(make):
    model, data = normed().eval(), batches((5,), 9)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin, parts=LATEST)
    train(model, optimizer, data)
    train(twin, theirs, data)
    assert close(held(model), held(twin))
    assert not any(state["ahead"].any() for state in optimizer.state.values())


@pytest.mark.usefixtures("double")
def test_after_a_step_in_evaluation_mode_x_is_z():
    model, data = normed(), batches((5,), 9)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, data[:6])
    assert not same(held(model), latest(model, optimizer))
    before = held(model)
    train(model.eval(), optimizer, data[6:7])
    assert same(held(model), latest(model, optimizer))
    bias, moved = before[0], (held(model)[0] - before[0]).norm()
    assert 0 < moved < 0.1 * bias.norm()  # one step from x


def test_gradients_set_by_hand_are_those_of_x():
    model, data = mlp(), batches((5,), 5)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, data)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert same(held(model), latest(model, optimizer))


# --- loops ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
def test_gradients_of_micro_batches_are_those_of_one_z():
    model, data = mlp(), batches((5,), 9)
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    for x, target in data[:8]:
        by_hand(model, optimizer, (x, target))
        theirs.zero_grad()
        for part in (slice(0, 2), slice(2, 4)):
            (F.cross_entropy(twin(x[part]), target[part]) / 2).backward()
            twin.eval()
            twin(x[part])  # somebody looks
            twin.train()
        theirs.step()
        assert close(held(model), held(twin))


def test_a_step_that_is_skipped_changes_nothing_of_what_follows():
    """As a GradScaler skips it: ``step`` is not called."""
    model, data = normed(), batches((5,), 9)
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    for k, batch in enumerate(data):
        if k == 5:
            theirs.zero_grad()
            (float("inf") * F.cross_entropy(twin(batch[0]), batch[1])).backward()
        by_hand(model, optimizer, batch)
        by_hand(twin, theirs, batch)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_gradient_scaler_skips_and_scales(enabled):
    """Scaled by a power of two the gradient gives the same step to the bit; the batch with an inf none."""
    model, data = mlp(), batches((5,), 9)
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
    for k, (x, target) in enumerate(data):
        if k != 5:
            by_hand(model, optimizer, (x, target))
        elif not enabled:
            continue
        theirs.zero_grad()
        loss = F.cross_entropy(twin(x), target) * (float("inf") if k == 5 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(theirs)
        scaler.update()
    for p, q in zip(held(model), held(twin), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore:.*the step was refused")
def test_a_step_that_is_refused_or_fails_puts_x_back_to_the_bit(make):
    model, data = normed(), batches((5,), 9)
    optimizer = make(model)
    train(model, optimizer, data[:7])
    before = held(model)
    optimizer.step(closure(model, optimizer, *data[7], lambda o, y: F.cross_entropy(o, y) * float("nan")))
    assert same(held(model), before)

    def fails():
        optimizer.zero_grad()
        backward(model, *data[7])
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    assert same(held(model), before)
    assert optimizer.diagnostics()[""]["refused"] == 1
    train(model, optimizer, data[7:])


def test_two_optimizers_of_two_models_that_see_each_other():
    """A generator and a discriminator: each is as if the other's passes were none of its own."""
    generator, critic = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)), mlp()
    ours, theirs = kfqn.KFBFGS(generator), kfqn.KFBFGS(critic)
    for real, _ in batches((5,), 8):
        theirs.zero_grad()
        made = generator(torch.randn(len(real), 3))
        (critic(made.detach()).mean() - critic(real).mean()).backward()
        before = held(generator)
        theirs.step()
        assert same(held(generator), before)
        ours.zero_grad()
        (-critic(generator(torch.randn(len(real), 3))).mean()).backward()
        z = held(critic)
        ours.step()
        assert same(held(critic), z)
    for optimizer, model in ((ours, generator), (theirs, critic)):
        assert optimizer.diagnostics()["0"]["steps"] == 8
        assert not same(held(model), latest(model, optimizer))


@pytest.mark.parametrize("first", ["regulariser", "evaluation mode"])
def test_a_graph_made_before_the_training_pass_can_be_differentiated(first):
    """Going ahead writes to weights that this graph has saved; it must not say that they are lost."""
    model, data = mlp(), batches((5,), 6)
    optimizer = kfqn.KFBFGS(model)
    for x, target in data:
        optimizer.zero_grad()
        if first == "regulariser":
            loss = 1e-3 * sum(p.square().sum() for p in model.parameters())
        else:
            loss = model.eval()(x).square().mean()
            model.train()
        loss = loss + F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert not same(held(model), latest(model, optimizer))


# --- between a training pass and its step ---------------------------------------------------------------


def skipped(model, optimizer, x, target):
    """As a GradScaler skips it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(float("inf") * F.cross_entropy(model(x), target)).backward()
    scaler.step(optimizer)
    scaler.update()


def micro_batch(model, optimizer, x, target):
    optimizer.zero_grad()
    backward(model, x, target)


def failing(model, optimizer, x, target):
    model(x)  # and then something raises


WAITING = [skipped, micro_batch, failing]


def midway(model, optimizer, data, waiting):
    """What the model holds between steps; then it holds z, which a step has not followed."""
    train(model, optimizer, data[:5])
    x = held(model)
    waiting(model, optimizer, *data[5])
    assert not same(held(model), x)
    return x


@pytest.mark.parametrize("waiting", WAITING)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_sees_x_and_the_next_step_z(make, waiting, context):
    """Run as a whole, by its parts, and where it fails: with the statistics too, and without a trace."""
    model, data = batch_normed(), batches((5,), 8)
    optimizer, seen = make(model), []
    train(model, optimizer, data[:5])
    with torch.no_grad():
        wanted = model.eval()(data[6][0])
    model.train()
    waiting(model, optimizer, *data[5])
    z, moved = held(model), statistics(model)
    before = copy.deepcopy((model, optimizer))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    model.eval()
    with context():
        assert torch.equal(model(data[6][0]), wanted)
        assert same([*held(model), *statistics(model)], [*z, *moved])
        a = data[6][0]
        for module in model:
            a = module(a)
        assert torch.equal(a, wanted)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(2, 7))
        assert torch.equal(model(data[6][0]), wanted)
    handles = [part.register_forward_hook(lambda *args: seen.append(held(model))) for part in model[:2]]
    model(data[6][0])  # with gradients: a training pass in evaluation mode, whose backward pass would need z
    model.train()
    with torch.no_grad():
        model[1].eval()(torch.randn(3, 6))  # frozen in a model that is in training mode
        model(data[6][0])
    model.train()
    assert len(seen) == 5
    assert all(same(weights, z) for weights in seen)
    for handle in handles:
        handle.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    for those in ((model, optimizer), before):
        by_hand(*those, data[7])
    assert unchanged(snapshot(model, optimizer), snapshot(*before))


def test_an_evaluation_between_a_pass_and_its_backward_pass_changes_no_gradient():
    """A teacher that is the model itself."""
    model, data = batch_normed(), batches((5,), 7)
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    for k, (x, target) in enumerate(data):
        by_hand(model, optimizer, (x, target))
        theirs.zero_grad()
        loss = F.cross_entropy(twin(x), target)
        with torch.no_grad():
            taught = twin.eval()(x)
        twin.train()
        loss.backward()
        theirs.step()
        assert k == 0 or taught.isfinite().all()
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


def test_an_evaluation_that_is_interrupted_costs_nothing(make):
    model, data = normed(), batches((5,), 8)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    midway(model, optimizer, data, micro_batch)
    midway(twin, theirs, data, micro_batch)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = twin[2].register_forward_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        twin.eval()(data[6][0])
    handle.remove()
    twin.train()
    for those in ((model, optimizer), (twin, theirs)):
        backward(those[0], *data[6])
        those[1].step()
        train(*those, data[7:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


@pytest.mark.parametrize("waiting", WAITING)
def test_a_model_is_saved_with_x_whole_or_in_part(make, waiting):
    model, data = batch_normed(), batches((5,), 8)
    optimizer = make(model)
    train(model, optimizer, data[:5])
    wanted = copy.deepcopy(model.state_dict())
    waiting(model, optimizer, *data[5])
    z = held(model)
    wanted["1.num_batches_tracked"] = model[1].num_batches_tracked
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for saved in (torch.load(file), nn.ModuleDict({"inside": model}).state_dict()):
        assert len(saved) == len(wanted)
        assert all(map(torch.equal, saved.values(), wanted.values()))
    assert torch.equal(model[0].state_dict()["weight"], wanted["0.weight"])
    assert same(held(model), z)
    with optimizer.averaged():
        assert all(map(torch.equal, model.state_dict().values(), wanted.values()))
        assert all(map(torch.equal, copy.deepcopy(model).state_dict().values(), wanted.values()))
    assert same(held(model), z)


@pytest.mark.parametrize("saved", ["model first", "optimizer first"])
def test_gradients_that_wait_for_their_step_outlast_a_checkpoint(make, saved):
    """The step is that of z, to rounding; what is loaded goes on from there."""
    model, data = normed(), batches((5,), 9)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    midway(model, optimizer, data, micro_batch)
    x = midway(twin, theirs, data, micro_batch)
    order = (twin, theirs) if saved == "model first" else (theirs, twin)
    loaded = dict(zip(map(type, order), through_a_file(*order), strict=True))
    assert same(held(twin), x)
    optimizer.step()
    theirs.step()
    for left, right in ((held(model), held(twin)), (latest(model, optimizer), latest(twin, theirs))):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    other = normed()
    other.load_state_dict(loaded[type(twin)])
    resumed = make(other)
    resumed.load_state_dict(loaded[type(theirs)])
    train(other, resumed, data[5:6])
    torch.testing.assert_close(held(other), held(twin), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_between_a_pass_and_its_backward_pass_is_an_error_of_torch():
    model, data = normed(), batches((5,), 6)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, data[:5])
    loss = F.cross_entropy(model(data[5][0]), data[5][1])
    model.state_dict()
    loss.backward(retain_graph=True)
    optimizer.state_dict()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_averaged_has_x_inside_where_training_passes_and_steps_go_on(make):
    model, data = normed(), batches((5,), 8)
    twin = copy.deepcopy(model)
    optimizer, theirs = make(model), make(twin)
    x = midway(model, optimizer, data, micro_batch)
    midway(twin, theirs, data, micro_batch)
    with theirs.averaged():
        assert same(held(twin), x)
        both = copy.deepcopy((twin, theirs))
        with torch.no_grad():
            twin.eval()(data[6][0])
        twin.train()
        assert same(held(twin), x)
        theirs.step()
        after = held(twin)
    assert same(held(twin), after)
    optimizer.step()
    torch.testing.assert_close(held(model), after)
    train(*both, data[5:6])
    torch.testing.assert_close(held(both[0]), after)


# --- around the model -----------------------------------------------------------------------------------


@DYNAMO
def test_a_part_compiled_as_one_graph_runs():
    torch._dynamo.reset()
    model, data = normed(), batches((5,), 6)
    twin = copy.deepcopy(model)
    twin[1].compile(backend="eager", fullgraph=True)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin)
    train(model, optimizer, data)
    train(twin, theirs, data)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated")
def test_torch_func_and_traces_see_the_weights_that_are_there():
    model, data = mlp(), batches((5,), 6)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, data[:5])
    x, parameters = held(model), dict(model.named_parameters())

    def loss(parameters):
        return functional_call(model, parameters, (data[5][0],)).square().mean()

    torch.func.grad(loss)(parameters)
    torch.func.vmap(model)(data[5][0])
    torch.jit.trace(model, (data[5][0],), check_trace=False)
    assert same(held(model), x)


def test_activation_checkpointing_changes_nothing(make):
    plain = odd_cnn()
    model = Checkpointed(copy.deepcopy(plain))
    optimizer, theirs = make(plain), make(model)
    for batch in batches((2, 6, 6), 8):
        train(plain, optimizer, [batch])
        train(model, theirs, [batch])
    assert same_weights(plain, model)


# --- schedules, types, groups ---------------------------------------------------------------------------


def test_a_schedule_that_ends_at_zero_ends_with_x_at_z(make):
    model, data = normed(), batches((5,), 31)
    optimizer, apart = make(model), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 30)
    for batch in data:
        train(model, optimizer, [batch])
        apart.append(max(float(state["ahead"].abs().max()) for state in optimizer.state.values()))
        schedule.step()
    assert apart[3] > 1e-3
    assert apart[-1] == 0


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("lr", "share"), [(2.0, 16 / 20), (1.0, 16 / 20), (0.9, 16 / 20 / 0.9), (0.5, 1.0)])
def test_x_is_nearer_to_z_where_the_rate_is_lower(lr, share):
    model, data = mlp(), batches((5,), 6)
    optimizer = kfqn.KFBFGS(model)
    train(model, optimizer, data[:4])
    x = held(model)
    optimizer.param_groups[0]["lr"] = lr
    train(model, optimizer, data[4:5])
    wanted = [a + share * (z - a) for a, z in zip(x, latest(model, optimizer), strict=True)]
    assert close(held(model), wanted)


def test_weights_in_half_precision_are_not_averaged():
    model, data = mlp().to(torch.bfloat16), batches((5,), 6, dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    optimizer, theirs = kfqn.KFBFGS(model), kfqn.KFBFGS(twin, parts=LATEST)
    train(model, optimizer, data)
    train(twin, theirs, data)
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))


class Words(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 30)

    def forward(self, x):
        return self.head(self.words(x))


def test_parameters_with_sparse_gradients_are_not_averaged():
    model = Words()
    optimizer = kfqn.KFBFGS(model)
    for _ in range(4):
        train(model, optimizer, [(torch.randint(7, (5,)), torch.randint(3, (5,)))])
    assert "ahead" not in optimizer.state[model.words.weight]
    assert optimizer.state[model.head.weight]["ahead"].any()


def test_frozen_parameters_and_those_of_paper_groups_stay_what_they_are(make):
    model, data = odd_cnn(), batches((2, 6, 6), 6)
    model[2].requires_grad_(False)
    optimizer = make(model, groups=[{"modules": "0", "lr": 0.01}])
    train(model, optimizer, data[:4])
    x = held(model)
    model(data[4][0])
    moved = {n for (n, p), old in zip(model.named_parameters(), x, strict=True) if not torch.equal(p, old)}
    assert moved == {"4.weight", "4.bias", "7.weight", "7.bias"}


def test_with_a_number_nothing_is_averaged():
    model, data = normed(), batches((5,), 4)
    optimizer = kfqn.KFBFGS(model, lr=0.1, damping=1.0)
    train(model, optimizer, data)
    assert not any("ahead" in state for state in optimizer.state.values())


def test_a_layer_that_joins_is_averaged_from_its_first_step_on(make):
    model, data = normed(), batches((5,), 8)
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, data[:4])
    model[0].requires_grad_(True)
    optimizer.add_param_group({"modules": "0"})
    before = held(model)[0]
    train(model, optimizer, data[4:5])
    assert not torch.equal(before, model[0].weight)
    assert not optimizer.state[model[0].weight]["ahead"].any()
    train(model, optimizer, data[5:])
    assert optimizer.state[model[0].weight]["ahead"].any()


@pytest.mark.filterwarnings("ignore:.* start anew:RuntimeWarning")
def test_factors_that_start_anew_leave_x_and_z_where_they_are():
    model, data = mlp(), batches((5,), 8)
    optimizer = kfqn.KFBFGS(model, groups=[{"modules": "0"}])
    train(model, optimizer, data[:6])
    x, z = held(model), latest(model, optimizer)
    optimizer.state[model[0].weight]["H_A"].fill_(float("nan"))
    train(model, optimizer, data[6:7])  # its inputs were not kept: it stays, and starts anew in the next step
    torch.testing.assert_close(latest(model, optimizer)[0], z[0])
    torch.testing.assert_close(held(model)[0], x[0] + 16 / 22 * (z[0] - x[0]))
    x = held(model)
    train(model, optimizer, data[7:])
    z = latest(model, optimizer)
    assert optimizer.diagnostics()["0"]["resets"] == 1
    for after, a, b in zip(held(model), x, z, strict=True):
        torch.testing.assert_close(after, a + 16 / 23 * (b - a))
