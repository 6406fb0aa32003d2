"""Units of a file's columns: between what is written there and standardised float32."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


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
