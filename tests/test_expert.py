"""The expert: its regression against batch formulas in numpy, its steps against recorded runs of
the original code, its runs against their own rules.

The recorded runs are those of `recorded.py`.
"""

import contextlib
import dataclasses
import functools as ft
import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from recorded import NAMES, OURS, each_case, read_case

from lib import expert_gp, expert_posterior
from lib.buffer import ExperienceBuffer
from lib.expert import SUPPORT, run_parent_scale
from lib.expert_posterior import Features
from lib.improvement import log_expected_improvement
from lib.literature import Benchmark
from lib.scm import AbstractSCM, Intervention, Task
from studies.published import PublishedConfig, PublishedRegression, fit_star_gp


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def single(array):
    return jnp.asarray(array, jnp.float32)


# --- settings ---


@pytest.mark.parametrize(
    "name,choices",
    [
        ("prior", "doubly_robust, uniform"),
        ("features", "auto, linear, fourier"),
    ],
)
def test_unknown_settings_list_the_choices(name, choices, monkeypatch):
    # as outside tests, where nothing checks types before the settings do
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    settings = {"num_obs": 10, "num_steps": 1, name: "best"}
    with pytest.raises(ValueError, match=f"unknown {name} 'best'.*{choices}"):
        expert_posterior.ParentScaleConfig(**settings)


def test_fewer_observations_than_the_expert_wants_are_refused():
    with pytest.raises(ValueError, match="num_obs = 9.*at least 10"):
        expert_posterior.ParentScaleConfig(num_obs=9, num_steps=1)


def test_the_search_grid_has_one_more_value_between_any_two():
    assert expert_posterior.ParentScaleConfig(num_obs=10, num_steps=1, num_bins=6).num_values == 11


# --- the regression, against numpy in float64 ---

NUM_VARS, FEATURES, FITTED, NEW = 4, 6, 20, 8
SETS = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
LOG_PRIOR = np.log([0.4, 0.1, 0.3, 0.2])
NOISE = np.array([0.3, 0.2, 0.5, 1.0])


def make_rows(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(FITTED + NEW, NUM_VARS))
    return x, 0.7 * x[:, 0] - 0.5 * np.sin(2 * x[:, 1]) + 0.5 * rng.normal(size=FITTED + NEW)


X, Y = make_rows(0)
OMEGA, PHASE = (
    np.asarray(a, float)
    for a in expert_posterior.draw_features(jr.key(3), len(SETS), NUM_VARS, FEATURES)
)


@ft.cache
def jit_absorb(published):
    """`(linear, use[new]) -> (initial state, states after every new row)`."""

    kind = PublishedRegression if published else expert_posterior.ParentSetRegression

    def follow(linear, use):
        features = Features(jnp.asarray(SETS), linear, single(OMEGA), single(PHASE))
        data = X[:FITTED], Y[:FITTED], NOISE
        state = kind.fit(features, single(LOG_PRIOR), *map(single, data))

        def step(state, row):
            state = state.absorb(*row)
            return state, state

        return state, jax.lax.scan(step, state, (single(X[FITTED:]), single(Y[FITTED:]), use))[1]

    return jax.jit(follow, compiler_options=FAST)


def absorb(linear, published=False, use=None):
    return jit_absorb(published)(
        jnp.array(linear), jnp.ones(NEW, bool) if use is None else jnp.asarray(use)
    )


def features(members, omega, phase, linear):
    """Features of all rows under one set."""
    inside = X * members
    return (
        np.pad(inside, ((0, 0), (0, FEATURES - NUM_VARS)))
        if linear
        else np.sqrt(2 / FEATURES) * np.cos(inside @ omega + phase)
    )


def task_of(target, slots, real=None):
    """A task without ranges, of the first `real` of `slots` variables."""
    exists = jnp.arange(slots) < (slots if real is None else real)
    return Task(jnp.array(target), jnp.zeros(slots), jnp.zeros(slots), exists)


def log_softmax(scores):
    return scores - scipy.special.logsumexp(scores)


def posterior_of_weights(phi, y, noise):
    covariance = np.linalg.inv(phi.T @ phi / noise + np.eye(phi.shape[1]))
    return covariance @ phi.T @ y / noise, covariance


@pytest.mark.parametrize("linear", [True, False])
def test_one_row_at_a_time_is_the_batch_posterior(linear):
    """Weights are those of a batch regression on all rows, and the predictive densities multiply to
    the ratio of batch evidences.
    """
    _, states = absorb(linear)
    evidence = np.zeros((NEW, len(SETS)))
    for k, members in enumerate(SETS):
        phi = features(members, OMEGA[k], PHASE[k], linear)
        outer = phi @ phi.T + NOISE[k] * np.eye(FITTED + NEW)

        def log_evidence(rows, outer=outer):
            return scipy.stats.multivariate_normal.logpdf(
                Y[:rows], np.zeros(rows), outer[:rows, :rows]
            )

        for t in range(NEW):
            rows = FITTED + t + 1
            mean, covariance = posterior_of_weights(phi[:rows], Y[:rows], NOISE[k])
            np.testing.assert_allclose(states.mean[t, k], mean, atol=5e-4)
            np.testing.assert_allclose(states.covariance[t, k], covariance, atol=5e-4)
            evidence[t, k] = log_evidence(rows) - log_evidence(FITTED)
    expected = np.stack([log_softmax(LOG_PRIOR + row) for row in evidence])
    np.testing.assert_allclose(states.log_probs, expected, atol=2e-3)
    assert np.abs(np.exp(expected[-1]) - np.exp(LOG_PRIOR)).max() > 0.1  # the rows do say something


