"""What the data say of every ordered pair of variables: products of features, and what regressions
and interventions say of the two. Nothing here is learned.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lib.linalg import positive_inverse
from lib.regression import centred_moments, ridge
from lib.scm import Task
from lib.sums import FARTHEST, NUM_FEATURES, Sums


NUM_LIKELY = 5  # candidates whose subsets are compared as the parents of a variable
NUM_PAIR = NUM_FEATURES**2 + 36  # numbers of every ordered pair of variables
Pairs = Float[Array, "vars vars"]


def pair_statistics(sums: Sums, task: Task) -> Float[Array, "vars vars pair"]:
    """What the data say of each ordered pair (i, j), all of the order of one.

    Mean products of features of i and j. Covariance; t-statistics of i on j alone and of i on j and
    all others, observational. Then, for i on j and the reverse, what `linear_regressions`,
    `cubic_regressions`, `target_test`, `local_posteriors` and `responses` give. Then what is known
    of the pair: whether i, and j, is the target, whether they are the same, and how many rows there
    are, observed and intervened.
    """
    num_vars, present = task.var_mask.shape[0], task.var_mask
    own = jnp.eye(num_vars, dtype=bool)
    is_target = (jnp.arange(num_vars) == task.target)[:, None]

    # Mean products [i, j, feature of i, feature of j], their digits spread by a signed logarithm.
    moments = (sums.features / jnp.maximum(sums.count, 1.0)).reshape(
        num_vars, NUM_FEATURES, num_vars, NUM_FEATURES
    )
    moments = moments.transpose(0, 2, 1, 3).reshape(num_vars, num_vars, -1)
    moments = jnp.sign(moments) * jnp.log1p(5.0 * jnp.abs(moments))

    # Gram matrix [vars, vars] of the observations, with one row's worth of independence. Scaled, it
    # is the correlation, and its inverse minus the partial correlation (Lauritzen 1996, 5.1.3).
    gram = first_powers(sums.observed) + jnp.eye(num_vars)
    precision = positive_inverse(gram)
    freedom = jnp.maximum(sums.observational - present.sum(), 1.0)
    correlated = t_statistic(cosine(gram), sums.observational)
    symmetric = [
        gram / (sums.observational + 1.0),
        correlated,
        t_statistic(-cosine(precision), freedom),
    ]

    # Who may be a parent of whom: what correlates with it, or stays in its regression.
    linear = linear_regressions(sums, precision, task)
    likely = jnp.where(~own & present[None], jnp.abs(correlated) + jnp.abs(linear[0]), -1.0)
    directed = [
        *linear,
        *cubic_regressions(sums, task),
        jnp.where(is_target, target_test(sums.regression, task)[None], 0.0),
        *local_posteriors(sums, likely),
        *responses(sums, gram, precision, freedom),
    ]
    directed = jnp.stack(directed, -1)
    statistics = jnp.concatenate([jnp.stack(symmetric, -1), directed, directed.swapaxes(0, 1)], -1)
    kept = (present[:, None] & (present[None] | own))[..., None]
    bounded = jnp.where(kept, jnp.clip(statistics, -FARTHEST, FARTHEST), 0.0)

    rows = jnp.log(jnp.stack([sums.observational, sums.count - sums.observational]) + 1.0) / 5.0
    marks = [jnp.broadcast_to(x, own.shape) for x in (is_target, is_target.T, own, *rows)]
    return jnp.concatenate([moments, bounded, jnp.stack(marks, -1)], -1)


def first_powers(powers: Float[Array, "*batch powers powers"]) -> Float[Array, "*batch vars vars"]:
    """The products of the variables themselves among those of one and three powers of each."""
    return powers[..., 1::3, 1::3]


def cosine(matrix: Pairs) -> Pairs:
    """A symmetric positive matrix scaled to a diagonal of one, which is then left out."""
    scale = jnp.sqrt(jnp.diag(matrix))
    return matrix / scale[:, None] / scale[None] * (1.0 - jnp.eye(matrix.shape[0]))


def t_statistic(
    correlation: Float[Array, "*shape"], freedom: Float[Array, "*other"]
) -> Float[Array, "*shape"]:
    """Of a (partial) correlation r, t = r sqrt(freedom / (1 - r^2)), on a logarithmic scale: its
    tens, not its hundreds, decide who is a parent.
    """
    scale = jnp.sqrt(jnp.maximum(1.0 - correlation**2, 1e-3))
    return jnp.arcsinh(correlation * jnp.sqrt(freedom) / scale) / 3.0


def f_statistic(
    reduction: Float[Array, "*shape"], residual: Float[Array, "*other"], freedom: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Of three powers of a variable, by what leaving them out adds to a residual sum of squares; on
    a logarithmic scale.
    """
    return jnp.log1p(jnp.maximum(reduction, 0.0) / residual * freedom / 3.0) / 2.0


