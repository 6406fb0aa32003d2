"""What plain statistics say about a data set, as sums over its rows: one more row is one more term.

The surrogate's hand-made inputs: second moments and smooth correlations of every pair of variables, and several estimates of the target under every
intervention. Everything is standardised; padding variables have zeros. One data set at a time; batch with `vmap`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lib.baselines import CUBIC_PENALTY, LINEAR_PENALTY, AdditiveRegression, powers_of, regression_moments
from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.scm import Task, value_grid


MAX_DEVIATIONS = 10.0  # further out, a scalar is clipped: an outlier must not swamp every moment
FARTHEST = 5.0  # half-widths of its range from the middle of it; a sixth power of more would leave float32 no digits for the rest
NUM_WAVES = 11  # bumps along each variable for its smooth correlation with the others
NUM_STATISTICS = 4  # of every pair of variables
NUM_ESTIMATES = 7  # the first of the evidence are estimates of the effect itself, which the network may pass on
NUM_EVIDENCE = 13


class Frame(NamedTuple):
    """Units of a data set: mean and deviation of every variable over its observational rows, and the standardised values to predict at."""

    shift: Float[Array, " vars"]
    spread: Float[Array, " vars"]
    grid: Float[Array, "vars bins"]

    @staticmethod
    def of(buffer: ExperienceBuffer, task: Task, num_bins: int) -> "Frame":
        """From the observational rows, or all valid rows where there are fewer than two."""
        rows = jnp.where(buffer.observational.sum() >= 2, buffer.observational, buffer.valid)[:, None]
        count = jnp.maximum(rows.sum(), 1)
        raw = jnp.where(buffer.valid[:, None] & task.var_mask[None], buffer.values, 0.0)
        shift = jnp.where(rows, raw, 0.0).sum(0) / count
        spread = jnp.sqrt(jnp.where(rows, (raw - shift[None]) ** 2, 0.0).sum(0) / count)
        spread = jnp.where(spread > 1e-6 * (1.0 + jnp.abs(shift)), spread, 1.0)
        grid = jnp.clip((value_grid(task.low, task.high, num_bins) - shift[:, None]) / spread[:, None], -MAX_DEVIATIONS, MAX_DEVIATIONS)
        return Frame(shift, spread, jnp.where(task.var_mask[:, None], grid, 0.0))


class Rows(NamedTuple):
    """Standardised rows; flags are zeros and ones."""

    values: Float[Array, "samples vars"]
    intervened: Float[Array, "samples vars"]
    valid: Float[Array, " samples"]
    observational: Float[Array, " samples"]

    @staticmethod
    def of(buffer: ExperienceBuffer, frame: Frame, var_mask: Bool[Array, " vars"]) -> "Rows":
        """The buffer in the units of `frame`; free rows and padding are zero."""
        kept, dtype = buffer.valid[:, None] & var_mask[None], buffer.values.dtype
        values = jnp.clip(
            (jnp.where(kept, buffer.values, frame.shift[None]) - frame.shift[None]) / frame.spread[None], -MAX_DEVIATIONS, MAX_DEVIATIONS
        )
        flags = (buffer.intervened & buffer.valid[:, None]).astype(dtype)
        return Rows(jnp.where(kept, values, 0.0), flags, buffer.valid.astype(dtype), buffer.observational.astype(dtype))


class Sums(NamedTuple):
    """Sums over rows. `waves[vars, 12, 12]` are second moments of bumps along each variable and of a one, `waves_with[vars, 12, vars]` their products
    with every variable, both over observational rows; `regression` those of [1, powers of every variable, outcome] over rows where the target was not
    set; `cubic[vars, 5, 5]` those of [1, powers of one variable, outcome] over rows where it alone may have been set, and `bumps[vars, bins, bins]`
    those of bumps around the grid there; `seen`, `done` and `done_wide` `[vars, bins, 2]` those of a bump with [1, outcome], observed and intervened.
    """

    count: Float[Array, ""]
    observational: Float[Array, ""]
    observed: Float[Array, "vars vars"]
    everything: Float[Array, "vars vars"]
    waves: Float[Array, "vars waves waves"]
    waves_with: Float[Array, "vars waves vars"]
    regression: Float[Array, "columns columns"]
    cubic: Float[Array, "vars 5 5"]
    bumps: Float[Array, "vars bins bins"]
    seen: Float[Array, "vars bins 2"]
    done: Float[Array, "vars bins 2"]
    done_wide: Float[Array, "vars bins 2"]


def bumps(
    values: Float[Array, "samples vars"], centres: Float[Array, "vars bins"], width: Float[Array, " vars"]
) -> Float[Array, "samples vars bins"]:
    """Gaussian bumps around the centres of each variable."""
    return jnp.exp(-0.5 * ((values[:, :, None] - centres[None]) / width[None, :, None]) ** 2)


def bump_width(grid: Float[Array, "vars bins"]) -> Float[Array, " vars"]:
    """Half a step of the grid and a little more."""
    return 0.5 * (grid[:, 1:] - grid[:, :-1]).mean(-1) + 0.15


def middle_and_half(grid: Float[Array, "vars bins"]) -> tuple[Float[Array, " vars"], Float[Array, " vars"]]:
    """Centre and half-width of each variable's range; at least one deviation, and 2, about what observed values span, if the range has no width."""
    half = 0.5 * (grid[:, -1] - grid[:, 0])
    return 0.5 * (grid[:, 0] + grid[:, -1]), jnp.where(half > 0, jnp.maximum(half, 1.0), 2.0)


