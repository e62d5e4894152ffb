"""Pages of reports: verdicts in words, and what a browser makes of them."""

import dataclasses
import json
import threading
import time
from html.parser import HTMLParser

import numpy as np
import pytest

import browser
from jlar_experiments import cli, ending, page, panels, records, report
from jlar_experiments.grokking import report as grokking
from jlar_experiments.grokking.analysis import Run as GrokRun
from jlar_experiments.grokking.analysis import Timeline
from jlar_experiments.grokking.config import GrokConfig
from jlar_experiments.panels import Curve
from jlar_experiments.pretraining.presets import PRESETS

HOSTILE = "<script>alert(1)</script><b onmouseover=alert(2)>&\"'"
needs_browser = pytest.mark.skipif(browser.FOUND is None, reason="there is no Chromium here")


def timeline(seed=0, *, memorised=60, grokked=180, end=480, spike=False):
    line = Timeline(seed)
    for epoch in range(0, end + 1, 20):
        val = 0.1 if grokked is None or epoch < grokked else 1.0
        row = {"epoch": epoch, "seed": seed, "val_acc": val, "lar": 0.6 if val < 1 else 0.72}
        row |= {"train_acc": float(epoch >= memorised), "k_pred": 20.0, "k95": 18.0, "corr": 0.9}
        row |= {"train_loss": 0.01, "val_loss": 0.02, "step": epoch, "alarms": []}
        line.add(row)
    line.rows[-1]["train_loss"] = 0.32 if spike else 0.01
    return line


def verdict(*lines, **settings):
    config = GrokConfig(seeds=len(lines), **settings)
    return grokking.run_verdict(GrokRun(config, {}, {each.seed: each for each in lines}, []))


def test_verdicts_on_grokking():
    known = "memorised at epoch 60, generalises from 180; LAR rose from .60 to .72"
    assert verdict(timeline()) == known
    assert verdict(timeline(end=240)) == f"{known}; not finished: epoch 240 of at most 5000"
    assert verdict(timeline(spike=True)) == (
        f"{known}; ends on a loss spike: training loss 0.320, median of the last five logs 0.010"
    )
    never = verdict(timeline(grokked=None), epochs=480)
    assert never == "memorised at epoch 60, not generalising up to epoch 480; LAR stayed near .60"
    nothing = verdict(timeline(memorised=999, grokked=None), epochs=480)
    assert nothing.startswith("the training pairs are not learnt by epoch 480; LAR")
    assert verdict(timeline(memorised=200, grokked=200, end=500)).startswith(
        "generalises from 200 without having memorised before; LAR"
    )
    both = verdict(timeline(), timeline(1, grokked=None), epochs=480)
    assert both == "2 seeds: memorised at epoch 60, 1 generalise from 180; LAR rose from .60 to .66"


def test_a_loss_spike_at_the_end():
    assert ending.spike([0.01, 0.012, 0.009, 0.01, 0.3])
    assert not ending.spike([0.3, 0.01, 0.012, 0.009, 0.01])
    assert not ending.spike([3.4, 3.3, 3.5, 3.3, 3.6])  # the noise of batches
    assert not ending.spike([1e-5, 1e-5, 1e-5, 1e-5, 9e-5])  # a multiple of nothing
    assert not ending.spike([0.01, 0.3]) and not ending.spike([0.1] * 5 + [None])
    assert ending.median([9.0, 1.0, 2.0, None, 4.0, 5.0]) == 3.0 and np.isnan(ending.median([]))


