"""Ridge regression of the target on powers of all other variables, from sums over rows: what the
evidence reads and what the baselines predict with.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse


# against standardised columns: keeps copies of a variable solvable, and moves nothing else
LINEAR_PENALTY = 0.01


# against effects at the ends of a range: the best of 0.1 to 3 on random models with 8 variables and
# 48 to 200 rows
CUBIC_PENALTY = 0.5


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
        mean, centred = moments[0] / count, centred_moments(moments, count)
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
        """Mean prediction with X_i at `grid[i, b]`, all other variables as in the fitted rows."""
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


def centred_moments(
    moments: Float[Array, "columns columns"], count: Float[Array, ""]
) -> Float[Array, "columns columns"]:
    """Sums of products about the means, from those of `count` rows whose first column is one."""
    mean = moments[0] / jnp.maximum(count, 1.0)
    return moments - count * mean[:, None] * mean[None]


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


def usable_rows(buffer: ExperienceBuffer, target: Int[Array, ""]) -> Bool[Array, " samples"]:
    """Filled rows in which the target was not set."""
    return buffer.valid & ~jnp.take(buffer.intervened, target, axis=1)
