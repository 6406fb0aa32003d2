"""The prior over parent sets: on systems with known parents, under renaming and padding, and its
parts against numpy and scipy.
"""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

from lib import expert_prior
from lib.regression import Scale
from lib.scm import Task
from studies import published


ROWS, REAL, SLOTS, BOOTSTRAPS = 300, 5, 8, 6
PERMUTATION = np.array([3, 0, 4, 2, 1])  # new variable j is old variable PERMUTATION[j]
NEW_NAMES = np.argsort(PERMUTATION).tolist()


def zscores(columns):
    return (columns - columns.mean(0)) / columns.std(0)


def make_rows(seed, outcome):
    """Variable 2 is the target; 0 and 1 are roots, 3 is a noisy copy of 0, 4 has nothing to do with
    anyone. Units differ.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, REAL))
    x[:, 3] = 0.8 * x[:, 0] + 0.6 * x[:, 3]
    x[:, 2] = outcome(x, x[:, 2])
    return x * np.array([1.0, 10.0, 3.0, 0.1, 1.0]) + np.array([0.0, 5.0, -1.0, 0.0, 100.0])


SYSTEMS = {
    "linear": make_rows(0, lambda x, noise: 1.5 * x[:, 0] - x[:, 1] + 0.5 * noise),
    "square": make_rows(1, lambda x, noise: x[:, 1] ** 2 + 0.3 * noise),
    "nothing": make_rows(2, lambda x, noise: noise),
}


NUM_FEATURES = 20


@jax.jit
@jax.vmap
def bootstrapped(rows, target, var_mask):
    """The frequencies alone, which the published prior is."""
    task = Task(target, *jnp.zeros((2, len(var_mask))), var_mask)
    return published.bootstrap_prior(jr.key(5), rows, task, BOOTSTRAPS, NUM_FEATURES)


def priors(systems, targets, slots=REAL):
    """Sets and probabilities of several data sets at once, all with the same key."""
    rows = np.pad(np.stack(systems), ((0, 0), (0, 0), (0, slots - REAL)))
    mask = np.broadcast_to(np.arange(slots) < REAL, (len(systems), slots))
    sets, log_probs = bootstrapped(
        jnp.asarray(rows, jnp.float32), jnp.asarray(targets), jnp.asarray(mask)
    )
    return np.asarray(sets), np.exp(np.asarray(log_probs, float))


@pytest.fixture(scope="module")
def found():
    """By name: every system, and the linear one with its variables renamed."""
    systems = [*SYSTEMS.values(), SYSTEMS["linear"][:, PERMUTATION]]
    sets, probs = priors(systems, [2, 2, 2, NEW_NAMES[2]])
    return {name: (sets[i], probs[i]) for i, name in enumerate([*SYSTEMS, "renamed"])}


def members(sets, probs):
    return {
        frozenset(np.flatnonzero(s).tolist()): float(p)
        for s, p in zip(sets, probs, strict=True)
        if p > 0
    }


def test_probabilities_are_bootstrap_frequencies_of_sets_without_the_target(found):
    for name, (sets, probs) in found.items():
        assert sets.shape == (max(BOOTSTRAPS, REAL), REAL) and probs.shape == sets.shape[:1]
        np.testing.assert_allclose(probs.sum(), 1.0, atol=1e-5)
        assert len(members(sets, probs)) == (probs > 0).sum()  # no set twice
        assert not sets[probs > 0][:, NEW_NAMES[2] if name == "renamed" else 2].any()
        if name != "nothing":
            counts = probs * BOOTSTRAPS
            np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)


def test_many_rows_of_a_linear_system_give_its_parents(found):
    assert members(*found["linear"])[frozenset({0, 1})] > 0.6


def test_an_effect_without_correlation_is_found(found):
    sets, probs = found["square"]
    assert probs @ sets[:, 1] == pytest.approx(1.0, abs=1e-5)
    assert max(members(sets, probs), key=members(sets, probs).__getitem__) == frozenset({1})


def test_without_any_effect_single_variables_are_equally_probable(found):
    single = members(*found["nothing"])
    assert set(single) == {frozenset({i}) for i in (0, 1, 3, 4)}
    np.testing.assert_allclose(list(single.values()), 0.25, atol=1e-5)


def test_renaming_variables_renames_the_sets(found):
    """Random features are drawn per name, so this holds where the evidence is strong, not digit by
    digit.
    """
    old, new = members(*found["linear"]), members(*found["renamed"])
    renamed = {frozenset(NEW_NAMES[i] for i in s): p for s, p in old.items()}
    best = max(renamed, key=renamed.__getitem__)
    assert max(new, key=new.__getitem__) == best
    assert abs(new[best] - renamed[best]) <= 0.34


def test_padding_changes_nothing(found):
    sets, probs = priors(list(SYSTEMS.values()), [2, 2, 2], SLOTS)
    assert sets.shape == (len(SYSTEMS), max(BOOTSTRAPS, SLOTS), SLOTS)
    for i, name in enumerate(SYSTEMS):
        padded, plain = members(sets[i], probs[i]), members(*found[name])
        assert set(padded) == set(plain)
        assert all(abs(padded[s] - plain[s]) < 1e-5 for s in plain)


# --- the parts ---


def test_standardise():
    rows = np.random.default_rng(0).normal(3.0, 5.0, (40, 3)).astype(np.float32)
    rows[:, 1] = 0.1  # whose mean need not be a tenth
    result = Scale.of(jnp.asarray(rows))(jnp.asarray(rows))
    expected = (rows - rows.mean(0)) / [rows[:, 0].std(), 1.0, rows[:, 2].std()]
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert (result[:, 1] == 0).all()


def test_residuals_are_held_out(monkeypatch):
    """With the Fourier features penalised away each fold's prediction is a ridge regression on the
    drawn rows of the others, once per bootstrap.
    """
    rows, rng, key = 23, np.random.default_rng(3), jr.key(4)
    x = zscores(rng.normal(size=(rows, 3)))
    y = zscores(x @ np.array([1.0, -0.5, 0.0]) + 0.3 * rng.normal(size=rows))

    def residuals(penalty):
        monkeypatch.setattr(expert_prior, "FOURIER_PENALTY", penalty)
        run = jax.jit(lambda x, y: expert_prior.residual_products(key, x, y, 2, 4))
        return (
            np.asarray(a) for a in run(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
        )

    full, without, counts = residuals(1e6)
    assert full.shape == counts.shape == (2, 25) and without.shape == (3, 2, 25)
    # the rows that fill up the last fold were never drawn
    assert (counts.sum(1) == rows).all() and (counts[:, rows:] == 0).all()
    order = np.asarray(jr.permutation(jr.split(jr.split(key)[1])[0], rows))
    x, y, fold = x[order], y[order], np.arange(rows) // 5

    def squared_residuals(columns, weights):
        phi, result = np.column_stack([np.ones(rows), x[:, columns]]), np.zeros(rows)
        ridge = rows * expert_prior.AFFINE_PENALTY * np.eye(phi.shape[1])
        for f in range(expert_prior.NUM_FOLDS):
            train, held_out = np.where(fold == f, 0.0, weights), fold == f
            gram, moment = phi.T @ (train[:, None] * phi) + ridge, phi.T @ (train * y)
            result[held_out] = (y - phi @ np.linalg.solve(gram, moment))[held_out]
        return result**2

    kept = [0, 1, 2], [1, 2], [0, 2], [0, 1]
    for columns, found in zip(kept, [full, *without], strict=True):
        for b in range(2):
            expected = squared_residuals(columns, counts[b, :rows])
            np.testing.assert_allclose(found[b, :rows], expected, atol=2e-3)
    products, *_ = residuals(0.01)
    assert (products < 0).any()  # with Fourier features the two nuisances differ: no squares


def test_p_values_agree_with_a_paired_t_test():
    rng = np.random.default_rng(5)
    full, counts = rng.normal(size=(2, 30)), rng.integers(0, 4, (2, 30))
    without = full[None] + rng.normal(
        np.array([0.4, 0.1, -0.4, 0.0])[:, None, None], 1.0, (4, 2, 30)
    )
    without[3] = full  # leaving this one out changes nothing
    arguments = (jnp.asarray(a, jnp.float32) for a in (full, without, counts))
    p_values = np.asarray(jax.jit(expert_prior.increase_p_values)(*arguments))
    assert p_values.shape == (2, 4) and (p_values[:, 3] == 1).all()
    for b in range(2):
        for i in range(3):
            expanded = np.repeat((without[i] - full)[b], counts[b])
            t = expanded.mean() / (expanded.std(ddof=1) / np.sqrt(expanded.size))
            expected = 2 * scipy.stats.t.sf(t, expanded.size - 1) if t > 0 else 1.0
            np.testing.assert_allclose(p_values[b, i], expected, atol=1e-4)
    assert p_values[:, 0].min() < 0.01 and (p_values[:, 2] == 1).all()


def test_selection_agrees_with_scipy():
    rng = np.random.default_rng(6)
    select = jax.jit(jax.vmap(expert_prior.benjamini_yekutieli))
    p_values, real = rng.uniform(size=(64, 6)) ** 4, rng.uniform(size=(64, 6)) < 0.7
    selected = np.asarray(select(jnp.asarray(p_values, jnp.float32), jnp.asarray(real)))
    for p, r, chosen in zip(p_values, real, selected, strict=True):
        assert not chosen[~r].any()
        if r.any():
            adjusted = scipy.stats.false_discovery_control(p[r], method="by")
            assert (chosen[r] == (adjusted <= expert_prior.FALSE_DISCOVERIES)).all()
    assert 50 < selected.sum() < real.sum() - 50


SOME = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
COUNTED = {frozenset({0}): 0.5, frozenset({0, 1}): 0.25}
SINGLE = {frozenset({i}): 1 / 3 for i in (0, 1, 3)}


@pytest.mark.parametrize(
    "selected,drop_empty,expected",
    [
        (SOME, False, COUNTED | {frozenset(): 0.25}),
        (SOME, True, COUNTED),  # the published code does not renormalise
        (np.zeros((2, 4), bool), False, SINGLE),
        (np.zeros((2, 4), bool), True, SINGLE),
    ],
)
def test_equal_selections_are_counted_and_single_variables_stand_in_for_none(
    selected, drop_empty, expected
):
    real = jnp.array([True, True, False, True])
    sets, frequencies = expert_prior.set_frequencies(jnp.asarray(selected), real)
    log_probs = jnp.log(frequencies)
    if drop_empty:
        log_probs = published.without_empty(sets, log_probs)
    assert sets.shape == (4, 4)  # at least as many sets as variables
    assert members(np.asarray(sets), np.exp(np.asarray(log_probs))) == pytest.approx(expected)


def test_the_union_adds_every_subset_of_the_variables_selected_most_often():
    """Half of the probability stays with the frequencies, the other half is a product over the four
    variables.
    """
    selected = np.zeros((10, 6), bool)
    # {0, 1} twice, {0, 1, 4}, {0, 4}, {0} twice, {} four times
    selected[:6, 0] = selected[:3, 1] = selected[2:4, 4] = True
    real = np.arange(6) != 2
    # 3 before 5, which nobody selected either
    p_values = np.where(np.arange(6) == 3, 0.4, 0.9) * np.ones((10, 1))
    given = (jnp.asarray(a) for a in (selected, p_values, real))
    sets, log_probs = expert_prior.with_union(*given)
    found = members(np.asarray(sets), np.exp(np.asarray(log_probs, float)))
    inside = {0: 6.5 / 11, 1: 3.5 / 11, 4: 2.5 / 11, 3: 0.5 / 11}
    counted = {
        frozenset({0, 1}): 0.2,
        frozenset({0, 1, 4}): 0.1,
        frozenset({0, 4}): 0.1,
        frozenset({0}): 0.2,
        frozenset(): 0.4,
    }
    expected = {}
    for flags in itertools.product([False, True], repeat=4):
        chosen = frozenset(itertools.compress(inside, flags))
        product = np.prod([p if i in chosen else 1 - p for i, p in inside.items()])
        expected[chosen] = 0.5 * product + 0.5 * counted.get(chosen, 0.0)
    assert found == pytest.approx(expected, rel=1e-4)
