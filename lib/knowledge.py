"""What a person knows beside the data: who can be a parent, what comes before what, and limits on
settings.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lib.reading import Experience
from lib.scm import Task
from lib.table import DataError, find, number_of, read_table


Edges = tuple[tuple[int, ...], tuple[int, ...]]  # variables that are parents, and that are none
LIMIT = re.compile(r"(.+?)(<=|>=|=)(.+)")
TERM = re.compile(r"\s*([-+]?)\s*(\d+(?:\.\d*)?|\.\d+)?\s*\*?\s*([^\s*+-].*?)\s*")


def index_of(name: str, data: Experience, where: str) -> int:
    """A variable beside the target; `DataError` for any other name."""
    found = find(name, list(data.names))
    others = [one for i, one in enumerate(data.names) if i != data.target]
    if found not in others:
        raise DataError(f"{where}: '{name}' is none of the variables {', '.join(others)}")
    return data.names.index(found)


def known_edges(
    data: Experience, require: Sequence[str], forbid: Sequence[str], tiers: Path | None
) -> tuple[Experience, Edges]:
    """Variables that are parents of the target and that are none. Those of a later tier than the
    target (a CSV `variable,tier`, causes before effects) are none and cannot move it, so that the
    ranges lack them.

    Raises `DataError` for what is no variable, for contradictions and for a file that does not fit.
    """
    required = tuple(index_of(name, data, "--require") for name in require)
    forbidden = tuple(index_of(name, data, "--forbid") for name in forbid)
    if tiers:
        table = read_table(tiers, strict=True)
        if [name.lower() for name in table.names] != ["variable", "tier"]:
            raise DataError(f"{tiers}, row 1: write variable,tier")
        tier = {}
        for line, (name, cell) in zip(table.lines, table.rows, strict=True):
            found, number = find(name, list(data.names)), number_of(cell, table.comma)[0]
            if found is None or np.isnan(number):
                raise DataError(
                    f"{tiers}, row {line}: '{name}', '{cell}': write a variable and its tier, a "
                    f"number; the variables are {', '.join(data.names)}"
                )
            tier[found] = number
        if (own := tier.get(data.names[data.target])) is None:
            raise DataError(f"{tiers}: '{data.names[data.target]}' is not listed: give its tier")
        later = np.array([tier.get(name, own) > own for name in data.names])
        forbidden = tuple(sorted({*forbidden, *np.flatnonzero(later).tolist()}))
        data = with_ranges(data, data.low, data.high, ~later, f"{tiers}")
    if both := set(required) & set(forbidden):
        names = ", ".join(data.names[i] for i in sorted(both))
        raise DataError(f"--require: {names}: cannot be parents and none: leave out one")
    return data, (required, forbidden)


def with_ranges(data: Experience, low, high, kept, where: str) -> Experience:
    """The data with ranges from `low` to `high` `[vars]`, in the columns' units, for the variables
    that are `kept` and had one; `DataError` if there is none.
    """
    task, both = data.task, np.stack([low, high])
    which = np.asarray(task.candidates) & kept & (low <= high)
    if not which.any():
        raise DataError(f"{where}: forbids every single setting: there is nothing to suggest")
    narrower = which & ((low > data.low) | (high < data.high))
    ends = [
        jnp.asarray(np.where(narrower, new, np.where(which, old, 0.0)), jnp.float32)
        for new, old in zip(data.units.exact(both), (task.low, task.high), strict=True)
    ]
    bounds = {
        i: b._replace(values=tuple(v for v in b.values if low[i] <= v <= high[i]))
        for i, b in data.bounds.items()
    }
    task = Task(task.target, *ends, task.var_mask)  # pyright: ignore
    return data._replace(low=both[0], high=both[1], task=task, bounds=bounds)


def within(data: Experience, constraints: Sequence[str]) -> Experience:
    """The data with ranges in which every constraint, such as `a + 2 b <= 1`, holds while all other
    settings are at their usual values.

    Raises `DataError` for one that cannot be read, and where no single setting is left.
    """
    low, high = data.low.copy(), data.high.copy()
    observed = np.asarray(data.buffer.observational)
    usual = data.units.raw(np.asarray(data.buffer.values)[observed].mean(0))
    kept = np.ones(len(low), bool)
    for text in constraints:
        where, match = f"--constraint '{text}'", LIMIT.fullmatch(text)
        total = number_of(match[3].strip(), False)[0] if match else np.nan
        if match is None or np.isnan(total):
            raise DataError(f"{where}: write a sum and its limit, such as 'a + 2 b <= 1'")
        factors = np.zeros(len(low))
        for part in re.findall(r"[-+]?[^-+]+", match[1]):
            term = TERM.fullmatch(part)
            if term is None:
                raise DataError(f"{where}: '{part.strip()}' is not a number times a variable")
            factors[index_of(term[3], data, where)] += float(f"{term[1]}{term[2] or 1}")
        for i in np.flatnonzero(factors):
            limit = (total - factors @ usual + factors[i] * usual[i]) / factors[i]
            if match[2] == "=":
                kept[i] = False
            elif (match[2] == "<=") == (factors[i] > 0):
                high[i] = min(high[i], limit)
            else:
                low[i] = max(low[i], limit)
    return with_ranges(data, low, high, kept, "--constraint") if constraints else data
