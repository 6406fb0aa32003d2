"""What plain statistics say of a data set, and all that the surrogate sees of it: of every ordered
pair of variables (lib/pairs.py), and of every (variable, value), several estimates of the target's
mean were the variable set to that value. Nothing here is learned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.pairs import pair_statistics
from lib.regression import Scale, centred_moments, powers_of, ridge
from lib.scm import Task
from lib.sums import (
    MAX_DEVIATIONS,
    Standardisation,
    Summary,
    Sums,
    biweight_kernel,
    kernel_bandwidth,
    range_scale,
)


NUM_ESTIMATES = 7  # the first of them estimate the effect itself: the network weighs them
NUM_EFFECT_STATISTICS = 13  # of a (variable, value)

# A penalty of p on a squared weight is p pseudo-rows in which that column alone is one standard
# deviation (LINEAR_PENALTY, of standardised columns) or one end of the range (CUBIC_PENALTIES) off
# its mean and the outcome is at its own; of weights of a cubic, by power.
LINEAR_PENALTY = 0.01  # a hundredth of a pseudo-row: just enough for collinear columns
# Of five triples the second best on 300 quiet models (errors of both cubics .53 and .52 of the size
# of effects, with equal penalties .59 and .61), at a cost of 3 % on others; the best cost 5 to 6 %.
# Where nothing was seen a parabola goes on, a cubic does not.
CUBIC_PENALTIES = np.array([0.25, 0.5, 4.0])
KERNEL_PENALTY = 0.5  # of weights of kernels: their prior variance is two noise variances


class Statistics(NamedTuple):
    """All that the surrogate sees of a data set, standardised, and the units.

    `pairs` of ordered pairs of variables (`pair_statistics`), `effects` of the effect of setting a
    variable to each value of its grid (`effect_statistics`); `units` are those of every variable.
    """

    pairs: Float[Array, "vars vars pair"]
    effects: Float[Array, "vars bins effect"]
    units: Standardisation


def statistics(data: ExperienceBuffer | Summary, task: Task, num_bins: int) -> Statistics:
    """Of a data set, or of its `Summary`, which has to be one with as many bins."""
    summary = data if isinstance(data, Summary) else Summary.of(data, task, num_bins)
    pairs, effects = pair_statistics(summary.sums, task), effect_statistics(summary, task)
    return Statistics(pairs, effects, summary.units)


def effect_statistics(summary: Summary, task: Task) -> Float[Array, "vars bins effect"]:
    """13 numbers of every cell (i, v), a variable and a value of its grid.

    ======  ========================================================================
    number  what
    ======  ========================================================================
    3       mean outcome near v: observed; where i was set; where set, three times the bandwidth
    2       regression of Y on all variables: linear; additive cubic
    2       regression of Y on variable i alone: cubic; on kernels along its grid
    3       log(1 + rows near v), kernels as weights, of the three means
    1       share of the second mean that is data and not the mean it is shrunk to
    1       log variance of the regression on kernels, in noise variances
    1       v
    ======  ========================================================================

    The first seven estimate E[Y | do(X_i = v)], in standard deviations of Y from its mean, each
    right under assumptions of its own; the network learns when to believe which.
    """
    sums, grid = summary.sums, summary.units.grid
    (seen, seen_y), (near, near_y), (wide, wide_y) = (
        jnp.moveaxis(x, -1, 0)
        for x in (sums.kernels_observed, sums.kernels_done, sums.wide_kernels_done)
    )
    smooth, log_variance = kernel_surface(sums, grid)
    # Means shrunk to zero, the observational mean, by pseudo-rows there: one among observations,
    # which are many and confounded, 0.3 among experiments, of which one alone must count.
    estimates = [
        seen_y / (seen + 1.0),
        near_y / (near + 0.3),
        wide_y / (wide + 0.3),
        *regression_surfaces(sums.powers, grid, task),
        own_surface(sums.own_powers, grid),
        smooth,
    ]
    counts = (jnp.log1p(x) for x in (seen, near, wide))
    found = jnp.stack([*estimates, *counts, near / (near + 0.3), log_variance, grid], -1)
    return jnp.where(
        task.var_mask[:, None, None], jnp.clip(found, -MAX_DEVIATIONS, MAX_DEVIATIONS), 0.0
    )


def noise_variance(
    residual: Float[Array, "*shape"], count: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Of `count` rows that a fit leaves with the sum of squares `residual`, and of one more of
    variance one; at most one. A ridge penalty is the variance of the noise over the prior one of a
    weight, and where units are wide, noise is little of a unit.
    """
    return jnp.minimum((jnp.maximum(residual, 0.0) + 1.0) / (count + 1.0), 1.0)


