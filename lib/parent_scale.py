"""The expert: causal Bayesian optimisation with an unknown graph, as one jitted program.

PARENT_SCALE, published as CBO-U (Durand, Annadani, Bauer, Parbhoo 2025, arXiv 2503.19554): a doubly
robust prior over the target's parent sets, a sequential closed-form posterior over them, star-graph
do-effects averaged over that posterior, a causal-prior Gaussian process per variable, and expected
improvement over single-variable interventions on possible parents. Where the published code departs
from the method, the default here follows the method and a field of `ParentScaleConfig` restores the
code.

Differences that remain: inputs and target are standardised by the observational rows also for the
Gaussian processes; their hyperparameters come from grids instead of a gradient search (`star_gp`
restores both for the do-effects); the acquisition is maximised on a grid and refined once; an
outcome is one noisy sample by default, so the surrogate carries observation noise.

Cost (benchmarks/expert.py): with 10 variables, 200 observational rows, 30 experiments and the
subsets of four variables as candidates, 3.8 GFLOP: 1.6 for the doubly robust prior, 1.4 for
do-effects (in float64), .7 for the regressions on parent sets, .1 for the causal GPs and the
acquisition. Two CPU cores take .34 s for it in a batch of 64, 6 % of what a large matrix product
reaches there; 5 variables take .25 s.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.causal_gp import (
    CausalGP,
    CausalPrior,
    StarEffects,
    StarGP,
    aggregate_effects,
    expected_improvement,
    fit_causal_gp,
    fit_star_gp,
    fit_star_gp_published,
    log_expected_improvement,
    refine,
    star_effects,
)
from lib.doubly_robust import BANDWIDTHS, doubly_robust_prior
from lib.linalg import inverse_and_log_det, positive_solve
from lib.posterior import ParentSetPosterior
from lib.scm import AbstractSCM, Intervention, SyntheticSCM, check_scm, experiment_key, value_grid


PRIORS = ("doubly_robust", "uniform")
FEATURES = ("auto", "linear", "fourier")
LIKELIHOODS = ("corrected", "published")
CANDIDATE_SETS = ("bootstraps", "union")
STAR_GPS = ("standardised", "published")
# sets below this probability do not count for the exploration set (the published pruning threshold)
SUPPORT = 1e-4
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
    bandwidth: Literal["median", "cross_validation"] = "median"
    """of the prior's regressors: the median distance between rows, or the multiple of it that
    predicts Y best
    """
    candidate_sets: Literal["bootstraps", "union"] = "bootstraps"
    """of the doubly robust prior: the selected sets, or also every subset of the variables selected
    most often
    """
    drop_empty: bool = False
    """delete the empty parent set from the prior, as the published code does"""
    features: Literal["auto", "linear", "fourier"] = "auto"
    """of the parent-set regression; auto: whichever explains Y better on D_O, which can mislead
    where interventions go far beyond D_O
    """
    num_features: int = 100
    """random Fourier features, of the posterior and of the prior's regressors"""
    likelihood: Literal["corrected", "published"] = "corrected"
    """published: precision for covariance (linear), a point absorbed before it is scored
    (Fourier)
    """
    star_gp: Literal["standardised", "published"] = "standardised"
    """hyperparameters of the do-effects: see `fit_star_gp` and `fit_star_gp_published` (raw units,
    and its limits)
    """
    unit_noise: bool = False
    """published: Y in its own units with noise variance one, instead of Y standardised with the
    noise estimated on D_O
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
        for name, value, known in (
            ("prior", self.prior, PRIORS),
            ("features", self.features, FEATURES),
            ("likelihood", self.likelihood, LIKELIHOODS),
            ("bandwidth", self.bandwidth, BANDWIDTHS),
            ("candidate_sets", self.candidate_sets, CANDIDATE_SETS),
            ("star_gp", self.star_gp, STAR_GPS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} '{value}': choose one of {', '.join(known)}")

    @property
    def num_values(self) -> int:
        """Values per variable on the search grid."""
        return 2 * self.num_bins - 1


class ExpertRun(eqx.Module):
    """What the expert believed, computed and did. Axes `beliefs` and `steps+1` start before the
    first experiment.

    `surface` is the expected improvement, in units of Y, on `value_grid(low, high, num_bins)`, zero
    outside the exploration set. `variable`, `value`, `outcome` are the experiments; `recommended_*`
    the intervention of least posterior mean over all candidates. The rows of the experiments stand
    in `buffer` directly behind those that were there: before step t the expert knew `num_initial +
    t` rows. `failures` counts hyperparameters of Gaussian processes that were left out because
    their Cholesky factor failed (the best of the others was taken).
    """

    sets: Bool[Array, "sets vars"]
    log_probs: Float[Array, "beliefs sets"]
    surface: Float[Array, "steps vars bins"]
    variable: Int[Array, " steps"]
    value: Float[Array, " steps"]
    outcome: Float[Array, " steps"]
    recommended_variable: Int[Array, " steps+1"]
    recommended_value: Float[Array, " steps+1"]
    num_initial: Int[Array, ""]
    buffer: ExperienceBuffer
    failures: Int[Array, ""]

    def posterior(self, target: Int[Array, ""] | int, step: int = -1) -> ParentSetPosterior:
        """The belief after `step` experiments (default: at the end)."""
        return ParentSetPosterior(jnp.asarray(target), self.sets, self.log_probs[step])


# --- posterior over parent sets ---


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
        """Condition the weights, not the probabilities of the sets, on observational `x[samples,
        vars]` and `y[samples]`, given `noise[sets]`.
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
        likelihood: str = "corrected",
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
        if likelihood == "published":
            by_precision = self.noise + (
                phi * jax.vmap(positive_solve)(self.covariance, phi[:, :, None])[:, :, 0]
            ).sum(1)
            after = self.noise + jnp.einsum("km,kmn,kn->k", phi, covariance, phi)
            variance = jnp.where(self.linear, by_precision, after)
            error = jnp.where(self.linear, error, y - (mean * phi).sum(1))
        log_probs = jax.nn.log_softmax(
            self.log_probs - 0.5 * jnp.log(variance) - 0.5 * error**2 / variance
        )
        updated = (
            jnp.where(use, log_probs, self.log_probs),
            jnp.where(use, mean, self.mean),
            jnp.where(use, covariance, self.covariance),
        )
        return eqx.tree_at(lambda r: (r.log_probs, r.mean, r.covariance), self, updated)


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


