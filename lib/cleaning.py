"""What is left out of a person's rows and columns, or noticed about them, each with a note."""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from lib.buffer import MIN_OBSERVATIONS
from lib.table import Bound, rows_in_words
from lib.units import constant, deviation


MOST_MISSING = 0.25  # share of a column's cells; with more it is left out
SAME = 1e-5  # less than a correlation of one, for columns that say the same
POWERS = 10.0 ** np.array([-3, -2, -1, 1, 2, 3])  # a decimal point may slip by


class Column(NamedTuple):
    """A column as numbers `[rows]`, NaN where a cell has none; `digits` are its decimals, `level`
    is the word that it is one for, if its cells are words.
    """

    name: str
    values: np.ndarray
    digits: int
    source: str
    level: str = ""


class Rows(NamedTuple):
    """The numbers of a file: `values[rows, columns]`, what was set by hand, and line numbers."""

    columns: list[Column]
    values: np.ndarray
    flags: np.ndarray
    lines: np.ndarray

    def only(self, kept: np.ndarray) -> "Rows":
        """Some of the rows."""
        return Rows(self.columns, self.values[kept], self.flags[kept], self.lines[kept])

    def without(self, which: np.ndarray) -> "Rows":
        """Less some of the columns."""
        columns = [c for c, gone in zip(self.columns, which, strict=True) if not gone]
        return Rows(columns, self.values[:, ~which], self.flags[:, ~which], self.lines)

    @property
    def observed(self) -> np.ndarray:
        """Rows in which nothing was set."""
        return np.logical_not(self.flags.any(axis=1))

    def words(self, which: np.ndarray) -> str:
        """Some of the rows by their numbers."""
        return rows_in_words(self.lines[which].tolist())


def with_outcome(rows: Rows, unusable: np.ndarray, target: str, notes: list[str]):
    """The rows that have one and of which it is known what was set, and the single settings of
    those that are still to be run: `[(column, value)]`.
    """
    at = [c.name for c in rows.columns].index(target)
    without = ~np.isfinite(rows.values[:, at])
    if without.any():
        notes.append(
            f"{without.sum()} row{'s' * (int(without.sum()) > 1)} without a result in '{target}' "
            f"(failed or still pending), left out: {rows.words(without)}"
        )
    nothing_else = (np.isfinite(rows.values) & ~rows.flags).sum(1) == 0
    pending = without & ~unusable & (rows.flags.sum(1) == 1) & nothing_else
    planned = [
        (rows.columns[i].name, rows.values[r, i])
        for r, i in np.argwhere(rows.flags & pending[:, None])
    ]
    return rows.only(~without & ~unusable), planned


def without_strays(rows: Rows, target: str, notes: list[str]) -> Rows:
    """Less observations that have a value far outside the rest in some column, and less experiments
    whose outcome is: those that gave another when they were made again, and slips of a power of
    ten. What an experiment gave may truly lie far from all that was observed.
    """
    kept, observed = np.ones(len(rows.lines), bool), rows.observed
    at = [c.name for c in rows.columns].index(target)
    for i, column in enumerate(rows.columns):
        held = rows.values[observed, i]
        if len(set(held[np.isfinite(held)].tolist())) > 5:
            for r in np.flatnonzero(observed)[isolated(held)]:
                value = f"{rows.values[r, i]:.15g}"
                notes.append(
                    f"row {rows.lines[r]}: '{column.name}' = {value} is far from the rest, left out"
                )
                kept[r] = False
    single, outcome = rows.flags.sum(1) == 1, rows.values[:, at]
    odd = single & isolated(np.where(kept, outcome, np.nan))
    for r in np.flatnonzero(odd):
        i = int(rows.flags[r].argmax())
        again = single & ~odd & rows.flags[:, i] & (rows.values[:, i] == rows.values[r, i])
        if again.any() or slips(outcome[[r]], outcome[kept & ~odd]).any():
            why = "what the same experiment gave" if again.any() else "all others, a power of ten"
            notes.append(
                f"row {rows.lines[r]}: '{target}' = {outcome[r]:.15g} is far from {why}, left out"
            )
            kept[r] = False
    return rows.only(kept)


def apart(x: np.ndarray, least: float, gap: float, share: float = 0.05) -> np.ndarray:
    """Which of `x[samples]` lie outside the rest: at most a `share` of them, `least` robust
    deviations away and `gap` times as far as the next.
    """
    distance, found = np.abs(x - np.median(x)), np.zeros(len(x), bool)
    scale = 1.4826 * np.median(distance) or distance.mean()
    order = np.argsort(-distance)
    for count in range(1, min(int(max(1, share * len(x))), len(x) - 1) + 1):
        last, following = distance[order[count - 1]], distance[order[count]]
        if last > max(least * scale, gap * following):
            found[order[:count]] = True
    return found


def isolated(values: np.ndarray) -> np.ndarray:
    """Which of `values[samples]` are no more of the same: far outside the rest, or a power of ten
    away from it and less far outside (a slipped decimal point). Positive ones must be so in
    logarithms too; NaN is none of them.
    """
    known, found = np.isfinite(values), np.zeros(len(values), bool)
    x = values[known]
    if len(x) < 3:
        return found
    scales = (x, np.log(x)) if x.min() > 0 else (x,)
    far, rather = (
        np.all([apart(scale, least, gap) for scale in scales], axis=0)
        for least, gap in ((10.0, 4.0), (4.0, 2.5))
    )
    found[known] = far | (rather & slips(x, x[~rather]))
    return found


