"""What is left out of a person's rows and columns, or noticed about them, each with a note."""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.stats import f_oneway, spearmanr

from lib.buffer import MIN_OBSERVATIONS
from lib.table import Bound, demand, rows_in_words, told
from lib.units import constant, deviation


MOST_MISSING = 0.25  # share of a column's cells; with more it is left out
SAME = 1e-5  # less than a correlation of one, for columns that say the same
ALIKE = 0.95  # correlation of settings that moved together
MOST_LOTS = 12  # different values of a column that looks like lots
POWERS = 10.0 ** np.array([-3, -2, -1, 1, 2, 3])  # a decimal point may slip by


class Column(NamedTuple):
    """A column as numbers `[rows]`, NaN where a cell has none; `digits` are its decimals. Where the
    cells of a column `source` are words: one for the second of `words`, zero for all others (the
    first, if there are two).
    """

    name: str
    values: np.ndarray
    digits: int
    unit: str = ""
    source: str = ""
    words: tuple[str, str] = ("", "")


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
        columns = list(itertools.compress(self.columns, ~which))
        return Rows(columns, self.values[:, ~which], self.flags[:, ~which], self.lines)

    @property
    def observed(self) -> np.ndarray:
        """Rows in which nothing was set."""
        return np.logical_not(self.flags.any(axis=1))


def with_outcome(rows: Rows, unusable: np.ndarray, target: str, notes: list[str]):
    """The rows that have one and of which it is known what was set, and the single settings of
    those that are still to be run: `[(column, value)]`.
    """
    at = [c.name for c in rows.columns].index(target)
    without = ~np.isfinite(rows.values[:, at])
    notes += told(
        (
            without.any(),
            f"{without.sum()} row{'s' * (int(without.sum()) > 1)} without a result in '{target}' "
            f"(failed or still pending), left out: {rows_in_words(rows.lines[without])}",
        )
    )
    alone = without & ~unusable & (rows.flags.sum(1) == 1)
    planned = [
        (rows.columns[i].name, rows.values[r, i])
        for r, i in np.argwhere(rows.flags & alone[:, None])
    ]
    return rows.only(~without & ~unusable), planned


def without_strays(rows: Rows, target: str, notes: list[str]) -> Rows:
    """Less observations that have a value far outside the rest in some column, and less slips among
    the experiments. What an experiment gave may truly lie far from all that was observed.
    """
    at = [c.name for c in rows.columns].index(target)
    seen = np.where(rows.observed[:, None], rows.values, np.nan)
    several = [len(set(x[np.isfinite(x)].tolist())) > 5 for x in seen.T]
    stray = np.stack([isolated(x) for x in seen.T], axis=1) & several
    notes += [
        f"row {rows.lines[r]}: '{rows.columns[i].name}' = {rows.values[r, i]:.15g} is far from the "
        "rest, left out"
        for i, r in np.argwhere(stray.T)
    ]
    rows = rows.only(np.logical_not(stray.any(1)))
    return without_slips(rows, at, notes) if several[at] else rows


def without_slips(rows: Rows, target: int, notes: list[str]) -> Rows:
    """Less experiments whose outcome is far outside the rest, and a power of ten away from it or
    from what the same experiment gave; unless one with nearly the same setting is so as well.
    """
    outcome, single = rows.values[:, target], rows.flags.sum(1) == 1
    odd = single & isolated(outcome)
    kept = np.ones(len(odd), bool)
    for r in np.flatnonzero(odd):
        i = rows.flags[r].argmax()
        setting, like = rows.values[:, i], single & rows.flags[:, i] & (np.arange(len(odd)) != r)
        near = np.abs(setting - setting[r]) <= 0.2 * max(np.ptp(setting), 1e-300)
        confirmed = (like & odd & near).any()
        again = outcome[like & ~odd & (setting == setting[r])]
        usual = np.append(0.7 * again, 1.4 * again) if again.size else outcome[~odd]
        powers = POWERS if again.size else POWERS[np.abs(np.log10(POWERS)) > 1.5]
        kept[r] = confirmed or not slips(outcome[[r]], usual, powers).any()
        what = f"row {rows.lines[r]}: '{rows.columns[target].name}' = {outcome[r]:.15g} is far from"
        rest = "what the same experiment gave" if again.size else "all others, by powers of ten"
        notes += told(
            (not kept[r], f"{what} {rest}, left out"),
            (kept[r] and not confirmed, f"{what} all others: see that it is no typing error"),
        )
    return rows.only(kept)


