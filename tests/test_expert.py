"""The expert: its regression against batch formulas in numpy, its steps against recorded runs of
the original code, its runs against their own rules.

The recorded runs are those of `recorded.py`.
"""

import contextlib
import dataclasses
import functools as ft

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
from recorded import NAMES, OURS, each_case, linear_system, read_case

from lib import expert_gp
from lib.buffer import ExperienceBuffer
from lib.expert import SUPPORT, run_parent_scale
from lib.expert_posterior import (
    Features,
    ParentScaleConfig,
    ParentSetRegression,
    draw_fourier_features,
    estimate_noise,
    replay_posterior,
)
from lib.improvement import log_expected_improvement
from lib.literature import Benchmark
from lib.problems import with_experiments
from lib.regression import Scale
from lib.scm import Intervention, Task
from studies.published import PublishedConfig, PublishedRegression, fit_star_gp


def single(array):
    return jnp.asarray(array, jnp.float32)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"features": "best"}, "unknown features 'best'.*auto, linear, fourier"),
        ({"num_obs": 9}, "num_obs = 9.*at least 10"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message, monkeypatch):
    # as outside tests, where nothing checks types before the settings do
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        ParentScaleConfig(**{"num_obs": 10, "num_steps": 1} | settings)


# --- the regression, against numpy in float64 ---

FEATURES, FITTED, NEW, TARGET = 6, 20, 8, 4
SETS = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
LOG_PRIOR = np.log([0.4, 0.1, 0.3, 0.2])
NOISE = np.array([0.3, 0.2, 0.5, 1.0])
SCALE = Scale(single(np.arange(5.0)), single(np.full(5, 2.0)))


def make_rows():
    """Standardised rows; the target is the last variable."""
    x = np.random.default_rng(0).normal(size=(FITTED + NEW, 5))
    x[:, TARGET] = 0.7 * x[:, 0] - 0.5 * np.sin(2 * x[:, 1]) + 0.5 * x[:, TARGET]
    return x


X = make_rows()
Y, RAW = X[:, TARGET], single(X * np.asarray(SCALE.spread) + np.asarray(SCALE.shift))
OMEGA, PHASE = (
    np.asarray(a, float) for a in draw_fourier_features(jr.key(3), len(SETS), 5, FEATURES)
)


@ft.cache
def updated(linear):
    """The regression after the fitted rows, and after every new one."""

    def follow(linear, rows):
        features = Features(jnp.asarray(SETS), linear, single(OMEGA), single(PHASE))
        given = features, single(LOG_PRIOR), SCALE(rows[:FITTED]), single(NOISE)
        start = ParentSetRegression.fit(SCALE, jnp.array(TARGET), *given)

        def step(state, row):
            state = state.update(row)
            return state, state

        return start, jax.lax.scan(step, start, rows[FITTED:])[1]

    return jax.jit(follow)(jnp.array(linear), RAW)


def phi_of(k, linear):
    """Features of all rows under set k."""
    inside = X * SETS[k]
    if linear:
        return np.pad(inside, ((0, 0), (0, FEATURES - 5)))
    return np.sqrt(2 / FEATURES) * np.cos(inside @ OMEGA[k] + PHASE[k])


def log_softmax(scores):
    return scores - scipy.special.logsumexp(scores)


def posterior_of_weights(phi, y, noise):
    covariance = np.linalg.inv(phi.T @ phi / noise + np.eye(phi.shape[1]))
    return covariance @ phi.T @ y / noise, covariance


def log_evidence(phi, y, noise):
    kernel = phi @ phi.T + noise * np.eye(len(y))
    return scipy.stats.multivariate_normal.logpdf(y, np.zeros(len(y)), kernel)


