"""Random problems: the shape of every graph family, standardised models in which something can be
gained, and first data sets that add up.
"""

import functools as ft
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import networkx as nx
import numpy as np
import pytest

from lib.graphs import FAMILIES, sample_graph
from lib.problems import DataDesign, draw_data, draw_problems
from lib.scm import Intervention, value_grid
from lib.scm_prior import QUIET_NOISE, SCMPrior, sample_scm
from lib.synthetic import MAX_HIDDEN, MECHANISMS, NOISES, Mechanism, check_scm, index_of


NUM_MODELS, NUM_VARS = 64, 6
PRIOR = SCMPrior(max_vars=NUM_VARS, min_size=3, max_size=NUM_VARS)
jit_sample = jax.jit(jax.vmap(ft.partial(sample_scm, prior=PRIOR)))


@pytest.fixture(scope="module")
def scms():
    """Models of 3 to 6 variables (leading axis)."""
    return jit_sample(jr.split(jr.key(1), NUM_MODELS))


@pytest.fixture(scope="module")
def graphs():
    """Of every family `[size - 2, draw, parent, child]`, for sizes 2 to 6."""
    density = PRIOR.min_density, PRIOR.max_density
    draw = jax.vmap(
        lambda key, family, size: sample_graph(key, family, size, NUM_VARS, density),
        in_axes=(0, None, None),
    )
    draw = jax.vmap(jax.vmap(draw, in_axes=(None, None, 0)), in_axes=(None, 0, None))
    keys, families = jr.split(jr.key(0), 100), jnp.arange(len(FAMILIES))
    drawn = np.asarray(jax.jit(draw)(keys, families, jnp.arange(2, NUM_VARS + 1)))
    return dict(zip(FAMILIES, drawn, strict=True))


def member(batch, i):
    return jax.tree.map(lambda leaf: leaf[i], batch)


