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


NUM_VARS, NUM_ROWS, NUM_FILLED = 6, 80, 70
# variable 5 may not be set
LOW, HIGH = (
    3.0 - jnp.array([1.0, 2.0, 1.0, 3.0, 1.0, 0.0]),
    3.0 + jnp.array([2.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
)
TASK = Task(jnp.array(2), LOW, HIGH, jnp.ones(NUM_VARS, bool))
absolute_correlation, f_test, f_test_log_p, least_squares, additive_ridge = (
    jax.jit(getattr(lib.baselines, name))
    for name in (
        "absolute_correlation",
        "f_test",
        "f_test_log_p",
        "least_squares",
        "additive_ridge",
    )
)
least_squares_surface, additive_ridge_surface = (
    jax.jit(getattr(lib.baselines, name), static_argnums=2)
    for name in ("least_squares_surface", "additive_ridge_surface")
)


def make_buffer(seed, outcome):
    """Gaussian rows; a few in which variable 0 is set, a few with the target set to nonsense, and
    nonsense in the free places at the end.
    """
    rng = np.random.default_rng(seed)
    others = 1 - np.eye(NUM_VARS)[2]
    mixing = np.eye(NUM_VARS) + 0.4 * rng.normal(size=(NUM_VARS, NUM_VARS)) * others[:, None]
    values = 3.0 + rng.normal(size=(NUM_ROWS, NUM_VARS)) @ mixing
    values[:, 2] = outcome(values, rng.normal(size=NUM_ROWS))
    intervened = np.zeros((NUM_ROWS, NUM_VARS), bool)
    intervened[20:24, 0] = intervened[30:34, 2] = True
    values[30:34, 2] = 1e3
    values[NUM_FILLED:] = -1e3
    filled = jnp.arange(NUM_ROWS) < NUM_FILLED
    return ExperienceBuffer(jnp.asarray(values, jnp.float32), jnp.asarray(intervened), filled)


def linear(x, noise):
    return 2.0 * x[:, 3] - 1.0 * x[:, 0] + 0.5 * noise


def cubic(x, noise):
    return 2 * (x[:, 1] - 3) ** 2 + 0.3 * x[:, 4] + 0.5 * noise


def used(buffer):
    return np.asarray(buffer.values, float)[np.asarray(buffer.valid & ~buffer.intervened[:, 2])]


def test_random_choice_is_uniform():
    choices = jax.vmap(lambda key: random_choice(key, TASK))(jr.split(jr.key(0), 4000))
    variable, value = map(np.asarray, choices)
    drawn, counts = np.unique(variable, return_counts=True)
    assert drawn.tolist() == [0, 1, 3, 4] and scipy.stats.chisquare(counts).pvalue > 1e-4
    for i in drawn:
        span = LOW[i], HIGH[i] - LOW[i]
        assert scipy.stats.kstest(value[variable == i], "uniform", span).pvalue > 1e-4


def test_least_squares_agrees_with_lstsq():
    buffer = make_buffer(0, linear)
    x = used(buffer)
    design = np.column_stack([np.ones(len(x)), np.delete(x, 2, 1)])
    slopes = np.insert(np.linalg.lstsq(design, x[:, 2], rcond=None)[0][1:], 2, 0.0)
    expected = x[:, 2].mean() + slopes[:, None] * (np.stack([LOW, HIGH], 1) - x.mean(0)[:, None])
    np.testing.assert_allclose(least_squares_surface(buffer, TASK, 2), expected, atol=5e-3)
    # and where the best variable may not be set, another one is
    narrow = Task(TASK.target, LOW, HIGH.at[3].set(LOW[3]), TASK.var_mask)
    for task, choice in ((TASK, (3, 0.0)), (narrow, (0, 5.0))):
        assert tuple(map(float, least_squares(buffer, task))) == choice


def test_additive_ridge_finds_the_bottom_of_a_parabola():
    buffer = make_buffer(1, cubic)
    variable, value = additive_ridge(buffer, TASK)
    assert int(variable) == 1 and abs(float(value) - 3.0) < 0.1
    grid = np.linspace(LOW[1], HIGH[1], 33)
    error = additive_ridge_surface(buffer, TASK, 33)[1] - 2 * (grid - 3.0) ** 2
    assert np.ptp(np.asarray(error)) < 0.3  # the right shape up to a constant


def residual(design, y):
    """The residual sum of squares of an explicit least-squares fit in double precision."""
    return np.square(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).sum()


def powers(x, included):
    """An intercept and powers 1 to 3 of standardised variables."""
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1.0)
    return np.column_stack([np.ones(len(x)), *(z[:, j] ** p for j in included for p in (1, 2, 3))])


def numpy_f_test(buffer):
    """log p of every variable's powers 1 to 3 by two explicit fits."""
    x, variables = used(buffer), [j for j in range(NUM_VARS) if j != 2]
    freedom, full = len(x) - 1 - 3 * len(variables), residual(powers(x, variables), x[:, 2])
    log_p = np.zeros(NUM_VARS)
    for j in variables:
        without = residual(powers(x, [i for i in variables if i != j]), x[:, 2])
        log_p[j] = scipy.stats.f.logsf((without - full) / 3 / (full / freedom), 3, freedom)
    return log_p


@pytest.mark.parametrize(
    "outcome",
    [linear, cubic, lambda x, noise: 1e4 + 50 * noise, lambda x, noise: 0.3 * x[:, 0] + noise],
)
def test_f_test_agrees_with_two_explicit_fits(outcome):
    buffer = make_buffer(3, outcome)
    found = f_test_log_p(buffer, TASK)
    np.testing.assert_allclose(found, numpy_f_test(buffer), rtol=5e-3, atol=5e-3)


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
    binary = jnp.where(buffer.valid, jnp.sign(buffer.values[:, 3] - 3.0), 0.0)
    columns = *buffer.values.T[:3], binary, jnp.full(NUM_ROWS, 7.0), buffer.values[:, 0]
    altered = ExperienceBuffer(jnp.stack(columns, 1), buffer.intervened, buffer.valid)
    got, x = np.asarray(f_test_log_p(altered, TASK)), used(altered)
    without = powers(x, (0, 1))
    rest, full = (residual(d, x[:, 2]) for d in (without, np.column_stack([without, x[:, 3]])))
    # 3 + 3 + 1 + 0, and 3 for the copy, which are counted although it adds nothing
    freedom = len(x) - 1 - 10
    expected = scipy.stats.f.logsf((rest - full) / (full / freedom), 1, freedom)
    np.testing.assert_allclose(got[3], expected, rtol=5e-3)
    # either copy can be left out
    assert np.isfinite(got).all() and got[4] == 0.0 and got[5] > -0.05 and got[0] > -0.05


@pytest.mark.parametrize("rows", [0, 1, 2, 12, 16])
def test_few_rows_are_no_evidence(rows):
    few = eqx.tree_at(lambda b: b.valid, make_buffer(6, linear), jnp.arange(NUM_ROWS) < rows)
    # 15 powers and an intercept leave no residual
    assert jnp.all(f_test_log_p(few, TASK) == 0)
    surfaces = least_squares_surface(few, TASK, 2), additive_ridge_surface(few, TASK, 33)
    for found in (absolute_correlation(few, TASK), *surfaces):
        assert jnp.isfinite(found).all()


def test_f_test_is_calibrated_on_noise():
    def p_value(key):
        values = jr.normal(key, (NUM_ROWS, NUM_VARS))
        buffer = ExperienceBuffer(values, jnp.zeros_like(values, bool), jnp.ones(NUM_ROWS, bool))
        return jnp.exp(f_test_log_p(buffer, TASK))

    p = np.asarray(jax.jit(jax.vmap(p_value))(jr.split(jr.key(1), 400)))[:, [0, 1, 3, 4, 5]]
    assert scipy.stats.kstest(p.ravel(), "uniform").pvalue > 1e-3


def test_scores_name_the_parents():
    buffer = make_buffer(12, linear)
    assert set(np.argsort(f_test(buffer, TASK))[-2:].tolist()) == {0, 3}
    np.testing.assert_array_equal(all_ones(buffer, TASK), [1, 1, 0, 1, 1, 1])
    correlation = np.abs(np.corrcoef(used(buffer), rowvar=False)[2]) * [1, 1, 0, 1, 1, 1]
    np.testing.assert_allclose(absolute_correlation(buffer, TASK), correlation, atol=1e-5)


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
    both = jax.vmap(lambda b: (*additive_ridge(b, TASK), f_test(b, TASK)))(batch)
    for variable, value, scores, buffer in zip(*both, buffers, strict=True):
        assert additive_ridge(buffer, TASK) == (variable, value)
        np.testing.assert_allclose(scores, f_test(buffer, TASK), atol=1e-4)
