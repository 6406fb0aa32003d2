"""Steps 3 and 4 of the expert, both Gaussian processes: what each candidate parent set says of
every intervention, averaged over the posterior; and the causal-prior process of each variable.

PARENT_SCALE (Durand, Annadani, Bauer, Parbhoo 2025) and Aglietti et al., "Causal Bayesian
Optimization" (AISTATS 2020). Everything is for one problem, in whatever units the caller uses;
batch with `jax.vmap`.
"""

import functools as ft
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Float, Int

from lib.linalg import backward_solve, cholesky, forward_solve, inverse_and_log_det
from lib.scm import highest


# --- star graphs ---
#
# Under a candidate set S the expert assumes a star graph: X_S are the parents of Y and do not
# depend on each other, Y = f(X_S) + e with f ~ GP(0, k) and e ~ N(0, noise variance), fitted on the
# observational rows.

# in standard deviations of the inputs; 8 is a straight line over the data
STAR_LENGTHSCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
# noise variance / kernel amplitude; the least keeps float32 systems regular
STAR_NOISE_RATIOS = (3e-4, 3e-3, 0.03, 0.2, 1.0)
# rows that choose hyperparameters: the cost is cubic, and these need fewer than predictions do
STAR_ROWS = 100


class StarGP(NamedTuple):
    """Hyperparameters of one zero-mean GP per parent set, with the kernel
    `amplitude * exp(-|x - x'|^2 / (2 lengthscale^2))` and the variance of the observation noise.

    `failures` counts the hyperparameters that were left out because their Cholesky factor failed.
    """

    amplitude: Float[Array, " sets"]
    lengthscale: Float[Array, " sets"]
    noise_variance: Float[Array, " sets"]
    failures: Int[Array, " sets"] | int = 0


class StarEffects(NamedTuple):
    """What each set's GP says of do(X_i = v), each `[sets, vars, bins]`.

    `mean` and `variance` are averages over rows of the GP's mean and predictive variance
    (observation noise included): the belief about E[Y | do(X_i = v)] under the set.
    `outcome_variance` is the variance of one outcome Y around that expectation: the variance over
    rows of the GP's mean, through which Y still depends on its other parents, plus the noise.
    """

    mean: Float[Array, "sets vars bins"]
    variance: Float[Array, "sets vars bins"]
    outcome_variance: Float[Array, "sets vars bins"]


class StarGraphs(NamedTuple):
    """Candidate parent sets and their do-effects at the values `grid` of every variable: all that
    stays fixed while the posterior over the sets changes. `failures` as in `StarGP`, summed.
    """

    sets: Bool[Array, "sets vars"]
    grid: Float[Array, "vars bins"]
    effects: StarEffects
    failures: Int[Array, ""] | int = 0


def squared_distances(x: Float[Array, "samples vars"]) -> Float[Array, "vars samples samples"]:
    """Per-variable squared differences between rows."""
    return (x.T[:, :, None] - x.T[:, None, :]) ** 2


def where_possible(of_one_set):
    """`of_one_set(*inputs)` as a function of (possible, *inputs): zeros, without any work, where a
    set is not possible. Such sets only fill up an array of fixed size.

    Under `vmap` one set after the other: a batched condition would compute both of its branches.
    """

    @sequential_vmap
    def guarded(possible, *inputs):
        shapes = jax.eval_shape(of_one_set, *inputs)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(possible, lambda: of_one_set(*inputs), lambda: zeros)

    return guarded


def fit_star_gp(
    x: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    sets: Bool[Array, "sets vars"],
    possible: Bool[Array, " sets"],
) -> StarGP:
    """Hyperparameters of maximal marginal likelihood for every set, among all pairs of
    `STAR_LENGTHSCALES` and `STAR_NOISE_RATIOS`; zeros for sets that are not `possible`.

    `x` standardised, `y` centred. Only the first `STAR_ROWS` rows are used here; `star_effects`
    uses them all.
    """
    fit = jax.vmap(fit_one_star_gp, in_axes=(0, 0, None, None))
    return fit(possible, sets, squared_distances(x[:STAR_ROWS]), y[:STAR_ROWS])