# --- the loop, shared with plain Bayesian optimisation ---


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


class Decision(NamedTuple):
    """One look at the surrogate: surface, the next experiment and the recommendation, in raw
    units.
    """

    surface: Float[Array, "vars bins"]
    variable: Int[Array, ""]
    value: Float[Array, ""]
    recommended_variable: Int[Array, ""]
    recommended_value: Float[Array, ""]
    failures: Int[Array, ""]


def fit_causal_gps(
    scm, scale, config, prior: CausalPrior, values, intervened, outcomes, share, noise_scales
) -> CausalGP:
    """The causal GP of every variable (leading axis), standardised.

    `values[samples, vars]` and `outcomes[samples]` are standardised interventional rows; a row
    counts for a variable if it alone was set. The noise of an outcome is the prior's `noise` at its
    value times `share[samples]`.
    """
    grid = (value_grid(scm.low, scm.high, config.num_values) - scale.shift[:, None]) / scale.spread[
        :, None
    ]
    used = (intervened & (intervened.sum(1) == 1)[:, None] & scm.candidates[None, :]).T

    def fit(grid, mean, deviation, noise, points, used):
        noise = jnp.maximum(jnp.interp(points, grid, noise) * share, NOISE_FLOOR)
        return fit_causal_gp(
            grid, mean, deviation, points, outcomes, noise, used, noise_scales=noise_scales
        )

    return jax.vmap(fit)(grid, *prior, values.T, used)


