"""Who is first, from files of runs written by hand: an entrant that does not learn has no say."""

import io
import itertools
import math
import warnings
from dataclasses import replace

import pytest
from lab import config
from rich.console import Console

from kfqn.race.report.figure import draw
from kfqn.race.report.results import PAPER, RACE, Result, common_target, learned
from kfqn.race.report.sentences import verdict
from kfqn.race.report.table import print_table, rows
from kfqn.race.runs import Run

GUESSING = math.log(10)
FAST = {"adam": [0.9, 0.3, 0.1], "kfbfgs": [0.6, 0.2, 0.15]}  # one loss an epoch; an epoch is a second
IDLE = {
    "a learning rate of nothing": [2.31, 2.305, 2.304],
    "hardly learning": [2.2, 1.9, 1.6],
    "up and away": [2.4, 9.0, 1e4],
}


def standing(folder, entrant, seeds, statuses=None, measure=RACE, **changes):
    """An entrant with these losses, a list a seed."""
    runs = []
    for seed, losses in enumerate(seeds):
        run = Run.create(folder, config(entrant=entrant, settings={"lr": 1.0}, seed=seed, **changes))
        lines = [
            {"epoch": k, measure.loss: loss, "test_error": 0.5, measure.time: float(k)}
            for k, loss in enumerate(losses, 1)
        ]
        run.write([*lines, {"status": (statuses or ["finished"] * len(seeds))[seed], "reason": ""}])
        runs.append(run)
    return Result(runs, measure)


@pytest.fixture
def fast(tmp_path):
    return [standing(tmp_path, name, [losses]) for name, losses in FAST.items()]


@pytest.mark.parametrize("losses", IDLE.values(), ids=IDLE)
def test_who_does_not_learn_changes_nothing(fast, losses, tmp_path):
    idle = standing(tmp_path, "sgd", [losses])
    for field in itertools.permutations([*fast, idle]):
        assert common_target(field) == common_target(fast) == 0.15
        assert verdict(field) == f"{verdict(fast)} Learned too little to have a say: SGD-m (lr 1)."
        table = rows(field)
        assert [row.label for row in table] == ["Adam (lr 1)", "KF-BFGS (lr 1)", "SGD-m (lr 1)"]
        assert table[-1].seconds_to_target == "–"


@pytest.mark.parametrize("statuses", [["diverged"] * 3, ["finished", "diverged", "failed"]])
def test_neither_does_who_diverges_however_low_it_was(fast, statuses, tmp_path):
    lost = standing(tmp_path, "sgd", [[1e-3, 1e-4, 1e-5]] * 3, statuses)
    assert verdict([*fast, lost]) == verdict(fast)
    assert [row.label for row in rows([lost, *fast])][-1] == "SGD-m (lr 1)"


def test_the_sentences(fast):
    assert verdict(fast) == (
        "Adam (lr 1) was first at the common target, training loss 0.15: after 3.00 s, before KF-BFGS (lr 1) "
        "after 3.00 s. Adam (lr 1) ended lowest, at 0.1."
    )


def test_first_at_the_target_and_lowest_in_the_end_can_be_two(tmp_path):
    early = standing(tmp_path, "kflbfgs", [[0.2, 0.17, 0.18]])
    late = standing(tmp_path, "sgd", [[0.9, 0.5, 0.01]])
    assert verdict([early, late]) == (
        "KF-BFGS(L) (lr 1) was first at the common target, training loss 0.17: after 2.00 s, before SGD-m "
        "(lr 1) after 3.00 s. SGD-m (lr 1) ended lowest, at 0.01."
    )
    assert rows([early, late])[0].label == "SGD-m (lr 1)"


def test_one_alone_is_first_at_its_own_lowest(tmp_path):
    alone = standing(tmp_path, "adam", [[1.5, 0.5, 0.7], [1.5, 0.6, 0.8], [1.5, 0.4, 0.9]])
    assert verdict([alone]) == "Adam (lr 1) was first at the common target, training loss 0.5, after 2.00 s."


def test_nobody_learned_and_nobody_finished(tmp_path):
    idle = [standing(tmp_path, name, [[2.5, GUESSING, 2.6]]) for name in ("sgd", "adam")]
    with_lost = [*idle, standing(tmp_path, "kfac", [[0.1]], ["diverged"])]
    assert learned(with_lost) == []
    assert math.isnan(common_target(with_lost))
    assert verdict(with_lost) == "Nobody learned: guessing among 10 classes has a loss of 2.3."
    assert verdict(with_lost[-1:]) == "No run finished."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw([("", with_lost)], "nobody", tmp_path / "nobody.png")
    assert (tmp_path / "nobody.png").exists()


def test_seeds_decide_by_their_median(tmp_path):
    good, bad = [1.0, 0.2], [2.3, 2.3]
    mostly = standing(tmp_path / "a", "sgd", [good, bad, good])
    hardly = standing(tmp_path / "b", "sgd", [bad, good, bad])
    adam = standing(tmp_path, "adam", [[1.0, 0.1]] * 3)
    assert learned([mostly, adam]) == [mostly, adam]
    assert learned([hardly, adam]) == [adam]


def test_guessing_is_that_of_the_problems_classes_and_of_any_measure(tmp_path):
    hundred = {"problem": "cifar100-vgg16", "measure": PAPER}
    slow = standing(tmp_path, "sgd", [[4.6, 3.9]], **hundred)  # ln 100 = 4.605
    quick = standing(tmp_path, "adam", [[4.0, 3.3]], **hundred)
    quicker = standing(tmp_path, "kfac", [[3.5, 2.5]], **hundred)
    assert learned([slow, quick]) == [slow, quick]
    assert learned([slow, quick, quicker]) == [quick, quicker]
    assert "moving average of the loss 3.3: after 2.00 CPU s" in verdict([slow, quick, quicker])


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_a_terminal_and_breaks_no_number(fast, width):
    long = {"settings": "lr 0.02, beta 0.95, cosine, warmup 0.05, floor 0.1", "seconds_to_target": "1234.50"}
    table = [replace(row, quantities=("0.000462 ± 4e-05", "19.17 ± 13.90"), **long) for row in rows(fast)]
    console = Console(width=width, file=io.StringIO())
    print_table(table, "title", console, RACE)
    _, *lines = map(str.rstrip, console.file.getvalue().splitlines())
    assert max(map(len, lines)) <= width
    for row in table:
        (line,) = [line for line in lines if line.startswith(row.name)]
        assert f"{row.quantities[0]}  {row.quantities[1]} " in line
        assert line.endswith(" 1234.50")
    heading = "".join(lines).partition(table[0].name)[0]
    assert (" an" in heading) == (width > 80)  # seconds an epoch go first
    assert "warm" not in heading  # nobody had one