def apart(x: np.ndarray, least: float, gap: float) -> np.ndarray:
    """Which of `x[samples]` lie outside the rest: at most one in a hundred, `least` robust
    deviations away and `gap` times as far as the next.
    """
    distance = np.abs(x - np.median(x))
    scale = 1.4826 * np.median(distance) or distance.mean()
    ranked = np.sort(distance)[::-1][: max(1, len(x) // 100) + 1]
    clear = ranked[:-1] > np.maximum(least * scale, gap * ranked[1:])
    return distance >= ranked[:-1][clear].min(initial=np.inf)


def isolated(values: np.ndarray) -> np.ndarray:
    """Which of `values[samples]` are no more of the same: far outside the rest, or a power of ten
    away from it and less far outside (a slipped decimal point). Those that are not negative must be
    so in logarithms too (of a little more, where some are zero); NaN is none of them.
    """
    known, found = np.isfinite(values), np.zeros(len(values), bool)
    x = values[known]
    if len(x) < 3:
        return found
    little = x[x > 0].min(initial=np.inf) if x.min() == 0 else 0.0
    scales = (x, np.log(x + little)) if x.min() >= 0 and x.any() else (x,)
    far, rather = (
        np.all([apart(scale, least, gap) for scale in scales], axis=0)
        for least, gap in ((10.0, 4.0), (4.0, 2.5))
    )
    found[known] = far | (rather & slips(x, x[~rather]))
    return found


def slips(values: np.ndarray, usual: np.ndarray, powers: np.ndarray = POWERS) -> np.ndarray:
    """Which of the `values` a slipped decimal point tells from `usual` ones, all of one sign."""
    low, high = usual.min(initial=np.inf), usual.max(initial=-np.inf)
    shifted = values[:, None] * powers
    return ((shifted >= low) & (shifted <= high)).any(1) & (low * high > 0)


def without_gaps(rows: Rows, target: str, ranges: dict[str, Bound], notes: list[str]) -> Rows:
    """Less columns that are mostly missing, unless they were set or have a range, and less
    observations with a missing cell; in experiments, and where too few observations would be left,
    the column's median stands in.
    """
    listed = [c.name == target or c.name in ranges for c in rows.columns]
    share, acted = np.isnan(rows.values).mean(0), rows.flags.any(0)
    sparse = (share == 1) | ((share > MOST_MISSING) & ~np.logical_or(acted, listed))
    empty = [
        c.name for c in itertools.compress(rows.columns, (share > MOST_MISSING) & ~sparse & acted)
    ]
    demand(
        not empty,
        f"columns {', '.join(empty)}: set in some rows, empty in most: give the usual values",
    )
    notes += [
        f"'{c.name}': more than a quarter of its cells are missing, left out"
        for c in itertools.compress(rows.columns, sparse)
    ]
    rows = rows.without(sparse)
    missing, observed = np.isnan(rows.values), rows.observed
    gaps = missing.any(1)
    plenty = (observed & ~gaps).sum() >= max(MIN_OBSERVATIONS, 0.6 * observed.sum())
    out = gaps & observed & plenty
    notes += [
        f"cells missing in {rows_in_words(rows.lines[which])}: {done}"
        for which, done in (
            (out, "left out"),
            (gaps & ~out, "the column's median stands in for them"),
        )
        if which.any()
    ]
    filled = np.where(missing, np.nanmedian(rows.values, axis=0), rows.values)
    return rows._replace(values=filled).only(~out)


def varied(rows: Rows, target: str, ranges: dict[str, Bound], notes: list[str]) -> Rows:
    """Less columns that are constant or say the same as another which stays: the target, or else
    what has a range, was set by hand, or comes first. What was set in a copy counts as set in the
    other.
    """
    still = constant(rows.values)
    notes += [
        f"'{c.name}': constant, so that nothing is known of it, left out"
        + ": an experiment with it would tell" * (c.name in ranges)
        for c in itertools.compress(rows.columns, still)
    ]
    rows = rows.without(still)
    flags, names = rows.flags.copy(), [c.name for c in rows.columns]
    own = np.array([name == target for name in names])
    listed = np.array([name in ranges for name in names])
    acted = flags.any(0)
    same = alike(rows.values, 1 - SAME)
    # what can be set is never a copy of the target, even where nothing else moves that
    apart_from_it = np.outer(own, acted | listed)
    same &= ~(apart_from_it | apart_from_it.T)
    gone = np.zeros(len(names), bool)
    for i in np.lexsort((~acted, ~listed, ~own)):
        copies = np.flatnonzero(same[i] & ~gone & ~gone[i])
        flags[:, i] |= flags[:, copies].any(1)
        gone[copies] = True
        notes += [f"'{names[j]}' says the same as '{names[i]}' and is left out" for j in copies]
    return rows._replace(flags=flags).without(gone)


def alike(values: np.ndarray, least: float) -> np.ndarray:
    """Which two columns of `values[rows, columns]` have more than some correlation of any sign."""
    centred = (values - values.mean(0)) / deviation(values)
    return (np.abs(centred.T @ centred) / len(values) > least) & ~np.eye(
        values.shape[1], dtype=bool
    )


def as_design(rows: Rows, notes: list[str]) -> Rows:
    """With experiments read as observations where these are few, and where what was set stands
    still otherwise.
    """
    flags, observed = rows.flags.copy(), rows.observed
    # without observations all rows, in which nothing stands still
    still = constant(rows.values[observed | ~observed.any()]) & flags.any(0)
    names = ", ".join(f"'{c.name}'" for c in itertools.compress(rows.columns, still))
    notes += told((names, f"{names}: constant unless set; such rows are read as a design"))
    flags[flags[:, still].any(1)] = False
    for which, kind in ((flags.sum(1) > 1, " of several settings"), (flags.any(1), "")):
        if (~flags.any(1)).sum() < MIN_OBSERVATIONS and which.any():
            notes.append(f"few rows are observations: experiments{kind} are read as a design")
            flags[which] = False
    return rows._replace(flags=flags)


def drift_of(rows: Rows, target: int, outcomes: np.ndarray, notes: list[str]):
    """How much the `outcomes[rows]` drifted until the last row `[rows]`: a straight line along the
    observations beside all other columns but counts of rows, and their squares. Zero where there
    is no drift, where rows are sorted or depend on the rows before, and where another column, or
    its distance from where it ends, goes along with the rows: such rows are of a search.
    """
    order, first, none = rows.lines.astype(float), rows.observed, np.zeros(len(outcomes))
    x, y = order[first], outcomes[first]
    columns = np.delete(rows.values, target, 1)[first]
    columns = columns[:, ~constant(columns)]
    scaled = (columns - columns.mean(0)) / deviation(columns)
    scaled = scaled[:, np.abs((x - x.mean()) @ scaled) < (1 - 1e-9) * x.std() * len(x)]
    enough = len(x) >= MIN_OBSERVATIONS + 2 * scaled.shape[1] and np.ptp(y) > 0
    drift, chance = np.array(spearmanr(x, y)) if enough else (0.0, 1.0)
    if chance > 1e-5 or abs(np.sign(np.diff(y)).mean()) > 0.5:
        return none
    design = np.column_stack([x - x.mean(), np.ones(len(x)), scaled, scaled**2])
    slopes, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ slopes
    lag = np.clip(np.corrcoef(rest[1:], rest[:-1])[0, 1], 0.0, 0.9) if np.ptp(rest) else 0.0
    noise = np.sum(rest**2) / (len(x) - design.shape[1]) * (1 + lag) / (1 - lag)
    straight = slopes[0] ** 2 > 25 * noise * np.linalg.pinv(design.T @ design)[0, 0]
    moving = np.hstack([scaled, np.abs(scaled - scaled[-len(x) // 5 :].mean(0))])
    along = [np.array(spearmanr(x, other))[0] for other in moving[:, ~constant(moving)].T]
    alone = straight and lag < 0.5 and np.all(np.abs(along) < 0.5)
    notes.append(
        f"the target drifts along the rows (rank correlation {drift:.2f}): "
        + ("taken out, to what it is in the last row" if alone else "early and late rows differ")
    )
    return slopes[0] * (order[-1] - order) if alone else none


def lots_of(rows: Rows, target: int, settable: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Columns of those that cannot be set with few values, in runs, between which the observed
    target differs more than within them, as it does between lots: name and each row's lot.
    """
    found, outcome = [], rows.values[:, target]
    for name in dict.fromkeys(c.source or c.name for c in rows.columns):
        own = [name in (c.source, c.name) for c in rows.columns]
        levels, lot = np.unique(rows.values[:, own], axis=0, return_inverse=True)
        several = range(len(levels) if len(levels) <= MOST_LOTS else 0)
        groups = [outcome[(lot == k) & rows.observed] for k in several]
        groups = [one for one in groups if len(one) > 2 and np.ptp(one) > 0]
        in_runs = 1 + np.count_nonzero(np.diff(lot)) <= 2 * len(levels)
        if (
            len(groups) > 1
            and in_runs
            and not (own[target] or settable[own].any())
            and f_oneway(*groups).pvalue < 1e-4
        ):
            found.append((name, lot))
    return found


def repeats_of(rows: Rows, target: int, settable: np.ndarray) -> list[str]:
    """How far rows with one setting lie apart, of what was set or can be, and rows that are there
    twice.
    """
    outcome, own = rows.values[:, target], np.where(rows.observed[:, None], settable, rows.flags)
    settings = np.column_stack([own, np.where(own, rows.values, 0.0)])
    _, which, times = np.unique(settings, axis=0, return_inverse=True, return_counts=True)
    means, freedom = np.bincount(which, outcome) / times, len(outcome) - len(times)
    noise = np.sqrt(np.sum((outcome - means[which]) ** 2) / max(freedom, 1))
    _, first = np.unique(np.column_stack([rows.flags, rows.values]), axis=0, return_index=True)
    again = np.delete(rows.lines, first)
    return told(
        (
            freedom,
            f"{freedom} rows are replicates of others: outcomes of one setting have a standard "
            f"deviation of {noise:.3g}, which is noise",
        ),
        (len(again), f"{rows_in_words(again)}: the same in every column as a row before"),
    )


def order_of_rows(rows: Rows, target: int) -> list[str]:
    """Whether the target follows a column with a row's delay."""
    found, name, outcome = [], rows.columns[target].name, rows.values[:, target]
    for column, x in zip(rows.columns, rows.values.T, strict=True):
        if column.name != name and min(x[1:].std(), x[:-1].std(), outcome[1:].std()) > 0:
            pairs = (x[1:], outcome[1:]), (x[:-1], outcome[1:]), (x[1:], x[:-1])
            own, before, in_turn = (abs(np.corrcoef(*pair)[0, 1]) for pair in pairs)
            found += told(
                (
                    before > max(0.6, own + 0.3) and in_turn <= 0.4,  # unlike designs in cycles
                    f"'{column.name}' of the row before explains '{name}' better than that of its "
                    "own row: is the file shifted by one?",
                )
            )
    return found


def together(rows: Rows, settable: np.ndarray) -> list[str]:
    """Pairs of settings that hardly ever moved apart, and of which none was set alone."""
    which = np.flatnonzero(settable & ~rows.flags.any(0) & ~constant(rows.values))
    pairs = np.argwhere(np.triu(alike(rows.values[:, which], ALIKE)))
    names = [" and ".join(f"'{rows.columns[which[i]].name}'" for i in pair) for pair in pairs[:4]]
    some = "; ".join(names) + "; ..." * (len(pairs) > 4)
    return told(
        (names, f"{some} moved together: which of two matters cannot be told from these rows")
    )


def sums_of_settings(rows: Rows, settable: np.ndarray) -> list[str]:
    """Columns that always sum to the same, so that none can be set alone."""
    which = np.flatnonzero(settable)
    values = rows.values[:, which]
    spread = values.std(0)
    if len(which) < 2 or len(values) <= len(which) or not spread.all():
        return []
    _, lengths, directions = np.linalg.svd((values - values.mean(0)) / spread, full_matrices=False)
    weights, parts = directions[-1] / spread, np.abs(directions[-1]) > 0.05
    equal = np.ptp(weights[parts]) < 0.05 * np.abs(weights[parts]).max()
    names = ", ".join(f"'{rows.columns[i].name}'" for i in which[parts])
    return told(
        (
            lengths[-1] <= 0.02 * lengths[0] and equal and parts.sum() > 1,
            f"{names} always sum to {values[:, parts].sum(1).mean():.4g}: one of them cannot be "
            "set alone",
        )
    )
