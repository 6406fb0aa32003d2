"""The enumerated posterior: every graph once, their prior in closed form, an integral by
quadrature, and calibration on systems from its prior.
"""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import networkx as nx
import numpy as np
import pytest

from lib.problems import DataDesign, draw_problem
from lib.scm_prior import SCMPrior
from studies import enumeration


PRIOR = SCMPrior(
    max_vars=3, min_size=3, max_size=3, families=("erdos_renyi",), mechanisms=("linear",)
)


@pytest.mark.parametrize("num_vars, count", [(2, 3), (3, 25), (4, 543)])
def test_every_dag_once(num_vars, count):
    graphs = enumeration.enumerate_dags(num_vars)
    assert len(graphs) == count == len({graph.tobytes() for graph in graphs})
    assert all(nx.is_directed_acyclic_graph(nx.DiGraph(graph)) for graph in graphs)


def test_graph_prior_of_erdos_renyi():
    """Three variables: the share of the six orders that a graph agrees with, times its probability
    in one, over the uniform density.

    Where no edge was drawn, the first two of the order get one.
    """
    graphs, orders = enumeration.enumerate_dags(3), list(itertools.permutations(range(3)))
    density = np.linspace(0.15, 0.5, 2001)
    edges = graphs.sum((1, 2))
    of_order = (density[:, None] ** edges * (1 - density[:, None]) ** (3 - edges)).mean(0)
    agree = sum(~np.tril(graphs[:, order][:, :, order]).any((1, 2)) for order in orders)
    of_empty = np.where(edges == 1, of_order[edges == 0].sum() / 6, 0.0)
    expected = np.where(edges == 0, 0.0, of_order * agree / 6) + of_empty
    probs = np.exp(enumeration.log_graph_prior(3, PRIOR))
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(probs, expected, atol=5 * np.sqrt(0.25 / 400_000))


def test_evidence_by_quadrature():
    """One parent: weight, noise and scale of the mechanism on a fine grid, with density as the
    simulator draws them.
    """
    x = np.random.default_rng(1).normal(size=(40, 2)).astype(np.float32)
    x[:, 1] = 0.5 * x[:, 0] + 0.6 * x[:, 1]
    x -= x.mean(0)
    members = jnp.array([True, False])
    evidence, coefficients = jax.jit(
        lambda x: enumeration.fit_mechanism(x, x[:, 1], jnp.ones(40, bool), members, PRIOR)
    )(jnp.asarray(x))

    def midpoints(low, high, number):
        return low + (high - low) * (np.arange(number) + 0.5) / number, (high - low) / number

    weight, weight_step = midpoints(0.5, 2.0, 150)
    log_noise, noise_step = midpoints(np.log(0.3), np.log(3.0), 150)
    log_scale, scale_step = midpoints(np.log(0.1), np.log(20.0), 300)
    w, n, s = np.meshgrid(weight, np.exp(log_noise), np.exp(log_scale), indexing="ij")
    b, noise = w / s, n / s  # the negative weights have no likelihood to speak of
    xx, xy, yy = x[:, 0] @ x[:, 0], x[:, 0] @ x[:, 1], x[:, 1] @ x[:, 1]
    log_likelihood = (
        -39 * np.log(noise)
        - 19.5 * np.log(2 * np.pi)
        - 0.5 * np.log(40)
        - 0.5 * (yy - 2 * b * xy + b**2 * xx) / noise**2
    )
    density = 0.5 / 1.5 / np.log(10.0) * weight_step * noise_step * scale_step
    assert abs(float(evidence) - np.log((np.exp(log_likelihood) * density).sum())) < 0.05
    mean = np.average(b, weights=np.exp(log_likelihood))
    assert abs(float(coefficients[0]) - mean) < 0.01 and coefficients[1] == 0


@pytest.fixture(scope="module")
def posteriors():
    """Three hundred systems of three variables from the prior, with 60 observations and 2
    interventions per variable.
    """

    @jax.jit
    def one(key):
        scm, _, buffer = draw_problem(key, PRIOR, DataDesign(60, 60), 2)
        return scm.parents, scm.target, enumeration.enumerated_posterior(buffer, scm.task, PRIOR)

    return jax.device_get(jax.lax.map(one, jr.split(jr.key(5), 300)))


def test_posterior_is_a_distribution_over_possible_sets(posteriors):
    _, target, posterior = posteriors
    probs = np.exp(posterior.log_probs)
    np.testing.assert_allclose(probs.sum(1), 1.0, rtol=1e-4)
    with_target = enumeration.subsets(3).T[target]
    # a target has parents
    assert (probs[with_target] == 0).all() and (probs[:, 0] == 0).all()


def test_posterior_is_calibrated(posteriors):
    """Over systems from its own prior, the mean probability given to a set is the frequency with
    which it is the true one.
    """
    parents, _, posterior = posteriors
    probs = np.exp(posterior.log_probs)
    true = (enumeration.subsets(3)[None] == parents[:, None]).all(2)
    for low, high in itertools.pairwise((0.0, 0.05, 0.3, 0.7, 0.95, 1.01)):
        inside = (probs >= low) & (probs < high) & (probs > 0)
        expected, spread = probs[inside].sum(), np.sqrt((probs * (1 - probs))[inside].sum())
        assert abs(true[inside].sum() - expected) < 4 * spread + 1, (low, high)
    assert -np.log(np.maximum(probs[true], 1e-6)).mean() < 0.6


def test_mean_effects_are_unbiased_and_approach_the_truth():
    """Over systems from the prior, the error of a posterior mean is uncorrelated with it, and
    shrinks with more rows: slopes, from end to end.
    """

    def slopes(num_obs, key):
        scm, true, buffer = draw_problem(key, PRIOR, DataDesign(num_obs, num_obs), 2)
        said, truth = enumeration.enumerated_effects(buffer, scm.task, PRIOR, 2), true.effects
        return said[:, 1] - said[:, 0], truth[:, 1] - truth[:, 0], scm.candidates

    errors, keys = {}, jr.split(jr.key(6), 200)
    for num_obs in (30, 400):
        said, truth, usable = jax.device_get(jax.lax.map(ft.partial(slopes, num_obs), keys))
        said, truth = said[usable].reshape(200, 2), truth[usable].reshape(200, 2)
        against = ((truth - said) * said).mean(1)
        assert abs(against.mean()) < 3 * against.std() / np.sqrt(200)
        errors[num_obs] = np.sqrt(((truth - said) ** 2).mean())
    assert errors[400] < 0.6 * errors[30] < 0.6 * 0.5 * truth.std()


def test_errors():
    with pytest.raises(ValueError, match="2 to 5 variables"):
        enumeration.enumerate_dags(6)
    scm, _, buffer = draw_problem(jr.key(0), PRIOR, DataDesign(20, 20, 1), 2)
    with pytest.raises(ValueError, match="linear Gaussian"):
        enumeration.enumerated_posterior(buffer, scm.task, SCMPrior())
