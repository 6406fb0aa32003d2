"""What plain statistics say of a data set, before a network has looked at it: of every ordered pair
of variables (lib/pairs.py), and of every intervention, several estimates of the target. Nothing
here is learned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.pairs import NUM_MARKS, NUM_STATISTICS, marks, pair_statistics
from lib.regression import CUBIC_PENALTY, LINEAR_PENALTY, AdditiveRegression, powers_of
from lib.scm import Task
from lib.sums import MAX_DEVIATIONS, Frame, Summary, Sums, bump_width, bumps, middle_and_half


NUM_PAIR = NUM_STATISTICS + NUM_MARKS  # numbers of every ordered pair
# the first of the evidence are estimates of the effect itself, which the network may pass on
NUM_ESTIMATES = 7
NUM_EVIDENCE = 13


class Evidence(NamedTuple):
    """All that the surrogate sees of a data set; `effects` in deviations of the target."""

    pairs: Float[Array, "vars vars pair"]
    effects: Float[Array, "vars bins features"]
    frame: Frame


def evidence(data: ExperienceBuffer | Summary, task: Task, num_bins: int) -> Evidence:
    """The evidence in a data set, or in its sums; effects at `num_bins` values per variable."""
    frame, sums = data if isinstance(data, Summary) else Summary.of(data, task, num_bins)
    pairs = jnp.concatenate([pair_statistics(sums, task), marks(sums, task)], -1)
    return Evidence(pairs, effect_evidence(sums, frame, task), frame)


def effect_evidence(sums: Sums, frame: Frame, task: Task) -> Float[Array, "vars bins features"]:
    """What plain statistics say about every (variable, value), in deviations of the target.

    Estimates: outcomes seen there and done there (two widths), and four regressions of the target:
    linear and additive cubic on all variables, cubic and smooth on this variable alone. Then how
    often each was seen, how sure the smooth one is, and where the value lies. The network learns
    when to believe which.
    """
    seen_count, near_count, wide_count = (
        sums.seen[..., 0],
        sums.done[..., 0],
        sums.done_wide[..., 0],
    )
    smooth, certainty = smooth_surface(sums, frame.grid)
    estimates = [
        sums.seen[..., 1] / (seen_count + 1.0),
        sums.done[..., 1] / (near_count + 0.3),
        sums.done_wide[..., 1] / (wide_count + 0.3),
        *regression_surfaces(sums.regression, frame.grid, task),
        single_cause_surface(sums.cubic, frame.grid),
        smooth,
    ]
    counts = [
        jnp.log1p(seen_count),
        jnp.log1p(near_count),
        jnp.log1p(wide_count),
        near_count / (near_count + 0.3),
    ]
    features = jnp.stack([*estimates, *counts, certainty, frame.grid], -1)
    return jnp.where(
        task.var_mask[:, None, None], jnp.clip(features, -MAX_DEVIATIONS, MAX_DEVIATIONS), 0.0
    )


def regression_surfaces(
    moments: Float[Array, "columns columns"], grid: Float[Array, "vars bins"], task: Task
):
    """`least_squares_surface` and `additive_ridge_surface` of lib/baselines.py: linear and cubic,
    on all variables.
    """
    middle, half = middle_and_half(grid)
    num_vars = grid.shape[0]
    linear = jnp.concatenate([jnp.array([0]), 1 + 3 * jnp.arange(num_vars), jnp.array([-1])])
    of_linear = moments[linear][:, linear]
    count = jnp.maximum(moments[0, 0], 1.0)
    # the penalty is against standardised columns
    variance = jnp.diag(of_linear)[1:-1] / count - (of_linear[0, 1:-1] / count) ** 2
    penalty = LINEAR_PENALTY * jnp.where(variance > 1e-6, variance, 1.0)
    cubic_penalty = jnp.full(3 * num_vars, CUBIC_PENALTY)
    regressions = (
        AdditiveRegression.solve(of_linear, task.target, middle, half, 0.0, penalty),
        AdditiveRegression.solve(moments, task.target, middle, half, 0.0, cubic_penalty),
    )
    return tuple(regression.surface(grid) for regression in regressions)


def single_cause_surface(
    moments: Float[Array, "vars 5 5"], grid: Float[Array, "vars bins"]
) -> Float[Array, "vars bins"]:
    """Cubic ridge regression of the outcome on each variable by itself: its total effect where
    nothing confounds it.
    """
    middle, half = middle_and_half(grid)
    total = jnp.maximum(moments[:, 0, 0], 1.0)[:, None]
    centre, level = moments[:, 0, 1:4] / total, moments[:, 0, 4:] / total
    gram = (
        moments[:, 1:4, 1:4]
        - total[..., None] * centre[:, :, None] * centre[:, None]
        + jnp.eye(3)[None]
    )
    slopes = jnp.einsum(
        "vpq,vq->vp", jax.vmap(positive_inverse)(gram), moments[:, 1:4, 4] - total * centre * level
    )
    return level + jnp.einsum(
        "vbp,vp->vb",
        powers_of((grid - middle[:, None]) / half[:, None], 3) - centre[:, None],
        slopes,
    )


def smooth_surface(
    sums: Sums, grid: Float[Array, "vars bins"]
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Ridge regression of the outcome on bumps along each variable by itself, and the log of its
    variance on the grid.
    """
    level = sums.cubic[:, 0, 4:] / jnp.maximum(sums.cubic[:, 0, 0], 1.0)[:, None]
    near = sums.seen + sums.done
    inverse = jax.vmap(positive_inverse)(sums.bumps + 0.5 * jnp.eye(grid.shape[1])[None])
    slopes = jnp.einsum("vpq,vq->vp", inverse, near[..., 1] - level * near[..., 0])
    at_grid = bumps(grid.T, grid, bump_width(grid)).swapaxes(0, 1)  # [vars, where, bump]
    variance = jnp.einsum("vbp,vpq,vbq->vb", at_grid, inverse, at_grid)
    return level + jnp.einsum("vbp,vp->vb", at_grid, slopes), jnp.log(variance + 1e-3)