def slips(values: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Which of the `values` a slipped decimal point tells from `usual` ones, all of one sign."""
    low, high = usual.min(initial=np.inf), usual.max(initial=-np.inf)
    shifted = values[:, None] * POWERS
    return ((shifted >= low) & (shifted <= high)).any(1) & (low * high > 0)


def without_gaps(rows: Rows, target: str, ranges: dict[str, Bound], notes: list[str]) -> Rows:
    """Less columns that are mostly missing, unless they were set or have a range, and less
    observations with a missing cell; in experiments, and where too few observations would be left,
    the column's median stands in.
    """
    missing = np.isnan(rows.values)
    needed = np.array([c.name == target or c.name in ranges for c in rows.columns])
    sparse = (missing.mean(0) > MOST_MISSING) & ~needed & ~rows.flags.any(0)
    for c in itertools.compress(rows.columns, sparse):
        notes.append(f"'{c.name}': more than a quarter of its cells are missing, left out")
    rows, missing = rows.without(sparse), missing[:, ~sparse]
    gaps, observed = missing.any(1), rows.observed
    plenty = (observed & ~gaps).sum() >= max(MIN_OBSERVATIONS, 0.6 * observed.sum())
    out = gaps & observed & plenty
    for which, done in ((out, "left out"), (gaps & ~out, "the column's median stands in for them")):
        if which.any():
            notes.append(f"cells missing in {rows.words(which)}: {done}")
    values = np.where(missing, np.nanmedian(rows.values, axis=0)[None], rows.values)
    return rows._replace(values=values).only(~out)


def varied(rows: Rows, target: str, ranges: dict[str, Bound], notes: list[str]) -> Rows:
    """Less columns that are constant or say the same as another which stays: the target, or else
    what was set by hand, has a range, or comes first. What was set in a copy counts as set in the
    other.
    """
    still = constant(rows.values)
    for c in itertools.compress(rows.columns, still):
        tell = ": an experiment with it would tell" * (c.name in ranges)
        notes.append(f"'{c.name}': constant, so that nothing is known of it, left out{tell}")
    rows = rows.without(still)
    values, flags = rows.values, rows.flags.copy()
    centred = (values - values.mean(0)) / deviation(values)
    same = np.abs(centred.T @ centred) / len(values) > 1 - SAME
    rank = [
        (c.name != target, not flags[:, i].any(), c.name not in ranges, i)
        for i, c in enumerate(rows.columns)
    ]
    gone = np.zeros(len(rows.columns), bool)
    for i in sorted(range(len(gone)), key=rank.__getitem__):
        for j in np.flatnonzero(same[i] & ~gone) if not gone[i] else ():
            if rank[j] > rank[i]:
                flags[:, i] |= flags[:, j]
                gone[j] = True
                names = rows.columns[j].name, rows.columns[i].name
                notes.append("'{}' says the same as '{}' and is left out".format(*names))
    return rows._replace(flags=flags).without(gone)


def as_design(rows: Rows, notes: list[str]) -> Rows:
    """With experiments read as observations where these are few, and where what was set stands
    still otherwise.
    """
    flags, observed = rows.flags.copy(), rows.values[rows.observed]
    if len(observed):
        still = constant(observed) & flags.any(0)
        if still.any():
            names = ", ".join(f"'{c.name}'" for c in itertools.compress(rows.columns, still))
            notes.append(f"{names}: constant unless set; such rows are read as a design")
        flags[flags[:, still].any(1)] = False
    for which, kind in ((flags.sum(1) > 1, " of several settings"), (flags.any(1), "")):
        if (~flags.any(1)).sum() < MIN_OBSERVATIONS and which.any():
            notes.append(f"few rows are observations: experiments{kind} are read as a design")
            flags[which] = False
    return rows._replace(flags=flags)


def order_of_rows(rows: Rows, target: int) -> list[str]:
    """Whether the target drifts along the observations, or follows a column with a row's delay."""
    found, name, outcome = [], rows.columns[target].name, rows.values[:, target]
    if rows.observed.sum() > MIN_OBSERVATIONS and not constant(rows.values[rows.observed])[target]:
        first = outcome[rows.observed]
        drift, chance = np.array(spearmanr(np.arange(len(first)), first))
        if chance < 1e-5:
            found.append(
                f"'{name}' drifts along the rows (rank correlation {drift:.2f}): early and late "
                "rows cannot be compared as they stand"
            )
    for i, column in enumerate(rows.columns):
        x = rows.values[:, i]
        if i == target or min(x[1:].std(), x[:-1].std(), outcome[1:].std()) == 0:
            continue
        own, before = (abs(np.corrcoef(a, outcome[1:])[0, 1]) for a in (x[1:], x[:-1]))
        if before > max(0.6, own + 0.3):
            found.append(
                f"'{column.name}' of the row before explains '{name}' better than that of its own "
                "row: is the file shifted by one?"
            )
    return found


def sums_of_settings(rows: Rows, settable: np.ndarray) -> list[str]:
    """Columns that always sum to the same, so that none can be set alone."""
    which = np.flatnonzero(settable)
    values = rows.values[:, which]
    spread = values.std(0)
    if len(which) < 2 or len(values) <= len(which) or not spread.all():
        return []
    _, lengths, directions = np.linalg.svd((values - values.mean(0)) / spread, full_matrices=False)
    weights = directions[-1] / spread
    parts = np.abs(directions[-1]) > 0.05
    alike = np.ptp(weights[parts]) < 0.05 * np.abs(weights[parts]).max()
    if lengths[-1] > 0.02 * lengths[0] or not alike or parts.sum() < 2:
        return []
    names = ", ".join(f"'{rows.columns[i].name}'" for i in which[parts])
    total = values[:, parts].sum(1).mean()
    return [f"{names} always sum to {total:.4g}: one of them cannot be set alone"]
