"""Sums over rows: additive, and the statistics made of them as plain numpy has them."""

import itertools
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lib.buffer import ExperienceBuffer
from lib.pairs import NUM_PAIR_STATISTICS, pair_statistics
from lib.scm import Task
from lib.statistics import (
    NUM_EFFECT_STATISTICS,
    NUM_ESTIMATES,
    effect_statistics,
    regression_surfaces,
    statistics,
)
from lib.sums import (
    MAX_DEVIATIONS,
    MAX_POWER_BASE,
    NUM_FEATURES,
    Standardisation,
    Summary,
    sum_rows,
)


VARS, ROWS, OBSERVED, BINS, TARGET = 4, 90, 60, 7, 2


def make_buffer(values, intervened):
    return ExperienceBuffer(
        jnp.asarray(values, jnp.float32), jnp.asarray(intervened), jnp.ones(len(values), bool)
    )


def make_task(target, low, high):
    return Task(jnp.array(target), jnp.array(low), jnp.array(high), jnp.ones(len(low), bool))


@pytest.fixture(scope="module")
def problem():
    """Sixty observations in which variable 1 is a sine of variable 0, then thirty interventions, a
    third of them on the target.
    """
    rng = np.random.default_rng(0)
    values = 3.0 + 2.0 * rng.normal(size=(ROWS, VARS))
    values[:, 1] = np.sin(1.2 * (values[:, 0] - 3.0)) + 0.1 * rng.normal(size=ROWS)
    intervened = np.zeros((ROWS, VARS), bool)
    intervened[np.arange(OBSERVED, ROWS), np.arange(ROWS - OBSERVED) % 3] = True
    return make_buffer(values, intervened), make_task(TARGET, [-1.0] * 4, [6.0, 6.0, 6.0, -1.0])


@jax.jit
def summed(buffer, task):
    """Units, standardised values and sums."""
    units, sums = Summary.of(buffer, task, BINS)
    return units, units.values(buffer, task.var_mask), sums


