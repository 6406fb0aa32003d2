"""Step 1 of the expert: a prior over parent sets from observational data, by bootstrapped doubly
robust causal feature selection in closed form.

Quinzan, Soleymani, Jaillet, Rojas, Bauer, "DRCFS: Doubly Robust Causal Feature Selection" (ICML
2023), as PARENT_SCALE uses it: X_i is a parent of Y if leaving it out lowers chi = E[E[Y | X]^2],
chi_0 > chi_i. Both are estimated by a doubly robust score of two nuisances, a regression and a
Riesz representer, which here are both estimates of E[Y | X] and cross-fitted. There every nuisance
is a three-layer network; here it is a ridge regression on [1, x, random Fourier features], so that
all bootstraps, folds and left-out variables are one batch of linear systems. Three further
differences:
1. rows keep their fold across bootstraps, so a row that a bootstrap drew twice is never on both
   sides of a split;
2. the regression without a variable uses the features of the full one with that variable's
   frequencies set to zero, which pairs the two and removes noise from their difference;
3. leaving a parent out must make the product of residuals larger, where the published test also
   accepts a significant fall.
"""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Key

from lib.linalg import positive_solve
from lib.regression import Scale
from lib.scm import Task


# ridge penalties per row: of the linear part only to make the system regular, and of the Fourier
# features, which can fit noise
AFFINE_PENALTY, FOURIER_PENALTY = 1e-3, 0.01
NUM_FOLDS = 5  # of the cross-fitting
FALSE_DISCOVERIES = 0.05  # their rate among the selected
UNION_SIZE = 4  # variables whose subsets are all candidates: 16 sets


def doubly_robust_prior(
    key: Key[Array, ""],
    rows: Float[Array, "samples vars"],
    task: Task,
    num_bootstraps: int = 10,
    num_features: int = 100,
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """Candidate parent sets of the target and their log-probabilities: the frequencies with which
    bootstraps select them.

    `rows[samples, vars]` are observational, in any units; constant columns are never selected. The
    number of sets is fixed, `max(num_bootstraps, vars)` and `2 ** UNION_SIZE` more, and no selected
    set can be lost; those that only fill up (repeated sets too) have log-probability -inf. If every
    bootstrap selects the empty set, the prior is uniform over single variables.

    These frequencies get half of the probability and all subsets of the `UNION_SIZE` variables
    selected most often the other half: a true set that no bootstrap returned whole can then still
    be found.
    """
    selected, p_values = select(key, rows, task, num_bootstraps, num_features)
    return with_union(selected, p_values, task.possible_parents)


def select(
    key: Key[Array, ""],
    rows: Float[Array, "samples vars"],
    task: Task,
    num_bootstraps: int,
    num_features: int,
) -> tuple[Bool[Array, "bootstraps vars"], Float[Array, "bootstraps vars"]]:
    """The parents that each bootstrap of `rows` selects, and the p-values behind it."""
    possible_parents, standard = task.possible_parents, Scale.of(rows)(rows)
    x, y = jnp.where(possible_parents[None], standard, 0.0), jnp.take(standard, task.target, axis=1)
    p_values = increase_p_values(*residual_products(key, x, y, num_bootstraps, num_features))
    return jax.vmap(lambda p: benjamini_yekutieli(p, possible_parents))(p_values), p_values


# --- residuals of the nuisance regressions ---


def residual_products(
    key: Key[Array, ""],
    x: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    num_bootstraps: int,
    num_features: int,
) -> tuple[
    Float[Array, "bootstraps rows"],
    Float[Array, "vars bootstraps rows"],
    Float[Array, "bootstraps rows"],
]:
    """Products (y - a)(y - g) of the held-out residuals of the two nuisances a and g, both
    regressions of y with random features of their own.

    Returns `full[bootstraps, rows]` (regressions on all variables), `without[vars, bootstraps,
    rows]` (on all but one), and how often each bootstrap drew each row, `counts[bootstraps, rows]`.
    Rows are in a random order, and filled up to a multiple of `NUM_FOLDS` with rows of count zero.
    """
    (num_rows, num_vars), (feature_key, bootstrap_key) = x.shape, jr.split(key)
    omega, phase = draw_nuisance_features(feature_key, x, num_features)
    order_key, draw_key = jr.split(bootstrap_key)
    # one assignment of rows to folds, common to all bootstraps
    order, fill = jr.permutation(order_key, num_rows), -num_rows % NUM_FOLDS
    drawn = jr.randint(draw_key, (num_bootstraps, num_rows), 0, num_rows)
    counts = jax.vmap(lambda d: jnp.bincount(d, length=num_rows))(drawn).astype(x.dtype)
    counts = jnp.pad(counts[:, order], ((0, 0), (0, fill)))
    x, y = jnp.pad(x[order], ((0, fill), (0, 0))), jnp.pad(y[order], (0, fill))
    # the intercept is penalised as weakly as the slopes: the data are standardised
    penalty = num_rows * jnp.concatenate(
        [jnp.full(1 + num_vars, AFFINE_PENALTY), jnp.full(num_features, FOURIER_PENALTY)]
    )

    def product(kept):
        """`[bootstraps, rows]` of the regressions on the variables in `kept[vars]`."""
        inside = x * kept[None, :]

        def nuisance(omega, phase):
            fourier = jnp.sqrt(2 / num_features) * jnp.cos(inside @ omega + phase[None, :])
            phi = jnp.concatenate([jnp.ones((len(x), 1)), inside, fourier], axis=1)
            return held_out_residuals(phi, y, counts, penalty)

        return jax.vmap(nuisance)(omega, phase).prod(0)

    # one regression after the other: their Gram matrices take much memory
    kept = jnp.concatenate([jnp.ones((1, num_vars)), 1 - jnp.eye(num_vars)])
    products = jax.lax.map(product, kept)
    return products[0], products[1:], counts


def draw_nuisance_features(
    key: Key[Array, ""], x: Float[Array, "samples vars"], num_features: int
) -> tuple[Float[Array, "2 vars features"], Float[Array, "2 features"]]:
    """Frequencies and phases of random Fourier features (Rahimi and Recht 2007) of an RBF kernel,
    for two nuisances; its lengthscale is the median distance between rows.
    """
    omega_key, phase_key = jr.split(key)
    squares = (x**2).sum(1)
    distance = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None, :] - 2 * x @ x.T, 0.0))
    # the floor is for rows of which most are equal
    lengthscale = jnp.maximum(jnp.median(distance), 1e-3)
    # one key per variable: padding variables leave the draws of the others as they are
    draw = jax.vmap(lambda i: jr.normal(jr.fold_in(omega_key, i), (2, num_features)), out_axes=1)
    phase = jr.uniform(phase_key, (2, num_features), maxval=2 * jnp.pi)
    return draw(jnp.arange(x.shape[1])) / lengthscale, phase


