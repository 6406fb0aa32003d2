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


@jax.jit
def statistics_of(sums, task):
    return pair_statistics(sums, task)


@jax.jit
def evidence_of(sums, frame, task):
    return effect_evidence(sums, frame, task)


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
    buffer, task = problem
    frame, rows, sums = summed(buffer, task)
    standardised = ExperienceBuffer(rows.values, rows.intervened > 0, rows.valid > 0)
    linear, cubic = regression_surfaces(sums.regression, frame.grid, task)
    task = Task(task.target, frame.grid[:, 0], frame.grid[:, -1], task.var_mask)
    # a variable without a range is scaled by its spread here, by that of the usable rows there
    ranged = np.arange(VARS) < 3
    np.testing.assert_allclose(linear, least_squares_surface(standardised, task, BINS), atol=1e-3)
    np.testing.assert_allclose(
        cubic[ranged], additive_ridge_surface(standardised, task, BINS)[ranged], atol=2e-2
    )


def test_scalar_features_and_their_mean_products(problem):
    buffer, task = problem
    _, rows, sums = summed(buffer, task)
    x, set_ = np.asarray(rows.values, float), np.asarray(rows.intervened, float)
    h = [x, (x**2 - 1) / np.sqrt(2), (x**3 - 3 * x) / np.sqrt(6)]
    waves = [f(w * x) for w in (1.2, 2.4, 3.6) for f in (np.sin, np.cos)]
    features = np.stack(
        [np.ones_like(x), *h, *waves, set_, set_ * x, set_ * waves[0], set_ * waves[1]], -1
    )
    assert np.abs(x).max() < FARTHEST and features.shape[-1] == NUM_FEATURES
    expected = np.einsum("na,nb->ab", features[:, 0], features[:, TARGET]).reshape(-1) / ROWS
    statistics = np.asarray(statistics_of(sums, task))[0, TARGET, : NUM_FEATURES**2]
    np.testing.assert_allclose(
        statistics, np.sign(expected) * np.log1p(5 * np.abs(expected)), atol=2e-3
    )


def statistic(problem, name):
    """One of the statistics of pairs, `[i, j]`."""
    buffer, task = problem
    _, _, sums = summed(buffer, task)
    return np.asarray(statistics_of(sums, task))[:, :, NUM_FEATURES**2 + STATISTICS.index(name)]


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
)
STATISTICS += ("odds", "odds cubic", "residual", "residual alone", "square", "slope", "rows")


def test_linear_regressions_on_the_rows_where_a_variable_was_not_set(problem):
    """Variable 0, which is set in ten rows; one row's worth of independence is a ridge of one."""
    buffer, task = problem
    _, rows, _ = summed(buffer, task)
    x = np.asarray(rows.values, float)[~np.asarray(buffer.intervened[:, 0])]
    others = x[:, 1:]
    inverse = np.linalg.inv(x.T @ x + np.eye(VARS))
    slopes = np.linalg.solve(others.T @ others + np.eye(VARS - 1), others.T @ x[:, 0])
    np.testing.assert_allclose(
        np.sinh(3 * statistic(problem, "coefficient")[0, 1:]), slopes, atol=1e-3
    )
    partial = -inverse[0, 1:] / np.sqrt(inverse[0, 0] * np.diag(inverse)[1:])
    freedom = len(x) - VARS
    np.testing.assert_allclose(
        np.sinh(3 * statistic(problem, "t")[0, 1:]),
        partial * np.sqrt(freedom / (1 - partial**2)),
        rtol=1e-2,
        atol=1e-3,
    )
    np.testing.assert_allclose(
        np.exp(statistic(problem, "variance")[0]), 1 / inverse[0, 0] / freedom, rtol=1e-2
    )


def test_the_cubic_test_sees_a_wave_that_correlation_misses(problem):
    """Variable 1 is a wave of variable 0: an F-test of three powers, by least squares in numpy."""
    buffer, task = problem
    _, rows, _ = summed(buffer, task)
    x = np.asarray(rows.values[:OBSERVED], float)
    powers = np.stack([x, (x**2 - 1) / np.sqrt(2), (x**3 - 3 * x) / np.sqrt(6)], -1)
    powers -= powers.mean(0)

    def residual(regressors):
        design = powers[:, regressors].reshape(OBSERVED, -1)
        y = powers[:, 1, 0]
        gram = design.T @ design + np.eye(design.shape[1])
        return y @ y + 1.0 - y @ design @ np.linalg.solve(gram, design.T @ y)

    full, without = residual([0, 2, 3]), residual([2, 3])
    expected = np.log1p((without - full) / full * (OBSERVED - 3 * VARS) / 3) / 2
    found = statistic(problem, "F")
    assert abs(found[1, 0] - expected) < 0.02 * expected
    assert found[1, 0] > 1.0 > max(found[1, 2], found[1, 3])


