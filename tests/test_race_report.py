"""The report on screen: one file, its curves where the records have them, one colour an optimizer."""

import base64
import itertools
import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import TINY, config, here
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_race_verdict import standing

from kfqn.race.entrants import DEFAULT_FIELD, ENTRANTS, default_field
from kfqn.race.report import axes, palette
from kfqn.race.report.figure import draw
from kfqn.race.report.listing import csv_of, runs_below
from kfqn.race.report.page import html_of
from kfqn.race.report.panels import SIDE
from kfqn.race.report.results import common_target, results_of, short_labels
from kfqn.race.runs import Run

EMPTY = {"meta", "input", "br", "path"}  # elements without an end
SEEDS = [[2.0, 0.5, 0.01], [2.2, 0.3, 0.03]]


class Page(HTMLParser):
    """The elements of a page, in order: name, attributes, text; fails where ends do not fit."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.found.append((tag, dict(attributes), [], [*self.open]))
        if tag not in EMPTY:
            self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), [], [*self.open]))

    def handle_endtag(self, tag):
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data):
        if self.open:
            self.found[self.open[-1]][2].append(data)

    def all(self, tag=None, inside=None, **attributes):
        """Elements with these attributes, of one with this number."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            (n, found, "".join(text))
            for n, (name, found, text, parents) in enumerate(self.found)
            if tag in (None, name) and (inside is None or inside in parents)
            if all(found.get(key) == value for key, value in wanted.items())
        ]


def field(folder):
    """Two of one optimizer, one that is slow, and one that was lost."""
    return [
        standing(folder / "a", "sgd", SEEDS),
        standing(folder / "b", "adam", [[1.0, 0.1, 0.02]] * 2),
        standing(folder / "c", "kfac", SEEDS),
        standing(folder / "d", "kfbfgs", [[9.0]], ["diverged"]),
    ]


