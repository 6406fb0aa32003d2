"""An answer as one HTML page for a reader who has never heard of this system, and its figures as a
PNG. The page needs nothing else: no script, no font, no file beside it; the same answer gives the
same bytes. Figures are drawn for a telephone, 356 points wide with letters of 11, and are never
told apart by colour alone. Text is escaped by `tag` unless it is `Html` already.
"""

import functools as ft
import html
import io
import itertools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lib.answer import text
from lib.artifacts import replace_file
from lib.reading import Experience
from lib.table import DataError


MOST_SHOWN = 12  # curves, and variables around the target
WIDTH, HEIGHT = 356 / 72, 262 / 72  # inches: 380 pixels without the margins
RC = {
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none",  # letters that can be searched and read aloud
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
ALONE, WITH_OTHERS, OBSERVED = "experiment", "several were set", "observed, nothing set"
IDLE, BEST, WANTED = "average, nothing set", "best experiment so far", "wanted"
EFFECT, BAND, RECOMMENDED, NEXT = "predicted", "90 % band", "recommended", "next experiment"
LOOKS = {
    ALONE: {"marker": "D", "ls": "none", "color": "black", "ms": 5},
    WITH_OTHERS: {"marker": "x", "ls": "none", "color": "black", "ms": 6},
    OBSERVED: {"marker": "o", "ls": "none", "color": "0.55", "mfc": "none", "ms": 3.5},
    IDLE: {"ls": "--", "color": "0.35", "lw": 1.3},
    WANTED: {"ls": ":", "color": "black", "lw": 1.8},
    BEST: {"ls": "-", "color": "black", "lw": 1.3, "drawstyle": "steps-post"},
    EFFECT: {"ls": "-", "color": "black", "lw": 1.6},
    BAND: {"ls": "-", "color": "0.85", "lw": 9},
    RECOMMENDED: {"marker": "*", "ls": "none", "color": "#0b5394", "ms": 14, "capsize": 4},
    NEXT: {"marker": "^", "ls": "none", "color": "#b45309", "mfc": "white", "ms": 9, "capsize": 7},
}
SURFACES = {
    "the surrogate's": "the trained network's prediction",
    "the flat": "that no variable has an effect",
    "their own": "a smooth curve through the experiments alone",
}
ASSUMED = (
    "One variable is set at a time; all others run as they do when nothing is set.",
    "Causes have no cycles: nothing acts on itself by way of others.",
    "Nothing outside the file moves both a variable and the target. The network was trained "
    "without such hidden causes; only experiments can show them.",
    "Rows are independent of each other, and the system behaves as it did when they were taken.",
)
HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { margin: 0; font: 16px/1.45 system-ui, sans-serif; color: #111; background: #fff; }
main { max-width: 58rem; margin: auto; padding: 12px; }
h1, h2, h3, p, li, th, td, dd, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.2rem; font-size: 1.25rem; }
h3 { margin: 0; font-size: 1rem; font-weight: normal; }
p, ul { max-width: 42rem; } ul { padding-left: 1.2rem; }
.cards, .grid { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.cards > div { border: 1px solid #888; border-radius: 6px; padding: .7rem; }
.cards p { margin: .3rem 0 0; } .cards strong { display: block; font-size: 1.3rem; }
.alarm { border-left: 5px solid #111; padding-left: .7rem; }
figure { margin: 0; max-width: 34rem; break-inside: avoid; } svg { display: block; width: 100%; }
figcaption, table { font-size: .875rem; }
table { border-collapse: collapse; width: 100%; max-width: 42rem; margin: .8rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .5rem .25rem 0; }
th, td { text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
tbody th { font-weight: normal; } td svg { width: 90px; }
</style>
"""


class Html(str):
    """Text that is markup already."""


class Panel(NamedTuple):
    """A figure: what it shows in words, for who cannot see it, and what draws it on axes."""

    label: str
    draw: Callable[[Axes], Any]


class Story(NamedTuple):
    """What a page is about: a file, the answer with curves, and what was asked: at least
    `remaining` and `target_value`, and whatever else is to be listed.
    """

    data: Experience
    answer: Mapping[str, Any]
    asked: Mapping[str, Any]

    @property
    def rows(self) -> np.ndarray:
        """Values `[rows, vars]` in the columns' own units."""
        return self.data.units.raw(self.data.buffer.values)

    @property
    def flags(self) -> np.ndarray:
        """What was set by hand `[rows, vars]`."""
        return np.asarray(self.data.buffer.intervened)

    @property
    def mean(self) -> str:
        """What is predicted of the target; of one in logarithms, the median."""
        return "median" if self.data.units.logs[self.data.target] else "average"

    @property
    def marks(self) -> list[tuple[str, dict]]:
        """What to mark in figures, and how: the recommended action and the next experiments."""
        ahead = self.answer.get("batch") or [self.answer["next_experiment"]]
        every = [(RECOMMENDED, self.answer["recommended_action"]), *((NEXT, x) for x in ahead)]
        return [(look, one) for look, one in every if one["settings"]]

    @property
    def settable(self) -> dict[str, list[int]]:
        """The columns of each variable that can be set, several where it is words, those first that
        move the target most; the recommended and the next one come before these.
        """
        groups, marked = {}, [name for _, one in self.marks for name in one["settings"]]
        for column in self.answer["curves"]:
            i = self.data.names.index(column)
            groups.setdefault(self.data.words.get(i, (column,))[0], []).append(i)
        curves, scale = self.answer["curves"], self.data.units.one(self.data.target).exact
        size = {
            name: max(np.ptp(scale(curves[self.data.names[i]]["predicted"])) for i in group)
            for name, group in groups.items()
        }
        return dict(sorted(groups.items(), key=lambda x: (x[0] not in marked, -size[x[0]])))


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element; what it holds is escaped unless it is `Html`, attributes always."""
    inner = (x if isinstance(x, Html) else html.escape(str(x)) for x in content)
    about = (
        f' {key.strip("_").replace("_", "-")}="{html.escape(str(x))}"'
        for key, x in attributes.items()
    )
    return Html(f"<{name}{''.join(about)}>{''.join(inner)}</{name}>")


def table(header: tuple[str, ...], rows) -> Html:
    """A table whose first column names its rows."""
    body = (tag("tr", tag("th", x, scope="row"), *(tag("td", y) for y in z)) for x, *z in rows)
    head = tag("tr", *(tag("th", x, scope="col") for x in header))
    return tag("table", tag("thead", head), tag("tbody", *body))


def items(sentences) -> Html:
    """A list of sentences."""
    return tag("ul", *(tag("li", x) for x in sentences))


def short(name: str, most: int) -> str:
    """A name on one line, its middle left out where it is long."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def share(p: float) -> str:
    """A probability with two digits; none is certain."""
    return "< 0.01" if p < 0.01 else "> 0.99" if p > 0.99 else f"{p:.2f}"


def done(one: Mapping[str, Any]) -> str:
    """What is set, in words."""
    return "Set " + (
        ", ".join(f"{k} to {text(x)}" for k, x in one["settings"].items()) or "nothing"
    )


def band(one: Mapping[str, Any]) -> str:
    """The ends of a prediction's band."""
    return f"{text(one['low'])} to {text(one['high'])}"


# --- figures ---


def drawn(panels: list[Panel], kind: str, size=(WIDTH, HEIGHT), across=1, **how: Any) -> bytes:
    """Panels in a grid, as the bytes of an image file."""
    stream, down = io.BytesIO(), -(-len(panels) // across)
    salt = {"svg.hashsalt": panels[0].label}  # ids that no other figure of a page has
    with matplotlib.rc_context(RC | salt), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a reader's program may have the letter
        figure = Figure(figsize=(across * size[0], down * size[1]), layout="constrained")
        places = figure.subplots(down, across, squeeze=False).flat
        for axes, panel in itertools.zip_longest(places, panels):
            panel.draw(axes) if panel else axes.set_axis_off()
        figure.savefig(stream, format=kind, **how)
    return stream.getvalue()


def svg(panel: Panel, **how: Any) -> Html:
    """A figure to stand in a page."""
    source = drawn([panel], "svg", metadata=NO_METADATA, **how).decode()
    ((box, inner),) = re.findall(r'<svg.*?viewBox="([^"]*)".*?>(.*)</svg>', source, re.DOTALL)
    content = Html(re.sub(r'<g id="[^"]*">', "<g>", inner))
    return tag("svg", content, role="img", aria_label=panel.label, viewBox=box)


def point(axes: Axes, x, one: Mapping[str, Any], look: str) -> None:
    """A prediction with its band."""
    middle, ends = one["predicted"], np.array([[one["low"]], [one["high"]]])
    axes.errorbar(x, middle, np.abs(ends - middle), **LOOKS[look])


def levels(story: Story, axes: Axes) -> None:
    """The target's axis: what it is where nothing is set, and what is wanted."""
    target, goal = story.data.target, story.asked["target_value"]
    axes.axhline(story.answer["nothing"]["predicted"], **LOOKS[IDLE])
    if goal is not None:
        axes.axhline(goal, **LOOKS[WANTED])
    axes.set_ylabel(short(story.answer["target"], 30))
    if story.data.units.logs[target]:
        in_decades(axes, "y")


def in_decades(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def campaign(story: Story, axes: Axes) -> None:
    """Outcomes in the order of rows, and what is predicted behind the last."""
    data, lines, acted = story.data, story.data.lines, story.flags.any(1)
    outcomes, goal = story.rows[:, data.target], story.asked["target_value"]
    scale = data.units.one(data.target).exact
    score = scale(outcomes[acted]) * {"min": 1.0, "max": -1.0}.get(story.answer["objective"], 1.0)
    score = score if goal is None else np.abs(score - scale(goal))
    best = [outcomes[acted][score[: k + 1].argmin()] for k in range(len(score))]
    axes.plot(lines[~acted], outcomes[~acted], label=OBSERVED, **LOOKS[OBSERVED])
    axes.plot(lines[acted], outcomes[acted], label=ALONE, **LOOKS[ALONE])
    axes.plot(lines[acted], best, label=BEST, **LOOKS[BEST])
    ahead = itertools.count(lines.max() + 0.06 * np.ptp(lines), 0.06 * np.ptp(lines))
    for x, (look, one) in zip(ahead, story.marks, strict=False):
        point(axes, x, one, look)
        axes.plot([], [], label=look, **{k: v for k, v in LOOKS[look].items() if k != "capsize"})
    axes.axvline(lines.max() + 0.03 * np.ptp(lines), color="0.6", lw=0.8)
    axes.set_xlabel("row of the file; right of the line: predicted")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    levels(story, axes)


def effect(story: Story, name: str, group: list[int], axes: Axes) -> None:
    """E[target | do(variable = value)] with its band, and the experiments with the variable."""
    data, curves, flags = story.data, story.answer["curves"], story.flags
    each = [(i, curves[data.names[i]]) for i in group]
    words = {
        data.setting(i, value)[name]: {
            key: np.interp(value, curve["values"], curve[key]) for key in curve
        }
        for i, curve in each
        if i in data.words
        for value in data.bounds[i].values
    }
    place = {word: k for k, word in enumerate(words)}
    for word, one in words.items():
        point(axes, place[word], one, EFFECT)
    for _, curve in [] if words else each:
        axes.fill_between(*(curve[key] for key in ("values", "low", "high")), color="0.85", lw=0)
        axes.plot(curve["values"], curve["predicted"], **LOOKS[EFFECT])
    for r, i in np.argwhere(flags[:, group]):
        value = data.setting(group[i], story.rows[r, group[i]])[name]
        look = LOOKS[ALONE if flags[r].sum() == 1 else WITH_OTHERS]
        if not words or value in place:
            axes.plot(
                place.get(value, 0) + 0.2 if words else value, story.rows[r, data.target], **look
            )
    for look, one in story.marks:
        if name in one["settings"]:
            value = one["settings"][name]
            point(axes, place.get(value, value), one, look)
    axes.set_xlabel(short(name, 40))
    if words:
        axes.set_xticks(list(place.values()), [short(word, 40 // len(place)) for word in place])
    elif data.units.logs[group[0]]:
        in_decades(axes, "x")
    levels(story, axes)


def graph(story: Story, axes: Axes) -> None:
    """The most probable causes, each with an edge to the target."""
    parents = list(story.answer["parents"].items())[:MOST_SHOWN]
    box = {"boxstyle": "round", "fc": "white", "ec": "black"}
    middle = (1 - len(parents)) / 2
    axes.text(0.7, middle, short(story.answer["target"], 15), va="center", bbox=box, weight="bold")
    for k, (name, p) in enumerate(parents):
        end = middle - 0.15 * (k + middle)
        line = {"lw": 0.7 + 4 * p, "ls": "-" if p >= 0.5 else "--" if p >= 0.1 else ":"}
        axes.text(0.38, -k, short(name, 18), ha="right", va="center", bbox=box)
        axes.annotate("", (0.69, end), (0.4, -k), arrowprops={"arrowstyle": "-|>", **line})
        label = {"fc": "white", "ec": "none", "pad": 0.5}
        axes.text(0.46, -k + 0.2 * (end + k), share(p), ha="center", va="center", bbox=label)
    axes.set(xlim=(0, 1), ylim=(-len(parents) + 0.4, 0.6))
    axes.set_axis_off()


def strip(story: Story, i: int, axes: Axes) -> None:
    """How one column's values are spread: a histogram where it was not set, ticks where it was."""
    values, acted = np.asarray(story.data.buffer.values[:, i]), story.flags[:, i]
    ends = (values.min(), values.max())
    height = axes.hist(values[~acted], 15, ends, color="0.6")[0].max()
    axes.plot(values[acted], np.full(acted.sum(), -0.3 * max(height, 1)), "|", color="black", ms=8)
    axes.set_axis_off()


def key(axes: Axes) -> None:
    """What lines and marks mean, of all the curves."""
    for look in (EFFECT, BAND, IDLE, WANTED, ALONE, WITH_OTHERS, RECOMMENDED, NEXT):
        axes.plot([], [], label=look, **{k: x for k, x in LOOKS[look].items() if k != "capsize"})
    axes.legend(loc="center", ncols=2, frameon=False)
    axes.set_axis_off()


def figures(story: Story) -> dict[str, list[Panel]]:
    """The figures of a page: of the campaign, the effects (their key first) and the graph."""
    answer, target = story.answer, story.answer["target"]
    marked = "; ".join(
        f"{look}: {done(one)}, {target} {text(one['predicted'])} ({band(one)})"
        for look, one in story.marks
    )
    shown = list(story.settable.items())[:MOST_SHOWN]
    several = []
    for name, group in shown:
        curves = [answer["curves"][story.data.names[i]] for i in group]
        ends = [f(x for one in curves for x in one["predicted"]) for f in (min, max)]
        several.append(
            Panel(
                f"Predicted {story.mean} of {target} where {name} is set: {text(ends[0])} to {text(ends[1])}. {marked}",
                ft.partial(effect, story, name, group),
            )
        )
    parents = ", ".join(f"{name} {share(p)}" for name, p in answer["parents"].items())
    return {
        "campaign": [Panel(f"{target}, row by row. {marked}", ft.partial(campaign, story))],
        "effects": [Panel("Key of the curves", key), *several],
        "graph": [
            Panel(
                f"Probability of being a direct cause of {target}: {parents}",
                ft.partial(graph, story),
            )
        ],
    }


# --- page ---


def section(title: str, *content: Html) -> Html:
    """A part of a page with its heading."""
    return tag("section", tag("h2", title), *content)


def pictures(panels: list[Panel]) -> Html:
    """Figures side by side where there is room, else one below the other."""
    return tag("div", *(tag("figure", svg(panel)) for panel in panels), class_="grid")


def next_step(story: Story) -> Html:
    """What to do, and whether one more experiment is worth it."""
    answer, target = story.answer, story.answer["target"]
    best, stop, alarms = answer["recommended_action"], answer["stop"], len(answer["warnings"])
    following, *others = answer.get("batch") or [answer["next_experiment"]]
    p, gains = text(best["probability_better_than_nothing"]), text(following["expected_gain"])

    def card(title: str, headline: str, one: Mapping[str, Any], *sentences: str) -> Html:
        said = (
            f"{story.mean} {target} {text(one['predicted'])}, 90 % band {band(one)}" if one else ""
        )
        lines = (tag("p", x) for x in (f"Predicted: {said}." if one else "", *sentences) if x)
        return tag("div", tag("h3", title), tag("strong", headline), *lines)

    cards = (
        card("Next experiment", "None", {}, f"{story.data.blocked}.")
        if story.data.blocked
        else card(
            "Next experiment",
            done(following),
            following,
            f"Why: {following['reason']}.",
            f"Expected gain: {gains}, in the unit of {target}.",
        ),
        *(card("At the same time", done(one), one) for one in others),
        card(
            "Recommended action, by what is known now",
            done(best),
            best,
            f"Better than setting nothing with probability {p}."
            if best["settings"]
            else "No setting gains enough for what it risks.",
        ),
        card("For comparison", "Set nothing", answer["nothing"]),
        card(
            "Is one more experiment worth it?",
            "Yes" if stop["worth_it"] else "No, stop here",
            {},
            f"It is expected to improve the best action by {text(stop['expected_gain'])} at most, in "
            f"the unit of {target}.",
            "" if stop["worth_it"] else "The noise of an outcome is what is left.",
        ),
    )
    alarm = tag("a", f"Read the warnings first: {alarms}", href="#warnings")
    said = [tag("p", alarm, class_="alarm")] if alarms else []
    return section("What to do next", *said, tag("div", *cards, class_="cards"))


def effects(story: Story, panels: list[Panel]) -> Html:
    """The curves, and the best setting of every variable."""
    answer, target = story.answer, story.answer["target"]
    more = len(story.settable) - len(panels) + 1
    best = (
        (*next(iter(one["settings"].items())), text(one["predicted"]), band(one))
        for one in answer["best_effects"]
    )
    return section(
        "What setting each variable does",
        tag(
            "p",
            f"Each picture is about one variable that can be set: if it alone were set to the value "
            f"on the horizontal axis, what {target} would be, in the {story.mean} of many "
            "repetitions. The true curve is believed to lie in the band with a probability of 90 % "
            "at each value; a single outcome has its own noise on top of that, so that experiments "
            "may lie outside.",
        ),
        *(
            [
                tag(
                    "p",
                    f"Shown are the {MOST_SHOWN} of {MOST_SHOWN + more} variables with the largest effects; the table has all.",
                )
            ]
            if more > 0
            else []
        ),
        pictures(panels),
        tag("h3", "The best value of each variable"),
        table(
            ("set", "to", f"{story.mean} {target}", "90 % band"),
            [
                *((name, text(x), *rest) for name, x, *rest in best),
                ("(nothing)", "", text(answer["nothing"]["predicted"]), band(answer["nothing"])),
            ],
        ),
    )


def causes(story: Story, panels: list[Panel]) -> Html:
    """The graph around the target and the parent sets."""
    answer, target = story.answer, story.answer["target"]
    more = len(answer["parents"]) - MOST_SHOWN
    return section(
        f"What acts on {target} directly",
        tag(
            "p",
            "Each number is the probability that the variable is a direct cause: that it acts on "
            f"{target} by itself, not by way of another column. A variable that is no direct cause "
            "may still have an effect when it is set, by way of those that are.",
        ),
        *(
            [
                tag(
                    "p",
                    f"Drawn are the {MOST_SHOWN} most probable of {MOST_SHOWN + more} variables.",
                )
            ]
            if more > 0
            else []
        ),
        pictures(panels),
        *(
            [
                table(
                    ("variable", "probability"),
                    [(name, share(p)) for name, p in list(answer["parents"].items())[MOST_SHOWN:]],
                )
            ]
            if more > 0
            else []
        ),
        table(
            (f"all direct causes of {target} together", "probability"),
            [
                (", ".join(one["parents"]) or "(none of the columns)", share(one["probability"]))
                for one in answer["parent_sets"]
            ],
        ),
    )


def glance(story: Story) -> Html:
    """Every column of the data."""
    data, rows = story.data, []
    for i, name in enumerate(data.names):
        values = np.asarray(data.buffer.values[:, i])
        low, high = (text(data.units.written(i, x)) for x in (values.min(), values.max()))
        times = int(story.flags[:, i].sum())
        label = f"{name}: {low} to {high}, set {times} times"
        picture = svg(Panel(label, ft.partial(strip, story, i)), size=(1.25, 0.45))
        rows.append((name, len(values), f"{low} to {high}", times, picture))
    return section(
        "The data at a glance",
        tag(
            "p",
            "Grey: how often a value was seen while the variable was not set. Ticks below: what it was set to.",
        ),
        table(("column", "rows", "values", "times set", "spread"), rows),
    )


def trust(story: Story) -> Html:
    """The check in words, notes and warnings."""
    answer, check = story.answer, story.answer["check"]
    return section(
        "How far to trust it",
        tag(
            "p",
            f"{check['experiments']} experiments in the file were predicted without looking at their outcomes: {check['in_band']} lay inside their 90 % bands; nine of ten should. "
            if check["experiments"]
            else "There is no experiment in the file to check the predictions against.",
        ),
        tag(
            "p",
            f"Believed most is {SURFACES[check['surface']]}; the network's prediction has a weight of {text(check['surrogate_weight'])} (1: it alone counts). The bands are {text(check['widened_by'])} times as wide as the network gave them.",
        ),
        tag("h3", "Warnings", id="warnings"),
        items(f"{x}." for x in answer["warnings"] or ["none"]),
        tag("h3", "Notes on how the file was read"),
        items(f"{x}." for x in answer["notes"] or ["none"]),
    )


def assumed(story: Story) -> Html:
    """What was assumed, ranges, and what gives the same answer again."""
    data, answer = story.data, story.answer
    ranges = [
        (
            name,
            *(text(float(f"{x:.12g}")) for x in (data.low[i], data.high[i])),
            "logarithmic" if data.units.logs[i] else "",
        )
        for i, name in enumerate(data.names)
        if name in answer["curves"]
    ]
    listed = {
        key.replace("_", " "): x.name if isinstance(x, Path) else x
        for key, x in story.asked.items()
        if x not in (None, (), False)
    }
    return section(
        "What is assumed",
        items(
            ASSUMED
            + (
                (f"'{answer['target']}' is worked in logarithms: predictions are medians.",)
                if story.mean == "median"
                else ()
            )
        ),
        tag("h3", "Ranges within which variables may be set"),
        table(("variable", "from", "to", "scale"), ranges),
        tag("h3", "What was asked, and of what"),
        table(
            ("", ""),
            [
                *listed.items(),
                ("system", answer["system"]),
                ("format of the answer", answer["version"]),
                ("SHA-256 of the data", answer["data_sha256"]),
            ],
        ),
    )


def page(story: Story) -> str:
    """The whole page."""
    answer, target, panels = story.answer, story.answer["target"], figures(story)
    aim = {"min": "as small as possible", "max": "as large as possible"}.get(
        answer["objective"], f"as near as possible to {story.asked['target_value']}"
    )
    acted = int(story.flags.any(1).sum())
    title = f"{target}: what to do next"
    body = tag(
        "main",
        tag("h1", title),
        tag(
            "p",
            f"Wanted is {target} {aim}. This page rests on {len(story.flags)} rows of data: {len(story.flags) - acted} observations, in which nothing was set, and {acted} experiments, in which something was set by hand. Numbers are in the units of the file.",
        ),
        next_step(story),
        section(
            "The campaign so far",
            pictures(panels["campaign"]),
            tag(
                "p",
                "Outcomes as they were used: what was left out or corrected is in the notes. Bars are 90 % bands of the predicted average, without the noise of a single outcome.",
            ),
        ),
        effects(story, panels["effects"]),
        causes(story, panels["graph"]),
        glance(story),
        trust(story),
        assumed(story),
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{HEAD}{tag("title", title)}</head><body>{body}</body></html>\n'


def picture(story: Story) -> bytes:
    """All figures but those of single columns, as a PNG."""
    panels = [panel for part in figures(story).values() for panel in part]
    return drawn(panels, "png", across=2, dpi=110)


def write(out: Path, story: Story) -> Path:
    """Write the page to `out` and the PNG beside it, whose path is returned. Raises `DataError`
    where they cannot be written.
    """
    beside = out.with_suffix(".png")
    for path, make in ((out, lambda: page(story).encode()), (beside, lambda: picture(story))):
        content = make()
        try:
            replace_file(path, content)
        except (OSError, ValueError) as error:  # also a NUL byte in the name
            why = getattr(error, "strerror", None) or error
            raise DataError(f"{path}: cannot be written ({why}): give another --out") from None
    return beside