of_pairs, of_effects = jax.jit(pair_statistics), jax.jit(effect_statistics)
STATISTICS = (
    "t",
    "coefficient",
    "variance",
    "variance observed",
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
    found = np.asarray(of_pairs(summed(*problem)[2], problem[1]))
    return found[:, :, NUM_FEATURES**2 + STATISTICS.index(name)]


def test_sums_are_additive(problem, monkeypatch):
    (buffer, task), (units, _, whole) = problem, summed(*problem)
    first = jnp.arange(ROWS) < 37
    parts = (sum_rows(buffer.only(kept), units, task) for kept in (first, ~first))
    for name, total, one, other in zip(whole._fields, whole, *parts, strict=True):
        np.testing.assert_allclose(total, one + other, rtol=1e-4, atol=5e-3, err_msg=name)
    monkeypatch.setattr("lib.sums.MOST_ROWS", 32)
    for name, total, one in zip(whole._fields, whole, sum_rows(buffer, units, task), strict=True):
        np.testing.assert_allclose(total, one, rtol=1e-4, atol=5e-3, err_msg=name)


@pytest.mark.parametrize("degree", [1, 3])
def test_regressions_are_penalised_least_squares(problem, degree):
    """Linear: against effects of a standard deviation; cubic: of the ends of a range, or of two
    standard deviations; in units of the noise that a first fit leaves.
    """
    (buffer, task), (units, values, sums) = problem, summed(*problem)
    usable, grid = ~np.asarray(buffer.intervened[:, TARGET]), np.asarray(units.grid, float)
    middle, half = grid[:, [0, -1]].mean(1), np.where(np.ptp(grid, 1) > 0, np.ptp(grid, 1) / 2, 2.0)
    u, at = (np.asarray(values, float)[usable] - middle) / half, (grid.T - middle) / half
    others = [i for i in range(VARS) if i != TARGET]
    design = np.stack([u[:, i] ** p for i in others for p in range(1, degree + 1)], 1)
    centre, y = design.mean(0), np.asarray(values, float)[usable, TARGET]
    penalty = 0.01 * design.var(0) if degree == 1 else np.tile([0.25, 0.5, 4.0], len(others))
    design, noise = design - centre, 1.0
    for _ in range(2):
        gram = design.T @ design + np.diag(penalty * noise)
        weights = np.linalg.solve(gram, design.T @ y)
        noise = (((y - y.mean() - design @ weights) ** 2).sum() + 1) / (len(y) + 1)
    weights = weights.reshape(-1, degree)
    found = regression_surfaces(sums.powers, units.grid, task)[degree == 3]
    for i, w, c in zip(others, weights, centre.reshape(-1, degree), strict=True):
        powers = at[:, i, None] ** np.arange(1, degree + 1)
        np.testing.assert_allclose(found[i], y.mean() + (powers - c) @ w, atol=1e-3)


def hermite(x):
    return [x, (x**2 - 1) / np.sqrt(2), (x**3 - 3 * x) / np.sqrt(6)]


def test_scalar_features_and_their_mean_products(problem):
    _, values, sums = summed(*problem)
    x, set_ = np.asarray(values, float), np.asarray(problem[0].intervened, float)
    fourier = [f(w * x) for w in (1.2, 2.4, 3.6) for f in (np.sin, np.cos)]
    features = np.stack(
        [np.ones_like(x), *hermite(x), *fourier, set_, set_ * x, *(set_ * f for f in fourier[:2])],
        -1,
    )
    assert np.abs(x).max() < MAX_POWER_BASE and features.shape[-1] == NUM_FEATURES
    products = (features[:, 0].T @ features[:, TARGET]).reshape(-1) / ROWS
    found = np.asarray(of_pairs(sums, problem[1]))[0, TARGET, : NUM_FEATURES**2]
    np.testing.assert_allclose(found, np.sign(products) * np.log1p(5 * np.abs(products)), atol=2e-3)


def not_set(problem):
    """The rows in which variable 0, which is set in ten, was not set, standardised."""
    return np.asarray(summed(*problem)[1], float)[~np.asarray(problem[0].intervened[:, 0])]


def pseudo_row(problem):
    """Squares of it: variances over the observational rows, less than one where units are wide."""
    squares = np.square(np.asarray(summed(*problem)[1], float)[:OBSERVED]).mean(0)
    assert squares[1] < 0.5
    return squares


def ridge_residual(design, y, pseudo):
    """Residual sum of squares, a pseudo-row added to the Gram matrix of design and outcome."""
    gram = design.T @ design + np.diag(pseudo[1:])
    return y @ y + pseudo[0] - y @ design @ np.linalg.solve(gram, design.T @ y)


def test_linear_regressions_on_the_rows_where_a_variable_was_not_set(problem):
    x = not_set(problem)
    inverse = np.linalg.inv(x.T @ x + np.diag(pseudo_row(problem)))
    coefficients, t = (np.sinh(3 * statistic(problem, n)[0, 1:]) for n in ("coefficient", "t"))
    np.testing.assert_allclose(coefficients, -inverse[0, 1:] / inverse[0, 0], atol=1e-3)
    partial = -inverse[0, 1:] / np.sqrt(inverse[0, 0] * np.diag(inverse)[1:])
    freedom = len(x) - VARS
    np.testing.assert_allclose(
        t, partial * np.sqrt(freedom / (1 - partial**2)), rtol=1e-2, atol=1e-3
    )
    np.testing.assert_allclose(
        np.exp(statistic(problem, "variance")[0]), 1 / inverse[0, 0] / freedom, rtol=1e-2
    )


def test_the_test_of_the_target_sees_a_sine_that_correlation_misses(problem):
    """Variable 1 is a sine of variable 0: F of its cubic regression, but a small t of its linear
    one (log(1 + F) / 2 and arcsinh(t) / 3: 1.0 are F = 6 and t = 10).
    """
    of_sine = problem[0], make_task(1, [-1.0] * 4, [6.0] * 4)
    f, t = (statistic(of_sine, name)[1] for name in ("F of target", "t"))
    assert f[0] > 1.2 > 0.9 > max(f[2], f[3]) and t[0] < 0.8


def test_local_posteriors_compare_all_subsets_by_bic(problem):
    """Variable 0 on all subsets of the other three, by least squares in numpy."""
    x = not_set(problem)
    x, n = x - x.mean(0), len(x)
    subsets = np.array(list(itertools.product((False, True), repeat=3)))
    pseudo = pseudo_row(problem)
    residual = [
        ridge_residual(x[:, 1:][:, chosen], x[:, 0], np.append(pseudo[0], pseudo[1:][chosen]))
        for chosen in subsets
    ]
    weight = (np.array(residual) / n) ** (-0.5 * n) * n ** (-0.5 * subsets.sum(1))
    found = np.sinh(2 * statistic(problem, "odds")[0, 1:])
    expected = np.log(weight @ subsets / (weight @ ~subsets))
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)


def test_a_parents_regression_carries_over_and_a_childs_breaks():
    """0 -> 1 -> 2: when 0 is set, 1 is what its regression says; when 2 is set, it is not."""
    rng = np.random.default_rng(3)
    values, intervened = rng.normal(size=(200, 3)), np.zeros((200, 3), bool)
    intervened[180:190, 0] = intervened[190:, 2] = True
    values[180:190, 0], end = rng.uniform(2, 3, 10), rng.uniform(2, 3, 10)
    values[:, 1] = values[:, 0] + 0.5 * values[:, 1]
    values[:, 2] = values[:, 1] + 0.5 * values[:, 2]
    values[190:, 2] = end
    problem = make_buffer(values, intervened), make_task(1, [-3.0] * 3, [3.0] * 3)
    broken, slope = statistic(problem, "residual"), statistic(problem, "slope")
    assert broken[1, 2] > 2 * broken[1, 0] and slope[1, 0] > 5 * abs(slope[1, 2])
    np.testing.assert_allclose(statistic(problem, "rows"), np.log1p([[10, 0, 10]] * 3), atol=1e-5)