@pytest.mark.parametrize("linear", [True, False])
def test_the_published_likelihood_departs_as_documented(linear):
    """Linear: the precision in place of the covariance. Fourier: a row is absorbed before it is
    scored. The weights are the same.
    """
    start, states = absorb(linear, published=True)
    _, corrected = absorb(linear)
    expected = LOG_PRIOR.copy()
    for t in range(NEW):
        y = Y[FITTED + t]
        for k, members in enumerate(SETS):
            phi = features(members, OMEGA[k], PHASE[k], linear)
            before, after = (
                posterior_of_weights(phi[:rows], Y[:rows], NOISE[k])
                for rows in (FITTED + t, FITTED + t + 1)
            )
            row = phi[FITTED + t]
            mean, matrix = (before[0], np.linalg.inv(before[1])) if linear else after
            expected[k] += scipy.stats.norm.logpdf(
                y, row @ mean, np.sqrt(NOISE[k] + row @ matrix @ row)
            )
        np.testing.assert_allclose(states.log_probs[t], log_softmax(expected), atol=5e-3)
    np.testing.assert_allclose(states.mean, corrected.mean, atol=1e-5)
    np.testing.assert_allclose(start.log_probs, LOG_PRIOR, atol=1e-5)
    assert np.abs(np.exp(states.log_probs) - np.exp(corrected.log_probs)).max() > 0.01


def test_rows_that_are_not_used_change_nothing():
    use = np.arange(NEW) % 2 == 0
    start, states = absorb(True, use=use)
    for before, after in ((0, 1), (4, 5)):  # rows 1 and 5 are not used
        one, two = (jax.tree.map(lambda leaf, t=t: leaf[t], states) for t in (before, after))
        assert eqx.tree_equal(one, two)
    assert (start.log_probs != states.log_probs[0]).any()
    _, none = absorb(True, use=np.zeros(NEW, bool))
    assert eqx.tree_equal(jax.tree.map(lambda leaf: leaf[-1], none), start)


def test_a_row_in_which_the_target_was_set_says_nothing():
    start, _ = absorb(True)
    scale = expert_posterior.Scale(jnp.zeros(NUM_VARS), jnp.full(NUM_VARS, 2.0))
    row = single([0.5, -1.0, 2.0, 3.0])
    step = jax.jit(
        lambda intervened, valid: expert_posterior.absorb_row(
            start, scale, 3, row, intervened, valid
        ),
        compiler_options=FAST,
    )
    seen = step(jnp.array([True, False, False, False]), jnp.array(True))
    expected = jax.jit(
        lambda: start.absorb(row / 2.0, row[3] / 2.0, jnp.array(True)), compiler_options=FAST
    )()
    np.testing.assert_allclose(seen.log_probs, expected.log_probs, atol=1e-5)  # in standard units
    for intervened, valid in ((jnp.arange(4) == 3, True), (jnp.zeros(4, bool), False)):
        assert eqx.tree_equal(step(intervened, jnp.array(valid)), start)


def test_features_of_a_set_ignore_the_other_variables():
    for linear in (True, False):
        phi = np.asarray(
            Features(jnp.asarray(SETS), jnp.array(linear), single(OMEGA), single(PHASE))(
                single(X[0])
            )
        )
        for k, members in enumerate(SETS):
            np.testing.assert_allclose(
                phi[k], features(members, OMEGA[k], PHASE[k], linear)[0], atol=1e-5
            )


def test_more_variables_or_sets_leave_the_draws_of_the_others():
    omega, phase = expert_posterior.draw_features(jr.key(3), len(SETS) + 2, NUM_VARS + 3, FEATURES)
    assert (np.asarray(omega, float)[: len(SETS), :NUM_VARS] == OMEGA).all() and (
        np.asarray(phase, float)[: len(SETS)] == PHASE
    ).all()
    assert (omega[0] != omega[1]).all() and phase.min() >= 0 and phase.max() <= 2 * np.pi


def test_noise_and_evidence():
    """The evidence is that of a Gaussian process at the estimated noise; the noise is a fixed
    point, near the truth and near the best evidence.
    """
    rng = np.random.default_rng(1)
    phi = rng.normal(size=(100, 5))
    y = phi @ np.array([1.0, -1.0, 0.5, 0.0, 0.0]) + 0.5 * rng.normal(size=100)
    noise, evidence = (
        float(v) for v in jax.jit(expert_posterior.estimate_noise)(single(phi), single(y))
    )

    def log_evidence(noise):
        return scipy.stats.multivariate_normal.logpdf(
            y, np.zeros(100), phi @ phi.T + noise * np.eye(100)
        )

    np.testing.assert_allclose(evidence, log_evidence(noise), atol=0.05)
    mean, covariance = posterior_of_weights(phi, y, noise)
    np.testing.assert_allclose(
        noise, ((y - phi @ mean) ** 2).sum() / (100 - 5 + np.trace(covariance)), rtol=1e-3
    )
    assert abs(noise - 0.25) < 0.12
    assert evidence > max(log_evidence(factor * noise) for factor in (0.5, 0.8, 1.25, 2.0))


def test_automatic_features_follow_the_data():
    """One call on two data sets: a straight line and a wave."""
    config = expert_posterior.ParentScaleConfig(num_obs=80, num_steps=1, num_features=30)
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(2, 80, 3))
    rows[0, :, 2] = 2 * rows[0, :, 0] - rows[0, :, 1] + 0.3 * rows[0, :, 2]
    rows[1, :, 2] = np.cos(2 * rows[1, :, 0]) + 0.1 * rows[1, :, 2]
    sets = jnp.array([[1, 0, 0], [1, 1, 0]], bool)
    fit = jax.jit(
        jax.vmap(
            lambda rows: config.initial_regression(
                jr.key(0), task_of(2, 3), rows, sets, jnp.log(jnp.full(2, 0.5))
            )
        ),
        compiler_options=FAST,
    )
    state = fit(single(rows))
    assert state.features.linear.tolist() == [True, False]
    # observational rows condition the weights only
    np.testing.assert_allclose(state.log_probs, np.log(0.5), atol=1e-6)
    # in units of the variance of Y
    np.testing.assert_allclose(state.noise[0, 1], 0.09 / rows[0, :, 2].var(), rtol=0.3)


