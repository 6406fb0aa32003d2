"""Units of variables, and linear regression: ridge regression of the target on powers of all other
variables from sums over rows, which the evidence reads and the baselines predict with, and Bayesian
regression, whose evidence the expert and the check compare.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lib.buffer import ExperienceBuffer
from lib.linalg import inverse_and_log_det, positive_inverse


# against standardised columns: keeps copies of a variable solvable, and moves nothing else
LINEAR_PENALTY = 0.01


# against effects at the ends of a range: the best of 0.1 to 3 on random models with 8 variables and
# 48 to 200 rows
CUBIC_PENALTY = 0.5


class Scale(NamedTuple):
    """Units of variables: mean and standard deviation of every column over some rows."""

    shift: Float[Array, " vars"]
    spread: Float[Array, " vars"]

    @staticmethod
    def of(
        values: Float[Array, "samples vars"], rows: Bool[Array, " samples"] | bool = True
    ) -> "Scale":
        """Over `rows`, by default all of them; a constant column has spread 1."""
        rows = jnp.broadcast_to(rows, len(values))
        count, kept = jnp.maximum(rows.sum(), 1), rows[:, None]
        shift = jnp.where(kept, values, 0.0).sum(0) / count
        spread = jnp.sqrt(jnp.where(kept, (values - shift[None]) ** 2, 0.0).sum(0) / count)
        varies = spread > 1e-6 * jnp.abs(shift)  # relative: no unit is too small
        # a constant is its first row to the last digit, which its sum may not be
        first = values[jnp.argmax(rows)]
        return Scale(jnp.where(varies, shift, first), jnp.where(varies, spread, 1.0))

    def __call__(self, values: Float[Array, "samples vars"]) -> Float[Array, "samples vars"]:
        """Values in these units."""
        return (values - self.shift[None]) / self.spread[None]


# --- ridge regression of the target, from sums over rows ---


def regression_surface(
    moments: Float[Array, "columns columns"],
    target: Int[Array, ""],
    scale: Scale,
    grid: Float[Array, "vars bins"],
    penalty: Float[Array, " weights"],
) -> Float[Array, "vars bins"]:
    """Mean prediction of Y ~ intercept + sum_j sum_p weights[j, p] u_j^p, u = scale(X), with X_i at
    `grid[i, b]` and all other variables as in the fitted rows.

    Least squares plus `penalty`, per weight, times the squared weights, with a free intercept, from
    `moments`, the rows' sums of products of [1, powers of every u, Y].
    """
    mean, centred = moments[0] / jnp.maximum(moments[0, 0], 1.0), centred_moments(moments)
    num_vars, degree = len(grid), len(penalty) // len(grid)
    # the target must not explain itself
    used = jnp.repeat(jnp.arange(num_vars) != target, degree)
    weights, _ = ridge(centred, used, penalty)
    weights, centre = (x.reshape(num_vars, 1, degree) for x in (weights, mean[1:-1]))
    powers = powers_of(scale(grid.T).T, degree)
    return mean[-1] + ((powers - centre) * weights).sum(-1)


def ridge(
    centred: Float[Array, "columns columns"],
    used: Bool[Array, " weights"],
    penalty: Float[Array, " weights"],
) -> tuple[Float[Array, " weights"], Float[Array, "weights weights"]]:
    """Weights of the ridge regression of the last column on those between it and the first that
    are `used` (the others have weight zero), and the inverse of their penalised Gram matrix; from
    `centred_moments`.
    """
    gram = jnp.where(used[:, None] & used[None], centred[1:-1, 1:-1], 0.0)
    inverse = positive_inverse(gram + jnp.diag(penalty))
    return inverse @ jnp.where(used, centred[1:-1, -1], 0.0), inverse


def centred_moments(
    moments: Float[Array, "columns columns"],
) -> Float[Array, "columns columns"]:
    """Sums of products about the means, from those of rows whose first column is one."""
    count = jnp.maximum(moments[0, 0], 1.0)
    mean = moments[0] / count
    return moments - count * mean[:, None] * mean[None]


def powers_of(z: Float[Array, "*shape"], degree: int) -> Float[Array, "*shape powers"]:
    return z[..., None] ** jnp.arange(1, degree + 1).reshape((1,) * z.ndim + (degree,))


def usable_rows(buffer: ExperienceBuffer, target: Int[Array, ""]) -> Bool[Array, " samples"]:
    """Filled rows in which the target was not set."""
    return buffer.valid & ~jnp.take(buffer.intervened, target, axis=1)


# --- Bayesian linear regression ---


def weight_posterior(
    gram: Float[Array, "features features"],
    moment: Float[Array, " features"],
    noise: Float[Array, ""],
    invert: Callable = inverse_and_log_det,
) -> tuple[Float[Array, " features"], Float[Array, "features features"], Float[Array, ""]]:
    """Posterior mean and covariance of the weights of y = phi w + e, w ~ N(0, I), e ~ N(0, noise),
    and log |covariance|; from phi'phi and phi'y (Rasmussen and Williams 2006, section 2.1).
    """
    covariance, log_det = invert(gram / noise + jnp.eye(gram.shape[0]))
    return covariance @ moment / noise, covariance, -log_det


def log_evidence(
    phi: Float[Array, "samples features"],
    y: Float[Array, " samples"],
    count: Float[Array, ""] | int,
    noise: Float[Array, ""],
    mean: Float[Array, " features"],
    log_det: Float[Array, ""],
) -> Float[Array, ""]:
    """Log density of the outcomes `y` of `count` rows (the others are zero, as their features are),
    weights integrated out; `mean` and `log_det` are those of their posterior.
    """
    # a sum of squares: the usual difference of two large numbers has no digits in float32
    misfit = ((y - phi @ mean) ** 2).sum() / noise + (mean**2).sum()
    return 0.5 * (log_det - misfit - count * jnp.log(2 * jnp.pi * noise))