@where_possible
def fit_one_star_gp(members, squares, y) -> StarGP:
    """Hyperparameters of the set `members[vars]`, from squared distances
    `squares[vars, samples, samples]`.

    With the kernel a (K + ratio I), a the amplitude, the log marginal likelihood of n rows
    (Rasmussen and Williams 2006, eq. 2.30) is largest at a = y' (K + ratio I)^-1 y / n, where it
    is, up to a constant, -(n log a + log |K + ratio I|) / 2.
    """
    num_rows = y.shape[0]
    distance = jnp.tensordot(members.astype(y.dtype), squares, 1)
    lengthscales, ratios = (
        jnp.array(values, y.dtype) for values in (STAR_LENGTHSCALES, STAR_NOISE_RATIOS)
    )

    def score(lengthscale, ratio):
        factor = cholesky(jnp.exp(-distance / (2 * lengthscale**2)) + ratio * jnp.eye(num_rows))
        whitened = forward_solve(factor, y[:, None])
        amplitude, half_log_det = (whitened**2).mean(), jnp.log(jnp.diagonal(factor)).sum()
        return -num_rows / 2 * jnp.log(amplitude) - half_log_det, amplitude

    scores, amplitudes = jax.lax.map(
        lambda length: jax.vmap(lambda ratio: score(length, ratio))(ratios), lengthscales
    )
    failed = ~jnp.isfinite(scores)
    i, j = highest(scores, ~failed)
    return StarGP(amplitudes[i, j], lengthscales[i], amplitudes[i, j] * ratios[j], failed.sum())


def star_effects(
    x: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    sets: Bool[Array, "sets vars"],
    gp: StarGP,
    grid: Float[Array, "vars bins"],
    possible: Bool[Array, " sets"],
) -> StarEffects:
    """do(X_i = v) in the star graph of every set, for every variable and value on `grid`; zeros
    for sets that are not `possible`.

    Parents in a star graph do not depend on each other, so under do(X_i = v) the others keep the
    values of the rows x_r: E[Y | do(X_i = v), S] = mean_r f(x_r with x_ri = v).
    """
    # An amplitude far above the noise is common (a smooth function is nearly a straight line); in
    # float32 the difference `amplitude - explained` then has no correct digit.
    with jax.enable_x64(True):
        wide_x, wide_y, wide_gp, wide_grid = jax.tree.map(
            lambda a: a.astype(jnp.float64), (x, y, gp[:3], grid)
        )
        to_grid = (wide_grid[:, :, None] - wide_x.T[:, None, :]) ** 2  # [vars, bins, samples]
        one_set = jax.vmap(effects_of_one_set, in_axes=(0, 0, 0, 0, 0, None, None, None))
        effects = one_set(possible, sets, *wide_gp, squared_distances(wide_x), to_grid, wide_y)
        return jax.tree.map(lambda a: a.astype(x.dtype), effects)


@where_possible
def effects_of_one_set(
    members, amplitude, lengthscale, noise_variance, squares, to_grid, y
) -> StarEffects:
    """Effects `[vars, bins]` of one set; `squares[vars, samples, samples]` and
    `to_grid[vars, bins, samples]` are squared distances.

    The predictive mean and variance at an input x are k(x)' alpha, alpha = K^-1 y, and
    amplitude + noise - k(x)' K^-1 k(x), with K the kernel of the R rows, noise included (Rasmussen
    and Williams 2006, eq. 2.25 and 2.26). The RBF kernel is a product over variables: k_n(x_r with
    x_ri = v) = A_rn b_n(v), with A the kernel between rows without variable i and b(v) that of
    variable i alone. The averages over rows r then need no loop over values and rows:

        mean           sum_n mean_r(A_rn) alpha_n b_n(v)
        explained      b' (K^-1 o A'A/R) b                    (o: elementwise)
        row variance   (alpha o b)' (A'A/R) (alpha o b) - mean^2
    """

    def rbf(squared_distance):
        return jnp.exp(-0.5 * squared_distance / lengthscale**2)

    num_rows, distance = y.shape[0], jnp.tensordot(members.astype(y.dtype), squares, 1)
    kernel = amplitude * rbf(distance)
    inverse, _ = inverse_and_log_det(kernel + noise_variance * jnp.eye(num_rows))
    alpha = inverse @ y

    def averages(others, own):
        """The above from A = `others[samples, samples]` and b = `own[bins, samples]`; rounding may
        take a variance below zero.
        """
        second = others.T @ others / num_rows
        weighted = own * alpha[None, :]
        mean = weighted @ others.mean(0)
        row_variance = jnp.maximum(((weighted @ second) * weighted).sum(1) - mean**2, 0.0)
        explained = ((own @ (inverse * second)) * own).sum(1)
        variance = jnp.maximum(amplitude - explained, 0.0) + noise_variance
        return StarEffects(mean, variance, row_variance + noise_variance)

    # variables outside the set have no effect: the same at every value
    constant = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, to_grid.shape[1:2]),
        averages(kernel, jnp.ones((1, num_rows), y.dtype)),
    )

    def of_variable(variable):
        member, square, to_value = variable
        return jax.lax.cond(
            member,
            lambda: averages(amplitude * rbf(distance - square), rbf(to_value)),
            lambda: constant,
        )

    return jax.lax.map(of_variable, (members, squares, to_grid))