def regression_surface(
    moments: Float[Array, "columns columns"],
    target: Int[Array, ""],
    scale: Scale,
    grid: Float[Array, "vars bins"],
    penalty: Float[Array, " weights"],
) -> Float[Array, "vars bins"]:
    """Mean prediction of Y ~ intercept + sum_j sum_p weights[j, p] u_j^p, u = scale(X), with X_i at
    `grid[i, b]` and all other variables as in the fitted rows: their means leave
    mean(Y) + sum_p weights[i, p] (scale(grid[i, b])^p - mean(u_i^p)).

    Least squares plus `penalty`, per weight, times the squared weights and the variance of the
    noise, which a first fit with a variance of one leaves; with a free intercept, from `moments`,
    the rows' sums of products of [1, powers of every u, Y].
    """
    mean, centred = moments[0] / jnp.maximum(moments[0, 0], 1.0), centred_moments(moments)
    num_vars, degree = len(grid), len(penalty) // len(grid)
    # the target must not explain itself
    used = jnp.repeat(jnp.arange(num_vars) != target, degree)
    weights, _ = ridge(centred, used, penalty)
    inner, outer = centred[1:-1, 1:-1], centred[1:-1, -1]
    residual = centred[-1, -1] - 2.0 * weights @ outer + weights @ inner @ weights
    # 2e-5 of a sum of squares lets float32 solve
    least = jnp.minimum(penalty, 2e-5 * jnp.diag(inner))
    penalty = jnp.maximum(penalty * noise_variance(residual, moments[0, 0]), least)
    weights, _ = ridge(centred, used, penalty)
    weights, centre = (x.reshape(num_vars, 1, degree) for x in (weights, mean[1:-1]))
    powers = powers_of(scale(grid.T).T, degree)
    return mean[-1] + ((powers - centre) * weights).sum(-1)


def regression_surfaces(
    moments: Float[Array, "columns columns"], grid: Float[Array, "vars bins"], task: Task
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Linear and additive cubic regression of Y on all variables, from `Sums.powers`: the effect of
    each where all are direct causes of Y.

    The cubic's penalty is on effects at the ends of a range (of one standard deviation at least):
    cubics do not explode where there are few rows.
    """
    scale, num_vars = range_scale(grid), grid.shape[0]
    linear = jnp.concatenate([jnp.array([0]), 1 + 3 * jnp.arange(num_vars), jnp.array([-1])])
    of_linear = moments[linear][:, linear]
    count = jnp.maximum(moments[0, 0], 1.0)
    # of u in half-widths of a range: the penalty of standardised columns is times their variance
    variance = jnp.diag(of_linear)[1:-1] / count - (of_linear[0, 1:-1] / count) ** 2
    # below 1e-6 a difference of two sums in float32 is rounding: the column is a constant
    penalty = LINEAR_PENALTY * jnp.where(variance > 1e-6, variance, 1.0)
    cubic_penalty = jnp.tile(CUBIC_PENALTIES, num_vars)
    return (
        regression_surface(of_linear, task.target, scale, grid, penalty),
        regression_surface(moments, task.target, scale, grid, cubic_penalty),
    )


def own_surface(
    moments: Float[Array, "vars 5 5"], grid: Float[Array, "vars bins"]
) -> Float[Array, "vars bins"]:
    """Cubic ridge regression of Y on each variable by itself, from `Sums.own_powers`: its total
    effect where nothing confounds it.
    """

    def one(moments, grid):
        # twice the penalties, as less is known of one variable's rows than of all; Y is not among
        # the columns: target -1
        scale, penalties = range_scale(grid[None]), jnp.asarray(2.0 * CUBIC_PENALTIES)
        return regression_surface(moments, jnp.array(-1), scale, grid[None], penalties)[0]

    return jax.vmap(one)(moments, grid)


def kernel_surface(
    sums: Sums, grid: Float[Array, "vars bins"]
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Ridge regression of Y on kernels phi along each variable by itself, and the log of its
    variance, on the grid (Bayesian linear regression, Rasmussen and Williams 2006, section 2.1):

        m + phi(v)' A^-1 Phi'(y - m),  phi(v)' A^-1 phi(v),  A = Phi'Phi + KERNEL_PENALTY s I,

    m the mean of the rows' Y, s the variance of the noise, which a first fit with s = 1 leaves; the
    variance is in units of it. Kernels are not centred, as `ridge` has its columns: far from all
    rows the prediction is m and the variance that of the prior.
    """
    level = sums.own_powers[:, 0, 4:] / jnp.maximum(sums.own_powers[:, 0, 0], 1.0)[:, None]
    near = sums.kernels_observed + sums.kernels_done

    def invert(penalty):
        """A^-1 `[vars, points, points]`, of a penalty `[vars]`."""
        eye = jnp.eye(grid.shape[1])[None]
        return jax.vmap(positive_inverse)(sums.kernels + penalty[:, None, None] * eye)

    inverse = invert(jnp.full(len(grid), KERNEL_PENALTY))
    moved = near[..., 1] - level * near[..., 0]
    weights = jnp.einsum("vpq,vq->vp", inverse, moved)
    count, y, square = (sums.own_powers[:, i, j] for i, j in ((0, 0), (0, 4), (4, 4)))
    residual = square - level[:, 0] * y - 2.0 * (weights * moved).sum(-1)
    residual += jnp.einsum("vp,vpq,vq->v", weights, sums.kernels, weights)
    noise = jnp.maximum(noise_variance(residual, count), jnp.minimum(1e-4 * count, 1.0))
    inverse = invert(KERNEL_PENALTY * noise)
    weights = jnp.einsum("vpq,vq->vp", inverse, moved)
    # phi [vars, grid points, kernels]
    phi = biweight_kernel(grid.T, grid, kernel_bandwidth(grid)).swapaxes(0, 1)
    variance = jnp.maximum(jnp.einsum("vbp,vpq,vbq->vb", phi, inverse, phi), 0.0)
    # 1e-3 is what a thousand rows leave: how many more there are no longer matters
    return level + jnp.einsum("vbp,vp->vb", phi, weights), jnp.log(variance + 1e-3)
