"""Gaussian processes of the expert: star-graph effects of interventions, and the causal-prior surrogate with expected improvement.

PARENT_SCALE (Durand, Annadani, Bauer, Parbhoo 2025) and Aglietti et al., "Causal Bayesian Optimization" (AISTATS 2020). Everything is for
one problem, in whatever units the caller uses; batch with `jax.vmap`.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lib.linalg import backward_solve, cholesky, forward_solve, inverse_and_log_det


# --- star-graph Gaussian processes: Y ~ x_g on observational rows ---

STAR_LENGTHSCALES = (0.5, 1.0, 2.0, 4.0, 8.0)  # in standard deviations of the inputs; 8 is a straight line over the data
STAR_NOISE_RATIOS = (3e-4, 3e-3, 0.03, 0.2, 1.0)  # noise variance / kernel amplitude; the least keeps float32 systems regular


class StarGP(NamedTuple):
    """Hyperparameters of one zero-mean GP per parent set: kernel `amplitude * exp(-|x - x'|^2 / 2 lengthscale^2)` plus `noise` (a variance)."""

    amplitude: Float[Array, " sets"]
    lengthscale: Float[Array, " sets"]
    noise: Float[Array, " sets"]


class StarEffects(NamedTuple):
    """What each set's GP says of do(X_i = v), each `[sets, vars, bins]`.

    `mean` and `variance` are averages over rows of the GP's mean and predictive variance (observation noise included); `spread` is the variance
    over rows of the GP's mean: how much Y still varies through the other parents.
    """

    mean: Float[Array, "sets vars bins"]
    variance: Float[Array, "sets vars bins"]
    spread: Float[Array, "sets vars bins"]


def squared_distances(x: Float[Array, "samples vars"]) -> Float[Array, "vars samples samples"]:
    """Per-variable squared differences between rows."""
    return (x.T[:, :, None] - x.T[:, None, :]) ** 2


def fit_star_gp(x: Float[Array, "samples vars"], y: Float[Array, " samples"], sets: Bool[Array, "sets vars"], max_rows: int = 100) -> StarGP:
    """Hyperparameters of maximal marginal likelihood for every set: a grid over lengthscale and noise ratio, the amplitude in closed form.

    `x` standardised, `y` centred. Only the first `max_rows` rows are used here (the cost is cubic, and hyperparameters need fewer rows than
    predictions do); `star_effects` uses them all.
    """
    x, y = x[:max_rows], y[:max_rows]
    squares = squared_distances(x)

    def score(distance, lengthscale, ratio):
        factor = cholesky(jnp.exp(-distance / (2 * lengthscale**2)) + ratio * jnp.eye(x.shape[0]))
        whitened = forward_solve(factor, y[:, None])
        amplitude = (whitened**2).mean()
        return -x.shape[0] / 2 * jnp.log(amplitude) - jnp.log(jnp.diagonal(factor)).sum(), amplitude

    lengthscales, ratios = jnp.array(STAR_LENGTHSCALES), jnp.array(STAR_NOISE_RATIOS)

    def fit(members):
        distance = jnp.tensordot(members.astype(x.dtype), squares, 1)
        scores, amplitudes = jax.lax.map(lambda length: jax.vmap(lambda r: score(distance, length, r))(ratios), lengthscales)
        i, j = jnp.unravel_index(jnp.argmax(scores), scores.shape)
        return StarGP(amplitudes[i, j], lengthscales[i], amplitudes[i, j] * ratios[j])

    return jax.lax.map(fit, sets)


def star_effects(
    x: Float[Array, "samples vars"], y: Float[Array, " samples"], sets: Bool[Array, "sets vars"], gp: StarGP, grid: Float[Array, "vars bins"]
) -> StarEffects:
    """do(X_i = v) in the star graph of every set, for every variable and value on `grid`: X_i is set to v in each row, the other parents keep theirs.

    The RBF kernel is a product over variables, so with A_rn the kernel between rows without variable i and b_n(v) that of variable i alone,
    the row averages are sum_n mean_r(A_rn) alpha_n b_n(v), and b' (K^-1 o A'A/R) b: no loop over values and rows. Constant in v for variables
    that are not in the set.
    """
    # An amplitude far above the noise is common (a smooth function is nearly a straight line); in float32 the difference
    # `amplitude - explained` then has no correct digit.
    with jax.enable_x64(True):
        wide_x, wide_y, wide_gp, wide_grid = jax.tree.map(lambda a: a.astype(jnp.float64), (x, y, gp, grid))
        effects = _star_effects(wide_x, wide_y, sets, wide_gp, wide_grid)
        return jax.tree.map(lambda a: a.astype(x.dtype), effects)


def _star_effects(x, y, sets, gp, grid):
    num_rows = x.shape[0]
    squares = squared_distances(x)
    to_grid = (grid[:, :, None] - x.T[:, None, :]) ** 2  # [vars, bins, samples]

    def one_set(args):
        members, amplitude, lengthscale, noise = args
        member = members.astype(x.dtype)
        distance = jnp.tensordot(member, squares, 1)
        scale = -0.5 / lengthscale**2
        kernel = amplitude * jnp.exp(scale * distance)
        inverse, _ = inverse_and_log_det(kernel + noise * jnp.eye(num_rows))
        alpha = inverse @ y

        def one_variable(square, to_value, inside):
            others = amplitude * jnp.exp(scale * (distance - inside * square))
            second = others.T @ others / num_rows
            own = jnp.exp(scale * inside * to_value)  # [bins, samples]
            weighted = own * alpha[None, :]
            mean = weighted @ others.mean(0)
            mean_square = ((weighted @ second) * weighted).sum(1)
            explained = ((own @ (inverse * second)) * own).sum(1)
            return StarEffects(mean, jnp.maximum(amplitude - explained, 0.0) + noise, jnp.maximum(mean_square - mean**2, 0.0))

        return jax.vmap(one_variable)(squares, to_grid, member)

    return jax.lax.map(one_set, (sets, *gp))


class CausalPrior(NamedTuple):
    """Belief about E[Y | do(X_i = v)] before interventional data, each `[vars, bins]`.

    `mean`, `deviation` (its standard deviation) and `noise`, the variance of one outcome Y under do(X_i = v).
    """

    mean: Float[Array, "vars bins"]
    deviation: Float[Array, "vars bins"]
    noise: Float[Array, "vars bins"]


def aggregate_effects(log_probs: Float[Array, " sets"], effects: StarEffects, gp: StarGP) -> CausalPrior:
    """Average over parent sets by the laws of total expectation and variance.

    The variance is that of PARENT_SCALE, sum_g P(g) (v_g + m_g^2) - m^2, where v_g includes observation noise; `noise` adds to the GP's noise
    the spread over rows, averaged over P(g).
    """
    probs = jnp.exp(log_probs)
    mean = jnp.tensordot(probs, effects.mean, 1)
    variance = jnp.tensordot(probs, effects.variance + (effects.mean - mean[None]) ** 2, 1)
    noise = jnp.tensordot(probs, effects.spread, 1) + probs @ gp.noise
    return CausalPrior(mean, jnp.sqrt(variance), noise)


# --- causal-prior GP of one variable, on interventional outcomes ---

LENGTHSCALES = (0.1, 0.2, 0.4, 0.8)  # of the range of the variable
AMPLITUDES = (0.01, 0.04, 0.16, 0.64)  # sf^2, in units of the observational variance of Y


class CausalGP(eqx.Module):
    """A fitted GP for one variable: mean m(.), kernel sf^2 RBF + s(x) s(x'), with m and s linear between the values of `grid`."""

    grid: Float[Array, " bins"]
    mean: Float[Array, " bins"]
    deviation: Float[Array, " bins"]
    points: Float[Array, " samples"]
    used: Bool[Array, " samples"]
    factor: Float[Array, "samples samples"]
    weights: Float[Array, " samples"]
    amplitude: Float[Array, ""]
    lengthscale: Float[Array, ""]

    def kernel(self, a: Float[Array, " a"], b: Float[Array, " b"]) -> Float[Array, "a b"]:
        """Prior covariance between the effects at two lists of values."""
        return causal_kernel(self.grid, self.deviation, self.amplitude, self.lengthscale, a, b)

    def __call__(self, values: Float[Array, " values"]) -> tuple[Float[Array, " values"], Float[Array, " values"]]:
        """Posterior mean and standard deviation of E[Y | do(X = v)] at `values`."""
        cross = self.kernel(self.points, values) * self.used[:, None]
        whitened = forward_solve(self.factor, cross)
        prior = self.amplitude + jnp.interp(values, self.grid, self.deviation) ** 2
        mean = jnp.interp(values, self.grid, self.mean) + self.weights @ cross
        return mean, jnp.sqrt(jnp.maximum(prior - (whitened**2).sum(0), 1e-10))


def causal_kernel(grid, deviation, amplitude, lengthscale, a, b):
    """CausalRBF of Aglietti et al. 2020, eq. 5: sf^2 exp(-(a - b)^2 / 2 l^2) + s(a) s(b)."""
    rbf = amplitude * jnp.exp(-0.5 * ((a[:, None] - b[None, :]) / lengthscale) ** 2)
    return rbf + jnp.interp(a, grid, deviation)[:, None] * jnp.interp(b, grid, deviation)[None, :]


def fit_causal_gp(
    grid: Float[Array, " bins"],
    mean: Float[Array, " bins"],
    deviation: Float[Array, " bins"],
    points: Float[Array, " samples"],
    outcomes: Float[Array, " samples"],
    noise: Float[Array, " samples"],
    used: Bool[Array, " samples"],
    unit: Float[Array, ""] | float = 1.0,
    noise_scales: tuple[float, ...] = (1.0,),
) -> CausalGP:
    """GP of one variable given outcomes at `points` with noise variances `noise`; rows with `used` false are ignored.

    Hyperparameters maximise the marginal likelihood over LENGTHSCALES x AMPLITUDES (times `unit`, the variance of Y) x `noise_scales`, with a
    weak log-normal prior that decides where there are no data. `grid` is increasing; a range of zero width is allowed and never explored.
    """
    width = jnp.maximum(grid[-1] - grid[0], 1e-6)
    residual = jnp.where(used, outcomes - jnp.interp(points, grid, mean), 0.0)
    both = used[:, None] & used[None, :]
    lengthscales, amplitudes, scales = (
        axis.reshape(-1)
        for axis in jnp.meshgrid(jnp.array(LENGTHSCALES) * width, jnp.array(AMPLITUDES) * unit, jnp.array(noise_scales), indexing="ij")
    )

    def score(lengthscale, amplitude, scale):
        kernel = jnp.where(both, causal_kernel(grid, deviation, amplitude, lengthscale, points, points), 0.0)
        # Outcomes nearly free of noise make the system singular in float32: a hundred-thousandth of the prior variance is added.
        diagonal = scale * noise + 1e-5 * jnp.diagonal(kernel)
        factor = cholesky(kernel + jnp.diag(jnp.where(used, diagonal, 1.0)))
        whitened = forward_solve(factor, residual[:, None])
        evidence = -0.5 * (whitened**2).sum() - jnp.log(jnp.diagonal(factor)).sum()
        log_prior = -0.5 * jnp.log(lengthscale / (0.4 * width)) ** 2 - 0.125 * jnp.log(amplitude / (0.1 * unit)) ** 2
        weights = backward_solve(factor, whitened)[:, 0]
        return evidence + log_prior, factor, weights

    scores, factors, weights = jax.vmap(score)(lengthscales, amplitudes, scales)
    best = jnp.argmax(scores)
    return CausalGP(grid, mean, deviation, points, used, factors[best], weights[best], amplitudes[best], lengthscales[best])


# --- acquisition ---


def log_expected_improvement(mean: Float[Array, "*shape"], std: Float[Array, "*shape"], best: Float[Array, ""] | float) -> Float[Array, "*shape"]:
    """log E[max(best - f, 0)] for f ~ N(mean, std^2): the improvement is s (u Phi(u) + phi(u)) with u = (best - mean) / s.

    Below u = -5 by its asymptotic series, so that variables stay ranked where the improvement itself underflows (Ament et al. 2023).
    """
    u = (best - mean) / std
    near, far = jnp.maximum(u, -5.0), jnp.minimum(u, -5.0)
    direct = jnp.log(near * jax.scipy.stats.norm.cdf(near) + jax.scipy.stats.norm.pdf(near))
    tail = jax.scipy.stats.norm.logpdf(far) - 2 * jnp.log(-far) + jnp.log1p(-3 / far**2 + 15 / far**4)
    return jnp.log(std) + jnp.where(u > -5, direct, tail)


def expected_improvement(mean: Float[Array, "*shape"], std: Float[Array, "*shape"], best: Float[Array, ""] | float) -> Float[Array, "*shape"]:
    """E[max(best - f, 0)] for f ~ N(mean, std^2), in the units of `mean`."""
    return jnp.exp(log_expected_improvement(mean, std, best))


def refine(score, grid: Float[Array, "vars bins"], table: Float[Array, "vars bins"], num_values: int = 17) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Variable and value that maximise `table[vars, bins]`, the value refined once between its neighbours on the grid.

    `score(variable, values)` gives the same quantity at any `values`.
    """
    variable, index = jnp.unravel_index(jnp.argmax(table), table.shape)
    values = grid[variable]
    step = values[1] - values[0]
    fine = jnp.clip(values[index] + step * jnp.linspace(-1.0, 1.0, num_values), values[0], values[-1])
    return variable, fine[jnp.argmax(score(variable, fine))]
