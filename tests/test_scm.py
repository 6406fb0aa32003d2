"""Structural causal models against networkx (who moves under do) and against closed forms of linear
models (by how much).
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import networkx as nx
import numpy as np
import pytest
import scipy.stats

from lib.scm import Intervention, Task, check_index, value_grid
from lib.scm_prior import SCMPrior, sample_scm
from lib.synthetic import MECHANISMS, NOISES, SyntheticSCM, check_scm, index_of


NUM_MODELS, NUM_VARS = 64, 6


@pytest.fixture(scope="module")
def scms():
    """Models of 3 to 6 variables, linear and nonlinear, of every family (leading axis)."""
    sample = ft.partial(sample_scm, prior=SCMPrior(max_vars=NUM_VARS, max_size=NUM_VARS))
    return jax.jit(jax.vmap(sample))(jr.split(jr.key(0), NUM_MODELS))


@pytest.fixture(scope="module")
def table(scms):
    """Effects on five values per variable."""
    effects = jax.vmap(lambda scm: scm.effect_table(value_grid(scm.low, scm.high, 5)))
    return np.asarray(jax.jit(effects)(scms))


def member(batch, i):
    return jax.tree.map(lambda leaf: leaf[i], batch)


jit_simulate = jax.jit(SyntheticSCM.simulate)


def simulate(scm, noise, intervention):
    return np.asarray(jit_simulate(scm, noise, intervention))


def digraph(scm):
    return nx.from_numpy_array(np.asarray(scm.graph), create_using=nx.DiGraph)


def hand_made(mechanism="linear", noise_kind="gaussian"):
    """Four variables and one of padding, generated in the order 2, 0, 3, 1, in which places 0 and 1
    cause place 2 and place 2 causes place 3; X1 is the target.
    """
    rng, there = np.random.default_rng(7), jnp.arange(5) < 4
    shapes = {
        "weights": (5, 5),
        "frequencies": (5, 5, 5),
        "phases": (5, 5),
        "amplitudes": (5, 5),
        "noise_scale": 5,
        "shift": 5,
    }
    edges = jnp.array([0, 1, 2]), jnp.array([2, 2, 3])
    return SyntheticSCM(
        family=jnp.int32(0),
        order=jnp.array([2, 0, 3, 1, 4]),
        adjacency=jnp.zeros((5, 5), bool).at[edges].set(True),
        mechanism=jnp.full(5, index_of(mechanism, MECHANISMS)),
        noise_kind=jnp.full(5, index_of(noise_kind, NOISES)),
        spread=jnp.full(5, 1.7),
        target=jnp.array(1),
        low=jnp.where(there, -2.0, 0.0),
        high=jnp.where(there, 3.0, 0.0),
        var_mask=there,
        hidden=jnp.zeros_like(there),
        **{name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in shapes.items()},
    )


def test_single_and_none():
    intervention = Intervention.single(2, 1.5, 4)
    assert intervention.mask.tolist() == [False, False, True, False]
    assert intervention.values.tolist() == [0.0, 0.0, 1.5, 0.0]
    assert not Intervention.none(4).mask.any()


def test_candidates_leave_out_target_padding_and_variables_without_a_range():
    task = Task(
        jnp.array(1),
        jnp.array([-1.0, -1.0, 2.0, 0.0]),
        jnp.array([1.0, 1.0, 2.0, 0.0]),
        jnp.array([True, True, True, False]),
    )
    assert task.possible_parents.tolist() == [True, False, True, False]
    assert task.candidates.tolist() == [True, False, False, False]


def test_value_grid_holds_both_ends():
    ends = jnp.array([-1.0, 0.0]), jnp.array([3.0, 0.0])
    assert value_grid(*ends, 5).tolist() == [[-1.0, 0.0, 1.0, 2.0, 3.0], [0.0] * 5]


def test_graphs_are_generated_in_topological_order(scms):
    for i in range(NUM_MODELS):
        scm = member(scms, i)
        graph, place = digraph(scm), np.argsort(scm.order)
        assert all(place[a] < place[b] for a, b in graph.edges)
        assert set(np.flatnonzero(scm.parents)) == set(graph.predecessors(int(scm.target)))


def test_do_moves_exactly_the_descendants(scms):
    noise = jr.normal(jr.key(1), (32, NUM_VARS))
    for i in range(0, NUM_MODELS, 4):
        scm = member(scms, i)
        graph, before = digraph(scm), simulate(scm, noise, Intervention.none(NUM_VARS))
        for j in np.flatnonzero(scm.var_mask).tolist():
            after = simulate(scm, noise, Intervention.single(j, 1.25, NUM_VARS))
            assert (after[:, j] == 1.25).all()
            moved = np.abs(after - before).max(0) > 1e-5
            assert set(np.flatnonzero(moved)) == nx.descendants(graph, j) | {j}
            assert (after == before)[:, ~moved].all()


def test_do_cuts_the_parents(scms):
    """With all parents of the target set, another ancestor no longer reaches it."""
    noise, index, checked = jr.normal(jr.key(2), (32, NUM_VARS)), jnp.arange(NUM_VARS), 0
    for i in range(NUM_MODELS):
        scm = member(scms, i)
        parents = np.flatnonzero(scm.parents)
        for ancestor in sorted(nx.ancestors(digraph(scm), int(scm.target)) - {*parents})[:1]:
            other = index == ancestor
            both = Intervention(scm.parents | other, jnp.where(other, -2.0, 0.7))
            alone = Intervention(scm.parents, jnp.full(NUM_VARS, 0.7))
            one, two = simulate(scm, noise, alone), simulate(scm, noise, both)
            assert (one[:, parents] == np.float32(0.7)).all() and (two[:, ancestor] == -2.0).all()
            assert (one[:, scm.target] == two[:, scm.target]).all()
            checked += 1
    assert checked > 5


def by_hand(scm, noise, do):
    """What `simulate` says, once more in numpy, variable by variable."""
    scm, do, x = jax.device_get(scm), jax.device_get(do), np.zeros(noise.shape)
    mechanism, kind = list(MECHANISMS)[scm.mechanism[0]], list(NOISES)[scm.noise_kind[0]]
    distributions = {
        "laplace": scipy.stats.laplace(scale=np.sqrt(0.5)),
        "uniform": scipy.stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)),
    }
    distribution = distributions.get(kind, scipy.stats.norm)
    disturbance = distribution.ppf(scipy.stats.norm.cdf(np.asarray(noise, float)))
    if kind == "heavy":
        disturbance *= 0.7**0.75 * np.exp(0.075 * disturbance**2)
    if kind == "switch":
        disturbance = np.sign(noise)
    for k, variable in enumerate(scm.order[:4]):
        parents = np.flatnonzero(scm.adjacency[:, k])
        linear = x[:, parents] @ scm.weights[parents, k]
        z = x[:, parents] @ scm.frequencies[parents, k] + scm.phases[k]
        effect = {
            "linear": linear,
            "fourier": np.cos(z) @ scm.amplitudes[k],
            "mlp": np.tanh(z) @ scm.amplitudes[k],
            "polynomial": linear + np.where(abs(z) < 1, z**2, 2 * abs(z) - 1) @ scm.amplitudes[k],
        }[mechanism] * (len(parents) > 0)
        factor = np.exp(np.tanh(linear)) if kind == "heteroscedastic" else 1.0
        raw = effect + scm.noise_scale[k] * factor * disturbance[:, k]
        natural = (raw - scm.shift[k]) / scm.spread[k]
        x[:, k] = do.values[variable] if do.mask[variable] else natural
    return x[:, np.argsort(scm.order)]


@pytest.mark.parametrize("noise_kind", NOISES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_mechanisms_and_noises_agree_with_numpy(mechanism, noise_kind):
    """As observed, and where the only parent of the target, which scales its noise, is set."""
    scm, noise = hand_made(mechanism, noise_kind), jr.normal(jr.key(6), (64, 5))
    for do in (*(Intervention.single(3, v, 5) for v in (-2.0, 0.5, 2.0)), Intervention.none(5)):
        rows = simulate(scm, noise, do)
        np.testing.assert_allclose(rows, by_hand(scm, noise, do), atol=2e-5)
    assert not rows[:, 4].any() and rows[:, :4].std(0).min() > 0.1


@pytest.mark.parametrize(
    ("kind", "kurtosis"),
    [
        ("gaussian", 3.0),
        ("laplace", 6.0),
        ("uniform", 1.8),
        ("heavy", 3 * 0.4**-2.5 * 0.7**3),
        ("switch", 1.0),
    ],
)
def test_noise_has_unit_variance_and_the_shape_of_its_name(kind, kurtosis):
    normal = np.linspace(-12.0, 12.0, 100_001)
    rows = jnp.asarray(np.repeat(normal[:, None], 5, 1), jnp.float32)
    noise = np.asarray(hand_made(noise_kind=kind).disturbance(rows), float)[:, 0]
    density = scipy.stats.norm.pdf(normal) * (normal[1] - normal[0])
    moments = density @ noise, density @ noise**2, density @ noise**4
    np.testing.assert_allclose(moments, (0.0, 1.0, kurtosis), rtol=1e-3, atol=1e-4)
    assert (np.diff(noise) >= 0).all()


@pytest.mark.parametrize("variable", [None, 1])
def test_feedback_is_the_equilibrium(variable):
    """Of a linear cycle between places 2 and 3: x = b x + c + d noise solved; setting the target,
    which is place 3, opens it.
    """
    scm, noise = hand_made(), np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)
    for name, index, value in (
        ("adjacency", (3, 2), True),
        ("weights", (2, 3), 1.0),
        ("weights", (3, 2), -0.8),
    ):
        scm = at(name, index, value)(scm)
    there = np.arange(5) < 4
    fixed = (np.asarray(scm.order) == variable) & there
    b = np.where(~fixed & there, np.where(scm.adjacency, scm.weights, 0.0) / 1.7, 0.0).T
    own = there * (np.asarray(scm.noise_scale) * noise - np.asarray(scm.shift)) / 1.7
    expected = np.linalg.solve(np.eye(5) - b, np.where(fixed, 1.5, own).T).T
    do = Intervention.none(5) if variable is None else Intervention.single(variable, 1.5, 5)
    np.testing.assert_allclose(
        simulate(scm, noise, do)[:, np.asarray(scm.order)], expected, atol=0.01
    )
    # hidden, it leaves no edge from the other one to itself
    seen = np.asarray(at("hidden", 1, True)(scm).seen_graph)
    assert (np.argwhere(seen) == [[0, 3], [2, 3]]).all()


def at(name, index, value):
    return lambda scm: eqx.tree_at(
        lambda scm: getattr(scm, name), scm, getattr(scm, name).at[index].set(value)
    )


WRONG = {  # what the message says: the change
    "the edge from X0 to X0 does not go forward in order": at("adjacency", (1, 1), True),
    "the edge from X1 to X0 .* remove it, or put X1 before X0": at("adjacency", (3, 1), True),
    "order must hold every variable once": at("order", 3, 3),
    "the target X2 has no ancestor that may be set": at("target", (), 2),
    "no variable but the target X1 has a range": at("high", jnp.array([0, 2, 3]), -2.0),
    "X3 may be set from 4.0 to 3.0: give finite numbers": at("low", 3, 4.0),
    "X0 may be set from -2.0 to inf": at("high", 0, jnp.inf),
    "weights of X3 is not finite": at("weights", (0, 2), jnp.inf),
    "frequencies of X1 is not finite": at("frequencies", (2, 3, 1), jnp.nan),
}


@pytest.mark.parametrize("message", WRONG)
def test_check_scm_says_what_is_wrong_with_which_variable(message):
    check_scm(hand_made())
    with pytest.raises(ValueError, match=message):
        check_scm(WRONG[message](hand_made()))


def test_linear_models_agree_with_path_products_and_the_closed_form(scms, table):
    """x = b x + c + d noise in outside indices, b[child, parent]: means under every intervention,
    and what every unit of noise does where nothing is set, which says the covariance.
    """
    linear = np.flatnonzero(np.asarray(scms.mechanism[:, 0]) == index_of("linear", MECHANISMS))
    assert len(linear) > 16
    for i in linear.tolist():
        scm = member(jax.device_get(scms), i)
        place = np.argsort(scm.order)
        weights = np.where(scm.adjacency, scm.weights, 0.0).T / scm.spread[:, None]
        b, c = weights[np.ix_(place, place)], (-scm.shift / scm.spread)[place] * scm.var_mask
        d = (scm.noise_scale / scm.spread)[place] * scm.var_mask
        grid = np.linspace(scm.low, scm.high, 5, axis=1)
        for j in np.flatnonzero(np.isfinite(table[i, :, 0])):
            others = np.arange(NUM_VARS) != j
            # products of coefficients along all directed paths
            paths = sum(np.linalg.matrix_power(b * others[:, None], k) for k in range(NUM_VARS))
            expected = paths[scm.target] @ np.where(others, c, 0.0) + paths[scm.target, j] * grid[j]
            np.testing.assert_allclose(table[i, j], expected, atol=5e-4, rtol=5e-4)
        total = np.linalg.inv(np.eye(NUM_VARS) - b)
        *units, mean = simulate(scm, np.eye(NUM_VARS + 1, NUM_VARS), Intervention.none(NUM_VARS))
        np.testing.assert_allclose(mean, total @ c, atol=5e-4)
        np.testing.assert_allclose((units - mean)[place].T, total * d, atol=5e-4)


def test_effect_table_is_the_mean_under_do_and_infinite_where_nothing_may_be_set(scms, table):
    candidates = np.asarray(jax.vmap(lambda scm: scm.candidates)(scms))
    expected = np.asarray(scms.var_mask) & (np.arange(NUM_VARS) != np.asarray(scms.target)[:, None])
    assert (candidates == expected).all()
    assert np.isposinf(table[~candidates]).all() and np.isfinite(table[candidates]).all()
    for i in (0, 1, 2, 3):
        scm, j = member(scms, i), int(np.flatnonzero(candidates[i])[-1])
        rows = simulate(scm, scm.reference_noise(), Intervention.single(j, scm.high[j], NUM_VARS))
        np.testing.assert_allclose(rows[:, scm.target].mean(), table[i, j, -1], atol=1e-5)


def test_optimum_is_no_worse_than_any_grid_point(scms, table):
    best = jax.jit(jax.vmap(lambda scm: scm.optimum()))(scms)
    assert (best.mean <= table.min((1, 2)) + 1e-6).all()  # its grid holds the values of the table
    assert (best.mean < table.min((1, 2)) - 1e-3).any()
    place = np.arange(NUM_MODELS), np.asarray(best.variable)
    assert np.isfinite(table[place]).all()
    assert (best.value >= scms.low[place]).all() and (best.value <= scms.high[place]).all()
    scm, first = member(scms, 0), member(best, 0)
    do = Intervention.single(first.variable, first.value, NUM_VARS)
    mean = simulate(scm, scm.reference_noise(), do)[:, scm.target].mean()
    np.testing.assert_allclose(mean, first.mean, atol=1e-5)


def test_reference_noise_is_fixed_and_sums_to_zero(scms):
    noise = np.asarray(member(scms, 0).reference_noise())
    assert (noise == np.asarray(member(scms, 1).reference_noise())).all()
    assert np.abs(noise.sum(0)).max() < 1e-4
    assert np.linalg.matrix_rank(noise) == NUM_VARS


@pytest.mark.parametrize(
    "refused",
    [
        *(ft.partial(Intervention.single, i, 1.0, 3) for i in (9, -1, jnp.array(3))),
        ft.partial(check_index, "X1", 3, "variable"),
    ],
)
def test_an_intervention_on_nothing_is_refused(refused):
    with pytest.raises(ValueError, match="not one of the 3 variables"):
        refused()
