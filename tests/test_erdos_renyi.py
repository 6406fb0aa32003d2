"""CBO-U's random systems, also against networkx and a plain simulation."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import networkx as nx
import numpy as np
import pytest

from lib.scm import check_scm
from studies.erdos_renyi import covered_edges, erdos_renyi, erdos_renyi_graph, topological_order


def test_random_graphs():
    rng = np.random.default_rng(0)
    for num_vars in (3, 10, 20, 50):
        for _ in range(10):
            graph, order, target = erdos_renyi_graph(rng, num_vars)
            digraph = nx.from_numpy_array(graph.astype(int), create_using=nx.DiGraph)
            assert nx.is_directed_acyclic_graph(digraph) and sorted(order) == list(range(num_vars))
            assert all(order.tolist().index(a) < order.tolist().index(b) for a, b in digraph.edges)
            assert any(
                set(digraph.predecessors(b)) == set(digraph.predecessors(a)) | {a}
                for a, b in digraph.edges
            )
            assert 1 <= digraph.in_degree(target) <= 3 and digraph.out_degree(target) == 0
    degrees = [erdos_renyi_graph(rng, 10, childless=False)[::2] for _ in range(40)]
    assert {bool(graph[target].any()) for graph, target in degrees} == {False, True}


@pytest.mark.parametrize(
    "size, target, parents",
    [(10, 1, [2, 9]), (15, 8, [4, 11]), (20, 18, [4]), (50, 23, [19, 49]), (100, 16, [26])],
)
def test_published_targets_have_no_children(size, target, parents):
    """CBO-U's graphs, from its generator and its seeds: their targets have the parents that its
    code states, and no child.
    """
    for seed in itertools.count(17, 17):
        graph = nx.fast_gnp_random_graph(size, 1 / (size - 1), seed=seed, directed=True)
        adjacency = nx.to_numpy_array(graph, nodelist=range(size)) > 0
        if nx.is_directed_acyclic_graph(graph) and covered_edges(adjacency).any():
            break
    assert sorted(graph.predecessors(target)) == parents and not list(graph.successors(target))


def test_covered_edges_and_cycles_by_hand():
    collider = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]], bool)  # alone in its class
    assert not covered_edges(collider).any()
    np.testing.assert_array_equal(topological_order(collider), [0, 1, 2])
    chain = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(covered_edges(chain), [[0, 1, 0], [0, 0, 0], [0, 0, 0]])
    cycle = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(topological_order(cycle), [0, 3])


@pytest.mark.parametrize("linear", [True, False])
def test_data_of_random_systems(linear):
    scm, buffer = erdos_renyi(5, 10, linear, num_obs=60, per_variable=2)
    check_scm(scm)
    values, intervened = np.asarray(buffer.values), np.asarray(buffer.intervened)
    target = int(scm.target)
    assert buffer.valid.all() and values.shape == (60 + 2 * 9, 10)
    assert not intervened[:60].any() and (intervened[60:].sum(1) == 1).all()
    np.testing.assert_array_equal(
        intervened[60:].argmax(1), np.repeat([i for i in range(10) if i != target], 2)
    )
    assert (np.abs(values[intervened]) <= 5).all() and values[intervened].std() > 2
    np.testing.assert_array_equal(scm.low, values[:60].min(0))
    np.testing.assert_array_equal(scm.high, values[:60].max(0))
    assert 1 <= int(scm.parents.sum()) <= 3
    root = int(scm.order[0])
    assert abs(values[:60, root].std() / (1.0 if linear else 0.1) - 1) < 5 / np.sqrt(120)


def test_weights_over_seeds():
    """Linear weights ~ N(2, 1); weights and biases of the hidden layers ~ N(0, 1); a variable
    without parents has no bias.
    """
    systems = [erdos_renyi(seed, 10, False, num_obs=10)[0] for seed in range(40)]
    weights = np.concatenate(
        [np.asarray(scm.weights)[np.asarray(scm.adjacency)] for scm in systems]
    )
    roots = [~np.asarray(scm.adjacency).any(0) for scm in systems]
    bias = np.concatenate(
        [np.asarray(scm.shift)[~root] for scm, root in zip(systems, roots, strict=True)]
    )
    assert all(
        (np.asarray(scm.shift)[root] == 0).all() for scm, root in zip(systems, roots, strict=True)
    )
    hidden = [
        np.concatenate([np.ravel(getattr(scm, name)) for scm in systems])
        for name in ("frequencies", "phases", "amplitudes")
    ]
    for sample, mean in ((weights, 2.0), (bias, 0.0), *((h, 0.0) for h in hidden)):
        assert abs(sample.mean() - mean) < 5 / np.sqrt(len(sample))
        assert abs(sample.std() - 1.0) < 5 / np.sqrt(2 * len(sample))


def test_seeds_of_random_systems():
    one, again, other, keyed = (erdos_renyi(seed, 10, True) for seed in (3, 3, 4, jr.key(3)))
    assert all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True)
    )
    assert len({np.asarray(scm.graph).tobytes() for scm, _ in (one, other, keyed)}) == 3
    assert jnp.array_equal(keyed[1].values, erdos_renyi(jr.key(3), 10, True)[1].values)
    scm, buffer = erdos_renyi(3, 10, True, num_slots=13)
    nonlinear, _ = erdos_renyi(3, 10, False)
    assert jnp.array_equal(nonlinear.graph, one[0].graph) and nonlinear.target == one[0].target
    assert (
        jnp.array_equal(scm.graph[:10, :10], one[0].graph)
        and scm.target == one[0].target
        and not scm.candidates[10:].any()
    )
    np.testing.assert_allclose(buffer.values[:, :10], one[1].values, rtol=1e-5, atol=1e-4)
    assert not buffer.values[:, 10:].any() and not buffer.intervened[:, 10:].any()


def test_errors():
    with pytest.raises(ValueError, match="at least 3 variables, not 2"):
        erdos_renyi(0, 2, True)
    with pytest.raises(ValueError, match="10 variables do not fit in 8 places"):
        erdos_renyi(0, 10, True, num_slots=8)
