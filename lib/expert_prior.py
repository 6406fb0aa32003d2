"""A prior over parent sets from observational data: bootstrapped doubly robust causal feature
selection, in closed form.

Quinzan, Soleymani, Jaillet, Rojas, Bauer, "DRCFS: Doubly Robust Causal Feature Selection" (ICML
2023), as PARENT_SCALE uses it. There every nuisance is a three-layer network; here it is a ridge
regression on [1, x, random Fourier features], so that all bootstraps, folds and left-out variables
are one batch of linear systems. Three further differences:
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


LINEAR_PENALTY = 1e-3  # per row; only there to make the system regular
PENALTY = 0.01  # of the Fourier features, per row
NUM_FOLDS = 5
FALSE_DISCOVERIES = 0.05  # their rate among the selected
UNION_SIZE = 4  # variables whose subsets are all candidates


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
    number of places for sets is `max(num_bootstraps, vars)`, and no selected set can be lost;
    unused places (repeated sets too) have log-probability -inf. If every bootstrap selects the
    empty set, the prior is uniform over single variables.

    These frequencies get half of the probability and all subsets of the `UNION_SIZE` variables
    selected most often the other half (`2 ** UNION_SIZE` more places): a true set that no bootstrap
    returned whole can then still be found.
    """
    selected, p_values = select(key, rows, task, num_bootstraps, num_features)
    return with_union(selected, p_values, task.possible_parents)


def select(key, rows, task: Task, num_bootstraps, num_features) -> tuple[Array, Array]:
    """The parents that each bootstrap of `rows` selects, and the p-values behind it, each
    `[bootstraps, vars]`.
    """
    real, standard = task.possible_parents, Scale.of(rows)(rows)
    x, y = jnp.where(real[None, :], standard, 0.0), jnp.take(standard, task.target, axis=1)
    p_values = increase_p_values(*held_out_residuals(key, x, y, num_bootstraps, num_features))
    return jax.vmap(lambda p: benjamini_yekutieli(p, real))(p_values), p_values


