"""A person's file: its numbers as people write them, what was set by hand, and what was left out or
assumed, as notes. What cannot be used at all is told in one go, a line each.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.cleaning import (
    Column,
    Rows,
    as_design,
    order_of_rows,
    sums_of_settings,
    varied,
    with_outcome,
    without_gaps,
    without_strays,
)
from lib.scm import Task
from lib.table import (
    INTERVENED,
    Bound,
    Table,
    bounds_by_name,
    decimal_comma,
    demand,
    find,
    number_of,
    read_table,
    refuse,
    rows_in_words,
    told,
)
from lib.units import FARTHEST_VALUE, Units, ends_of, in_logarithms


Scale = Literal["auto", "linear", "log"]
MOST_LEVELS = 8  # different words of a column that are levels, not names
ONE_VALUE = 0.25  # deviations around a value that is the only one possible
EMPTY = {"", "na", "n/a", "#n/a", "nan", "null"}  # cells of a column of words that are no level
MISSING = EMPTY | {"-", "--", ".", "?", "none", "nil", "missing", "failed", "fail"}
NOT_SET = {"", "0", "-", "no", "none", "false", "n", "na", "n/a", "nan"}
SET = {"1", "yes", "true", "y", "x"}
SENTINEL = re.compile(r"-9{2,}(\.[09]*)?|9{3,}(\.0*)?")
COUNTER = re.compile(
    r"unnamed.*|#|id|no\.?|nr\.?|idx|index|run.?(no|number|order)?|std.?order|order|time|date|day"
    r"|timestamp|unix.*|clock|seq(uence)?|trial|sample|batch|lot|block",
    re.IGNORECASE,
)


class Experience(NamedTuple):
    """A file: names, the target's index, rows in deviations and what can be set in them, units,
    lows and highs of the ranges `[vars]` in the columns' own, the bounds of those that have some,
    the ends of what the target can be, the settings that are still to be run (column and
    deviation), each row's line, and all that was left out or assumed, a sentence each.
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
    notes: list[str]


def read_experiments(
    path: Path, target: str, bounds: Sequence[Bound] = (), scale: Scale = "auto"
) -> Experience:
    """Read experiments: a column per variable, a row per experiment; a column `intervened` names
    what was set by hand (`a;b` where several were, `*` for all, `a?` where it is not known to what,
    0 and 1 where it can be told; empty: observed).

    Left out, with a note: rows without an outcome, observations far outside the rest or with cells
    missing, columns that are text, constant, mostly missing or the same as another. What counts
    along the rows is no setting. Where fewer than ten rows are observations, or a column stands
    still unless it is set, experiments are read as observations: a design has no confounding. A
    setting whose range is positive and spans a hundred times, and a positive outcome that does, is
    worked in logarithms, unless its `scale` says otherwise. Raises `DataError`, a line for each of
    all that cannot be used.
    """
    table = read_table(path)
    notes, problems = table.notes, []
    names = [name for name in table.names if name.lower() != INTERVENED]
    wanted = find(target, names)
    demand(
        wanted,
        f"{path}: no column '{target}' to use as target; the variables are {', '.join(names)}",
    )
    demand(table.rows, f"{path}: no rows below the header: add observations")
    ranges = bounds_by_name(bounds, names, problems)
    columns = columns_of(table, path, wanted, notes, problems)
    flags, unusable = settings_of(table, path, columns, ranges, wanted, notes, problems)
    problems += told(
        (
            wanted not in [c.name for c in columns],
            f"{path}, column '{wanted}': holds no numbers: give the outcomes",
        )
    )
    refuse(problems)
    rows = Rows(columns, np.stack([c.values for c in columns], 1), flags, table.lines)
    lacking = (rows.flags & np.isnan(rows.values)).any(1)
    notes += told(
        (
            lacking.any(),
            f"{rows_in_words(table.lines[lacking])}: the value that was set is missing: left out",
        )
    )
    rows, pending = with_outcome(rows, unusable | lacking, wanted, notes)
    rows = without_gaps(without_strays(rows, wanted, notes), wanted, ranges, notes)
    demand(
        len(rows.lines) >= MIN_OBSERVATIONS,
        f"{path}: {len(rows.lines)} rows can be used, at least {MIN_OBSERVATIONS} are needed: "
        + ("; ".join(notes) or "add observations"),
    )
    rows = as_design(varied(rows, wanted, ranges, notes), notes)
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
    free = np.array([not c.source and c.name != wanted for c in rows.columns])
    counts = free & ~rows.flags.any(0) & [name not in ranges for name in found]
    counts &= [is_counter(name, x) for name, x in zip(found, values.T, strict=True)]
    notes += [
        f"'{found[i]}': counts or names the rows, so it is no setting"
        for i in np.flatnonzero(counts)
    ]
    notes += order_of_rows(rows, at) + sums_of_settings(rows, free & ~counts)
    planned = [
        (found.index(name), units.one(found.index(name)).deviations(value).item())
        for name, value in pending
        if name in found
    ]
    bounded = {i: ranges[name] for i, name in enumerate(found) if name in ranges}
    notes += [f"'{name}' has a range, but is left out" for name in ranges if name not in found]
    free = np.array([i in bounded for i in range(len(found))]) & free if ranges else free & ~counts
    low, high, task = ranges_of(rows, units, free, bounded, at, path)
    return Experience(
        names=found,
        target=at,
        buffer=ExperienceBuffer(
            jnp.asarray(units.deviations(values)),
            jnp.asarray(rows.flags),
            jnp.ones(len(values), bool),
        ),
        task=task,
        units=units,
        low=low,
        high=high,
        bounds=bounded,
        ends=ends_of(values[:, at], rows.columns[at]),
        planned=planned,
        lines=rows.lines,
        notes=notes,
    )


