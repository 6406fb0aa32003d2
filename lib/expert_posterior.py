"""Step 2 of the expert: its posterior over the target's parent sets, updated row by row in closed
form; and its settings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.expert_gp import StarGraphs, fit_star_gp, star_effects
from lib.expert_prior import doubly_robust_prior
from lib.regression import Scale, log_evidence, weight_posterior
from lib.scm import AbstractSCM, Task, value_grid


# least variance of an outcome, in units of the variance of Y; the published floor
NOISE_FLOOR = 1e-5
# of the fixed point for the noise variance: the test finds it within 1e-3 after these
NOISE_ITERATIONS = 5
FeatureKind = Literal["auto", "linear", "fourier"]


class Features(NamedTuple):
    """What Y is regressed on under every parent set S: the inputs x_S themselves where `linear`,
    else random Fourier features of an RBF kernel with lengthscale one (Rahimi and Recht 2007),
    sqrt(2 / D) cos(x_S omega + phase) with D features.
    """

    sets: Bool[Array, "sets vars"]
    linear: Bool[Array, ""] | bool
    omega: Float[Array, "sets vars features"]
    phase: Float[Array, "sets features"]

    def fourier(self, x: Float[Array, " vars"]) -> Float[Array, "sets features"]:
        """Random Fourier features of one row."""
        angles = jnp.einsum("kv,kvm->km", self.sets * x[None, :], self.omega) + self.phase
        return jnp.sqrt(2 / self.phase.shape[1]) * jnp.cos(angles)

    def __call__(self, x: Float[Array, " vars"]) -> Float[Array, "sets features"]:
        """Features of one row. Which kind, only the data tell, so under `jit` both kinds have one
        shape: zeros fill up the inputs, and their weights never leave zero.
        """
        inputs = jnp.pad(self.sets * x[None, :], ((0, 0), (0, self.phase.shape[1] - x.shape[0])))
        return jnp.where(self.linear, inputs, self.fourier(x))


def draw_fourier_features(
    key: Key[Array, ""], num_sets: int, num_vars: int, num_features: int
) -> tuple[Float[Array, "sets vars features"], Float[Array, "sets features"]]:
    """Frequencies omega ~ N(0, I) and phases ~ U(0, 2 pi): an independent draw per set, as
    published.
    """
    omega_key, phase_key = jr.split(key)

    # one key per set and variable: padding leaves the draws of the others as they are
    def one_set(k):
        key = jr.fold_in(omega_key, k)
        omega = jax.vmap(lambda i: jr.normal(jr.fold_in(key, i), (num_features,)))
        phase = jr.uniform(jr.fold_in(phase_key, k), (num_features,), maxval=2 * jnp.pi)
        return omega(jnp.arange(num_vars)), phase

    return jax.vmap(one_set)(jnp.arange(num_sets))


class ParentSetRegression(eqx.Module):
    """Bayesian linear regression of Y on features phi_S of every parent set S, and the posterior
    over the sets (Durand et al. 2025).

    Under S: y = phi_S' w + e with w ~ N(0, I) and e ~ N(0, `noise_variance[sets]`);
    `mean[sets, features]` and `covariance[sets, features, features]` are the posterior of the
    weights w, `log_probs[sets]` that of the sets. Rows come in raw units and are standardised by
    `scale`.
    """

    scale: Scale
    target: Int[Array, ""]
    features: Features
    log_probs: Float[Array, " sets"]
    mean: Float[Array, "sets features"]
    covariance: Float[Array, "sets features features"]
    noise_variance: Float[Array, " sets"]

    @classmethod
    def fit(
        cls, scale: Scale, target, features: Features, log_prior, x, noise_variance
    ) -> "ParentSetRegression":
        """Condition the weights, not the probabilities of the sets, on observational rows
        `x[samples, vars]`, standardised, given `noise_variance[sets]`: the prior `log_prior[sets]`
        has looked at these rows already.
        """
        phi = jax.vmap(features, out_axes=1)(x)
        mean, covariance, _ = jax.vmap(weight_posterior)(
            jnp.einsum("ksm,ksn->kmn", phi, phi),
            jnp.einsum("ksm,s->km", phi, jnp.take(x, target, axis=1)),
            noise_variance,
        )
        log_probs = jax.nn.log_softmax(log_prior)
        return cls(scale, target, features, log_probs, mean, covariance, noise_variance)

    def log_posterior(self, buffer: ExperienceBuffer) -> Float[Array, " sets"]:
        """Log-probabilities of the sets given `buffer`, every row of which was an update."""
        return self.log_probs

    def predict(self, phi: Float[Array, "sets features"]) -> tuple[Array, Array, Array]:
        """With C the covariance of the weights, mean phi' w and variance phi' C phi + noise of the
        outcome of a row under every set `[sets]` (Rasmussen and Williams 2006, eq. 2.9), and its
        covariance C phi with the weights `[sets, features]`.
        """
        gain = jnp.einsum("kmn,kn->km", self.covariance, phi)
        return (self.mean * phi).sum(1), self.noise_variance + (gain * phi).sum(1), gain

    def posterior_after(self, y: Float[Array, ""], mean, variance) -> Float[Array, " sets"]:
        """Bayes' rule: P(S | D, y) ~ P(S | D) N(y; mean_S, variance_S), as log-probabilities, with
        each set's prediction of y, `mean[sets]` and `variance[sets]`.
        """
        log_density = -0.5 * jnp.log(variance) - 0.5 * (y - mean) ** 2 / variance
        return jax.nn.log_softmax(self.log_probs + log_density)

    def update(self, row: Float[Array, " vars"]) -> "ParentSetRegression":
        """The posterior after one raw row in which the target was not set: of the sets by the
        predictive density of its outcome y, then of the weights, mean w + C phi (y - phi' w) /
        variance and covariance C - C phi phi' C / variance (Sherman and Morrison).

        do(X_i = v) leaves the mechanism of Y as it is, so interventional rows count as
        observational ones do.
        """
        x = self.scale(row[None])[0]
        y = x[self.target]
        mean, variance, gain = self.predict(self.features(x))
        return replace(
            self,
            log_probs=self.posterior_after(y, mean, variance),
            mean=self.mean + gain * ((y - mean) / variance)[:, None],
            covariance=self.covariance
            - gain[:, :, None] * gain[:, None, :] / variance[:, None, None],
        )

    def update_all(
        self, rows: ExperienceBuffer
    ) -> tuple["ParentSetRegression", Float[Array, "samples sets"]]:
        """The posterior after all rows, and its log-probabilities after each. A row that is not
        valid, or in which the target was set, says nothing.
        """

        def step(posterior, row):
            informative = row.valid & ~row.intervened[posterior.target]
            after = jax.tree.map(
                lambda new, old: jnp.where(informative, new, old),
                posterior.update(row.values),
                posterior,
            )
            return after, after.log_probs

        return jax.lax.scan(step, self, rows)


class PosteriorOfRows(eqx.Module):
    """A posterior instead of the sequential one: log-probabilities of the candidate sets as a
    function of all rows, of which nothing is carried on.
    """

    log_posterior: Callable[[ExperienceBuffer], Float[Array, " sets"]] = eqx.field(static=True)

    def update(self, row: Float[Array, " vars"]) -> "PosteriorOfRows":
        return self


def estimate_noise(
    phi: Float[Array, "samples features"], y: Float[Array, " samples"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Noise variance, and the log evidence of `y` at it, by the fixed point of the evidence (MacKay
    1992; Bishop 2006, eq. 3.95): |y - phi w|^2 / (samples - gamma), where w and C are the posterior
    of the weights and gamma = features - tr C is how many of them the data determine.
    """
    num_rows, num_features = phi.shape
    gram, moment = phi.T @ phi, phi.T @ y

    def iterate(noise_variance, _):
        mean, covariance, _ = weight_posterior(gram, moment, noise_variance)
        gamma = num_features - jnp.trace(covariance)
        after = ((y - phi @ mean) ** 2).sum() / (num_rows - gamma)
        return jnp.maximum(after, NOISE_FLOOR), None

    # from half of the variance of Y as noise
    noise_variance, _ = jax.lax.scan(iterate, jnp.var(y) / 2, length=NOISE_ITERATIONS)
    mean, _, log_det = weight_posterior(gram, moment, noise_variance)
    return noise_variance, log_evidence(phi, y, num_rows, noise_variance, mean, log_det)


@dataclass(frozen=True)
class ParentScaleConfig:
    """Settings of the expert, all static under `jit`; and, as methods, those of its steps that the
    published code does otherwise (`studies/published.py` overrides them).
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

    regression: ClassVar[type[ParentSetRegression]] = ParentSetRegression

    def __post_init__(self):
        if self.features not in get_args(FeatureKind):
            choices = ", ".join(get_args(FeatureKind))
            raise ValueError(f"unknown features '{self.features}': choose one of {choices}")
        if self.num_obs < MIN_OBSERVATIONS:
            raise ValueError(
                f"num_obs = {self.num_obs}: the expert needs at least {MIN_OBSERVATIONS} "
                "observational rows"
            )

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

    def initial_posterior(
        self, key: Key[Array, ""], task: Task, observed: Float[Array, "samples vars"]
    ) -> tuple[Bool[Array, "sets vars"], ParentSetRegression]:
        """Candidate sets and their posterior before any experiment: the prior, with weights
        conditioned on the observational rows. Bootstraps and random features follow from the `key`
        of a run.
        """
        prior_key, feature_key, _ = jr.split(key, 3)
        sets, log_prior = self.prior_over_sets(prior_key, task, observed)
        scale = self.scale(task, observed)
        x = scale(observed)
        chosen, noise_variance = self.features_and_noise(feature_key, task, x, sets, log_prior)
        return sets, self.regression.fit(scale, task.target, chosen, log_prior, x, noise_variance)

    def features_and_noise(
        self,
        key: Key[Array, ""],
        task: Task,
        x: Float[Array, "samples vars"],
        sets: Bool[Array, "sets vars"],
        log_prior: Float[Array, " sets"],
    ) -> tuple[Features, Float[Array, " sets"]]:
        """The features asked for, and every set's noise variance with these, from standardised
        observational rows `x`.

        `auto` takes the kind of larger evidence sum_S P(S) p(y | S, kind). Each kind is estimated
        with its own number of features: zeros that fill up the linear ones only cost time.
        """
        num_features = max(self.num_features, x.shape[1])
        drawn = draw_fourier_features(key, sets.shape[0], x.shape[1], num_features)
        features, y = Features(sets, False, *drawn), jnp.take(x, task.target, axis=1)

        def estimate(kind):
            phi = jax.vmap(kind, out_axes=1)(x)
            noise_variance, evidence = jax.vmap(estimate_noise, in_axes=(0, None))(phi, y)
            return noise_variance, jax.nn.logsumexp(log_prior + evidence)

        fourier, log_fourier = estimate(features.fourier)
        linear, log_linear = estimate(lambda row: sets * row[None, :])
        better = log_linear >= log_fourier
        is_linear = better if self.features == "auto" else jnp.array(self.features == "linear")
        return features._replace(linear=is_linear), jnp.where(is_linear, linear, fourier)

    def search_grid(self, task: Task) -> Float[Array, "vars bins"]:
        """The values at which the acquisition is maximised, in raw units."""
        return value_grid(task.low, task.high, 2 * self.num_bins - 1)

    def star_graphs(
        self,
        task: Task,
        observed: Float[Array, "samples vars"],
        sets: Bool[Array, "sets vars"],
        possible: Bool[Array, " sets"],
    ) -> StarGraphs:
        """Do-effects on the search grid under every `possible` set, from observational rows, all
        standardised by these.
        """
        scale = Scale.of(observed)
        x, grid = scale(observed), scale(self.search_grid(task).T).T
        y = jnp.take(x, task.target, axis=1)
        gp = fit_star_gp(x, y, sets, possible)
        effects = star_effects(x, y, sets, gp, grid, possible)
        return StarGraphs(sets, grid, effects, jnp.sum(gp.failures))


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
    observed, later = config.split(buffer)
    _, first = config.initial_posterior(key, scm.task, observed)
    _, log_probs = first.update_all(later)
    every = jnp.concatenate([first.log_probs[None], log_probs])
    return every[num_initial - config.num_obs + jnp.arange(config.num_steps + 1)]
