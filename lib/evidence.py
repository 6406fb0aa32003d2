"""What plain statistics say about a data set, as sums over its rows: one more row is one more term.

All that the surrogate knows of a data set: for every pair of variables, products of features and
what regressions and interventions say of the two; for every intervention, several estimates of the
target. Nothing here is learned. Everything is standardised; padding variables have zeros. One data
set at a time; batch with `vmap`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lib.baselines import (
    CUBIC_PENALTY,
    LINEAR_PENALTY,
    AdditiveRegression,
    powers_of,
    regression_moments,
)
from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.scm import Task, value_grid


MAX_DEVIATIONS = 10.0  # further out, a scalar is clipped: an outlier must not swamp every moment
# where powers end, in deviations or in half-widths of a range: a sixth power of more would leave
# float32 no digits for the rest
FARTHEST = 5.0
FREQUENCIES = (1.2, 2.4, 3.6)  # of the waves among the features of a scalar, per deviation
NUM_FEATURES = 14  # of a scalar
NUM_LIKELY = 5  # candidates whose subsets are compared as the parents of a variable
NUM_STATISTICS = NUM_FEATURES**2 + 31  # of every pair of variables
# the first of the evidence are estimates of the effect itself, which the network may pass on
NUM_ESTIMATES = 7
NUM_EVIDENCE = 13


class Frame(NamedTuple):
    """Units of a data set: mean and deviation of every variable over its observational rows, and
    the standardised values to predict at.
    """

    shift: Float[Array, " vars"]
    spread: Float[Array, " vars"]
    grid: Float[Array, "vars bins"]

    @staticmethod
    def of(buffer: ExperienceBuffer, task: Task, num_bins: int) -> "Frame":
        """From the observational rows, or all valid rows where there are fewer than two."""
        rows = jnp.where(buffer.observational.sum() >= 2, buffer.observational, buffer.valid)[
            :, None
        ]
        count = jnp.maximum(rows.sum(), 1)
        raw = jnp.where(buffer.valid[:, None] & task.var_mask[None], buffer.values, 0.0)
        shift = jnp.where(rows, raw, 0.0).sum(0) / count
        spread = jnp.sqrt(jnp.where(rows, (raw - shift[None]) ** 2, 0.0).sum(0) / count)
        # relative: no unit is too small
        spread = jnp.where(spread > 1e-6 * jnp.abs(shift), spread, 1.0)
        grid = jnp.clip(
            (value_grid(task.low, task.high, num_bins) - shift[:, None]) / spread[:, None],
            -MAX_DEVIATIONS,
            MAX_DEVIATIONS,
        )
        # what has no range is looked at around its mean, whatever its units call zero
        ranged = task.var_mask & (task.high > task.low)
        return Frame(shift, spread, jnp.where(ranged[:, None], grid, 0.0))


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
            (jnp.where(kept, buffer.values, frame.shift[None]) - frame.shift[None])
            / frame.spread[None],
            -MAX_DEVIATIONS,
            MAX_DEVIATIONS,
        )
        flags = (buffer.intervened & buffer.valid[:, None]).astype(dtype)
        return Rows(
            jnp.where(kept, values, 0.0),
            flags,
            buffer.valid.astype(dtype),
            buffer.observational.astype(dtype),
        )


class Sums(NamedTuple):
    """Sums over rows.

    Of pairs: `features` are products of the features of all scalars; `powers` those of one and
    three powers of all variables, `observed` over observational rows, and `under_do[j]` over the
    rows in which j was set.

    Of the target: `regression` are products of one, powers of every variable and the outcome over
    rows where the target was not set; `cubic[i]` those of one, powers of variable i and the outcome
    over rows where it alone may have been set, and `bumps[i]` those of bumps around the grid there;
    `seen`, `done` and `done_wide` those of a bump with one and with the outcome, observed and
    intervened.
    """

    count: Float[Array, ""]
    observational: Float[Array, ""]
    features: Float[Array, "features features"]
    powers: Float[Array, "powers powers"]
    observed: Float[Array, "powers powers"]
    under_do: Float[Array, "vars powers powers"]
    regression: Float[Array, "columns columns"]
    cubic: Float[Array, "vars 5 5"]
    bumps: Float[Array, "vars bins bins"]
    seen: Float[Array, "vars bins 2"]
    done: Float[Array, "vars bins 2"]
    done_wide: Float[Array, "vars bins 2"]


def scalar_features(
    values: Float[Array, "*shape"], intervened: Float[Array, "*shape"]
) -> Float[Array, "*shape features"]:
    """One, powers and waves of a standardised scalar; whether it was set, and to what."""
    waves = [wave(w * values) for w in FREQUENCIES for wave in (jnp.sin, jnp.cos)]
    columns = [jnp.ones_like(values), *jnp.moveaxis(hermite(values), -1, 0), *waves]
    return jnp.stack(
        [*columns, intervened, intervened * values, intervened * waves[0], intervened * waves[1]],
        -1,
    )


def hermite(values: Float[Array, "*shape"]) -> Float[Array, "*shape 3"]:
    """The first three Hermite polynomials with variance one, uncorrelated for a Gaussian; the first
    is the value itself.
    """
    u = jnp.clip(values, -FARTHEST, FARTHEST)
    return jnp.stack([values, (u**2 - 1.0) / jnp.sqrt(2.0), (u**3 - 3.0 * u) / jnp.sqrt(6.0)], -1)


def bumps(
    values: Float[Array, "samples vars"],
    centres: Float[Array, "vars bins"],
    width: Float[Array, " vars"],
) -> Float[Array, "samples vars bins"]:
    """Bumps of deviation `width` around the centres of each variable: (1 - u^2)^2, which ends and
    needs no exponential.
    """
    u = (values[:, :, None] - centres[None]) / (jnp.sqrt(7.0) * width[None, :, None])
    return jnp.square(jnp.maximum(1.0 - u * u, 0.0))


def bump_width(grid: Float[Array, "vars bins"]) -> Float[Array, " vars"]:
    """Half a step of the grid and a little more."""
    return 0.5 * (grid[:, 1:] - grid[:, :-1]).mean(-1) + 0.15


def middle_and_half(
    grid: Float[Array, "vars bins"],
) -> tuple[Float[Array, " vars"], Float[Array, " vars"]]:
    """Centre and half-width of each variable's range; at least one deviation, and 2, about what
    observed values span, if the range has no width.
    """
    half = 0.5 * (grid[:, -1] - grid[:, 0])
    return 0.5 * (grid[:, 0] + grid[:, -1]), jnp.where(half > 0, jnp.maximum(half, 1.0), 2.0)


def sum_rows(rows: Rows, frame: Frame, task: Task) -> Sums:
    """The sums of some rows: those of a data set, or those of one row to be added."""
    values, outcome = rows.values, jnp.take(rows.values, task.target, axis=1)
    num_rows, num_vars = values.shape
    one, level = jnp.ones_like(values), jnp.stack([jnp.ones_like(outcome), outcome], -1)

    def products(columns, weights):
        return (columns * weights[:, None]).T @ columns

    features = scalar_features(values, rows.intervened) * task.var_mask[None, :, None]
    powers = jnp.concatenate([jnp.ones((num_rows, 1)), features[..., 1:4].reshape(num_rows, -1)], 1)
    powers = powers * rows.valid[:, None]
    where_set = (rows.intervened[:, :, None] * powers[:, None]).reshape(num_rows, -1)

    usable = rows.valid * (1.0 - jnp.take(rows.intervened, task.target, axis=1))
    observed, done = rows.observational * usable, rows.intervened * usable[:, None]
    alone = observed[:, None] + done
    middle, half = middle_and_half(frame.grid)
    u = jnp.clip((values - middle[None]) / half[None], -FARTHEST, FARTHEST)
    cubic = jnp.concatenate(
        [
            one[:, :, None],
            powers_of(u, 3),
            jnp.broadcast_to(outcome[:, None, None], (*values.shape, 1)),
        ],
        -1,
    )
    width = bump_width(frame.grid)
    near, wide = bumps(values, frame.grid, width), bumps(values, frame.grid, 3.0 * width)
    return Sums(
        rows.valid.sum(),
        rows.observational.sum(),
        products(features.reshape(num_rows, -1), rows.valid),
        powers.T @ powers,
        products(powers, rows.observational),
        (where_set.T @ powers).reshape(num_vars, powers.shape[1], powers.shape[1]),
        regression_moments(u, outcome, usable > 0, 3),
        jnp.einsum("nv,nvp,nvq->vpq", alone, cubic, cubic),
        jnp.einsum("nv,nvp,nvq->vpq", alone, near, near),
        jnp.einsum("nvb,nc->vbc", near * observed[:, None, None], level),
        jnp.einsum("nvb,nc->vbc", near * done[:, :, None], level),
        jnp.einsum("nvb,nc->vbc", wide * done[:, :, None], level),
    )


# --- of every pair of variables ---


def pair_statistics(sums: Sums, task: Task) -> Float[Array, "vars vars statistics"]:
    """What the data say of each ordered pair (i, j), all of the order of one.

    Mean products of features of i and j. Covariance; t-statistics of i on j alone and of i on j and
    all others, observational. Then, for i on j and the reverse, what `regressions`,
    `local_posteriors` and `responses` give.
    """
    num_vars, present = task.var_mask.shape[0], task.var_mask
    off = ~jnp.eye(num_vars, dtype=bool)
    moments = (sums.features / jnp.maximum(sums.count, 1.0)).reshape(
        num_vars, NUM_FEATURES, num_vars, NUM_FEATURES
    )
    moments = moments.transpose(0, 2, 1, 3).reshape(num_vars, num_vars, -1)
    moments = jnp.sign(moments) * jnp.log1p(5.0 * jnp.abs(moments))

    linear = 1 + 3 * jnp.arange(num_vars)
    # one row's worth of independence
    observed = sums.observed[linear][:, linear] + jnp.eye(num_vars)
    precision = positive_inverse(observed)
    freedom = jnp.maximum(sums.observational - present.sum(), 1.0)
    correlated = t_statistic(cosine(observed), sums.observational)
    symmetric = [
        observed / (sums.observational + 1.0),
        correlated,
        t_statistic(-cosine(precision), freedom),
    ]
    of_regressions = regressions(sums, precision, task)
    likely = jnp.where(off & present[None], jnp.abs(correlated) + jnp.abs(of_regressions[0]), -1.0)
    directed = [
        *of_regressions,
        *local_posteriors(sums, likely),
        *responses(sums, observed, precision, freedom),
    ]
    directed = jnp.stack(directed, -1)
    statistics = jnp.concatenate([jnp.stack(symmetric, -1), directed, directed.swapaxes(0, 1)], -1)
    kept = (off & present[:, None] & present[None])[..., None]
    own = (jnp.eye(num_vars, dtype=bool) & present[:, None])[..., None]
    return jnp.concatenate(
        [moments, jnp.where(kept | own, jnp.clip(statistics, -FARTHEST, FARTHEST), 0.0)], -1
    )


def cosine(matrix: Float[Array, "vars vars"]) -> Float[Array, "vars vars"]:
    """A symmetric positive matrix scaled to a diagonal of one, which is then left out."""
    scale = jnp.sqrt(jnp.diag(matrix))
    return matrix / scale[:, None] / scale[None] * (1.0 - jnp.eye(matrix.shape[0]))


def t_statistic(
    correlation: Float[Array, "*shape"], freedom: Float[Array, "*other"]
) -> Float[Array, "*shape"]:
    """Of a (partial) correlation, on a logarithmic scale: its tens, not its hundreds, decide who is
    a parent.
    """
    t = correlation * jnp.sqrt(freedom) / jnp.sqrt(jnp.maximum(1.0 - correlation**2, 1e-3))
    return jnp.arcsinh(t) / 3.0


def f_statistic(
    reduction: Float[Array, "*shape"], residual: Float[Array, "*other"], freedom: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Of three powers of a variable, by what leaving them out adds to a residual sum of squares; on
    a logarithmic scale.
    """
    return jnp.log1p(jnp.maximum(reduction, 0.0) / residual * freedom / 3.0) / 2.0