def slow(folder, factor=10):
    """A field in which SGD takes so many times as long, written by hand."""
    results = []
    for entrant, seconds in {"kfbfgs:auto": 1.0, "adam": 1.2, "muon": 0.9, "sgd": factor}.items():
        run = Run.create(folder / "runs", config(entrant=entrant, settings={}))
        run.write(
            [
                {"epoch": k, "train_loss": 1 / k, "average_loss": 1 / k, "test_loss": 2 / k}
                | {"test_error": 0.018 if entrant == "sgd" else 0.008, "cpu_seconds": k * seconds}
                | {"seconds": k * seconds}
                for k in (1, 2, 3)
            ]
            + [{"status": "finished", "conditions": {"torch": "2 < 3 & 4"}}]
        )
        results.append(run)
    return results_of(results)


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path):
    result = here(
        "race",
        "--optimizers",
        "sgd:lr=0.05",
        "sgd:lr=0.1",
        "kfbfgs:auto",
        *TINY,
        "--seeds",
        2,
        "--out",
        tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = (tmp_path / "race.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not [found for _, found, _ in page.all() if "src" in found or found.get("rel")]
    ((_, link, _),) = page.all("a")
    content = link["href"].removeprefix("data:text/csv;base64,")
    runs = sorted(runs_below(tmp_path), key=lambda run: run.folder)
    assert sorted(base64.b64decode(content).decode().splitlines()) == sorted(csv_of(runs).splitlines())
    assert len(csv_of(runs).splitlines()) == 1 + 3 * 2 * 2
    assert "viewport" in text
    assert "prefers-color-scheme: dark" in text
    assert "{{" not in text
    style = "".join(part for _, _, part in page.all("style"))
    assert style.count("{") == style.count("}")
    labels = [label.strip() for _, _, label in page.all("label") if label.strip()]
    assert labels == ["SGD-m (lr 0.05)", "SGD-m (lr 0.1)", "KF-BFGS, auto", "logarithmic", "linear"]
    assert [found["value"] for _, found, _ in page.all("input", name="shown")] == ["0", "1", "2"]
    for _, found, _ in page.all("path"):
        assert found.get("data-entry", "0") in ("0", "1", "2")
    script = "".join(part for _, found, part in page.all("script") if "type" not in found)
    selectors = re.findall(r'querySelector(?:All)?\([`"](?:path)?([.\[])([\w-]+)=?(\w*)', script)
    assert len(selectors) > 5
    for kind, name, value in selectors:
        attribute, value = (name, value) if kind == "[" else ("class", name)
        assert any(value in found.get(attribute, "-").split() or not value for _, found, _ in page.all()), (
            name
        )


def coordinates(path):
    return np.array([[*map(float, pair.split(","))] for pair in path.lstrip("M").split(" ")])


def places(page, inside, side):
    """The numbers beside an axis, and where they are, as shares."""
    key = {"x": "left", "y": "bottom"}[side]
    ticks = page.all("span", inside=inside, class_=f"tick {side}")
    return [
        (float(text), float(found["style"].removeprefix(f"{key}:").rstrip("%")) / 100)
        for _, found, text in ticks
    ]


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_curves_lie_where_their_axes_say_that_the_records_are(tmp_path, scale):
    """Read as a person does, off the ticks."""
    results = slow(tmp_path)
    page = Page(html_of(runs_below(tmp_path), results))
    plots = page.all("div", class_="plot")
    expected = [("0", "epoch"), ("0", "seconds"), ("1", "epoch"), ("1", "seconds")]
    assert [(found["data-quantity"], found["data-axis"]) for _, found, _ in plots] == expected
    for n, found, _ in plots:
        quantity = results[0].measure.quantities[int(found["data-quantity"])]
        ((inner, _, _),) = page.all("div", inside=n, class_=f"scale {scale}")
        ys, xs = places(page, inner, "y"), places(page, n, "x")
        shown = np.log if scale == "log" else np.array
        slope, start = np.polyfit(*zip(*((at, shown(y)) for y, at in ys), strict=True), 1)
        curves = page.all("path", inside=inner, class_="curve")
        assert [int(curve["data-entry"]) for _, curve, _ in curves] == [0, 1, 2, 3]
        for _, curve, _ in curves:
            result = results[int(curve["data-entry"])]
            x, y = coordinates(curve["d"]).T / SIDE
            at = x * (xs[-1][0] / xs[-1][1])
            assert at == pytest.approx(result.curve(found["data-axis"]).mean, abs=0.02 * at.max())
            assert start + slope * (1 - y) == pytest.approx(
                shown(quantity.scale * result.curve(quantity.key).mean), abs=0.02 * abs(slope)
            )
        target = page.all("div", inside=inner, class_="target")
        assert len(target) == (quantity.key == "train_loss")
        for _, line, _ in target:
            place = float(line["style"].removeprefix("bottom:").rstrip("%")) / 100
            assert start + slope * place == pytest.approx(
                shown(common_target(results)), abs=0.02 * abs(slope)
            )


def test_the_pointer_is_told_what_the_records_say(tmp_path):
    results = field(tmp_path)
    page = Page(html_of([Run(path.parent) for path in tmp_path.rglob("config.json")], results))
    ((_, _, text),) = page.all("script", id="data")
    data = json.loads(text)
    assert data["labels"] == ["SGD-m", "Adam", "KFAC", "KF-BFGS"]
    assert data["curves"][3] is None
    sgd = data["curves"][0]
    assert (sgd["epoch"], sgd["seconds"]) == ([1, 2, 3], [1, 2, 3])
    (loss, spread), (error, _) = sgd["values"]
    assert loss == [2.1, 0.4, 0.02]
    assert spread == pytest.approx([0.1, 0.1, 0.01])
    assert error == [50, 50, 50]
    bands = [int(found["data-entry"]) for _, found, _ in page.all("path", class_="band")]
    assert {*bands} == {0, 2}  # Adam's seeds agree
    assert "1 diverged" in text or page.all("span", class_="faint")[0][2] == "1 diverged"


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VISIT = """
const $ = query => [...document.querySelectorAll(query)], seen = box => box.getClientRects().length > 0;
const rows = box => [...box.querySelectorAll("tr")].map(row => row.innerText);
const told = () => $(".values").filter(seen).map(rows);
const point = (plot, share, what = "pointermove") => {
  const {left, width} = plot.getBoundingClientRect(), clientX = left + share * width;
  plot.dispatchEvent(new PointerEvent(what, {clientX, pointerType: "mouse"}));
};
const [plot] = $(".plot"), said = {fits: document.documentElement.scrollWidth <= innerWidth};
point(plot, 2 / 3);
said.all = told();
$("[name=shown]")[1].click();
point(plot, 2 / 3);
said.without = told();
said.curves = $("path.curve").filter(seen).map(path => path.dataset.entry);
said.scales = [$(".scale.log").some(seen), $(".scale.linear").some(seen)];
$("[value=linear]")[0].click();
said.switched = [$(".scale.log").some(seen), $(".scale.linear").some(seen)];
point(plot, 2 / 3, "pointerleave");
said.left = told();
$("[name=shown]")[1].click();
point(plot, 1);
said.end = told();
document.title = JSON.stringify(said);
"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1300])  # a window of Chromium is no narrower
def test_in_a_browser_pointing_and_switches_do_what_they_say(tmp_path, width):
    page = tmp_path / "race.html"
    results = field(tmp_path)
    text = html_of(runs_below(tmp_path), results)
    page.write_text(text.replace("</body>", f"<script>{{{VISIT}}}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *options, f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    said = json.loads(unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    spread = "\t± 0.1" if width > 640 else ""
    sgd, adam, kfac = f"■\tSGD-m\t0.400{spread}", "■\tAdam\t0.100", f"■\tKFAC\t0.400{spread}"
    said["all"][0][1] = said["all"][0][1].rstrip()  # Adam's seeds agree
    assert said["all"] == [["epoch 2", adam, sgd, kfac]]
    assert said["without"] == [["epoch 2", sgd, kfac]]
    assert {*said["curves"]} == {"0", "2"}
    assert (said["scales"], said["switched"]) == ([True, False], [False, True])
    assert said["left"] == []
    assert [row.split("\t")[1] for row in said["end"][0][1:]] == ["SGD-m", "Adam", "KFAC"]
    assert said["fits"]


def test_nothing_that_finished_is_a_page_without_curves(tmp_path):
    lost = standing(tmp_path, "sgd", [[9.0]], ["diverged"])
    page = Page(html_of(runs_below(tmp_path), [lost]))
    assert not page.all("div", class_="plot")
    assert not page.all("script")


@pytest.mark.parametrize("hostile", ["</script><script>alert(1)</script>", "<b>&amp;'\""])
def test_what_runs_are_called_stays_text(tmp_path, hostile):
    run = Run.create(tmp_path, config(entrant=f"own.{hostile}", settings={"lr": 1.0}))
    run.write([{"epoch": 1, "train_loss": 1.0, "test_error": 0.5, "seconds": 1.0}, {"status": "finished"}])
    page = Page(html_of([run], results_of([run])))
    assert len(page.all("script")) == 2
    ((_, _, data),) = page.all("script", id="data")
    assert json.loads(data)["labels"] == [hostile.rpartition(".")[2] or hostile]


# Axes.


def drawn(results, path, monkeypatch):
    """The figure as it is saved."""
    kept, save = [], Figure.savefig

    def savefig(self, *args, **options):
        save(self, *args, **options)
        kept.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    draw([("", results)], "title", path)
    return kept[0].subfigs[0].axes


@pytest.mark.parametrize(
    ("factor", "end", "said"), [(10.0, 1.5 * 3.3, "SGD-m goes on to 30"), (2.0, 6.0, "")]
)
def test_one_slow_entrant_squeezes_no_axis_and_it_is_said(tmp_path, monkeypatch, factor, end, said):
    results = slow(tmp_path, factor)
    assert axes.end_of(results, "seconds") == pytest.approx(end)
    assert axes.end_of(results, "epoch") == 3
    assert axes.beyond(results, short_labels(results), "seconds") == said
    assert axes.beyond(results, short_labels(results), "epoch") == ""
    panels = drawn(results, tmp_path / "slow.png", monkeypatch)
    assert panels[3].get_xlim() == pytest.approx((0, end))
    assert panels[3].get_xlabel() == "training time, s" + (f"\n({said})" if said else "")
    page = Page(html_of(runs_below(tmp_path), results))
    told = [text for _, _, text in page.all("p", class_="axis")]
    assert told == ["epoch", f"training time, s{said}"] * 2


def test_the_best_is_never_cut_however_slow(tmp_path):
    fast = [standing(tmp_path / name, name, [[2.0, 1.0]]) for name in ("sgd", "adam", "muon")]
    best = standing(tmp_path, "kfac", [[1.0 / k for k in range(1, 21)]])
    assert axes.end_of([*fast, best], "seconds") == 20


def test_many_that_go_on_are_counted(tmp_path):
    runs = [
        standing(tmp_path / str(n), "sgd", [[1.0] * length]) for n, length in enumerate([2] * 6 + [9] * 4)
    ]
    labels = [f"number {n}" for n in range(10)]
    assert axes.beyond(runs, labels, "seconds") == "4 go on, to 9 at most"
    assert (
        axes.beyond(runs[:-1], labels[:-1], "seconds")
        == "number 6 goes on to 9, number 7 to 9, number 8 to 9"
    )


def test_errors_of_one_and_of_two_percent_are_far_apart(tmp_path, monkeypatch):
    results = slow(tmp_path)
    error = results[0].measure.quantities[1]
    low, high = axes.limits([*results, standing(tmp_path / "x", "kfac", [[1.0]])], error, logarithmic=True)
    assert low < 0.8 < 50 < high
    assert math.log(1.8 / 0.8) / math.log(high / low) > 0.15
    panels = drawn(results, tmp_path / "figure.png", monkeypatch)
    assert panels[2].get_yscale() == "log"
    assert [text.get_text() for text in panels[2].get_yticklabels()] == ["0.8", "1", "1.2", "1.5"]


def test_what_explodes_squeezes_nobody_and_zeros_do_neither(tmp_path, monkeypatch):
    calm, wild = (
        standing(tmp_path / "a", "adam", [[1.0, 0.0, 0.1]]),
        standing(tmp_path / "b", "sgd", [[2.0, 1e9, 1e9]]),
    )
    loss = calm.measure.first
    low, high = axes.limits([calm, wild], loss, logarithmic=True)
    assert 0.05 < low < 0.1
    assert 2 < high < 3
    assert axes.are_positive([calm, wild], loss)
    negative = standing(tmp_path / "c", "kfac", [[1.0, -1.0]])
    assert not axes.are_positive([calm, negative], loss)
    assert drawn([calm, negative], tmp_path / "negative.png", monkeypatch)[0].get_yscale() == "linear"
    Page(html_of(runs_below(tmp_path), [calm, wild, negative]))


@given(st.floats(1e-9, 1e6), st.floats(1.05, 1e12), st.booleans())
def test_ticks_are_few_round_numbers_on_the_axis(low, ratio, logarithmic):
    high = low * ratio
    ticks = axes.ticks(low, high, logarithmic=logarithmic)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted({*ticks})
    hair = 1e-6 * (high - low)
    assert all(low - hair <= tick <= high + hair for tick in ticks)
    assert all(len(f"{tick:.12g}".replace(".", "").strip("0").partition("e")[0]) <= 4 for tick in ticks)


def test_numbers_beside_an_axis_are_short():
    assert [axes.told(tick) for tick in (0.5, 1e-7, 2000.0, 1e6)] == ["0.5", "1e-7", "2000", "1e6"]


# Labels and colours.


def test_labels_have_what_tells_settings_apart(tmp_path):
    usual = {"lr": 0.1, "schedule": "cosine", "warmup": 0.05}
    told = [
        ("sgd", usual),
        ("muon", usual),
        ("muon", usual | {"lr": 0.2}),
        ("own.Half", {}),
        ("kfbfgs:auto", {}),
    ]
    told += [("kfbfgs:auto", {"direction": "plain"}), ("other.Half", {})]
    results = results_of([Run.create(tmp_path, config(entrant=name, settings=own)) for name, own in told])
    assert short_labels(results) == [
        "SGD-m",
        "Muon (lr 0.1)",
        "Muon (lr 0.2)",
        "own.Half ()",
        "KF-BFGS, auto",
        "KF-BFGS, auto (direction plain)",
        "other.Half ()",
    ]


def test_an_optimizer_has_its_colour_in_every_figure_and_page(tmp_path, monkeypatch):
    assert {*palette.COLORS} == {*ENTRANTS}
    names = ["sgd", "own.Other", "kfbfgs:auto", "sgd"]
    for order in itertools.permutations(names):
        for name, style in zip(order, palette.styles(order), strict=True):
            first = order.index(name)
            assert palette.styles(order)[first].color == palette.COLORS.get(name, palette.OTHERS[0])
            assert palette.styles(order)[first].dashes == ()
            assert style in palette.styles(order)
    results = slow(tmp_path)
    panels = drawn(results, tmp_path / "figure.png", monkeypatch)
    lines = [line for line in panels[1].lines if line.get_label() != "common target"]
    expected = [palette.COLORS[result.config.entrant].lower() for result in results]
    assert [to_hex(line.get_color()) for line in lines] == expected
    page = Page(html_of(runs_below(tmp_path), results))
    strokes = [found["style"] for _, found, _ in page.all("path", class_="curve")]
    assert [re.search("stroke:(#\\w+)", stroke)[1].lower() for stroke in strokes[:4]] == expected


def linear(color):
    values = np.array([int(color[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """Of WCAG 2."""
    high, low = sorted(((linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (a, b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def oklab(rgb):
    """Ottosson 2020."""
    M1 = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    M1 += [[0.0883024619, 0.2817188376, 0.6299787005]]
    M2 = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    M2 += [[0.0259040371, 0.7827717662, -0.8086757660]]
    return np.array(M2) @ np.cbrt(np.clip(np.array(M1) @ rgb, 0, None))


EYES = {  # Machado et al. 2009, of linear RGB: all cones, and without those of long, middle or short waves
    "all": [1, 0, 0, 0, 1, 0, 0, 0, 1],
    "long": [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
    "middle": [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881],
    "short": [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900],
}


@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_told_apart_by_every_kind_of_eye(eyes):
    every = palette.COLORS | dict(enumerate(palette.OTHERS))
    seen = {name: oklab(np.reshape(EYES[eyes], (3, 3)) @ linear(color)) for name, color in every.items()}
    fields = [DEFAULT_FIELD, default_field("burgers")]
    for a, b in itertools.combinations(seen, 2):
        together = any(a in names and b in names for names in fields)
        assert np.linalg.norm(seen[a] - seen[b]) > (0.06 if together else 0.04), (a, b)


def test_colours_are_seen_by_day_and_by_night():
    for color in (*palette.COLORS.values(), *palette.OTHERS, palette.GREY):
        assert contrast(color, "#FFFFFF") > 3
        assert contrast(color, palette.DARK) > 3


@pytest.mark.parametrize("settings", [1, 3, 5, 12])
def test_no_two_lines_of_a_figure_look_alike(settings):
    names = ("kfbfgs:auto", "sgd", "adam", "adamw", "muon", "soap", "torch.optim.RMSprop", "own.Other")
    styles = palette.styles([name for name in names for _ in range(settings)])
    assert len({*styles}) == len(styles)