KINDS = {
    name: tuple(kinds)
    for name, kinds in (("families", FAMILIES), ("mechanisms", MECHANISMS), ("noises", NOISES))
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({field: (*known, "small_world")}, f"small_world; choose from {', '.join(known)}")
            for field, known in KINDS.items()
        ),
        *(({field: ()}, "empty") for field in KINDS),
        *(
            (
                {"min_size": low, "max_size": high, "max_vars": 8},
                "2 <= min_size <= max_size <= max_vars",
            )
            for low, high in ((1, 4), (5, 4), (3, 9))
        ),
        *(
            ({f"min_{n}": 2.0, f"max_{n}": 1.0}, f"min_{n} = 2.0 is above max_{n} = 1.0")
            for n in ("density", "noise", "lengthscale", "range")
        ),
        *(
            ({f"min_{n}": low}, f"min_{n} = {low} must be positive")
            for n in ("noise", "lengthscale", "range")
            for low in (0.0, -1.0)
        ),
    ],
)
def test_impossible_priors_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        SCMPrior(**changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_every_family_are_acyclic_and_stay_within_their_size(graphs, family):
    # a strictly upper triangle is acyclic, in topological order
    assert not np.tril(graphs[family]).any() and graphs[family].any((-1, -2)).all()
    for size, drawn in enumerate(graphs[family], 2):
        assert not drawn[:, size:].any() and not drawn[:, :, size:].any()


def test_chain_fork_and_collider_are_what_they_are_called(graphs):
    kinds = zip(graphs["chain"], graphs["fork"], graphs["collider"], strict=True)
    for size, (chain, fork, collider) in enumerate(kinds, 2):
        assert (chain == np.eye(NUM_VARS, k=1, dtype=bool) * (np.arange(NUM_VARS) < size)).all()
        assert (fork[:, 0].sum(-1) == size - 1).all() and (fork.sum((1, 2)) == size - 1).all()
        for adjacency in collider:
            degree = adjacency.sum(0)
            centre = int(np.argmax(degree > 0))
            assert degree[centre] == min(centre, 3) and (degree[centre + 1 : size] == 1).all()
        # every place can be the centre
        assert len({int(np.argmax(adjacency.any(0))) for adjacency in collider}) == size - 1


def test_scale_free_graphs_attach_to_one_or_two_and_favour_hubs(graphs):
    drawn = graphs["scale_free"][-1]
    degree = drawn.sum(1)
    assert (degree[:, 0] == 0).all() and (degree[:, 1] == 1).all()
    assert set(degree[:, 2:].ravel()) == {1, 2}
    # three variables: the third meets two equal ones
    three = graphs["scale_free"][1][:, :3, :3]
    assert all(nx.is_weakly_connected(nx.DiGraph(adjacency)) for adjacency in three)
    total = degree + drawn.sum(2)
    assert total[:, :2].mean() > total[:, 3:].mean() + 0.5


def test_density_of_erdos_renyi_graphs(graphs):
    pairs = graphs["erdos_renyi"][-1][:, *np.triu_indices(NUM_VARS, 1)].mean(1)
    expected = 0.5 * (PRIOR.min_density + PRIOR.max_density)
    assert abs(pairs.mean() - expected) < 5 * pairs.std() / 10


def test_watts_strogatz_graphs_are_rewired_rings(graphs):
    """Rewiring keeps the number of edges; a ring with no edge moved is a cycle through all
    variables, and most graphs are not.
    """
    edges = graphs["watts_strogatz"].sum((-1, -2))
    assert list(map(set, edges)) == [{1}, {3}, {4}, {5}, {NUM_VARS, 2 * NUM_VARS}]
    single = graphs["watts_strogatz"][-1][edges[-1] == NUM_VARS]
    undirected = [nx.Graph(adjacency) for adjacency in single | single.swapaxes(1, 2)]
    rings = np.mean([nx.is_isomorphic(graph, nx.cycle_graph(NUM_VARS)) for graph in undirected])
    # no edge moves in .7^6 = 12 % of graphs, and some rewired ones are rings again
    assert 0 < rings < 0.5
    # 40 % on average: the places on the ring are random
    assert (single.mean(0)[np.triu_indices(NUM_VARS, 1)] > 0.15).all()


def test_layered_graphs_have_edges_only_to_the_next_layer(graphs):
    numbers = set()
    for size, drawn in enumerate(graphs["layered"], 2):
        for adjacency in drawn:
            layers = list(nx.topological_generations(nx.DiGraph(adjacency[:size, :size])))
            layer = {i: number for number, members in enumerate(layers) for i in members}
            assert all(layer[j] == layer[i] + 1 for i, j in np.argwhere(adjacency))
            assert [layer[i] for i in range(size)] == sorted(layer.values())
            assert max(map(len, layers)) - min(map(len, layers)) <= 1
            numbers.add((size, len(layers)))
    assert numbers == {(d, n) for d in range(2, NUM_VARS + 1) for n in range(2, min(d, 4) + 1)}


def test_models_are_padded_at_the_end_and_ranges_lie_within_the_prior(scms):
    order, index, size = np.asarray(scms.order), np.arange(NUM_VARS), scms.var_mask.sum(1)
    padding = index >= np.asarray(size)[:, None]
    assert set(size.tolist()) == {3, 4, 5, 6} and (scms.var_mask == ~padding).all()
    assert (np.sort(order, 1) == index).all()
    for axis in (1, 2):  # the last places generated are the padding
        assert not (scms.adjacency.any(axis) & padding).any()
    assert (order == index)[padding].all()
    assert ((scms.low == 0) & (scms.high == 0) == padding).all()
    ends = np.stack([-scms.low, scms.high])[:, ~padding]
    assert (ends >= PRIOR.min_range).all() and (ends <= PRIOR.max_range).all()
    assert (scms.target < size).all()
    # outside names say nothing about the order
    assert len(np.unique(order[size == 6], axis=0)) > 5


def test_same_key_same_model(scms):
    assert eqx.tree_equal(scms, jit_sample(jr.split(jr.key(1), NUM_MODELS)))
    assert len(np.unique(np.asarray(scms.weights)[:, 0, 1])) == NUM_MODELS


def test_a_mechanism_of_ones_own_is_one_entry(monkeypatch):
    """Its function, phases and lengthscale reach the models that are drawn."""
    monkeypatch.setitem(MECHANISMS, "sine", Mechanism(jnp.sin, phases=(1, 2), lengthscale=0.5))
    prior = SCMPrior(max_vars=4, max_size=4, mechanisms=("sine",))
    drawn = jax.jit(jax.vmap(lambda key: sample_scm(key, prior)))(jr.split(jr.key(0), 16))
    assert (drawn.mechanism == index_of("sine", MECHANISMS)).all()
    assert ((drawn.phases >= 1.0) & (drawn.phases <= 2.0)).all()
    assert 1.5 < float(drawn.frequencies.std()) < 2.5


def test_defaults_are_those_of_training(scms):
    assert SCMPrior().families == tuple(FAMILIES)[:5] and SCMPrior().standardised
    known = {int(index_of(name, MECHANISMS)) for name in ("linear", "fourier")}
    assert set(np.unique(scms.mechanism)) == known
    assert set(np.unique(scms.noise_kind)) == {int(index_of("gaussian", NOISES))}
    drawn = jax.device_get(jax.jit(ft.partial(sample_scm, prior=SCMPrior()))(jr.key(0)))
    assert drawn.target == 0  # as drawn before there were other kinds
    np.testing.assert_allclose(drawn.weights[0, :3], [-1.724263, -0.654828, -1.031929], atol=1e-5)


@pytest.fixture(scope="module")
def varied():
    """Models of every family, mechanism and noise, standardised and not."""
    keys = jr.split(jr.key(6), NUM_MODELS)
    priors = (replace(PRIOR, **KINDS, standardised=standardised) for standardised in (True, False))
    return [jax.jit(jax.vmap(ft.partial(sample_scm, prior=prior)))(keys) for prior in priors]


def test_every_kind_is_drawn(varied):
    for scms in varied:
        mechanisms, noises = scms.mechanism[:, 0].tolist(), scms.noise_kind[:, 0].tolist()
        assert set(mechanisms) == set(range(len(MECHANISMS)))
        assert set(noises) == set(range(len(NOISES)))
        # one says nothing about the other
        assert len(set(zip(mechanisms, noises, strict=True))) > 12
        for i in range(0, NUM_MODELS, 8):
            check_scm(member(scms, i))


def observe(scms):
    """2000 rows of each, and by how many deviations of its target some intervention lowers it."""
    noise = jr.normal(jr.key(2), (1000, NUM_VARS))
    noise = jnp.concatenate([noise, -noise])

    def one(scm):
        rows = scm.simulate(noise, Intervention.none(NUM_VARS))
        lowest = scm.effect_table(value_grid(scm.low, scm.high, 5), noise).min()
        y = jnp.take(rows, scm.target, axis=1)
        return rows, (y.mean() - lowest) / y.std()

    return jax.device_get(jax.jit(jax.vmap(one))(scms))


def test_standardised_models_of_every_kind_have_unit_deviations(varied):
    deviation = observe(varied[0])[0].std(1)[np.asarray(varied[0].var_mask)]
    # 256 rows: heavy tails make single ones rough
    assert np.abs(np.log(deviation)).max() < 0.5 and abs(deviation.mean() - 1) < 0.03


def test_plain_models_have_unequal_variances_and_ranges_in_own_deviations(varied):
    scms = varied[1]
    there, (rows, _) = np.asarray(scms.var_mask), observe(scms)
    assert (scms.shift == 0).all() and (scms.spread == 1).all()
    mean, deviation = rows.mean(1), rows.std(1)
    assert deviation[there].max() / deviation[there].min() > 10 and np.abs(mean[there]).max() > 1
    generated = np.take_along_axis(deviation, np.asarray(scms.order), 1)[there.all(1)]
    # variances add up along the graph
    assert np.median(generated[:, -1] / generated[:, 0]) > 1.2
    for end in ((mean - scms.low) / deviation, (scms.high - mean) / deviation):
        # by at most what mean and deviation are uncertain by
        reach = np.asarray(end)[there]
        assert reach.min() > 0.6 * PRIOR.min_range and reach.max() < 1.6 * PRIOR.max_range
        assert abs(reach.mean() - 0.5 * (PRIOR.min_range + PRIOR.max_range)) < 0.2
    assert not np.asarray(scms.low)[~there].any() and not np.asarray(scms.high)[~there].any()


def test_every_target_can_be_lowered(scms, varied):
    for models in (scms, varied[1]):
        _, drops = observe(models)
        # qualification looked at 32 rows of noise, so single models may fall short by its standard
        # error
        assert (drops > SCMPrior().min_effect - 0.25).all()
        assert (drops >= SCMPrior().min_effect).mean() > 0.9


# --- special models ---


def sample_special(**shares):
    """Models of the keys of `scms`."""
    sample = ft.partial(sample_scm, prior=replace(PRIOR, **shares))
    return jax.jit(jax.vmap(sample))(jr.split(jr.key(1), NUM_MODELS))


@pytest.fixture(scope="module")
def partly():
    """The models of `scms`, in all of which something is hidden and something known."""
    return sample_special(hidden=1.0, told=1.0)


@jax.jit
@jax.vmap
def look(scm):
    """Rows without intervention and effects on five values, over some of the reference noise, and
    the rows after the structural equations once more.
    """
    noise = scm.reference_noise()[::4]
    rows = scm.simulate(noise, Intervention.none(NUM_VARS))
    x, disturbance = rows[:, scm.order], scm.disturbance(noise)
    raw = jnp.stack([scm.structural_equation(x, disturbance, k) for k in range(NUM_VARS)], 1)
    again = ((raw - scm.shift[None]) / scm.spread[None])[:, scm.position]
    effects = scm.effect_table(value_grid(scm.low, scm.high, 5), noise)
    return rows, effects, jnp.where(scm.var_mask[None], again, 0.0)


def test_hiding_and_telling_leave_the_model_as_it_is(scms, partly):
    changed = {"hidden", "var_mask", "low", "high", "known"}
    for name in scms.__dataclass_fields__.keys() - changed:
        np.testing.assert_allclose(getattr(scms, name), getattr(partly, name), 1e-5, err_msg=name)
    hidden, size = np.asarray(partly.hidden), np.asarray(scms.var_mask).sum(1)
    assert (partly.var_mask == (scms.var_mask & ~hidden)).all() and scms.known is None
    assert set(hidden.sum(1)) == {1, MAX_HIDDEN} and (hidden.sum(1) <= size - 2).all()
    assert not hidden[np.arange(NUM_MODELS), partly.target].any()
    assert not np.asarray(partly.low)[hidden].any() and not np.asarray(partly.high)[hidden].any()
    (rows, effects, _), (seen, known_effects, _) = (
        map(np.asarray, look(x)) for x in (scms, partly)
    )
    np.testing.assert_allclose(seen, np.where(hidden[:, None], 0.0, rows), atol=1e-4)
    candidates = np.isfinite(known_effects)
    assert (candidates.any(2) == (np.isfinite(effects).any(2) & ~hidden)).all()
    np.testing.assert_allclose(known_effects[candidates], effects[candidates], atol=1e-5)


def test_parents_reach_the_target_through_what_is_hidden(scms, partly):
    indirect = 0
    for i in range(NUM_MODELS):
        scm, hidden = member(partly, i), {*np.flatnonzero(partly.hidden[i]).tolist()}
        graph, target = nx.DiGraph(np.asarray(member(scms, i).graph)), int(scm.target)
        expected = {
            j
            for j in np.flatnonzero(scm.task.possible_parents).tolist()
            if nx.has_path(graph.subgraph({j, target} | hidden), j, target)
        }
        assert set(np.flatnonzero(scm.parents)) == expected
        indirect += len(expected - {*graph.predecessors(target)})
    assert indirect > 5


def test_all_that_is_told_is_true(partly):
    known, seen = np.asarray(partly.known), np.asarray(jax.vmap(lambda scm: scm.seen_graph)(partly))
    assert (known[known != 0] == np.where(seen, 1, -1)[known != 0]).all()
    there, target = np.asarray(partly.var_mask), np.asarray(partly.target)[:, None]
    allowed = there[:, :, None] & there[:, None] & ~np.eye(NUM_VARS, dtype=bool)
    assert not known[~allowed].any() and (known > 0).any()
    others = (np.arange(NUM_VARS) != target)[:, None]
    assert not (others & (known != 0)).any((1, 2)).all()  # of the target only
    # tiers: only what is forbidden, and where i may cause j and j may cause k, i may cause k
    free = (known == 0) & there[:, :, None] & there[:, None]
    closed = ~((free.astype(int) @ free > 0) & (known != 0)).any((1, 2))
    tiers = closed & (known < 0).any((1, 2)) & ~(known > 0).any((1, 2)) & (there.sum(1) > 2)
    assert 0.1 < tiers.mean() < 0.5


def test_tight_models_have_a_copy_and_nothing_lowers_the_target_of_inert_ones():
    scms = sample_special(tight=1.0, inert=1.0)
    rows, effects, _ = map(np.asarray, look(scms))
    for i in range(NUM_MODELS):
        graph, there = np.asarray(member(scms, i).graph), np.flatnonzero(scms.var_mask[i])
        with np.errstate(invalid="ignore"):
            correlation = np.abs(np.corrcoef(rows[i].T))
        copies = [j for j in there if graph[:, j].sum() == 1 and not graph[j].any()]
        assert max(correlation[graph[:, j], j][0] for j in copies) > 0.9
        drop = rows[i, :, scms.target[i]].mean() - effects[i].min()
        assert drop < PRIOR.min_effect + 1e-4


def test_models_without_a_least_effect_are_drawn_though_they_are_to_be_inert():
    prior = SCMPrior(max_vars=3, max_size=3, min_effect=0.0, inert=1.0)
    assert jax.jit(ft.partial(sample_scm, prior=prior))(jr.key(0)).var_mask.all()


def test_quiet_mixed_models_with_feedback():
    scms = sample_special(quiet=1.0, mixed=1.0, feedback=1.0)
    rows, _, again = map(np.asarray, look(scms))
    there = np.asarray(scms.var_mask)
    assert np.tril(scms.adjacency).any((1, 2)).all()
    moved = np.abs(again - rows).max((1, 2))
    assert moved.max() < 0.1 and (moved > 1e-4).any()
    roots = there & ~np.asarray(jax.vmap(lambda scm: scm.graph)(scms)).any(1)
    deviation = rows.std(1)[roots]
    assert deviation.min() > 0.5 * QUIET_NOISE[0] and deviation.max() < 1.5
    assert np.median(deviation) < QUIET_NOISE[1]
    assert set(np.unique(scms.family)) == set(range(len(FAMILIES)))
    for kinds, of in ((scms.mechanism, MECHANISMS), (scms.noise_kind, NOISES)):
        generated = [set(row[:n].tolist()) for row, n in zip(kinds, there.sum(1), strict=True)]
        assert set.union(*generated) == set(range(len(of)))
        assert np.mean([len(one) > 1 for one in generated]) > 0.8


# --- data ---


def levels(buffers, i):
    """How many values each variable of one data set was set to."""
    values, intervened = np.asarray(buffers.values[i]), np.asarray(buffers.intervened[i])
    each = (values[intervened[:, j], j] for j in range(NUM_VARS))
    return [len(np.unique(np.round(one, 4))) for one in each if len(one)]


@pytest.mark.parametrize("kind", ["designed", "alone"])
def test_designs_of_experiments(scms, kind):
    design = DataDesign(4, 12, 0, max_interventions=40, levels=1.0, **{kind: 1.0})
    draw = jax.jit(jax.vmap(lambda key, scm: draw_data(key, scm, design)))
    buffers = draw(jr.split(jr.key(7), NUM_MODELS), scms)
    intervened, done = np.asarray(buffers.intervened), np.asarray(buffers.intervened).any(2).sum(1)
    observed = np.asarray(jax.vmap(lambda buffer: buffer.observational)(buffers)).sum(1)
    numbers = {max(levels(buffers, i)) for i in np.flatnonzero(done)}
    assert {2, 3, 4, 5} <= numbers <= {1, 2, 3, 4, 5}
    several = (intervened.sum(2) > 1).any(1)
    if kind == "alone":
        assert (intervened.any(1).sum(1) <= 1).all() and (observed >= 4).all()
        assert not several.any()
        return
    bare = observed == 0
    assert 0.3 < bare.mean() < 0.7 and (observed[~bare] >= 4).all()
    assert done[bare].min() >= 10 > done[~bare].min() and several[done >= 10].mean() > 0.9


def assert_rows(buffers, tasks):
    """`buffers` hold what they should wherever rows are valid, and nothing where they are not."""
    values, intervened, valid = map(np.asarray, (buffers.values, buffers.intervened, buffers.valid))
    low, high = np.asarray(tasks.low)[:, None], np.asarray(tasks.high)[:, None]
    assert not values[~valid].any() and not intervened[~valid].any()
    assert not np.where(np.asarray(tasks.var_mask)[:, None], 0.0, values).any()
    assert ((values >= low - 1e-6) & (values <= high + 1e-6))[intervened].all()
    candidates = np.asarray(jax.vmap(lambda task: task.candidates)(tasks))
    assert not (intervened & ~candidates[:, None]).any() and (intervened.sum(2) <= 1).all()
    return values, intervened, valid, candidates


def test_first_data_have_their_rows_in_front(scms):
    design = DataDesign(min_obs=2, max_obs=10, per_variable=2, num_steps=8)
    draw = jax.jit(jax.vmap(lambda key, scm: draw_data(key, scm, design)))
    buffers = draw(jr.split(jr.key(4), NUM_MODELS), scms)
    values, intervened, valid, candidates = assert_rows(buffers, scms)
    assert values.shape == (NUM_MODELS, 10 + 2 * NUM_VARS + 8, NUM_VARS)
    observed = np.asarray(buffers.valid & ~intervened.any(2)).sum(1)
    assert set(observed) == set(range(2, 11))
    assert (valid.sum(1) == observed + 2 * candidates.sum(1)).all()
    assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # valid rows first
    assert (intervened.sum(1) == 2 * candidates).all()
    first = member(buffers, 0)
    assert (first.observational == (jnp.arange(len(first.valid)) < observed[0])).all()
    # every row has its own noise
    assert len(np.unique(first.values[first.valid], axis=0)) == first.size


def test_data_at_any_moment_of_a_campaign():
    design = DataDesign(min_obs=4, max_obs=12, per_variable=0, max_interventions=8)
    flat = draw_problems(jr.key(5), 32, PRIOR, design, 5, data_sets=2)
    problems = jax.tree.map(lambda leaf: leaf.reshape(32, 2, *leaf.shape[1:]), flat)
    values, intervened, valid, candidates = assert_rows(
        flat.buffer, jax.vmap(lambda scm: scm.task)(flat.scm)
    )
    assert values.shape == (64, 20, NUM_VARS)
    done = intervened.any(2).sum(1)
    observations = valid.sum(1) - done
    assert set(observations) <= set(range(4, 13)) and len(set(observations)) > 4
    assert (np.diff(valid.astype(int), axis=1) <= 0).all()
    assert {0, 8} <= set(done) <= set(range(9))
    # both data sets of a model share the truth, not the rows
    for shared in (problems.truth.effects, problems.truth.parents):
        assert (shared[:, 0] == shared[:, 1]).all()
    assert (problems.buffer.values[:, 0, 0] != problems.buffer.values[:, 1, 0]).any(-1).all()
    assert (np.isfinite(flat.truth.effects).all(-1) == candidates).all()
    assert not (np.asarray(flat.truth.parents) & ~candidates).any()