def regressions(
    sums: Sums, precision: Float[Array, "vars vars"], task: Task
) -> list[Float[Array, "vars vars"]]:
    """Of the regression of i on all others, and of the share of j in it, `[i, j]`.

    Linear, over all rows in which i was not set: t-statistic, coefficient, log of the residual
    variance. Linear, observational: the log. With three powers of the others, observational:
    F-statistic and log. With three powers, over all rows in which the target was not set, for i the
    target: F-statistic.
    """
    num_vars, present = task.var_mask.shape[0], task.var_mask
    own, one = jnp.arange(num_vars), jnp.ones((num_vars, num_vars))
    count, number, columns = sums.under_do[:, 0, 0], present.sum(), 1 + 3 * own

    # [i]: over the rows in which i was not set
    free = (sums.powers[None] - sums.under_do)[:, columns][:, :, columns]
    inverse = jax.vmap(positive_inverse)(free + jnp.eye(num_vars)[None])
    row, scale = inverse[own, own], jax.vmap(jnp.diag)(inverse)
    freedom = jnp.maximum(sums.count - count - number, 1.0)
    correlation = jnp.where(
        jnp.eye(num_vars) > 0, 0.0, -row / jnp.sqrt(scale.diagonal()[:, None] * scale)
    )
    coefficient = jnp.where(jnp.eye(num_vars) > 0, 0.0, -row / scale.diagonal()[:, None])
    linear = [
        t_statistic(correlation, freedom[:, None]),
        jnp.arcsinh(coefficient) / 3.0,
        jnp.log(1.0 / scale.diagonal() / freedom + 1e-4)[:, None] * one,
        jnp.log(1.0 / jnp.diag(precision) / jnp.maximum(sums.observational - number, 1.0) + 1e-4)[
            :, None
        ]
        * one,
    ]

    cubic_freedom = jnp.maximum(sums.observational - 3.0 * number, 5.0)
    mean = sums.observed[0, 1:] / jnp.maximum(sums.observational, 1.0)
    gram = (
        sums.observed[1:, 1:]
        - sums.observational * mean[:, None] * mean[None]
        + jnp.eye(3 * num_vars)
    )
    # [i, j, power, power]
    joint = positive_inverse(gram).reshape(num_vars, 3, num_vars, 3).transpose(0, 2, 1, 3)
    # of the three powers of i, given all others'
    residual = jax.vmap(positive_inverse)(joint[own, own])
    slopes = -jnp.einsum("ip,ijpq->ijq", residual[:, 0], joint)
    # of j given all but i; its inverse without i
    rest = joint[own, own][None] - jnp.einsum("jiap,ipq,ijqb->ijab", joint, residual, joint)
    unit = jnp.eye(3)[None, None]
    rest = jnp.where(jnp.eye(num_vars)[..., None, None] > 0, unit, rest + 1e-6 * unit)
    reduction = jnp.einsum(
        "ijp,ijpq,ijq->ij", slopes, jax.vmap(jax.vmap(positive_inverse))(rest), slopes
    )
    left = jnp.maximum(residual[:, 0, 0], 1e-3)
    cubic = [
        f_statistic(reduction, left[:, None], cubic_freedom) * (1.0 - jnp.eye(num_vars)),
        jnp.log(left / cubic_freedom + 1e-4)[:, None] * one,
    ]
    is_target = (own == task.target)[:, None]
    return [*linear, *cubic, jnp.where(is_target, target_test(sums.regression, task)[None], 0.0)]


