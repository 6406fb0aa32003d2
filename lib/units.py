"""Units of a file's columns: between what is written there and standardised float32."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from lib.table import demand, told


FARTHEST_VALUE = 1e6  # deviations: beyond, a typing error or another unit


class Units(NamedTuple):
    """Units of a file's columns, on the host in float64: value = shift + spread * deviation, or its
    logarithm where `logs[vars]`.

    `spread[vars]` is the power of two nearest to the deviation over the observational rows and
    `shift[vars]` a multiple of it near their mean, so that nothing is lost on the way to deviations
    and back: in float32 an offset of 1e7 deviations, or a deviation of 1e-30, would be. `digits`
    are the decimals that each column is written with (negative: tens, hundreds).
    """

    shift: np.ndarray
    spread: np.ndarray
    digits: np.ndarray
    logs: np.ndarray

    @staticmethod
    def of(values: np.ndarray, observed: np.ndarray, digits: np.ndarray, logs: np.ndarray):
        """Of `values[rows, vars]`, by the rows that are `observed`, or all where a column is
        constant there.
        """
        values = logarithms(values, logs)
        first = values[observed]
        std = np.where(constant(first), deviation(values), deviation(first))
        spread = 2.0 ** np.round(np.log2(std))
        return Units(spread * np.round(first.mean(0) / spread), spread, digits, logs)

    def exact(self, values: ArrayLike) -> np.ndarray:
        """`values[..., vars]` in deviations, float64; not finite where a logarithm has none."""
        return (logarithms(np.asarray(values, float), self.logs) - self.shift) / self.spread

    def deviations(self, values: ArrayLike) -> np.ndarray:
        """`values[..., vars]` in deviations, float32."""
        return self.exact(values).astype(np.float32)

    def raw(self, deviations: ArrayLike) -> np.ndarray:
        """`deviations[..., vars]` in the columns' own units, float64."""
        inner = self.shift + self.spread * np.asarray(deviations, float)
        return np.where(self.logs, np.exp(np.where(self.logs, inner, 0.0)), inner)

    def far(self, values: ArrayLike) -> np.ndarray:
        """Which of `values[..., vars]`, in the columns' own units, are too far out for float32."""
        return ~(np.abs(self.exact(values)) <= FARTHEST_VALUE)

    @property
    def shown(self) -> list[int]:
        """Decimals `[vars]` of a new value: the column's, but not the sixteen of a computed number:
        float32 has a millionth of a deviation.
        """
        fewer = np.minimum(self.digits, 6 - np.floor(np.log10(self.spread)))
        return np.where(self.logs, self.digits, fewer).astype(int).tolist()

    def one(self, variable: int | np.integer) -> "Units":
        """Of one of the columns, alone: for a number, or numbers `[..., 1]`."""
        return Units(*(part[variable, None] for part in self))

    def written(self, variable: int | np.integer, value: float | np.floating) -> float:
        """One value, given as a finite float32 deviation, in its column's unit and with its digits,
        or with as many more as it takes to read the same deviation again.
        """
        unit = self.one(variable)
        raw = unit.raw(value).item()
        more = rounded(raw, unit.digits.item())
        return next(x for x in more if x == raw or unit.deviations(x) == value)


def rounded(value: float, digits: int) -> Iterator[float]:
    """A number with so many decimals, one more, two more, ..."""
    return (round(value, d) + 0.0 for d in itertools.count(digits))  # + 0: no -0


def logarithms(values: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """`values[..., vars]`, those of some columns as logarithms; NaN where there is none."""
    return np.log(values, where=logs & (values > 0), out=np.where(logs, np.nan, values))


def deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation of each column of `values[samples, vars]`; squares of tiny numbers do not
    vanish.
    """
    centred = values - values.mean(0)
    largest = np.abs(centred).max(0)
    return largest * (centred / np.where(largest > 0, largest, 1.0)).std(0)


def constant(values: np.ndarray) -> np.ndarray:
    """Which columns of `values[samples, vars]` vary by less than float64 can tell."""
    return np.less_equal(deviation(values), 4 * np.finfo(float).eps * np.abs(values).max(0))


def in_logarithms(rows, ranges, target, scale, notes) -> np.ndarray:
    """Which columns are worked in logarithms `[vars]`: those that are told to, and those that are
    positive, span a hundred times (their range, or all but the ends of what was seen), and of whose
    values half lie in the lowest tenth of that.
    """
    logs = []
    for column, seen in zip(rows.columns, rows.values.T, strict=True):
        bound = ranges.get(column.name)
        low, high = (bound.low, bound.high) if bound else np.quantile(seen, [0.02, 0.98])
        said = scale if column.name == target else bound and bound.scale
        least = min(seen.min(), low)
        demand(
            said != "log" or least > 0,
            f"'{column.name}': has values of 0 or below, no scale of logarithms",
        )
        skewed = high >= 100 * low and np.median(seen) < low + 0.1 * (high - low)
        logs.append(bool(said == "log" or (said != "linear" and least > 0 and skewed)))
        notes += told((logs[-1], f"'{column.name}': worked in logarithms ({low:g} to {high:g})"))
    return np.array(logs)


def ends_of(outcomes: np.ndarray, column) -> tuple[float, float]:
    """What the target cannot leave: 0 and 100 of a percentage, 0 of a count or where zeros are."""
    least, most = outcomes.min(), outcomes.max()
    named = column.unit == "%" or re.search(r"%|pct|percent", column.name, re.IGNORECASE)
    relative = re.search(r"change|diff|delta|control|relative", column.name, re.IGNORECASE)
    percentage = bool(named) and not relative and least >= 0 and most <= 100
    counted = least >= 0 and ((outcomes == 0).sum() > 1 or (outcomes == np.round(outcomes)).all())
    return (0.0 if percentage or counted else -math.inf), (100.0 if percentage else math.inf)
