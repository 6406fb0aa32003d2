"""`ExperienceBuffer`: what has been observed and what has been done, as fixed-size arrays that jit,
vmap and scan.
"""

import csv
import itertools
import math
from decimal import Context, Decimal
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from lib.scm import Intervention


MIN_OBSERVATIONS = 10
INTERVENED = "intervened"
FARTHEST_VALUE = 1e6  # deviations: beyond, a typing error or another unit


class DataError(ValueError):
    """Bad input from a person; the message names file, row and column and says what to do."""


class ExperienceBuffer(eqx.Module):
    """Rows of experience; immutable, every change returns a new buffer.

    `values[samples, vars]`, `intervened[samples, vars]` (true where the value was set by hand),
    `valid[samples]` (false rows are free space).
    """

    values: Float[Array, "samples vars"]
    intervened: Bool[Array, "samples vars"]
    valid: Bool[Array, " samples"]

    @staticmethod
    def empty(num_vars: int, capacity: int) -> "ExperienceBuffer":
        """A buffer with room for `capacity` rows of `num_vars` variables."""
        return ExperienceBuffer(
            jnp.zeros((capacity, num_vars)),
            jnp.zeros((capacity, num_vars), bool),
            jnp.zeros(capacity, bool),
        )

    @property
    def size(self):
        """How many rows are filled."""
        return self.valid.sum()

    @property
    def observational(self) -> Bool[Array, " samples"]:
        """Filled rows without an intervention."""
        return self.valid & ~self.intervened.any(1)

    def grow(self, extra: int) -> "ExperienceBuffer":
        """The same rows with `extra` more free places at the end."""
        return ExperienceBuffer(
            jnp.pad(self.values, ((0, extra), (0, 0))),
            jnp.pad(self.intervened, ((0, extra), (0, 0))),
            jnp.pad(self.valid, (0, extra)),
        )

    def widen(self, extra: int) -> "ExperienceBuffer":
        """The same rows with `extra` padding variables behind."""
        return ExperienceBuffer(
            jnp.pad(self.values, ((0, 0), (0, extra))),
            jnp.pad(self.intervened, ((0, 0), (0, extra))),
            self.valid,
        )

    def first(self, count) -> "ExperienceBuffer":
        """What was known when `count` rows were filled; the others are free places again."""
        return self.only(jnp.arange(self.valid.shape[0]) < count)

    def only(self, kept: Bool[Array, " samples"]) -> "ExperienceBuffer":
        """The rows that are `kept`, each in its place; the others are free places."""
        known = self.valid & kept
        return ExperienceBuffer(
            jnp.where(known[:, None], self.values, 0.0), self.intervened & known[:, None], known
        )

    def add_intervention(
        self, intervention: Intervention, outcome: Float[Array, " vars"]
    ) -> "ExperienceBuffer":
        """One more row, observed under `intervention`.

        The row takes the first free place; rows are filled from the front. Raises `ValueError` if
        the buffer is full. Inside `jit` that cannot be known (a host callback could tell, and can
        deadlock on CPU): there the caller reserves capacity.
        """
        if not isinstance(self.valid, Tracer) and self.size >= self.valid.shape[0]:
            raise ValueError(
                f"the ExperienceBuffer is full ({self.valid.shape[0]} rows): make room with grow()"
            )
        return self.write(self.size, intervention, outcome)

    def has_room(self, extra: int, filled: int = 0) -> Bool[Array, ""]:
        """Whether `extra` more rows fit behind those that there are, at least `filled`. Raises
        `ValueError` where it can be told that they do not; inside `jit`, where rows cannot be
        counted, the caller has to mark what it returns (`nan_unless`).
        """
        capacity, size = self.valid.shape[0], self.size
        rows = filled if isinstance(size, Tracer) else max(int(size), filled)
        if rows + extra > capacity:
            raise ValueError(
                f"the buffer has {capacity} places, too few for its rows and {extra} experiments "
                f"(at least {rows} rows): use grow()"
            )
        return size + extra <= capacity

    def write(
        self, index, intervention: Intervention, outcome: Float[Array, " vars"]
    ) -> "ExperienceBuffer":
        """`add_intervention` at a known free place, without the check of room: for loops that count
        their own steps.

        Raises `ValueError` unless `outcome` has one number, and `intervention` one flag, per
        variable.
        """
        num_vars = self.values.shape[1]
        for what, shape in (
            ("outcome", jnp.shape(outcome)),
            ("intervention", intervention.mask.shape),
        ):
            if shape != (num_vars,):
                raise ValueError(
                    f"the {what} has shape {shape}, the buffer {num_vars} variables: "
                    "give one number for each"
                )
        return ExperienceBuffer(
            self.values.at[index].set(outcome),
            self.intervened.at[index].set(intervention.mask),
            self.valid.at[index].set(True),
        )

    @staticmethod
    def from_csv(path: Path) -> tuple[tuple[str, ...], "ExperienceBuffer", "Units"]:
        """Read experiments: a column per variable, a row per experiment; a column `intervened`
        names the variable set by hand (`a;b` where several were, empty: observed). Returns the
        variables' names, the buffer, and the units.

        The buffer holds deviations: the file is read in float64 and standardised (`Units`), because
        in float32 an offset of 1e7 deviations, or a deviation of 1e-30, would be lost. Raises
        `DataError` naming file, row and column for anything that cannot be used as it stands.
        """
        header, table = read_table(path)
        if INTERVENED not in header:
            raise DataError(
                f"{path}: no column '{INTERVENED}': add one, empty for observations, "
                "else the variable that was set by hand"
            )
        column = header.index(INTERVENED)
        names = (*header[:column], *header[column + 1 :])
        if len(names) < 2:
            raise DataError(
                f"{path}: only {len(names)} variable column(s): give the target "
                "and at least one other variable"
            )
        values = np.zeros((len(table), len(names)))
        intervened = np.zeros(values.shape, bool)
        for r, (line, row) in enumerate(table):
            for chosen in filter(None, (name.strip() for name in row.pop(column).split(";"))):
                if chosen not in names:
                    raise DataError(
                        f"{path}, row {line}, column '{INTERVENED}': '{chosen}' is not a column; "
                        f"the variables are {', '.join(names)}"
                    )
                intervened[r, names.index(chosen)] = True
            values[r] = [parse_number(*one, path, line) for one in zip(row, names, strict=True)]
        observed = values[~intervened.any(1)]
        if len(observed) < MIN_OBSERVATIONS:
            raise DataError(
                f"{path}: {len(observed)} observational rows (empty '{INTERVENED}'), at least "
                f"{MIN_OBSERVATIONS} are needed: add observations"
            )
        std = deviation(observed)
        # constant: all that varies is a smaller share of the largest value than float64 can tell
        for i in np.flatnonzero(std <= 4 * np.finfo(float).eps * np.abs(observed).max(0)):
            raise DataError(
                f"{path}, column '{names[i]}': zero variance over the observational "
                "rows: drop the column or add rows in which it varies"
            )
        spread = 2.0 ** np.round(np.log2(std))
        digits = tuple(max(decimals(row[i]) for _, row in table) for i in range(len(names)))
        units = Units(spread * np.round(observed.mean(0) / spread), spread, digits)
        for r, i in np.argwhere(units.far(values)):
            line, row = table[r]
            raise DataError(
                f"{path}, row {line}, column '{names[i]}': '{row[i]}' "
                f"is more than {FARTHEST_VALUE:,.0f} deviations from the others: correct a typing "
                "error, or write it in the unit of the others"
            )
        deviations = jnp.asarray(units.deviations(values))
        valid = jnp.ones(len(table), bool)
        return names, ExperienceBuffer(deviations, jnp.asarray(intervened), valid), units