@pytest.mark.parametrize("linear", [True, False])
def test_one_row_at_a_time_is_the_batch_posterior(linear):
    """Weights are those of a batch regression on all rows, and the predictive densities multiply to
    the ratio of batch evidences.
    """
    start, states = updated(linear)
    np.testing.assert_allclose(start.log_probs, LOG_PRIOR, atol=1e-5)
    evidence = np.zeros((NEW + 1, len(SETS)))
    for k, noise in enumerate(NOISE):
        phi = phi_of(k, linear)
        for t in range(NEW + 1):
            known = phi[: FITTED + t], Y[: FITTED + t], noise
            evidence[t, k] = log_evidence(*known)
            if t:
                mean, covariance = posterior_of_weights(*known)
                np.testing.assert_allclose(states.mean[t - 1, k], mean, atol=5e-4)
                np.testing.assert_allclose(states.covariance[t - 1, k], covariance, atol=5e-4)
    expected = np.stack([log_softmax(LOG_PRIOR + row - evidence[0]) for row in evidence[1:]])
    np.testing.assert_allclose(states.log_probs, expected, atol=2e-3)
    assert np.abs(np.exp(expected[-1]) - np.exp(LOG_PRIOR)).max() > 0.1  # the rows do say something


def test_rows_that_are_free_or_in_which_the_target_was_set_say_nothing():
    start, states = updated(True)
    update_all = jax.jit(lambda *buffer: start.update_all(ExperienceBuffer(RAW[FITTED:], *buffer)))
    of_target = jnp.broadcast_to(jnp.arange(5) == TARGET, (NEW, 5))
    every, half = jnp.ones(NEW, bool), jnp.arange(NEW) % 2 == 0
    for intervened, valid in ((of_target, every), (~of_target, ~every)):
        assert eqx.tree_equal(update_all(intervened, valid)[0], start)
    _, log_probs = update_all(~of_target, every)
    np.testing.assert_allclose(log_probs, states.log_probs, atol=1e-5)
    _, log_probs = update_all(~of_target, half)
    assert (log_probs[half] == log_probs[~half]).all() and (log_probs[1] != log_probs[2]).any()


def test_more_variables_or_sets_leave_the_draws_of_the_others():
    omega, phase = draw_fourier_features(jr.key(3), len(SETS) + 2, 8, FEATURES)
    assert (np.asarray(omega)[: len(SETS), :5] == OMEGA).all()
    assert (np.asarray(phase)[: len(SETS)] == PHASE).all()
    assert (omega[0] != omega[1]).all() and phase.min() >= 0 and phase.max() <= 2 * np.pi


def test_noise_and_evidence():
    """The evidence is that of a Gaussian process at the estimated noise; the noise is a fixed
    point, near the truth and near the best evidence.
    """
    rng = np.random.default_rng(1)
    phi = rng.normal(size=(100, 5))
    y = phi @ np.array([1.0, -1.0, 0.5, 0.0, 0.0]) + 0.5 * rng.normal(size=100)
    noise, evidence = (float(v) for v in jax.jit(estimate_noise)(single(phi), single(y)))
    np.testing.assert_allclose(evidence, log_evidence(phi, y, noise), atol=0.05)
    mean, covariance = posterior_of_weights(phi, y, noise)
    improved = ((y - phi @ mean) ** 2).sum() / (100 - 5 + np.trace(covariance))
    np.testing.assert_allclose(noise, improved, rtol=1e-3)
    assert abs(noise - 0.25) < 0.12
    assert evidence > max(log_evidence(phi, y, factor * noise) for factor in (0.5, 0.8, 1.25, 2.0))


def test_automatic_features_follow_the_data():
    """One call on two data sets: a straight line and a wave."""
    config = ParentScaleConfig(num_obs=80, num_steps=1, num_features=30)
    rows = np.random.default_rng(2).normal(size=(2, 80, 3))
    rows[0, :, 2] = 2 * rows[0, :, 0] - rows[0, :, 1] + 0.3 * rows[0, :, 2]
    rows[1, :, 2] = np.cos(2 * rows[1, :, 0]) + 0.1 * rows[1, :, 2]
    task = Task(jnp.array(2), jnp.zeros(3), jnp.zeros(3), jnp.ones(3, bool))
    prior = jnp.array([[1, 0, 0], [1, 1, 0]], bool), jnp.log(jnp.full(2, 0.5))
    key = jr.key(0)
    choose = jax.vmap(lambda x: config.features_and_noise(key, task, Scale.of(x)(x), *prior))
    features, noise_variance = jax.jit(choose)(single(rows))
    assert features.linear.tolist() == [True, False]
    # in units of the variance of Y
    np.testing.assert_allclose(noise_variance[0, 1], 0.09 / rows[0, :, 2].var(), rtol=0.3)


