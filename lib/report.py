"""An answer as one HTML page for a reader who has never heard of this system, and its figures as a
PNG (lib/figures.py). The page needs nothing else: no script, no font, no file beside it; the same
answer gives the same bytes. Text is escaped by `tag` unless it is `Html` already.
"""

import re
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lib.answer import text
from lib.artifacts import replace_file
from lib.figures import (
    MOST_SHOWN,
    SIZE,
    Panel,
    Story,
    done,
    drawn,
    expected,
    figures,
    share,
    strip,
)
from lib.table import DataError


SURFACES = {
    "the surrogate's": "the trained network's prediction",
    "the flat": "that no variable has an effect",
    "their own": "a smooth curve through the experiments alone",
}
ASSUMED = (
    "One variable is set at a time; all others run as they do when nothing is set.",
    "No effect acts back on its cause. The network has seen such feedback, but often errs there.",
    "Something outside the file may move both a variable and the target: in a fifth of the systems "
    "that the network learned from, something did. Only experiments can rule it out.",
    "The system stays as it was when the rows were taken.",
)
HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { margin: 0; font: 16px/1.45 system-ui, sans-serif; color: #111; background: #fff; }
main { max-width: 58rem; margin: auto; padding: 12px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { margin-top: 2.2rem; font-size: 1.25rem; }
h3 { margin: 1.2rem 0 .3rem; font-size: 1rem; }
p, ul { max-width: 42rem; }
ul { padding-left: 1.2rem; }
.cards, .grid { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.cards > div { border: 1px solid #888; border-radius: 6px; padding: .7rem; }
.cards p, .cards h3 { margin: .3rem 0 0; font-weight: normal; }
.cards strong { font-size: 1.3rem; }
svg { display: block; width: 100%; max-width: 34rem; break-inside: avoid; }
table { border-collapse: collapse; width: 100%; max-width: 42rem; margin: .8rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .5rem .25rem 0; font-size: .875rem; }
th, td { box-sizing: border-box; min-width: 4.7em; }
th, td { text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
thead th { overflow-wrap: normal; }
tbody th { min-width: 6.6em; font-weight: normal; }
td svg { width: 80px; }
</style>
"""


class Html(str):
    """Text that is markup already."""


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element; what it holds is escaped unless it is `Html`, attributes always."""
    inner = "".join(x if isinstance(x, Html) else escape(str(x)) for x in content)
    named = ((key.rstrip("_").replace("_", "-"), x) for key, x in attributes.items())
    about = "".join(f' {key}="{escape(str(x))}"' for key, x in named)
    return Html(f"<{name}{about}>{inner}</{name}>")


def table(header: tuple[str, ...], rows) -> Html:
    """A table whose first column names its rows."""
    body = (tag("tr", tag("th", x, scope="row"), *(tag("td", y) for y in z)) for x, *z in rows)
    head = tag("tr", *(tag("th", x, scope="col") for x in header))
    return tag("table", tag("thead", head), tag("tbody", *body))


def listed(*sentences: str) -> Html:
    """A list of sentences, without those that are empty."""
    return tag("ul", *(tag("li", x) for x in sentences if x))


def pictured(panel: Panel, **how: Any) -> Html:
    """A figure to stand in a page."""
    about = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    source = drawn([panel], "svg", metadata=about, **how).decode()
    ((box, inner),) = re.findall(r'<svg.*?viewBox="([^"]*)".*?>(.*)</svg>', source, re.DOTALL)
    content = Html(re.sub(r'<g id="[^"]*">', "<g>", inner))
    return tag("svg", content, role="img", aria_label=panel[0], viewBox=box)


def section(title: str, *content: str) -> Html:
    """A part of a page with its heading; what is no markup becomes a paragraph, unless empty."""
    parts = (x if isinstance(x, Html) else tag("p", x) for x in content if x)
    return tag("section", tag("h2", title), *parts)


def untried(story: Story, one: Mapping[str, Any]) -> str:
    """A sentence for a setting that lies outside all values in the file; none for one of words."""
    names, said = story.data.names, ""
    for name, value in one["settings"].items():
        if name in names:
            seen = story.rows[:, names.index(name)]
            low, high = seen.min(), seen.max()
            ends = f"{low:.4g} to {high:.4g}"
            outside = value < low or value > high
            said = f"No row has such a {name} yet: the file has {ends}." if outside else said
    return said


def next_step(story: Story) -> Html:
    """What to do, and whether one more experiment is worth it."""
    answer, blocked, (following, *others) = story.answer, story.data.blocked, story.ahead
    best, stop = answer["recommended_action"], answer["stop"]
    predicted = f"Predicted {story.mean} of {answer['target']}:"
    cards = (
        (
            "Next experiment" if stop["worth_it"] else "Next experiment, if you go on",
            "None" if blocked else done(following),
            "" if blocked else f"{predicted} {expected(following)}.",
            f"Why: {following['reason']}.",
            f"Expected gain: {text(following['expected_gain'])}. By so much, on average, its "
            "outcome will improve what is recommended, even where its own prediction is no better.",
            untried(story, following),
        ),
        *(("At the same time", done(one), f"{predicted} {expected(one)}.") for one in others),
        (
            "Recommended action, by what is known now",
            done(best),
            f"{predicted} {expected(best)}.",
            untried(story, best),
            "Better than setting nothing with probability "
            f"{text(best['probability_better_than_nothing'])}."
            if best["settings"]
            else "No setting gains enough for what it risks.",
        ),
        ("For comparison", "Set nothing", f"{predicted} {expected(answer['nothing'])}."),
        (
            "Is one more experiment worth it?",
            "Yes" if stop["worth_it"] else "No, stop here",
            f"The best one is expected to gain {text(stop['expected_gain'])}; what it costs is not "
            "counted.",
            "" if stop["worth_it"] else "That is too little to be worth it.",
        ),
    )
    each = (
        tag("div", tag("h3", title), tag("strong", head), *(tag("p", x) for x in said if x))
        for title, head, *said in cards
    )
    alarm = tag("p", tag("a", "Read the warnings before you act on it.", href="#warnings"))
    return section(
        "What to do next",
        tag("div", *each, class_="cards"),
        alarm if answer["warnings"] else "",
    )


def effects(story: Story, key: Panel, panels: list[Panel]) -> Html:
    """The curves, and the best value of every variable."""
    answer, target, count = story.answer, story.answer["target"], len(story.variables)
    nothing = {"settings": {"nothing": ""}, **answer["nothing"]}
    best = (
        (name, text(value), expected(one))
        for one in (*answer["best_effects"], nothing)
        for name, value in one["settings"].items()
    )
    many = (
        f"Shown are the {MOST_SHOWN} of {count} variables with the largest effects; all are below."
    )
    return section(
        "What setting each variable does",
        f"Each picture is about one variable. If it alone were set to the value on the horizontal "
        f"axis, and that many times, what would be the {story.mean} of {target}? The answer is "
        "believed to lie in the band with a probability of 90 %. A single outcome has its own "
        "noise on top, so that experiments may lie outside. All pictures have the same vertical "
        "axis.",
        many if count > MOST_SHOWN else "",
        pictured(key, size=(SIZE[0], 1.3)),
        tag("div", *map(pictured, panels), class_="grid"),
        tag("h3", "The best value of each variable"),
        table(("set", "to", f"predicted {story.mean}"), best),
    )


def causes(story: Story, panel: Panel) -> Html:
    """The graph around the target, and sets of causes."""
    answer, target = story.answer, story.answer["target"]
    others = [f"{name} {share(p)}" for name, p in list(answer["parents"].items())[MOST_SHOWN:]]
    sets = (
        (", ".join(one["parents"]) or "(none of the columns)", share(one["probability"]))
        for one in answer["parent_sets"]
    )
    return section(
        f"What acts on {target} directly",
        f"A number is the probability that the variable is a direct cause of {target}: that it "
        "acts by itself, not by way of other columns. It says nothing of how large its effect "
        "is; and one that is no direct cause may still have an effect, by way of those that are. "
        "Arrows below 0.5 are dashed, below 0.1 dotted.",
        pictured(panel),
        f"Not drawn: {', '.join(others)}." if others else "",
        table(("all direct causes together", "probability"), sets),
    )


def glance(story: Story) -> Html:
    """Every column of the data."""
    data, rows = story.data, []
    for i, name in enumerate(data.names):
        values, times = np.asarray(data.buffer.values[:, i]), int(story.flags[:, i].sum())
        span = " to ".join(text(data.units.written(i, x)) for x in (values.min(), values.max()))
        panel = f"{name}: {span}, set {times} times", partial(strip, story, i)
        rows.append(
            (name, f"{len(values) - times} + {times}", span, pictured(panel, size=(1.25, 0.45)))
        )
    return section(
        "The data at a glance",
        "Grey: values where the variable was not set. Ticks below: what it was set to.",
        table(("column", "rows not set + set", "values", "spread"), rows),
    )


def trust(story: Story) -> Html:
    """The check in words, notes and warnings."""
    answer, check = story.answer, story.answer["check"]
    return section(
        "How far to trust it",
        f"Of {check['experiments']} experiments in the file, each predicted without its outcome, "
        f"{check['in_band']} turned out inside their 90 % band; nine of ten should."
        if check["experiments"]
        else "There is no experiment in the file to hold the predictions against.",
        f"Believed most is {SURFACES[check['surface']]}. The network's prediction has a weight of "
        f"{text(check['surrogate_weight'])}, where 1 is full trust; bands are "
        f"{text(check['widened_by'])} times as wide as it gave them.",
        tag("h3", "Warnings", id="warnings"),
        listed(*(f"{x}." for x in answer["warnings"] or ["None"])),
        tag("h3", "Notes on how the file was read"),
        listed(*(f"{x}." for x in answer["notes"] or ["None"])),
    )


def ranges(story: Story):
    """What each variable may be set to: rows of a table, with values where these are few."""
    data = story.data
    for name, curves in story.variables.items():
        column = next(iter(curves))
        ends = (text(float(f"{x:.12g}")) for x in (data.low[column], data.high[column]))
        values = (
            text(data.setting(i, v)[name])
            for i in curves
            if i in data.bounds and len(data.bounds[i].values) <= MOST_SHOWN
            for v in data.bounds[i].values
        )
        scale = "logarithmic" if data.units.logs[column] else ""
        yield name, ", ".join(values) or " to ".join(ends), scale


def assumed(story: Story) -> Html:
    """What was assumed, ranges, and what it takes to get the same answer again."""
    answer = story.answer
    own = {
        "system": answer["system"],
        "format of the answer": answer["version"],
        "SHA-256 of the data": answer["data_sha256"],
    }
    about = (
        (key.replace("_", " "), x.name if isinstance(x, Path) else x)
        for key, x in ({**story.asked, **own}).items()
        if x not in (None, (), False)
    )
    median = f"{answer['target']} is worked in logarithms, and predictions are its medians."
    return section(
        "What is assumed",
        listed(*ASSUMED, median if story.mean == "median" else ""),
        tag("h3", "What variables may be set to"),
        table(("variable", "values", "scale"), ranges(story)),
        tag("h3", "What was asked, and what answered"),
        table(("setting", "value"), about),
    )


def page(story: Story) -> str:
    """The whole page."""
    target, count, acted = story.answer["target"], len(story.flags), story.flags.any(1).sum()
    past, key, parents, curves = figures(story)
    aims = {"min": "as small as possible", "max": "as large as possible"}
    near = f"as near as possible to {text(story.asked['target_value'] or 0.0)}"
    body = (
        tag("h1", f"{target}: what to do next"),
        tag(
            "p",
            f"Wanted is {target} {aims.get(story.answer['objective'], near)}. The file has "
            f"{count} rows that could be used: {count - acted} observations, in which nothing was "
            f"set by hand, and {acted} experiments, in which something was. Numbers are in the "
            "units of the file.",
        ),
        next_step(story),
        section(
            "The campaign so far",
            pictured(past),
            "Outcomes are those that were used; notes below say what was left out or corrected. "
            f"Vertical bars are 90 % bands of the {story.mean}: a single outcome varies more.",
        ),
        effects(story, key, curves),
        causes(story, parents),
        glance(story),
        trust(story),
        assumed(story),
    )
    head = tag("head", Html(HEAD), tag("title", f"{target}: what to do next"))
    html = tag("html", head, tag("body", tag("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{html}\n"


def write(out: Path, story: Story) -> Path:
    """Write the page to `out`, and beside it its figures but those of single columns as a PNG,
    whose path is returned. Raises `DataError` where they cannot be written.
    """
    *panels, curves = figures(story)
    beside = out.with_suffix(".png")
    try:
        replace_file(out, page(story).encode())
        replace_file(beside, drawn([*panels, *curves], "png", across=2, dpi=110))
    except (OSError, ValueError) as error:  # also a NUL byte in the name
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{out}, {beside}: cannot be written ({why}): give another --out") from None
    return beside
