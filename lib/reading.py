"""A person's file: its numbers as people write them, what was set by hand, and what was left out or
assumed, as notes. What cannot be used at all is told in one go, a line each.
"""

import math
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
    Bound,
    DataError,
    Table,
    bounds_by_name,
    find,
    number_of,
    read_table,
    rows_in_words,
)
from lib.units import FARTHEST_VALUE, Units


Scale = Literal["auto", "linear", "log"]
INTERVENED = "intervened"
MOST_LEVELS = 8  # different words of a column that are levels, not names
ONE_VALUE = 0.25  # deviations around a value that is the only one possible
MISSING = {
    "",
    "-",
    "--",
    ".",
    "?",
    *["na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "failed", "fail"],
}
NOT_SET = {"", "0", "-", *["no", "none", "false", "n", "na", "n/a", "nan"]}
SET = {"1", *["yes", "true", "y", "x"]}
SENTINEL = re.compile(r"-?9{2,}(\.0*)?|-?9{2,}\.9+")


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
    if wanted is None:
        raise DataError(
            f"{path}: no column '{target}' to use as target; the variables are {', '.join(names)}"
        )
    if not table.rows:
        raise DataError(f"{path}: no rows below the header: add observations")
    ranges = bounds_by_name(bounds, names, problems)
    columns = columns_of(table, path, wanted, notes, problems)
    flags, unusable = settings_of(table, path, columns, ranges, wanted, notes, problems)
    if wanted not in [c.name for c in columns]:
        problems.append(f"{path}, column '{wanted}': holds no numbers: give the outcomes")
    if problems:
        raise DataError("\n".join(problems))
    rows = Rows(columns, np.stack([c.values for c in columns], 1), flags, np.array(table.lines))
    rows, pending = with_outcome(rows, unusable, wanted, notes)
    rows = without_gaps(without_strays(rows, wanted, notes), wanted, ranges, notes)
    if len(rows.lines) < MIN_OBSERVATIONS:
        raise DataError(
            f"{path}: {len(rows.lines)} rows can be used, at least {MIN_OBSERVATIONS} are needed: "
            + ("; ".join(notes) or "add observations")
        )
    rows = as_design(varied(rows, wanted, ranges, notes), notes)
    found, values = tuple(c.name for c in rows.columns), rows.values
    if wanted not in found or len(found) < 2:
        raise DataError(f"{path}: '{wanted}' and another column must vary: {'; '.join(notes)}")
    at = found.index(wanted)
    logs = in_logarithms(rows, ranges, wanted, scale, notes)
    units = Units.of(values, rows.observed, tuple(c.digits for c in rows.columns), logs)
    if (far := units.far(values)).any():
        raise DataError(
            "\n".join(
                f"{path}, row {rows.lines[r]}, column '{found[i]}': {values[r, i]:.15g} is more "
                f"than {FARTHEST_VALUE:,.0f} deviations from the others: correct a typing error, "
                "or write it in the unit of the others"
                for r, i in np.argwhere(far)
            )
        )
    settable = np.array([not c.level and c.name != wanted for c in rows.columns])
    counts = np.array([len(set(np.sign(np.diff(x)))) == 1 for x in values.T])
    for i in np.flatnonzero(counts & settable & ~rows.flags.any(0)):
        if found[i] not in ranges:
            notes.append(f"'{found[i]}': counts along the rows, so it is no setting")
            settable[i] = False
    notes += order_of_rows(rows, at) + sums_of_settings(rows, settable)
    planned = [
        (i, units.one(i).deviations(np.array([value])).item())
        for i, value in ((found.index(name), value) for name, value in pending if name in found)
    ]
    deviations, valid = units.deviations(values), jnp.ones(len(values), bool)
    bounded = {i: ranges[name] for i, name in enumerate(found) if name in ranges}
    low, high, task = ranges_of(deviations, rows, units, settable, bounded, at, path)
    return Experience(
        names=found,
        target=at,
        buffer=ExperienceBuffer(jnp.asarray(deviations), jnp.asarray(rows.flags), valid),
        task=task,
        units=units,
        low=low,
        high=high,
        bounds=bounded,
        ends=ends_of(values[:, at], wanted, table.units.get(wanted, "")),
        planned=planned,
        lines=rows.lines,
        notes=notes,
    )


def columns_of(table: Table, path: Path, target: str, notes: list[str], problems: list[str]):
    """The columns that hold numbers, and indicators of levels for those of few words."""
    columns = []
    for i, name in enumerate(table.names):
        cells = table.cells(i)
        parsed = [number_of(cell, table.comma) for cell in cells]
        values, digits, units, limits = (np.array(x) for x in zip(*parsed, strict=True))
        there = np.array([cell.lower() not in MISSING for cell in cells])
        words = [cell for cell, is_there in zip(cells, there, strict=True) if is_there]
        known = np.isfinite(values) & there
        if not words or name.lower() == INTERVENED:
            if name and name.lower() != INTERVENED:
                notes.append(f"'{name}': empty, left out")
            continue
        name = name or f"column {i + 1}"
        if 2 * known.sum() >= len(words):
            different = set(units[known]) - {""}
            table.units[name] = next(iter(different), "")
            if len(different) > 1:
                problems.append(
                    f"{path}, column '{name}': numbers with several units "
                    f"({', '.join(sorted(different))}): write them in one"
                )
            code = np.array([bool(SENTINEL.fullmatch(cell)) for cell in cells]) & known
            rest = values[known & ~code]
            if len(rest):
                code &= np.abs(values - np.median(rest)) > 2 * max(np.ptp(rest), 1e-300)
            for which, meaning in (
                (there & ~known, "is no number, read as missing"),
                (code, "stands for no value, read as missing"),
                (limits & known, "is a limit, read as its end"),
            ):
                if which.any():
                    lines = rows_in_words([table.lines[r] for r in np.flatnonzero(which)])
                    notes.append(f"'{name}': {lines}: '{cells[int(which.argmax())]}' {meaning}")
            known &= ~code
            numbers = np.where(known, values, np.nan)
            columns.append(Column(name, numbers, int(digits[known].max(initial=-99)), name))
            continue
        levels = sorted(set(words))
        if name == target or not 1 < len(levels) <= min(MOST_LEVELS, len(words) // 3):
            notes.append(f"'{name}': text that is no number and no level, left out")
            continue
        notes.append(f"'{name}': read as levels ({', '.join(levels)}), which are not set here")
        for level in levels[len(levels) == 2 :]:  # of two, one says both
            held = np.where(there, [float(cell == level) for cell in cells], np.nan)
            columns.append(Column(f"{name} = {level}", held, 0, name, level))
    return columns


def settings_of(table, path, columns, ranges, target, notes, problems):
    """What was set by hand `[rows, columns]`, and which rows cannot be used because it is not known
    to what, or which of the columns it was.
    """
    names = list(dict.fromkeys(column.source for column in columns))
    flags = np.zeros((len(table.rows), len(columns)), bool)
    unusable = np.zeros(len(table.rows), bool)
    place = next((i for i, name in enumerate(table.names) if name.lower() == INTERVENED), None)
    if place is None:
        notes.append(f"no column '{INTERVENED}': every row is read as an observation")
        return flags, unusable
    cells = table.cells(place)
    marks = {cell.lower() for cell in cells} <= NOT_SET | SET
    settable = [i for i, c in enumerate(columns) if c.name != target]
    settable = [i for i in settable if not ranges or columns[i].name in ranges]
    usual = np.array([cell.lower() in NOT_SET for cell in cells])
    if marks and usual.any() and not usual.all() and settable:
        moved = knobs(np.stack([columns[i].values for i in settable], 1), usual)
        flags[np.arange(len(cells)), np.array(settable)[moved]] = ~usual & (moved >= 0)
        notes.append(f"'{INTERVENED}' marks rows: the variable furthest from its usual is the one")
    for r, cell in enumerate(cells):
        if usual[r] or marks:
            unusable[r] = not usual[r] and not flags[r].any()
            continue
        if cell == "*":
            flags[r, settable] = True
            continue
        given = cell.split(";")
        if len(given) == 1 and not find(cell, names):
            given = re.split(r"[+|,]", cell)
        for name in filter(None, (part.strip() for part in given)):
            acted = find(name.removesuffix("?").strip(), names)
            if acted is None:
                problems.append(
                    f"{path}, row {table.lines[r]}, column '{INTERVENED}': '{name}' is not a "
                    f"column; the variables are {', '.join(names)}"
                )
            unusable[r] |= name.endswith("?") and name != acted
            flags[r] |= [c.source == acted and (not c.level or c.values[r] == 1) for c in columns]
    if unusable.any():
        lines = [table.lines[r] for r in np.flatnonzero(unusable)]
        notes.append(f"{rows_in_words(lines)}: what was set, or to what, is not told: left out")
    return flags, unusable


def knobs(values: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Which column of `values[rows, columns]` left its usual value in each row, -1 where none
    stands out.
    """
    middle, spread = np.nanmedian(values[usual], 0), np.nanstd(values[usual], 0)
    away = np.abs(values - middle) / np.maximum(spread, 1e-9 * (1 + np.abs(middle)))
    ranked = np.sort(np.pad(np.nan_to_num(away), ((0, 0), (1, 0))), axis=1)
    clear = (ranked[:, -1] > 1.5) & (ranked[:, -1] > 1.3 * ranked[:, -2])
    return np.where(clear, np.nan_to_num(away).argmax(1), -1)


def ranges_of(deviations, rows, units, settable, bounds, target, path):
    """Lows and highs `[vars]` in the columns' own units, and the task in deviations: the ranges
    that bounds list, or else what a variable was set to, or else what was seen of it. A single
    possible value is looked at with a little around it.
    """
    names = [c.name for c in rows.columns]
    tried = rows.flags | np.logical_not(rows.flags.any(axis=0, keepdims=True))
    first = np.where(tried, deviations, np.inf).min(0)
    last = np.where(tried, deviations, -np.inf).max(0)
    low, high = (
        np.array([units.written(i, x) for i, x in enumerate(ends)]) for ends in (first, last)
    )
    for i, bound in bounds.items():
        low[i], high[i] = bound.low, bound.high
        ends = np.array([[bound.low], [bound.high]])
        if units.one(i).far(ends).any():
            raise DataError(
                f"{bound.where}: the range of '{names[i]}' ends more than {FARTHEST_VALUE:,.0f} "
                "deviations from what was observed: check its unit"
            )
        first[i], last[i] = units.one(i).deviations(ends)[:, 0]
    which = np.isin(np.arange(len(names)), list(bounds)) if bounds else settable
    which &= np.arange(len(names)) != target
    if not which.any():
        raise DataError(
            f"{path}: no variable may be intervened on: give one besides '{names[target]}' a range"
        )
    around = np.where(low == high, ONE_VALUE, 0.0)
    first, last = (
        jnp.asarray(np.where(which, x, 0.0), jnp.float32) for x in (first - around, last + around)
    )
    return low, high, Task(jnp.array(target), first, last, jnp.ones(len(names), bool))


def in_logarithms(rows, ranges, target, scale, notes) -> np.ndarray:
    """Which columns are worked in logarithms `[vars]`: those that are told to, and those that are
    positive, span a hundred times (their range, or all but the ends of what was seen), and of whose
    values half lie in the lowest tenth of that.
    """
    logs = np.zeros(len(rows.columns), bool)
    for i, column in enumerate(rows.columns):
        seen, bound = rows.values[:, i], ranges.get(column.name)
        said = scale if column.name == target else bound.scale if bound else ""
        least, (low, high) = seen.min(), np.quantile(seen, [0.02, 0.98])
        if bound:
            low, high, least = bound.low, bound.high, min(least, bound.low)
        if said == "log" and least <= 0:
            raise DataError(f"'{column.name}': has values of 0 or below, no scale of logarithms")
        skewed = np.median(seen) < low + 0.1 * (high - low)
        decades = least > 0 and high >= 100 * low and skewed and not column.level
        if said == "log" or (said in ("auto", "") and decades):
            logs[i] = True
            notes.append(f"'{column.name}': worked in logarithms ({low:g} to {high:g})")
    return logs


def ends_of(outcomes: np.ndarray, name: str, unit: str) -> tuple[float, float]:
    """What the target cannot leave: 0 and 100 of a percentage, 0 of a count or where zeros are."""
    least, most = outcomes.min(), outcomes.max()
    percentage = unit == "%" or re.search(r"%|pct|percent", name, re.IGNORECASE)
    if least >= 0 and most <= 100 and percentage:
        return 0.0, 100.0
    counted = least == 0 or (least > 0 and (outcomes == np.round(outcomes)).all())
    return (0.0 if counted else -math.inf), math.inf