@pytest.mark.parametrize("slots", [5, 7])
def test_uniform_prior_holds_all_small_sets(slots):
    sets, log_probs = expert_posterior.uniform_prior(task_of(1, slots, 5))
    listed = {
        frozenset(np.flatnonzero(s).tolist())
        for s, p in zip(np.asarray(sets), np.asarray(log_probs), strict=True)
        if p > -np.inf
    }
    assert listed == {
        frozenset(c) for size in (1, 2, 3) for c in itertools.combinations((0, 2, 3, 4), size)
    }
    np.testing.assert_allclose(
        np.exp(log_probs)[np.isfinite(log_probs)], 1 / len(listed), rtol=1e-5
    )


# --- recorded runs of the original code ---

# of a set, by the format; values of the grid of improvements between those that a case needs
NUM_FEATURES, BETWEEN = 100, 60


class Sizes(NamedTuple):
    """The most of each that a recorded run has: every run is padded to these, so that one program
    serves all.
    """

    variables: int
    sets: int
    updates: int
    effects: int  # values of one variable in the table of do-effects
    points: int  # experiments on one variable
    values: int  # on the grid of improvements


def sizes_of(case):
    num_vars = len(case["topo"])
    own, _ = interventions(case)
    return Sizes(
        num_vars,
        len(case["sets"]),
        len(case["upd_y"]),
        max(len(values) for values in effect_values(case)),
        np.bincount(own).max(),
        max(len(special_values(case, i)) for i in range(num_vars)) + BETWEEN,
    )


def largest(cases):
    return Sizes(*(int(max(size)) for size in zip(*map(sizes_of, cases), strict=True)))


@ft.cache
def sizes():
    return largest([read_case(name) for name in NAMES])


def interventions(case):
    """Variables and values of all experiments, the initial ones first."""
    initial = case["int_data"][np.arange(len(case["int_var"])), case["int_var"]]
    return np.concatenate([case["int_var"], case["chosen_var"]]), np.concatenate(
        [initial, case["chosen_value"]]
    )


def effect_values(case):
    """For every variable, its values in the table of do-effects."""
    table = case["do_effects"]
    return [np.unique(table[table[:, 1] == i, 2]) for i in range(len(case["topo"]))]


def special_values(case, i):
    """Values of variable i that a grid of improvements has to hold: of experiments, of the
    original's improvements, and the ends of its range.
    """
    variables, values = interventions(case)
    asked = case["ei_argmax"][:, i]
    return np.unique(
        np.concatenate([values[variables == i], asked[~np.isnan(asked)], case["search_range"][i]])
    )


def pad(array, *shape):
    return np.pad(array, [(0, size - have) for size, have in zip(shape, array.shape, strict=True)])


def pad_sets(case):
    return jnp.asarray(pad(case["sets"], sizes().sets, sizes().variables))


def pad_gps(hyperparameters):
    """Ones for the sets that a case does not have."""
    room = sizes().sets - hyperparameters.shape[1]
    return np.pad(hyperparameters, ((0, 0), (0, room)), constant_values=1.0)


def test_sizes_follow_from_the_cases():
    """A run with more candidate sets and updates than any other sets these two sizes, and no
    other.
    """
    case, size = read_case(NAMES[0]), sizes()
    many = case | {
        "sets": np.ones((size.sets + 115, size.variables), bool),
        "upd_y": np.zeros(size.updates + 20),
    }
    assert largest([case, many]) == sizes_of(case)._replace(
        sets=size.sets + 115, updates=size.updates + 20
    )
    assert all(np.all(np.array(size) >= sizes_of(read_case(name))) for name in NAMES)


def case_features(case, dtype):
    """Whether the case is linear, its frequencies `[sets, vars, features]` and phases."""
    omega, phase = (
        np.zeros((sizes().sets, sizes().variables, NUM_FEATURES)),
        np.zeros((sizes().sets, NUM_FEATURES)),
    )
    if "weights" not in case:
        for k, members in enumerate(case["sets"]):
            omega[k, np.flatnonzero(members)], phase[k] = case[f"rff{k}_omega"], case[f"rff{k}_b"]
    return jnp.array("weights" in case), jnp.asarray(omega, dtype), jnp.asarray(phase, dtype)


@ft.cache
def jit_follow():
    def follow(sets, log_prior, linear, omega, phase, x, y, updates):
        def run(kind):
            features, noise = Features(sets, linear, omega, phase), jnp.ones(len(sets), x.dtype)

            def step(state, row):
                state = state.absorb(*row)
                return state, state.log_probs

            return jax.lax.scan(step, kind.fit(features, log_prior, x, y, noise), updates)[1]

        return run(PublishedRegression), run(expert_posterior.ParentSetRegression)

    return jax.jit(follow, compiler_options=FAST)


@ft.cache
def followed(name, dtype):
    """Probabilities `[updates, sets]` of both likelihoods after every update of a case."""
    case = read_case(name)
    observed, target, count, size = case["obs"], int(case["target"]), len(case["upd_y"]), sizes()
    kept = np.arange(observed.shape[1]) != target
    inputs = np.where(kept, (observed - case["means"]) / case["stds"], 0.0)
    standard = expert_posterior.Scale.of(single(observed))(single(observed))
    np.testing.assert_allclose(standard[:, kept], inputs[:, kept], atol=1e-4)
    with jax.enable_x64(dtype == "float64"), np.errstate(divide="ignore"):

        def cast(array, *shape):
            return jnp.asarray(pad(array, *shape), dtype)

        rows = (
            cast(np.nan_to_num(case["upd_x"]), size.updates, size.variables),
            cast(case["upd_y"], size.updates),
        )
        both = jit_follow()(
            pad_sets(case),
            jnp.log(cast(case["prior"], size.sets)),
            *case_features(case, dtype),
            cast(inputs, len(observed), size.variables),
            jnp.asarray(observed[:, target], dtype),
            (*rows, jnp.arange(size.updates) < count),
        )
        return tuple(
            np.exp(np.asarray(log_probs, float))[:count, : len(case["sets"])] for log_probs in both
        )


