"""An answer as one HTML page for a reader who has never heard of this system, and its figures as a
PNG. The page needs nothing else: no script, no font, no file beside it; the same answer gives the
same bytes. Figures are drawn for a telephone, 356 points wide with letters of 11, and are never
told apart by colour alone. Text is escaped by `tag` unless it is `Html` already, and no name is
read as a formula.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.answer import text
from lib.artifacts import replace_file
from lib.reading import Experience
from lib.table import DataError


MOST_SHOWN = 12  # curves, and variables around the target
SIZE = (356 / 72, 262 / 72)  # inches: 380 pixels without the margins
RC = {
    "svg.fonttype": "none",  # letters that can be searched and read aloud
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
    "lines.markersize": 5,
}
BARE: dict[str, Any] = {"frame_on": False, "xticks": [], "yticks": []}
LOOKS = {  # in black and white as well
    "frame": {"ls": "none"},  # what an axis has to hold
    "predicted": {"ls": "-", "marker": ".", "color": "black", "lw": 1.6, "capsize": 2},
    "90 % band": {"color": "0.85", "lw": 0},
    "average, nothing set": {"ls": "--", "color": "0.35", "lw": 1.3},
    "wanted": {"ls": ":", "color": "black", "lw": 1.8},
    "observed": {"marker": "o", "ls": "none", "color": "0.55", "mfc": "none", "ms": 3.5},
    "experiment": {"marker": "D", "ls": "none", "color": "black"},
    "several were set": {"marker": "x", "ls": "none", "color": "black"},
    "best so far": {"ls": "-", "color": "black", "lw": 1.1, "drawstyle": "steps-post"},
    "recommended": {"marker": "*", "ls": "none", "color": "#0b5394", "ms": 14, "capsize": 4},
    "next experiment": {
        **{"marker": "^", "ls": "none", "color": "#b45309", "mfc": "none", "ms": 9, "capsize": 7}
    },
}
SURFACES = {
    "the surrogate's": "the trained network's prediction",
    "the flat": "that no variable has an effect",
    "their own": "a smooth curve through the experiments alone",
}
ASSUMED = (
    "One variable is set at a time; all others run as they do when nothing is set.",
    "Causes have no cycles: nothing acts on itself by way of others.",
    "Nothing outside the file moves both a variable and the target. The network has seen no such "
    "hidden causes in training: only experiments can show them.",
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
Panel = tuple[str, Callable[[Axes], Any]]  # a figure in words, and what draws it
Layer = tuple[str, Any, Any, Any]  # how it looks, x, y and errors of y; of a band, both ends


class Html(str):
    """Text that is markup already."""


class Story(NamedTuple):
    """What a page is about: a file, the answer with curves, and what was asked: `target_value`, and
    whatever else is to be listed, by name.
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
    def scale(self) -> str:
        """Of the target's axis."""
        return "log" if self.data.units.logs[self.data.target] else "linear"

    @property
    def mean(self) -> str:
        """What is predicted of the target."""
        return "median" if self.scale == "log" else "average"

    @property
    def ahead(self) -> list[dict]:
        """The next experiments."""
        return self.answer.get("batch") or [self.answer["next_experiment"]]

    @property
    def marks(self) -> list[tuple[str, dict]]:
        """What is recommended and the next experiments, each as it looks in figures."""
        ahead = (("next experiment", one) for one in self.ahead)
        every = ("recommended", self.answer["recommended_action"]), *ahead
        return [(look, one) for look, one in every if one["settings"]]

    @property
    def variables(self) -> dict[str, dict[int, dict]]:
        """The curves of each variable that can be set, by column: words have several. Those that
        are marked come first, then those that move the target most.
        """
        names, marked = self.data.names, [name for _, one in self.marks for name in one["settings"]]
        curves = {names.index(column): curve for column, curve in self.answer["curves"].items()}
        source = {i: self.data.words.get(i, (names[i],))[0] for i in curves}
        exact = self.data.units.one(self.data.target).exact
        size = {i: np.ptp(exact(np.array(one["predicted"]))) for i, one in curves.items()}
        order = sorted(curves, key=lambda i: (source[i] not in marked, -size[i]))
        return {
            name: {i: curves[i] for i in curves if source[i] == name}
            for name in dict.fromkeys(source[i] for i in order)
        }


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


def short(name: str, most: int) -> str:
    """A name for a figure: without its middle where it is long, and no formula in dollars."""
    cut = name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"
    return cut.replace("$", r"\$")


def share(p: float) -> str:
    """A probability with two digits; none is certain."""
    return "< 0.01" if p < 0.01 else "> 0.99" if p > 0.99 else f"{p:.2f}"


def done(one: Mapping[str, Any]) -> str:
    """What is set, in words."""
    return f"Set {', '.join(f'{k} to {text(x)}' for k, x in one['settings'].items()) or 'nothing'}"


