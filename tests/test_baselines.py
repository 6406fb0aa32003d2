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
absolute_correlation, f_test, least_squares, additive_ridge = (
    jax.jit(getattr(lib.baselines, name))
    for name in ("absolute_correlation", "f_test", "least_squares", "additive_ridge")
)
surfaces = jax.jit(lib.baselines.surfaces, static_argnums=2)


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


def of_target(buffer):
    """Mean and standard deviation of the target over the observational rows."""
    y = np.asarray(buffer.values[buffer.observational, 2], float)
    return y.mean(), y.std()


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
    mean, std = of_target(buffer)
    found = mean + std * surfaces(buffer, TASK, 2)[0]
    # where nothing can be set, both ends are the mean
    np.testing.assert_allclose(found[:5], expected[:5], atol=5e-3)
    # and where the best variable may not be set, another one is
    narrow = Task(TASK.target, LOW, HIGH.at[3].set(LOW[3]), TASK.var_mask)
    for task, choice in ((TASK, (3, 0.0)), (narrow, (0, 5.0))):
        assert tuple(map(float, least_squares(buffer, task))) == choice


def test_additive_ridge_finds_the_bottom_of_a_parabola():
    buffer = make_buffer(1, cubic)
    variable, value = additive_ridge(buffer, TASK)
    assert int(variable) == 1 and abs(float(value) - 3.0) < 0.1
    grid = np.linspace(LOW[1], HIGH[1], 33)
    error = of_target(buffer)[1] * surfaces(buffer, TASK, 33)[1][1] - 2 * (grid - 3.0) ** 2
    assert np.ptp(np.asarray(error)) < 0.3  # the right shape up to a constant


def misfit(powers, y, included):
    """What a ridge regression in double precision minimises, with powers 1 to 3 of the `included`
    variables, each of norm one about its mean.
    """
    columns = [powers[:, j] ** p for j in included for p in (1, 2, 3)]
    design = np.stack([(c - c.mean()) / np.linalg.norm(c - c.mean()) for c in columns], 1)
    design = np.concatenate([design, np.sqrt(1e-3) * np.eye(len(columns))])
    y = np.append(y - y.mean(), np.zeros(len(columns)))
    return np.square(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).sum()


@pytest.mark.parametrize(
    "outcome",
    [linear, cubic, lambda x, noise: 1e4 + 50 * noise, lambda x, noise: 0.3 * x[:, 0] + noise],
)
def test_f_test_agrees_with_two_explicit_fits(outcome):
    buffer = make_buffer(3, outcome)
    x, variables = used(buffer), [j for j in range(NUM_VARS) if j != 2]
    # about the middle of each range; variable 5 has none
    u = x - np.append(
        0.5 * (LOW + HIGH)[:5], np.asarray(buffer.values[buffer.observational, 5]).mean()
    )
    full, score = misfit(u, x[:, 2], variables), f_test(buffer, TASK)
    for j in variables:
        without = misfit(u, x[:, 2], [i for i in variables if i != j])
        # all variables count for the freedom, the target too
        f = (without - full) / full * (len(x) - 3 * NUM_VARS) / 3
        np.testing.assert_allclose(score[j], 1 - 1 / np.sqrt(1 + f), atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 2, 12, 16])
def test_few_rows_give_finite_numbers(rows):
    few = eqx.tree_at(lambda b: b.valid, make_buffer(6, linear), jnp.arange(NUM_ROWS) < rows)
    score = f_test(few, TASK)
    assert jnp.all((score >= 0) & (score < 1)) and (rows > 1 or jnp.all(score == 0))
    for found in (absolute_correlation(few, TASK), *surfaces(few, TASK, 33)):
        assert jnp.isfinite(found).all()


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
    for narrow, padded in zip(surfaces(buffer, TASK, 2), surfaces(wide, task, 2), strict=True):
        np.testing.assert_allclose(padded[:NUM_VARS], narrow, rtol=1e-4, atol=1e-4)
    for rule in (least_squares, additive_ridge):
        assert all(map(jnp.array_equal, rule(buffer, TASK), rule(wide, task)))


def test_vmap_over_problems():
    buffers = [make_buffer(s, linear) for s in (9, 10)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *buffers)
    both = jax.vmap(lambda b: (*additive_ridge(b, TASK), f_test(b, TASK)))(batch)
    for variable, value, scores, buffer in zip(*both, buffers, strict=True):
        assert additive_ridge(buffer, TASK) == (variable, value)
        np.testing.assert_allclose(scores, f_test(buffer, TASK), atol=1e-4)
