"""A picture of a run: what is kept of it, what the page says, that it is one file; and loggers."""

import base64
import csv
import html.parser
import io
import math
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from cases import batches, mlp, odd_cnn
from torch import nn

import kfqn
from kfqn.curvature.output_factor import NoOutputFactor
from kfqn.integrations import report as module
from kfqn.integrations.loggers import TensorBoard, WandB
from kfqn.integrations.page import Axis
from kfqn.integrations.watch import inner, scalars


def trained(report, steps=30, make=kfqn.KFBFGS, spoil=()):
    model, ((x, y),) = mlp(), batches((5,), 1)
    optimizer, losses = make(model), []
    for k in range(1, steps + 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if k in spoil:
            model[0].weight.grad.fill_(math.nan)
        optimizer.step()
        report.update(optimizer, loss)
        losses.append(loss.item())
    return model, optimizer, losses


def test_what_is_kept_is_what_the_optimizer_and_the_layers_say(tmp_path):
    report = kfqn.Report(tmp_path / "run.html")
    model, optimizer, losses = trained(report)
    told, points = optimizer.diagnostics(), report.run.points
    assert [point.step for point in points] == [*range(1, 31)]
    assert [point.loss for point in points] == pytest.approx(losses)
    norm = math.hypot(*(p.norm().item() for p in model[0].parameters()))
    assert points[-1].moved["0"] == pytest.approx(told["0"]["update"] / norm, rel=1e-5)
    assert points[-1].rate == told[""]["rate"]
    assert {*points[-1].moved} == {layer.name for layer in optimizer.layers}


def test_a_number_for_lr_is_the_rate():
    report = kfqn.Report("unwritten.html", seconds=math.inf)
    bare = kfqn.Parts(output=NoOutputFactor())
    trained(report, 2, lambda model: kfqn.KFBFGS(model, lr=0.25, damping=1.0, parts=bare))
    assert [point.rate for point in report.run.points] == [0.25, 0.25]


def test_a_long_run_is_thinned_out_evenly_and_no_loss_is_lost(monkeypatch):
    monkeypatch.setattr(module, "MOST", 8)
    report = kfqn.Report("unwritten.html", seconds=math.inf)
    _, _, losses = trained(report, 53)
    points = report.run.points
    assert [point.step for point in points] == [8, 16, 24, 32, 40, 48]
    last, before = points[-1].step, points[-2].step
    assert points[-1].loss == pytest.approx(sum(losses[before:last]) / (last - before))


class Reader(html.parser.HTMLParser):
    """Tags, their attributes, and the text of a page that is well formed."""

    EMPTY = ("meta", "path", "wbr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def read(tmp_path):
    def read(report):
        report.write()
        return Reader(report.path.read_text(encoding="utf-8"))

    return read


def numbers(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]


REFUSED = pytest.mark.filterwarnings("ignore:.*so the step was refused:RuntimeWarning")


@REFUSED
def test_the_page_is_one_file_that_fetches_nothing(tmp_path, read):
    report = kfqn.Report(tmp_path / "run.html", "A < B & C")
    trained(report, spoil=(12,))
    page = read(report)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    links = [value for _, given in page.tags for key, value in given.items() if key in ("href", "src")]
    assert all(link.startswith("data:text/csv;base64,") for link in links)
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme:dark" in page.text
    assert "A < B & C" in page.text
    assert "30 steps" in page.text
    assert "not finite: 1." in page.text
    (data,) = links
    rows = [*csv.DictReader(io.StringIO(base64.b64decode(data.split(",")[1]).decode()))]
    assert [float(row["loss"]) for row in rows] == [point.loss for point in report.run.points]
    assert float(rows[-1]["2"]) == report.run.points[-1].moved["2"]


@REFUSED
def test_curves_are_where_the_numbers_are(tmp_path, read):
    report = kfqn.Report(tmp_path / "run.html")
    trained(report, spoil=(12,))
    page = read(report)
    paths = {kind: [p["d"] for tag, p in page.tags if tag == "path" and p["class"] == kind] for kind in KINDS}
    (loss,), points = paths["pale"], report.run.points
    places = numbers(loss)
    assert [x for x, _ in places] == pytest.approx([1000 * (k - 1) / 29 for k in range(1, 31)], abs=0.1)
    losses = [point.loss for point in points]
    logs = [math.log(x / min(losses)) / math.log(max(losses) / min(losses)) for x in losses]
    straight = [(x - min(losses)) / (max(losses) - min(losses)) for x in losses]
    wanted = logs if max(losses) > 10 * min(losses) else straight
    assert [y for _, y in places] == pytest.approx([300 * (1 - share) for share in wanted], abs=0.1)
    assert paths["mark"] == [f"M{1000 * 11 / 29:.1f} 0V300"]  # the step that was refused
    assert len(paths["line"]) == 2 + len(report.run.points[-1].moved)


KINDS = ("pale", "line", "mark")


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-1.0, 2.0], [1e-9, 1.0], [0.0, 3e4], [2.0, 2.5], []])
def test_ticks_are_round_and_within(values):
    axis = Axis.of(values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(axis.low - 1e-9 <= tick <= axis.high + 1e-9 for tick in ticks)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in [*values, *ticks])
    assert all(f"{tick:.4g}" == f"{tick:.12g}" for tick in ticks)


