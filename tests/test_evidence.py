"""Sums over rows: additive, and the statistics made of them as plain numpy and lib/baselines.py have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.baselines import additive_ridge_surface, least_squares_surface
from lib.buffer import ExperienceBuffer
from lib.evidence import MAX_DEVIATIONS, NUM_WAVES, Frame, Rows, effect_evidence, pair_statistics, regression_surfaces, sum_rows
from lib.scm import Task


VARS, ROWS, OBSERVED, BINS, TARGET = 4, 90, 60, 7, 2


@pytest.fixture(scope="module")
def problem():
    """Sixty observations in which variable 1 is a wave of variable 0, then thirty interventions, a third of them on the target."""
    rng = np.random.default_rng(0)
    values = 3.0 + 2.0 * rng.normal(size=(ROWS, VARS))
    values[:, 1] = np.sin(1.2 * (values[:, 0] - 3.0)) + 0.1 * rng.normal(size=ROWS)
    intervened = np.zeros((ROWS, VARS), bool)
    intervened[np.arange(OBSERVED, ROWS), np.arange(ROWS - OBSERVED) % 3] = True
    buffer = ExperienceBuffer(jnp.asarray(values, jnp.float32), jnp.asarray(intervened), jnp.ones(ROWS, bool))
    return buffer, Task(jnp.array(TARGET), jnp.full(VARS, -1.0), jnp.array([6.0, 6.0, 6.0, -1.0]), jnp.ones(VARS, bool))


@jax.jit
def summed(buffer, task):
    frame = Frame.of(buffer, task, BINS)
    rows = Rows.of(buffer, frame, task.var_mask)
    return frame, rows, sum_rows(rows, frame, task)


def test_sums_are_additive(problem):
    buffer, task = problem
    frame, rows, whole = summed(buffer, task)
    parts = [sum_rows(jax.tree.map(lambda leaf, part=part: leaf[part], rows), frame, task) for part in (slice(0, 37), slice(37, ROWS))]
    for name, total, one, other in zip(whole._fields, whole, *parts, strict=True):
        np.testing.assert_allclose(total, one + other, rtol=1e-4, atol=1e-3, err_msg=name)


def test_regressions_are_those_of_the_baselines(problem):
    buffer, task = problem
    frame, rows, sums = summed(buffer, task)
    standardised = ExperienceBuffer(rows.values, rows.intervened > 0, rows.valid > 0)
    linear, cubic = regression_surfaces(sums.regression, frame.grid, task)
    low, high = frame.grid[:, 0], frame.grid[:, -1]
    ranged = np.arange(VARS) < 3  # a variable without a range is scaled by its spread here, by that of the usable rows there
    np.testing.assert_allclose(linear, least_squares_surface(standardised, task.target, low, high, BINS), atol=1e-3)
    np.testing.assert_allclose(cubic[ranged], additive_ridge_surface(standardised, task.target, low, high, BINS)[ranged], atol=2e-2)


def test_smooth_correlation_sees_a_wave(problem):
    buffer, task = problem
    _, rows, sums = summed(buffer, task)
    statistics = np.asarray(pair_statistics(sums, task.var_mask))
    x = np.asarray(rows.values[:OBSERVED], float)
    features = np.exp(-0.5 * ((x[:, :1] - np.linspace(-2.5, 2.5, NUM_WAVES)) / 0.5) ** 2)
    features -= features.mean(0)
    against = features.T @ x[:, 1]
    expected = np.sqrt(against @ np.linalg.solve(features.T @ features + np.eye(NUM_WAVES), against) / (x[:, 1] ** 2).sum())
    assert abs(statistics[0, 1, 3] - expected) < 1e-3 and expected > 0.7
    assert abs(statistics[0, 1, 0]) < 0.4  # what the covariance sees of it


def test_counts_and_means_of_what_was_done(problem):
    """Far from every other value, the estimate at a grid point is that of the rows there."""
    buffer, task = problem
    frame, rows, sums = summed(buffer, task)
    evidence = np.asarray(effect_evidence(sums, frame, task))
    x, y, done = (np.asarray(a, float) for a in (rows.values[:, 0], rows.values[:, TARGET], rows.intervened[:, 0]))
    width = 0.5 * float(frame.grid[0, 1] - frame.grid[0, 0]) + 0.15
    near = np.exp(-0.5 * ((x[:, None] - np.asarray(frame.grid[0])[None]) / width) ** 2) * done[:, None]
    np.testing.assert_allclose(evidence[0, :, 1], near.T @ y / (near.sum(0) + 0.3), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(evidence[0, :, 8], np.log1p(near.sum(0)), rtol=1e-3, atol=1e-4)


def test_outliers_and_constant_columns(problem):
    buffer, task = problem
    wild = ExperienceBuffer(buffer.values.at[5, 0].set(1e6).at[:, 3].set(4.0), buffer.intervened, buffer.valid)
    frame, rows, sums = summed(wild, task)
    assert float(jnp.abs(rows.values).max()) <= MAX_DEVIATIONS and float(jnp.abs(rows.values[:, 3]).max()) == 0.0
    for part in (pair_statistics(sums, task.var_mask), effect_evidence(sums, frame, task)):
        assert bool(jnp.isfinite(part).all())
