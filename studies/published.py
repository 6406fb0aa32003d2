"""The expert as published: PARENT_SCALE by the rules of its code where these depart from the
method, which `lib/expert.py` follows. For comparisons only.

`PublishedConfig` in place of `ParentScaleConfig` is the switch; `published` of `studies/expert.py`
uses it. Then

- only sets that bootstraps select are candidates, without the empty one, instead of also every
  subset of the variables selected most often;
- precision stands for covariance in the likelihood (linear), and a row is scored after it has
  conditioned the weights (Fourier);
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
from jaxtyping import Array, Bool, Float

from lib.expert_gp import (
    StarEffects,
    StarGP,
    StarGraphs,
    squared_distances,
    star_effects,
    where_possible,
)
from lib.expert_posterior import ParentScaleConfig, ParentSetRegression
from lib.expert_prior import select, set_frequencies
from lib.linalg import inverse_and_log_det, positive_solve
from lib.regression import Scale


class PublishedRegression(ParentSetRegression):
    """The regression whose sets are scored by the published likelihood."""

    def update(self, row):
        after, x = super().update(row), self.scale(row[None])[0]
        phi, linear = self.features(x), self.features.linear
        before, *_ = self.predict(phi)
        mean, variance, _ = after.predict(phi)
        by_precision = jax.vmap(positive_solve)(self.covariance, phi[:, :, None])[:, :, 0]
        mean = jnp.where(linear, before, mean)
        variance = jnp.where(linear, self.noise_variance + (phi * by_precision).sum(1), variance)
        return replace(after, log_probs=self.posterior_after(x[self.target], mean, variance))


@dataclass(frozen=True)
class PublishedConfig(ParentScaleConfig):
    """Settings of the expert as published."""

    regression = PublishedRegression

    def prior_over_sets(self, key, task, observed):
        return bootstrap_prior(key, observed, task, self.num_bootstraps, self.num_features)

    def scale(self, task, observed):
        shift, spread = super().scale(task, observed)
        return Scale(shift.at[task.target].set(0.0), spread.at[task.target].set(1.0))

    def features_and_noise(self, key, task, x, sets, log_prior):
        # Sets with the target have probability zero, but it may be too large for their regression.
        without = sets.at[:, task.target].set(False)
        features, estimated = super().features_and_noise(key, task, x, without, log_prior)
        return features, jnp.ones_like(estimated)

    def star_graphs(self, task, observed, sets, possible):
        # fitted in raw units, which the hyperparameters depend on; all else is standardised
        grid, scale = self.search_grid(task), Scale.of(observed)
        y, shift, spread = (
            jnp.take(a, task.target, axis=-1) for a in (observed, scale.shift, scale.spread)
        )
        gp = fit_star_gp(observed, y, sets, possible)
        mean, *variances = star_effects(observed, y, sets, gp, grid, possible)
        effects = StarEffects((mean - shift) / spread, *(v / spread**2 for v in variances))
        return StarGraphs(sets, scale(grid.T).T, effects)


def bootstrap_prior(
    key, rows, task, num_bootstraps, num_features
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """Sets with the frequencies with which bootstraps select them; the arguments are those of
    `lib.expert_prior.doubly_robust_prior`.
    """
    selected, _ = select(key, rows, task, num_bootstraps, num_features)
    sets, frequencies = set_frequencies(selected, task.possible_parents)
    return sets, without_empty(sets, jnp.log(frequencies))


def without_empty(
    sets: Bool[Array, "sets vars"], log_probs: Float[Array, " sets"]
) -> Float[Array, " sets"]:
    """Log-probabilities with zero probability for the empty set; the rest is not renormalised."""
    return jnp.where(sets.any(1), log_probs, -jnp.inf)


# What its `safe_optimization` allows, in raw units: a larger lengthscale becomes 1, the noise
# variance is clipped to this range, and an amplitude is at least this.
LONGEST, NOISE_VARIANCES, LEAST_AMPLITUDE = 20.0, (1e-5, 2.0), 1e-5
# of SciPy's L-BFGS the relative gain that ends its search; and a bound on the steps of ours
LEAST_GAIN, MOST_STEPS = 2e-9, 100


def fit_star_gp(
    x: Float[Array, "samples vars"],
    y: Float[Array, " samples"],
    sets: Bool[Array, "sets vars"],
    possible: Bool[Array, " sets"],
) -> StarGP:
    """Hyperparameters as the published code sets them, from raw `x` and `y`: all rows, gradient
    ascent from (1, 1, 1), then its limits.

    A lengthscale above 20 (what a straight line asks for) becomes 1 while amplitude and noise stay:
    on linear systems its do-effects fall back to zero between the rows. Sets that are not
    `possible` get zeros, without any work.
    """
    with jax.enable_x64(True):
        wide_x, wide_y = x.astype(jnp.float64), y.astype(jnp.float64)
        gp = jax.vmap(fit_one_star_gp, in_axes=(0, 0, None, None))(
            possible, sets, squared_distances(wide_x), wide_y
        )
        return StarGP(*(p.astype(x.dtype) for p in gp))


@where_possible
def fit_one_star_gp(members, squares, y) -> tuple[Float[Array, ""], ...]:
    """Amplitude, lengthscale and noise variance of one set, from squared distances
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

    def going(carry):
        _, _, value, gain, step = carry
        return (gain > LEAST_GAIN * jnp.maximum(jnp.abs(value), 1.0)) & (step < MOST_STEPS)

    logs, *_ = jax.lax.while_loop(
        going, improve, (start, optimiser.init(start), loss(start), jnp.array(jnp.inf), 0)
    )
    amplitude, lengthscale, noise = jnp.exp(logs)
    lengthscale = jnp.where(lengthscale > LONGEST, 1.0, lengthscale)
    amplitude = jnp.maximum(amplitude, LEAST_AMPLITUDE)
    return amplitude, lengthscale, jnp.clip(noise, *NOISE_VARIANCES)
