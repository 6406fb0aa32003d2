"""Ridge regression of the target on powers of all other variables, from sums over rows: what the
evidence reads and what the baselines predict with.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse


# against standardised columns: keeps copies of a variable solvable, and moves nothing else
LINEAR_PENALTY = 0.01


# against effects at the ends of a range: the best of 0.1 to 3 on random models with 8 variables and
# 48 to 200 rows
CUBIC_PENALTY = 0.5


def regression_surface(
    moments: Float[Array, "columns columns"],
    target: Int[Array, ""],
    location: Float[Array, " vars"],
    scale: Float[Array, " vars"],
    grid: Float[Array, "vars bins"],
    penalty: Float[Array, " weights"],
) -> Float[Array, "vars bins"]:
    """Mean prediction of Y ~ intercept + sum_j sum_p weights[j, p] u_j^p, u = (X - location) /
    scale, with X_i at `grid[i, b]` and all other variables as in the fitted rows.

    Least squares plus `penalty`, per weight, times the squared weights, with a free intercept, from
    the rows' `regression_moments`.
    """
    mean, centred = moments[0] / jnp.maximum(moments[0, 0], 1.0), centred_moments(moments)
    num_vars, degree = len(location), len(penalty) // len(location)
    # the target must not explain itself
    used = jnp.repeat(jnp.arange(num_vars) != target, degree)
    gram = jnp.where(used[:, None] & used[None], centred[1:-1, 1:-1], 0.0) + jnp.diag(penalty)
    weights = positive_inverse(gram) @ jnp.where(used, centred[1:-1, -1], 0.0)
    weights, centre = (x.reshape(num_vars, 1, degree) for x in (weights, mean[1:-1]))
    powers = powers_of((grid - location[:, None]) / scale[:, None], degree)
    return mean[-1] + ((powers - centre) * weights).sum(-1)


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
    moments: Float[Array, "columns columns"],
) -> Float[Array, "columns columns"]:
    """Sums of products about the means, from those of rows whose first column is one."""
    count = jnp.maximum(moments[0, 0], 1.0)
    mean = moments[0] / count
    return moments - count * mean[:, None] * mean[None]


def column_moments(
    x: Float[Array, "samples *rest"], rows: Bool[Array, " samples"]
) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Mean and standard deviation over `rows`; the deviation of a constant column is given as 1."""
    count, kept = jnp.maximum(rows.sum(), 1), rows.reshape(-1, *(1,) * (x.ndim - 1))
    mean = jnp.where(kept, x, 0.0).sum(0) / count
    deviation = jnp.sqrt(jnp.where(kept, (x - mean[None]) ** 2, 0.0).sum(0) / count)
    varies = deviation > 1e-6 * jnp.abs(mean)  # relative: no unit is too small
    # a constant is its first row to the last digit, which its sum may not be
    return jnp.where(varies, mean, x[jnp.argmax(rows)]), jnp.where(varies, deviation, 1.0)


def powers_of(z: Float[Array, "*shape"], degree: int) -> Float[Array, "*shape powers"]:
    return z[..., None] ** jnp.arange(1, degree + 1).reshape((1,) * z.ndim + (degree,))


def usable_rows(buffer: ExperienceBuffer, target: Int[Array, ""]) -> Bool[Array, " samples"]:
    """Filled rows in which the target was not set."""
    return buffer.valid & ~jnp.take(buffer.intervened, target, axis=1)
