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
from lib.evidence import NUM_EVIDENCE
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
from lib.surrogate import SurrogateOutput


REAL, SLOTS, BINS, TOKEN, TARGET = 5, 6, 5, 12, 1


def make_task(fixed=3):
    """Variable 1 is the target, `fixed` has no range, the last slot is padding: three candidates
    are left.
    """
    real = jnp.arange(SLOTS) < REAL
    low = jnp.where(real, -1.0 - jnp.arange(SLOTS), 0.0)
    return Task(
        jnp.array(TARGET),
        low,
        jnp.where(jnp.arange(SLOTS) == fixed, low, jnp.where(real, 2.0, 0.0)),
        real,
    )


TASK = make_task()
CANDIDATES = np.flatnonzero(TASK.candidates)


def make_distribution(seed, scale=1.5):
    logits = jnp.where(
        TASK.candidates[:, None], scale * jr.normal(jr.key(seed), (SLOTS, BINS)), -jnp.inf
    )
    return InterventionDistribution(TASK, jax.nn.log_softmax(logits, axis=(0, 1)))


def make_state(seed):
    """What a surrogate might say; nonsense wherever nobody may look."""
    logit_key, mean_key, std_key, token_key, evidence_key = jr.split(jr.key(seed), 5)
    output = SurrogateOutput(
        TASK,
        jr.normal(logit_key, (2, SLOTS)),
        jnp.log(jnp.array([0.3, 0.7])),
        value_grid(TASK.low, TASK.high, BINS),
        jr.normal(mean_key, (SLOTS, BINS)),
        jnp.exp(jr.normal(std_key, (SLOTS, BINS))),
        jr.normal(token_key, (SLOTS, TOKEN)),
        jr.normal(evidence_key, (SLOTS, BINS, NUM_EVIDENCE)),
        jnp.array(0.5),
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
    jit_policy = eqx.filter_jit(lambda policy, state: policy(state))
    return lambda state: jit_policy(policy, state)


@pytest.mark.parametrize("seed", [0, 1])
def test_density_integrates_to_one(seed):
    distribution = make_distribution(seed)
    # midpoints, 400 is a multiple of twice the number of inner cells
    points = (jnp.arange(400) + 0.5) / 400
    density = jax.jit(
        jax.vmap(
            jax.vmap(
                lambda i, u: jnp.exp(distribution.log_prob(i, distribution.value(i, u))), (None, 0)
            ),
            (0, None),
        )
    )
    integral = density(jnp.asarray(CANDIDATES), points).mean(1)
    np.testing.assert_allclose(integral, jnp.exp(distribution.logits).sum(1)[CANDIDATES], atol=1e-4)
    np.testing.assert_allclose(integral.sum(), 1.0, atol=1e-4)


def test_cells_are_those_nearest_to_the_grid():
    distribution = make_distribution(0)
    for i in CANDIDATES.tolist():
        grid = np.asarray(value_grid(TASK.low, TASK.high, BINS))[i]
        values = np.linspace(grid[0], grid[-1], 37, dtype=np.float32)[1:-1:2]
        nearest = np.abs(values[:, None] - grid).argmin(1)
        assert (
            np.asarray(
                jax.vmap(lambda v, i=i: distribution.cell(jnp.array(i), v))(jnp.asarray(values))
            )
            == nearest
        ).all()
    np.testing.assert_allclose(
        jnp.exp(distribution.log_widths), [0.125, 0.25, 0.25, 0.25, 0.125], atol=1e-6
    )


def test_samples_fall_within_range_on_candidates_as_often_as_they_should():
    distribution, count = make_distribution(2), 4000
    variable, value = (
        np.asarray(x) for x in jax.jit(jax.vmap(distribution.sample))(jr.split(jr.key(0), count))
    )
    assert set(variable) <= set(CANDIDATES)
    low, high = np.asarray(TASK.low)[variable], np.asarray(TASK.high)[variable]
    assert (value >= low).all() and (value <= high).all()
    cells = np.asarray(jax.jit(jax.vmap(distribution.cell))(variable, value))
    seen = np.zeros((SLOTS, BINS))
    np.add.at(seen, (variable, cells), 1)
    probs = np.asarray(jnp.exp(distribution.logits), float)
    assert (
        scipy.stats.chisquare(
            seen[CANDIDATES].ravel(), count * probs[CANDIDATES].ravel() / probs[CANDIDATES].sum()
        ).pvalue
        > 1e-4
    )
    # a half cell at the low end, filled evenly
    ends = value[(variable == CANDIDATES[0]) & (cells == 0)]
    start, width = float(TASK.low[CANDIDATES[0]]), float((TASK.high - TASK.low)[CANDIDATES[0]]) / 8
    assert scipy.stats.kstest(ends, "uniform", (start, width)).pvalue > 1e-4


def test_mode_is_the_most_probable_cell():
    distribution = make_distribution(3)
    variable, value = distribution.mode()
    assert (
        distribution.logits[variable, distribution.cell(variable, value)]
        == distribution.logits.max()
    )
    assert jnp.isclose(value, value_grid(TASK.low, TASK.high, BINS)[variable], atol=1e-6).any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_entropy_of_a_uniform_distribution_is_the_log_of_its_variables(count):
    chosen = np.isin(np.arange(SLOTS), CANDIDATES[:count])
    task = Task(TASK.target, TASK.low, jnp.where(chosen, TASK.high, TASK.low), TASK.var_mask)
    widths = make_distribution(0).log_widths
    uniform = InterventionDistribution(
        task, jnp.where(chosen[:, None], widths[None] - np.log(count), -jnp.inf)
    )
    np.testing.assert_allclose(uniform.entropy(), np.log(count), atol=1e-5)
    assert make_distribution(4).entropy() < np.log(3)


def test_entropy_and_kl_agree_with_samples():
    one, two = make_distribution(5, 0.5), make_distribution(6, 0.5)
    variable, value = jax.jit(jax.vmap(one.sample))(jr.split(jr.key(1), 4000))
    ours, theirs = (np.asarray(jax.jit(jax.vmap(d.log_prob))(variable, value)) for d in (one, two))
    for exact, draws in ((one.entropy(), -ours), (one.kl(two), ours - theirs)):
        assert abs(draws.mean() - exact) < 5 * draws.std() / np.sqrt(len(draws))


def test_kl_is_zero_to_itself_and_positive_otherwise():
    one, two = make_distribution(7), make_distribution(8)
    np.testing.assert_allclose(one.kl(one), 0.0, atol=1e-6)
    assert one.kl(two) > 0.1 and two.kl(one) > 0.1
    gradient = jax.grad(lambda logits: InterventionDistribution(TASK, logits).kl(two))(one.logits)
    assert jnp.isfinite(gradient).all()


def test_rules_choose_candidates_and_weigh_uncertainty():
    """Expected improvement prefers the uncertain cell where means are equal; Thompson sampling
    follows the mean where it is certain.
    """
    output = make_state(0).output
    flat = eqx.tree_at(
        lambda o: (o.effect_mean, o.effect_std),
        output,
        (jnp.zeros((SLOTS, BINS)), jnp.ones((SLOTS, BINS)).at[4, 2].set(2.0)),
    )
    variable, value = expected_improvement_choice(flat)
    assert (int(variable), float(value)) == (4, float(output.grid[4, 2]))
    sure = eqx.tree_at(lambda o: o.effect_std, output, jnp.full((SLOTS, BINS), 1e-6))
    assert jnp.array_equal(jnp.stack(thompson_choice(jr.key(0), sure)), jnp.stack(sure.best()))
    assert jnp.array_equal(jnp.stack(expected_improvement_choice(sure)), jnp.stack(sure.best()))
    drawn = jax.vmap(lambda k: thompson_choice(k, flat)[0])(jr.split(jr.key(1), 400))
    assert set(np.unique(drawn)) == set(CANDIDATES)
    # of three candidates the uncertain one is lowest more often than not
    assert (drawn == 4).mean() > 0.4


def test_policy_gives_a_distribution_over_candidates(act):
    distribution = act(make_state(0))
    np.testing.assert_allclose(jnp.exp(distribution.logits).sum(), 1.0, atol=1e-5)
    assert ((np.asarray(distribution.logits) > -np.inf).all(1) == np.asarray(TASK.candidates)).all()
    assert np.ptp(np.asarray(distribution.logits)[CANDIDATES]) > 1e-2


def test_incumbent_is_the_lowest_candidate():
    state = make_state(0)
    np.testing.assert_allclose(
        state.best_value, np.asarray(state.output.effect_mean)[CANDIDATES].min(), atol=1e-6
    )


def reordered(state, order, target):
    """The same state with variable `order[i]` in slot i."""
    task, output = state.task, state.output
    moved = {
        "task": Task(jnp.array(target), task.low[order], task.high[order], task.var_mask[order]),
        "logits": output.logits[:, order],
    }
    moved |= {
        name: getattr(output, name)[order]
        for name in ("grid", "effect_mean", "effect_std", "tokens", "evidence")
    }
    names = SurrogateOutput.__dataclass_fields__
    return AcquisitionState(
        state.buffer,
        SurrogateOutput(**{n: moved.get(n, getattr(output, n)) for n in names}),
        state.step,
        state.steps_left,
    )


def test_permuting_variables_permutes_the_distribution(act):
    order = np.array([4, 0, 3, 1, 2, 5])
    np.testing.assert_allclose(
        act(reordered(make_state(1), order, 3)).logits, act(make_state(1)).logits[order], atol=1e-4
    )


def test_what_is_said_of_padding_and_fixed_variables_does_not_matter(act):
    state = make_state(2)
    ignored = ~TASK.candidates
    other = make_state(3).output
    spoilt = eqx.tree_at(
        lambda s: [
            getattr(s.output, name) for name in ("effect_mean", "effect_std", "tokens", "evidence")
        ],
        state,
        [
            jnp.where(
                ignored.reshape(-1, *[1] * (getattr(other, name).ndim - 1)),
                3.0 * getattr(other, name),
                getattr(state.output, name),
            )
            for name in ("effect_mean", "effect_std", "tokens", "evidence")
        ],
    )
    np.testing.assert_allclose(act(spoilt).logits, act(state).logits, atol=1e-5)


def test_progress_and_predictions_matter(act):
    state = make_state(4)
    later = eqx.tree_at(lambda s: s.steps_left, state, jnp.array(1))
    lower = eqx.tree_at(
        lambda s: s.output.effect_mean,
        state,
        state.output.effect_mean.at[CANDIDATES[0], 0].add(-3.0),
    )
    before = act(state).logits[CANDIDATES]
    assert jnp.abs(act(later).logits[CANDIDATES] - before).max() > 1e-4
    assert jnp.abs(act(lower).logits[CANDIDATES] - before).max() > 1e-3


def test_features_beyond_the_span_of_training_are_clipped_to_it(policy):
    """Progress, and what is predicted, farther and farther from anything that was shown."""
    state = make_state(5)
    shown = eqx.tree_at(lambda p: p.span, policy, feature_span(state))
    act = eqx.filter_jit(lambda policy, state: policy(state).logits[CANDIDATES])
    np.testing.assert_allclose(act(shown, state), act(policy, state), atol=1e-6)

    def far(times):
        changed = state.step + times, state.steps_left + times, state.output.evidence + 4.0 * times
        return eqx.tree_at(lambda s: (s.step, s.steps_left, s.output.evidence), state, changed)

    assert jnp.abs(act(policy, far(2)) - act(policy, far(1))).max() > 1e-3
    at_the_end = eqx.tree_at(lambda s: s.step, far(9), far(9).step + 10**6)
    np.testing.assert_allclose(act(shown, at_the_end), act(shown, far(9)), atol=1e-6)


def test_units_of_the_target_do_not_matter(act):
    state = make_state(5)
    scaled = eqx.tree_at(
        lambda s: (s.output.effect_mean, s.output.effect_std, s.output.shift, s.output.spread),
        state,
        (
            10.0 * state.output.effect_mean + 3.0,
            10.0 * state.output.effect_std,
            10.0 * state.output.shift + 3.0,
            10.0 * state.output.spread,
        ),
    )
    np.testing.assert_allclose(act(scaled).logits, act(state).logits, atol=1e-4)


def test_no_gradient_reaches_the_surrogate_and_all_of_it_the_policy(policy):
    state = make_state(6)

    def objective(both):
        policy, output = both
        return policy(
            AcquisitionState(state.buffer, output, state.step, state.steps_left)
        ).log_prob(jnp.array(CANDIDATES[0]), jnp.array(0.3))

    to_policy, to_output = eqx.filter_jit(eqx.filter_grad(objective))((policy, state.output))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(to_output))
    assert (to_policy.span == 0).all()  # measured, not learned
    to_policy = eqx.tree_at(lambda p: p.span, to_policy, None)
    norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(to_policy)]
    # a shift of all scores changes nothing
    assert np.isfinite(norms).all() and sum(n > 0 for n in norms) >= len(norms) - 1


# --- states that no decision can be based on ---


def test_a_state_must_fit_its_data_its_target_and_something_to_set():
    state = make_state(0)
    check_state(state)
    check_state(state, TARGET)
    with pytest.raises(ValueError, match="about target 1, not 0"):
        check_state(state, 0)
    other_data = eqx.tree_at(lambda s: s.buffer, state, ExperienceBuffer.empty(SLOTS + 1, 4))
    with pytest.raises(ValueError, match="7 variables, its task 6"):
        check_state(other_data)
    padding = eqx.tree_at(lambda s: s.output.task.target, state, jnp.array(SLOTS - 1))
    with pytest.raises(ValueError, match="target 5 is not one of the 5 variables"):
        check_state(padding)
    narrow = eqx.tree_at(lambda s: s.output.task.high, state, TASK.low)
    with pytest.raises(ValueError, match="range of positive width"):
        check_state(narrow)


def test_inside_a_program_only_shapes_are_checked():
    state = make_state(0)
    eqx.filter_jit(check_state)(state, jnp.array(0))
    with pytest.raises(ValueError, match="7 variables"):
        eqx.filter_jit(check_state)(
            eqx.tree_at(lambda s: s.buffer, state, ExperienceBuffer.empty(SLOTS + 1, 4))
        )
