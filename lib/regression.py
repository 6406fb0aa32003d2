"""Units of variables, and linear regression: ridge regression from sums over rows, for the
statistics that the surrogate and the baselines read, and Bayesian regression, for the marginal
likelihoods that the expert and the check compare.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lib.buffer import ExperienceBuffer
from lib.linalg import inverse_and_log_det, positive_inverse


class Scale(NamedTuple):
    """Units of variables: mean (`shift`) and standard deviation (`spread`) of every column over
    some rows.
    """

    shift: Float[Array, " vars"]
    spread: Float[Array, " vars"]

    @staticmethod
    def of(
        values: Float[Array, "samples vars"],
        rows: Bool[Array, "samples vars"] | Bool[Array, " samples"] | bool = True,
    ) -> "Scale":
        """Over `rows`, by default all, or those of each column; a constant one has the spread 1."""
        each = rows if jnp.ndim(rows) == 2 else jnp.broadcast_to(rows, len(values))[:, None]
        kept = jnp.broadcast_to(each, values.shape)
        count = jnp.maximum(kept.sum(0), 1)
        shift = jnp.where(kept, values, 0.0).sum(0) / count
        spread = jnp.sqrt(jnp.where(kept, (values - shift[None]) ** 2, 0.0).sum(0) / count)
        # 1e-6 of the mean is what float32 rounds; relative to it, so that no unit is too small
        varies = spread > 1e-6 * jnp.abs(shift)
        # the mean of equal numbers may differ from them in the last digit: take the first
        first = jnp.take_along_axis(values, kept.argmax(0)[None], 0)[0]
        return Scale(jnp.where(varies, shift, first), jnp.where(varies, spread, 1.0))

    def __call__(self, values: Float[Array, "samples vars"]) -> Float[Array, "samples vars"]:
        """Values in these units."""
        return (values - self.shift[None]) / self.spread[None]


# --- ridge regression from sums over rows ---


def ridge(
    centred: Float[Array, "columns columns"],
    used: Bool[Array, " weights"],
    penalty: Float[Array, " weights"],
) -> tuple[Float[Array, " weights"], Float[Array, "weights weights"]]:
    """Ridge regression (Hoerl and Kennard 1970) of the last column on those between it and the
    first that are `used`, from `centred_moments`.

    Weights (X'X + diag(penalty))^-1 X'y, zero where not `used`, and that inverse.
    """
    gram = jnp.where(used[:, None] & used[None], centred[1:-1, 1:-1], 0.0)
    inverse = positive_inverse(gram + jnp.diag(penalty))
    return inverse @ jnp.where(used, centred[1:-1, -1], 0.0), inverse


def centred_moments(
    moments: Float[Array, "columns columns"],
) -> Float[Array, "columns columns"]:
    """Sums of products about the means, sum_n (x_n - m)(x_n - m)' = sum_n x_n x_n' - n m m', from
    those of rows whose first column is one.
    """
    count = jnp.maximum(moments[0, 0], 1.0)
    mean = moments[0] / count
    return moments - count * mean[:, None] * mean[None]


def powers_of(z: Float[Array, "*shape"], degree: int) -> Float[Array, "*shape powers"]:
    """z, z^2, ... up to `degree`, along a new last axis."""
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
    """Posterior of the weights of y = phi w + e, w ~ N(0, I), e of variance `noise`, from phi'phi
    and phi'y (Rasmussen and Williams 2006, section 2.1).

    Mean C phi'y / noise, covariance C = (phi'phi / noise + I)^-1, and log |C|.
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
    """Log marginal likelihood of the outcomes `y` of `count` rows (the others are zero, as their
    features are), weights w integrated out, in nats; w's posterior has this `mean` m and `log_det`:

        (log |C| - |y - phi m|^2 / noise - |m|^2 - n log(2 pi noise)) / 2

    (Bishop 2006, equations 3.82 and 3.86). The squares are not written as y'y / noise - m' C^-1 m,
    the difference of two large numbers, of which float32 has no digits.
    """
    misfit = ((y - phi @ mean) ** 2).sum() / noise + (mean**2).sum()
    return 0.5 * (log_det - misfit - count * jnp.log(2 * jnp.pi * noise))
