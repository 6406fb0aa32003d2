"""CBO-U's random systems, also against networkx and a plain simulation."""

import itertools

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from lib.synthetic import check_scm
from studies.erdos_renyi import covered_edges, erdos_renyi, erdos_renyi_graph, topological_order


def test_random_graphs():
    rng = np.random.default_rng(0)
    for num_vars in (3, 10, 20, 50):
        for _ in range(10):
            graph, order, target = erdos_renyi_graph(rng, num_vars)
            digraph = nx.DiGraph(graph)
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
    assert buffer.valid.all() and values.shape == (60 + 2 * 9, 10)
    assert not intervened[:60].any() and (intervened[60:].sum(1) == 1).all()
    others = np.delete(np.arange(10), int(scm.target))
    np.testing.assert_array_equal(intervened[60:].argmax(1), np.repeat(others, 2))
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
    drawn = [erdos_renyi(seed, 10, False, num_obs=10)[0] for seed in range(40)]
    systems = jax.device_get(jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn))
    roots = ~systems.adjacency.any(1)
    assert (systems.shift[roots] == 0).all()
    hidden = systems.frequencies, systems.phases, systems.amplitudes, systems.shift[~roots]
    for sample, mean in ((systems.weights[systems.adjacency], 2.0), *((h, 0.0) for h in hidden)):
        assert abs(sample.mean() - mean) < 5 / np.sqrt(sample.size)
        assert abs(sample.std() - 1.0) < 5 / np.sqrt(2 * sample.size)


def test_seeds_of_random_systems():
    one, again, other = (erdos_renyi(seed, 10, True) for seed in (3, 3, 4))
    assert all(map(jnp.array_equal, jax.tree.leaves(one), jax.tree.leaves(again)))
    assert not jnp.array_equal(one[0].graph, other[0].graph)
    nonlinear, _ = erdos_renyi(3, 10, False)
    assert jnp.array_equal(nonlinear.graph, one[0].graph) and nonlinear.target == one[0].target


def test_errors():
    with pytest.raises(ValueError, match="at least 3 variables, not 2"):
        erdos_renyi(0, 2, True)
