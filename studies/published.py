"""The expert as published: PARENT_SCALE by the rules of its code where these depart from the
method, which `lib/expert.py` follows. For comparisons only.

`PublishedConfig` in place of `ParentScaleConfig` is the switch; `published` of `studies/expert.py`
uses it. Then

- only sets that bootstraps select are candidates, without the empty one, instead of also every
  subset of the variables selected most often;
- precision stands for covariance in the likelihood (linear), and a point is absorbed before it is
  scored (Fourier);
- Y is in its own units with noise variance one, instead of standardised with the noise estimated on
  the observational rows;
- hyperparameters of the do-effects follow `fit_star_gp`, from raw rows.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import optax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Float

from lib.expert_gp import StarEffects, StarGP, squared_distances, star_effects
from lib.expert_posterior import ParentScaleConfig, ParentSetRegression
from lib.expert_prior import select, set_frequencies
from lib.linalg import inverse_and_log_det, positive_solve
from lib.regression import Scale
from lib.scm import value_grid


class PublishedRegression(ParentSetRegression):
    """The regression whose sets are scored by the published likelihood."""

    def absorb(self, row):
        after, x = super().absorb(row), self.scale(row[None])[0]
        phi, linear = self.features(x), self.features.linear
        before, *_ = self.predict(phi)
        mean, variance, _ = after.predict(phi)
        by_precision = jax.vmap(positive_solve)(self.covariance, phi[:, :, None])[:, :, 0]
        mean = jnp.where(linear, before, mean)
        variance = jnp.where(linear, self.noise + (phi * by_precision).sum(1), variance)
        return replace(after, log_probs=self.scored(x[self.target], mean, variance))


@dataclass(frozen=True)
class PublishedConfig(ParentScaleConfig):
    """Settings of the expert as published."""

    def prior_over_sets(self, key, task, observed):
        return bootstrap_prior(key, observed, task, self.num_bootstraps, self.num_features)

    def scale(self, task, observed):
        shift, spread = super().scale(task, observed)
        return Scale(shift.at[task.target].set(0.0), spread.at[task.target].set(1.0))

    def initial_regression(self, key, task, observed, sets, log_prior):
        # Sets with the target have probability zero, but it may be too large for their regression.
        without = sets.at[:, task.target].set(False)
        first = super().initial_regression(key, task, observed, without, log_prior)
        noise = jnp.ones_like(first.noise)
        return PublishedRegression.fit(
            first.scale, task.target, first.features, log_prior, observed, noise
        )

    def do_effects(self, task, observed, sets, log_prior):
        live, grid = log_prior > -jnp.inf, value_grid(task.low, task.high, self.num_values)
        scale = Scale.of(observed)
        y, shift, spread = (
            jnp.take(a, task.target, axis=-1) for a in (observed, scale.shift, scale.spread)
        )
        star = fit_star_gp(observed, y, sets, live)
        mean, *variances = star_effects(observed, y, sets, star, grid, live)
        standard = StarEffects((mean - shift) / spread, *(v / spread**2 for v in variances))
        return star._replace(noise=star.noise / spread**2), standard


def bootstrap_prior(
    key, rows, task, num_bootstraps, num_features
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """Sets with the frequencies with which bootstraps select them; the arguments are those of
    `lib.expert_prior.doubly_robust_prior`.
    """
    selected, _ = select(key, rows, task, num_bootstraps, num_features)
    sets, log_probs = set_frequencies(selected, task.possible_parents)
    return sets, without_empty(sets, log_probs)


def without_empty(
    sets: Bool[Array, "sets vars"], log_probs: Float[Array, " sets"]
) -> Float[Array, " sets"]:
    """Log-probabilities with zero probability for the empty set; the rest is not renormalised."""
    return jnp.where(sets.any(1), log_probs, -jnp.inf)


# what its `safe_optimization` allows
LONGEST, NOISES, LEAST_AMPLITUDE = 20.0, (1e-5, 2.0), 1e-5


def fit_star_gp(
    x: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    sets: Bool[Array, "sets vars"],
    live: Bool[Array, " sets"],
) -> StarGP:
    """Hyperparameters as the published code sets them, from raw `x` and `y`: all rows, gradient
    ascent from (1, 1, 1), then its limits.

    A lengthscale above 20 (what a straight line asks for) becomes 1 while amplitude and noise stay:
    on linear systems its do-effects fall back to zero between the rows. Sets that are not `live`
    get ones, without any work.
    """
    with jax.enable_x64(True):
        wide_x, wide_y = x.astype(jnp.float64), y.astype(jnp.float64)
        gp = jax.vmap(fit_one_star_gp, in_axes=(0, 0, None, None))(
            live, sets, squared_distances(wide_x), wide_y
        )
        return StarGP(*(p.astype(x.dtype) for p in gp))


# one set after the other: under `vmap` a condition would compute both of its branches
@sequential_vmap
def fit_one_star_gp(alive, members, squares, y) -> tuple[Float[Array, ""], ...]:
    """Amplitude, lengthscale and noise of one set, from squared distances
    `squares[vars, samples, samples]`.
    """
    optimiser, start = optax.lbfgs(), jnp.zeros(3, y.dtype)
    distance = jnp.tensordot(members.astype(y.dtype), squares, 1)

    def loss(logs):
        amplitude, lengthscale, noise = jnp.exp(logs)
        kernel = amplitude * jnp.exp(-distance / (2 * lengthscale**2)) + noise * jnp.eye(y.shape[0])
        inverse, log_det = inverse_and_log_det(jax.lax.stop_gradient(kernel))
        alpha = inverse @ y
        # The derivative of the negative log likelihood along dK is -(alpha alpha' - K^-1) : dK / 2
        # (Rasmussen and Williams 2006, eq. 5.9).
        slope = -0.5 * (kernel * (alpha[:, None] * alpha[None] - inverse)).sum()
        return 0.5 * (y @ alpha + log_det) + slope - jax.lax.stop_gradient(slope)

    def improve(carry):
        logs, state, value, _, step = carry
        gradient = jax.grad(loss)(logs)
        updates, state = optimiser.update(
            gradient, state, logs, value=value, grad=gradient, value_fn=loss
        )
        after = loss(logs + updates)
        return logs + updates, state, after, value - after, step + 1

    def going(carry):  # until a step gains less than SciPy's L-BFGS asks of one
        _, _, value, gain, step = carry
        return (gain > 2e-9 * jnp.maximum(jnp.abs(value), 1.0)) & (step < 100)

    def fit():
        logs, *_ = jax.lax.while_loop(
            going, improve, (start, optimiser.init(start), loss(start), jnp.array(jnp.inf), 0)
        )
        amplitude, lengthscale, noise = jnp.exp(logs)
        lengthscale = jnp.where(lengthscale > LONGEST, 1.0, lengthscale)
        amplitude = jnp.maximum(amplitude, LEAST_AMPLITUDE)
        return amplitude, lengthscale, jnp.clip(noise, *NOISES)

    one = jnp.ones((), y.dtype)
    return jax.lax.cond(alive, fit, lambda: (one, one, one))