def test_long_curves_are_means_of_neighbours():
    values = np.arange(5000.0)
    values[7] = np.nan
    found = panels.thinned(values)
    assert len(found) == 1667 and found[0] == 1 and found[2] == 7 and found[-1] == 4998.5
    assert len(panels.thinned(values[:2000])) == 2000
    traced = Curve(HOSTILE, "#000", [0, 1], [np.nan, 1 / 3]).trace()
    assert traced["y"] == [None, 0.33333] and "<" not in traced["name"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two runs of each study, one with a hostile name."""
    root = tmp_path_factory.mktemp("runs")
    step, letters = np.arange(100), "q k v o gate up down".split()
    for name, tokens in (("base", 1_024_000), (HOSTILE.replace("/", ":"), 25_600)):
        config = PRESETS["bytes-tiny"].config(unique_tokens=tokens, steps=100, warm_up=5)
        loss, away = 5 * np.exp(-step / 30), np.maximum(0, step - 50) / 50 * (tokens < 1e6)
        rows = [
            {"step": int(i), "train_loss": loss[i], "lar": 0.5 + 0.2 * (i > 9) - 0.1 * away[i],
             "val_loss": loss[i] + away[i] * 4, "tokens_per_second": 9.0,
             "alarms": ["deviation"] * bool(away[i] > 0.1)}
            for i in step
        ]  # fmt: skip
        spectrum = (np.arange(8, 0, -1) / 36).tolist()
        quantities = "corr rank_corr sigma_p sigma_q stable_rank effective_rank L1 D1".split()
        inspected = {"lars": {each: [0.5] for each in letters}, **dict.fromkeys(quantities, 0.5)}
        stored(root / "study" / name, "pretrain", config, rows, preset="bytes-tiny")
        records.append(
            root / "study" / name / "inspections.jsonl",
            [{"step": i, **inspected, "p": spectrum, "q": spectrum} for i in (0, 50, 99)],
        )
    records.write_json(
        root / "study" / "config.json", {"study": "pretrain", "preset": "bytes-tiny"}
    )
    for name, spike in (("calm", False), ("spiky", True)):
        stored(root / name, "grok", GrokConfig(), timeline(spike=spike).rows)
        p = [{"epoch": 480, "seed": 0, "point": "final", "p": [0.5, 0.5], "q": [0.9, 0.1]}]
        records.append(root / name / "spectra.jsonl", p)
    return root


def stored(folder, study, config, rows, **more):
    folder.mkdir(parents=True)
    about = {"study": study, **more, "versions": {"jax": "0"}, "machine": "m" * 300}
    records.write_json(folder / "config.json", about | {"settings": dataclasses.asdict(config)})
    records.append(folder / "metrics.jsonl", rows)


@pytest.fixture(scope="module")
def pages(runs):
    """The page of each kind, written by the command."""
    places = {"pretrain": runs / "study" / "report.html", "grok": runs / "report.html"}
    assert cli.main(["report", str(runs / "study")]) == 0
    assert cli.main(["report", str(runs / "calm"), str(runs / "spiky")]) == 0
    return places


class Links(HTMLParser):
    """What a page would load, and its elements; JavaScript is not looked into."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.first = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "h1":
            self.first = self.first or data


@pytest.mark.parametrize("kind", ["pretrain", "grok"])
def test_a_page_is_one_file_with_the_verdict_first(kind, pages):
    found = Links(pages[kind].read_text())
    assert all(each.startswith("data:") for each in found.loads)
    assert (
        found.first
        == {
            "pretrain": "1 of 2 runs overfit, from step 50; the monitor rang in 1 of these and in "
            "0 others",
            "grok": "2 seeds: memorised at epoch 60, generalise from 180; LAR rose from .60 to "
            ".72; 1 of them ends on a loss spike",
        }[kind]
    )
    assert found.tags.count("script") == 2 and "img" not in found.tags


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


OVERFLOWING = """[...document.querySelectorAll("body *")].filter(each => !each.closest("svg") &&
  (each.getBoundingClientRect().right > innerWidth + 1 || each.scrollWidth > each.clientWidth + 1
   && getComputedStyle(each).overflowX != "visible")).map(each => each.outerHTML.slice(0, 80))"""


@needs_browser
@pytest.mark.parametrize("kind", ["pretrain", "grok"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_overflows_and_nothing_fails(kind, dark, width, pages, chromium):
    chromium.open(pages[kind], width=width, dark=dark)
    assert chromium.value("document.documentElement.scrollWidth") == width
    assert chromium.value(OVERFLOWING) == []
    assert chromium.errors == []
    assert chromium.value("document.querySelectorAll('.plot svg.main-svg').length") > 10
    paper, ink = chromium.value(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.xtick text')).fill]"
    )
    assert (paper, ink) == (
        ("rgb(24, 26, 28)", "rgb(221, 221, 221)")
        if dark
        else ("rgb(255, 255, 255)", "rgb(34, 34, 34)")
    )


@needs_browser
@pytest.mark.parametrize("kind", ["pretrain", "grok"])
def test_curves_are_hovered_and_zoomed(kind, pages, chromium):
    chromium.open(pages[kind], width=1200)
    place = """(() => {const plot = document.querySelector(".plot"); plot.scrollIntoView();
      const at = plot.querySelector(".nsewdrag").getBoundingClientRect();
      return [at.x, at.y, at.width, at.height];})()"""
    x, y, width, height = chromium.value(place)
    assert not chromium.value("document.querySelector('.hoverlayer').textContent")
    chromium.mouse("Moved", x + width / 2, y + height / 2)
    until(lambda: chromium.value("document.querySelector('.hoverlayer').textContent"))
    said = chromium.value("document.querySelector('.hoverlayer').textContent")
    names = {
        "pretrain": ["validation, base", "training, base", "<script>"],
        "grok": ["calm", "spiky"],
    }
    assert all(name in said for name in names[kind])
    ranged = "document.querySelector('.plot').layout.xaxis.range"
    low, high = chromium.value(ranged)
    chromium.mouse("Pressed", x + width / 4, y + height / 2)
    for i in range(1, 6):
        chromium.mouse("Moved", x + width * (1 / 4 + i / 20), y + height / 2)
    chromium.mouse("Released", x + width / 2, y + height / 2)
    until(lambda: chromium.value(ranged) != [low, high])
    left, right = chromium.value(ranged)
    assert low + 0.2 * (high - low) < left < right < low + 0.55 * (high - low)
    assert chromium.errors == []


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_page_reloads_itself_while_the_run_goes_on(tmp_path, capsys):
    rows = timeline().rows
    stored(tmp_path / "run", "grok", GrokConfig(), rows[:9])
    path = tmp_path / "run" / "report.html"
    command = ["report", str(tmp_path / "run"), "--follow"]
    thread = threading.Thread(target=cli.main, args=(command,))
    thread.start()
    until(path.exists)
    assert 'http-equiv="refresh"' in path.read_text() and "epoch 160 of at most" in path.read_text()
    records.append(tmp_path / "run" / "metrics.jsonl", rows[9:])
    thread.join(30)
    assert not thread.is_alive()
    written = path.read_text()
    assert 'http-equiv="refresh"' not in written and "generalises from 180" in written
    assert cli.main(["report", str(tmp_path / "run")]) == 0 and path.read_text() == written


def test_what_is_refused(runs, tmp_path, capsys):
    calm, study, other = (str(runs / name) for name in ("calm", "study", "other.html"))
    assert cli.main(["report", calm, study]) == 2
    assert "report on each by itself" in capsys.readouterr().err
    (runs / "other.html").write_text("<p>mine</p>")
    assert cli.main(["report", calm, "--out", other]) == 2
    assert "is not a report of jlar's" in capsys.readouterr().err
    assert (runs / "other.html").read_text() == "<p>mine</p>"
    assert cli.main(["report", calm, str(tmp_path)]) == 2
    assert report.names([runs / "calm", runs / "study" / "calm"]) == [
        str(runs / "calm"), str(runs / "study" / "calm")
    ]  # fmt: skip


def test_tables_of_text_fit_80_columns():
    rows = [["a long first column", *(f"column {i}" for i in range(12))]]
    rows += [["x", *(str(10**i) for i in range(12))]]
    lines = page.text(rows).splitlines()
    assert max(map(len, lines)) <= 80 and sum("a long first column" in each for each in lines) == 3
    assert all(str(10**i) in page.text(rows) for i in range(12))
    assert len(page.text(rows[:1], below=[1, 2]).split("\n\n")) > 3
    assert json.dumps(page.text([["only"]])) == '"only"'