def held_out_residuals(
    phi: Float[Array, "rows features"],
    y: Float[Array, " rows"],
    counts: Float[Array, "bootstraps rows"],
    penalty: Float[Array, " features"],
) -> Float[Array, "bootstraps rows"]:
    """Residuals of the ridge regression of y on phi, each fold of rows predicted from the others:
    with c the counts of a bootstrap, y_r - phi_r' w_f for the rows r of fold f, where

        w_f = (sum_r c_r phi_r phi_r' + diag(penalty))^-1 sum_r c_r phi_r y_r    over r not in f.

    Not `ridge` of lib/regression.py: hundreds of features, for which Cholesky factors are the
    choice, rows with weights, and a fold left out of each Gram matrix.
    """
    phi, y = phi.reshape(NUM_FOLDS, -1, phi.shape[1]), y.reshape(NUM_FOLDS, -1)

    def of_bootstrap(count):
        weighted = phi * count.reshape(NUM_FOLDS, -1, 1)
        gram = jnp.einsum("frm,frk->fmk", weighted, phi)
        moment = jnp.einsum("frm,fr->fm", weighted, y)
        others = (gram.sum(0) + jnp.diag(penalty))[None] - gram, moment.sum(0)[None] - moment
        weights = jax.vmap(positive_solve)(others[0], others[1][:, :, None])
        return (y - jnp.einsum("frm,fmo->fr", phi, weights)).reshape(-1)

    return jax.vmap(of_bootstrap)(counts)


# --- which variables are parents ---


def increase_p_values(
    full: Float[Array, "bootstraps rows"],
    without: Float[Array, "vars bootstraps rows"],
    counts: Float[Array, "bootstraps rows"],
) -> Float[Array, "bootstraps vars"]:
    """Paired two-sided t-test of chi_0 = chi_i over the rows of a bootstrap; one where leaving the
    variable out did not increase the product of residuals.

    Each row's estimate of chi is z = y g + a (y - g) = y^2 - (y - a)(y - g), so z_0 - z_i is the
    product of residuals without variable i minus the full product. With T the statistic and n - 1
    degrees of freedom the p-value is I(x; (n - 1) / 2, 1/2), x = (n - 1) / (n - 1 + T^2), the
    regularised incomplete beta function.
    """
    difference, num_rows = without - full[None], counts.sum(1)
    mean = (difference * counts[None]).sum(2) / num_rows[None]
    variance = (counts[None] * (difference - mean[:, :, None]) ** 2).sum(2) / (num_rows - 1)[None]
    degrees = jnp.broadcast_to((num_rows - 1)[None], mean.shape)
    increased = (variance > 0) & (mean > 0)
    # the inner condition keeps the branch that is not taken free of a division by zero
    t_squared = jnp.where(
        increased, mean**2 / jnp.where(variance > 0, variance / num_rows[None], 1.0), 0.0
    )
    p_values = jax.scipy.special.betainc(
        degrees / 2, jnp.full_like(mean, 0.5), degrees / (degrees + t_squared)
    )
    return jnp.where(increased, p_values, 1.0).T


