"""The figures of a report, and what they are about. They are drawn for a telephone, 356 points wide
with letters of 11, and are never told apart by colour alone; no name is read as a formula.
"""

import io
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.answer import text
from lib.reading import Experience


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
Panel = tuple[str, Callable[[Axes], Any]]  # a figure in words, and what draws it
Layer = tuple[str, Any, Any, Any]  # how it looks, x, y and errors of y; of a band, both ends


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
    data, variables, rows, flags = story.data, story.variables, story.rows, story.flags
    curves, outcomes = variables[name], rows[:, data.target]
    spots = [(i, v) for i in curves if i in data.words for v in data.bounds[i].values]
    place: dict[Any, int] = {data.setting(i, v)[name]: k for k, (i, v) in enumerate(spots)}
    some = [one for group in list(variables.values())[:MOST_SHOWN] for one in group.values()]
    reach = [y for one in some for y in (*one["low"], *one["high"])]
    reach += outcomes[flags.any(1)].tolist()
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
        ("several were set" if flags[r].sum() > 1 else "experiment", outcomes[r], value)
        for i in curves
        for r in np.flatnonzero(flags[:, i])
        if (value := data.setting(i, rows[r, i].item())[name]) in place or not place
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
