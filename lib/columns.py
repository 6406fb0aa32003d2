"""The columns of a person's table as numbers, and what was set by hand in each of its rows."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from lib.cleaning import Column
from lib.table import (
    EMPTY,
    INTERVENED,
    NOT_SET,
    SET,
    Bound,
    Table,
    decimal_comma,
    demand,
    find,
    number_of,
    rows_in_words,
    told,
)


MOST_LEVELS = 8  # different words of a column that are levels, not names
MISSING = EMPTY | {"-", "--", ".", "?", "none", "nil", "missing", "failed", "fail"}
THOUSAND = {"k": 1e3, "M": 1e6}  # behind numbers of which some have the k
SENTINEL = re.compile(r"-9{2,}(\.[09]*)?|9{3,}(\.0*)?")
BELOW = re.compile(
    r"<?\s*(L?LO[DQ]|M?DL|RL|BDL|BQL|BLL?O?Q)( \(.*\))?|below .*|not detected", re.IGNORECASE
)
COUNTER = re.compile(
    r"unnamed.*|#|id|no\.?|nr\.?|idx|index|run.?(no|number|order)?|std.?order|order|trial|sample"
    r"|batch|lot|block",
    re.IGNORECASE,
)
CLOCK = re.compile(r"time|date|day|timestamp|unix.*|clock|seq(uence)?", re.IGNORECASE)


def is_counter(name: str, values: np.ndarray) -> bool:
    """Whether a column numbers the rows, in order or not, or is called as if it did."""
    steps, whole = np.diff(values), bool((values == np.round(values)).all())
    numbered = whole and (np.ptp(steps) == 0 or bool((np.diff(np.sort(values)) == 1).all()))
    ordered = whole or (steps > 0).all() or (steps < 0).all()
    called_so = COUNTER.fullmatch(name.strip()) and ordered
    return bool(numbered or called_so or (CLOCK.fullmatch(name.strip()) and (steps >= 0).all()))


def unit_key(unit: str) -> str:
    """A unit however it is spelled: `mL` and `ml`, `h` and `hrs`, both signs of micro."""
    return re.sub("r?s?$", "", unicodedata.normalize("NFKC", unit).casefold().removeprefix("°"))


def columns_of(table: Table, target: str, notes: list[str]) -> list[Column]:
    """The columns that hold numbers, and indicators of levels for those of few words. Raises
    `DataError` where the target is none of them.
    """
    columns = []
    for name, cells in zip(table.names, zip(*table.rows, strict=True), strict=True):
        comma = decimal_comma(cells, table.comma)
        parsed = zip(*(number_of(cell, comma) for cell in cells), strict=True)
        values, digits, units, limits = map(np.array, parsed)
        known = np.isfinite(values)
        below = np.array([bool(BELOW.fullmatch(cell)) for cell in cells]) & known.any()
        words = np.array([cell.lower() not in MISSING for cell in cells]) & ~known & ~below
        values, kinds = in_one_unit(values, units)
        several = f"numbers with several units ({', '.join(kinds)}): write them in one"
        if not (known | words).any():
            notes.append(f"'{name}': empty, left out")
        elif words.sum() > (known | below).sum():
            columns += levels_of(name, cells, notes) if name != target else []
        elif len(kinds) > 1:
            demand(name != target, f"{table.where}, column '{name}': {several}")
            notes.append(f"'{name}': {several}; left out")
        else:
            code = codes_in(cells, values)
            notes += [
                f"'{name}': {rows_in_words(table.lines[which])}: "
                f"'{cells[int(which.argmax())]}' {meaning}"
                for which, meaning in (
                    (words, "is no number, read as missing"),
                    (code, "stands for no value, read as missing"),
                    (limits & known, "is a limit, read as its end"),
                    (below, "is below all numbers, read as the least of them"),
                    (
                        (units == "") & known & bool(kinds),
                        f"has no unit, read as {''.join(kinds)} like the others",
                    ),
                )
                if which.any()
            ]
            values[code] = np.nan
            values[below] = np.fmin.reduce(values)
            finest = int(digits[known & ~code].max(initial=-99))
            columns.append(Column(name, values, finest, "".join(kinds)))
    demand(
        target in [c.name for c in columns],
        f"{table.where}, column '{target}': holds no numbers: give the outcomes",
    )
    return columns


def in_one_unit(values: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Values, and the units behind them, each in one spelling. A `k` that others lack is of
    thousands, and letters are of significance: neither is a unit.
    """
    known = units[np.isfinite(values)]
    kinds = sorted({unit_key(unit): unit for unit in known if unit}.values())
    if "k" in known and set(known) <= {"", *THOUSAND}:
        return values * [THOUSAND.get(unit, 1.0) for unit in units], []
    letters = len(kinds) > 1 and all(re.fullmatch("[a-g]{1,3}", unit) for unit in kinds)
    return values, [] if letters else kinds