def benjamini_yekutieli(
    p_values: Float[Array, " vars"], possible_parents: Bool[Array, " vars"]
) -> Bool[Array, " vars"]:
    """Hypotheses rejected at the rate `FALSE_DISCOVERIES` under any dependence, among the m in
    `possible_parents` (Benjamini and Yekutieli 2001, theorem 1.3): all up to the largest ordered
    p_(k) <= k FALSE_DISCOVERIES / (m sum_{j <= m} 1/j).
    """
    ranks, count = jnp.arange(1, p_values.shape[0] + 1), possible_parents.sum()
    harmonic = jnp.where(ranks <= count, 1 / ranks, 0.0).sum()
    p_values = jnp.where(possible_parents, p_values, jnp.inf)
    ordered = jnp.sort(p_values)
    passing = ordered <= FALSE_DISCOVERIES * ranks / (jnp.maximum(count, 1) * harmonic)
    return p_values <= jnp.where(passing, ordered, -jnp.inf).max()


# --- from selections to a prior over sets ---


def set_frequencies(
    selected: Bool[Array, "bootstraps vars"], possible_parents: Bool[Array, " vars"]
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """The rows of `selected` and their frequencies, zero for a row that repeats an earlier one;
    single variables, equally probable, if every row is empty. Both fill up the same number of sets,
    `max(bootstraps, vars)`.
    """
    num_bootstraps, num_vars = selected.shape
    same = (selected[:, None, :] == selected[None, :, :]).all(2)
    first = jnp.argmax(same, axis=1) == jnp.arange(num_bootstraps)
    uniform = possible_parents / jnp.maximum(possible_parents.sum(), 1)

    def filled_up(sets, frequencies):
        rest = max(num_bootstraps, num_vars) - len(sets)
        return jnp.pad(sets, ((0, rest), (0, 0))), jnp.pad(frequencies, (0, rest))

    found = filled_up(selected, jnp.where(first, same.mean(1), 0.0))
    single = filled_up(jnp.diag(possible_parents), uniform)
    return jax.tree.map(lambda a, b: jnp.where(selected.any(), a, b), found, single)


def with_union(
    selected: Bool[Array, "bootstraps vars"],
    p_values: Float[Array, "bootstraps vars"],
    possible_parents: Bool[Array, " vars"],
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """The sets that bootstraps `selected`, and all subsets of the variables selected most often,
    with their log-probabilities; frequencies and subsets get half of the probability each.

    A subset has the product of its members' frequencies of selection (others: of non-selection),
    smoothed by half a selection and half a non-selection; ties in frequency go to the smaller mean
    p-value.
    """
    num_bootstraps, num_vars = selected.shape
    sets, frequencies = set_frequencies(selected, possible_parents)
    size = min(UNION_SIZE, num_vars)
    share = (selected.sum(0) + 0.5) / (num_bootstraps + 1)
    # 1e-3 of a p-value is less than a selection more for up to a thousand bootstraps
    rank = jnp.where(possible_parents, share - 1e-3 * p_values.mean(0), -jnp.inf)
    _, top = jax.lax.top_k(rank, size)
    table = jnp.array(list(itertools.product([False, True], repeat=size)))
    subsets = jnp.zeros((2**size, num_vars), bool).at[:, top].set(table)
    inside = jnp.where(possible_parents[top], share[top], 0.0)
    product = jnp.where(table, inside[None], 1 - inside[None]).prod(1)
    # a selected set that is one of the subsets is listed there only
    listed = (sets[:, None] == subsets[None]).all(2) & (frequencies > 0)[:, None]
    probs = 0.5 * product + 0.5 * (listed * frequencies[:, None]).sum(0)
    rest = jnp.where(listed.any(1), 0.0, 0.5 * frequencies)
    return jnp.concatenate([subsets, sets]), jnp.log(jnp.concatenate([probs, rest]))