def is_counter(name: str, values: np.ndarray) -> bool:
    """Whether a column numbers the rows, in order or not, or is called as if it did."""
    whole = bool((values == np.round(values)).all())
    steps, sorted_steps = np.diff(values), np.diff(np.sort(values))
    even = whole and np.ptp(steps) == 0
    monotone = (steps > 0).all() or (steps < 0).all()
    named = bool(COUNTER.fullmatch(name.strip())) and (whole or monotone)
    return bool(even or named or (whole and (sorted_steps == 1).all()))


def columns_of(table: Table, path: Path, target: str, notes: list[str], problems: list[str]):
    """The columns that hold numbers, and indicators of levels for those of few words."""
    columns = []
    for name, cells in zip(table.names, zip(*table.rows, strict=True), strict=True):
        comma = decimal_comma(cells, table.comma)
        parsed = zip(*(number_of(cell, comma) for cell in cells), strict=True)
        values, digits, units, limits = map(np.array, parsed)
        there = np.array([cell.lower() not in MISSING for cell in cells])
        words, known = list(itertools.compress(cells, there)), np.isfinite(values) & there
        numeric, kinds = 2 * known.sum() >= len(words), sorted(set(units[known]) - {""})
        if not numeric:
            there = np.array([cell.lower() not in EMPTY for cell in cells])
            words = list(itertools.compress(cells, there))
        levels = sorted(set(words))
        if name.lower() == INTERVENED or not words:
            notes += told((name.lower() != INTERVENED, f"'{name}': empty, left out"))
        elif numeric:
            problems += told(
                (
                    len(kinds) > 1,
                    f"{path}, column '{name}': numbers with several units ({', '.join(kinds)}): "
                    "write them in one",
                )
            )
            code = np.array([bool(SENTINEL.fullmatch(cell)) for cell in cells]) & known
            rest = values[known & ~code]
            code &= (values < 0) | (sum(code) > 1)  # a single 999 may be a value
            if len(rest):
                far = np.abs(values - np.median(rest)) > 2 * max(np.ptp(rest), 1e-300)
                code &= far | ((values < 0) & (rest >= 0).all())
            notes += [
                f"'{name}': {rows_in_words(table.lines[which])}: "
                f"'{cells[int(which.argmax())]}' {meaning}"
                for which, meaning in (
                    (there & ~known, "is no number, read as missing"),
                    (code, "stands for no value, read as missing"),
                    (limits & known, "is a limit, read as its end"),
                )
                if which.any()
            ]
            known &= ~code
            numbers, finest = np.where(known, values, np.nan), int(digits[known].max(initial=-99))
            columns.append(Column(name, numbers, finest, next(iter(kinds), "")))
        elif name != target and 1 < len(levels) <= min(MOST_LEVELS, len(words) // 3):
            notes.append(f"'{name}': read as levels ({', '.join(levels)}), which are not set here")
            columns += [
                Column(
                    f"{name} = {level}",
                    np.where(there, [cell == level for cell in cells], np.nan),
                    0,
                    source=name,
                )
                for level in levels[len(levels) == 2 :]  # of two, one says both
            ]
        else:
            notes.append(f"'{name}': text that is no number and no level, left out")
    return columns


def settings_of(table, path, columns, ranges, target, notes, problems):
    """What was set by hand `[rows, columns]`, and which rows cannot be used because it is not known
    to what, or which of the columns it was.
    """
    names = list(dict.fromkeys(c.source or c.name for c in columns))
    place = [i for i, name in enumerate(table.names) if name.lower() == INTERVENED]
    notes += told((not place, f"no column '{INTERVENED}': every row is read as an observation"))
    cells = [row[place[0]] if place else "" for row in table.rows]
    named = np.array([bool(find(cell, names)) for cell in cells])
    usual = np.array([cell.lower() in NOT_SET for cell in cells]) & ~named
    marks = bool({cell.lower() for cell in cells} <= NOT_SET | SET) and not named.any()
    stars = np.array([cell == "*" for cell in cells]) | (marks and not usual.any())
    settable = np.array([c.name != target and (not ranges or c.name in ranges) for c in columns])
    # a column without a usual value cannot have left it
    settable &= [not usual.any() or np.isfinite(c.values[usual]).any() for c in columns]
    flags = np.outer(stars, settable)
    if marks and usual.any() and not usual.all() and settable.any():
        settings = np.stack([c.values for c in itertools.compress(columns, settable)], axis=1)
        flags[:, settable] = knobs(settings, usual) & ~usual[:, None]
        notes.append(f"'{INTERVENED}' marks rows: the variable furthest from its usual is the one")
    unusable = ~usual & ~flags.any(1) & marks
    alone = [sum(c.source == other.source for other in columns) == 1 for c in columns]
    for r in np.flatnonzero(~usual & ~stars & (not marks)):
        several = ";" in cells[r] or find(cells[r].removesuffix("?"), names)
        parts = re.split(";" if several else r"[+|,]", cells[r])
        for name in filter(None, map(str.strip, parts)):
            acted = find(name.removesuffix("?").strip(), names)
            where = f"{path}, row {table.lines[r]}, column '{INTERVENED}': '{name}' is"
            problems += told(
                (not acted, f"{where} not a column; the variables are {', '.join(names)}"),
                (acted == target, f"{where} the target, which cannot be set: correct the row"),
            )
            unusable[r] |= name.endswith("?") and name != acted
            flags[r] |= [
                acted == c.name or (acted == c.source and (c.values[r] == 1 or one))
                for c, one in zip(columns, alone, strict=True)
            ]
    notes += told(
        (
            unusable.any(),
            f"{rows_in_words(table.lines[unusable])}: what was set, or to what, is not told: left "
            "out",
        )
    )
    return flags, unusable


def knobs(values: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Where in `values[rows, columns]` a column left its usual value: one in a row, or none where
    none stands out.
    """
    middle = np.nanmedian(values[usual], 0)
    spread = np.maximum(np.nanstd(values[usual], 0), 1e-9 * (1 + np.abs(middle)))
    away = np.nan_to_num(np.abs(values - middle) / spread)
    ranked = np.sort(np.pad(away, ((0, 0), (1, 0))), axis=1)
    return (away == ranked[:, -1:]) & (away > np.maximum(1.5, 1.3 * ranked[:, -2:-1]))


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
    first, last = jnp.asarray(ends, jnp.float32)
    return Task(jnp.array(target), first, last, jnp.ones(len(low), bool))