def pruned(probs, published):
    """The original drops a set for good once it is improbable, and renormalises."""
    kept = np.where(published > 0, probs, 0.0)
    return kept / kept.sum(1, keepdims=True)


def total_variation(p, q):
    return 0.5 * np.abs(p - q).sum(1)


# Found: 1e-4 in float32 and 5e-11 in float64 at most; the two likelihoods differ by .06 to 1 where
# a run has more than one set.
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-3), ("float64", 1e-6)])
@each_case()
def test_case_posterior_after_every_update(name, dtype, tolerance):
    case = read_case(name)
    published, corrected = followed(name, dtype)
    assert (
        total_variation(
            pruned(published, case["posterior_published"]), case["posterior_published"]
        ).max()
        < tolerance
    )
    assert total_variation(corrected, case["posterior_corrected"]).max() < tolerance
    if "weights" in case and OURS:
        # the comparison tells the two apart
        assert total_variation(published, corrected).max() > 0.2


@each_case()
def test_case_exploration_set_is_the_support_of_the_posterior(name):
    """Before every experiment the original computed an expected improvement exactly for the
    variables of the sets above the threshold.
    """
    case = read_case(name)
    steps, updates = len(case["ei"]), len(case["upd_y"])
    before = slice(updates - steps - 1, updates - 1)
    probs = pruned(followed(name, "float64")[0], case["posterior_published"])[before]
    # within rounding of the threshold
    probs = np.where(np.abs(probs - SUPPORT) < 1e-6, case["posterior_published"][before], probs)
    explored = ((probs > SUPPORT)[:, :, None] & case["sets"][None]).any(1)
    # Not the first experiment: in one case the original then still explored variables of sets below
    # the threshold.
    assert (explored == ~np.isnan(case["ei"]))[1:].all()


jit_effects = jax.jit(
    lambda x, y, sets, gp, grid: expert_gp.star_effects(
        x, y, sets, gp, grid, jnp.ones(len(sets), bool)
    ),
    compiler_options=FAST,
)
jit_fit_published = jax.jit(fit_star_gp, compiler_options=FAST)


def recorded_gps(case):
    """Hyperparameters of the original by set, and which sets have them (the others had lost their
    probability).
    """
    hyperparameters, known = np.ones((3, len(case["sets"]))), np.zeros(len(case["sets"]), bool)
    for row in case["do_effects"]:
        hyperparameters[:, int(row[0])], known[int(row[0])] = row[5:], True
    return hyperparameters, known


def own_gps(case, chosen):
    """Hyperparameters `[3, sets]` as our fit by the published rules finds them, for the sets that
    are `chosen`; ones for the others.
    """
    observed = single(pad(case["obs"], len(case["obs"]), sizes().variables))
    gp = jit_fit_published(
        observed,
        observed[:, int(case["target"])],
        pad_sets(case),
        jnp.asarray(pad(chosen, sizes().sets)),
    )
    return np.stack([np.asarray(p)[: len(chosen)] for p in gp[:3]])


def do_effects(case, hyperparameters):
    """Means and variances of Y under do for every row of the table, from these hyperparameters."""
    observed, table = case["obs"], case["do_effects"]
    grid = np.zeros((sizes().variables, max(sizes().effects, 1)))
    for variable, values in enumerate(effect_values(case)):
        grid[variable, : len(values)] = values
    effects = jit_effects(
        single(pad(observed, len(observed), sizes().variables)),
        single(observed[:, int(case["target"])]),
        pad_sets(case),
        expert_gp.StarGP(*single(pad_gps(hyperparameters))),
        single(grid),
    )
    chosen, variables = table[:, 0].astype(int), table[:, 1].astype(int)
    places = chosen, variables, np.abs(grid[variables] - table[:, 2:3]).argmin(1)
    return np.asarray(effects.mean)[places], np.asarray(effects.variance)[places]


@each_case()
def test_case_do_effects(name):
    """Mean of Y under do within .001 of its deviation, and the variance within .1 %, from the
    original's hyperparameters: the same formula in float32, found to differ by 2e-6 at most.
    """
    case = read_case(name)
    mean, variance = do_effects(case, recorded_gps(case)[0])
    y = case["obs"][:, int(case["target"])]
    np.testing.assert_allclose(mean, case["do_effects"][:, 3], rtol=0, atol=1e-3 * y.std())
    np.testing.assert_allclose(variance, case["do_effects"][:, 4], rtol=1e-3)


def softplus(t):
    return np.logaddexp(0.0, t)