# --- their average over the posterior: the causal prior ---


class CausalPrior(NamedTuple):
    """Causal prior of Aglietti et al., "Causal Bayesian Optimization" (AISTATS 2020): the belief
    about E[Y | do(X_i = v)] before interventional data, each `[vars, bins]`, or `[bins]` for one
    variable.

    `grid` are the values v, increasing; at these `mean`, `deviation` (its standard deviation) and
    `outcome_variance`, the variance of one outcome Y under do(X_i = v).
    """

    grid: Float[Array, "*vars bins"]
    mean: Float[Array, "*vars bins"]
    deviation: Float[Array, "*vars bins"]
    outcome_variance: Float[Array, "*vars bins"]


def average_effects(
    grid: Float[Array, "vars bins"], log_probs: Float[Array, " sets"], effects: StarEffects
) -> CausalPrior:
    """Causal prior from the posterior P(S) over sets, by the laws of total expectation and
    variance (Durand et al. 2025): with mean m_S and variance v_S under the set S,

        m = sum_S P(S) m_S    and    deviation^2 = sum_S P(S) (v_S + (m_S - m)^2);

    the variance of an outcome is averaged over P(S).
    """
    probs = jnp.exp(log_probs)
    mean = jnp.tensordot(probs, effects.mean, 1)
    variance = jnp.tensordot(probs, effects.variance + (effects.mean - mean[None]) ** 2, 1)
    outcome_variance = jnp.tensordot(probs, effects.outcome_variance, 1)
    return CausalPrior(grid, mean, jnp.sqrt(variance), outcome_variance)


# --- the causal-prior Gaussian process of one variable, on interventional outcomes ---

# What hyperparameters are chosen from, on a logarithmic scale: l as a share of the range of the
# variable, and sf^2 in units of the observational variance of Y.
LENGTHSCALES = (0.1, 0.2, 0.4, 0.8)
AMPLITUDES = (0.01, 0.04, 0.16, 0.64)


class Outcomes(NamedTuple):
    """What came of setting one variable to `points`, each `[samples]`: `outcomes` of Y, their
    `noise_variance`, and which rows are `used`; the others may hold anything.
    """

    points: Float[Array, " samples"]
    outcomes: Float[Array, " samples"]
    noise_variance: Float[Array, " samples"]
    used: Bool[Array, " samples"]


class CausalGP(eqx.Module):
    """The GP of one variable given `data`: `factor` is the lower Cholesky factor of K, the kernel
    of the data with their noise, and `weights` K^-1 (outcomes - m). Between the values of the
    causal prior's grid m and s are linear.
    """

    causal_prior: CausalPrior
    data: Outcomes
    factor: Float[Array, "samples samples"]
    weights: Float[Array, " samples"]
    amplitude: Float[Array, ""]
    lengthscale: Float[Array, ""]

    def __call__(
        self, values: Float[Array, " values"]
    ) -> tuple[Float[Array, " values"], Float[Array, " values"]]:
        """Posterior mean and standard deviation of E[Y | do(X = v)] at `values`: m(v) + k(v)' K^-1
        (y - m) and the root of k(v, v) - k(v)' K^-1 k(v) (Rasmussen and Williams 2006, eq. 2.38
        and 2.24).
        """
        grid, prior_mean, deviation, _ = self.causal_prior
        points, used = self.data.points, self.data.used[:, None]
        cross = used * causal_kernel(
            self.causal_prior, self.amplitude, self.lengthscale, points, values
        )
        explained = (forward_solve(self.factor, cross) ** 2).sum(0)
        variance = self.amplitude + jnp.interp(values, grid, deviation) ** 2
        mean = jnp.interp(values, grid, prior_mean) + self.weights @ cross
        # the floor is rounding's: where outcomes are nearly exact the difference may turn negative
        return mean, jnp.sqrt(jnp.maximum(variance - explained, 1e-10))


def causal_kernel(
    causal_prior: CausalPrior,
    amplitude: Float[Array, ""],
    lengthscale: Float[Array, ""],
    a: Float[Array, " rows"],
    b: Float[Array, " columns"],
) -> Float[Array, "rows columns"]:
    """CausalRBF of Aglietti et al. 2020, eq. 5: sf^2 exp(-(a - b)^2 / 2 l^2) + s(a) s(b)."""
    rbf = amplitude * jnp.exp(-0.5 * ((a[:, None] - b[None, :]) / lengthscale) ** 2)
    at_a, at_b = (jnp.interp(x, causal_prior.grid, causal_prior.deviation) for x in (a, b))
    return rbf + at_a[:, None] * at_b[None, :]


