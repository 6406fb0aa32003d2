"""What a person knows beside the data: who can be a parent, what comes before what, and limits on
settings.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lib.reading import Experience, task_of
from lib.table import demand, find, number_of, read_table, refuse


TERM = r"\s*([-+]?)\s*(\d+(?:\.\d*)?|\.\d+)?\s*\*?\s*(%s)\s*"


def variable_index(name: str, data: Experience, where: str, but: int) -> int:
    """A variable, save the one at `but`; `DataError` for any other name."""
    others = [one for i, one in enumerate(data.names) if i != but]
    found = find(name, others)
    demand(found, f"{where}: '{name}' is none of the variables {', '.join(others)}")
    return data.names.index(found)


def edges_of(texts: Sequence[str], data: Experience, where: str) -> np.ndarray:
    """Edges `[vars, vars]`, each as `a -> b` or as the name of a cause of the target."""
    found = np.zeros((len(data.names),) * 2, bool)
    for text in texts:
        cause, arrow, effect = map(str.strip, text.partition("->"))
        j = variable_index(effect, data, where, -1) if arrow else data.target
        found[variable_index(cause, data, where, j), j] = True
    return found


def known_edges(
    data: Experience, require: Sequence[str], forbid: Sequence[str], tiers: Any
) -> Experience:
    """The data with a task that knows which edges are there and which are not. Of tiers (a table
    `variable,tier`, or a dict; causes before effects) no edge goes from a later to an earlier one;
    what is of a later one than the target cannot move it, so that the ranges lack it.

    Raises `DataError` for what is no variable, for contradictions and for a file that does not fit.
    """
    required = edges_of(require, data, "--require")
    forbidden = edges_of(forbid, data, "--forbid")
    if tiers is not None:
        if isinstance(tiers, Mapping) and "variable" not in tiers:
            tiers = {"variable": list(tiers), "tier": list(tiers.values())}
        table, names, target = read_table(tiers, strict=True), data.names, data.names[data.target]
        demand(
            [name.lower() for name in table.names] == ["variable", "tier"],
            f"{table.where}, row 1: write variable,tier",
        )
        tier = {find(name, names): number_of(cell, table.comma)[0] for name, cell in table.rows}
        refuse(
            [
                f"{table.where}, row {line}: '{name}', '{cell}': write a variable and its tier, a "
                f"number; the variables are {', '.join(names)}"
                for line, (name, cell) in zip(table.lines, table.rows, strict=True)
                if not find(name, names) or np.isnan(number_of(cell, table.comma)[0])
            ]
        )
        demand(target in tier, f"{table.where}: '{target}' is not listed: give its tier")
        place = np.array([tier.get(name, np.nan) for name in names])
        later = place[:, None] > place[None]
        forbidden |= later
        data = with_ranges(data, data.low, data.high, ~later[:, data.target], table.where)
    # which variables required edges lead to, by paths
    reached = np.linalg.matrix_power(required + np.eye(len(required)), len(required)) > 0
    refuse(
        [
            f"--require: {data.names[i]} -> {data.names[j]}: {why}: leave out one"
            for why, wrong in (
                ("cannot be there and be forbidden, by --forbid or by tiers", forbidden),
                ("is part of a cycle", reached.T),
            )
            for i, j in np.argwhere(required & wrong)
        ]
    )
    known = np.int32(required) - forbidden
    known = jnp.asarray(known) if known.any() else None
    return data._replace(task=replace(data.task, known=known))


def with_ranges(data: Experience, low, high, kept, where: str) -> Experience:
    """The data with ranges from `low` to `high` `[vars]`, in the columns' units, for the variables
    that are `kept` and had one; where there is none, all stay and the data are `blocked`.
    """
    bounds = {
        i: b._replace(values=tuple(v for v in b.values if low[i] <= v <= high[i]))
        for i, b in data.bounds.items()
    }
    which = np.asarray(data.task.candidates) & kept & (low <= high)
    which[[i for i, b in bounds.items() if data.bounds[i].values and not b.values]] = False
    if not which.any():
        return data._replace(blocked=f"{where} forbids every setting of one variable alone")
    task = task_of(data.units, low, high, which, data.target)
    return data._replace(low=low, high=high, task=task, bounds=bounds)


def within(data: Experience, constraints: Sequence[str]) -> Experience:
    """The data with ranges in which every constraint, such as `a + 2 b <= 1`, holds while all other
    settings are at their usual values.

    Raises `DataError` for one that cannot be read.
    """
    low, high, kept = data.low, data.high, np.ones(len(data.names), bool)
    observed = np.asarray(data.buffer.values)[np.asarray(data.buffer.observational)]
    usual = data.units.raw(observed.mean(0))
    others = sorted((x for x in data.names if x != data.names[data.target]), key=len, reverse=True)
    one = TERM % "|".join(r"\s+".join(map(re.escape, name.split())) for name in others)
    for text in constraints:
        where, parts = f"--constraint '{text}'", re.split("([<>]=|=[<>]|[≤≥<>=])", text, maxsplit=1)
        total, _, _, limit = number_of(parts[-1].strip(), False)
        demand(
            len(parts) == 3 and parts[0].strip() and not np.isnan(total) and not limit,
            f"{where}: write a sum and its limit, such as 'a + 2 b <= 1'",
        )
        terms = list(re.finditer(one, parts[0], re.IGNORECASE))
        demand(
            "".join(term[0] for term in terms) == parts[0] and all(term[1] for term in terms[1:]),
            f"{where}: '{parts[0].strip()}' is no sum of numbers times variables; these are "
            f"{', '.join(others)}",
        )
        which = [variable_index(term[3], data, where, data.target) for term in terms]
        numbers = [float(f"{term[1]}{term[2] or 1}") for term in terms]
        factors = np.bincount(which, numbers, minlength=len(usual))
        # of each variable alone, others being as usual; NaN for those that the limit does not name
        rest = total - factors @ usual + factors * usual
        limit = np.divide(rest, factors, where=factors != 0, out=np.full(len(usual), np.nan))
        upper = (factors > 0) == any(sign in parts[1] for sign in "<≤")
        high = np.fmin(high, np.where(upper, limit, np.nan))
        low = np.fmax(low, np.where(upper, np.nan, limit))
        kept &= (factors == 0) | (parts[1] != "=")
    return with_ranges(data, low, high, kept, "--constraint") if constraints else data
