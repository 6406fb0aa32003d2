"""The columns of a person's table as numbers, and what was set by hand in each of its rows."""

import itertools
import re
import unicodedata
from pathlib import Path

import numpy as np

from lib.cleaning import Column
from lib.table import INTERVENED, Table, decimal_comma, find, number_of, rows_in_words, told


MOST_LEVELS = 8  # different words of a column that are levels, not names
EMPTY = {"", "na", "n/a", "#n/a", "nan", "null"}  # cells of a column of words that are no level
MISSING = EMPTY | {"-", "--", ".", "?", "none", "nil", "missing", "failed", "fail"}
NOT_SET = EMPTY | {"0", "-", "no", "none", "false", "n"}
NOT_SET |= {"control", "ctrl", "baseline", "observed", "observation"}
THOUSAND = {"k": 1e3, "M": 1e6}  # behind numbers of which some have the k
SET = {"1", "yes", "true", "y", "x"}
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
    whole = bool((values == np.round(values)).all())
    steps, sorted_steps = np.diff(values), np.diff(np.sort(values))
    even = whole and np.ptp(steps) == 0
    monotone = (steps > 0).all() or (steps < 0).all()
    named = bool(COUNTER.fullmatch(name.strip())) and (whole or monotone)
    named |= bool(CLOCK.fullmatch(name.strip())) and bool((steps >= 0).all())
    return bool(even or named or (whole and (sorted_steps == 1).all()))


def unit_key(unit: str) -> str:
    """A unit however it is spelled: `mL` and `ml`, `h` and `hrs`, both signs of micro."""
    return re.sub("r?s?$", "", unicodedata.normalize("NFKC", unit).casefold().removeprefix("°"))


def columns_of(table: Table, path: Path, target: str, notes: list[str], problems: list[str]):
    """The columns that hold numbers, and indicators of levels for those of few words."""
    columns = []
    for name, cells in zip(table.names, zip(*table.rows, strict=True), strict=True):
        comma = decimal_comma(cells, table.comma)
        parsed = zip(*(number_of(cell, comma) for cell in cells), strict=True)
        values, digits, units, limits = map(np.array, parsed)
        there = np.array([cell.lower() not in MISSING for cell in cells])
        words, known = list(itertools.compress(cells, there)), np.isfinite(values) & there
        below = np.array([bool(BELOW.fullmatch(cell)) for cell in cells]) & known.any()
        numeric = 2 * (known | below).sum() >= len(words)
        spelled = {unit_key(unit): unit for unit in units[known] if unit}
        if "k" in units[known] and set(units[known]) <= {"", *THOUSAND}:
            values, spelled = values * [THOUSAND.get(unit, 1.0) for unit in units], {}
        if len(spelled) > 1 and all(re.fullmatch("[a-g]{1,3}", unit) for unit in spelled.values()):
            spelled = {}  # letters of significance
        kinds = sorted(spelled.values())
        if not numeric:
            there = np.array([cell.lower() not in EMPTY for cell in cells])
            known_as = {}
            cells = [known_as.setdefault(cell.casefold(), cell) for cell in cells]
            words = list(itertools.compress(cells, there))
        levels = sorted(set(words))
        if name.lower() == INTERVENED or not words:
            notes += told((name.lower() != INTERVENED, f"'{name}': empty, left out"))
        elif numeric and len(kinds) > 1:
            several = f"numbers with several units ({', '.join(kinds)}): write them in one"
            problems += told((name == target, f"{path}, column '{name}': {several}"))
            notes.append(f"'{name}': {several}; left out")
        elif numeric:
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
                    (there & ~known & ~below, "is no number, read as missing"),
                    (code, "stands for no value, read as missing"),
                    (limits & known, "is a limit, read as its end"),
                    (below, "is below all numbers, read as the least of them"),
                    (
                        (units == "") & known & (len(kinds) > 0),
                        f"has no unit, read as {''.join(kinds)} like the others",
                    ),
                )
                if which.any()
            ]
            known &= ~code
            numbers, finest = np.where(known, values, np.nan), int(digits[known].max(initial=-99))
            numbers[below] = np.min(numbers, where=known, initial=np.inf) if known.any() else np.nan
            columns.append(Column(name, numbers, finest, next(iter(kinds), "")))
        elif name != target and 1 < len(levels) <= min(MOST_LEVELS, len(words) // 3):
            notes.append(f"'{name}': read as levels ({', '.join(levels)})")
            two = len(levels) == 2 and bool(there.all())  # where one word says both
            columns += [
                Column(
                    f"{name} = {level}",
                    np.array([float(cell == level) for cell in cells]),
                    0,
                    source=name,
                    words=(levels[0] if two else "", level),
                )
                for level in levels[two:]
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
    settable = np.array(
        [c.name != target and (not ranges or (c.source or c.name) in ranges) for c in columns]
    )
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
