"""Baselines against independent numpy and scipy computations, on easy problems with known answers,
and under padding.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

import lib.baselines
from lib.baselines import all_ones, random_choice
from lib.buffer import ExperienceBuffer
from lib.scm import Task


NUM_VARS, NUM_ROWS = 6, 80
TARGET = jnp.array(2)
# variable 5 may not be set
LOW, HIGH = (
    3.0 - jnp.array([1.0, 2.0, 1.0, 3.0, 1.0, 0.0]),
    3.0 + jnp.array([2.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
)
MASK = jnp.ones(NUM_VARS, bool)
TASK = Task(TARGET, LOW, HIGH, MASK)
absolute_correlation, f_test, f_test_log_p = (
    jax.jit(getattr(lib.baselines, n)) for n in ("absolute_correlation", "f_test", "f_test_log_p")
)
least_squares, additive_ridge = (
    jax.jit(lib.baselines.least_squares),
    jax.jit(lib.baselines.additive_ridge),
)
least_squares_surface = jax.jit(lib.baselines.least_squares_surface, static_argnums=2)
additive_ridge_surface = jax.jit(lib.baselines.additive_ridge_surface, static_argnums=2)


def make_buffer(seed, outcome, rows=NUM_ROWS, valid=NUM_ROWS - 10):
    """Gaussian rows; a few in which variable 0 is set, a few with the target set to nonsense, and
    nonsense in the free places at the end.
    """
    rng = np.random.default_rng(seed)
    mixing = (
        np.eye(NUM_VARS)
        + 0.4 * rng.normal(size=(NUM_VARS, NUM_VARS)) * (1 - np.eye(NUM_VARS)[2])[:, None]
    )
    values = 3.0 + rng.normal(size=(rows, NUM_VARS)) @ mixing
    values[:, 2] = outcome(values, rng.normal(size=rows))
    intervened = np.zeros((rows, NUM_VARS), bool)
    intervened[20:24, 0] = True
    intervened[30:34, 2] = True
    values[30:34, 2] = 1e3
    values[valid:] = -1e3
    return ExperienceBuffer(
        jnp.asarray(values, jnp.float32), jnp.asarray(intervened), jnp.arange(rows) < valid
    )


def linear(x, noise):
    return 2.0 * x[:, 3] - 1.0 * x[:, 0] + 0.5 * noise


def cubic(x, noise):
    return 2 * (x[:, 1] - 3) ** 2 + 0.3 * x[:, 4] + 0.5 * noise


def used(buffer):
    rows = np.asarray(buffer.valid & ~buffer.intervened[:, 2])
    return np.asarray(buffer.values, float)[rows]


def test_random_choice_is_uniform():
    variable, value = jax.vmap(lambda key: random_choice(key, TASK))(jr.split(jr.key(0), 4000))
    counts = np.bincount(np.asarray(variable), minlength=NUM_VARS)
    assert counts[2] == counts[5] == 0
    assert scipy.stats.chisquare(counts[[0, 1, 3, 4]]).pvalue > 1e-4
    for i in (0, 1, 3, 4):
        assert (
            scipy.stats.kstest(
                np.asarray(value)[np.asarray(variable) == i], "uniform", (LOW[i], HIGH[i] - LOW[i])
            ).pvalue
            > 1e-4
        )


def test_least_squares_agrees_with_lstsq():
    buffer = make_buffer(0, linear)
    x = used(buffer)
    regressors = np.delete(x, 2, 1)
    solution = np.linalg.lstsq(np.column_stack([np.ones(len(x)), regressors]), x[:, 2], rcond=None)[
        0
    ]
    slopes = np.insert(solution[1:], 2, 0.0)
    surface = np.asarray(least_squares_surface(buffer, TASK, 2))
    expected = x[:, 2].mean() + slopes[:, None] * (np.stack([LOW, HIGH], 1) - x.mean(0)[:, None])
    np.testing.assert_allclose(surface, expected, atol=5e-3)
    variable, value = least_squares(buffer, TASK)
    assert (int(variable), float(value)) == (3, 0.0)


def test_candidates_are_respected():
    buffer = make_buffer(0, linear)
    variable, value = least_squares(
        buffer, eqx.tree_at(lambda t: t.high, TASK, HIGH.at[3].set(LOW[3]))
    )
    assert (int(variable), float(value)) == (0, 5.0)


def test_additive_ridge_finds_the_bottom_of_a_parabola():
    buffer = make_buffer(1, cubic)
    variable, value = additive_ridge(buffer, TASK)
    assert int(variable) == 1 and abs(float(value) - 3.0) < 0.1
    surface = additive_ridge_surface(buffer, TASK, 33)
    grid = np.linspace(LOW[1], HIGH[1], 33)
    error = np.asarray(surface[1]) - 2 * (grid - 3.0) ** 2
    assert np.ptp(error) < 0.3  # the right shape up to a constant


def numpy_f_test(buffer):
    """log p of every variable's powers 1 to 3 by two explicit least-squares fits in double
    precision.
    """
    x = used(buffer)
    z = (x - x.mean(0)) / x.std(0)
    columns = {
        j: np.stack([z[:, j], z[:, j] ** 2, z[:, j] ** 3], 1) for j in range(NUM_VARS) if j != 2
    }

    def residual(included):
        design = np.concatenate([np.ones((len(x), 1)), *(columns[j] for j in included)], 1)
        return np.square(x[:, 2] - design @ np.linalg.lstsq(design, x[:, 2], rcond=None)[0]).sum()

    freedom = len(x) - 1 - 3 * len(columns)
    full = residual(columns)
    log_p = np.zeros(NUM_VARS)
    for j in columns:
        statistic = (residual([i for i in columns if i != j]) - full) / 3 / (full / freedom)
        log_p[j] = scipy.stats.f.logsf(statistic, 3, freedom)
    return log_p


@pytest.mark.parametrize(
    "outcome",
    [linear, cubic, lambda x, noise: 1e4 + 50 * noise, lambda x, noise: 0.3 * x[:, 0] + noise],
)
def test_f_test_agrees_with_two_explicit_fits(outcome):
    buffer = make_buffer(3, outcome)
    expected, got = numpy_f_test(buffer), np.asarray(f_test_log_p(buffer, TASK))
    np.testing.assert_allclose(got, expected, rtol=5e-3, atol=5e-3)


def test_f_test_keeps_its_resolution_beyond_float32():
    """With a hundred and more rows p-values fall below 1e-38; their logarithms still have the right
    order and size.
    """
    buffer = make_buffer(4, lambda x, noise: 2.0 * x[:, 3] - 1.0 * x[:, 0] + 0.02 * noise)
    expected, got = numpy_f_test(buffer), np.asarray(f_test_log_p(buffer, TASK))
    assert expected[3] < expected[0] < -100
    np.testing.assert_allclose(got[jnp.array([0, 3])], expected[[0, 3]], rtol=2e-2)
    score = f_test(buffer, TASK)
    assert score[3] > score[0] > 6 / 7 > score[1]
    s = -expected[3] / np.log(10)
    np.testing.assert_allclose(score[3], s / (1 + s), atol=1e-3)


def test_f_test_degrees_of_freedom():
    buffer = make_buffer(5, linear)
    # Two-valued, constant and copied variables: one degree of freedom, none, and nothing to add.
    binary = jnp.where(buffer.valid[:, None], jnp.sign(buffer.values[:, 3:4] - 3.0), 0.0)
    altered = ExperienceBuffer(
        jnp.concatenate(
            [buffer.values[:, :3], binary, 7.0 * jnp.ones((NUM_ROWS, 1)), buffer.values[:, :1]], 1
        ),
        buffer.intervened,
        buffer.valid,
    )
    got = np.asarray(f_test_log_p(altered, TASK))
    x = used(altered)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1.0)
    powers = np.concatenate(
        [np.ones((len(x), 1)), *(z[:, j : j + 1] ** p for j in (0, 1) for p in (1, 2, 3))], 1
    )
    residuals = [
        np.square(x[:, 2] - d @ np.linalg.lstsq(d, x[:, 2], rcond=None)[0]).sum()
        for d in (powers, np.column_stack([powers, z[:, 3]]))
    ]
    # 3 + 3 + 1 + 0, and 3 for the copy, which are counted although it adds nothing
    freedom = len(x) - 1 - 10
    statistic = (residuals[0] - residuals[1]) / (residuals[1] / freedom)
    np.testing.assert_allclose(got[3], scipy.stats.f.logsf(statistic, 1, freedom), rtol=5e-3)
    assert got[4] == 0.0
    # either copy can be left out
    assert np.all(np.isfinite(got)) and got[5] > -0.05 and got[0] > -0.05


@pytest.mark.parametrize("rows", [0, 1, 2, 12, 16])
def test_few_rows_are_no_evidence(rows):
    buffer = make_buffer(6, linear)
    few = ExperienceBuffer(buffer.values, buffer.intervened, jnp.arange(NUM_ROWS) < rows)
    # 15 powers and an intercept leave no residual
    assert jnp.all(f_test_log_p(few, TASK) == 0)
    assert jnp.isfinite(absolute_correlation(few, TASK)).all()
    assert jnp.isfinite(least_squares_surface(few, TASK, 2)).all()
    assert jnp.isfinite(additive_ridge_surface(few, TASK, 33)).all()


def test_f_test_is_calibrated_on_noise():
    def p_value(key):
        values = jr.normal(key, (NUM_ROWS, NUM_VARS))
        free = jnp.zeros_like(values, bool)
        buffer = ExperienceBuffer(values, free, jnp.ones(NUM_ROWS, bool))
        return jnp.exp(f_test_log_p(buffer, TASK))

    p = np.asarray(jax.jit(jax.vmap(p_value))(jr.split(jr.key(1), 400)))[:, [0, 1, 3, 4, 5]]
    assert scipy.stats.kstest(p.ravel(), "uniform").pvalue > 1e-3


def test_scores_name_the_parents():
    buffer = make_buffer(12, linear)
    assert set(np.argsort(f_test(buffer, TASK))[-2:].tolist()) == {0, 3}
    np.testing.assert_array_equal(all_ones(buffer, TASK), [1, 1, 0, 1, 1, 1])
    correlation = np.corrcoef(used(buffer), rowvar=False)[2]
    correlation[2] = 0
    np.testing.assert_allclose(absolute_correlation(buffer, TASK), np.abs(correlation), atol=1e-5)


def test_padding_changes_nothing():
    buffer = make_buffer(8, cubic)
    wide, task = buffer.widen(2), TASK.widen(2)
    for score in (all_ones, absolute_correlation, f_test):
        a, b = score(buffer, TASK), score(wide, task)
        np.testing.assert_allclose(b[:NUM_VARS], a, atol=1e-4)
        assert jnp.all(b[NUM_VARS:] == 0) and b[2] == 0 and jnp.all((b >= 0) & (b <= 1))
    for surface, rule in (
        (least_squares_surface, least_squares),
        (additive_ridge_surface, additive_ridge),
    ):
        np.testing.assert_allclose(
            surface(wide, task, 2)[:NUM_VARS], surface(buffer, TASK, 2), rtol=1e-4, atol=1e-4
        )
        assert all(map(jnp.array_equal, rule(buffer, TASK), rule(wide, task)))


def test_vmap_over_problems():
    buffers = [make_buffer(s, linear) for s in (9, 10)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *buffers)
    variable, value = jax.vmap(lambda b: additive_ridge(b, TASK))(batch)
    scores = jax.vmap(lambda b: f_test(b, TASK))(batch)
    for i, buffer in enumerate(buffers):
        alone = additive_ridge(buffer, TASK)
        assert variable[i] == alone[0] and value[i] == alone[1]
        np.testing.assert_allclose(scores[i], f_test(buffer, TASK), atol=1e-4)