def sum_rows(rows: Rows, frame: Frame, task: Task) -> Sums:
    """The sums of some rows: those of a data set, or those of one row to be added."""
    values, outcome = rows.values, jnp.take(rows.values, task.target, axis=1)
    num_vars, one = values.shape[1], jnp.ones_like(values)
    centres = jnp.broadcast_to(jnp.linspace(-2.5, 2.5, NUM_WAVES)[None], (num_vars, NUM_WAVES))
    waves = jnp.concatenate([bumps(values, centres, jnp.full(num_vars, 0.5)), one[:, :, None]], -1) * rows.observational[:, None, None]

    usable = rows.valid * (1.0 - jnp.take(rows.intervened, task.target, axis=1))
    observed, done = rows.observational * usable, rows.intervened * usable[:, None]
    alone = observed[:, None] + done
    middle, half = middle_and_half(frame.grid)
    u = jnp.clip((values - middle[None]) / half[None], -FARTHEST, FARTHEST)
    cubic = jnp.concatenate([one[:, :, None], powers_of(u, 3), jnp.broadcast_to(outcome[:, None, None], (*values.shape, 1))], -1)
    width = bump_width(frame.grid)
    near, wide = bumps(values, frame.grid, width), bumps(values, frame.grid, 3.0 * width)
    level = jnp.stack([jnp.ones_like(outcome), outcome], -1)
    return Sums(
        rows.valid.sum(),
        rows.observational.sum(),
        (values * rows.observational[:, None]).T @ values,
        (values * rows.valid[:, None]).T @ values,
        jnp.einsum("nvp,nvq->vpq", waves, waves),
        jnp.einsum("nvp,nw->vpw", waves, values),
        regression_moments(u, outcome, usable > 0, 3),
        jnp.einsum("nv,nvp,nvq->vpq", alone, cubic, cubic),
        jnp.einsum("nv,nvp,nvq->vpq", alone, near, near),
        jnp.einsum("nvb,nc->vbc", near * observed[:, None, None], level),
        jnp.einsum("nvb,nc->vbc", near * done[:, :, None], level),
        jnp.einsum("nvb,nc->vbc", wide * done[:, :, None], level),
    )


# --- of every pair of variables ---


def pair_statistics(sums: Sums, present: Bool[Array, " vars"]) -> Float[Array, "vars vars statistics"]:
    """Observational covariance; partial correlation over observational and over all rows; smooth correlation."""
    observed, everything = covariance(sums.observed, sums.observational, present), covariance(sums.everything, sums.count, present)
    return jnp.stack([observed, partial_correlation(observed), partial_correlation(everything), smooth_correlation(sums)], -1)


def covariance(products: Float[Array, "vars vars"], count: Float[Array, ""], present: Bool[Array, " vars"]) -> Float[Array, "vars vars"]:
    """Second moments plus a ridge; the identity on padded variables, so that inverting it leaves the others alone."""
    return products / (count + 1.0) + jnp.diag(jnp.where(present, 0.05, 1.0))


def partial_correlation(moments: Float[Array, "vars vars"]) -> Float[Array, "vars vars"]:
    """Partial correlations from a regularised covariance."""
    precision = positive_inverse(moments)
    scale = jnp.sqrt(jnp.diag(precision))
    return -precision / scale[:, None] / scale[None]


def smooth_correlation(sums: Sums) -> Float[Array, "vars vars"]:
    """Correlation `[i, j]` of variable j with the best smooth function of variable i over the observational rows: it sees waves that moments miss."""
    mean = sums.waves[:, :-1, -1] / jnp.maximum(sums.observational, 1.0)
    moments = sums.waves[:, :-1, :-1] - sums.waves[:, :-1, -1:] * mean[:, None] + jnp.eye(NUM_WAVES)[None]
    against = sums.waves_with[:, :-1] - mean[:, :, None] * sums.waves_with[:, -1:]
    explained = jnp.einsum("vpw,vpq,vqw->vw", against, jax.vmap(positive_inverse)(moments), against)
    return jnp.sqrt(jnp.clip(explained / jnp.maximum(jnp.diag(sums.observed), 1.0)[None], 0.0, 1.0))


