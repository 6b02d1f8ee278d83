"""Parts that are not those that settings choose: each trains, resumes, and is what its name says."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import batches, closure, mlp, odd_cnn
from test_contract import snapshot, train, unchanged

import kfqn
from kfqn.curvature.damping import AbsoluteDamping, RelativeDamping
from kfqn.curvature.input_factor import AveragedRoot, BatchInverse, HessianActionBFGS, NoInputFactor
from kfqn.curvature.output_factor import BFGS, LBFGS, NoOutputFactor
from kfqn.formulas.statistics import damped_inverse
from kfqn.race.entrants import entrant_of
from kfqn.race.entrants.ours import PARTS, parts
from kfqn.steps.average import Averaged, HeavyBall, Nesterov, NoAverage
from kfqn.steps.cadence import Regular, YoungOften
from kfqn.steps.direction import Orthogonalised, Plain
from kfqn.steps.relative import RelativeSteps
from kfqn.steps.rule import FixedRate
from kfqn.steps.weight_average import Latest, PolynomialAverage

ROOT = Path(__file__).parents[1]
OF = {
    "input": (HessianActionBFGS(), BatchInverse(), AveragedRoot(), NoInputFactor()),
    "output": (BFGS(), NoOutputFactor()),
    "curved_only": (False, True),
    "average": (Averaged(), Nesterov(), NoAverage(), HeavyBall()),
    "direction": (Plain(), Orthogonalised()),
    "steps": (RelativeSteps(share=0.4),),
    "cadence": (YoungOften(), Regular()),
    "weights": (Latest(), PolynomialAverage(), PolynomialAverage(power=1.0)),
}
ONE = [(kind, part) for kind, several in OF.items() for part in several]
MODES = {"auto": {}, "paper": {"lr": 0.1, "damping": 1.0, "curvature_interval": 1}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "part"), ONE, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_every_part_trains_and_resumes_to_the_bit(kind, part, mode):
    torch.manual_seed(0)
    model, data = odd_cnn(), batches((2, 6, 6), 1) * 30
    chosen = kfqn.Parts(**{kind: part})
    optimizer = kfqn.KFBFGS(model, **MODES[mode], parts=chosen)
    first = train(model, optimizer, data[:20])[0]
    twin = copy.deepcopy(model)
    theirs = kfqn.KFBFGS(twin, **MODES[mode], parts=chosen)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    last = train(model, optimizer, data[20:])[-1]
    train(twin, theirs, data[20:])
    assert unchanged(snapshot(model, optimizer), snapshot(twin, theirs))
    assert last < 0.85 * first


def test_parts_of_a_group_follow_its_settings_unless_they_are_given():
    optimizer = kfqn.KFBFGS(
        odd_cnn(), groups=[{"modules": "0", "lr": 0.1}], parts=kfqn.Parts(direction=Plain())
    )
    ours, papers = (optimizer.training.of(layer) for layer in sorted_by_place(optimizer))
    assert (ours.steps, papers.steps) == (RelativeSteps(), FixedRate())
    assert (ours.average, papers.average) == (Nesterov(), Averaged())
    assert (ours.input, papers.input) == (AveragedRoot(), HessianActionBFGS())
    assert (ours.output, papers.output) == (NoOutputFactor(), BFGS())
    assert (ours.weights, papers.weights) == (PolynomialAverage(), Latest())
    assert (ours.cadence, papers.cadence) == (Regular(), YoungOften())
    assert (ours.damping, papers.damping) == (RelativeDamping(), AbsoluteDamping())
    assert (ours.direction, papers.direction) == (Plain(), Plain())


@pytest.mark.parametrize("make", [kfqn.KFBFGS, kfqn.KFLBFGS])
def test_what_is_no_part_is_refused_in_a_sentence(make):
    with pytest.raises(TypeError, match=r"parts must be a kfqn\.Parts, such as .*, but is 3"):
        make(mlp(), parts=3)
    with pytest.raises(TypeError, match=r"the part 'input' must be a kfqn\..*InputFactor, but is 'none'"):
        make(mlp(), parts=kfqn.Parts(input="none"))
    with pytest.raises(TypeError, match="the part 'direction' must be hashable"):
        kfqn.Parts(direction=[])
    with pytest.raises(TypeError, match="the part 'direction' must be a"):
        kfqn.Parts(direction=Plain)


def sorted_by_place(optimizer):
    """A layer of each group."""
    places = optimizer.training.groups.places
    return [next(x for x in places if places[x] == place) for place in sorted({*places.values()})]


@pytest.mark.usefixtures("double")
def test_without_factors_a_step_is_that_of_momentum():
    """W ← W − α D̂W, to the bit of rounding, where H_A = H_G = I."""
    model, data = mlp(), batches((5,), 6)
    twin = copy.deepcopy(model)
    bare = kfqn.Parts(input=NoInputFactor(), output=NoOutputFactor())
    optimizer = kfqn.KFBFGS(model, lr=0.3, damping=1.0, parts=bare)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9, dampening=0.9)
    average = {p: torch.zeros_like(p) for p in twin.parameters()}
    for x, y in data:
        optimizer.step(closure(model, optimizer, x, y))
        closure(twin, theirs, x, y)()
        with torch.no_grad():
            for p, D in average.items():
                D.mul_(0.9).add_(p.grad, alpha=0.1)
                p.sub_(D, alpha=0.3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("double")
def test_no_second_pass_is_run_for_nobody():
    model, ((x, y),) = mlp(), batches((5,), 1)
    optimizer = kfqn.KFBFGS(model, lr=0.3, curvature_interval=1, parts=kfqn.Parts(output=NoOutputFactor()))
    calls = []

    def evaluate():
        calls.append(1)
        return closure(model, optimizer, x, y)()

    for _ in range(3):
        optimizer.step(evaluate)
    assert len(calls) == 3
    assert optimizer.diagnostics()["0"]["A taken"] == 3


@pytest.mark.usefixtures("double")
def test_an_inverse_of_the_batch_is_one_for_any_damping():
    model, ((x, y),) = mlp(), batches((5,), 1, size=9)
    optimizer = kfqn.KFBFGS(model, parts=kfqn.Parts(input=BatchInverse()))
    optimizer.step(closure(model, optimizer, x, y))
    state = optimizer.state[model[0].weight]
    A = x.T @ x / len(x)
    expected = damped_inverse(A, float(state["lambda_A"]))
    torch.testing.assert_close(state["H_A"], expected)


def test_a_history_can_take_the_place_of_a_matrix_where_its_size_is_known():
    optimizer = kfqn.KFLBFGS(mlp(), history_size=2)
    assert optimizer.training.of(optimizer.layers[0]).output == LBFGS()


@pytest.mark.parametrize("key", PARTS)
def test_every_part_is_a_setting_of_races(key):
    for word in PARTS[key]:
        for name, needed in (("kfbfgs:auto", {}), ("kfbfgs", {"lr": 0.1, "damping": 1.0})):
            made = entrant_of(name).build(mlp(), {key: word, **needed}, 0.0)
            named = {"pairs": "curved_only"}.get(key, key)
            wanted = getattr(parts({key: word}), named)
            assert getattr(made.training.of(made.training.groups.layers[0]), named) == wanted


def test_the_rule_of_the_page_is_that_of_the_example_and_trains():
    page = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    shown = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "StepRule" in block)
    example = (ROOT / "examples" / "own_step_rule.py").read_text(encoding="utf-8")
    untyped = re.sub(r": (?:Members|Mapping\[[^=)]*?\]|Group|Layer)(?=[,)])", "", example)
    untyped = re.sub(r" -> [^:\n]+:", ":", untyped)
    assert shown.split("\nclass ")[1].strip() in untyped
    command = [sys.executable, str(ROOT / "examples" / "own_step_rule.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    losses = [float(x) for x in re.findall(r"mini-batch ([\d.]+)", done.stdout)]
    assert losses[-1] < 0.4
    assert len(losses) == 3


def test_the_first_examples_of_the_page_run():
    page = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    first = re.findall(r"```python\n(.*?)```", page, re.S)[0]
    names = {"model": mlp()}
    exec(first, names)
    optimizer = names["optimizer"]
    ((x, y),) = batches((5,), 1)
    assert optimizer.step(kfqn.closure(names["model"], x, y, F.cross_entropy)).isfinite()
