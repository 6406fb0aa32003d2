"""Gaussian processes of the expert: star-graph effects of interventions, and the causal-prior
surrogate of each variable.

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


# --- star-graph Gaussian processes: Y ~ x_g on observational rows ---

# in standard deviations of the inputs; 8 is a straight line over the data
STAR_LENGTHSCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
# noise variance / kernel amplitude; the least keeps float32 systems regular
STAR_NOISE_RATIOS = (3e-4, 3e-3, 0.03, 0.2, 1.0)
# that choose hyperparameters: the cost is cubic, and these need fewer rows than predictions do
STAR_ROWS = 100


class StarGP(NamedTuple):
    """Hyperparameters of one zero-mean GP per parent set, with the kernel
    `amplitude * exp(-|x - x'|^2 / (2 lengthscale^2))` plus `noise` (a variance).

    `failures` counts the hyperparameters that were left out because their Cholesky factor failed.
    """

    amplitude: Float[Array, " sets"]
    lengthscale: Float[Array, " sets"]
    noise: Float[Array, " sets"]
    failures: Int[Array, " sets"] | int = 0


class StarEffects(NamedTuple):
    """What each set's GP says of do(X_i = v), each `[sets, vars, bins]`.

    `mean` and `variance` are averages over rows of the GP's mean and predictive variance
    (observation noise included); `spread` is the variance over rows of the GP's mean: how much Y
    still varies through the other parents.
    """

    mean: Float[Array, "sets vars bins"]
    variance: Float[Array, "sets vars bins"]
    spread: Float[Array, "sets vars bins"]


def squared_distances(x: Float[Array, "samples vars"]) -> Float[Array, "vars samples samples"]:
    """Per-variable squared differences between rows."""
    return (x.T[:, :, None] - x.T[:, None, :]) ** 2


def fit_star_gp(
    x: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    sets: Bool[Array, "sets vars"],
    live: Bool[Array, " sets"],
) -> StarGP:
    """Hyperparameters of maximal marginal likelihood for every set: a grid over lengthscale and
    noise ratio, the amplitude in closed form.

    `x` standardised, `y` centred. Only the first `STAR_ROWS` rows are used here; `star_effects`
    uses them all. Sets that are not `live` get ones, without any work.
    """
    fit = jax.vmap(fit_one_star_gp, in_axes=(0, 0, None, None))
    return fit(live, sets, squared_distances(x[:STAR_ROWS]), y[:STAR_ROWS])


# one set after the other: under `vmap` a condition would compute both of its branches
@sequential_vmap
def fit_one_star_gp(alive, members, squares, y) -> StarGP:
    """Hyperparameters of one set, from squared distances `squares[vars, samples, samples]`."""
    num_rows = y.shape[0]

    def fit():
        distance = jnp.tensordot(members.astype(y.dtype), squares, 1)
        lengthscales, ratios = (
            jnp.array(values, y.dtype) for values in (STAR_LENGTHSCALES, STAR_NOISE_RATIOS)
        )

        def score(lengthscale, ratio):
            factor = cholesky(jnp.exp(-distance / (2 * lengthscale**2)) + ratio * jnp.eye(num_rows))
            whitened = forward_solve(factor, y[:, None])
            amplitude, log_det = (whitened**2).mean(), jnp.log(jnp.diagonal(factor)).sum()
            return -num_rows / 2 * jnp.log(amplitude) - log_det, amplitude

        scores, amplitudes = jax.lax.map(
            lambda length: jax.vmap(lambda r: score(length, r))(ratios), lengthscales
        )
        failed = ~jnp.isfinite(scores)
        i, j = highest(scores, ~failed)
        return StarGP(amplitudes[i, j], lengthscales[i], amplitudes[i, j] * ratios[j], failed.sum())

    return jax.lax.cond(
        alive, fit, lambda: StarGP(*jnp.ones(3, y.dtype), failures=jnp.zeros((), int))
    )


def star_effects(
    x: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    sets: Bool[Array, "sets vars"],
    gp: StarGP,
    grid: Float[Array, "vars bins"],
    live: Bool[Array, " sets"],
) -> StarEffects:
    """do(X_i = v) in the star graph of every set, for every variable and value on `grid`: X_i is
    set to v in each row, the other parents keep theirs.

    The RBF kernel is a product over variables, so with A_rn the kernel between rows without
    variable i and b_n(v) that of variable i alone, the row averages are

        sum_n mean_r(A_rn) alpha_n b_n(v)    and    b' (K^-1 o A'A/R) b

    without a loop over values and rows. Constant in v for variables that are not in the set. Sets
    that are not `live` get zeros, without any work.
    """
    # An amplitude far above the noise is common (a smooth function is nearly a straight line); in
    # float32 the difference `amplitude - explained` then has no correct digit.
    with jax.enable_x64(True):
        wide_x, wide_y, wide_gp, wide_grid = jax.tree.map(
            lambda a: a.astype(jnp.float64), (x, y, gp[:3], grid)
        )
        to_grid = (wide_grid[:, :, None] - wide_x.T[:, None, :]) ** 2  # [vars, bins, samples]
        one_set = jax.vmap(effects_of_one_set, in_axes=(0, 0, 0, 0, 0, None, None, None))
        effects = one_set(live, sets, *wide_gp, squared_distances(wide_x), to_grid, wide_y)
        return jax.tree.map(lambda a: a.astype(x.dtype), effects)


# one set after the other: under `vmap` a condition would compute both of its branches
@sequential_vmap
def effects_of_one_set(
    alive, members, amplitude, lengthscale, noise, squares, to_grid, y
) -> StarEffects:
    """Effects `[vars, bins]` of one set; `squares[vars, samples, samples]` and
    `to_grid[vars, bins, samples]` are squared distances.
    """
    num_rows, scale = y.shape[0], -0.5 / lengthscale**2

    def all_variables():
        distance = jnp.tensordot(members.astype(y.dtype), squares, 1)
        kernel = amplitude * jnp.exp(scale * distance)
        inverse, _ = inverse_and_log_det(kernel + noise * jnp.eye(num_rows))
        alpha = inverse @ y

        def with_others(others, own):
            """Row averages where `others[samples, samples]` is the kernel without the variable,
            `own[bins, samples]` that of the variable alone.
            """
            second = others.T @ others / num_rows
            weighted = own * alpha[None, :]
            mean = weighted @ others.mean(0)
            spread = ((weighted @ second) * weighted).sum(1) - mean**2
            explained = ((own @ (inverse * second)) * own).sum(1)
            variance = jnp.maximum(amplitude - explained, 0.0) + noise
            return StarEffects(mean, variance, jnp.maximum(spread, 0.0))

        constant = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, to_grid.shape[1:2]),
            with_others(kernel, jnp.ones((1, num_rows), y.dtype)),
        )

        def one_variable(of_variable):
            member, square, to_value = of_variable
            without = scale * (distance - square)
            return jax.lax.cond(
                member,
                lambda: with_others(amplitude * jnp.exp(without), jnp.exp(scale * to_value)),
                lambda: constant,
            )

        return jax.lax.map(one_variable, (members, squares, to_grid))

    return jax.lax.cond(
        alive,
        all_variables,
        lambda: StarEffects(*jnp.zeros((3, *to_grid.shape[:2]), y.dtype)),
    )


class CausalPrior(NamedTuple):
    """Belief about E[Y | do(X_i = v)] before interventional data, each `[vars, bins]`, or `[bins]`
    for one variable.

    `grid` are the values v, increasing; at these `mean`, `deviation` (its standard deviation) and
    `noise`, the variance of one outcome Y under do(X_i = v).
    """

    grid: Float[Array, "*vars bins"]
    mean: Float[Array, "*vars bins"]
    deviation: Float[Array, "*vars bins"]
    noise: Float[Array, "*vars bins"]


def aggregate_effects(
    grid: Float[Array, "vars bins"],
    log_probs: Float[Array, " sets"],
    effects: StarEffects,
    gp: StarGP,
) -> CausalPrior:
    """Average over parent sets by the laws of total expectation and variance.

    The variance is that of PARENT_SCALE, sum_g P(g) (v_g + m_g^2) - m^2, where v_g includes
    observation noise; `noise` adds to the GP's noise the spread over rows, averaged over P(g).
    """
    probs = jnp.exp(log_probs)
    mean = jnp.tensordot(probs, effects.mean, 1)
    variance = jnp.tensordot(probs, effects.variance + (effects.mean - mean[None]) ** 2, 1)
    noise = jnp.tensordot(probs, effects.spread, 1) + probs @ gp.noise
    return CausalPrior(grid, mean, jnp.sqrt(variance), noise)


# --- causal-prior GP of one variable, on interventional outcomes ---

LENGTHSCALES = (0.1, 0.2, 0.4, 0.8)  # of the range of the variable
AMPLITUDES = (0.01, 0.04, 0.16, 0.64)  # sf^2, in units of the observational variance of Y


class Outcomes(NamedTuple):
    """What came of setting one variable to `points`, each `[samples]`: `outcomes` of Y, their
    `noise` variances, and which rows are `used`; the others may hold anything.
    """

    points: Float[Array, " samples"]
    outcomes: Float[Array, " samples"]
    noise: Float[Array, " samples"]
    used: Bool[Array, " samples"]


class CausalGP(eqx.Module):
    """A fitted GP for one variable: mean m(.), kernel sf^2 RBF + s(x) s(x'), with m and s linear
    between the values of the prior's grid.
    """

    prior: CausalPrior
    data: Outcomes
    factor: Float[Array, "samples samples"]
    weights: Float[Array, " samples"]
    amplitude: Float[Array, ""]
    lengthscale: Float[Array, ""]

    def __call__(
        self, values: Float[Array, " values"]
    ) -> tuple[Float[Array, " values"], Float[Array, " values"]]:
        """Posterior mean and standard deviation of E[Y | do(X = v)] at `values`."""
        grid, prior_mean, deviation, _ = self.prior
        points, used = self.data.points, self.data.used[:, None]
        cross = causal_kernel(self.prior, self.amplitude, self.lengthscale, points, values) * used
        explained = (forward_solve(self.factor, cross) ** 2).sum(0)
        variance = self.amplitude + jnp.interp(values, grid, deviation) ** 2
        mean = jnp.interp(values, grid, prior_mean) + self.weights @ cross
        return mean, jnp.sqrt(jnp.maximum(variance - explained, 1e-10))


def causal_kernel(prior: CausalPrior, amplitude, lengthscale, a, b):
    """CausalRBF of Aglietti et al. 2020, eq. 5: sf^2 exp(-(a - b)^2 / 2 l^2) + s(a) s(b)."""
    rbf = amplitude * jnp.exp(-0.5 * ((a[:, None] - b[None, :]) / lengthscale) ** 2)
    at_a, at_b = (jnp.interp(x, prior.grid, prior.deviation) for x in (a, b))
    return rbf + at_a[:, None] * at_b[None, :]


def condition_causal_gp(
    prior: CausalPrior, data: Outcomes, amplitude, lengthscale
) -> tuple[CausalGP, Float[Array, ""]]:
    """The GP with these hyperparameters and its log evidence, nan if it cannot be factorised."""
    points, outcomes, noise, used = data
    kernel = causal_kernel(prior, amplitude, lengthscale, points, points)
    # Outcomes nearly free of noise make the system singular to rounding: a hundred epsilons of the
    # prior variance are added.
    diagonal = noise + 100 * jnp.finfo(kernel.dtype).eps * jnp.diagonal(kernel)
    kernel = jnp.where(used[:, None] & used[None, :], kernel, 0.0)
    factor = cholesky(kernel + jnp.diag(jnp.where(used, diagonal, 1.0)))
    residual = jnp.where(used, outcomes - jnp.interp(points, prior.grid, prior.mean), 0.0)
    whitened = forward_solve(factor, residual[:, None])
    evidence = -0.5 * (whitened**2).sum() - jnp.log(jnp.diagonal(factor)).sum()
    weights = backward_solve(factor, whitened)[:, 0]
    return CausalGP(prior, data, factor, weights, amplitude, lengthscale), evidence


def fit_causal_gp(
    prior: CausalPrior, data: Outcomes, noise_scales: tuple[float, ...] = (1.0,)
) -> tuple[CausalGP, Int[Array, ""]]:
    """GP of one variable, and how many hyperparameters were left out because their Cholesky factor
    failed.

    Hyperparameters maximise the marginal likelihood over LENGTHSCALES x AMPLITUDES x
    `noise_scales`, with a weak log-normal prior that decides where there are no data. A range of
    zero width is allowed and never explored.
    """
    width = jnp.maximum(prior.grid[-1] - prior.grid[0], 1e-6)
    axes = jnp.array(LENGTHSCALES) * width, jnp.array(AMPLITUDES), jnp.array(noise_scales)
    lengthscales, amplitudes, scales = (a.ravel() for a in jnp.meshgrid(*axes, indexing="ij"))
    evidence = evidences(prior, data, (amplitudes, lengthscales, scales))
    failed = ~jnp.isfinite(evidence)
    scores = (
        evidence
        - 0.5 * jnp.log(lengthscales / (0.4 * width)) ** 2
        - 0.125 * jnp.log(amplitudes / 0.1) ** 2
    )
    best = jnp.argmax(jnp.where(failed, -jnp.inf, scores))
    data = data._replace(noise=scales[best] * data.noise)
    gp, _ = condition_causal_gp(prior, data, amplitudes[best], lengthscales[best])
    return gp, failed.sum()


# rows that a likelihood is computed on: the first of these that holds all that are used
PLACES = (4, 8, 16, 32, 64)


# one variable after the other: under `vmap` a switch would compute all of its branches
@sequential_vmap
def evidences(prior, data, hyperparameters):
    """Log evidence `[hyperparameters]` of the GP of one variable with each of these amplitudes,
    lengthscales and scales of the noise.

    A buffer has a place for every row of every variable, of which one variable uses few: they are
    moved to the front and the rest is cut off.
    """
    count = len(data.used)
    sizes = [*(size for size in PLACES if size < count), count]
    order = jnp.argsort(~data.used, stable=True)

    def on_the_first(size):
        first = Outcomes(*(row[order][:size] for row in data))

        def one(amplitude, lengthscale, scale):
            scaled = first._replace(noise=scale * first.noise)
            return condition_causal_gp(prior, scaled, amplitude, lengthscale)[1]

        return jax.vmap(one)(*hyperparameters)

    place = jnp.searchsorted(jnp.array(sizes), data.used.sum())
    return jax.lax.switch(place, [ft.partial(on_the_first, size) for size in sizes])
