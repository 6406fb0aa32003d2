"""Sums over rows: additive, and the statistics made of them as plain numpy and lib/baselines.py
have them.
"""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lib.baselines import additive_ridge_surface, least_squares_surface
from lib.buffer import ExperienceBuffer
from lib.evidence import NUM_ESTIMATES, effect_evidence, regression_surfaces
from lib.pairs import pair_statistics
from lib.scm import Task
from lib.sums import FARTHEST, MAX_DEVIATIONS, NUM_FEATURES, Frame, Rows, sum_rows


VARS, ROWS, OBSERVED, BINS, TARGET = 4, 90, 60, 7, 2


@pytest.fixture(scope="module")
def problem():
    """Sixty observations in which variable 1 is a wave of variable 0, then thirty interventions, a
    third of them on the target.
    """
    rng = np.random.default_rng(0)
    values = 3.0 + 2.0 * rng.normal(size=(ROWS, VARS))
    values[:, 1] = np.sin(1.2 * (values[:, 0] - 3.0)) + 0.1 * rng.normal(size=ROWS)
    intervened = np.zeros((ROWS, VARS), bool)
    intervened[np.arange(OBSERVED, ROWS), np.arange(ROWS - OBSERVED) % 3] = True
    buffer = ExperienceBuffer(
        jnp.asarray(values, jnp.float32), jnp.asarray(intervened), jnp.ones(ROWS, bool)
    )
    return buffer, Task(
        jnp.array(TARGET),
        jnp.full(VARS, -1.0),
        jnp.array([6.0, 6.0, 6.0, -1.0]),
        jnp.ones(VARS, bool),
    )


@jax.jit
def summed(buffer, task):
    frame = Frame.of(buffer, task, BINS)
    rows = Rows.of(buffer, frame, task.var_mask)
    return frame, rows, sum_rows(rows, frame, task)


statistics_of, evidence_of = jax.jit(pair_statistics), jax.jit(effect_evidence)
STATISTICS = (
    "covariance",
    "t alone",
    "t observed",
    "t",
    "coefficient",
    "variance",
    "variance observed",
    "F",
    "variance cubic",
    "F of target",
    "odds",
    "odds cubic",
    "residual",
    "residual alone",
    "square",
    "slope",
    "rows",
)


def statistic(problem, name):
    """One of the statistics of pairs, `[i, j]`."""
    found = np.asarray(statistics_of(summed(*problem)[2], problem[1]))
    return found[:, :, NUM_FEATURES**2 + STATISTICS.index(name)]


def test_sums_are_additive(problem):
    buffer, task = problem
    frame, rows, whole = summed(buffer, task)
    parts = [
        sum_rows(jax.tree.map(lambda leaf, part=part: leaf[part], rows), frame, task)
        for part in (slice(0, 37), slice(37, ROWS))
    ]
    for name, total, one, other in zip(whole._fields, whole, *parts, strict=True):
        np.testing.assert_allclose(total, one + other, rtol=1e-4, atol=5e-3, err_msg=name)


def test_regressions_are_those_of_the_baselines(problem):
    (_, task), (frame, rows, sums) = problem, summed(*problem)
    standardised = ExperienceBuffer(rows.values, rows.intervened > 0, rows.valid > 0)
    linear, cubic = regression_surfaces(sums.regression, frame.grid, task)
    task = Task(task.target, frame.grid[:, 0], frame.grid[:, -1], task.var_mask)
    np.testing.assert_allclose(linear, least_squares_surface(standardised, task, BINS), atol=1e-3)
    # a variable without a range is scaled by its spread here, by that of the usable rows there
    np.testing.assert_allclose(
        cubic[:3], additive_ridge_surface(standardised, task, BINS)[:3], atol=2e-2
    )


def test_scalar_features_and_their_mean_products(problem):
    _, rows, sums = summed(*problem)
    x, set_ = np.asarray(rows.values, float), np.asarray(rows.intervened, float)
    h = [x, (x**2 - 1) / np.sqrt(2), (x**3 - 3 * x) / np.sqrt(6)]
    waves = [f(w * x) for w in (1.2, 2.4, 3.6) for f in (np.sin, np.cos)]
    features = np.stack(
        [np.ones_like(x), *h, *waves, set_, set_ * x, set_ * waves[0], set_ * waves[1]], -1
    )
    assert np.abs(x).max() < FARTHEST and features.shape[-1] == NUM_FEATURES
    products = (features[:, 0].T @ features[:, TARGET]).reshape(-1) / ROWS
    found = np.asarray(statistics_of(sums, problem[1]))[0, TARGET, : NUM_FEATURES**2]
    np.testing.assert_allclose(found, np.sign(products) * np.log1p(5 * np.abs(products)), atol=2e-3)


def not_set(problem):
    """The rows in which variable 0, which is set in ten, was not set, standardised."""
    return np.asarray(summed(*problem)[1].values, float)[~np.asarray(problem[0].intervened[:, 0])]


def test_linear_regressions_on_the_rows_where_a_variable_was_not_set(problem):
    """One row's worth of independence is a ridge of one."""
    x = not_set(problem)
    inverse = np.linalg.inv(x.T @ x + np.eye(VARS))
    slopes = -inverse[0, 1:] / inverse[0, 0]
    coefficients, t = (np.sinh(3 * statistic(problem, n)[0, 1:]) for n in ("coefficient", "t"))
    np.testing.assert_allclose(coefficients, slopes, atol=1e-3)
    partial = -inverse[0, 1:] / np.sqrt(inverse[0, 0] * np.diag(inverse)[1:])
    freedom = len(x) - VARS
    np.testing.assert_allclose(
        t, partial * np.sqrt(freedom / (1 - partial**2)), rtol=1e-2, atol=1e-3
    )
    variance = np.exp(statistic(problem, "variance")[0])
    np.testing.assert_allclose(variance, 1 / inverse[0, 0] / freedom, rtol=1e-2)


