"""The expert's Gaussian processes against direct computations in numpy, and its acquisition against
closed forms and Monte Carlo.
"""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from scipy.special import erfcx

from lib import expert_gp
from lib.improvement import expected_improvement, log_expected_improvement
from lib.scm import refine
from studies import published


def single(array):
    return jnp.asarray(array, jnp.float32)


# --- star-graph Gaussian processes ---

NUM_ROWS, BINS = 60, 3
SETS = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)


def make_rows(seed):
    """Y = 2 A - B + noise with B = .8 A + noise: adjusting for B gives the slope 2 of do(A), not
    adjusting gives 1.2. C is alone. Y centred.
    """
    a, b, c, noise = np.random.default_rng(seed).normal(size=(4, NUM_ROWS))
    b = 0.8 * a + 0.6 * b
    x = np.stack([a, b, c], 1)
    x = (x - x.mean(0)) / x.std(0)
    y = 2 * x[:, 0] - x[:, 1] + 0.1 * noise
    return x, y - y.mean()


X, Y = make_rows(0)
GRID = np.linspace(-1.5, 1.5, BINS)[None] * np.array([1.0, 0.7, 2.0])[:, None]
HAND_MADE = expert_gp.StarGP(
    *single([[2.0, 9.0, 0.5, 1.0], [1.5, 3.0, 0.7, 1.0], [0.1, 0.02, 0.3, 0.5]])
)
EVERY = jnp.ones(len(SETS), bool)
jit_effects = jax.jit(lambda *inputs: expert_gp.star_effects(*inputs, EVERY))


@pytest.fixture(scope="module")
def fitted():
    return jax.jit(expert_gp.fit_star_gp)(single(X), single(Y), jnp.asarray(SETS), EVERY)


def gaussian(a, b, amplitude, lengthscale):
    return amplitude * np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(-1) / lengthscale**2)


def test_hyperparameters_maximise_the_marginal_likelihood(fitted):
    for k, members in enumerate(SETS):
        scores = {}
        for length, ratio in itertools.product(
            expert_gp.STAR_LENGTHSCALES, expert_gp.STAR_NOISE_RATIOS
        ):
            kernel = gaussian(X[:, members], X[:, members], 1.0, length) + ratio * np.eye(NUM_ROWS)
            amplitude = Y @ np.linalg.solve(kernel, Y) / NUM_ROWS
            score = scipy.stats.multivariate_normal.logpdf(
                Y, np.zeros(NUM_ROWS), amplitude * kernel
            )
            scores[length, ratio] = (score, amplitude)
        amplitude, length, noise = (float(p[k]) for p in fitted[:3])
        ratio = min(expert_gp.STAR_NOISE_RATIOS, key=lambda r: abs(r - noise / amplitude))
        score, expected = scores[length, ratio]
        assert score > max(s for s, _ in scores.values()) - 0.05
        np.testing.assert_allclose([amplitude, noise], [expected, ratio * expected], rtol=2e-2)


def test_only_the_first_rows_choose_hyperparameters(monkeypatch):
    """Fewer rows than there are give the hyperparameters of these rows alone, here one signal whose
    later rows are noise.
    """
    monkeypatch.setattr(expert_gp, "STAR_ROWS", 30)
    noise = 5 * np.random.default_rng(1).normal(size=NUM_ROWS)
    noisy = np.where(np.arange(NUM_ROWS) < 30, Y, noise)
    fit = jax.jit(lambda y: expert_gp.fit_star_gp(single(X), y, jnp.asarray(SETS), EVERY))
    for one, two in zip(fit(single(Y)), fit(single(noisy)), strict=True):
        assert (one == two).all()


def test_effects_agree_with_a_loop_over_values_and_rows():
    """Set a variable in every row, predict with the GP of the set, average: mean, predictive
    variance, and variance of the mean over rows, to which an outcome adds the noise.
    """
    effects = jit_effects(single(X), single(Y), jnp.asarray(SETS), HAND_MADE, single(GRID))
    for k, members in enumerate(SETS):
        amplitude, lengthscale, noise = (float(p[k]) for p in HAND_MADE[:3])
        inputs = X[:, members]
        inverse = np.linalg.inv(
            gaussian(inputs, inputs, amplitude, lengthscale) + noise * np.eye(NUM_ROWS)
        )
        for i, b in itertools.product(range(3), range(BINS)):
            changed = X.copy()
            changed[:, i] = GRID[i, b]
            cross = gaussian(changed[:, members], inputs, amplitude, lengthscale)
            means = cross @ inverse @ Y
            variances = amplitude - np.einsum("rn,nm,rm->r", cross, inverse, cross) + noise
            expected = [means.mean(), variances.mean(), means.var() + noise]
            np.testing.assert_allclose(
                [float(e[k, i, b]) for e in effects], expected, atol=1e-4, rtol=1e-4
            )


