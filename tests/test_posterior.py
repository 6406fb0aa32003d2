"""Distributions over parent sets on hand-made cases."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lib.posterior import ParentSetPosterior


SETS = jnp.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)


def make(probabilities, sets=SETS):
    with np.errstate(divide="ignore"):
        log_probs = jnp.asarray(np.log(np.asarray(probabilities, np.float32)))
    return ParentSetPosterior(jnp.array(2), sets, log_probs)


def test_marginals_agree_with_a_sum_over_sets():
    sets = jr.bernoulli(jr.key(0), 0.4, (16, 7))
    probabilities = np.random.default_rng(0).dirichlet(np.ones(16))
    expected = [
        sum(p for p, members in zip(probabilities, np.asarray(sets), strict=True) if members[i])
        for i in range(7)
    ]
    np.testing.assert_allclose(make(probabilities, sets).marginals(), expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_entropy_of_a_uniform_distribution_is_its_log_in_nats(count):
    entropy = make([1 / count] * count + [0.0] * (4 - count)).entropy()
    np.testing.assert_allclose(entropy, np.log(count), atol=1e-6)


def test_top_k_is_sorted_and_not_renormalised():
    top = make([0.1, 0.4, 0.2, 0.3]).top_k(2)
    assert (top.sets == SETS[jnp.array([1, 3])]).all()
    np.testing.assert_allclose(top.probs, [0.4, 0.3], atol=1e-6)


@pytest.mark.parametrize(
    ("probabilities", "listed", "members", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3], [False, True, False], np.log(0.3)),
        ([0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3], [False, False, True], -np.inf),
        ([0.25, 0.75], [1, 1], [True, False, False], 0.0),  # listed twice, it counts twice
    ],
)
def test_log_prob_of_a_set(probabilities, listed, members, expected):
    found = make(probabilities, SETS[jnp.array(listed)]).log_prob(jnp.array(members))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_to_dict_names_sets_and_drops_unused_places():
    named = make([0.1, 0.0, 0.2, 0.7]).to_dict(("a", "b", "y"))
    assert list(named) == [frozenset("ab"), frozenset("b"), frozenset()]
    np.testing.assert_allclose(list(named.values()), [0.7, 0.2, 0.1], atol=1e-6)