def published_hyperparameters(points, outcomes, mean, deviation):
    """Amplitude, lengthscale and noise of a causal GP as the original finds them: SciPy's L-BFGS
    from (1, 1, 1e-10), then its limits.

    Its gradient for the amplitude counts the causal part of the kernel too (GPy's stationary
    kernels divide the whole kernel by the amplitude), so that the search often stops where the
    likelihood is not largest. The recorded improvements follow from that, and not from a correct
    gradient.
    """
    squares, residual, causal = (
        (points[:, None] - points[None]) ** 2,
        outcomes - mean,
        np.outer(deviation, deviation),
    )

    def loss(t):
        amplitude, lengthscale, noise = softplus(t)
        rbf = amplitude * np.exp(-squares / (2 * lengthscale**2))
        kernel = rbf + causal + (noise + 1e-8) * np.eye(len(points))
        for jitter in (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            with contextlib.suppress(np.linalg.LinAlgError):
                factor = np.linalg.cholesky(
                    kernel + jitter * kernel.diagonal().mean() * np.eye(len(points))
                )
                if np.isfinite(factor).all():
                    break
        else:
            return np.inf, np.full(3, 1e10)
        inverse = scipy.linalg.cho_solve((factor, True), np.eye(len(points)))
        alpha = inverse @ residual
        outer = np.outer(alpha, alpha) - inverse
        gradient = [
            (outer * (rbf + causal)).sum() / amplitude,
            (outer * rbf * squares).sum() / lengthscale**3,
            np.trace(outer),
        ]
        slope = np.clip(-0.5 * np.array(gradient) * (1 - np.exp(-softplus(t))), -1e10, 1e10)
        return 0.5 * residual @ alpha + np.log(factor.diagonal()).sum(), slope

    start = np.log(np.expm1([1.0, 1.0, 1e-10]))
    with np.errstate(all="ignore"):  # the wrong gradient leads it to amplitudes that underflow
        amplitude, lengthscale, noise = softplus(
            scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x
        )
    return (
        max(amplitude, 1e-5),
        (1.0 if lengthscale > 20 else lengthscale),
        min(max(noise, 1e-5), 2.0),
    )


@ft.cache
def jit_improvement():
    def improvement(grid, prior, points, outcomes, used, amplitude, lengthscale, noise, best, at):
        data = points, outcomes, jnp.full(points.shape, noise), used
        prior = grid, prior.mean, prior.deviation
        gp, _ = expert_gp.condition_causal_gp(prior, data, amplitude, lengthscale)
        return log_expected_improvement(*gp(at), best)

    return jax.jit(improvement, compiler_options=FAST)


@ft.cache
def improvements(name):
    """Our log expected improvement, given the original's history, `[steps, vars]`: where it
    attained its own, and the largest on a grid.
    """
    case = read_case(name)
    observed, target, steps, first, size = (
        case["obs"],
        int(case["target"]),
        len(case["chosen_var"]),
        len(case["int_var"]),
        sizes(),
    )
    hyperparameters, known = recorded_gps(case)
    # one set of one case, before it lost its probability
    missing = ~known & (case["posterior_published"][first - 1 : -1] > 0).any(0)
    hyperparameters = np.where(missing, own_gps(case, missing), hyperparameters)
    variables, values = interventions(case)
    outcomes = np.concatenate([case["int_data"][:, target], case["chosen_y"]])
    at_points, at_best = np.full((2, *case["ei"].shape), np.nan)
    num_vars = observed.shape[1]
    grids = np.zeros((num_vars, size.values))
    for i in range(num_vars):
        special = special_values(case, i)
        grids[i] = np.sort(
            np.concatenate(
                [
                    special,
                    np.linspace(*case["search_range"][i], size.values - len(special) + 2)[1:-1],
                ]
            )
        )
    with jax.enable_x64(True):
        wide = ft.partial(jnp.asarray, dtype="float64")
        gp, x = (
            expert_gp.StarGP(*wide(pad_gps(hyperparameters))),
            wide(pad(observed, len(observed), size.variables)),
        )
        effects = jit_effects(
            x, x[:, target], pad_sets(case), gp, wide(pad(grids, size.variables, size.values))
        )
        for t in range(steps):
            belief = wide(pad(case["posterior_published"][first + t - 1], size.sets))
            prior = jax.tree.map(
                np.asarray, expert_gp.aggregate_effects(jnp.log(belief), effects, gp)
            )
            for i in np.flatnonzero(~np.isnan(case["ei"][t])):
                own = np.flatnonzero(variables[: first + t] == i)
                x, y = values[own], outcomes[own]
                of_variable = expert_gp.CausalPrior(
                    prior.mean[i], prior.deviation[i], prior.noise[i]
                )
                at_data = (
                    np.interp(x, grids[i], of_variable.mean),
                    np.interp(x, grids[i], of_variable.deviation),
                )
                found = published_hyperparameters(x, y, *at_data)
                room = (0, size.points - len(x))
                used = np.arange(size.points) < len(x)
                at = np.append(grids[i], case["ei_argmax"][t, i])
                arguments = (
                    grids[i],
                    of_variable,
                    np.pad(x, room),
                    np.pad(y, room),
                    used,
                    *found,
                    case["incumbent"][t],
                    at,
                )
                log_improvement = np.asarray(jit_improvement()(*arguments))
                low, high = case["search_range"][i]
                at_points[t, i], at_best[t, i] = (
                    log_improvement[-1],
                    log_improvement[(at >= low) & (at <= high)].max(),
                )
    return at_points, at_best


def agreement(case, log_improvement):
    """Steps with an improvement whose exploration set had not just changed, and in which of them
    the original's choice has our largest improvement within 1 %.
    """
    explored = ~np.isnan(case["ei"])
    changed = (explored != np.concatenate([explored[:1], explored[:-1]])).any(1)
    best = np.where(explored, log_improvement, -np.inf).max(1)
    behind = best - log_improvement[np.arange(len(explored)), case["chosen_var"]]
    return explored.any(1) & ~changed, behind <= -np.log(0.99)


# What a correct expert shares with the original only as often as not, because an optimiser that
# follows a flat or a wrong gradient ends elsewhere. Every function gives a run's comparisons as
# booleans.


def sets_with_its_effects(name):
    """Whether our own fit gives a set's means of Y under do within .01 of its deviation.

    The variance is not compared: a straight line leaves the amplitude undetermined, and it stays
    where each optimiser happens to stop. Nor is every set: where a lengthscale comes out near 20,
    on one side of which the original sets it to 1, the effects can be different ones.
    """
    case = read_case(name)
    table, y = case["do_effects"], case["obs"][:, int(case["target"])]
    mean, _ = do_effects(case, own_gps(case, recorded_gps(case)[1]))
    close = np.abs(mean - table[:, 3]) < 0.01 * y.std()
    return np.array([close[table[:, 0] == k].all() for k in np.unique(table[:, 0])], bool)


def steps_with_its_choice(name):
    """Whether the variable that the original chose has our largest expected improvement, or is
    within 1 % of it, given the same history.

    Compared where the original evaluated its own, or else on our grid. Neither alone settles every
    step: the original's search (100 random values, then ascent along a gradient that ignores the
    causal prior) misses narrow maxima, and where all improvements are below 1e-10 its points are
    arbitrary.
    """
    case = read_case(name)
    (counts, at_points), (_, at_best) = (agreement(case, logs) for logs in improvements(name))
    return (at_points | at_best)[counts]


def improvements_that_are_its(name):
    """Whether an improvement of the original above 1e-6 is ours within 1 %, at the same value."""
    case = read_case(name)
    large = case["ei"] > 1e-6
    return np.abs(improvements(name)[0][large] - np.log(case["ei"][large])) < 0.01


COMPARISONS = {
    # (agree, differ) of the Beta distribution that a run's share is a draw from, by the ten runs. A
    # bound from nine of them holds for the tenth; that of the improvements holds for every stretch
    # of steps of a run too.
    #
    # 58 of 58 sets, none further off than .0034. Faults put into the fit leave fewer than the bound
    # of 39 in the 43 sets of six runs: a lengthscale 20 % too long 0, twice the noise 10, twice
    # the amplitude 13, an exponential kernel 7.
    sets_with_its_effects: (58.5, 0.5),
    # 175 of 177 steps. It finds a prior mean left out (42 of 59), not a lengthscale, noise or
    # kernel: which variable is best seldom depends on these.
    steps_with_its_choice: (175.5, 2.5),
    # 174 of 239, but .45 to .92 of a run: the likeliest Beta, rounded. Faults put in leave fewer
    # than the bound of 33 in the 72 of six runs: a lengthscale 20 % too long 12, no prior deviation
    # 2, no prior mean 0, a Matern kernel 11. Twice the noise, mostly at its floor of 1e-5, is not
    # found here: 43.
    improvements_that_are_its: (9.0, 4.0),
}


@ft.cache
def compared(name, comparison):
    return comparison(name)


def fewest(counts, agree, differ):
    """Of runs with these numbers of comparisons the fewest that agree, but for a chance of 1e-3,
    if the share of every run is a draw from Beta(agree, differ). Zero without comparisons.
    """
    each = [scipy.stats.betabinom.pmf(np.arange(n + 1), n, agree, differ) for n in counts]
    return np.searchsorted(np.cumsum(ft.reduce(np.convolve, each)), 1e-3)


def test_the_fewest_that_agree():
    """A fair coin, nearly: 10 throws give no head with chance 1 / 1024, and at most one with
    11 / 1024. The throws may be of several runs, and of runs without any.
    """
    for counts in ([10], [4, 6], [0, 10, 0]):
        assert fewest(counts, 1e6, 1e6) == 1
    assert fewest([0], 1e6, 1e6) == 0 and fewest([9], 1e6, 1e6) == 0


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda f: f.__name__)
@each_case()
def test_case_agrees_as_often_as_a_run_does(name, comparison):
    """A run without anything to compare agrees; that not all are such is the next test's."""
    same = compared(name, comparison)
    assert same.sum() >= fewest([len(same)], *COMPARISONS[comparison])


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda f: f.__name__)
def test_all_cases_agree_as_often_as_runs_do(comparison):
    """What one short run cannot tell all of them together can. Nothing to compare is a failure."""
    counts, same = zip(
        *((len(s), s.sum()) for s in (compared(name, comparison) for name in NAMES)), strict=True
    )
    assert sum(counts) and sum(same) >= fewest(counts, *COMPARISONS[comparison])