def decide(scm, scale, gps: CausalGP, explore: Bool[Array, " vars"]) -> Decision:
    """Maximise expected improvement over the variables in `explore`.

    The incumbent is the least posterior mean over evaluated points of all variables (without noise:
    the best outcome seen); before any experiment it is the observational mean.
    """
    candidates, target = scm.candidates, scm.target
    at_points, _ = jax.vmap(lambda gp: gp(gp.points))(gps)
    best = jnp.where(gps.used.any(), jnp.where(gps.used, at_points, jnp.inf).min(), 0.0)
    mean, std = jax.vmap(lambda gp: gp(gp.grid))(gps)

    def predict(variable, points):
        return jax.tree.map(lambda leaf: leaf[variable], gps)(points)

    def log_improvement(variable, points):
        mean, std = predict(variable, points)
        return log_expected_improvement(mean, std, best)

    improvement = expected_improvement(mean, std, best)[:, ::2] * jnp.take(scale.spread, target)
    table = jnp.where(explore[:, None], log_expected_improvement(mean, std, best), -jnp.inf)
    variable, value = refine(log_improvement, gps.grid, table)
    least = jnp.where(candidates[:, None], -mean, -jnp.inf)
    recommended, at = refine(lambda i, points: -predict(i, points)[0], gps.grid, least)

    def raw(variable, value):
        return jnp.clip(
            value * scale.spread[variable] + scale.shift[variable],
            scm.low[variable],
            scm.high[variable],
        )

    surface = jnp.where(explore[:, None], improvement, 0.0)
    return Decision(
        surface,
        variable,
        raw(variable, value),
        recommended,
        raw(recommended, at),
        gps.failures.sum(),
    )


def optimise(
    key, scm, buffer, config, scale, sets, state, believe, update, noise_scales
) -> ExpertRun:
    """`num_steps` experiments. `believe(state, buffer) -> (log_probs, prior, explore)` and
    `update(state, row, intervened) -> state` are the method.

    Raises ValueError if the shape of the buffer leaves no room for `num_steps` experiments; if only
    its filled rows leave too little, which a traced program cannot raise, every number in the
    result is nan.
    """
    num_vars, capacity = scm.low.shape[0], buffer.valid.shape[0]
    if capacity < config.num_obs + config.num_steps:
        raise ValueError(
            f"the buffer has {capacity} places for {config.num_obs} observations and "
            f"{config.num_steps} experiments: use grow()"
        )
    start = buffer.size
    later = slice(config.num_obs, capacity)
    y = scale(buffer.values[later])[:, scm.target]
    share = jnp.where(jnp.arange(config.num_obs, capacity) < start, 1.0, 1 / config.outcome_samples)

    def step(carry, t):
        buffer, outcomes, state = carry
        log_probs, prior, explore = believe(state, buffer)
        intervened = buffer.intervened[later] & buffer.valid[later][:, None]
        gps = fit_causal_gps(
            scm,
            scale,
            config,
            prior,
            scale(buffer.values[later]),
            intervened,
            outcomes,
            share,
            noise_scales,
        )
        decision = decide(scm, scale, gps, explore)

        action = Intervention.single(decision.variable, decision.value, num_vars)
        rows = scm.sample(
            experiment_key(key, t), action, config.outcome_samples + (config.outcome_samples > 1)
        )
        # The row that is kept is not among those averaged, as in the published protocol, unless it
        # is the only one.
        outcome = jnp.take(rows[-config.outcome_samples :].mean(0), scm.target)
        standard = (outcome - jnp.take(scale.shift, scm.target)) / jnp.take(
            scale.spread, scm.target
        )
        after = (
            buffer.write(start + t, action, rows[0]),
            outcomes.at[start + t - config.num_obs].set(standard),
            update(state, rows[0], action.mask),
        )
        # The pass after the last experiment only looks.
        carry = jax.tree.map(
            lambda new, old: jnp.where(t < config.num_steps, new, old), after, carry
        )
        return carry, (log_probs, decision, outcome)

    (buffer, _, _), (log_probs, decisions, outcome) = jax.lax.scan(
        step, (buffer, y, state), jnp.arange(config.num_steps + 1)
    )
    run = ExpertRun(
        sets=sets,
        log_probs=log_probs,
        surface=decisions.surface[:-1],
        variable=decisions.variable[:-1],
        value=decisions.value[:-1],
        outcome=outcome[:-1],
        recommended_variable=decisions.recommended_variable,
        recommended_value=decisions.recommended_value,
        num_initial=start,
        buffer=buffer,
        failures=decisions.failures.sum(),
    )
    # Not `eqx.error_if`: a host callback inside a batched loop can deadlock on a machine with few
    # cores.
    fits = start + config.num_steps <= capacity
    return jax.tree.map(
        lambda leaf: jnp.where(fits, leaf, jnp.nan) if eqx.is_inexact_array(leaf) else leaf, run
    )