def expected(one: Mapping[str, Any]) -> str:
    """A prediction with its band."""
    return f"{text(one['predicted'])} (90 % band {text(one['low'])} to {text(one['high'])})"


# --- figures ---


def drawn(panels: list[Panel], kind: str, across: int = 1, size=SIZE, **how: Any) -> bytes:
    """Panels in a grid, as the bytes of an image file; ids differ between files of a page."""
    stream, down = io.BytesIO(), -(-len(panels) // across)
    rc: dict[Any, Any] = RC | {"svg.hashsalt": panels[0][0]}
    empty: list[Panel] = [("", Axes.set_axis_off)] * (across * down - len(panels))
    with matplotlib.rc_context(rc), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a browser may have the letter
        figure = Figure((across * size[0], down * size[1]), layout="constrained")
        places = figure.subplots(down, across, squeeze=False).flat
        for axes, (_, draw) in zip(places, panels + empty, strict=True):
            draw(axes)
        figure.savefig(stream, format=kind, **how)
    return stream.getvalue()


def pictured(panel: Panel, **how: Any) -> Html:
    """A figure to stand in a page."""
    about = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    source = drawn([panel], "svg", metadata=about, **how).decode()
    ((box, inner),) = re.findall(r'<svg.*?viewBox="([^"]*)".*?>(.*)</svg>', source, re.DOTALL)
    content = Html(re.sub(r'<g id="[^"]*">', "<g>", inner))
    return tag("svg", content, role="img", aria_label=panel[0], viewBox=box)


def lines(layers: list[Layer], key: dict | None, settings: dict, axes: Axes) -> None:
    """Draw layers, perhaps with a key of them, and what else is set of the axes."""
    for look, x, y, ends in layers:
        draw = axes.fill_between if look == "90 % band" else axes.errorbar
        draw(x, y, ends, label=look, **LOOKS[look])
    if key:
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))  # each once
        axes.legend(list(named.values()), list(named), frameon=False, ncols=2, **key)
    axes.set(**settings)


def point(look: str, x: Any, one: Mapping[str, Any]) -> Layer:
    """A prediction with its band."""
    ends = np.abs(np.array([[one["low"]], [one["high"]]]) - one["predicted"])
    return look, [x], [one["predicted"]], ends


def levels(story: Story, ends: list) -> list[Layer]:
    """What the target is where nothing is set, and what is wanted, between two ends of an axis."""
    nothing, goal = story.answer["nothing"]["predicted"], story.asked["target_value"]
    wanted = [] if goal is None else [("wanted", ends, [goal] * 2, None)]
    return [("average, nothing set", ends, [nothing] * 2, None), *wanted]


def campaign(story: Story) -> Panel:
    """Outcomes in the order of rows, and right of them what is predicted."""
    data, lots, acted = story.data, story.data.lines, story.flags.any(1)
    outcomes, deviations = story.rows[:, data.target], data.buffer.values[:, data.target]
    away = np.abs(deviations - data.units.one(data.target).exact(story.asked["target_value"] or 0))
    worse = {"min": deviations, "max": -deviations}.get(story.answer["objective"], away)[acted]
    best = [outcomes[acted][worse[: k + 1].argmin()] for k in range(len(worse))]
    end, width = lots.max(), np.ptp(lots)
    layers = [
        ("observed", lots[~acted], outcomes[~acted], None),
        ("best so far", lots[acted], best, None),
        ("experiment", lots[acted], outcomes[acted], None),
        *(point(look, end + 0.07 * k * width, x) for k, (look, x) in enumerate(story.marks, 1)),
        *levels(story, [lots.min(), end]),
    ]
    settings = {
        "xlabel": f"line of the file; right of {end}: predicted",
        "ylabel": short(story.answer["target"], 30),
        "yscale": story.scale,
    }
    key = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2)}
    marked = "; ".join(f"{look}: {done(one)}, {expected(one)}" for look, one in story.marks)
    label = f"{story.answer['target']}, row by row; {acted.sum()} experiments. {marked}"
    return label, partial(lines, [x for x in layers if len(x[1])], key, settings)