def test_an_empty_run_and_one_without_losses_have_a_page_too(tmp_path, read):
    report = kfqn.Report(tmp_path / "run.html")
    assert "No step has been taken." in read(report).text
    model, ((x, y),) = mlp(), batches((5,), 1)
    optimizer = kfqn.KFBFGS(model)
    optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))
    report.update(optimizer)
    assert "Loss" not in read(report).text
    report.update(optimizer, math.nan)
    assert not [given for tag, given in read(report).tags if tag == "path" and "nan" in given["d"]]


def test_the_page_is_written_while_the_run_goes_on(tmp_path):
    report = kfqn.Report(tmp_path / "run.html", seconds=0.0)
    trained(report, 2)
    assert "2 steps" in report.path.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


def test_looking_on_changes_nothing_and_costs_little():
    x, y = batches((2, 6, 6), 1)[0]
    ended, seconds = [], []
    for watched in (False, True):
        torch.manual_seed(0)
        model = odd_cnn()
        optimizer, report = kfqn.KFBFGS(model), kfqn.Report("unwritten.html", seconds=math.inf)
        started = time.process_time()
        for _ in range(40):
            loss = optimizer.step(kfqn.closure(model, x, y, F.cross_entropy))
            if watched:
                report.update(optimizer, loss)
        seconds.append(time.process_time() - started)
        ended.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ended))
    assert seconds[1] < 2 * seconds[0]  # of a step of a millisecond


def test_the_optimizer_of_another_is_refused_in_a_sentence(tmp_path):
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"only optimizers of kfqn .* this is a SGD: give .*KFBFGS\(model\)"):
        kfqn.Report(tmp_path / "run.html").update(optimizer, 1.0)


class Wrapped:
    """As Lightning and Accelerate wrap an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Written:
    """What a `SummaryWriter` and a run of W&B are called with."""

    def __init__(self):
        self.said, self.flushed = [], 0

    def add_scalar(self, name, value, step):
        self.said.append((step, name, value))

    def log(self, told):
        self.said += [(told["step"], name, value) for name, value in told.items() if name != "step"]

    def flush(self):
        self.flushed += 1


@pytest.mark.parametrize("kind", [TensorBoard, WandB])
def test_loggers_have_the_first_step_and_every_so_manyth(kind):
    written = Written()
    logger = kind(written, every=10)
    _, optimizer, losses = trained(logger, 25)
    assert [(step, value) for step, name, value in written.said if name == "loss"] == [
        (step, pytest.approx(losses[step - 1])) for step in (1, 10, 20)
    ]
    told = optimizer.diagnostics()
    names = {name for _, name, _ in written.said}
    assert names == {"loss", *(f"{layer or 'all layers'}/{key}" for layer in told for key in told[layer])}
    logger.update(Wrapped(optimizer), step=30)
    assert {name: value for step, name, value in written.said if step == 30} == scalars(optimizer)
    logger.write()
    assert written.flushed == (kind is TensorBoard)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        kind(written, every=0)


def test_a_wrapped_optimizer_is_found():
    optimizer = kfqn.KFBFGS(nn.Linear(2, 2))
    assert inner(optimizer) is optimizer
    assert inner(Wrapped(optimizer)) is optimizer


def test_frameworks_are_imported_when_asked_for_and_no_sooner():
    script = "import sys, kfqn, torch; kfqn.KFBFGS(torch.nn.Linear(2, 2)); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not [name for name in loaded.split() if name.startswith("kfqn.integrations")]