def check_expert_input(
    scm: AbstractSCM, buffer: ExperienceBuffer, config: ParentScaleConfig
) -> None:
    """Raise `ValueError` if the expert cannot work on `scm` from `buffer`; of a synthetic model,
    also what `check_scm` raises. Nothing may be traced.

    Refused are fewer observational rows than `MIN_OBSERVATIONS`, or than `config.num_obs` at the
    front of the buffer; numbers in filled rows that are not finite; a target that is constant over
    the observational rows; a range with low above high, or no candidate; no room for the
    experiments. Variables other than the target may be constant over the observational rows: they
    count with spread one, and the doubly robust prior never selects them as parents, so their
    effect is taken to be constant.
    """
    names = [*scm.names, *(f"place {i}" for i in range(len(scm.names), scm.low.shape[0]))]
    values, filled, low, high = (
        np.asarray(a) for a in (buffer.values, buffer.valid, scm.low, scm.high)
    )
    if config.num_obs < MIN_OBSERVATIONS:
        raise ValueError(
            f"num_obs = {config.num_obs}: the expert needs at least "
            f"{MIN_OBSERVATIONS} observational rows: add observations"
        )
    num_rows, capacity = max(int(filled.sum()), config.num_obs), len(filled)
    if capacity < num_rows + config.num_steps:
        raise ValueError(
            f"the buffer has {capacity} places for {num_rows} rows and "
            f"{config.num_steps} experiments: use grow()"
        )
    other = ~np.asarray(buffer.observational)[: config.num_obs]
    if other.any():
        raise ValueError(
            f"row {int(np.argmax(other))} of the buffer is free or interventional, but the first "
            f"num_obs = {config.num_obs} must be observational: "
            "add observations before interventions, or lower num_obs"
        )
    infinite = np.argwhere(~np.isfinite(values) & filled[:, None])
    if len(infinite):
        row, variable = infinite[0]
        raise ValueError(
            f"row {row} of the buffer, {names[variable]}: {values[row, variable]} is "
            "not a finite number: correct or remove the row"
        )
    target = names[int(scm.target)]
    if np.ptp(values[: config.num_obs, int(scm.target)]) == 0:
        raise ValueError(
            f"the target {target} is constant over the {config.num_obs} "
            "observational rows: add rows in which it varies"
        )
    wrong = ~(np.isfinite(low) & np.isfinite(high) & (low <= high))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"{names[i]} may be set from {low[i]} to {high[i]}: give finite numbers, "
            "low not above high"
        )
    if not (np.asarray(scm.task.possible_parents) & (low < high)).any():
        raise ValueError(
            f"no variable but the target {target} has a range of intervention: give "
            "at least one of them low < high"
        )
    if isinstance(scm, SyntheticSCM):
        check_scm(scm)


def run_parent_scale(
    key: Key[Array, ""],
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    config: ParentScaleConfig,
    *,
    candidate_sets: tuple[Bool[Array, "sets vars"], Float[Array, " sets"]] | None = None,
    predict: Callable[[ExperienceBuffer], Float[Array, " sets"]] | None = None,
) -> ExpertRun:
    """Run the expert on `scm` (used only for its target, its ranges and to sample experiments),
    starting from `buffer`.

    `buffer` holds `config.num_obs` observational rows, then any number of interventional ones, then
    at least `config.num_steps` free places. `candidate_sets` (sets and log-probabilities) replaces
    the prior: one set is CBO with a known graph. `predict` maps a buffer to log-probabilities of
    `candidate_sets` and replaces the sequential posterior. The key is consumed. Pure: `jit` and
    `vmap` over the first three arguments. Where none of these is traced, raises `ValueError` as
    `check_expert_input` does.
    """
    if predict is not None and candidate_sets is None:
        raise ValueError("predict gives probabilities of candidate_sets: pass these too")
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((key, scm, buffer))):
        # all three may be constants of a program that is being traced
        with jax.ensure_compile_time_eval():
            check_expert_input(scm, buffer, config)
    prior_key, feature_key, _ = jr.split(key, 3)
    observed = buffer.values[: config.num_obs]
    scale = Scale.of(observed)
    sets, log_prior = (
        prior_over_sets(prior_key, scm, observed, config)
        if candidate_sets is None
        else candidate_sets
    )
    star, effects = effects_of_sets(observed, scm, sets, log_prior, config)

    def believe(state, buffer):
        log_probs = state.log_probs if predict is None else predict(buffer)
        support = (sets & (log_probs > jnp.log(SUPPORT))[:, None]).any(0) & scm.candidates
        return (
            log_probs,
            aggregate_effects(log_probs, effects, star),
            jnp.where(support.any(), support, scm.candidates),
        )

    def add_failures(run):
        return eqx.tree_at(lambda run: run.failures, run, run.failures + jnp.sum(star.failures))

    if predict is not None:
        return add_failures(
            optimise(
                key,
                scm,
                buffer,
                config,
                scale,
                sets,
                None,
                believe,
                lambda state, row, intervened: state,
                (1.0,),
            )
        )
    state = initial_regression(feature_key, sets, log_prior, observed, scm.target, config)

    def update(state, row, intervened, valid=True):
        return absorb_row(state, scale, scm.target, config, row, intervened, valid)

    rows = (buffer.values, buffer.intervened, buffer.valid)
    state, _ = jax.lax.scan(
        lambda s, row: (update(s, *row), None),
        state,
        jax.tree.map(lambda a: a[config.num_obs :], rows),
    )
    return add_failures(
        optimise(key, scm, buffer, config, scale, sets, state, believe, update, (1.0,))
    )