def local_posteriors(
    sums: Sums, likely: Float[Array, "vars vars"]
) -> list[Float[Array, "vars vars"]]:
    """Log-odds that j is among the parents of i `[i, j]`, were the parents of i chosen regardless
    of all other variables.

    From the regressions of i on every subset of the `NUM_LIKELY` variables with the largest
    `likely[i]`, over all rows in which i was not set (Cooper and Yoo, UAI 1999), compared by BIC;
    linear, and with three powers of each. Everyone else has the odds of a column that explains
    nothing.
    """
    num_vars = likely.shape[0]
    num_likely = min(NUM_LIKELY, num_vars)
    members = (np.arange(2**num_likely)[:, None] >> np.arange(num_likely) & 1).astype(bool)

    def one(i, likely, powers):
        strength, candidates = jax.lax.top_k(likely, num_likely)
        count = jnp.maximum(powers[0, 0], 1.0)
        mean = powers[0] / count
        centred = powers - count * mean[:, None] * mean[None] + jnp.eye(powers.shape[0])
        columns = (1 + 3 * candidates[:, None] + jnp.arange(3)[None]).reshape(-1)
        found = []
        for width, chosen in ((1, columns[::3]), (3, columns)):
            chosen = jnp.append(chosen, 1 + 3 * i)
            residual = subset_residuals(centred[chosen][:, chosen], width)
            score = -0.5 * count * jnp.log(residual / count) - 0.5 * width * jnp.log(
                count
            ) * jnp.asarray(members.sum(1), residual.dtype)
            # padding, and i itself
            score = jnp.where((jnp.asarray(members) & (strength < 0)[None]).any(1), -jnp.inf, score)
            with_, without = (
                jax.nn.logsumexp(jnp.where(jnp.asarray(m), score[:, None], -jnp.inf), axis=0)
                for m in (members, ~members)
            )
            noise = -0.5 * width * jnp.log(count)
            odds = (
                jnp.full(num_vars, noise)
                .at[candidates]
                .set(jnp.where(strength < 0, noise, with_ - without))
            )
            found.append(jnp.arcsinh(odds) / 2.0)
        return tuple(found)

    return list(jax.vmap(one)(jnp.arange(num_vars), likely, sums.powers[None] - sums.under_do))


