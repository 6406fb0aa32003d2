"""What the expert believes: its posterior over the target's parent sets, updated row by row."""

import itertools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.expert_prior import doubly_robust_prior
from lib.linalg import inverse_and_log_det, positive_solve
from lib.scm import AbstractSCM


CHOICES = {"prior": ("doubly_robust", "uniform"), "features": ("auto", "linear", "fourier")}


NOISE_FLOOR = 1e-5  # variance of an outcome, in units of the variance of Y; the published floor


@dataclass(frozen=True)
class ParentScaleConfig:
    """Settings of the expert; all static under `jit`."""

    num_obs: int
    """number of leading rows of the buffer that are observational (D_O)"""
    num_steps: int
    """number of experiments"""
    prior: Literal["doubly_robust", "uniform"] = "doubly_robust"
    """over parent sets: bootstrap frequencies, or uniform over all sets of one to `max_set_size`
    variables
    """
    max_set_size: int = 3
    """largest set of the uniform prior"""
    num_bootstraps: int = 10
    """bootstraps of the doubly robust prior"""
    features: Literal["auto", "linear", "fourier"] = "auto"
    """of the parent-set regression; auto: whichever explains Y better on D_O, which can mislead
    where interventions go far beyond D_O
    """
    num_features: int = 100
    """random Fourier features, of the posterior and of the prior's regressors"""
    published: bool = False
    """as the published code instead of the method: only sets that bootstraps select are candidates,
    without the empty one, instead of also every subset of the variables selected most often;
    precision for covariance in the likelihood (linear), a point absorbed before it is scored
    (Fourier); Y in its own units with noise variance one, instead of standardised with the noise
    estimated on D_O; hyperparameters of the do-effects by `fit_star_gp_published`
    """
    outcome_samples: int = 1
    """an experiment reports the mean target of this many samples (published: 1000); the buffer and
    the posterior always get one row
    """
    num_bins: int = 16
    """values per variable in the stored acquisition surface; the search grid has one more value
    between any two
    """

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} '{getattr(self, name)}': choose one of {', '.join(known)}"
                )
        if self.num_obs < MIN_OBSERVATIONS:
            raise ValueError(
                f"num_obs = {self.num_obs}: the expert needs at least {MIN_OBSERVATIONS} "
                "observational rows"
            )

    @property
    def num_values(self) -> int:
        """Values per variable on the search grid."""
        return 2 * self.num_bins - 1


class ParentSetRegression(eqx.Module):
    """Bayesian linear regression of Y on features of every parent set, and the posterior over the
    sets.

    Weights have prior N(0, I); `mean[sets, features]` and `covariance[sets, features, features]`
    are their posterior, `noise[sets]` the noise variance. Features are the inputs themselves where
    `linear`, else sqrt(2 / D) cos(x omega + phase) (lengthscale one).
    """

    sets: Bool[Array, "sets vars"]
    log_probs: Float[Array, " sets"]
    linear: Bool[Array, ""]
    omega: Float[Array, "sets vars features"]
    phase: Float[Array, "sets features"]
    mean: Float[Array, "sets features"]
    covariance: Float[Array, "sets features features"]
    noise: Float[Array, " sets"]

    @staticmethod
    def fit(sets, log_prior, linear, omega, phase, x, y, noise) -> "ParentSetRegression":
        """Condition the weights, not the probabilities of the sets, on observational
        `x[samples, vars]` and `y[samples]`, given `noise[sets]`.
        """
        phi = jax.vmap(lambda row: set_features(sets, linear, omega, phase, row), out_axes=1)(x)
        mean, covariance, _ = jax.vmap(regression)(
            jnp.einsum("ksm,ksn->kmn", phi, phi), jnp.einsum("ksm,s->km", phi, y), noise
        )
        return ParentSetRegression(
            sets, jax.nn.log_softmax(log_prior), linear, omega, phase, mean, covariance, noise
        )

    def absorb(
        self,
        x: Float[Array, " vars"],
        y: Float[Array, ""],
        use: Bool[Array, ""],
        published: bool = False,
    ) -> "ParentSetRegression":
        """Score one row by its predictive density under every set, then condition the weights on
        it; nothing changes where `use` is false.
        """
        phi = set_features(self.sets, self.linear, self.omega, self.phase, x)
        gain = jnp.einsum("kmn,kn->km", self.covariance, phi)
        variance = self.noise + (gain * phi).sum(1)
        error = y - (self.mean * phi).sum(1)
        mean = self.mean + gain * (error / variance)[:, None]
        # Sherman and Morrison
        covariance = self.covariance - gain[:, :, None] * gain[:, None, :] / variance[:, None, None]
        if published:
            by_precision = self.noise + (
                phi * jax.vmap(positive_solve)(self.covariance, phi[:, :, None])[:, :, 0]
            ).sum(1)
            after = self.noise + jnp.einsum("km,kmn,kn->k", phi, covariance, phi)
            variance = jnp.where(self.linear, by_precision, after)
            error = jnp.where(self.linear, error, y - (mean * phi).sum(1))
        log_probs = jax.nn.log_softmax(
            self.log_probs - 0.5 * jnp.log(variance) - 0.5 * error**2 / variance
        )
        updated = replace(self, log_probs=log_probs, mean=mean, covariance=covariance)
        return jax.tree.map(lambda new, old: jnp.where(use, new, old), updated, self)