def test_the_cases_hold_updates_steps_and_effects():
    """The comparisons above, of every update, step but the first, and effect, are of something."""
    cases = [read_case(name) for name in NAMES]
    assert sum(len(case["upd_y"]) for case in cases)
    assert sum(len(case["ei"][1:]) for case in cases)
    assert sum(len(case["do_effects"]) for case in cases)


class LinearSystem(AbstractSCM):
    """The system of a recorded linear run: `weights[parent, child]` and standard deviations
    `noise`.
    """

    target: jax.Array
    low: jax.Array
    high: jax.Array
    parents: jax.Array
    var_mask: jax.Array
    weights: jax.Array
    noise: jax.Array
    names: tuple[str, ...] = eqx.field(static=True)

    def draw_noise(self, key, num_samples):
        return self.noise[None] * jr.normal(key, (num_samples, self.noise.shape[0]))

    def reference_noise(self):
        return jnp.zeros((1, self.noise.shape[0]))

    def simulate(self, noise, intervention):
        x = jnp.zeros_like(noise)
        for _ in self.names:  # long enough to reach the end of every path
            x = jnp.where(
                intervention.mask[None], intervention.values[None], x @ self.weights + noise
            )
        return x


def linear_system(case):
    weights, target = case["weights"] * (case["adjacency"] != 0), int(case["target"])
    low, high = case["search_range"].T
    return LinearSystem(
        target=jnp.array(target),
        low=single(low),
        high=single(high),
        parents=jnp.asarray(weights[:, target] != 0),
        var_mask=jnp.ones(len(weights), bool),
        weights=single(weights),
        noise=single(case["noise_sigma"]),
        names=tuple(f"X{i}" for i in range(len(weights))),
    )