def held_out_residuals(key, x, y, num_bootstraps, num_features):
    """Products of the two nuisances' held-out residuals.

    Not `ridge` of lib/regression.py: hundreds of features, for which Cholesky factors are the
    choice, rows with weights, and a fold left out of each Gram matrix.

    Returns `full[bootstraps, samples]` (all variables), `without[vars, bootstraps, samples]` (one
    left out), and how often each bootstrap drew each row, `counts[bootstraps, samples]`. Rows are
    padded to a multiple of `NUM_FOLDS`; padding has count zero.
    """
    num_rows, num_vars = x.shape
    feature_key, bootstrap_key = jr.split(key)
    omega_key, phase_key = jr.split(feature_key)
    squares = (x**2).sum(1)
    distance = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None, :] - 2 * x @ x.T, 0.0))
    median = jnp.maximum(jnp.median(distance), 1e-3)
    # One key per variable: padding variables leave the draws of the others as they are.
    draw = jax.vmap(lambda i: jr.normal(jr.fold_in(omega_key, i), (2, num_features)), out_axes=1)
    omega = draw(jnp.arange(num_vars)) / median
    phase = jr.uniform(phase_key, (2, num_features), maxval=2 * jnp.pi)

    order_key, draw_key = jr.split(bootstrap_key)
    per_fold = -(-num_rows // NUM_FOLDS)
    # one assignment of rows to folds, common to all bootstraps
    order = jr.permutation(order_key, num_rows)
    pad = NUM_FOLDS * per_fold - num_rows
    drawn = jr.randint(draw_key, (num_bootstraps, num_rows), 0, num_rows)
    counts = jax.vmap(lambda d: jnp.bincount(d, length=num_rows))(drawn).astype(x.dtype)
    counts = jnp.pad(counts[:, order], ((0, 0), (0, pad)))
    x = jnp.pad(x[order], ((0, pad), (0, 0)))
    folds_y = jnp.pad(y[order], (0, pad)).reshape(NUM_FOLDS, per_fold)
    # The intercept is penalised as weakly as the slopes: the data are standardised.
    ridge = num_rows * jnp.concatenate(
        [jnp.full(1 + num_vars, LINEAR_PENALTY), jnp.full(num_features, PENALTY)]
    )

    def held_out(used, omega, phase):
        """Residuals `[bootstraps, samples]` of the regression on `used[samples, vars]`, each fold
        predicted from the others.
        """
        waves = jnp.sqrt(2 / num_features) * jnp.cos(used @ omega + phase[None, :])
        phi = jnp.concatenate([jnp.ones((x.shape[0], 1)), used, waves], axis=1).reshape(
            NUM_FOLDS, per_fold, -1
        )

        def bootstrap(weights):
            weighted = phi * weights.reshape(NUM_FOLDS, per_fold, 1)
            gram = jnp.einsum("frm,frk->fmk", weighted, phi)
            moment = jnp.einsum("frm,fr->fm", weighted, folds_y)
            train = (gram.sum(0) + jnp.diag(ridge))[None] - gram  # leave one fold out
            coefficients = jax.vmap(positive_solve)(
                train, (moment.sum(0)[None] - moment)[:, :, None]
            )
            return (folds_y - jnp.einsum("frm,fmo->fr", phi, coefficients)).reshape(-1)

        return jax.vmap(bootstrap)(counts)

    def products(kept):
        """Residual products [bootstraps, samples] of the regression on the variables in `kept`."""
        return jax.vmap(lambda *waves: held_out(x * kept[None, :], *waves))(omega, phase).prod(0)

    kept = jnp.concatenate([jnp.ones((1, num_vars)), 1 - jnp.eye(num_vars)])
    residuals = jax.lax.map(products, kept)
    return residuals[0], residuals[1:], counts


def increase_p_values(full, without, counts) -> Float[Array, "bootstraps vars"]:
    """Paired two-sided t-test of z0 against z_i; one where leaving the variable out did not
    increase the product of residuals.

    With z = y r - a (r - y), z = y^2 - (y - a)(y - r), so z0 - z_i is the product of residuals
    without variable i minus the full product.
    """
    difference = without - full[None]
    num_rows = counts.sum(1)
    mean = (difference * counts[None]).sum(2) / num_rows[None]
    variance = (counts[None] * (difference - mean[:, :, None]) ** 2).sum(2) / (num_rows - 1)[None]
    degrees = jnp.broadcast_to((num_rows - 1)[None], mean.shape)
    usable = (variance > 0) & (mean > 0)
    t_squared = jnp.where(
        usable, mean**2 / jnp.where(variance > 0, variance / num_rows[None], 1.0), 0.0
    )
    p_values = jax.scipy.special.betainc(
        degrees / 2, jnp.full_like(mean, 0.5), degrees / (degrees + t_squared)
    )
    return jnp.where(usable, p_values, 1.0).T


def benjamini_yekutieli(
    p_values: Float[Array, " vars"], real: Bool[Array, " vars"]
) -> Bool[Array, " vars"]:
    """Hypotheses rejected at the rate `FALSE_DISCOVERIES` under any dependence, among those in
    `real` (Benjamini and Yekutieli, 2001).
    """
    ranks, count = jnp.arange(1, p_values.shape[0] + 1), real.sum()
    harmonic = jnp.where(ranks <= count, 1 / ranks, 0.0).sum()
    p_values = jnp.where(real, p_values, jnp.inf)
    ordered = jnp.sort(p_values)
    passing = ordered <= FALSE_DISCOVERIES * ranks / (jnp.maximum(count, 1) * harmonic)
    # step-up: everything up to the last that passes
    return p_values <= jnp.where(passing, ordered, -jnp.inf).max()


def set_frequencies(
    selected: Bool[Array, "bootstraps vars"], real: Bool[Array, " vars"]
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """The distinct rows of `selected` with the logarithms of their frequencies; single variables,
    equally probable, if every row is empty.
    """
    num_bootstraps, num_vars = selected.shape
    same = (selected[:, None, :] == selected[None, :, :]).all(2)
    first = jnp.argmax(same, axis=1) == jnp.arange(num_bootstraps)
    uniform = real / jnp.maximum(real.sum(), 1)

    def choose(found, single):
        """One of two arrays, which are padded to a common number of places."""
        shape = (max(num_bootstraps, num_vars), *found.shape[1:])
        found, single = (jnp.zeros(shape, a.dtype).at[: len(a)].set(a) for a in (found, single))
        return jnp.where(selected.any(), found, single)

    frequency = choose(jnp.where(first, same.mean(1), 0.0), uniform)
    return choose(selected, jnp.diag(real)), jnp.log(frequency)


def with_union(selected, p_values, real) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """The sets that bootstraps `selected`, and all subsets of the variables selected most often;
    frequencies and subsets get half of the probability each.

    A variable is in a subset with its frequency of selection, smoothed by half a selection and half
    a non-selection; ties in frequency go to the smaller mean p-value.
    """
    num_bootstraps, num_vars = selected.shape
    sets, log_frequencies = set_frequencies(selected, real)
    size = min(UNION_SIZE, num_vars)
    share = (selected.sum(0) + 0.5) / (num_bootstraps + 1)
    _, top = jax.lax.top_k(jnp.where(real, share - 1e-3 * p_values.mean(0), -jnp.inf), size)
    table = jnp.array(list(itertools.product([False, True], repeat=size)))
    subsets = jnp.zeros((2**size, num_vars), bool).at[:, top].set(table)
    inside = jnp.where(real[top], share[top], 0.0)
    product = jnp.where(table, inside[None], 1 - inside[None]).prod(1)
    frequencies = jnp.exp(log_frequencies)
    listed = (sets[:, None] == subsets[None]).all(2) & (frequencies > 0)[:, None]
    probs = 0.5 * product + 0.5 * (listed * frequencies[:, None]).sum(0)
    rest = jnp.where(listed.any(1), 0.0, 0.5 * frequencies)
    return jnp.concatenate([subsets, sets]), jnp.log(jnp.concatenate([probs, rest]))
