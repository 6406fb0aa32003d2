"""What a good statistician would do without a causal model: rules that choose the next experiment,
and scores of who the target's parents are.

Everything sees one problem and fixed-size arrays (`vmap` over problems). Rows in which the target
itself was set are never used. Padded variables, whose column is constant, get no weight and no
degree of freedom.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.scm import value_grid


# against standardised columns: keeps copies of a variable solvable, and moves nothing else
LINEAR_PENALTY = 0.01
# against effects at the ends of a range: the best of 0.1 to 3 on random models with 8 variables and
# 48 to 200 rows
CUBIC_PENALTY = 0.5
TEST_DEGREE = 3
# a power of a variable that adds less than this share of its norm is a copy of the lower ones
RANK_TOLERANCE = 1e-3
Choice = tuple[Int[Array, ""], Float[Array, ""]]


# --- which experiment next ---


def random_choice(
    key: Key[Array, ""],
    low: Float[Array, " vars"],
    high: Float[Array, " vars"],
    candidates: Bool[Array, " vars"],
) -> Choice:
    """A uniform variable among `candidates` (not empty) and a uniform value in its range."""
    variable_key, value_key = jr.split(key)
    variable = jr.categorical(variable_key, jnp.where(candidates, 0.0, -jnp.inf))
    return variable, low[variable] + (high - low)[variable] * jr.uniform(value_key)


def least_squares(
    buffer: ExperienceBuffer,
    target: Int[Array, ""],
    low: Float[Array, " vars"],
    high: Float[Array, " vars"],
    candidates: Bool[Array, " vars"],
) -> Choice:
    """The end of a range where a linear regression of the target on all other variables predicts
    least: the steepest variable, at its better end.
    """
    return best_on_grid(least_squares_surface(buffer, target, low, high, 2), low, high, candidates)


def additive_ridge(
    buffer: ExperienceBuffer,
    target: Int[Array, ""],
    low: Float[Array, " vars"],
    high: Float[Array, " vars"],
    candidates: Bool[Array, " vars"],
    num_values: int = 33,
) -> Choice:
    """The least prediction of an additive cubic regression over `num_values` values of every
    candidate.
    """
    return best_on_grid(
        additive_ridge_surface(buffer, target, low, high, num_values), low, high, candidates
    )


def least_squares_surface(
    buffer: ExperienceBuffer,
    target: Int[Array, ""],
    low: Float[Array, " vars"],
    high: Float[Array, " vars"],
    bins: int,
) -> Float[Array, "vars bins"]:
    """Predicted E[Y | do(X_i = v)] over `value_grid(low, high, bins)`, if all other variables were
    direct linear causes of the target.
    """
    location, scale = column_moments(buffer.values, usable_rows(buffer, target))
    return AdditiveRegression.fit(buffer, target, location, scale, 1, LINEAR_PENALTY).surface(
        value_grid(low, high, bins)
    )


def additive_ridge_surface(
    buffer: ExperienceBuffer,
    target: Int[Array, ""],
    low: Float[Array, " vars"],
    high: Float[Array, " vars"],
    bins: int,
) -> Float[Array, "vars bins"]:
    """The same with a cubic of every variable.

    Each variable is scaled so that its range of intervention is [-1, 1]: the penalty is then on its
    effect at the ends of the range, and cubics do not explode where there are few rows. A variable
    without a range is scaled by its own deviation.
    """
    mean, deviation = column_moments(buffer.values, usable_rows(buffer, target))
    location = jnp.where(high > low, 0.5 * (low + high), mean)
    scale = jnp.where(high > low, 0.5 * (high - low), 2.0 * deviation)
    return AdditiveRegression.fit(buffer, target, location, scale, 3, CUBIC_PENALTY).surface(
        value_grid(low, high, bins)
    )


def best_on_grid(
    surface: Float[Array, "vars bins"],
    low: Float[Array, " vars"],
    high: Float[Array, " vars"],
    candidates: Bool[Array, " vars"],
) -> Choice:
    """Variable and value of the least entry of a surface over `value_grid(low, high, bins)`, among
    `candidates` (not empty).
    """
    variable, index = jnp.unravel_index(
        jnp.argmin(jnp.where(candidates[:, None], surface, jnp.inf)), surface.shape
    )
    return variable, value_grid(low, high, surface.shape[1])[variable, index]


class AdditiveRegression(eqx.Module):
    """Y ~ intercept + sum_j sum_p weights[j, p] u_j^p with u = (X - location) / scale, fitted by
    ridge regression with a free intercept.
    """

    intercept: Float[Array, ""]
    weights: Float[Array, "vars powers"]
    location: Float[Array, " vars"]
    scale: Float[Array, " vars"]
    centre: Float[Array, "vars powers"]  # mean of each power over the fitted rows

    @staticmethod
    def fit(
        buffer: ExperienceBuffer,
        target: Int[Array, ""],
        location: Float[Array, " vars"],
        scale: Float[Array, " vars"],
        degree: int,
        penalty: float,
    ) -> "AdditiveRegression":
        """Least squares plus `penalty` times the squared weights, over the rows where the target
        was not set.
        """
        rows, y = usable_rows(buffer, target), jnp.take(buffer.values, target, axis=1)
        level, _ = column_moments(y, rows)
        moments = regression_moments(
            (buffer.values - location[None]) / scale[None], y - level, rows, degree
        )
        return AdditiveRegression.solve(
            moments, target, location, scale, level, jnp.full(degree * len(location), penalty)
        )

    @staticmethod
    def solve(
        moments: Float[Array, "columns columns"],
        target: Int[Array, ""],
        location: Float[Array, " vars"],
        scale: Float[Array, " vars"],
        level: Float[Array, ""] | float,
        penalty: Float[Array, " weights"],
    ) -> "AdditiveRegression":
        """The regression from the rows' `regression_moments`, whose y had `level` subtracted;
        `penalty` per weight.
        """
        count, num_vars = jnp.maximum(moments[0, 0], 1.0), location.shape[0]
        mean = moments[0] / count
        centred = moments - count * mean[:, None] * mean[None]
        degree = penalty.shape[0] // num_vars
        # the target must not explain itself
        used = jnp.repeat(jnp.arange(num_vars) != target, degree)
        gram = jnp.where(used[:, None] & used[None], centred[1:-1, 1:-1], 0.0) + jnp.diag(penalty)
        weights = positive_inverse(gram) @ jnp.where(used, centred[1:-1, -1], 0.0)
        return AdditiveRegression(
            level + mean[-1],
            weights.reshape(num_vars, degree),
            location,
            scale,
            mean[1:-1].reshape(num_vars, degree),
        )

    def surface(self, grid: Float[Array, "vars bins"]) -> Float[Array, "vars bins"]:
        """Mean prediction with X_i at `grid[i, b]` and all other variables as in the fitted
        rows.
        """
        powers = powers_of(
            (grid - self.location[:, None]) / self.scale[:, None], self.weights.shape[1]
        )
        return self.intercept + ((powers - self.centre[:, None]) * self.weights[:, None]).sum(-1)


def regression_moments(
    u: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    rows: Bool[Array, " samples"],
    degree: int,
) -> Float[Array, "columns columns"]:
    """Sum over the marked rows of the outer product of [1, powers of every u, y]: one more row is
    one more term.
    """
    columns = jnp.concatenate(
        [jnp.ones((len(y), 1)), powers_of(u, degree).reshape(len(y), -1), y[:, None]], 1
    )
    columns = jnp.where(rows[:, None], columns, 0.0)
    return columns.T @ columns


# --- who are the parents: scores in [0, 1], zero for the target and for padding ---


def all_ones(
    buffer: ExperienceBuffer, target: Int[Array, ""], var_mask: Bool[Array, " vars"]
) -> Float[Array, " vars"]:
    """Everything is a parent: the F1 that costs nothing."""
    return others(target, var_mask).astype(buffer.values.dtype)


def absolute_correlation(
    buffer: ExperienceBuffer, target: Int[Array, ""], var_mask: Bool[Array, " vars"]
) -> Float[Array, " vars"]:
    """|Pearson correlation| of each variable with the target."""
    rows = usable_rows(buffer, target)
    location, scale = column_moments(buffer.values, rows)
    z = jnp.where(rows[:, None], (buffer.values - location[None]) / scale[None], 0.0)
    correlation = jnp.take(z, target, axis=1) @ z / jnp.maximum(rows.sum(), 1)
    return jnp.where(others(target, var_mask), jnp.minimum(jnp.abs(correlation), 1.0), 0.0)


def f_test(
    buffer: ExperienceBuffer, target: Int[Array, ""], var_mask: Bool[Array, " vars"]
) -> Float[Array, " vars"]:
    """Evidence of the partial F-test: s / (1 + s) with s = -log10 p, because 1 - p would round to
    one. The test p < 1e-6 is score > 6 / 7.
    """
    evidence = -f_test_log_p(buffer, target, var_mask) / jnp.log(10.0)
    return evidence / (1.0 + evidence)


def f_test_log_p(
    buffer: ExperienceBuffer, target: Int[Array, ""], var_mask: Bool[Array, " vars"]
) -> Float[Array, " vars"]:
    """Natural log of the p-value of each variable's powers 1 to 3 in the regression of the target
    on those of all others; 0 for target and padding.

    A variable with k distinct values has at most k - 1 powers. With no degree of freedom left for
    the residual there is no evidence: log p is 0.
    """
    rows, tested = usable_rows(buffer, target), others(target, var_mask)
    x = jnp.where(tested, buffer.values, 0.0)
    location, scale = column_moments(x, rows)
    z = jnp.where(rows[:, None], (x - location[None]) / scale[None], 0.0)
    basis = jax.vmap(orthogonal_powers, (1, None), 1)(z, rows)  # samples vars powers
    rank = (jnp.abs(basis).max(0) > 0).sum(1)
    y = jnp.take(buffer.values, target, axis=1)
    mean, deviation = column_moments(y, rows)
    y = jnp.where(rows, (y - mean) / deviation, 0.0)

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


# --- columns and matrices ---


def usable_rows(buffer: ExperienceBuffer, target: Int[Array, ""]) -> Bool[Array, " samples"]:
    """Filled rows in which the target was not set."""
    return buffer.valid & ~jnp.take(buffer.intervened, target, axis=1)


def others(target: Int[Array, ""], var_mask: Bool[Array, " vars"]) -> Bool[Array, " vars"]:
    return var_mask & (jnp.arange(var_mask.shape[0]) != target)


def column_moments(
    x: Float[Array, "samples *rest"], rows: Bool[Array, " samples"]
) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Mean and standard deviation over `rows`; the deviation of a constant column is given as 1."""
    weight = rows.astype(x.dtype) / jnp.maximum(rows.sum(), 1)
    mean = jnp.tensordot(weight, x, 1)
    deviation = jnp.sqrt(jnp.tensordot(weight, jnp.square(x - mean[None]), 1))
    return mean, jnp.where(deviation > 1e-6 * jnp.abs(mean), deviation, 1.0)


def powers_of(z: Float[Array, "*shape"], degree: int) -> Float[Array, "*shape powers"]:
    return z[..., None] ** jnp.arange(1, degree + 1).reshape((1,) * z.ndim + (degree,))


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