def log_variance(residual: Float[Array, " vars"], freedom: Float[Array, "*vars"]) -> Pairs:
    """Log of a residual variance of every i, the same for all j `[i, j]`."""
    return jnp.log(residual / freedom + 1e-4)[:, None] * jnp.ones((1, residual.shape[0]))


# --- regressions of every variable on the others ---


def linear_regressions(sums: Sums, precision: Pairs, task: Task) -> list[Pairs]:
    """The linear regression of i on all others, and the share of j in it, `[i, j]`.

    Over all rows in which i was not set: t-statistic, coefficient, log of the residual variance.
    Observational: the log. Unlike for `ridge`, i is among the columns, and its row of their inverse
    says all this; and rows are not centred: standardised, they are nearly.
    """
    num_vars = task.var_mask.shape[0]
    own, same, number = jnp.arange(num_vars), jnp.eye(num_vars) > 0, task.var_mask.sum()

    # [i]: Gram matrix [vars, vars] over the rows in which i was not set, and its inverse P
    free = first_powers(sums.powers[None] - sums.under_do)
    inverse = jax.vmap(positive_inverse)(free + jnp.eye(num_vars)[None])
    # Regression of i on the others from the row of i: coefficient -P_ij / P_ii, partial correlation
    # -P_ij / sqrt(P_ii P_jj), residual sum of squares 1 / P_ii (Lauritzen 1996, 5.1.3).
    row, scale = inverse[own, own], jax.vmap(jnp.diag)(inverse)
    of_own = scale.diagonal()
    correlation = jnp.where(same, 0.0, -row / jnp.sqrt(of_own[:, None] * scale))
    coefficient = jnp.where(same, 0.0, -row / of_own[:, None])
    freedom = jnp.maximum(sums.count - sums.under_do[:, 0, 0] - number, 1.0)
    return [
        t_statistic(correlation, freedom[:, None]),
        jnp.arcsinh(coefficient) / 3.0,
        log_variance(1.0 / of_own, freedom),
        log_variance(
            1.0 / jnp.diag(precision), jnp.maximum(sums.observational - number, 1.0)[None]
        ),
    ]


def cubic_regressions(sums: Sums, task: Task) -> list[Pairs]:
    """The regression of i on three powers of each other variable, observational: F-statistic of the
    powers of j, and the log of the residual variance, `[i, j]`.

    Unlike `target_test`, all outcomes at once, from one inverse.
    """
    num_vars = task.var_mask.shape[0]
    own, same = jnp.arange(num_vars), jnp.eye(num_vars)
    freedom = jnp.maximum(sums.observational - 3.0 * task.var_mask.sum(), 5.0)

    # centred Gram matrix of all powers, and its inverse by blocks [i, j, power, power]
    gram = centred_moments(sums.observed)[1:, 1:] + jnp.eye(3 * num_vars)
    joint = positive_inverse(gram).reshape(num_vars, 3, num_vars, 3).transpose(0, 2, 1, 3)
    # The inverse's own block of i, inverted, is the residual Gram matrix of i's powers given all
    # others'; its first row gives the slopes of X_i itself on the powers of j.
    residual = jax.vmap(positive_inverse)(joint[own, own])
    slopes = -jnp.einsum("ip,ijpq->ijq", residual[:, 0], joint)
    # Covariance of those slopes: j's block of the inverse once i is left out (block inversion).
    rest = joint[own, own][None] - jnp.einsum("jiap,ipq,ijqb->ijab", joint, residual, joint)
    unit = jnp.eye(3)[None, None]
    rest = jnp.where(same[..., None, None] > 0, unit, rest + 1e-6 * unit)
    # What leaving j out adds to the residual sum of squares: slopes' covariance^-1 slopes (Wald).
    inverse = jax.vmap(jax.vmap(positive_inverse))(rest)
    reduction = jnp.einsum("ijp,ijpq,ijq->ij", slopes, inverse, slopes)
    left = jnp.maximum(residual[:, 0, 0], 1e-3)
    f = f_statistic(reduction, left[:, None], freedom) * (1.0 - same)
    return [f, log_variance(left, freedom[None])]


def target_test(moments: Float[Array, "columns columns"], task: Task) -> Float[Array, " vars"]:
    """F-statistic of the three powers of every variable in the regression of the target on all of
    them, over all rows in which it was not set.
    """
    num_vars, count = task.var_mask.shape[0], jnp.maximum(moments[0, 0], 1.0)
    centred = centred_moments(moments)
    # columns scaled to norm one, those that do not vary or are not possible parents left out
    norm = jnp.diag(centred)[1:-1]
    used = jnp.repeat(task.possible_parents, 3) & (norm > 1e-4)
    scale = jnp.pad(1.0 / jnp.sqrt(jnp.where(used, norm, 1.0)), 1, constant_values=1.0)
    centred = centred * scale[:, None] * scale[None]
    slopes, inverse = ridge(centred, used, jnp.where(used, 1e-3, 1.0))
    total = jnp.maximum(centred[-1, -1], 1e-3)
    residual = jnp.maximum(total - centred[1:-1, -1] @ slopes, 1e-3 * total)
    # what leaving a variable's block out adds to the residual, as above
    own, slopes = jnp.arange(num_vars), slopes.reshape(num_vars, 3)
    blocks = jax.vmap(positive_inverse)(inverse.reshape(num_vars, 3, num_vars, 3)[own, :, own])
    reduction = jnp.einsum("ip,ipq,iq->i", slopes, blocks, slopes)
    return f_statistic(reduction, residual, jnp.maximum(count - 3.0 * task.var_mask.sum(), 1.0))