# --- recorded runs of the original code ---


def interventions(case):
    """Variables and values of all experiments, the initial ones first."""
    initial = case["int_data"][np.arange(len(case["int_var"])), case["int_var"]]
    return np.append(case["int_var"], case["chosen_var"]), np.append(initial, case["chosen_value"])


def effect_values(case, i):
    """The values of variable i in the table of do-effects."""
    return np.unique(case["do_effects"][case["do_effects"][:, 1] == i, 2])


def special_values(case, i):
    """Values of variable i that a grid of improvements has to hold: of experiments, of the
    original's improvements, and the ends of its range.
    """
    variables, values = interventions(case)
    asked = case["ei_argmax"][:, i]
    return np.unique(
        np.concatenate([values[variables == i], asked[~np.isnan(asked)], case["search_range"][i]])
    )


def most(measure):
    """The largest over all runs: each is padded to these sizes, so that one program serves all."""
    return max(measure(read_case(name)) for name in NAMES)


def most_of_a_variable(measure):
    return most(lambda case: max(len(measure(case, i)) for i in range(len(case["topo"]))))


NUM_FEATURES = 100  # of a set, by the format
NUM_VARS, NUM_SETS = most(lambda case: len(case["topo"])), most(lambda case: len(case["sets"]))
NUM_UPDATES = most(lambda case: len(case["upd_y"]))
NUM_POINTS = most(lambda case: np.bincount(interventions(case)[0]).max())
NUM_EFFECTS = max(most_of_a_variable(effect_values), 1)
NUM_VALUES = most_of_a_variable(special_values) + 60  # and 60 between those that a case needs


def pad(array, *shape, fill=0.0):
    room = [(0, size - have) for size, have in zip(shape, array.shape, strict=True)]
    return np.pad(array, room, constant_values=fill)


def pad_sets(case):
    return jnp.asarray(pad(case["sets"], NUM_SETS, NUM_VARS))


def case_features(case, dtype):
    """Features of every set: the inputs of a linear case, else those that are recorded."""
    omega, phase = np.zeros((NUM_SETS, NUM_VARS, NUM_FEATURES)), np.zeros((NUM_SETS, NUM_FEATURES))
    if "weights" not in case:
        for k, members in enumerate(case["sets"]):
            omega[k, np.flatnonzero(members)], phase[k] = case[f"rff{k}_omega"], case[f"rff{k}_b"]
    numbers = jnp.asarray(omega, dtype), jnp.asarray(phase, dtype)
    return Features(pad_sets(case), jnp.array("weights" in case), *numbers)


@jax.jit
def follow(target, features, log_prior, observed, updates):
    """Log-probabilities after every update, by both likelihoods."""
    dtype = observed.dtype
    scale = Scale(jnp.zeros(NUM_VARS, dtype), jnp.ones(NUM_VARS, dtype))

    def run(kind):
        def step(state, row):
            state = state.update(row)
            return state, state.log_probs

        noise = jnp.ones(NUM_SETS, dtype)
        start = kind.fit(scale, target, features, log_prior, observed, noise)
        return jax.lax.scan(step, start, updates)[1]

    return run(PublishedRegression), run(ParentSetRegression)


@ft.cache
def followed(name, dtype):
    """Probabilities `[updates, sets]` of both likelihoods after every update of a case."""
    case = read_case(name)
    observed, target, count = case["obs"], int(case["target"]), len(case["upd_y"])
    kept = np.arange(observed.shape[1]) != target
    rows = np.where(kept, (observed - case["means"]) / case["stds"], observed)
    standard = Scale.of(single(observed))(single(observed))
    np.testing.assert_allclose(standard[:, kept], rows[:, kept], atol=1e-4)
    updates = np.where(kept, case["upd_x"], case["upd_y"][:, None])
    with jax.enable_x64(dtype == "float64"), np.errstate(divide="ignore"):
        both = follow(
            jnp.array(target),
            case_features(case, dtype),
            jnp.asarray(np.log(pad(case["prior"], NUM_SETS)), dtype),
            jnp.asarray(pad(rows, len(rows), NUM_VARS), dtype),
            jnp.asarray(pad(updates, NUM_UPDATES, NUM_VARS), dtype),
        )
    return tuple(np.exp(np.asarray(p, float))[:count, : len(case["sets"])] for p in both)