def set_features(sets, linear, omega, phase, x) -> Float[Array, "sets features"]:
    """Features of one row under every set, padded to a common number."""
    num_features = phase.shape[1]
    inside = sets * x[None, :]
    waves = jnp.sqrt(2 / num_features) * jnp.cos(jnp.einsum("kv,kvm->km", inside, omega) + phase)
    return jnp.where(linear, jnp.pad(inside, ((0, 0), (0, num_features - x.shape[0]))), waves)


def regression(
    gram: Float[Array, "features features"],
    moment: Float[Array, " features"],
    noise: Float[Array, ""],
):
    """Posterior mean and covariance of the weights of y = phi w + e, w ~ N(0, I), e ~ N(0, noise),
    and log |covariance|; from phi'phi and phi'y.
    """
    covariance, log_det = inverse_and_log_det(gram / noise + jnp.eye(gram.shape[0]))
    return covariance @ moment / noise, covariance, -log_det


def estimate_noise(
    phi: Float[Array, "samples features"], y: Float[Array, " samples"], iterations: int = 5
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Residual variance, and the log evidence of `y` at it: MacKay's fixed point, residual sum of
    squares / (samples - effective weights).
    """
    num_rows, num_features = phi.shape
    gram, moment = phi.T @ phi, phi.T @ y

    def improve(noise, _):
        mean, covariance, _ = regression(gram, moment, noise)
        effective = num_features - jnp.trace(covariance)
        return jnp.maximum(
            ((y - phi @ mean) ** 2).sum() / (num_rows - effective), NOISE_FLOOR
        ), None

    noise, _ = jax.lax.scan(improve, jnp.var(y) / 2, length=iterations)
    mean, _, log_det = regression(gram, moment, noise)
    fit = ((y - phi @ mean) ** 2).sum() / noise + (mean**2).sum()
    return noise, 0.5 * (log_det - fit - num_rows * jnp.log(2 * jnp.pi * noise))


def draw_features(key: Key[Array, ""], num_sets: int, num_vars: int, num_features: int):
    """Frequencies `[sets, vars, features]` of an RBF kernel with lengthscale one, and phases: an
    independent draw per set, as published.
    """
    omega_key, phase_key = jr.split(key)

    # one key per set and variable: padding leaves the draws of the others as they are
    def one_set(k):
        one_variable = jax.vmap(
            lambda i: jr.normal(jr.fold_in(jr.fold_in(omega_key, k), i), (num_features,))
        )
        return one_variable(jnp.arange(num_vars)), jr.uniform(
            jr.fold_in(phase_key, k), (num_features,), maxval=2 * jnp.pi
        )

    return jax.vmap(one_set)(jnp.arange(num_sets))


def uniform_prior(
    target: Int[Array, ""], var_mask: Bool[Array, " vars"], max_size: int = 3
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """All sets of one to `max_size` variables, equally probable; those with the target or with
    padding have probability zero.
    """
    num_vars = var_mask.shape[0]
    combinations = [
        c for size in range(1, max_size + 1) for c in itertools.combinations(range(num_vars), size)
    ]
    table = np.zeros((len(combinations), num_vars), bool)
    for row, members in zip(table, combinations, strict=True):
        row[list(members)] = True
    sets = jnp.asarray(table)
    allowed = ~(sets & ~(var_mask & (jnp.arange(num_vars) != target))[None, :]).any(1)
    return sets, jnp.where(allowed, -jnp.log(allowed.sum()), -jnp.inf)


class Scale(NamedTuple):
    """Shift and spread of every variable over the observational rows."""

    shift: Float[Array, " vars"]
    spread: Float[Array, " vars"]

    @staticmethod
    def of(rows: Float[Array, "samples vars"]) -> "Scale":
        spread = rows.std(0)
        return Scale(rows.mean(0), jnp.where(spread > 0, spread, 1.0))

    def __call__(self, rows: Float[Array, "samples vars"]) -> Float[Array, "samples vars"]:
        return (rows - self.shift[None, :]) / self.spread[None, :]

    def standardise(self, grid: Float[Array, "vars bins"]) -> Float[Array, "vars bins"]:
        """Values of every variable."""
        return self(grid.T).T


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
    observed = buffer.values[: config.num_obs]
    scale = Scale.of(observed)
    sets, log_prior = prior_over_sets(prior_key, scm, observed, config)
    state = initial_regression(feature_key, sets, log_prior, observed, scm.target, config)

    def follow(state, row):
        after = absorb_row(state, scale, scm.target, config, *row)
        return after, after.log_probs

    later = jax.tree.map(
        lambda a: a[config.num_obs :], (buffer.values, buffer.intervened, buffer.valid)
    )
    _, log_probs = jax.lax.scan(follow, state, later)
    every = jnp.concatenate([state.log_probs[None], log_probs])
    return every[num_initial - config.num_obs + jnp.arange(config.num_steps + 1)]


def prior_over_sets(
    key, scm, observed, config: ParentScaleConfig
) -> tuple[Bool[Array, "sets vars"], Float[Array, " sets"]]:
    """Candidate sets and their log-probabilities before any regression."""
    if config.prior == "uniform":
        return uniform_prior(scm.target, scm.var_mask, config.max_set_size)
    return doubly_robust_prior(
        key,
        observed,
        scm.target,
        scm.var_mask,
        num_bootstraps=config.num_bootstraps,
        num_features=config.num_features,
        published=config.published,
    )


def absorb_row(
    state: ParentSetRegression,
    scale: Scale,
    target,
    config: ParentScaleConfig,
    row,
    intervened,
    valid,
) -> ParentSetRegression:
    """The belief after one raw row; a row that is not valid, or in which the target was set, says
    nothing.
    """
    standard = scale(row[None])[0]
    outcome = row[target] if config.published else standard[target]
    return state.absorb(standard, outcome, valid & ~intervened[target], config.published)


def initial_regression(
    key, sets, log_prior, observed, target, config: ParentScaleConfig
) -> ParentSetRegression:
    """The parent-set regression after the observational rows, with the features that `config` asks
    for.
    """
    x = Scale.of(observed)(observed)
    y = jnp.take(observed if config.published else x, target, axis=1)
    num_sets, num_vars = sets.shape
    num_features = num_vars if config.features == "linear" else max(config.num_features, num_vars)
    omega, phase = draw_features(key, num_sets, num_vars, num_features)

    def noise_and_evidence(linear, num_features):
        some = omega[..., :num_features], phase[:, :num_features]
        phi = jax.vmap(lambda row: set_features(sets, linear, *some, row), out_axes=1)(x)
        return jax.vmap(estimate_noise, in_axes=(0, None))(phi, y)

    if config.features == "auto":
        # Linear features fill no more than `num_vars` places; the rest would only be zeros to
        # factorise.
        noises, evidence = zip(
            noise_and_evidence(False, num_features), noise_and_evidence(True, num_vars), strict=True
        )
        evidence = jnp.stack(evidence)
        linear = jnp.diff(jax.nn.logsumexp(log_prior[None] + evidence, axis=1))[0] >= 0
        noise = jnp.where(linear, noises[1], noises[0])
    else:
        linear = jnp.array(config.features == "linear")
        noise = noise_and_evidence(linear, num_features)[0]
    noise = jnp.ones(num_sets) if config.published else noise
    return ParentSetRegression.fit(sets, log_prior, linear, omega, phase, x, y, noise)