def test_the_cubic_test_sees_a_wave_that_correlation_misses(problem):
    """Variable 1 is a wave of variable 0: an F-test of three powers, by least squares in numpy."""
    x = np.asarray(summed(*problem)[1].values[:OBSERVED], float)
    powers = np.stack([x, (x**2 - 1) / np.sqrt(2), (x**3 - 3 * x) / np.sqrt(6)], -1)
    powers -= powers.mean(0)
    y = powers[:, 1, 0]

    def residual(regressors):
        design = powers[:, regressors].reshape(OBSERVED, -1)
        gram = design.T @ design + np.eye(design.shape[1])
        return y @ y + 1.0 - y @ design @ np.linalg.solve(gram, design.T @ y)

    full, without = residual([0, 2, 3]), residual([2, 3])
    expected = np.log1p((without - full) / full * (OBSERVED - 3 * VARS) / 3) / 2
    found = statistic(problem, "F")
    assert abs(found[1, 0] - expected) < 0.02 * expected
    assert found[1, 0] > 1.0 > max(found[1, 2], found[1, 3])


def test_local_posteriors_compare_all_subsets_by_bic(problem):
    """Variable 0 on all subsets of the other three, by least squares in numpy."""
    x = not_set(problem)
    x, n, weight = x - x.mean(0), len(x), {}
    for chosen in itertools.product((False, True), repeat=3):
        design = x[:, 1:][:, list(chosen)]
        moment, ridge = design.T @ x[:, 0], np.eye(sum(chosen))
        explained = moment @ np.linalg.solve(design.T @ design + ridge, moment)
        residual = x[:, 0] @ x[:, 0] + 1.0 - explained
        weight[chosen] = (residual / n) ** (-0.5 * n) * n ** (-0.5 * sum(chosen))
    for j in range(3):
        inside, outside = (
            sum(w for chosen, w in weight.items() if chosen[j] == there) for there in (True, False)
        )
        found = np.sinh(2 * statistic(problem, "odds")[0, j + 1])
        np.testing.assert_allclose(found, np.log(inside / outside), rtol=2e-2, atol=2e-2)


def test_a_parents_regression_carries_over_and_a_childs_breaks():
    """0 -> 1 -> 2: when 0 is set, 1 is what its regression says; when 2 is set, it is not."""
    rng = np.random.default_rng(3)
    values, intervened = rng.normal(size=(200, 3)), np.zeros((200, 3), bool)
    intervened[180:190, 0] = intervened[190:, 2] = True
    values[180:190, 0], end = rng.uniform(2, 3, 10), rng.uniform(2, 3, 10)
    values[:, 1] = values[:, 0] + 0.5 * values[:, 1]
    values[:, 2] = values[:, 1] + 0.5 * values[:, 2]
    values[190:, 2] = end
    buffer = ExperienceBuffer(
        jnp.asarray(values, jnp.float32), jnp.asarray(intervened), jnp.ones(200, bool)
    )
    problem = buffer, Task(jnp.array(1), jnp.full(3, -3.0), jnp.full(3, 3.0), jnp.ones(3, bool))
    broken, slope = statistic(problem, "residual"), statistic(problem, "slope")
    assert broken[1, 2] > 2 * broken[1, 0] and slope[1, 0] > 5 * abs(slope[1, 2])
    np.testing.assert_allclose(statistic(problem, "rows"), np.log1p([[10, 0, 10]] * 3), atol=1e-5)


def test_counts_and_means_of_what_was_done(problem):
    """Far from every other value, the estimate at a grid point is that of the rows there."""
    frame, rows, sums = summed(*problem)
    evidence = np.asarray(evidence_of(sums, frame, problem[1]))[0]
    x, y, done, grid = (
        np.asarray(a, float)
        for a in (rows.values[:, 0], rows.values[:, TARGET], rows.intervened[:, 0], frame.grid[0])
    )
    distance = (x[:, None] - grid) / (0.5 * (grid[1] - grid[0]) + 0.15)
    near = np.maximum(1 - distance**2 / 7, 0) ** 2 * done[:, None]
    for column, expected in (
        (1, near.T @ y / (near.sum(0) + 0.3)),
        (NUM_ESTIMATES + 1, np.log1p(near.sum(0))),
    ):
        np.testing.assert_allclose(evidence[:, column], expected, rtol=1e-3, atol=1e-4)


def test_outliers_and_constant_columns(problem):
    buffer, task = problem
    values = buffer.values.at[5, 0].set(1e6).at[:, 3].set(4.0)
    frame, rows, sums = summed(ExperienceBuffer(values, buffer.intervened, buffer.valid), task)
    assert jnp.abs(rows.values).max() <= MAX_DEVIATIONS and not rows.values[:, 3].any()
    for part in (statistics_of(sums, task), evidence_of(sums, frame, task)):
        assert bool(jnp.isfinite(part).all())


@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_a_variable_without_a_range_is_looked_at_around_its_mean(offset):
    """An offset of such a variable once moved its grid, and with it every answer."""
    values = jr.normal(jr.key(0), (20, 3)) + jnp.array([[0.0, offset, -offset]])
    low, high = jnp.array([-1.0, 0.0, 0.0]), jnp.array([1.0, 0.0, 0.0])
    buffer = ExperienceBuffer(values, jnp.zeros((20, 3), bool), jnp.ones(20, bool))
    frame = Frame.of(buffer, Task(jnp.array(2), low, high, jnp.ones(3, bool)), 5)
    assert not frame.grid[1:].any() and frame.grid[0].any()