def pruned(probs, published):
    """The original drops a set for good once it is improbable, and renormalises."""
    kept = np.where(published > 0, probs, 0.0)
    return kept / kept.sum(1, keepdims=True)


def total_variation(p, q):
    return 0.5 * np.abs(p - q).sum(1).max()


# Found: 1e-4 in float32 and 5e-11 in float64 at most; the two likelihoods differ by .06 to 1 where
# a run has more than one set.
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-3), ("float64", 1e-6)])
@each_case()
def test_case_posterior_after_every_update(name, dtype, tolerance):
    case = read_case(name)
    published, corrected = followed(name, dtype)
    expected = case["posterior_published"]
    assert total_variation(pruned(published, expected), expected) < tolerance
    assert total_variation(corrected, case["posterior_corrected"]) < tolerance
    if "weights" in case and OURS:
        # the comparison tells the two apart
        assert total_variation(published, corrected) > 0.2


@each_case()
def test_case_exploration_set_is_the_support_of_the_posterior(name):
    """Before every experiment the original computed an expected improvement exactly for the
    variables of the sets above the threshold.
    """
    case = read_case(name)
    before = slice(-len(case["ei"]) - 1, -1)
    expected = case["posterior_published"][before]
    probs = pruned(followed(name, "float64")[0][before], expected)
    # within rounding of the threshold
    probs = np.where(np.abs(probs - SUPPORT) < 1e-6, expected, probs)
    explored = ((probs > SUPPORT)[:, :, None] & case["sets"][None]).any(1)
    # Not the first experiment: in one case the original then still explored variables of sets below
    # the threshold.
    assert (explored == ~np.isnan(case["ei"]))[1:].all()