# --- of every variable and value ---


def effect_evidence(sums: Sums, frame: Frame, task: Task) -> Float[Array, "vars bins features"]:
    """What plain statistics say about every (variable, value), in deviations of the target.

    Estimates: outcomes seen there and done there (two widths), and four regressions of the target: linear and additive cubic on all variables,
    cubic and smooth on this variable alone. Then how often each was seen, how sure the smooth one is, and where the value lies. The network learns
    when to believe which.
    """
    seen_count, near_count, wide_count = sums.seen[..., 0], sums.done[..., 0], sums.done_wide[..., 0]
    smooth, certainty = smooth_surface(sums, frame.grid)
    estimates = [
        sums.seen[..., 1] / (seen_count + 1.0),
        sums.done[..., 1] / (near_count + 0.3),
        sums.done_wide[..., 1] / (wide_count + 0.3),
        *regression_surfaces(sums.regression, frame.grid, task),
        single_cause_surface(sums.cubic, frame.grid),
        smooth,
    ]
    counts = [jnp.log1p(seen_count), jnp.log1p(near_count), jnp.log1p(wide_count), near_count / (near_count + 0.3)]
    features = jnp.stack([*estimates, *counts, certainty, frame.grid], -1)
    return jnp.where(task.var_mask[:, None, None], jnp.clip(features, -MAX_DEVIATIONS, MAX_DEVIATIONS), 0.0)


def regression_surfaces(moments: Float[Array, "columns columns"], grid: Float[Array, "vars bins"], task: Task):
    """`least_squares_surface` and `additive_ridge_surface` of lib/baselines.py: linear and cubic, on all variables."""
    middle, half = middle_and_half(grid)
    num_vars = grid.shape[0]
    linear = jnp.concatenate([jnp.array([0]), 1 + 3 * jnp.arange(num_vars), jnp.array([-1])])
    of_linear = moments[linear][:, linear]
    count = jnp.maximum(moments[0, 0], 1.0)
    variance = jnp.diag(of_linear)[1:-1] / count - (of_linear[0, 1:-1] / count) ** 2  # the penalty is against standardised columns
    penalty = LINEAR_PENALTY * jnp.where(variance > 1e-6, variance, 1.0)
    cubic_penalty = jnp.full(3 * num_vars, CUBIC_PENALTY)
    regressions = (
        AdditiveRegression.solve(of_linear, task.target, middle, half, 0.0, penalty),
        AdditiveRegression.solve(moments, task.target, middle, half, 0.0, cubic_penalty),
    )
    return tuple(regression.surface(grid) for regression in regressions)


def single_cause_surface(moments: Float[Array, "vars 5 5"], grid: Float[Array, "vars bins"]) -> Float[Array, "vars bins"]:
    """Cubic ridge regression of the outcome on each variable by itself: its total effect where nothing confounds it."""
    middle, half = middle_and_half(grid)
    total = jnp.maximum(moments[:, 0, 0], 1.0)[:, None]
    centre, level = moments[:, 0, 1:4] / total, moments[:, 0, 4:] / total
    gram = moments[:, 1:4, 1:4] - total[..., None] * centre[:, :, None] * centre[:, None] + jnp.eye(3)[None]
    slopes = jnp.einsum("vpq,vq->vp", jax.vmap(positive_inverse)(gram), moments[:, 1:4, 4] - total * centre * level)
    return level + jnp.einsum("vbp,vp->vb", powers_of((grid - middle[:, None]) / half[:, None], 3) - centre[:, None], slopes)


def smooth_surface(sums: Sums, grid: Float[Array, "vars bins"]) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Ridge regression of the outcome on bumps along each variable by itself, and the log of its variance on the grid."""
    level = sums.cubic[:, 0, 4:] / jnp.maximum(sums.cubic[:, 0, 0], 1.0)[:, None]
    near = sums.seen + sums.done
    inverse = jax.vmap(positive_inverse)(sums.bumps + 0.5 * jnp.eye(grid.shape[1])[None])
    slopes = jnp.einsum("vpq,vq->vp", inverse, near[..., 1] - level * near[..., 0])
    at_grid = bumps(grid.T, grid, bump_width(grid)).swapaxes(0, 1)  # [vars, where, bump]
    variance = jnp.einsum("vbp,vpq,vbq->vb", at_grid, inverse, at_grid)
    return level + jnp.einsum("vbp,vp->vb", at_grid, slopes), jnp.log(variance + 1e-3)
