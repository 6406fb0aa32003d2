"""The page that a person gets, opened in Chromium as on a telephone: what it says, and that names
of columns are neither markup nor formulas.
"""

import csv
import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from lib.answer import text
from lib.figures import MOST_SHOWN, Story
from lib.reading import read_experiments
from lib.report import page, write
from lib.table import DataError


DEPLOY = importlib.import_module("06_deploy")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--dump-dom"),
]
NAMES = [  # of columns; the last is the target
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "$x_1$", "a_{b", "$", "R&D"),
    *('"q"', "r\\frac$\\$", "long " * 12 + "name", "unbreakable" * 6, "温度 [°C]", "_hidden"),
    *("p", "q", "<b>yield_$</b>"),
]
PROBE = """<pre id=found></pre><iframe width=380 height=800 style=border:0 srcdoc="{}" onload="
    const page = this.contentDocument, all = s => [...page.querySelectorAll(s)];
    const size = x => parseFloat(this.contentWindow.getComputedStyle(x).fontSize);
    const scale = m => Math.hypot(m.a, m.b), box = x => x.getBoundingClientRect();
    const inside = (x, y) => x.left >= y.left - 1 && x.right <= y.right + 1
        && x.top >= y.top - 1 && x.bottom <= y.bottom + 1;
    found.textContent = JSON.stringify({{
        width: page.documentElement.scrollWidth,
        wide: all('body *').filter(x => box(x).right > 380).map(x => x.outerHTML.slice(0, 80)),
        smallest: Math.min(...all('svg text').map(x => size(x) * scale(x.getScreenCTM())),
            ...all('p, li, td, th, h1, h2, h3, strong').map(size)),
        cut: all('svg text').filter(x => !inside(box(x), box(x.closest('svg'))))
            .map(x => x.textContent),
        foreign: all('script, img, iframe, link, object, image, b').length,
        unlabelled: all('svg').filter(x => !x.getAttribute('aria-label')).length,
        headings: all('h1, h2').map(x => x.textContent),
        rows: all('th[scope=row]').map(x => x.textContent),
        drawn: all('svg text').map(x => x.textContent),
        text: page.body.textContent }})"></iframe>"""


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A campaign whose columns have bad names and one of which is words: what `report` wrote of
    it, and what it is about.
    """
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    values = np.round(rng.normal(50, 10, (60, len(NAMES))), 1)
    salts = np.array(["kcl", "<i>nacl</i>", "nabr"])[np.arange(60) % 3]
    values[:, -1] = np.round(values[:, 2] - values[:, 0] + 9 * (salts == "kcl") + 50, 1)
    acted = [*[""] * 45, *NAMES[:10], *["$x_1$", "salt"] * 2, "p;q"]
    rows = [
        [salt, *row, name] for salt, row, name in zip(salts, values.tolist(), acted, strict=True)
    ]
    with open(folder / "data.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["salt", *NAMES, "intervened"], *rows])
    config = DEPLOY.Report(folder / "data.csv", NAMES[-1], "max", out=folder / "page.html")
    answer = DEPLOY.report(config)
    data = read_experiments(config.data, config.target)
    return config.out, Story(data, answer, asdict(config))


def opened(markup, folder):
    """What Chromium makes of a page that is 380 pixels wide (`PROBE`)."""
    browser = shutil.which("chromium")
    if not browser and os.environ.get("CI") != "true":
        pytest.skip("needs chromium: apt-get install -y --no-install-recommends chromium")
    assert browser, "no chromium: .ci/run installs it"
    (folder / "probe.html").write_text(PROBE.format(html.escape(markup)), encoding="utf-8")
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}"]
    run = [browser, *flags, (folder / "probe.html").as_uri()]
    dom = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.findall("<pre id=.found.>(.+?)</pre>", dom, re.DOTALL)[0]))


@pytest.fixture(scope="module")
def seen(example, tmp_path_factory):
    return opened(example[0].read_text(encoding="utf-8"), tmp_path_factory.mktemp("browser"))


def test_page_fits_a_telephone(seen):
    assert seen["width"] == 380 and seen["wide"] == []
    assert seen["smallest"] >= 10.9 and seen["cut"] == []


def test_page_says_all_of_the_answer(example, seen):
    answer = example[1].answer
    effects = [answer["recommended_action"], answer["next_experiment"], *answer["best_effects"]]
    for one in (*effects, {"settings": {}} | answer["nothing"]):
        values = [*one["settings"].values(), one["predicted"], one["low"], one["high"]]
        assert all(text(x) in seen["text"] for x in values)
        assert set(one["settings"]) <= set(seen["rows"])
    assert text(answer["stop"]["expected_gain"]) in seen["text"]
    assert set(example[1].data.names) <= set(seen["rows"])
    said = "".join(seen["text"].split())
    for one in (*answer["notes"], *answer["warnings"], *answer["parents"], answer["data_sha256"]):
        assert "".join(one.split()) in said
    assert f"Shown are the {MOST_SHOWN} of " in seen["text"]
    parts = [
        *("What to do next", "The campaign so far", "What setting each variable does"),
        *(f"What acts on {NAMES[-1]} directly", "The data at a glance", "How far to trust it"),
    ]
    assert seen["headings"] == [f"{NAMES[-1]}: what to do next", *parts, "What is assumed"]


def test_names_are_no_markup_and_no_formulas(example, seen):
    assert seen["foreign"] == 0 and seen["unlabelled"] == 0
    drawn = set(seen["drawn"])
    assert {"$x_1$", NAMES[-1], "kcl", "nabr", "<i>nacl</i>"} <= drawn
    assert drawn & {"$", "a_{b", "R&D", "_hidden", '"q"', "r\\frac$\\$"}


def test_page_needs_nothing_else(example):
    markup = example[0].read_text(encoding="utf-8")
    assert markup.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not re.search(r"https?://|<script|url\((?!#)|(src|href)=\"(?!#)", markup)
    assert "width=device-width" in markup and markup == page(example[1])


def test_picture_shows_something(example):
    picture = imread(example[0].with_suffix(".png"))[..., :3]
    grey = picture.mean(-1)
    assert min(grey.shape) > 600 and grey.std() > 0.05
    rows, columns = (np.flatnonzero((grey < 0.5).any(axis)) for axis in (1, 0))
    assert np.ptp(rows) > 0.8 * len(grey) and np.ptp(columns) > 0.8 * grey.shape[1]


def changed(story, case):
    """The story otherwise, and a sentence that its page must have."""
    data, answer, asked = story
    idle = {"settings": {}} | answer["nothing"]
    none = replace(data.buffer, intervened=jnp.zeros_like(data.buffer.intervened))
    first = dict(list(answer["curves"].items())[3:4])
    logs = np.arange(len(data.names)) >= 5
    units = data.units._replace(logs=logs, shift=np.where(logs, 1.0, data.units.shift))
    units = units._replace(spread=np.where(logs, 0.5, data.units.spread))
    return {
        "blocked": (
            data._replace(blocked="the <limits>"),
            answer
            | {"recommended_action": idle | {"probability_better_than_nothing": 0.0}}
            | {"next_experiment": idle | {"expected_gain": 0.0, "reason": "the <limits>"}}
            | {"best_effects": []},
            asked,
            "Why: the &lt;limits&gt;.",
        ),
        "value": (
            data,
            answer | {"objective": "value", "batch": [answer["next_experiment"]] * 2},
            asked | {"target_value": 51.5, "objective": None},
            "as near as possible to 51.5",
        ),
        "logarithms": (data._replace(units=units), answer, asked, "predictions are its medians"),
        "one": (data, answer | {"curves": first}, asked, "What setting each variable does"),
        "stop": (
            data._replace(buffer=none),
            answer | {"stop": {"expected_gain": 0.01, "worth_it": False}},
            asked | {"remaining": 7},
            '<th scope="row">remaining</th><td>7</td>',
        ),
    }[case]


@pytest.mark.parametrize("case", ["blocked", "value", "logarithms", "one", "stop"])
def test_every_answer_has_a_page(example, tmp_path, case):
    *story, said = changed(example[1], case)
    data, answer, asked = story
    kept = dict(list(answer["curves"].items())[:4])
    markup = page(Story(data, answer | {"curves": kept}, asked))
    assert said in markup and ("No, stop here" in markup) == (case == "stop")
    assert ("Set nothing</strong>" in markup) and markup.count("<section>") == 7
    assert (">wanted</text>" in markup) == ("At the same time" in markup) == (case == "value")
    assert ("and 0 experiments" in markup) == (case == "stop")


def test_pages_that_cannot_be_written_end_in_a_line(example, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.report.page", lambda _: "")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "page.html", tmp_path / "nul\0.html"):
        with pytest.raises(DataError, match="cannot be written .*: give another --out"):
            write(out, example[1])
    with pytest.raises(DataError, match="ends in .html"):
        DEPLOY.Report(Path("data.csv"), "y", "max", out=Path("data.csv"))


def test_suggest_loads_no_matplotlib():
    code = "import sys; __import__('06_deploy'); sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