jit_effects = jax.jit(
    lambda x, y, sets, gp, grid: expert_gp.star_effects(
        x, y, sets, gp, grid, jnp.ones(len(sets), bool)
    )
)
jit_fit_published = jax.jit(fit_star_gp)


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
    are `chosen`; zeros for the others.
    """
    x = single(pad(case["obs"], len(case["obs"]), NUM_VARS))
    possible = jnp.asarray(pad(chosen, NUM_SETS))
    gp = jit_fit_published(x, x[:, int(case["target"])], pad_sets(case), possible)
    return np.stack([np.asarray(p)[: len(chosen)] for p in gp[:3]])


def effects_of(case, hyperparameters, grid, dtype):
    """What the GPs with these hyperparameters say of every value of a grid."""
    x = jnp.asarray(pad(case["obs"], len(case["obs"]), NUM_VARS), dtype)
    padded = pad(hyperparameters, 3, NUM_SETS, fill=1.0)
    gp = expert_gp.StarGP(*jnp.asarray(padded, dtype))
    values = jnp.asarray(pad(grid, NUM_VARS, grid.shape[1]), dtype)
    return jit_effects(x, x[:, int(case["target"])], pad_sets(case), gp, values)


def do_effects(case, hyperparameters):
    """Means and variances of Y under do for every row of the table, from these hyperparameters."""
    table, own = case["do_effects"], [effect_values(case, i) for i in range(len(case["topo"]))]
    grid = np.stack([pad(values, NUM_EFFECTS) for values in own])
    effects = effects_of(case, hyperparameters, grid, "float32")
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


softplus = ft.partial(np.logaddexp, 0.0)


def published_hyperparameters(points, outcomes, mean, deviation):
    """Amplitude, lengthscale and noise of a causal GP as the original finds them: SciPy's L-BFGS
    from (1, 1, 1e-10), then its limits.

    Its gradient for the amplitude counts the causal part of the kernel too (GPy's stationary
    kernels divide the whole kernel by the amplitude), so that the search often stops where the
    likelihood is not largest. The recorded improvements follow from that, and not from a correct
    gradient.
    """
    squares, eye = (points[:, None] - points[None]) ** 2, np.eye(len(points))
    residual, causal = outcomes - mean, np.outer(deviation, deviation)

    def loss(t):
        amplitude, lengthscale, noise = softplus(t)
        rbf = amplitude * np.exp(-squares / (2 * lengthscale**2))
        kernel = rbf + causal + (noise + 1e-8) * eye
        for jitter in (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            with contextlib.suppress(np.linalg.LinAlgError):
                factor = np.linalg.cholesky(kernel + jitter * kernel.diagonal().mean() * eye)
                if np.isfinite(factor).all():
                    break
        else:
            return np.inf, np.full(3, 1e10)
        inverse = scipy.linalg.cho_solve((factor, True), eye)
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
        found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x
    amplitude, lengthscale, noise = softplus(found)
    length = 1.0 if lengthscale > 20 else lengthscale
    return max(amplitude, 1e-5), length, min(max(noise, 1e-5), 2.0)


@jax.jit
def improvement(prior, points, outcomes, used, hyperparameters, best, at):
    amplitude, lengthscale, noise = hyperparameters
    data = expert_gp.Outcomes(points, outcomes, jnp.full(points.shape, noise), used)
    gp, _ = expert_gp.condition_causal_gp(prior, data, amplitude, lengthscale)
    return log_expected_improvement(*gp(at), best)


@ft.cache
def improvements(name):
    """Our log expected improvement, given the original's history, `[steps, vars]`: where it
    attained its own, and the largest on a grid.
    """
    case = read_case(name)
    target, first, ranges = int(case["target"]), len(case["int_var"]), case["search_range"]
    hyperparameters, known = recorded_gps(case)
    # one set of one case, before it lost its probability
    missing = ~known & (case["posterior_published"][first - 1 : -1] > 0).any(0)
    hyperparameters = np.where(missing, own_gps(case, missing), hyperparameters)
    variables, values = interventions(case)
    outcomes = np.append(case["int_data"][:, target], case["chosen_y"])
    special = [special_values(case, i) for i in range(len(ranges))]
    between = [
        np.linspace(low, high, NUM_VALUES - len(own) + 2)[1:-1]
        for (low, high), own in zip(ranges, special, strict=True)
    ]
    grids = np.stack([np.sort(np.append(*one)) for one in zip(special, between, strict=True)])
    at_points, at_best = np.full((2, *case["ei"].shape), np.nan)
    with jax.enable_x64(True):
        effects = effects_of(case, hyperparameters, grids, "float64")
        wide_grid = jnp.asarray(pad(grids, NUM_VARS, NUM_VALUES))
        for t, explored in enumerate(~np.isnan(case["ei"])):
            belief = jnp.log(pad(case["posterior_published"][first + t - 1], NUM_SETS))
            priors = jax.device_get(expert_gp.average_effects(wide_grid, belief, effects))
            for i in np.flatnonzero(explored):
                prior = expert_gp.CausalPrior(*(leaf[i] for leaf in priors))
                own = np.flatnonzero(variables[: first + t] == i)
                x, y = values[own], outcomes[own]
                at_data = (np.interp(x, grids[i], m) for m in (prior.mean, prior.deviation))
                found = published_hyperparameters(x, y, *at_data)
                at = np.append(grids[i], case["ei_argmax"][t, i])
                used = pad(np.ones(len(x), bool), NUM_POINTS)
                data = pad(x, NUM_POINTS), pad(y, NUM_POINTS), used
                ours = np.asarray(improvement(prior, *data, found, case["incumbent"][t], at))
                at_points[t, i] = ours[-1]
                at_best[t, i] = ours[(at >= ranges[i, 0]) & (at <= ranges[i, 1])].max()
    return at_points, at_best


def agreement(case, log_improvement):
    """Steps with an improvement whose exploration set had not just changed, and in which of them
    the original's choice has our largest improvement within 1 %.
    """
    explored = ~np.isnan(case["ei"])
    changed = (explored[1:] != explored[:-1]).any(1)
    best = np.where(explored, log_improvement, -np.inf).max(1)
    behind = best - log_improvement[np.arange(len(explored)), case["chosen_var"]]
    return explored.any(1) & ~np.append(False, changed), behind <= -np.log(0.99)


# What a correct expert shares with the original only as often as not, because an optimiser that
# follows a flat or a wrong gradient ends elsewhere. Every function gives a run's comparisons as
# booleans.


@ft.cache
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


@ft.cache
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


@ft.cache
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


def fewest(counts, agree, differ):
    """Of runs with these numbers of comparisons the fewest that agree, but for a chance of 1e-3,
    if the share of every run is a draw from Beta(agree, differ). Zero without comparisons.
    """
    each = [scipy.stats.betabinom.pmf(np.arange(n + 1), n, agree, differ) for n in counts]
    return np.searchsorted(np.cumsum(ft.reduce(np.convolve, each)), 1e-3)


# A fair coin, nearly: 10 throws give no head with chance 1 / 1024, and at most one with 11 / 1024.
# The throws may be of several runs, and of runs without any.
@pytest.mark.parametrize(
    "counts,least", [([10], 1), ([4, 6], 1), ([0, 10, 0], 1), ([0], 0), ([9], 0)]
)
def test_the_fewest_that_agree(counts, least):
    assert fewest(counts, 1e6, 1e6) == least


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("names", [*([name] for name in NAMES), NAMES], ids=[*NAMES, "all"])
def test_cases_agree_as_often_as_runs_do(names, comparison):
    """What one short run cannot tell all of them together can. A run without anything to compare
    agrees; that all are such is a failure.
    """
    same = [comparison(name) for name in names]
    counts = [len(one) for one in same]
    assert sum(counts) or names != NAMES
    assert sum(one.sum() for one in same) >= fewest(counts, *COMPARISONS[comparison])


@pytest.mark.parametrize("what,skipped", [("upd_y", 0), ("ei", 1), ("do_effects", 0)])
def test_the_cases_hold_updates_steps_and_effects(what, skipped):
    """The comparisons above, of every update, step but the first, and effect, are of something."""
    assert most(lambda case: len(case[what])) > skipped


AS_PUBLISHED = PublishedConfig(num_obs=200, num_steps=10, features="linear", outcome_samples=1000)


def case_buffer(case):
    """Observations, first interventions, and the rows that the original fed to its posterior."""
    observed, first, target = case["obs"], len(case["int_var"]), int(case["target"])
    raw = case["upd_x"][first:] * case["stds"] + case["means"]
    raw[:, target] = case["upd_y"][first:]
    values = np.concatenate([observed, case["int_data"], raw])
    chosen = np.concatenate([np.full(len(observed), -1), case["int_var"], case["chosen_var"]])
    intervened = jnp.asarray(chosen[:, None] == np.arange(observed.shape[1]))
    return ExperienceBuffer(single(values), intervened, jnp.ones(len(values), bool))


def candidates_of(case):
    """Its candidate sets and their log-probabilities."""
    with np.errstate(divide="ignore"):
        return jnp.asarray(case["sets"]), single(np.log(case["prior"]))


@each_case("*_linear_dr0_*")
def test_a_case_is_replayed_from_its_raw_rows(name, monkeypatch):
    """The whole path but the prior over sets: standardisation, noise, updates, with the published
    settings.
    """
    case = read_case(name)
    first, num_obs = len(case["int_var"]), len(case["obs"])
    config = dataclasses.replace(AS_PUBLISHED, num_obs=num_obs, num_steps=len(case["chosen_var"]))
    monkeypatch.setattr(PublishedConfig, "prior_over_sets", lambda *_: candidates_of(case))
    replay = jax.jit(
        lambda scm, buffer: replay_posterior(jr.key(0), scm, buffer, num_obs + first, config)
    )
    probs = np.exp(np.asarray(replay(linear_system(case), case_buffer(case)), float))
    expected = case["posterior_published"][first - 1 :]
    np.testing.assert_allclose(pruned(probs, expected), expected, atol=5e-4)


def test_on_the_system_of_a_case_the_expert_does_as_well(monkeypatch):
    """Same system, data, sets and settings: after ten experiments what it recommends is as good as
    the best that the original tried.
    """
    case = read_case("d5_linear_dr1_s0_T30")
    start = case_buffer(case).first(len(case["obs"]) + len(case["int_var"]))
    monkeypatch.setattr(PublishedConfig, "prior_over_sets", lambda *_: candidates_of(case))

    @jax.jit
    def both(scm, buffer, variables, values):
        run = run_parent_scale(jr.key(0), scm, buffer, AS_PUBLISHED)
        mean = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, 5)))
        tried = mean(run.variable, run.value), mean(variables, values)
        nothing = scm.mean_outcome(Intervention.none(5))
        return run, mean(run.recommended_variable, run.recommended_value), *tried, nothing

    chosen = jnp.asarray(case["chosen_var"], jnp.int32), single(case["chosen_value"])
    run, recommended, tried, original, nothing = both(linear_system(case), start, *chosen)
    assert recommended[-1] < original.min() + 0.02 * (nothing - original.min())
    # means of 1,000 samples
    error = case["obs"][:, case["target"]].std() / np.sqrt(1000)
    np.testing.assert_allclose(run.outcome, tried, atol=5 * error)
    assert (np.asarray(run.sets) == case["sets"]).all()


# --- runs ---

CONFIG = ParentScaleConfig(num_obs=60, num_steps=6, num_bins=9, num_features=30, num_bootstraps=6)
NUM_RUNS, FREE, FIRST = 4, 2, (jnp.array([0, 1, 0, 1]), jnp.array([-2.0, 0.0, 3.0, 9.0]))
START = CONFIG.num_obs + len(FIRST[0])
STOP = START + CONFIG.num_steps
KEYS = jr.split(jr.key(11), NUM_RUNS)


class SteadyToy(Benchmark):
    """The benchmark with a key per variable, so that places without a variable leave the noise of
    the others as it is.
    """

    def draw_noise(self, key, num_samples):
        each = jax.vmap(
            lambda i: jr.uniform(
                jr.fold_in(key, i), (num_samples,), minval=1e-6, maxval=1.0 - 1e-6
            ),
            out_axes=1,
        )
        return each(jnp.arange(self.var_mask.shape[0]))


def make_problem(slots):
    """The system and data sets (leading axis)."""
    scm, (variable, value) = SteadyToy("toy", slots), FIRST
    set_there = variable[:, None] == jnp.arange(slots)[None]
    settings = jnp.broadcast_to(value[:, None], set_there.shape)

    def one(key):
        observed_key, done_key = jr.split(key)
        observed = scm.sample(observed_key, Intervention.none(slots), CONFIG.num_obs)
        buffer = with_experiments(done_key, scm, observed, set_there, settings)
        return buffer.grow(CONFIG.num_steps + FREE)

    return scm, jax.jit(jax.vmap(one))(jr.split(jr.key(12), NUM_RUNS))


@jax.jit
@ft.partial(jax.vmap, in_axes=(0, None, 0))
def play(key, scm, buffer):
    """A run, and its replayed posterior."""
    run = run_parent_scale(key, scm, buffer, CONFIG)
    return run, replay_posterior(key, scm, run.buffer, run.num_initial, CONFIG)


@pytest.fixture(scope="module")
def problem():
    """One place more than there are variables."""
    return make_problem(4)


@pytest.fixture(scope="module")
def runs(problem):
    """Runs on data sets of the benchmark (leading axis), and their replayed posteriors."""
    return play(KEYS, *problem)


def test_experiments_are_on_candidates_within_their_ranges(runs, problem):
    (run, _), (scm, _) = runs, problem
    low, high, candidates = (np.asarray(a) for a in (scm.low, scm.high, scm.candidates))
    for steps, kind in ((CONFIG.num_steps, ""), (CONFIG.num_steps + 1, "recommended_")):
        variable, value = getattr(run, f"{kind}variable"), getattr(run, f"{kind}value")
        assert variable.shape == value.shape == (NUM_RUNS, steps)
        assert candidates[variable].all()
        assert (value >= low[variable]).all() and (value <= high[variable]).all()
    assert len(np.unique(run.value)) >= NUM_RUNS  # not always the same one


def test_rows_stand_behind_those_that_were_there(runs, problem):
    (run, _), (_, before) = runs, problem
    assert (run.num_initial == START).all()
    for now, then in (
        (run.buffer.values, before.values),
        (run.buffer.intervened, before.intervened),
    ):
        assert (now[:, :START] == then[:, :START]).all()
    assert run.buffer.valid[:, :STOP].all() and not run.buffer.valid[:, STOP:].any()
    assert not run.buffer.values[:, STOP:].any() and not run.buffer.intervened[:, STOP:].any()
    rows = run.buffer.values[:, START:STOP]
    assert (run.buffer.intervened[:, START:STOP] == jax.nn.one_hot(run.variable, 4)).all()
    assert (np.take_along_axis(rows, run.variable[..., None], 2)[..., 0] == run.value).all()
    assert (rows[:, :, 2] == run.outcome).all()  # one sample: the outcome is the row's


def test_beliefs_are_distributions_over_sets_without_the_target(runs):
    run, replayed = runs
    probs = np.exp(np.asarray(run.log_probs, float))
    np.testing.assert_allclose(probs.sum(2), 1.0, atol=1e-4)
    assert not np.asarray(run.sets)[..., 2][probs[:, 0] > 0].any()
    assert np.abs(probs[:, -1] - probs[:, 0]).max() > 0.05  # experiments change them
    last = jax.tree.map(lambda leaf: leaf[0], run).posterior(2)
    assert (last.log_probs == run.log_probs[0, -1]).all() and last.target == 2
    np.testing.assert_allclose(np.exp(replayed), probs, atol=1e-3)


def test_the_surface_is_an_improvement_on_possible_parents(runs):
    run, _ = runs
    surface, probs = np.asarray(run.surface), np.exp(np.asarray(run.log_probs, float))[:, :-1]
    assert surface.shape[3] == CONFIG.num_bins
    support = np.any(np.asarray(run.sets)[:, None] & (probs > SUPPORT)[..., None], axis=2)
    # no possible parent: everything is explored
    support = np.where(np.any(support, axis=2, keepdims=True), support, [True, True, False, False])
    assert (surface[~support] == 0).all() and (surface >= 0).all() and np.isfinite(surface).all()
    assert (surface.max(3)[support] > 0).all()
    assert (np.take_along_axis(support, np.asarray(run.variable)[..., None], 2)).all()


def test_places_without_a_variable_leave_the_run_as_it_is(runs):
    (run, _), (wide, _) = runs, play(KEYS, *make_problem(6))
    for name in ("variable", "recommended_variable"):
        assert (getattr(run, name) == getattr(wide, name)).all()
    for name in ("value", "outcome", "recommended_value"):
        np.testing.assert_allclose(getattr(run, name), getattr(wide, name), atol=1e-4)
    np.testing.assert_allclose(np.exp(run.log_probs), np.exp(wide.log_probs), atol=1e-4)
    np.testing.assert_allclose(run.surface, wide.surface[:, :, :4], atol=1e-4)
    assert (run.sets == wide.sets[:, :, :4]).all()
    for added in (wide.surface[:, :, 4:], wide.buffer.values[:, :, 4:], wide.sets[:, :, 4:]):
        assert not added.any()


def test_the_expert_does_not_look_at_the_truth(runs, problem):
    scm, buffers = problem
    blind = play(KEYS, eqx.tree_at(lambda s: s.parents, scm, ~scm.parents), buffers)
    assert eqx.tree_equal(runs, blind)


def test_a_buffer_that_fills_up_gives_nan(runs, problem):
    """Rows are counted at run time, where nothing can be raised."""
    scm, buffers = problem
    full = eqx.tree_at(lambda b: b.valid, buffers, jnp.ones_like(buffers.valid))
    for tree, wrong in ((play(KEYS, scm, full)[0], True), (runs[0], False)):
        numbers = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        assert all((np.isnan(leaf) == wrong).all() for leaf in numbers)


def test_a_buffer_that_is_too_small_is_refused(problem):
    scm, buffers = problem
    buffer = jax.tree.map(lambda leaf: leaf[0, : CONFIG.num_obs + 3], buffers)
    with pytest.raises(ValueError, match=r"63 places.* 6 experiments \(at least 60 rows"):
        eqx.filter_eval_shape(run_parent_scale, KEYS[0], scm, buffer, CONFIG)