AS_PUBLISHED = PublishedConfig(
    num_obs=200,
    num_steps=10,
    prior="uniform",
    features="linear",
    outcome_samples=1000,
)


def case_buffer(case, experiments):
    """Observations, the first interventions, and the rows that the original fed to its posterior,
    if `experiments`, or else free places.
    """
    observed, first, target = case["obs"], len(case["int_var"]), int(case["target"])
    raw = case["upd_x"][first:] * case["stds"] + case["means"]
    raw[:, target] = case["upd_y"][first:]
    values = np.concatenate([observed, case["int_data"], raw * experiments])
    chosen = np.concatenate(
        [
            np.full(len(observed), -1),
            case["int_var"],
            case["chosen_var"] if experiments else np.full(len(raw), -1),
        ]
    )
    valid = np.arange(len(values)) < len(values) - (0 if experiments else len(raw))
    return ExperienceBuffer(
        single(values),
        jnp.asarray(chosen[:, None] == np.arange(observed.shape[1])),
        jnp.asarray(valid),
    )


@each_case("*_linear_dr0_*")
def test_a_case_is_replayed_from_its_raw_rows(name):
    """The whole path: standardisation, uniform prior, noise, updates, with the published
    settings.
    """
    case = read_case(name)
    first, scm, num_obs = len(case["int_var"]), linear_system(case), len(case["obs"])
    config = dataclasses.replace(AS_PUBLISHED, num_obs=num_obs, num_steps=len(case["chosen_var"]))
    replay = jax.jit(
        lambda scm, buffer: expert_posterior.replay_posterior(
            jr.key(0), scm, buffer, num_obs + first, config
        ),
        compiler_options=FAST,
    )
    probs = np.exp(np.asarray(replay(scm, case_buffer(case, True)), float))
    sets = np.asarray(expert_posterior.uniform_prior(scm.task)[0])
    order = [np.flatnonzero((sets == members).all(1))[0] for members in case["sets"]]
    np.testing.assert_allclose(probs[:, order].sum(1), 1.0, atol=1e-4)
    expected = case["posterior_published"][first - 1 :]
    np.testing.assert_allclose(pruned(probs[:, order], expected), expected, atol=5e-4)


def test_on_the_system_of_a_case_the_expert_does_as_well():
    """Same system, data, sets and settings: after ten experiments what it recommends is as good as
    the best that the original tried.
    """
    case = read_case("d5_linear_dr1_s0_T30")
    scm = linear_system(case)
    with np.errstate(divide="ignore"):
        candidate_sets = (jnp.asarray(case["sets"]), single(np.log(case["prior"])))

    def both(scm, buffer, variables, values):
        run = run_parent_scale(jr.key(0), scm, buffer, AS_PUBLISHED, candidate_sets=candidate_sets)
        mean = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, scm.low.shape[0])))
        return (
            run,
            mean(run.recommended_variable, run.recommended_value),
            mean(variables, values),
            mean(run.variable, run.value),
        )

    arguments = (
        case_buffer(case, False),
        jnp.asarray(case["chosen_var"], jnp.int32),
        single(case["chosen_value"]),
    )
    run, recommended, original, tried = jax.jit(both, compiler_options=FAST)(scm, *arguments)
    nothing = float(scm.mean_outcome(Intervention.none(5)))
    assert recommended[-1] < original.min() + 0.02 * (nothing - original.min())
    # means of 1,000 samples
    np.testing.assert_allclose(
        run.outcome, tried, atol=5 * case["obs"][:, case["target"]].std() / np.sqrt(1000)
    )
    assert (np.asarray(run.sets) == case["sets"]).all()


# --- runs ---

CONFIG = expert_posterior.ParentScaleConfig(
    num_obs=60, num_steps=6, num_bins=9, num_features=30, num_bootstraps=6
)
NUM_RUNS, FIRST, FREE = 4, ((0, -2.0), (1, 0.0), (0, 3.0), (1, 9.0)), 2
KEYS = jr.split(jr.key(11), NUM_RUNS)


class SteadyToy(Benchmark):
    """The benchmark with a key per variable, so that places without a variable leave the noise of
    the others as it is.
    """

    def draw_noise(self, key, num_samples):
        one = jax.vmap(
            lambda i: jr.uniform(
                jr.fold_in(key, i), (num_samples,), minval=1e-6, maxval=1.0 - 1e-6
            ),
            out_axes=1,
        )
        return one(jnp.arange(self.var_mask.shape[0]))


@ft.cache
def jit_buffers():
    def one(key, scm):
        num_vars, num_rows = scm.low.shape[0], CONFIG.num_obs + len(FIRST)
        interventions = [Intervention.none(num_vars)] * CONFIG.num_obs + [
            Intervention.single(i, v, num_vars) for i, v in FIRST
        ]
        masks, values = (
            jnp.stack([getattr(a, field) for a in interventions]) for field in ("mask", "values")
        )
        rows = jax.vmap(lambda n, m, v: scm.simulate(n[None], Intervention(m, v))[0])(
            scm.draw_noise(key, num_rows), masks, values
        )
        buffer = ExperienceBuffer(rows, masks, jnp.ones(num_rows, bool))
        return buffer.grow(CONFIG.num_steps + FREE)

    return jax.jit(jax.vmap(one, in_axes=(0, None)), compiler_options=FAST)


def make_problem(slots):
    scm = SteadyToy("toy", slots)
    return scm, jit_buffers()(jr.split(jr.key(12), NUM_RUNS), scm)


@ft.cache
def jit_run():
    def one(key, scm, buffer):
        run = run_parent_scale(key, scm, buffer, CONFIG)
        return run, expert_posterior.replay_posterior(key, scm, run.buffer, run.num_initial, CONFIG)

    return jax.jit(jax.vmap(one, in_axes=(0, None, 0)), compiler_options=FAST)