def test_a_known_effect_is_recovered_under_the_right_set(fitted):
    effects = jit_effects(single(X), single(Y), jnp.asarray(SETS), fitted, single(GRID))
    slopes = (np.asarray(effects.mean)[:, :, -1] - np.asarray(effects.mean)[:, :, 0]) / (
        GRID[:, -1] - GRID[:, 0]
    )[None]
    np.testing.assert_allclose(slopes[1], [2.0, -1.0, 0.0], atol=0.15)
    confounded = np.cov(X[:, 0], Y)[0, 1] / X[:, 0].var(ddof=1)  # without B: the regression slope
    np.testing.assert_allclose(slopes[0, 0], confounded, atol=0.15)
    assert abs(confounded - 2.0) > 0.5
    # variables outside the set have no effect
    assert (slopes[0, 1:] == 0).all() and (slopes[3] == 0).all()
    # what B, of variance one, still does to Y
    by_b = effects.outcome_variance - fitted.noise_variance[:, None, None]
    np.testing.assert_allclose(by_b[1, 0, 1], 1.0, atol=0.1)


def test_the_average_is_that_of_a_mixture():
    """Moments of a mixture over sets, and the variance of one outcome, averaged over sets."""
    rng = np.random.default_rng(2)
    mean, variance, outcome_variance = (
        rng.normal(size=(3, 4, 2, BINS)) ** np.array([1, 2, 2])[:, None, None, None]
    )
    probs = np.array([0.5, 0.3, 0.2, 0.0])
    with np.errstate(divide="ignore"):
        log_probs = single(np.log(probs))
    effects = expert_gp.StarEffects(*map(single, (mean, variance, outcome_variance)))
    prior = jax.jit(expert_gp.average_effects)(jnp.zeros((2, BINS)), log_probs, effects)
    first, second = (np.tensordot(probs, m, 1) for m in (mean, variance + mean**2))
    expected = np.tensordot(probs, outcome_variance, 1)
    np.testing.assert_allclose(prior.mean, first, atol=1e-5)
    np.testing.assert_allclose(prior.deviation**2, second - first**2, atol=1e-5)
    np.testing.assert_allclose(prior.outcome_variance, expected, atol=1e-5)


# --- the causal-prior Gaussian process ---

LINE = np.linspace(-2.0, 4.0, 7)
MEAN, DEVIATION = np.sin(LINE), 0.3 + 0.2 * np.cos(LINE) ** 2
POINTS, NOISE = (
    np.array([-1.5, 0.3, 0.9, 3.2, 50.0, -7.0]),
    np.array([0.1, 0.2, 0.1, 0.3, 1.0, 1.0]),
)
OUTCOMES, USED = np.array([-2.0, 0.5, 1.5, -0.3, np.nan, 1e9]), np.arange(6) < 4
VALUES = np.linspace(-2.0, 4.0, 9)
SCALES = 0.3, 1.0


@jax.jit
def jit_fit(grid, deviation, points, outcomes, noise, used):
    prior = expert_gp.CausalPrior(grid, single(MEAN), deviation, jnp.ones(7))
    data = expert_gp.Outcomes(points, outcomes, noise, used)
    gp, _ = expert_gp.fit_causal_gp(prior, data, SCALES)
    return gp, *gp(single(VALUES))


def fit(grid=LINE, deviation=DEVIATION, points=POINTS, outcomes=OUTCOMES, used=USED):
    return jit_fit(*map(single, (grid, deviation, points, outcomes, NOISE)), jnp.asarray(used))


def oracle(all_outcomes, length, amplitude, scale):
    """Log score, and posterior mean and deviation at VALUES, by the textbook formulas on the rows
    that are used.
    """

    def kernel(a, b):
        return amplitude * np.exp(-0.5 * ((a[:, None] - b) / length) ** 2) + np.outer(
            np.interp(a, LINE, DEVIATION), np.interp(b, LINE, DEVIATION)
        )

    points, outcomes = POINTS[USED], all_outcomes[USED]
    prior = kernel(points, points)
    covariance = prior + np.diag(scale * NOISE[USED] + 1e-5 * np.diag(prior))
    centre = np.interp(points, LINE, MEAN)
    score = scipy.stats.multivariate_normal.logpdf(outcomes, centre, covariance)
    score -= 0.5 * np.log(length / (0.4 * 6.0)) ** 2 + 0.125 * np.log(amplitude / 0.1) ** 2
    cross = kernel(VALUES, points)
    mean = np.interp(VALUES, LINE, MEAN) + cross @ np.linalg.solve(covariance, outcomes - centre)
    variance = np.diag(kernel(VALUES, VALUES)) - np.einsum(
        "vp,pv->v", cross, np.linalg.solve(covariance, cross.T)
    )
    return score, mean, np.sqrt(variance)


