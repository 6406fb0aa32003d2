"""Distributions over interventions as densities, and a policy that keeps the symmetries of its
state. States are made by hand: no surrogate runs.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

from lib.buffer import ExperienceBuffer
from lib.policy import (
    AcquisitionPolicyNetwork,
    AcquisitionState,
    InterventionDistribution,
    PolicyConfig,
    check_state,
    expected_improvement_choice,
    feature_span,
    thompson_choice,
)
from lib.scm import Task, value_grid
from lib.statistics import NUM_EFFECT_STATISTICS
from lib.surrogate import SurrogateOutput


REAL, SLOTS, BINS, TOKEN, TARGET = 5, 6, 5, 12, 1


THERE = jnp.arange(SLOTS) < REAL
LOW = jnp.where(THERE, -1.0 - jnp.arange(SLOTS), 0.0)
# variable 1 is the target, 3 has no range, the last slot is padding: three candidates are left
HIGH = jnp.where(jnp.arange(SLOTS) == 3, LOW, jnp.where(THERE, 2.0, 0.0))
TASK = Task(jnp.array(TARGET), LOW, HIGH, THERE)


CANDIDATES = np.flatnonzero(TASK.candidates)


def per_variable(state):
    names = "grid", "effect_mean", "effect_std", "tokens", "statistics"
    return [getattr(state.output, name) for name in names]


def make_distribution(seed, scale=1.5):
    scores = scale * jr.normal(jr.key(seed), (SLOTS, BINS))
    allowed = jnp.where(TASK.candidates[:, None], scores, -jnp.inf)
    return InterventionDistribution(TASK, jax.nn.log_softmax(allowed, axis=(0, 1)))


def make_state(seed):
    """What a surrogate might predict; nonsense wherever nobody may look."""
    keys = jr.split(jr.key(seed), 5)
    output = SurrogateOutput(
        TASK,
        jr.normal(keys[0], (2, SLOTS)),
        jnp.log(jnp.array([0.3, 0.7])),
        value_grid(TASK.low, TASK.high, BINS),
        jr.normal(keys[1], (SLOTS, BINS)),
        jnp.exp(jr.normal(keys[2], (SLOTS, BINS))),
        jr.normal(keys[3], (SLOTS, TOKEN)),
        jr.normal(keys[4], (SLOTS, BINS, NUM_EFFECT_STATISTICS)),
        jnp.array(0.5),
        jnp.array(2.0),
        jnp.array(2.0),
    )
    return AcquisitionState(ExperienceBuffer.empty(SLOTS, 4), output, jnp.array(2), jnp.array(5))


@pytest.fixture(scope="module")
def policy():
    return AcquisitionPolicyNetwork(
        PolicyConfig(policy_hidden_dim=16, policy_n_layers=2), TOKEN, key=jr.key(0)
    )


@pytest.fixture(scope="module")
def act(policy):
    return eqx.filter_jit(policy)


@pytest.mark.parametrize("seed", [0, 1])
def test_density_integrates_to_one(seed):
    distribution = make_distribution(seed)
    # midpoints, 400 is a multiple of twice the number of inner cells
    points = (jnp.arange(400) + 0.5) / 400

    def density(i, u):
        return jnp.exp(distribution.log_prob(i, distribution.value(i, u)))

    each = jax.jit(jax.vmap(jax.vmap(density, (None, 0)), (0, None)))
    integral = each(jnp.asarray(CANDIDATES), points).mean(1)
    np.testing.assert_allclose(integral, jnp.exp(distribution.logits).sum(1)[CANDIDATES], atol=1e-4)
    np.testing.assert_allclose(integral.sum(), 1.0, atol=1e-4)


def test_cells_are_those_nearest_to_the_grid():
    distribution = make_distribution(0)
    for i, grid in enumerate(np.asarray(value_grid(TASK.low, TASK.high, BINS))):
        values = np.linspace(grid[0], grid[-1], 37, dtype=np.float32)[1:-1:2]
        cells = jax.vmap(distribution.cell, (None, 0))(jnp.array(i), jnp.asarray(values))
        assert i not in CANDIDATES or (cells == np.abs(values[:, None] - grid).argmin(1)).all()
    np.testing.assert_allclose(
        jnp.exp(distribution.log_widths), [0.125, 0.25, 0.25, 0.25, 0.125], atol=1e-6
    )


def test_samples_fall_within_range_on_candidates_as_often_as_they_should():
    distribution, count = make_distribution(2), 4000
    drawn = jax.jit(jax.vmap(distribution.sample))(jr.split(jr.key(0), count))
    cells = np.asarray(jax.jit(jax.vmap(distribution.cell))(*drawn))
    variable, value = map(np.asarray, drawn)
    assert set(variable) <= set(CANDIDATES)
    assert (value >= TASK.low[variable]).all() and (value <= TASK.high[variable]).all()
    seen = np.bincount(variable * BINS + cells, minlength=SLOTS * BINS).reshape(SLOTS, BINS)
    chance = np.asarray(jnp.exp(distribution.logits), float)[CANDIDATES].ravel()
    expected = chance * (count / chance.sum())
    assert scipy.stats.chisquare(seen[CANDIDATES].ravel(), expected).pvalue > 1e-4
    # a half cell at the low end, filled evenly
    first = CANDIDATES[0]
    half = float(TASK.low[first]), float((TASK.high - TASK.low)[first]) / 8
    ends = value[(variable == first) & (cells == 0)]
    assert scipy.stats.kstest(ends, "uniform", half).pvalue > 1e-4


def test_mode_is_the_most_probable_cell():
    distribution = make_distribution(3)
    variable, value = distribution.mode()
    cell = variable, distribution.cell(variable, value)
    assert distribution.logits[cell] == distribution.logits.max()
    np.testing.assert_allclose(value, value_grid(TASK.low, TASK.high, BINS)[cell], atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_entropy_of_a_uniform_distribution_is_the_log_of_its_variables(count):
    chosen, widths = np.isin(np.arange(SLOTS), CANDIDATES[:count]), make_distribution(0).log_widths
    task = Task(TASK.target, TASK.low, jnp.where(chosen, TASK.high, TASK.low), TASK.var_mask)
    logits = jnp.where(chosen[:, None], widths[None] - np.log(count), -jnp.inf)
    uniform = InterventionDistribution(task, logits)
    np.testing.assert_allclose(uniform.entropy(), np.log(count), atol=1e-5)
    assert make_distribution(4).entropy() < np.log(3)


def test_entropy_and_kl_agree_with_samples():
    one, two = make_distribution(5, 0.5), make_distribution(6, 0.5)
    variable, value = jax.jit(jax.vmap(one.sample))(jr.split(jr.key(1), 4000))
    ours, theirs = (np.asarray(jax.jit(jax.vmap(d.log_prob))(variable, value)) for d in (one, two))
    for exact, draws in ((one.entropy(), -ours), (one.kl(two), ours - theirs)):
        assert abs(draws.mean() - exact) < 5 * draws.std() / np.sqrt(len(draws))
    np.testing.assert_allclose(one.kl(one), 0.0, atol=1e-6)
    assert make_distribution(7).kl(make_distribution(8)) > 0.1
    gradient = jax.grad(lambda logits: InterventionDistribution(TASK, logits).kl(two))(one.logits)
    assert jnp.isfinite(gradient).all()


def test_rules_choose_candidates_and_weigh_uncertainty():
    """Expected improvement prefers the uncertain cell where means are equal; Thompson sampling
    follows the mean where it is certain.
    """
    output, ones = make_state(0).output, jnp.ones((SLOTS, BINS))
    surface = 0.0 * ones, ones.at[4, 2].set(2.0)
    flat = eqx.tree_at(lambda o: (o.effect_mean, o.effect_std), output, surface)
    variable, value = expected_improvement_choice(flat)
    assert (int(variable), float(value)) == (4, float(output.grid[4, 2]))
    sure = eqx.tree_at(lambda o: o.effect_std, output, 1e-6 * ones)
    for chosen in (thompson_choice(jr.key(0), sure), expected_improvement_choice(sure)):
        assert jnp.array_equal(jnp.stack(chosen), jnp.stack(sure.best()))
    drawn = jax.vmap(lambda k: thompson_choice(k, flat)[0])(jr.split(jr.key(1), 400))
    assert set(np.unique(drawn)) == set(CANDIDATES)
    # of three candidates the uncertain one is lowest more often than not
    assert (drawn == 4).mean() > 0.4


def test_policy_gives_a_distribution_over_candidates(act):
    logits = np.asarray(act(make_state(0)).logits)
    np.testing.assert_allclose(np.exp(logits).sum(), 1.0, atol=1e-5)
    assert ((logits > -np.inf).all(1) == np.asarray(TASK.candidates)).all()
    assert np.ptp(logits[CANDIDATES]) > 1e-2


def test_incumbent_is_the_lowest_candidate():
    state = make_state(0)
    np.testing.assert_allclose(
        state.output.best_value, np.asarray(state.output.effect_mean)[CANDIDATES].min(), atol=1e-6
    )


def test_permuting_variables_permutes_the_distribution(act):
    order, state = np.array([4, 0, 3, 1, 2, 5]), make_state(1)
    task = Task(jnp.array(3), *(x[order] for x in (TASK.low, TASK.high, TASK.var_mask)))
    moved = eqx.tree_at(
        lambda s: [*per_variable(s), s.output.logits, s.output.task],
        state,
        [*(x[order] for x in per_variable(state)), state.output.logits[:, order], task],
    )
    np.testing.assert_allclose(act(moved).logits, act(state).logits[order], atol=1e-4)


def test_what_is_said_of_padding_and_fixed_variables_does_not_matter(act):
    state, other = make_state(2), make_state(3)
    nonsense = [
        jnp.where(TASK.candidates.reshape(-1, *[1] * (one.ndim - 1)), one, 3.0 * two)
        for one, two in zip(per_variable(state), per_variable(other), strict=True)
    ]
    spoilt = eqx.tree_at(per_variable, state, nonsense)
    np.testing.assert_allclose(act(spoilt).logits, act(state).logits, atol=1e-5)


def test_progress_and_predictions_matter(act):
    state = make_state(4)
    mean = state.output.effect_mean.at[CANDIDATES[0], 0].add(-3.0)
    lower = eqx.tree_at(lambda s: s.output.effect_mean, state, mean)
    later = eqx.tree_at(lambda s: s.steps_left, state, jnp.array(1))
    for changed, difference in ((later, 1e-4), (lower, 1e-3)):
        assert jnp.abs((act(changed).logits - act(state).logits)[CANDIDATES]).max() > difference


def test_features_beyond_the_span_of_training_are_clipped_to_it(policy):
    """Progress, and what is predicted, farther and farther from anything that was shown."""
    state = make_state(5)
    shown = eqx.tree_at(lambda p: p.span, policy, feature_span(state))
    act = eqx.filter_jit(lambda policy, state: policy(state).logits[CANDIDATES])
    np.testing.assert_allclose(act(shown, state), act(policy, state), atol=1e-6)

    def far(times):
        changed = (
            state.step + times,
            state.steps_left + times,
            state.output.statistics + 4.0 * times,
        )
        return eqx.tree_at(lambda s: (s.step, s.steps_left, s.output.statistics), state, changed)

    assert jnp.abs(act(policy, far(2)) - act(policy, far(1))).max() > 1e-3
    at_the_end = eqx.tree_at(lambda s: s.step, far(9), far(9).step + 10**6)
    np.testing.assert_allclose(act(shown, at_the_end), act(shown, far(9)), atol=1e-6)


def test_units_of_the_target_do_not_matter(act):
    state = make_state(5)

    def in_units(state):
        return [getattr(state.output, n) for n in ("effect_mean", "shift", "effect_std", "spread")]

    mean, shift, std, spread = (10.0 * x for x in in_units(state))
    scaled = eqx.tree_at(in_units, state, [mean + 3.0, shift + 3.0, std, spread])
    np.testing.assert_allclose(act(scaled).logits, act(state).logits, atol=1e-4)


def test_no_gradient_reaches_the_surrogate_and_all_of_it_the_policy(policy):
    state = make_state(6)

    def objective(both):
        policy, output = both
        there = eqx.tree_at(lambda s: s.output, state, output)
        return policy(there).log_prob(jnp.array(CANDIDATES[0]), jnp.array(0.3))

    to_policy, to_output = eqx.filter_jit(eqx.filter_grad(objective))((policy, state.output))
    span, others = to_policy.span, eqx.tree_at(lambda p: p.span, to_policy, None)
    assert all((leaf == 0).all() for leaf in (span, *jax.tree.leaves(to_output)))  # span: measured
    norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(others)]
    # a shift of all scores changes nothing
    assert np.isfinite(norms).all() and sum(n > 0 for n in norms) >= len(norms) - 1


# --- states that no decision can be based on ---


OTHER_DATA = lambda s: s.buffer, ExperienceBuffer.empty(SLOTS + 1, 4)


@pytest.mark.parametrize(
    ("check", "change", "target", "said"),
    [
        (check_state, (lambda s: s.step, jnp.array(0)), 0, "about target 1, not 0"),
        (check_state, OTHER_DATA, None, "7 variables, its task 6"),
        (eqx.filter_jit(check_state), OTHER_DATA, None, "7 variables, its task 6"),
        (
            check_state,
            (lambda s: s.output.task.target, jnp.array(SLOTS - 1)),
            None,
            "target 5 is not one of the 5 variables",
        ),
        (check_state, (lambda s: s.output.task.high, LOW), None, "range of positive width"),
    ],
)
def test_a_state_must_fit_its_data_its_target_and_something_to_set(check, change, target, said):
    where, value = change
    with pytest.raises(ValueError, match=said):
        check(eqx.tree_at(where, make_state(0), value), target)


def test_inside_a_program_only_shapes_are_checked():
    check_state(make_state(0))
    check_state(make_state(0), TARGET)
    eqx.filter_jit(check_state)(make_state(0), jnp.array(0))