def effect(story: Story, name: str) -> Panel:
    """What setting a variable does, with its band, and the experiments with it; of words, a place
    on the axis for each.
    """
    data, curves, outcomes = story.data, story.variables[name], story.rows[:, story.data.target]
    spots = [(i, v) for i in curves if i in data.words for v in data.bounds[i].values]
    place: dict[Any, int] = {data.setting(i, v)[name]: k for k, (i, v) in enumerate(spots)}
    some = [one for group in list(story.variables.values())[:MOST_SHOWN] for one in group.values()]
    reach = [y for one in some for y in (*one["low"], *one["high"])]
    reach += outcomes[story.flags.any(1)].tolist()
    column, first = next(iter(curves.items()))
    ends = [-0.4, len(place) - 0.6] if place else [first["values"][0], first["values"][-1]]
    layers = [
        ("90 % band", first["values"], first["low"], first["high"]),
        ("predicted", first["values"], first["predicted"], None),
    ]
    if place:
        layers = [
            point(
                "predicted", k, {x: np.interp(v, curves[i]["values"], curves[i][x]) for x in first}
            )
            for k, (i, v) in enumerate(spots)
        ]
    tried = [
        ("several were set" if story.flags[r].sum() > 1 else "experiment", outcomes[r], value)
        for i in curves
        for r in np.flatnonzero(story.flags[:, i])
        if (value := data.setting(i, story.rows[r, i].item())[name]) in place or not place
    ]
    marked = [
        (look, one, one["settings"][name]) for look, one in story.marks if name in one["settings"]
    ]
    layers = [
        ("frame", ends, [min(reach), max(reach)], None),
        *layers,
        *levels(story, ends),
        *((look, [place[x] - 0.15 if place else x], [y], None) for look, y, x in tried),
        *(point(look, place[x] + 0.15 if place else x, one) for look, one, x in marked),
    ]
    settings = {
        "xlabel": short(name, 40),
        "ylabel": short(story.answer["target"], 30),
        "yscale": story.scale,
    }
    settings |= (
        {"xticks": [*place.values()], "xticklabels": [short(x, 40 // len(place)) for x in place]}
        if place
        else {"xscale": "log" if data.units.logs[column] else "linear"}
    )
    at = zip(first["values"][::5], first["predicted"][::5], strict=True)
    said = ", ".join(place or (f"{text(y)} at {text(x)}" for x, y in at))
    label = f"Predicted {story.mean} of {story.answer['target']} by {name}: {said}"
    return label, partial(lines, layers, None, settings)


def effect_key(story: Story) -> Panel:
    """What lines and marks mean in the curves."""
    bars = ("90 % band", "predicted", "recommended", "next experiment")
    shown = {
        **dict.fromkeys(("frame", "observed", "best so far"), False),
        "wanted": story.asked["target_value"] is not None,
        "several were set": story.flags.sum(1).max() > 1,
    }
    layers = [(x, [], [], [] if x in bars else None) for x in LOOKS if shown.get(x, True)]
    return "What lines and marks mean", partial(lines, layers, {"loc": "center"}, BARE)


def graph(story: Story, axes: Axes) -> None:
    """The most probable causes, each with an edge to the target."""
    parents = list(story.answer["parents"].items())[:MOST_SHOWN]
    boxed: dict[str, Any] = {
        "bbox": {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "black"},
        "va": "center",
    }
    bare: dict[str, Any] = {
        "bbox": {"fc": "white", "ec": "none", "pad": 0.5},
        "va": "center",
        "ha": "center",
    }
    middle = (1 - len(parents)) / 2
    axes.text(0.7, middle, short(story.answer["target"], 14), weight="bold", **boxed)
    for k, (name, p) in enumerate(parents):
        end = middle - 0.15 * (k + middle)
        dashes = "-" if p >= 0.5 else "--" if p >= 0.1 else ":"
        arrow = {"arrowstyle": "-|>", "color": "black", "lw": 0.7 + 4 * p, "ls": dashes}
        axes.text(0.4, -k, short(name, 18), ha="right", **boxed)
        axes.annotate("", (0.69, end), (0.42, -k), arrowprops=arrow)
        axes.text(0.49, -k + 0.25 * (end + k), share(p), **bare)
    axes.set(xlim=(0, 1), ylim=(-len(parents) + 0.4, 0.6), **BARE)


def strip(story: Story, i: int, axes: Axes) -> None:
    """How one column's values are spread: a histogram where it was not set, ticks where it was."""
    values, acted = np.asarray(story.data.buffer.values[:, i]), story.flags[:, i]
    edges = np.linspace(values.min(), values.max(), 16)
    axes.hist(values[~acted], edges, color="0.6")
    below = -0.3 * max(axes.dataLim.y1, 1.0)
    axes.plot(values[acted], np.full(acted.sum(), below), "|", color="black", ms=8)
    axes.set(**BARE)


def figures(story: Story) -> tuple[Panel, Panel, Panel, list[Panel]]:
    """The campaign, the key of the curves, the graph, and the curves of some variables."""
    parents = ", ".join(f"{name} {share(p)}" for name, p in story.answer["parents"].items())
    causes = f"Direct causes of {story.answer['target']}, with probabilities: {parents}"
    curves = [effect(story, name) for name in list(story.variables)[:MOST_SHOWN]]
    return campaign(story), effect_key(story), (causes, partial(graph, story)), curves


# --- page ---


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