# --- parents chosen one variable at a time ---


def local_posteriors(sums: Sums, likely: Pairs) -> list[Pairs]:
    """Log-odds that j is among the parents of i `[i, j]`, were the parents of i chosen regardless
    of all other variables.

    From the regressions of i on every subset of the `NUM_LIKELY` variables with the largest
    `likely[i]`, over all rows in which i was not set (Cooper and Yoo, UAI 1999), compared by BIC;
    linear, and with three powers of each. Everyone else has the odds of a column that explains
    nothing.
    """
    num_vars = likely.shape[0]
    num_likely = min(NUM_LIKELY, num_vars)
    # [subsets, likely]: bit k of a subset's index is member k
    members = (jnp.arange(2**num_likely)[:, None] >> jnp.arange(num_likely)[None] & 1) > 0

    def one(i, likely, powers):
        strength, candidates = jax.lax.top_k(likely, num_likely)
        count = jnp.maximum(powers[0, 0], 1.0)
        centred = centred_moments(powers) + jnp.eye(powers.shape[0])
        columns = (1 + 3 * candidates[:, None] + jnp.arange(3)[None]).reshape(-1)
        found = []
        for width, chosen in ((1, columns[::3]), (3, columns)):
            chosen = jnp.append(chosen, 1 + 3 * i)
            residual = subset_residuals(centred[chosen][:, chosen], width)
            # BIC of a subset (Schwarz 1978): -n/2 log(RSS / n) - k/2 log n
            cost = -0.5 * width * jnp.log(count)
            score = -0.5 * count * jnp.log(residual / count) + cost * members.sum(1)
            # padding, and i itself, are in no subset
            score = jnp.where((members & (strength < 0)[None]).any(1), -jnp.inf, score)
            with_, without = (
                jax.nn.logsumexp(jnp.where(m, score[:, None], -jnp.inf), axis=0)
                for m in (members, ~members)
            )
            odds = jnp.where(strength < 0, cost, with_ - without)
            found.append(jnp.arcsinh(jnp.full(num_vars, cost).at[candidates].set(odds)) / 2.0)
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
            # A - a a' / a_cc, the sweep of one column (Beaton 1964): [subsets, columns, columns]
            pivot = jnp.maximum(eliminated[:, column, column], 1e-3)[:, None, None]
            outer = eliminated[:, :, column, None] * eliminated[:, None, column]
            eliminated = eliminated - outer / pivot
        matrices = jnp.concatenate([matrices, eliminated])
    return jnp.maximum(matrices[:, -1, -1], 1e-3)


# --- answers to interventions ---


def responses(sums: Sums, gram: Pairs, precision: Pairs, freedom: Float[Array, ""]) -> list[Pairs]:
    """How variable i answered when j was set, `[i, j]`: a parent's regression carries over to
    do(j), a child's breaks (invariance, Peters et al. 2016).

    Squared residual of i on all others, and of i on j alone, by the observational regressions and
    in their units; square of i; slope of i on j; how many rows.
    """
    off = 1.0 - jnp.eye(gram.shape[0])
    # [j]: Gram matrix over the rows in which j was set; of it, means of x_i^2, x_i x_j and x_j^2
    count, under_do = sums.under_do[:, 0, 0], first_powers(sums.under_do)
    rows = jnp.maximum(count, 1.0)[None]
    of_i = jnp.einsum("jii->ij", under_do) / rows
    together = jnp.einsum("jij->ij", under_do) / rows
    of_j = jnp.einsum("jjj->j", under_do)[None] / rows
    # The residual of i on all others is P_i x / P_ii, of variance 1 / P_ii / freedom: the mean
    # square under do(j) in that unit, one where the regression carries over.
    residual = jnp.einsum("ia,jab,ib->ij", precision, under_do, precision)
    residual = residual / jnp.diag(precision)[:, None] * freedom / rows
    # of i on j alone, in units of its observational residual variance 1 - r^2
    slope = gram / jnp.diag(gram)[None]
    unexplained = jnp.maximum(1.0 - slope * slope.T, 0.01)
    alone = (of_i - 2.0 * slope * together + slope**2 * of_j) / unexplained
    return [
        jnp.log1p(jnp.maximum(residual, 0.0)) / 3.0 * off,
        jnp.log1p(jnp.maximum(alone, 0.0)) / 2.0 * off,
        jnp.log1p(of_i) * off,
        jnp.arcsinh(together / (of_j + 0.1)) * off,
        jnp.log1p(count)[None] * jnp.ones_like(off),
    ]
