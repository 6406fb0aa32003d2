"""What plain statistics say of a data set, before a network has looked at it: of every ordered pair
of variables (lib/pairs.py), and of every intervention, several estimates of the target. Nothing
here is learned.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.pairs import pair_statistics
from lib.regression import CUBIC_PENALTY, LINEAR_PENALTY, regression_surface
from lib.scm import Task
from lib.sums import MAX_DEVIATIONS, Frame, Summary, Sums, bump_width, bumps, range_scale


# the first of the evidence are estimates of the effect itself, which the network may pass on
NUM_ESTIMATES = 7
NUM_EVIDENCE = 13


def evidence(
    data: ExperienceBuffer | Summary, task: Task, num_bins: int
) -> tuple[Float[Array, "vars vars pair"], Float[Array, "vars bins features"], Frame]:
    """All that the surrogate sees of a data set, or of its sums: the statistics of pairs; effects,
    in deviations of the target, at `num_bins` values per variable; and their units.
    """
    frame, sums = data if isinstance(data, Summary) else Summary.of(data, task, num_bins)
    return pair_statistics(sums, task), effect_evidence(sums, frame, task), frame


def effect_evidence(sums: Sums, frame: Frame, task: Task) -> Float[Array, "vars bins features"]:
    """What plain statistics say about every (variable, value), in deviations of the target.

    Estimates: outcomes seen there and done there (two widths), and four regressions of the target:
    linear and additive cubic on all variables, cubic and smooth on this variable alone. Then how
    often each was seen, how sure the smooth one is, and where the value lies. The network learns
    when to believe which.
    """
    (seen, seen_y), (near, near_y), (wide, wide_y) = (
        jnp.moveaxis(x, -1, 0) for x in (sums.seen, sums.done, sums.done_wide)
    )
    smooth, certainty = smooth_surface(sums, frame.grid)
    estimates = [
        seen_y / (seen + 1.0),
        near_y / (near + 0.3),
        wide_y / (wide + 0.3),
        *regression_surfaces(sums.regression, frame.grid, task),
        single_cause_surface(sums.cubic, frame.grid),
        smooth,
    ]
    counts = [jnp.log1p(seen), jnp.log1p(near), jnp.log1p(wide), near / (near + 0.3)]
    features = jnp.stack([*estimates, *counts, certainty, frame.grid], -1)
    return jnp.where(
        task.var_mask[:, None, None], jnp.clip(features, -MAX_DEVIATIONS, MAX_DEVIATIONS), 0.0
    )


def regression_surfaces(
    moments: Float[Array, "columns columns"], grid: Float[Array, "vars bins"], task: Task
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Linear and additive cubic regression of the target on all variables.

    The cubic's penalty is on effects at the ends of a range (of one deviation at least): cubics do
    not explode where there are few rows.
    """
    scale, num_vars = range_scale(grid), grid.shape[0]
    linear = jnp.concatenate([jnp.array([0]), 1 + 3 * jnp.arange(num_vars), jnp.array([-1])])
    of_linear = moments[linear][:, linear]
    count = jnp.maximum(moments[0, 0], 1.0)
    # the penalty is against standardised columns
    variance = jnp.diag(of_linear)[1:-1] / count - (of_linear[0, 1:-1] / count) ** 2
    penalty = LINEAR_PENALTY * jnp.where(variance > 1e-6, variance, 1.0)
    cubic_penalty = jnp.full(3 * num_vars, CUBIC_PENALTY)
    return (
        regression_surface(of_linear, task.target, scale, grid, penalty),
        regression_surface(moments, task.target, scale, grid, cubic_penalty),
    )


def single_cause_surface(
    moments: Float[Array, "vars 5 5"], grid: Float[Array, "vars bins"]
) -> Float[Array, "vars bins"]:
    """Cubic ridge regression of the outcome on each variable by itself: its total effect where
    nothing confounds it.
    """

    def one(moments, grid):
        grid = grid[None]
        return regression_surface(moments, jnp.array(-1), range_scale(grid), grid, jnp.ones(3))[0]

    return jax.vmap(one)(moments, grid)


def smooth_surface(
    sums: Sums, grid: Float[Array, "vars bins"]
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Ridge regression of the outcome on bumps along each variable by itself, and the log of its
    variance on the grid. Bumps are not centred, as `ridge` has its columns: far from all rows the
    prediction is the mean and the variance that of the prior.
    """
    level = sums.cubic[:, 0, 4:] / jnp.maximum(sums.cubic[:, 0, 0], 1.0)[:, None]
    near = sums.seen + sums.done
    inverse = jax.vmap(positive_inverse)(sums.bumps + 0.5 * jnp.eye(grid.shape[1])[None])
    slopes = jnp.einsum("vpq,vq->vp", inverse, near[..., 1] - level * near[..., 0])
    at_grid = bumps(grid.T, grid, bump_width(grid)).swapaxes(0, 1)  # [vars, where, bump]
    variance = jnp.einsum("vbp,vpq,vbq->vb", at_grid, inverse, at_grid)
    return level + jnp.einsum("vbp,vp->vb", at_grid, slopes), jnp.log(variance + 1e-3)