def effects_of_sets(
    observed: Float[Array, "samples vars"],
    scm: AbstractSCM,
    sets: Bool[Array, "sets vars"],
    log_prior: Float[Array, " sets"],
    config: ParentScaleConfig,
) -> tuple[StarGP, StarEffects]:
    """The star-graph GP of every set and its do-effects on the search grid, in units of the
    deviation of Y (its mean and variance too).
    """
    scale, raw_grid, live = (
        Scale.of(observed),
        value_grid(scm.low, scm.high, config.num_values),
        log_prior > -jnp.inf,
    )
    if config.star_gp == "standardised":
        x = scale(observed)
        y = jnp.take(x, scm.target, axis=1)
        star = fit_star_gp(x, y, sets, live)
        return star, star_effects(
            x, y, sets, star, (raw_grid - scale.shift[:, None]) / scale.spread[:, None], live
        )
    y, shift, spread = (
        jnp.take(a, scm.target, axis=-1) for a in (observed, scale.shift, scale.spread)
    )
    star = fit_star_gp_published(observed, y, sets, live)
    effects = star_effects(observed, y, sets, star, raw_grid, live)
    standard = StarEffects(
        (effects.mean - shift) / spread, effects.variance / spread**2, effects.spread / spread**2
    )
    return star._replace(noise=star.noise / spread**2), standard


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
        bandwidth=config.bandwidth,
        union=config.candidate_sets == "union",
        drop_empty=config.drop_empty,
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
    outcome = row[target] if config.unit_noise else scale(row[None])[0, target]
    return state.absorb(
        scale(row[None])[0], outcome, valid & ~intervened[target], config.likelihood
    )


def initial_regression(
    key, sets, log_prior, observed, target, config: ParentScaleConfig
) -> ParentSetRegression:
    """The parent-set regression after the observational rows, with the features that `config` asks
    for.
    """
    x = Scale.of(observed)(observed)
    y = jnp.take(observed if config.unit_noise else x, target, axis=1)
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
    noise = jnp.ones(num_sets) if config.unit_noise else noise
    return ParentSetRegression.fit(sets, log_prior, linear, omega, phase, x, y, noise)


def run_gp_ei(
    key: Key[Array, ""], scm: AbstractSCM, buffer: ExperienceBuffer, config: ParentScaleConfig
) -> ExpertRun:
    """Plain Bayesian optimisation over all candidates: the expert's Gaussian processes and
    acquisition without a graph.

    The prior mean is the observational mean of Y, the causal variance zero, the noise a fitted
    fraction of the variance of Y. Its `sets` are one empty set with probability one.
    """
    scale = Scale.of(buffer.values[: config.num_obs])
    shape = (scm.low.shape[0], config.num_values)
    prior = CausalPrior(jnp.zeros(shape), jnp.zeros(shape), jnp.ones(shape))

    def believe(state, buffer):
        return jnp.zeros(1), prior, scm.candidates

    return optimise(
        key,
        scm,
        buffer,
        config,
        scale,
        jnp.zeros((1, shape[0]), bool),
        None,
        believe,
        lambda state, row, intervened: state,
        (0.03, 0.1, 0.3, 1.0),
    )