@pytest.fixture(scope="module")
def problem():
    return make_problem(3)


@pytest.fixture(scope="module")
def runs(problem):
    """Runs on data sets of the benchmark (leading axis), and their replayed posteriors."""
    return jit_run()(KEYS, *problem)


def test_experiments_are_on_candidates_within_their_ranges(runs, problem):
    (run, _), (scm, _) = runs, problem
    low, high, candidates = (np.asarray(a) for a in (scm.low, scm.high, scm.candidates))
    for variable, value in (
        (run.variable, run.value),
        (run.recommended_variable, run.recommended_value),
    ):
        assert candidates[variable].all()
        assert (value >= low[variable]).all() and (value <= high[variable]).all()
    assert run.variable.shape == (NUM_RUNS, CONFIG.num_steps) and run.recommended_value.shape == (
        NUM_RUNS,
        CONFIG.num_steps + 1,
    )
    assert len(np.unique(run.value)) >= NUM_RUNS  # not always the same one


def test_rows_stand_behind_those_that_were_there(runs, problem):
    (run, _), (_, before) = runs, problem
    start, stop = CONFIG.num_obs + len(FIRST), CONFIG.num_obs + len(FIRST) + CONFIG.num_steps
    assert (run.num_initial == start).all()
    assert (run.buffer.values[:, :start] == before.values[:, :start]).all() and (
        run.buffer.intervened[:, :start] == before.intervened[:, :start]
    ).all()
    assert run.buffer.valid[:, :stop].all() and not run.buffer.valid[:, stop:].any()
    everyone, steps = np.arange(NUM_RUNS)[:, None], np.arange(start, stop)[None]
    assert (run.buffer.intervened[:, start:stop].sum(2) == 1).all() and run.buffer.intervened[
        everyone, steps, run.variable
    ].all()
    assert (run.buffer.values[everyone, steps, run.variable] == run.value).all()
    # one sample: the outcome is the row's
    assert (run.buffer.values[:, start:stop, 2] == run.outcome).all()


def test_beliefs_are_distributions_over_sets_without_the_target(runs):
    run, _ = runs
    probs = np.exp(np.asarray(run.log_probs, float))
    np.testing.assert_allclose(probs.sum(2), 1.0, atol=1e-4)
    assert not np.asarray(run.sets)[..., 2][probs[:, 0] > 0].any()
    assert np.abs(probs[:, -1] - probs[:, 0]).max() > 0.05  # experiments change them
    last = jax.tree.map(lambda leaf: leaf[0], run).posterior(2)
    assert (last.log_probs == run.log_probs[0, -1]).all() and last.target == 2


def test_the_surface_is_an_improvement_on_possible_parents(runs):
    run, _ = runs
    surface, probs = np.asarray(run.surface), np.exp(np.asarray(run.log_probs, float))[:, :-1]
    support = np.any(np.asarray(run.sets)[:, None] & (probs > SUPPORT)[..., None], axis=2)
    # no possible parent: everything is explored
    support = np.where(np.any(support, axis=2, keepdims=True), support, [True, True, False])
    assert (surface[~support] == 0).all() and (surface >= 0).all() and np.isfinite(surface).all()
    assert (surface.max(3)[support] > 0).all()
    assert (np.take_along_axis(support, np.asarray(run.variable)[..., None], 2)).all()


def test_replay_gives_the_stored_posterior(runs):
    run, replayed = runs
    assert replayed.shape == run.log_probs.shape
    np.testing.assert_allclose(np.exp(replayed), np.exp(run.log_probs), atol=1e-3)


def test_places_without_a_variable_leave_the_run_as_it_is():
    (run, _), (wide, _) = (jit_run()(KEYS, *make_problem(slots)) for slots in (4, 6))
    for name in ("variable", "recommended_variable"):
        assert (getattr(run, name) == getattr(wide, name)).all()
    for name in ("value", "outcome", "recommended_value", "log_probs"):
        one, two = (
            np.exp(getattr(r, name)) if name == "log_probs" else getattr(r, name)
            for r in (run, wide)
        )
        np.testing.assert_allclose(one, two, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(run.surface, wide.surface[:, :, :4], atol=1e-4)
    assert not wide.surface[:, :, 4:].any() and not wide.buffer.values[:, :, 4:].any()
    assert (run.sets == wide.sets[:, :, :4]).all() and not wide.sets[:, :, 4:].any()


def test_the_expert_does_not_look_at_the_truth(runs, problem):
    run, _ = runs
    scm, buffers = problem
    blind, _ = jit_run()(KEYS, eqx.tree_at(lambda s: s.parents, scm, ~scm.parents), buffers)
    assert eqx.tree_equal(run, blind)


def test_a_buffer_that_fills_up_gives_nan(runs, problem):
    """Rows are counted at run time, where nothing can be raised."""
    scm, buffers = problem
    crowded, _ = jit_run()(
        KEYS, scm, eqx.tree_at(lambda b: b.valid, buffers, jnp.ones_like(buffers.valid))
    )
    assert all(
        np.isnan(leaf).all()
        for leaf in jax.tree.leaves(crowded)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(runs[0]))


def test_a_buffer_that_is_too_small_and_predictions_without_sets_are_refused(problem):
    scm, buffers = problem
    buffer = jax.tree.map(lambda leaf: leaf[0, : CONFIG.num_obs + 3], buffers)
    with pytest.raises(ValueError, match=r"63 places.* 6 experiments \(at least 60 rows"):
        eqx.filter_eval_shape(run_parent_scale, KEYS[0], scm, buffer, CONFIG)
    with pytest.raises(ValueError, match="candidate_sets"):
        run_parent_scale(KEYS[0], scm, buffer, CONFIG, predict=lambda buffer: jnp.zeros(1))