def subset_residuals(gram: Float[Array, "columns columns"], width: int) -> Float[Array, " subsets"]:
    """Residual sum of squares of the last column on every subset of groups of `width` columns;
    group k is in a subset if bit k of its index is set.

    By elimination, one group after the other, each of them once with and once without.
    """
    matrices = gram[None]
    for start in range(0, gram.shape[0] - 1, width):
        eliminated = matrices
        for column in range(start, start + width):
            pivot = eliminated[:, column, column]
            eliminated = (
                eliminated
                - eliminated[:, :, column, None]
                * eliminated[:, None, column]
                / jnp.maximum(pivot, 1e-3)[:, None, None]
            )
        matrices = jnp.concatenate([matrices, eliminated])
    return jnp.maximum(matrices[:, -1, -1], 1e-3)


def target_test(moments: Float[Array, "columns columns"], task: Task) -> Float[Array, " vars"]:
    """F-statistic of the three powers of every variable in the regression of the target on all of
    them.
    """
    num_vars, count = task.var_mask.shape[0], jnp.maximum(moments[0, 0], 1.0)
    mean = moments[0] / count
    centred = moments - count * mean[:, None] * mean[None]
    norm = jnp.diag(centred)[1:-1]
    used = jnp.repeat(task.possible_parents, 3) & (norm > 1e-4)
    scale = jnp.where(used, 1.0 / jnp.sqrt(jnp.where(used, norm, 1.0)), 0.0)
    inverse = positive_inverse(
        centred[1:-1, 1:-1] * scale[:, None] * scale[None] + jnp.diag(jnp.where(used, 1e-3, 1.0))
    )
    along, total = centred[1:-1, -1] * scale, jnp.maximum(centred[-1, -1], 1e-3)
    slopes = (inverse @ along).reshape(num_vars, 3)
    residual = jnp.maximum(total - along @ slopes.reshape(-1), 1e-3 * total)
    own = jnp.arange(num_vars)
    blocks = jax.vmap(positive_inverse)(inverse.reshape(num_vars, 3, num_vars, 3)[own, :, own])
    reduction = jnp.einsum("ip,ipq,iq->i", slopes, blocks, slopes)
    return f_statistic(reduction, residual, jnp.maximum(count - 3.0 * task.var_mask.sum(), 1.0))


