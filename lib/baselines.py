"""What a good statistician would do without a causal model: rules that choose the next experiment,
and scores of who the target's parents are.

Everything sees one problem and fixed-size arrays (`vmap` over problems). Rows in which the target
itself was set are never used. Padded variables, whose column is constant, get no weight and no
degree of freedom.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.regression import (
    CUBIC_PENALTY,
    LINEAR_PENALTY,
    column_moments,
    fitted_surface,
    usable_rows,
)
from lib.scm import Task, value_grid


TEST_DEGREE = 3
# a power of a variable that adds less than this share of its norm is a copy of the lower ones
RANK_TOLERANCE = 1e-3
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
    return best_on_grid(least_squares_surface(buffer, task, 2), task)


def additive_ridge(buffer: ExperienceBuffer, task: Task) -> Choice:
    """The least prediction of an additive cubic regression over 33 values of every candidate."""
    return best_on_grid(additive_ridge_surface(buffer, task, 33), task)


def least_squares_surface(
    buffer: ExperienceBuffer, task: Task, bins: int
) -> Float[Array, "vars bins"]:
    """Predicted E[Y | do(X_i = v)] over `value_grid(low, high, bins)`, if all other variables were
    direct linear causes of the target.
    """
    location, scale = column_moments(buffer.values, usable_rows(buffer, task.target))
    grid = value_grid(task.low, task.high, bins)
    return fitted_surface(buffer, task.target, location, scale, grid, 1, LINEAR_PENALTY)


def additive_ridge_surface(
    buffer: ExperienceBuffer, task: Task, bins: int
) -> Float[Array, "vars bins"]:
    """The same with a cubic of every variable.

    Each variable is scaled so that its range of intervention is [-1, 1]: the penalty is then on its
    effect at the ends of the range, and cubics do not explode where there are few rows. A variable
    without a range is scaled by its own deviation.
    """
    low, high = task.low, task.high
    mean, deviation = column_moments(buffer.values, usable_rows(buffer, task.target))
    location = jnp.where(high > low, 0.5 * (low + high), mean)
    scale = jnp.where(high > low, 0.5 * (high - low), 2.0 * deviation)
    grid = value_grid(low, high, bins)
    return fitted_surface(buffer, task.target, location, scale, grid, 3, CUBIC_PENALTY)


def best_on_grid(surface: Float[Array, "vars bins"], task: Task) -> Choice:
    """Candidate (there must be one) and value of the least entry of a surface, whose values are
    `value_grid(low, high, bins)`.
    """
    least = jnp.argmin(jnp.where(task.candidates[:, None], surface, jnp.inf))
    variable, index = jnp.unravel_index(least, surface.shape)
    return variable, value_grid(task.low, task.high, surface.shape[1])[variable, index]


# --- who are the parents: scores in [0, 1], zero for the target and for padding ---


def all_ones(buffer: ExperienceBuffer, task: Task) -> Float[Array, " vars"]:
    """Everything is a parent: the F1 that costs nothing."""
    return task.possible_parents.astype(buffer.values.dtype)


def standardised(
    buffer: ExperienceBuffer, task: Task
) -> tuple[Float[Array, "samples vars"], Bool[Array, " samples"]]:
    """Values in deviations from their means over the usable rows, zero in all others; and which
    rows these are.
    """
    rows = usable_rows(buffer, task.target)
    location, scale = column_moments(buffer.values, rows)
    return jnp.where(rows[:, None], (buffer.values - location[None]) / scale[None], 0.0), rows


def absolute_correlation(buffer: ExperienceBuffer, task: Task) -> Float[Array, " vars"]:
    """|Pearson correlation| of each variable with the target."""
    z, rows = standardised(buffer, task)
    correlation = jnp.take(z, task.target, axis=1) @ z / jnp.maximum(rows.sum(), 1)
    return jnp.where(task.possible_parents, jnp.minimum(jnp.abs(correlation), 1.0), 0.0)


def f_test(buffer: ExperienceBuffer, task: Task) -> Float[Array, " vars"]:
    """Evidence of the partial F-test: s / (1 + s) with s = -log10 p, because 1 - p would round to
    one. The test p < 1e-6 is score > 6 / 7.
    """
    evidence = -f_test_log_p(buffer, task) / jnp.log(10.0)
    return evidence / (1.0 + evidence)


def f_test_log_p(buffer: ExperienceBuffer, task: Task) -> Float[Array, " vars"]:
    """Natural log of the p-value of each variable's powers 1 to 3 in the regression of the target
    on those of all others; 0 for target and padding.

    A variable with k distinct values has at most k - 1 powers. With no degree of freedom left for
    the residual there is no evidence: log p is 0.
    """
    (z, rows), tested = standardised(buffer, task), task.possible_parents
    x, y = jnp.where(tested[None], z, 0.0), jnp.take(z, task.target, axis=1)
    basis = jax.vmap(orthogonal_powers, (1, None), 1)(x, rows)  # samples vars powers
    rank = (jnp.abs(basis).max(0) > 0).sum(1)

    size = basis.shape[1] * TEST_DEGREE
    design = basis.reshape(-1, size)
    # the columns have norm 1 or 0
    inverse = positive_inverse(design.T @ design + 1e-6 * jnp.eye(size))
    weights = inverse @ (design.T @ y)
    residual = jnp.square(y - design @ weights).sum()
    variable = jnp.arange(basis.shape[1])
    blocks = inverse.reshape(-1, TEST_DEGREE, basis.shape[1], TEST_DEGREE)[variable, :, variable]
    w = weights.reshape(-1, TEST_DEGREE)
    # what leaving the variable out adds to the residual
    reduction = jnp.einsum("ip,ipq,iq->i", w, jax.vmap(positive_inverse)(blocks), w)

    freedom = rows.sum() - 1 - rank.sum()
    a, b = 0.5 * jnp.maximum(freedom, 1), 0.5 * jnp.maximum(rank, 1)
    # = 1 / (1 + F rank / freedom)
    share = jnp.clip(residual / (residual + jnp.maximum(reduction, 0.0)), 1e-30, 1.0)
    p = jsp.special.betainc(a, b, share)
    # Below the range of float32: the leading term of the incomplete beta function, whose error is
    # of order b / a.
    tail = (
        a * jnp.log(share)
        + (b - 1.0) * jnp.log1p(-jnp.minimum(share, 0.9))
        - jnp.log(a)
        - jsp.special.betaln(a, b)
    )
    log_p = jnp.where(p > 1e-30, jnp.log(jnp.maximum(p, 1e-30)), tail)
    return jnp.where(tested & (rank > 0) & (freedom > 0), jnp.minimum(log_p, 0.0), 0.0)


def orthogonal_powers(
    z: Float[Array, " samples"], rows: Bool[Array, " samples"]
) -> Float[Array, "samples powers"]:
    """Orthonormal columns, orthogonal to the constant, that span the powers 1 to `TEST_DEGREE` of
    `z`; zero columns where a power adds nothing.
    """
    weight = rows.astype(z.dtype)
    columns = [weight / jnp.sqrt(jnp.maximum(weight.sum(), 1.0))]
    for _ in range(TEST_DEGREE):
        # Stieltjes: z times the last column spans the next power, and is far better conditioned
        # than z ** p
        power = z * columns[-1]
        residual = power
        for column in columns * 2:  # twice is enough (Kahan)
            residual = residual - (column @ residual) * column
        norm = jnp.linalg.norm(residual)
        kept = norm > RANK_TOLERANCE * jnp.maximum(jnp.linalg.norm(power), 1e-12)
        columns.append(jnp.where(kept, residual / jnp.where(kept, norm, 1.0), 0.0))
    return jnp.stack(columns[1:], 1)