def test_counts_and_means_of_what_was_done(problem):
    """Far from every other value, the estimate at a grid point is that of the rows there."""
    units, values, sums = summed(*problem)
    done = np.asarray(problem[0].intervened[:, 0])
    x, y = np.asarray(values, float)[done][:, [0, TARGET]].T
    grid = np.asarray(units.grid[0], float)
    distance = (x[:, None] - grid) / (0.5 * (grid[1] - grid[0]) + 0.15)
    near = np.maximum(1 - distance**2 / 7, 0) ** 2
    expected = near.T @ y / (near.sum(0) + 0.3), np.log1p(near.sum(0))
    found = np.asarray(of_effects(Summary(units, sums), problem[1]))[0].T[[1, NUM_ESTIMATES + 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_outliers_and_constant_columns(problem):
    buffer, task = problem
    values = buffer.values.at[5, 0].set(1e6).at[:, 3].set(4.0)
    units, values, sums = summed(make_buffer(values, buffer.intervened), task)
    assert jnp.abs(values).max() <= MAX_DEVIATIONS and not values[:, 3].any()
    for part in (of_pairs(sums, task), of_effects(Summary(units, sums), task)):
        assert bool(jnp.isfinite(part).all())


def quiet_data():
    """Two thousand quiet observations, a wild one among those of variable 0, and experiments on
    variable 1 that move the target, variable 2, far: one further than all others.
    """
    values = 0.01 * np.random.default_rng(4).normal(size=(2004, 3))
    values[7, 0], values[2000:, 2], intervened = 1e3, [1.0, -40.0, 50.0, 400.0], np.zeros((2004, 3))
    intervened[2000:, 1] = values[2000:, 1] = 1.0
    return values, intervened.astype(bool), np.array([[0.0, -1.0, 0.0], [0.0, 2.0, 0.0]])


def units_of(values, intervened, ends):
    return jax.device_get(
        Standardisation.of(make_buffer(values, intervened), make_task(2, *ends), 5)
    )


def test_units_hold_what_experiments_move_and_no_single_outlier():
    values, intervened, ends = quiet_data()
    units = units_of(values, intervened, ends)
    np.testing.assert_allclose(units.observed_std, 0.01, rtol=0.1)
    np.testing.assert_allclose(units.scale.spread, [0.01, 0.4, 5.0], rtol=0.1)
    apart = np.sort(np.abs(values[:, 2] - units.scale.shift[2]) / units.scale.spread[2])
    assert apart[-2] <= MAX_DEVIATIONS + 1e-3 < apart[-1]
    # the wild one is not lost among a few that were observed either
    few = units_of(values[:12], intervened[:12], ends)
    assert few.scale.spread[0] < 0.05


def test_units_follow_those_of_the_data():
    values, intervened, ends = quiet_data()
    factor, offset = np.array([-3.0, 0.01, 700.0]), np.array([1.0, -2.0, 5.0])
    one = units_of(values, intervened, ends)
    other = units_of(values * factor + offset, intervened, ends * factor + offset)
    for name, expected in (
        ("shift", one.scale.shift * factor + offset),
        ("spread", one.scale.spread * np.abs(factor)),
    ):
        np.testing.assert_allclose(getattr(other.scale, name), expected, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(other.observed_std, one.observed_std * np.abs(factor), rtol=1e-3)
    np.testing.assert_allclose(other.grid, one.grid, atol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_a_variable_without_a_range_is_looked_at_around_its_mean(offset):
    """An offset of such a variable once moved its grid, and with it every answer."""
    values = jr.normal(jr.key(0), (20, 3)) + jnp.array([[0.0, offset, -offset]])
    task = make_task(2, [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    grid = Standardisation.of(make_buffer(values, jnp.zeros((20, 3), bool)), task, 5).grid
    assert not grid[1:].any() and grid[0].any()


@pytest.mark.parametrize(
    ("function", "part", "number"),
    [(pair_statistics, "pairs", NUM_PAIR_STATISTICS), (effect_statistics, "effects", 13)],
)
def test_the_tables_of_the_docstrings_count_every_number(problem, function, part, number):
    found = jax.eval_shape(lambda: statistics(*problem, BINS))
    counts = list(map(int, re.findall(r"^    (\d+) ", function.__doc__, flags=re.MULTILINE)))
    assert sum(counts) == number == getattr(found, part).shape[-1]
    assert NUM_EFFECT_STATISTICS == 13 and len(STATISTICS) == 12
