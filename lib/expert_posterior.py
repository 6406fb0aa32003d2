"""What the expert believes: its posterior over the target's parent sets, updated row by row; and
its settings.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.expert_gp import StarEffects, StarGP, fit_star_gp, star_effects
from lib.expert_prior import doubly_robust_prior
from lib.regression import Scale, log_evidence, weight_posterior
from lib.scm import AbstractSCM, Task, value_grid


NOISE_FLOOR = 1e-5  # variance of an outcome, in units of the variance of Y; the published floor
NOISE_STEPS = 5  # of its fixed point
FeatureKind = Literal["auto", "linear", "fourier"]


class Features(NamedTuple):
    """What Y is regressed on under every parent set: the inputs themselves where `linear`, else
    sqrt(2 / D) cos(x omega + phase) (lengthscale one).
    """

    sets: Bool[Array, "sets vars"]
    linear: Bool[Array, ""] | bool
    omega: Float[Array, "sets vars features"]
    phase: Float[Array, "sets features"]

    def __call__(self, x: Float[Array, " vars"]) -> Float[Array, "sets features"]:
        """Features of one row, padded to a common number."""
        num_features, inside = self.phase.shape[1], self.sets * x[None, :]
        angles = jnp.einsum("kv,kvm->km", inside, self.omega) + self.phase
        padded = jnp.pad(inside, ((0, 0), (0, num_features - x.shape[0])))
        return jnp.where(self.linear, padded, jnp.sqrt(2 / num_features) * jnp.cos(angles))


class ParentSetRegression(eqx.Module):
    """Bayesian linear regression of Y on features of every parent set, and the posterior over the
    sets.

    Weights have prior N(0, I); `mean[sets, features]` and `covariance[sets, features, features]`
    are their posterior, `noise[sets]` the noise variance. Rows come in raw units and are
    standardised by `scale`.
    """

    scale: Scale
    target: Int[Array, ""]
    features: Features
    log_probs: Float[Array, " sets"]
    mean: Float[Array, "sets features"]
    covariance: Float[Array, "sets features features"]
    noise: Float[Array, " sets"]

    @classmethod
    def fit(
        cls, scale: Scale, target, features: Features, log_prior, rows, noise
    ) -> "ParentSetRegression":
        """Condition the weights, not the probabilities of the sets, on observational
        `rows[samples, vars]`, given `noise[sets]`.
        """
        x = scale(rows)
        phi = jax.vmap(features, out_axes=1)(x)
        mean, covariance, _ = jax.vmap(weight_posterior)(
            jnp.einsum("ksm,ksn->kmn", phi, phi),
            jnp.einsum("ksm,s->km", phi, jnp.take(x, target, axis=1)),
            noise,
        )
        log_probs = jax.nn.log_softmax(log_prior)
        return cls(scale, target, features, log_probs, mean, covariance, noise)

    def predict(self, phi: Float[Array, "sets features"]) -> tuple[Array, Array, Array]:
        """Mean and variance of the outcome of a row with these features under every set, and the
        covariance `[sets, features]` of that outcome with the weights.
        """
        gain = jnp.einsum("kmn,kn->km", self.covariance, phi)
        return (self.mean * phi).sum(1), self.noise + (gain * phi).sum(1), gain

    def scored(self, y: Float[Array, ""], mean, variance) -> Float[Array, " sets"]:
        """Log-probabilities of the sets after an outcome that each predicted with this `mean[sets]`
        and `variance[sets]`.
        """
        density = -0.5 * jnp.log(variance) - 0.5 * (y - mean) ** 2 / variance
        return jax.nn.log_softmax(self.log_probs + density)

    def absorb(self, row: Float[Array, " vars"]) -> "ParentSetRegression":
        """Score a row in which the target was not set by its predictive density under every set,
        then condition the weights on it.
        """
        x = self.scale(row[None])[0]
        y = x[self.target]
        mean, variance, gain = self.predict(self.features(x))
        return replace(
            self,
            log_probs=self.scored(y, mean, variance),
            mean=self.mean + gain * ((y - mean) / variance)[:, None],
            # Sherman and Morrison
            covariance=self.covariance
            - gain[:, :, None] * gain[:, None, :] / variance[:, None, None],
        )

    def absorb_all(
        self, rows: ExperienceBuffer
    ) -> tuple["ParentSetRegression", Float[Array, "samples sets"]]:
        """The belief after all rows, and its log-probabilities after each. A row that is not valid,
        or in which the target was set, says nothing.
        """

        def follow(state, row):
            use = row.valid & ~row.intervened[state.target]
            after = jax.tree.map(
                lambda new, old: jnp.where(use, new, old), state.absorb(row.values), state
            )
            return after, after.log_probs

        return jax.lax.scan(follow, self, rows)


def estimate_noise(
    phi: Float[Array, "samples features"], y: Float[Array, " samples"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Residual variance, and the log evidence of `y` at it: MacKay's fixed point, residual sum of
    squares / (samples - effective weights).
    """
    num_rows, num_features = phi.shape
    gram, moment = phi.T @ phi, phi.T @ y

    def improve(noise, _):
        mean, covariance, _ = weight_posterior(gram, moment, noise)
        effective = num_features - jnp.trace(covariance)
        improved = ((y - phi @ mean) ** 2).sum() / (num_rows - effective)
        return jnp.maximum(improved, NOISE_FLOOR), None

    noise, _ = jax.lax.scan(improve, jnp.var(y) / 2, length=NOISE_STEPS)
    mean, _, log_det = weight_posterior(gram, moment, noise)
    return noise, log_evidence(phi, y, num_rows, noise, mean, log_det)