def test_local_posteriors_compare_all_subsets_by_bic(problem):
    """Variable 0 on all subsets of the other three, over the rows in which it was not set, by least
    squares in numpy.
    """
    buffer, _ = problem
    _, rows, _ = summed(*problem)
    x = np.asarray(rows.values, float)[~np.asarray(buffer.intervened[:, 0])]
    x = x - x.mean(0)
    weight = {}
    for chosen in itertools.chain.from_iterable(
        itertools.combinations((1, 2, 3), size) for size in range(4)
    ):
        design = x[:, list(chosen)]
        moment = design.T @ x[:, 0]
        residual = (
            x[:, 0] @ x[:, 0]
            + 1.0
            - moment @ np.linalg.solve(design.T @ design + np.eye(len(chosen)), moment)
        )
        weight[chosen] = (residual / len(x)) ** (-0.5 * len(x)) * len(x) ** (-0.5 * len(chosen))
    for j in (1, 2, 3):
        odds = sum(w for chosen, w in weight.items() if j in chosen) / sum(
            w for chosen, w in weight.items() if j not in chosen
        )
        np.testing.assert_allclose(
            np.sinh(2 * statistic(problem, "odds")[0, j]), np.log(odds), rtol=2e-2, atol=2e-2
        )


def test_a_parents_regression_carries_over_and_a_childs_breaks():
    """0 -> 1 -> 2: when 0 is set, 1 is what its regression says; when 2 is set, it is not."""
    rng = np.random.default_rng(3)
    values, intervened = rng.normal(size=(200, 3)), np.zeros((200, 3), bool)
    intervened[180:190, 0], intervened[190:, 2] = True, True
    values[180:190, 0], end = rng.uniform(2, 3, 10), rng.uniform(2, 3, 10)
    values[:, 1] = values[:, 0] + 0.5 * values[:, 1]
    values[:, 2] = values[:, 1] + 0.5 * values[:, 2]
    values[190:, 2] = end
    buffer = ExperienceBuffer(
        jnp.asarray(values, jnp.float32), jnp.asarray(intervened), jnp.ones(200, bool)
    )
    problem = buffer, Task(jnp.array(1), jnp.full(3, -3.0), jnp.full(3, 3.0), jnp.ones(3, bool))
    broken = statistic(problem, "residual")
    assert broken[1, 2] > 2 * broken[1, 0]
    assert statistic(problem, "slope")[1, 0] > 5 * abs(statistic(problem, "slope")[1, 2])
    np.testing.assert_allclose(statistic(problem, "rows"), np.log1p([[10, 0, 10]] * 3), atol=1e-5)


def test_counts_and_means_of_what_was_done(problem):
    """Far from every other value, the estimate at a grid point is that of the rows there."""
    buffer, task = problem
    frame, rows, sums = summed(buffer, task)
    evidence = np.asarray(evidence_of(sums, frame, task))
    x, y, done = (
        np.asarray(a, float)
        for a in (rows.values[:, 0], rows.values[:, TARGET], rows.intervened[:, 0])
    )
    width = 0.5 * float(frame.grid[0, 1] - frame.grid[0, 0]) + 0.15
    near = (
        np.maximum(1 - ((x[:, None] - np.asarray(frame.grid[0])[None]) / width) ** 2 / 7, 0) ** 2
        * done[:, None]
    )
    np.testing.assert_allclose(
        evidence[0, :, 1], near.T @ y / (near.sum(0) + 0.3), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        evidence[0, :, NUM_ESTIMATES + 1], np.log1p(near.sum(0)), rtol=1e-3, atol=1e-4
    )


def test_outliers_and_constant_columns(problem):
    buffer, task = problem
    wild = ExperienceBuffer(
        buffer.values.at[5, 0].set(1e6).at[:, 3].set(4.0), buffer.intervened, buffer.valid
    )
    frame, rows, sums = summed(wild, task)
    assert (
        float(jnp.abs(rows.values).max()) <= MAX_DEVIATIONS
        and float(jnp.abs(rows.values[:, 3]).max()) == 0.0
    )
    for part in (statistics_of(sums, task), evidence_of(sums, frame, task)):
        assert bool(jnp.isfinite(part).all())


def test_a_variable_without_a_range_is_looked_at_around_its_mean():
    """An offset of such a variable once moved its grid, and with it every answer."""
    values = jr.normal(jr.key(0), (20, 3))
    task = Task(
        jnp.array(2), jnp.array([-1.0, 0.0, 0.0]), jnp.array([1.0, 0.0, 0.0]), jnp.ones(3, bool)
    )
    for offset in (0.0, 8.0):
        moved = values + jnp.array([0.0, offset, -offset])[None]
        frame = Frame.of(
            ExperienceBuffer(moved, jnp.zeros((20, 3), bool), jnp.ones(20, bool)), task, 5
        )
        assert not frame.grid[1:].any() and frame.grid[0].any()