@pytest.mark.parametrize("size", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_posterior_and_hyperparameters_agree_with_numpy(size):
    outcomes = np.where(USED, size * OUTCOMES, np.nan)
    gp, mean, deviation = fit(outcomes=outcomes)
    grid = itertools.product(
        np.array(expert_gp.LENGTHSCALES) * 6.0, np.array(expert_gp.AMPLITUDES), SCALES
    )
    (length, amplitude, _), (_, expected_mean, expected_deviation) = max(
        ((h, oracle(outcomes, *h)) for h in grid), key=lambda pair: pair[1][0]
    )
    np.testing.assert_allclose([gp.lengthscale, gp.amplitude], [length, amplitude], rtol=1e-5)
    np.testing.assert_allclose(mean, expected_mean, atol=5e-4, rtol=5e-4)
    np.testing.assert_allclose(deviation, expected_deviation, atol=5e-4)


def test_rows_that_are_not_used_are_not_looked_at():
    changed = np.where(USED, POINTS, [0.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    _, *before = fit()
    _, *after = fit(points=changed, outcomes=np.where(USED, OUTCOMES, 0.0))
    assert (np.array(before) == np.array(after)).all()


def test_without_outcomes_it_is_the_prior():
    gp, mean, deviation = fit(used=np.zeros(6, bool))
    np.testing.assert_allclose(gp.lengthscale, 0.4 * 6.0, rtol=1e-5)
    # of the grid the nearest to 0.1 on a log scale
    np.testing.assert_allclose(gp.amplitude, 0.16, rtol=1e-5)
    np.testing.assert_allclose(mean, np.interp(VALUES, LINE, MEAN), atol=1e-6)
    np.testing.assert_allclose(
        deviation, np.sqrt(0.16 + np.interp(VALUES, LINE, DEVIATION) ** 2), rtol=1e-5
    )


def test_a_range_without_width_is_harmless():
    zeros = np.zeros(7), np.zeros(7), np.zeros(6), np.zeros(6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fit(*zeros)))


# --- acquisition ---

log_improvement, improvement = jax.jit(log_expected_improvement), jax.jit(expected_improvement)


def exact_log(u, std):
    """log of s (phi(u) + u Phi(u)) without cancellation, from the scaled complementary error
    function.
    """
    return (
        np.log(std)
        + scipy.stats.norm.logpdf(u)
        + np.log1p(u * np.sqrt(np.pi / 2) * erfcx(-u / np.sqrt(2)))
    )


@pytest.mark.parametrize("std", [1.0, 0.01])
def test_improvement_agrees_with_the_closed_form(std):
    u = np.linspace(-4.5, 6.0, 22)
    expected = std * (u * scipy.stats.norm.cdf(u) + scipy.stats.norm.pdf(u))
    found = improvement(single(1.0 - u * std), jnp.full(22, std), 1.0)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-7)


def test_the_logarithm_holds_far_below_underflow():
    u = np.array([-3.0, -4.9, -5.1, -7.0, -12.0, -40.0, -300.0])
    logs = np.asarray(log_improvement(single(-u), jnp.ones(7), 0.0))
    left_out = np.where(u < -5, 105 / u**6, 0.0)  # the first term that the series drops
    error = np.abs(logs - exact_log(u, 1.0))[:-1]  # at -300 float64 cancels
    assert (error <= (left_out + 1e-4 + 1e-6 * np.abs(logs))[:-1]).all()
    assert np.isfinite(logs).all() and (np.diff(logs) < 0).all()
    assert improvement(single(-u), jnp.ones(7), 0.0)[-1] == 0


def test_more_uncertainty_and_a_lower_mean_are_worth_more():
    ladder = single(np.linspace(0.1, 20.0, 50))
    assert (np.diff(log_improvement(jnp.full(50, 1.0), ladder, 0.0)) > 0).all()
    assert (np.diff(log_improvement(ladder, jnp.ones(50), 0.0)) < 0).all()


def test_improvement_has_units_of_the_mean():
    mean, std = single(jr.normal(jr.key(0), (2, 3))), single(jnp.exp(jr.normal(jr.key(1), (2, 3))))
    np.testing.assert_allclose(
        improvement(7.0 * mean + 3.0, 7.0 * std, 7.0 * 0.2 + 3.0),
        7.0 * improvement(mean, std, 0.2),
        rtol=1e-4,
    )


def test_refine_finds_the_peak_between_grid_values():
    grid = single(
        np.stack([np.linspace(0.0, 1.0, 5), np.linspace(-2.0, 2.0, 5), np.linspace(5.0, 9.0, 5)])
    )
    peaks = jnp.array([0.4, 0.55, 8.0])

    def score(variable, values):
        return jnp.array([0.0, 3.0, 1.0])[variable] - (values - peaks[variable]) ** 2

    search = jax.jit(lambda table: refine(score, grid, table, jnp.ones(3, bool)))
    table = jnp.stack([score(i, grid[i]) for i in range(3)])
    # 17 values between the neighbours, one grid step away each; at the edge: the best within the
    # range
    for scores, best, at, atol in (
        (table, 1, 0.55, 0.5 / 8),
        (table.at[2, 0].set(10.0), 2, 6.0, 1e-5),
    ):
        variable, value = search(scores)
        assert variable == best
        np.testing.assert_allclose(value, at, atol=atol)


# --- what cannot be factorised, and the published rules ---


def test_hyperparameters_whose_factor_fails_are_left_out_and_counted(monkeypatch):
    """Here every system with a long lengthscale fails: the best of the others is taken, and nothing
    is nan.
    """

    def failing(matrix):
        factor = jnp.linalg.cholesky(matrix)
        return jnp.where(matrix[0, 1] > 0.9 * matrix[0, 0], jnp.nan, factor)

    monkeypatch.setattr("lib.expert_gp.cholesky", failing)
    close = single(np.stack([[0.0, 0.3, *np.linspace(-2, 2, 10)]] * 2, 1))
    y = jnp.sin(3 * close[:, 0])
    gp = expert_gp.fit_star_gp(close, y - y.mean(), jnp.array([[True, False]]), jnp.array([True]))
    amplitude, length, noise, failures = (float(p[0]) for p in gp)
    lengths, ratios = map(np.array, (expert_gp.STAR_LENGTHSCALES, expert_gp.STAR_NOISE_RATIOS))
    fails = np.exp(-0.09 / (2 * lengths**2))[:, None] > 0.9 * (1 + ratios)
    assert failures == fails.sum() > 0
    found = np.abs(lengths - length).argmin(), np.abs(ratios - noise / amplitude).argmin()
    assert not fails[found] and np.isfinite([amplitude, noise]).all()

    ones, zeros = jnp.ones(3), jnp.zeros(9)
    prior = expert_gp.CausalPrior(single(np.linspace(-2, 2, 9)), zeros, zeros, zeros)
    points, outcomes = single([[0.0, 0.2, 1.5], [0.0, 1.0, 0.0]])
    data = expert_gp.Outcomes(points, outcomes, 1e-3 * ones, ones > 0)
    causal, failures = expert_gp.fit_causal_gp(prior, data)
    assert 0 < failures < len(expert_gp.LENGTHSCALES) * len(expert_gp.AMPLITUDES)
    assert np.isfinite(causal(prior.grid)).all()
    assert float(causal.lengthscale) < 4 * max(expert_gp.LENGTHSCALES)


def test_published_hyperparameters_are_a_maximum_of_the_likelihood_within_limits():
    """From raw rows: a wave ends where SciPy's search does, and a straight line's endless
    lengthscale is set to one, as published.
    """
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 2))
    y = np.stack([np.sin(2 * x[:, 0]), 3 * x[:, 1]]) + 0.1 * rng.normal(size=(2, 40))
    fit, sets = jax.jit(published.fit_star_gp), jnp.eye(2, dtype=bool)
    wave, line = (fit(single(x), single(y[i]), sets[i : i + 1], EVERY[:1]) for i in range(2))

    def loss(logs):
        amplitude, lengthscale, noise = np.exp(logs)
        kernel = gaussian(x[:, :1], x[:, :1], amplitude, lengthscale) + noise * np.eye(40)
        return -scipy.stats.multivariate_normal.logpdf(y[0], np.zeros(40), kernel)

    expected = np.exp(scipy.optimize.minimize(loss, np.zeros(3)).x)
    np.testing.assert_allclose([float(p[0]) for p in wave[:3]], expected, rtol=0.02)
    assert line.lengthscale[0] == 1.0 and line.amplitude[0] > 100