def codes_in(cells: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Which cells have a number such as -999 that stands for none, far from the others or alone
    below zero; a single 999 may be a value.
    """
    code = np.array([bool(SENTINEL.fullmatch(cell)) for cell in cells]) & np.isfinite(values)
    rest = values[np.isfinite(values) & ~code]
    middle, width = (np.median(rest), max(np.ptp(rest), 1e-300)) if len(rest) else (0.0, 0.0)
    far, negative = np.abs(values - middle) > 2 * width, values < 0
    return code & (negative | (code.sum() > 1)) & (far | (negative & (rest >= 0).all()))


def levels_of(name: str, cells: Sequence[str], notes: list[str]) -> list[Column]:
    """Indicators of the levels of a column of words, if these are few; of two, of the second."""
    spelled = {cell.casefold(): cell for cell in reversed(cells) if cell.lower() not in EMPTY}
    words, levels = [spelled.get(cell.casefold()) for cell in cells], sorted(spelled.values())
    few = 1 < len(levels) <= min(MOST_LEVELS, (len(words) - words.count(None)) // 3)
    listed = f"read as levels ({', '.join(levels)})"
    notes.append(f"'{name}': {listed if few else 'text that is no number and no level, left out'}")
    two = len(levels) == 2 and None not in words  # where one word says both
    return [
        Column(
            f"{name} = {level}",
            np.array([float(word == level) for word in words]),
            0,
            source=name,
            words=(levels[0] if two else "", level),
        )
        for level in (levels[two:] if few else ())
    ]


def settings_of(
    table: Table,
    columns: list[Column],
    ranges: dict[str, Bound],
    target: str,
    notes: list[str],
    problems: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """What was set by hand `[rows, columns]`, and which rows cannot be used because it is not known
    to what, or which of the columns it was.
    """
    names = list(dict.fromkeys(c.source or c.name for c in columns))
    values = np.stack([c.values for c in columns], axis=1)
    cells = table.acted or [""] * len(values)
    named = np.array([bool(find(cell, names)) for cell in cells])
    usual = np.array([cell.lower() in NOT_SET for cell in cells]) & ~named
    marks = {cell.lower() for cell in cells} <= NOT_SET | SET and not named.any()
    stars = np.array([cell == "*" for cell in cells]) | (marks and not usual.any())
    settable = np.array([c.name != target and (not ranges or c.name in ranges) for c in columns])
    # a column without a usual value cannot have left it
    settable &= np.isfinite(values[usual]).any(0) | (not usual.any())
    flags = np.outer(stars, settable)
    told_apart = marks and usual.any() and not usual.all() and settable.any()
    if told_apart:
        flags[:, settable] = knobs(values[:, settable], usual) & ~usual[:, None]
    unusable = ~usual & ~flags.any(1) & marks
    for r in np.flatnonzero(~usual & ~stars & (not marks)):
        several = ";" in cells[r] or find(cells[r].removesuffix("?"), names)
        parts = re.split(";" if several else r"[+|,]", cells[r])
        for name in filter(None, map(str.strip, parts)):
            acted = find(name.removesuffix("?").strip(), names)
            where = f"{table.where}, row {table.lines[r]}, column '{INTERVENED}': '{name}' is"
            out = f"'{find(name, table.names)}': "
            why = next((note for note in notes if note.startswith(out)), "")
            problems += told(
                (not acted and why, f"{where} not usable: {why}"),
                (
                    not acted and not why,
                    f"{where} not a column; the variables are {', '.join(names)}",
                ),
                (acted == target, f"{where} the target, which cannot be set: correct the row"),
            )
            unusable[r] |= name.endswith("?") and name != acted
            # of several levels, that of the row; of two, the one column for both
            flags[r] |= [
                acted == c.name or (acted == c.source and bool(c.values[r] == 1 or c.words[0]))
                for c in columns
            ]
    lacking = (flags & np.isnan(values)).any(1)
    notes += told(
        (not table.acted, f"no column '{INTERVENED}': every row is read as an observation"),
        (
            told_apart,
            f"'{INTERVENED}' marks rows: the variable furthest from its usual is the one",
        ),
        (
            unusable.any(),
            f"{rows_in_words(table.lines[unusable])}: what was set, or to what, is not told: left "
            "out",
        ),
        (
            lacking.any(),
            f"{rows_in_words(table.lines[lacking])}: the value that was set is missing: left out",
        ),
    )
    return flags, unusable | lacking


def knobs(values: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Where in `values[rows, columns]` a column left its usual value: one in a row, or none where
    none stands out.
    """
    middle = np.nanmedian(values[usual], 0)
    spread = np.maximum(np.nanstd(values[usual], 0), 1e-9 * (1 + np.abs(middle)))
    away = np.nan_to_num(np.abs(values - middle) / spread)
    ranked = np.sort(np.pad(away, ((0, 0), (1, 0))), axis=1)
    return (away == ranked[:, -1:]) & (away > np.maximum(1.5, 1.3 * ranked[:, -2:-1]))