def responses(
    sums: Sums,
    observed: Float[Array, "vars vars"],
    precision: Float[Array, "vars vars"],
    freedom: Float[Array, ""],
) -> list[Float[Array, "vars vars"]]:
    """How variable i answered when j was set, `[i, j]`: a parent's regression carries over to
    do(j), a child's breaks.

    Squared residual of i on all others, and of i on j alone, by the observational regressions and
    in their units; square of i; slope of i on j; how many rows.
    """
    num_vars = observed.shape[0]
    count, columns = sums.under_do[:, 0, 0], 1 + 3 * jnp.arange(num_vars)
    under_do = sums.under_do[:, columns][:, :, columns]
    rows, off = jnp.maximum(count, 1.0)[None], 1.0 - jnp.eye(num_vars)
    of_i = jnp.einsum("jii->ij", under_do) / rows
    together = jnp.einsum("jij->ij", under_do) / rows
    of_j = jnp.einsum("jjj->j", under_do)[None] / rows
    residual = (
        jnp.einsum("ia,jab,ib->ij", precision, under_do, precision)
        / jnp.diag(precision)[:, None]
        * freedom
        / rows
    )
    slope = observed / jnp.diag(observed)[None]
    unexplained = jnp.maximum(1.0 - slope * slope.T, 0.01)
    alone = (of_i - 2.0 * slope * together + slope**2 * of_j) / unexplained
    return [
        jnp.log1p(jnp.maximum(residual, 0.0)) / 3.0 * off,
        jnp.log1p(jnp.maximum(alone, 0.0)) / 2.0 * off,
        jnp.log1p(of_i) * off,
        jnp.arcsinh(together / (of_j + 0.1)) * off,
        jnp.log1p(count)[None] * jnp.ones_like(off),
    ]


# --- of every variable and value ---


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
