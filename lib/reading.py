"""A person's file: its numbers as people write them, what was set by hand, and what was left out or
assumed, as notes. What cannot be used at all is told in one go, a line each.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.cleaning import (
    Column,
    Rows,
    as_design,
    drift_of,
    lots_of,
    order_of_rows,
    repeats_of,
    sums_of_settings,
    together,
    varied,
    with_outcome,
    without_gaps,
    without_strays,
)
from lib.columns import columns_of, is_counter, settings_of
from lib.scm import Task
from lib.table import Bound, demand, find, read_table, refuse, told
from lib.units import FARTHEST_VALUE, Units, ends_of, in_logarithms, rounded


Scale = Literal["auto", "linear", "log"]
ONE_VALUE = 0.25  # deviations around a value that is the only one possible


class Experience(NamedTuple):
    """A file: names, the target's index, rows in deviations and what can be set in them, units,
    lows and highs of the ranges `[vars]` in the columns' own, the bounds of those that have some,
    the ends of what the target can be, the settings that are still to be run (column and
    deviation), each row's line, columns of words that can be set (name, and words for 0 and 1),
    columns that look like lots (each row's), all that was left out or assumed, a sentence each, and
    the file's name and the SHA-256 of its bytes.
    """

    names: tuple[str, ...]
    target: int
    buffer: ExperienceBuffer
    task: Task
    units: Units
    low: np.ndarray
    high: np.ndarray
    bounds: dict[int, Bound]
    ends: tuple[float, float]
    planned: list[tuple[int, float]]
    lines: np.ndarray
    words: dict[int, tuple[str, tuple[str, str]]]
    lots: list[tuple[str, np.ndarray]]
    notes: list[str]
    where: str
    sha256: str
    blocked: str = ""  # why nothing can be set, if so

    def value(self, variable: int, deviation: ArrayLike) -> float:
        """The value of a variable nearest to a deviation that can be set: one of those that are
        possible, or inside its range with its column's digits, or more where the range has none
        with so few.
        """
        low, high, bound = self.low[variable], self.high[variable], self.bounds.get(variable)
        raw = self.units.one(variable).raw(deviation).clip(low, high).item()
        if bound and bound.values:
            return min(bound.values, key=lambda x: abs(x - raw))
        return next(x for x in rounded(raw, self.units.shown[variable]) if low <= x <= high)

    def setting(self, variable: int, value: float) -> dict[str, float | str]:
        """What is set to what: of a column of words, one of them."""
        name, words = self.words.get(variable, (self.names[variable], ()))
        return {name: words[round(value)] if words else value}


def read_experiments(
    source: Any, target: str, bounds: Sequence[Bound] = (), scale: Scale = "auto"
) -> Experience:
    """Read experiments from a file, or columns in memory (`lib.table.read_table`): a column per
    variable, a row per experiment; a column `intervened` names what was set by hand (`a;b` where
    several were, `*` for all, `a?` where it is not known to what, 0 and 1 where it can be told;
    empty: observed).

    Left out, with a note: rows without an outcome, observations far outside the rest or with cells
    missing, columns that are text, constant, mostly missing or the same as another. What counts
    along the rows is no setting, a drift along them is taken out. Where fewer than ten rows are
    observations, or a column stands still unless it is set, experiments are read as observations: a
    design has no confounding. A setting whose range is positive and spans a hundred times, and a
    positive outcome that does, is worked in logarithms, unless its `scale` says otherwise. Raises
    `DataError`, a line for each of all that cannot be used.
    """
    table = read_table(source)
    path, notes, wanted = table.where, table.notes, find(target, table.names)
    demand(
        wanted,
        f"{path}: no column '{target}' to use as target; the variables are "
        f"{', '.join(table.names)}",
    )
    demand(table.rows, f"{path}: no rows below the header: add observations")
    problems, columns = [], columns_of(table, wanted, notes)
    ranges = bounds_by_name(bounds, table.names, columns, problems)
    flags, unusable = settings_of(table, columns, ranges, wanted, notes, problems)
    refuse(problems)
    rows = Rows(columns, np.stack([c.values for c in columns], 1), flags, table.lines)
    rows, pending = with_outcome(rows, unusable, wanted, notes)
    rows = without_strays(rows, wanted, notes)
    demand(
        len(rows.lines) >= MIN_OBSERVATIONS,
        f"{path}: {len(rows.lines)} rows can be used, at least {MIN_OBSERVATIONS} are needed: "
        + ("; ".join(notes) or "add observations"),
    )
    rows = varied(without_gaps(rows, wanted, ranges, notes), wanted, ranges, notes)
    acted = {c.source for c in itertools.compress(rows.columns, np.any(rows.flags, axis=0))} - {""}
    rows = as_design(rows, notes)
    found, values = tuple(c.name for c in rows.columns), rows.values
    demand(
        wanted in found and len(found) > 1,
        f"{path}: '{wanted}' and another column must vary: {'; '.join(notes)}",
    )
    at = found.index(wanted)
    logs = in_logarithms(rows, ranges, wanted, scale, notes)
    units = Units.of(values, rows.observed, np.array([c.digits for c in rows.columns]), logs)
    refuse(
        [
            f"{path}, row {rows.lines[r]}, column '{found[i]}': {values[r, i]:.15g} is more than "
            f"{FARTHEST_VALUE:,.0f} deviations from the others: correct a typing error, or write "
            "it in the unit of the others"
            for r, i in np.argwhere(units.far(values))
        ]
    )
    number, others = np.array([not c.source for c in rows.columns]), np.arange(len(found)) != at
    bounded, free, counts = choice_of(rows, at, ranges, acted)
    notes += [
        f"'{found[i]}': counts or names the rows, so it is no setting"
        for i in np.flatnonzero(counts)
    ]
    notes += order_of_rows(rows, at) + sums_of_settings(rows, number & others & ~counts)
    deviations = units.exact(values)
    deviations[:, at] += drift_of(rows, at, deviations[:, at], notes)
    still = {c.source for c in rows.columns} - acted - {rows.columns[i].source for i in bounded}
    repeated = counts & [len(np.unique(x)) < len(x) for x in values.T]
    ends = ends_of(values[:, at], rows.columns[at])
    notes += [
        *(
            f"'{name}': nobody set it and it has no range, so it is no setting"
            for name in sorted(still - {""})
        ),
        *(f"'{name}' has a range, but is left out" for name in ranges if name not in found),
        *repeats_of(rows, at, ~number | free | repeated),
        *together(rows, free & number),
        *told((min(ends) == 0, f"'{wanted}': no prediction is outside {ends[0]:g} to {ends[1]:g}")),
    ]
    low, high, task = ranges_of(rows, units, free, bounded, at, path)
    return Experience(
        names=found,
        target=at,
        buffer=ExperienceBuffer(
            jnp.asarray(deviations.astype(np.float32)),
            jnp.asarray(rows.flags),
            jnp.asarray(np.ones(len(values), bool)),
        ),
        task=task,
        units=units,
        low=low,
        high=high,
        bounds=bounded,
        ends=ends,
        planned=[
            (found.index(name), units.one(found.index(name)).deviations(value).item())
            for name, value in pending
            if name in found
        ],
        lines=rows.lines,
        words={i: (c.source, c.words) for i, c in enumerate(rows.columns) if c.source},
        lots=lots_of(rows, at, free),
        notes=notes,
        where=table.where,
        sha256=table.sha256,
    )


def bounds_by_name(
    bounds: Sequence[Bound], names: list[str], columns: list[Column], problems: list[str]
) -> dict[str, Bound]:
    """The bounds of every column that has some, those of words by their levels; a problem for each
    that fits no column, and for a word that no cell has.
    """
    found = {}
    for bound in bounds:
        name, where = find(bound.name, names), f"{bound.where}, column"
        own = [c for c in columns if name and c.source == name]
        levels = sorted({word for c in own for word in c.words if word})
        words = {word: find(word, levels) for word in bound.words or ()}
        problems += told(
            (
                not name,
                f"{where} 'variable': '{bound.name}' is not in the data; the variables are "
                f"{', '.join(names)}",
            ),
            (
                name and found.keys() & {name, *(c.name for c in own)},
                f"{where} 'variable': '{bound.name}' has a range already: keep one of the two",
            ),
            (
                bound.words is not None and name in [c.name for c in columns],
                f"{where}s 'low' and 'high': give the range of '{name}'",
            ),
            *(
                (levels and not level, f"{where} 'levels': '{word}' is none of {', '.join(levels)}")
                for word, level in words.items()
            ),
        )
        listed = {*words.values()} - {""} or set(levels)
        found |= (
            {c.name: of_levels(c, listed, bound) for c in own if listed & set(c.words)}
            if own
            else {name: bound}
        )
    return found


def of_levels(column: Column, listed: set[str], bound: Bound) -> Bound:
    """The bound of a column of words: 1 for its level, or 0 and 1 where both are words."""
    values = [float(k) for k, word in enumerate(column.words) if word and word in listed]
    return bound._replace(low=values[0], high=values[-1], values=tuple(values), scale="")


def choice_of(rows: Rows, target: int, ranges: dict[str, Bound], acted: set[str]):
    """The bounds of the columns that have some, which can be set `[vars]`, and which are none of
    the settings because they count or name the rows. Where there are `ranges`, nothing else can be
    set; else all but the columns of words of which none was `acted` upon.
    """
    bounds = ranges or {
        c.name: of_levels(c, set(c.words), Bound(c.source))
        for c in rows.columns
        if c.source in acted
    }
    bounded = {i: bounds[c.name] for i, c in enumerate(rows.columns) if c.name in bounds}
    named = np.array([i in bounded for i in range(len(rows.columns))])
    others, numbers = (
        np.arange(len(named)) != target,
        np.array([not c.source for c in rows.columns]),
    )
    count = [is_counter(c.name, x) for c, x in zip(rows.columns, rows.values.T, strict=True)]
    counts = others & numbers & ~named & ~rows.flags.any(0) & count
    return bounded, others & (named | (numbers & ~counts & (not ranges))), counts


def ranges_of(rows: Rows, units: Units, settable, bounds: dict[int, Bound], target: int, path):
    """Lows and highs `[vars]` in the columns' own units, and the task in deviations: the ranges
    that bounds list, or else what a variable was set to, or else what was seen of it.
    """
    tried, name = rows.flags | ~rows.flags.any(0), rows.columns[target].name
    low = rows.values.min(0, where=tried, initial=np.inf)
    high = rows.values.max(0, where=tried, initial=-np.inf)
    for i, bound in bounds.items():
        low[i], high[i] = bound.low, bound.high
    refuse(
        [
            f"{bound.where}: the range of '{rows.columns[i].name}' ends more than "
            f"{FARTHEST_VALUE:,.0f} deviations from what was observed: check its unit"
            for i, bound in bounds.items()
            if units.far(np.array([low, high]))[:, i].any()
        ]
    )
    demand(
        settable.any(),
        f"{path}: no variable may be intervened on: give one besides '{name}' a range",
    )
    return low, high, task_of(units, low, high, settable, target)


def task_of(units: Units, low: np.ndarray, high: np.ndarray, which: np.ndarray, target) -> Task:
    """What an experimenter may do, in deviations: set the variables of `which[vars]` from `low` to
    `high`, in the columns' own units. A single possible value is looked at with a little around it.
    """
    around = np.where(low == high, ONE_VALUE, 0.0)
    ends = np.where(which, [units.exact(low) - around, units.exact(high) + around], 0.0)
    first, last, present = map(jnp.asarray, (*ends.astype(np.float32), np.ones(len(low), bool)))
    return Task(jnp.array(target), first, last, present)