def draw_features(key: Key[Array, ""], num_sets: int, num_vars: int, num_features: int):
    """Frequencies `[sets, vars, features]` of an RBF kernel with lengthscale one, and phases: an
    independent draw per set, as published.
    """
    omega_key, phase_key = jr.split(key)

    # one key per set and variable: padding leaves the draws of the others as they are
    def one_set(k):
        key = jr.fold_in(omega_key, k)
        omega = jax.vmap(lambda i: jr.normal(jr.fold_in(key, i), (num_features,)))
        phase = jr.uniform(jr.fold_in(phase_key, k), (num_features,), maxval=2 * jnp.pi)
        return omega(jnp.arange(num_vars)), phase

    return jax.vmap(one_set)(jnp.arange(num_sets))


@dataclass(frozen=True)
class ParentScaleConfig:
    """Settings of the expert, all static under `jit`, and what of it the published code does
    otherwise (`studies/published.py`).
    """

    num_obs: int
    """number of leading rows of the buffer that are observational (D_O)"""
    num_steps: int
    """number of experiments"""
    num_bootstraps: int = 10
    """bootstraps of the doubly robust prior"""
    features: FeatureKind = "auto"
    """of the parent-set regression; auto: whichever explains Y better on D_O, which can mislead
    where interventions go far beyond D_O
    """
    num_features: int = 100
    """random Fourier features, of the posterior and of the prior's regressors"""
    outcome_samples: int = 1
    """an experiment reports the mean target of this many samples (published: 1000); the buffer and
    the posterior always get one row
    """
    num_bins: int = 16
    """values per variable in the stored acquisition surface; the search grid has one more value
    between any two
    """

    def __post_init__(self):
        if self.features not in get_args(FeatureKind):
            choices = ", ".join(get_args(FeatureKind))
            raise ValueError(f"unknown features '{self.features}': choose one of {choices}")
        if self.num_obs < MIN_OBSERVATIONS:
            raise ValueError(
                f"num_obs = {self.num_obs}: the expert needs at least {MIN_OBSERVATIONS} "
                "observational rows"
            )

    @property
    def num_values(self) -> int:
        """Values per variable on the search grid."""
        return 2 * self.num_bins - 1

    def split(
        self, buffer: ExperienceBuffer
    ) -> tuple[Float[Array, "samples vars"], ExperienceBuffer]:
        """The values of the `num_obs` first rows, and the rows behind them."""
        later = jax.tree.map(lambda leaf: leaf[self.num_obs :], buffer)
        return buffer.values[: self.num_obs], later

    def prior_over_sets(
        self, key: Key[Array, ""], task: Task, observed: Float[Array, "samples vars"]
    ) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
        """Candidate sets and their log-probabilities before any regression."""
        return doubly_robust_prior(key, observed, task, self.num_bootstraps, self.num_features)

    def scale(self, task: Task, observed: Float[Array, "samples vars"]) -> Scale:
        """The units of the parent-set regression."""
        return Scale.of(observed)

    def initial_regression(
        self,
        key: Key[Array, ""],
        task: Task,
        observed: Float[Array, "samples vars"],
        sets: Bool[Array, "sets vars"],
        log_prior: Float[Array, " sets"],
    ) -> ParentSetRegression:
        """The parent-set regression after the observational rows, with the features asked for."""
        scale = self.scale(task, observed)
        x = scale(observed)
        y, num_vars = jnp.take(x, task.target, axis=1), x.shape[1]
        num_features = max(self.num_features, num_vars)
        omega, phase = draw_features(key, sets.shape[0], num_vars, num_features)

        def noise_and_evidence(linear, number):
            features = Features(sets, linear, omega[..., :number], phase[:, :number])
            phi = jax.vmap(features, out_axes=1)(x)
            return jax.vmap(estimate_noise, in_axes=(0, None))(phi, y)

        waves, wave_evidence = noise_and_evidence(False, num_features)
        # Linear features fill no more than `num_vars` places; the rest would only be zeros to
        # factorise.
        lines, line_evidence = noise_and_evidence(True, num_vars)
        evidence = log_prior[None] + jnp.stack([wave_evidence, line_evidence])
        straighter = jnp.diff(jax.nn.logsumexp(evidence, axis=1))[0] >= 0
        linear = jnp.array(self.features == "linear") if self.features != "auto" else straighter
        features, noise = Features(sets, linear, omega, phase), jnp.where(linear, lines, waves)
        return ParentSetRegression.fit(scale, task.target, features, log_prior, observed, noise)

    def do_effects(
        self,
        task: Task,
        observed: Float[Array, "samples vars"],
        sets: Bool[Array, "sets vars"],
        log_prior: Float[Array, " sets"],
    ) -> tuple[StarGP, StarEffects]:
        """The star-graph GP of every set and its do-effects on the search grid, in units of the
        deviation of Y (its mean and variance too).
        """
        x, live = Scale.of(observed)(observed), log_prior > -jnp.inf
        y, grid = jnp.take(x, task.target, axis=1), self.search_grid(task, observed)
        star = fit_star_gp(x, y, sets, live)
        return star, star_effects(x, y, sets, star, grid, live)

    def search_grid(
        self, task: Task, observed: Float[Array, "samples vars"]
    ) -> Float[Array, "vars bins"]:
        """The values at which the acquisition is maximised, standardised."""
        grid = value_grid(task.low, task.high, self.num_values)
        return Scale.of(observed)(grid.T).T


def replay_posterior(
    key: Key[Array, ""],
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    num_initial: Int[Array, ""] | int,
    config: ParentScaleConfig,
) -> Float[Array, "beliefs sets"]:
    """The expert's log-probabilities of its sets before each experiment of a finished run and after
    the last, from the run's key and rows alone.

    The experiments are the `config.num_steps` rows of `buffer` from `num_initial` on. Check a run
    against this.
    """
    prior_key, feature_key, _ = jr.split(key, 3)
    observed, later = config.split(buffer)
    candidates = config.prior_over_sets(prior_key, scm.task, observed)
    state = config.initial_regression(feature_key, scm.task, observed, *candidates)
    _, log_probs = state.absorb_all(later)
    every = jnp.concatenate([state.log_probs[None], log_probs])
    return every[num_initial - config.num_obs + jnp.arange(config.num_steps + 1)]
