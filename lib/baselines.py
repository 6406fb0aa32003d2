"""What a good statistician would do without a causal model: rules that choose the next experiment,
and scores of who the target's parents are.

Everything sees one problem and fixed-size arrays (`vmap` over problems). Rows in which the target
itself was set are never used. Padded variables, whose column is constant, get no weight and no
degree of freedom.
"""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.pairs import target_test
from lib.regression import Scale, usable_rows
from lib.scm import Task
from lib.statistics import regression_surfaces
from lib.sums import Summary


Choice = tuple[Int[Array, ""], Float[Array, ""]]


# --- which experiment next ---


def random_choice(key: Key[Array, ""], task: Task) -> Choice:
    """A uniform candidate (there must be one) and a uniform value in its range."""
    variable_key, value_key = jr.split(key)
    variable = jr.categorical(variable_key, jnp.where(task.candidates, 0.0, -jnp.inf))
    return variable, task.low[variable] + (task.high - task.low)[variable] * jr.uniform(value_key)


def least_squares(buffer: ExperienceBuffer, task: Task) -> Choice:
    """The end of a range where a linear regression of the target on all other variables predicts
    least: the steepest variable, at its better end.
    """
    return task.highest(-surfaces(buffer, task, 2)[0])


def additive_ridge(buffer: ExperienceBuffer, task: Task) -> Choice:
    """The least prediction of an additive cubic regression over 33 values of every candidate."""
    return task.highest(-surfaces(buffer, task, 33)[1])


def surfaces(
    buffer: ExperienceBuffer, task: Task, bins: int
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Predicted E[Y | do(X_i = v)] over `value_grid(low, high, bins)`, in observational standard
    deviations of the target from its mean, if all other variables were direct causes: of a linear
    regression, and of an additive cubic one (`regression_surfaces`, which the surrogate sees too).
    """
    units, sums = Summary.of(buffer, task, bins)
    return regression_surfaces(sums.powers, units.grid, task)


# --- who are the parents: scores in [0, 1], zero for the target and for padding ---


def all_ones(buffer: ExperienceBuffer, task: Task) -> Float[Array, " vars"]:
    """Everything is a parent: all parents are found, and the F1 is what such a guess gets."""
    return task.possible_parents.astype(buffer.values.dtype)


def absolute_correlation(buffer: ExperienceBuffer, task: Task) -> Float[Array, " vars"]:
    """|Pearson correlation| of each variable with the target."""
    rows = usable_rows(buffer, task.target)
    z = jnp.where(rows[:, None], Scale.of(buffer.values, rows)(buffer.values), 0.0)
    correlation = jnp.take(z, task.target, axis=1) @ z / jnp.maximum(rows.sum(), 1)
    return jnp.where(task.possible_parents, jnp.minimum(jnp.abs(correlation), 1.0), 0.0)


def f_test(buffer: ExperienceBuffer, task: Task) -> Float[Array, " vars"]:
    """1 - 1 / sqrt(1 + F), F that of the three powers of a variable in the regression of the target
    on those of all others (`target_test` of lib/pairs.py, which the surrogate sees too).
    """
    return 1.0 - jnp.exp(-target_test(Summary.of(buffer, task, 2).sums.powers, task))