def nan_unless(fits: Bool[Array, ""], tree: PyTree) -> PyTree:
    """The tree with nan for every number unless `fits`: what a program that could only count rows
    as it ran returns in place of raising. Not `eqx.error_if`: a host callback inside a batched loop
    can deadlock on a machine with few cores.
    """
    return jax.tree.map(
        lambda leaf: jnp.where(fits, leaf, jnp.nan) if eqx.is_inexact_array(leaf) else leaf, tree
    )


class Units(NamedTuple):
    """Units of a file's columns, on the host in float64: value = shift + spread * deviation.

    `spread[vars]` is the power of two nearest to the deviation over the observational rows and
    `shift[vars]` a multiple of it near their mean, so that nothing is lost on the way to deviations
    and back. `digits` are the decimals that each column is written with (negative: tens, hundreds).
    """

    shift: np.ndarray
    spread: np.ndarray
    digits: tuple[int, ...]

    def deviations(self, values: np.ndarray) -> np.ndarray:
        """`values[..., vars]` in deviations, float32."""
        return ((values - self.shift) / self.spread).astype(np.float32)

    def raw(self, deviations: np.ndarray | Array) -> np.ndarray:
        """`deviations[..., vars]` in the columns' own units, float64."""
        return self.shift + self.spread * np.asarray(deviations, float)

    def far(self, values: np.ndarray) -> np.ndarray:
        """Which of `values[..., vars]`, in the columns' own units, are too far out for float32."""
        return np.abs(values - self.shift) > FARTHEST_VALUE * self.spread

    def written(self, variable: int, value: np.floating) -> float:
        """One value, given as a finite float32 deviation, in its column's unit and with its digits,
        or with as many more as it takes to read the same deviation again.
        """
        shift, spread = self.shift[variable], self.spread[variable]
        raw = float(shift + spread * float(value))
        # + 0: no -0
        rounded = (round(raw, d) + 0.0 for d in itertools.count(self.digits[variable]))
        return next(x for x in rounded if x == raw or np.float32((x - shift) / spread) == value)


def deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation of each column of `values[samples, vars]`; squares of tiny numbers do not
    vanish.
    """
    centred = values - values.mean(0)
    largest = np.abs(centred).max(0)
    return largest * (centred / np.where(largest > 0, largest, 1.0)).std(0)


def decimals(cell: str) -> int:
    """How many decimals a number is written with; negative where its last digit stands for tens or
    more.
    """
    exponent = Decimal(cell.strip(), Context(traps=[])).as_tuple().exponent
    # no int: an exponent of twenty digits, where float64 has read zero
    return -exponent if isinstance(exponent, int) else 0


def parse_number(cell: str, name: str, path: Path, line: int) -> float:
    """A finite number, or a `DataError` that says where it is not one."""
    where = f"{path}, row {line}, column '{name}'"
    try:
        number = float(cell)
    except ValueError:
        raise DataError(f"{where}: '{cell}' is not a number: correct or remove the row") from None
    if not math.isfinite(number) or abs(number) > 1e30:  # no unit of anything
        raise DataError(
            f"{where}: '{cell}' is not a finite number below 1e30: correct a typing error, or use "
            "another unit"
        )
    return number


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header of a CSV file, and its rows with their line numbers, blank lines left out; raises
    `DataError` where it is missing, empty or ragged.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: give the path of a CSV file") from None
    except (OSError, ValueError, csv.Error) as error:  # also no UTF-8, or a NUL byte in the name
        raise DataError(
            f"{path}: cannot be read as CSV ({getattr(error, 'strerror', error)}): "
            "give a file of comma-separated UTF-8 text"
        ) from None
    if not rows:
        raise DataError(f"{path}: empty: the first row names the columns")
    names = [name.strip() for name in rows[0][1]]
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            raise DataError(
                f"{path}, row 1, column name '{name}' is empty or used twice: "
                "name every column once"
            )
        if ";" in name:
            raise DataError(
                f"{path}, row 1, column name '{name}' holds ';', which separates variables that "
                "were set together: rename the column, or save the file as comma-separated text"
            )
    for line, row in rows[1:]:
        if len(row) != len(names):
            raise DataError(
                f"{path}, row {line}: {len(row)} cells, but the header has "
                f"{len(names)} columns: complete the row"
            )
    return names, rows[1:]


def read_bounds(path: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lows and highs `[vars]`, float64 in the columns' own units, from a CSV with columns
    `variable,low,high`; a variable that it does not list gets no range (both zero).
    """
    header, rows = read_table(path)
    if header != ["variable", "low", "high"]:
        raise DataError(
            f"{path}, row 1: the columns are {', '.join(header)}; write variable,low,high"
        )
    low, high = np.zeros(len(names)), np.zeros(len(names))
    for line, (name, a, b) in rows:
        if name.strip() not in names:
            raise DataError(
                f"{path}, row {line}, column 'variable': '{name}' is not in the data; "
                f"the variables are {', '.join(names)}"
            )
        i = names.index(name.strip())
        if low[i] < high[i]:
            raise DataError(
                f"{path}, row {line}, column 'variable': '{name}' has a range "
                "already: keep one of the two"
            )
        low[i], high[i] = parse_number(a, "low", path, line), parse_number(b, "high", path, line)
        if low[i] >= high[i]:
            raise DataError(
                f"{path}, row {line}, columns 'low' and 'high': {a} is not below {b}: "
                "a range needs positive width"
            )
    return low, high