def condition_causal_gp(
    causal_prior: CausalPrior,
    data: Outcomes,
    amplitude: Float[Array, ""],
    lengthscale: Float[Array, ""],
) -> tuple[CausalGP, Float[Array, ""]]:
    """The GP with these hyperparameters, and its log evidence up to a constant,
    -((y - m)' K^-1 (y - m) + log |K|) / 2 (Rasmussen and Williams 2006, eq. 2.30); nan if K cannot
    be factorised. Rows that are not used are independent of all others, with residual zero and
    variance one.
    """
    points, outcomes, noise_variance, used = data
    kernel = causal_kernel(causal_prior, amplitude, lengthscale, points, points)
    # Outcomes nearly free of noise make the system singular to rounding: a hundred epsilons of the
    # prior variance are added.
    diagonal = noise_variance + 100 * jnp.finfo(kernel.dtype).eps * jnp.diagonal(kernel)
    kernel = jnp.where(used[:, None] & used[None, :], kernel, 0.0)
    factor = cholesky(kernel + jnp.diag(jnp.where(used, diagonal, 1.0)))
    prior_mean = jnp.interp(points, causal_prior.grid, causal_prior.mean)
    whitened = forward_solve(factor, jnp.where(used, outcomes - prior_mean, 0.0)[:, None])
    log_evidence = -0.5 * (whitened**2).sum() - jnp.log(jnp.diagonal(factor)).sum()
    weights = backward_solve(factor, whitened)[:, 0]
    return CausalGP(causal_prior, data, factor, weights, amplitude, lengthscale), log_evidence


def fit_causal_gp(
    causal_prior: CausalPrior, data: Outcomes, noise_factors: tuple[float, ...] = (1.0,)
) -> tuple[CausalGP, Int[Array, ""]]:
    """GP of one variable, and how many hyperparameters were left out because their Cholesky factor
    failed.

    Hyperparameters maximise the marginal likelihood times a weak log-normal hyperprior, which
    decides where there are no data, over all combinations of LENGTHSCALES, AMPLITUDES and
    `noise_factors`, by which the noise variance of the data is multiplied.
    """
    # the floor keeps a range of zero width, which is never explored, free of nan
    width = jnp.maximum(causal_prior.grid[-1] - causal_prior.grid[0], 1e-6)
    axes = jnp.array(LENGTHSCALES) * width, jnp.array(AMPLITUDES), jnp.array(noise_factors)
    lengthscales, amplitudes, factors = (a.ravel() for a in jnp.meshgrid(*axes, indexing="ij"))
    log_evidence = log_evidences(causal_prior, data, (amplitudes, lengthscales, factors))
    failed = ~jnp.isfinite(log_evidence)
    # log l ~ N(log(.4 width), 1), log sf^2 ~ N(log .1, 2^2): a factor e and e^2 either way
    log_hyperprior = (
        -0.5 * jnp.log(lengthscales / (0.4 * width)) ** 2 - 0.125 * jnp.log(amplitudes / 0.1) ** 2
    )
    best = jnp.argmax(jnp.where(failed, -jnp.inf, log_evidence + log_hyperprior))
    data = data._replace(noise_variance=factors[best] * data.noise_variance)
    gp, _ = condition_causal_gp(causal_prior, data, amplitudes[best], lengthscales[best])
    return gp, failed.sum()


# numbers of rows that a likelihood is computed on: the least that holds all rows that are used
ROW_COUNTS = (4, 8, 16, 32, 64)


# one variable after the other: under `vmap` a switch would compute all of its branches
@sequential_vmap
def log_evidences(causal_prior, data, hyperparameters):
    """Log evidence `[hyperparameters]` of the GP of one variable with each of these amplitudes,
    lengthscales and factors of the noise variance.

    The data have a row for every experiment on any variable, of which this one uses few: the cost
    is cubic, so the rows that are used are moved to the front and the rest is cut off.
    """
    capacity = len(data.used)
    counts = [*(count for count in ROW_COUNTS if count < capacity), capacity]
    used_first = jnp.argsort(~data.used, stable=True)

    def on_the_first(count):
        first = Outcomes(*(row[used_first][:count] for row in data))

        def log_evidence(amplitude, lengthscale, factor):
            scaled = first._replace(noise_variance=factor * first.noise_variance)
            return condition_causal_gp(causal_prior, scaled, amplitude, lengthscale)[1]

        return jax.vmap(log_evidence)(*hyperparameters)

    enough = jnp.searchsorted(jnp.array(counts), data.used.sum())
    return jax.lax.switch(enough, [ft.partial(on_the_first, count) for count in counts])
