"""What the data say of every ordered pair of variables: mean products of features, and what
regressions and interventions say of the two. Nothing here is learned.

Two facts about Gram matrices, P the inverse of one of centred or standardised columns, give nearly
all of it:

- Regression of a column i on all others: coefficients -P_ij / P_ii, residual sum of squares
  1 / P_ii, partial correlations -P_ij / sqrt(P_ii P_jj) (Lauritzen 1996, section 5.1.3).
- Leaving q columns with coefficients b out of a regression adds b' V^-1 b to its residual sum of
  squares, V their block of the inverse Gram matrix of its columns (Wald's form of the F-test, Seber
  and Lee 2003, theorem 4.1).

Before they are inverted, Gram matrices of standardised columns get a `pseudo_row` added, a ridge
penalty: what one more row of independent variables, each varying as observed, would add on average.
So they have an inverse whatever the number of rows.

Numbers are compressed by log1p and arcsinh and divided by a round number, so that the network reads
inputs of the order of one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lib.linalg import positive_inverse
from lib.regression import centred_moments, ridge
from lib.scm import Task
from lib.sums import NUM_FEATURES, Sums


NUM_LIKELY = 5  # variables whose subsets are compared as the parents of another: 32 of them
NUM_PAIR_STATISTICS = NUM_FEATURES**2 + 33
# Compressed statistics are clipped there, lest one degenerate regression outweigh all other inputs.
# First to reach it are a residual standard deviation of e^-2.5 = 0.08 and 147 rows under do(j).
MAX_STATISTIC = 5.0
# Floor of sums of squares where a column's own is of the order of the number of rows, or one: less
# is rounding in float32, after sums over some hundred rows.
MIN_SQUARES = 1e-3
Pairs = Float[Array, "vars vars"]


def pair_statistics(sums: Sums, task: Task) -> Float[Array, "vars vars pair"]:
    """What the data say of each ordered pair (i, j).

    ======  ========================================================================
    number  what
    ======  ========================================================================
    196     mean products of the 14 features of i and the 14 of j
    4       `linear_regressions`, of i on j
    1       `target_test`, of j, where i is the target; zero elsewhere
    2       `local_posteriors`, of j as a parent of i
    5       `responses`, of i to do(j)
    12      the four lines above, of j on i
    3       whether i is the target, whether j is, whether they are the same
    4       whether an edge i -> j is known to be there, or not to be; the same of j -> i
    2       log(1 + rows) / 5: observational, interventional
    ======  ========================================================================
    """
    num_vars, present = task.var_mask.shape[0], task.var_mask
    own = jnp.eye(num_vars, dtype=bool)
    is_target = (jnp.arange(num_vars) == task.target)[:, None]

    # Mean products [i, j, feature of i, feature of j]. The signed logarithm is linear below 1 / 5,
    # where noise of some 1 / sqrt(rows) is, and keeps the largest, He_3(5)^2 / 6, below 10.
    moments = (
        (sums.features / jnp.maximum(sums.count, 1.0))
        .reshape(num_vars, NUM_FEATURES, num_vars, NUM_FEATURES)
        .transpose(0, 2, 1, 3)
        .reshape(num_vars, num_vars, -1)
    )
    moments = jnp.sign(moments) * jnp.log1p(5.0 * jnp.abs(moments))

    # Gram matrix of the observations; scaled to a diagonal of one it is the correlation.
    gram = sums.observed + jnp.diag(pseudo_row(sums, sums.observed))
    precision = positive_inverse(gram)
    freedom = jnp.maximum(sums.observational - present.sum(), 1.0)
    marginal = t_statistic(unit_diagonal(gram), sums.observational)

    # Who may be a parent of whom: what correlates with it, or stays in its regression.
    linear = linear_regressions(sums, precision, task)
    likely = jnp.where(~own & present[None], jnp.abs(marginal) + jnp.abs(linear[0]), -1.0)
    directed = jnp.stack(
        [
            *linear,
            jnp.where(is_target, target_test(sums.powers, task)[None], 0.0),
            *local_posteriors(sums, likely),
            *responses(sums, gram, precision, freedom),
        ],
        -1,
    )
    found = jnp.concatenate([directed, directed.swapaxes(0, 1)], -1)
    kept = (present[:, None] & (present[None] | own))[..., None]
    found = jnp.where(kept, jnp.clip(found, -MAX_STATISTIC, MAX_STATISTIC), 0.0)

    # / 5: log(150) is five
    rows = jnp.log(jnp.stack([sums.observational, sums.count - sums.observational]) + 1.0) / 5.0
    told = jnp.zeros(own.shape, int) if task.known is None else task.known
    marks = (is_target, is_target.T, own, told > 0, told < 0, told.T > 0, told.T < 0, *rows)
    known = [jnp.broadcast_to(x, own.shape) for x in marks]
    return jnp.concatenate([moments, found, jnp.stack(known, -1)], -1)


def linear_terms(
    moments: Float[Array, "*batch polynomials polynomials"],
) -> Float[Array, "*batch vars vars"]:
    """Products of the variables themselves, the first of the three polynomials of each."""
    return moments[..., 1::3, 1::3]


def pseudo_row(sums: Sums, gram: Float[Array, "*batch vars vars"]) -> Float[Array, "*batch vars"]:
    """What is added to the diagonal of a Gram matrix, so that it has an inverse: of each variable
    the variance over observational rows, at most one, or one where there are none.
    """
    variance = jnp.diag(sums.observed) / jnp.maximum(sums.observational, 1.0)
    known = (sums.observational > 1) & (variance > 0)
    variance = jnp.where(known, jnp.clip(variance, 1e-4, 1.0), 1.0)
    # 5e-5 of a sum of squares is some 400 of its roundings, which two copies of one variable sum
    least = 5e-5 * jnp.diagonal(gram, axis1=-2, axis2=-1)
    return jnp.clip(least, jnp.broadcast_to(variance, least.shape), 1.0)


def unit_diagonal(matrix: Pairs) -> Pairs:
    """m_ij / sqrt(m_ii m_jj) of a positive matrix, but zeros on the diagonal."""
    scale = jnp.sqrt(jnp.diag(matrix))
    return matrix / scale[:, None] / scale[None] * (1.0 - jnp.eye(matrix.shape[0]))


def t_statistic(
    correlation: Float[Array, "*shape"], freedom: Float[Array, "*other"]
) -> Float[Array, "*shape"]:
    """arcsinh(t) / 3 of a (partial) correlation r, t = r sqrt(freedom / (1 - r^2)), Student's where
    the true one is zero. arcsinh is linear where t is not significant and logarithmic beyond; a
    third of it is 0.5 for t = 2 and 1.8 for t = 100.
    """
    # of copies of a variable 1 - r^2 is rounding: t is 32 sqrt(freedom) at most
    scale = jnp.sqrt(jnp.maximum(1.0 - correlation**2, 1e-3))
    return jnp.arcsinh(correlation * jnp.sqrt(freedom) / scale) / 3.0


def f_statistic(
    reduction: Float[Array, "*shape"], residual: Float[Array, "*other"], freedom: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """log(1 + F) / 2 of three powers of a variable, F = (reduction / 3) / (residual / freedom):
    what leaving the three out adds to the residual sum of squares, and that sum. Half the
    logarithm, as F is of the order of t^2.
    """
    return jnp.log1p(jnp.maximum(reduction, 0.0) / residual * freedom / 3.0) / 2.0


def log_variance(residual: Float[Array, " vars"], freedom: Float[Array, "*vars"]) -> Pairs:
    """Log of a residual variance, sum of squares over freedom, of every i; the same for all j."""
    # 1e-4: an error of a hundredth of a standard deviation is as good as none
    variance = jnp.maximum(residual, 0.0) / freedom + 1e-4
    return jnp.log(variance)[:, None] * jnp.ones((1, residual.shape[0]))


# --- regressions of every variable on the others ---


def linear_regressions(sums: Sums, precision: Pairs, task: Task) -> list[Pairs]:
    """The linear regression of i on all others, and the share of j in it, `[i, j]`.

    Over all rows in which i was not set: t-statistic, arcsinh(coefficient) / 3, log of the residual
    variance. Observational: the log, from `precision`. Unlike for `ridge`, i is among the columns,
    and its row of their inverse says all this; rows are not centred: standardised, they nearly are.
    """
    num_vars = task.var_mask.shape[0]
    own, same, number = jnp.arange(num_vars), jnp.eye(num_vars) > 0, task.var_mask.sum()

    # [i]: Gram matrix [vars, vars] over the rows in which i was not set, inverted: P
    gram = linear_terms(sums.not_intervened)
    inverse = jax.vmap(positive_inverse)(gram + jax.vmap(jnp.diag)(pseudo_row(sums, gram)))
    # of the P of i: its row i, its diagonal, and of this the entry i
    row, diagonal = inverse[own, own], jax.vmap(jnp.diag)(inverse)
    of_own = diagonal.diagonal()
    scale = jnp.sqrt(jnp.maximum(of_own[:, None] * diagonal, 1e-20))  # below is rounding
    correlation = jnp.where(same, 0.0, -row / scale)
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


def target_test(moments: Float[Array, "powers powers"], task: Task) -> Float[Array, " vars"]:
    """F-statistic of the three powers of every variable in the regression of the target on all of
    them, over all rows in which it was not set (`Sums.powers`).
    """
    num_vars, count = task.var_mask.shape[0], jnp.maximum(moments[0, 0], 1.0)
    centred = centred_moments(moments)
    # Columns scaled to norm one. Left out are those that are not possible parents, and those that
    # do not vary: a norm of 1e-2 in half-widths of a range, over all rows.
    norm = jnp.diag(centred)[1:-1]
    used = jnp.repeat(task.possible_parents, 3) & (norm > 1e-4)
    scale = jnp.pad(1.0 / jnp.sqrt(jnp.where(used, norm, 1.0)), 1, constant_values=1.0)
    centred = centred * scale[:, None] * scale[None]
    # 1e-3 of their norm lets float32 solve for powers that are nearly collinear; one, where a
    # column is left out, gives it an inverse
    slopes, inverse = ridge(centred, used, jnp.where(used, 1e-3, 1.0))
    total = jnp.maximum(centred[-1, -1], MIN_SQUARES)
    # at least a thousandth: float32 cannot tell a better fit from a perfect one
    residual = jnp.maximum(total - centred[1:-1, -1] @ slopes, 1e-3 * total)
    # b' V^-1 b, V the block of a variable
    own, slopes = jnp.arange(num_vars), slopes.reshape(num_vars, 3)
    blocks = jax.vmap(positive_inverse)(inverse.reshape(num_vars, 3, num_vars, 3)[own, :, own])
    reduction = jnp.einsum("ip,ipq,iq->i", slopes, blocks, slopes)
    return f_statistic(reduction, residual, jnp.maximum(count - 3.0 * task.var_mask.sum(), 1.0))


# --- parents chosen one variable at a time ---


def local_posteriors(sums: Sums, likely: Pairs) -> list[Pairs]:
    """arcsinh(log odds) / 2 that j is among the parents of i `[i, j]`, were the parents of i chosen
    regardless of all other variables.

    All subsets S of the `NUM_LIKELY` variables with the largest `likely[i]` are equally probable at
    first; data are all n rows in which i was not set (Cooper and Yoo, UAI 1999). By the BIC
    (Schwarz 1978), the log evidence of S is -n/2 log(RSS_S / n) - k_S/2 log n, RSS_S the residual
    sum of squares of i on the k_S columns of S; the odds are a sum over subsets with j to that over
    those without. Linear, one column a variable, and with three polynomials of each. Everyone else
    has the odds of a column that explains nothing, -k/2 log n.
    """
    num_vars = likely.shape[0]
    num_likely = min(NUM_LIKELY, num_vars)
    # [subsets, likely]: bit k of a subset's index is member k
    members = (jnp.arange(2**num_likely)[:, None] >> jnp.arange(num_likely)[None] & 1) > 0

    def one(i, likely, moments):
        """Compressed log odds `[vars]` of every j as a parent of this i, linear and cubic."""
        strength, candidates = jax.lax.top_k(likely, num_likely)
        count = jnp.maximum(moments[0, 0], 1.0)
        centred = centred_moments(moments)
        pseudo = jnp.ones(len(centred)).at[1::3].set(pseudo_row(sums, linear_terms(centred)))
        centred += jnp.diag(pseudo)
        columns = (1 + 3 * candidates[:, None] + jnp.arange(3)[None]).reshape(-1)
        found = []
        for width, chosen in ((1, columns[::3]), (3, columns)):
            chosen = jnp.append(chosen, 1 + 3 * i)
            residual = subset_residuals(centred[chosen][:, chosen], width)
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

    return list(jax.vmap(one)(jnp.arange(num_vars), likely, sums.not_intervened))


def subset_residuals(gram: Float[Array, "columns columns"], width: int) -> Float[Array, " subsets"]:
    """Residual sum of squares of the last column on every subset of groups of `width` columns;
    group k is in a subset if bit k of its index is set.

    By elimination: sweeping column c out of a Gram matrix A leaves A - a_c a_c' / a_cc, that of the
    residuals on it (Beaton 1964). One group after the other, each both swept and not.
    """
    matrices = gram[None]
    for start in range(0, gram.shape[0] - 1, width):
        swept = matrices
        for column in range(start, start + width):
            # [subsets, columns, columns]
            pivot = jnp.maximum(swept[:, column, column], MIN_SQUARES)[:, None, None]
            swept = swept - swept[:, :, column, None] * swept[:, None, column] / pivot
        matrices = jnp.concatenate([matrices, swept])
    return jnp.maximum(matrices[:, -1, -1], MIN_SQUARES)


# --- answers to interventions ---


def responses(sums: Sums, gram: Pairs, precision: Pairs, freedom: Float[Array, ""]) -> list[Pairs]:
    """How variable i answered when j was set, `[i, j]`: a regression on all parents holds under
    do(j) too, one on a child does not (invariance, Peters et al. 2016).

    Mean square under do(j) of the residual of i by its observational regressions on all others, and
    on j alone, both in units of their residual variance; mean square of i; slope of i on j through
    the observational means; log(1 + rows).
    """
    off = 1.0 - jnp.eye(gram.shape[0])
    # [j]: Gram matrix over the rows in which j was set; of it, means of x_i^2, x_i x_j and x_j^2
    count, under_do = sums.under_do[:, 0, 0], linear_terms(sums.under_do)
    rows = jnp.maximum(count, 1.0)[None]
    of_i = jnp.einsum("jii->ij", under_do) / rows
    together = jnp.einsum("jij->ij", under_do) / rows
    of_j = jnp.einsum("jjj->j", under_do)[None] / rows
    # The residual of i on all others is e = P_i. x / P_ii, of variance 1 / (P_ii freedom) where it
    # was fitted: the mean of e^2 in units of this is one where the regression holds.
    residual = jnp.einsum("ia,jab,ib->ij", precision, under_do, precision)
    residual = residual / jnp.diag(precision)[:, None] * freedom / rows
    # Of i on j alone, slope b: mean of (x_i - b x_j)^2 in units of 1 - r^2, at least the hundredth
    # that |r| = .995 leaves.
    slope = gram / jnp.diag(gram)[None]
    unexplained = jnp.maximum(1.0 - slope * slope.T, 0.01)
    alone = (of_i - 2.0 * slope * together + slope**2 * of_j) / unexplained
    return [
        jnp.log1p(jnp.maximum(residual, 0.0)) / 3.0 * off,
        jnp.log1p(jnp.maximum(alone, 0.0)) / 2.0 * off,
        jnp.log1p(of_i) * off,
        # 0.1 shrinks the slope where j was only set within a third of a standard deviation
        jnp.arcsinh(together / (of_j + 0.1)) * off,
        jnp.log1p(count)[None] * jnp.ones_like(off),
    ]
