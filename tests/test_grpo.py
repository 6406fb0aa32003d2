"""GRPO against a numpy loop, against REINFORCE, and on a campaign whose candidates come in
twins.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from lib import grpo
from lib.policy import AcquisitionPolicyNetwork, InterventionDistribution, PolicyConfig, make_state
from lib.problems import DataDesign, draw_problem
from lib.rewards import RewardConfig
from lib.scm import value_grid
from lib.scm_prior import SCMPrior
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig
from lib.training import Learner


BINS, STEPS, GROUP = 5, 3, 6
PRIOR = SCMPrior(max_vars=5, min_size=4, max_size=4)
DESIGN = DataDesign(min_obs=6, max_obs=10, per_variable=1, num_steps=STEPS)
SIZES = SurrogateConfig(
    model_hidden_dim=16, model_n_layers=1, num_heads=2, head_dim=4, num_components=2, num_bins=BINS
)
CONFIG = grpo.GRPOConfig(group_size=GROUP, kl_weight=0.0, entropy_weight=0.0, learning_rate=1e-2)


class Twins(InterventionDistribution):
    """Only ever samples the centres of its two likeliest cells, so that a group holds the same
    action many times.
    """

    def sample(self, key):
        _, likely = jax.lax.top_k(self.logits.reshape(-1), 2)
        variable, index = jnp.unravel_index(
            likely[jr.bernoulli(key).astype(int)], self.logits.shape
        )
        return variable, self.value(variable, index / (self.num_bins - 1))


class TwinPolicy(AcquisitionPolicyNetwork):
    def __call__(self, state):
        return Twins(state.task, super().__call__(state).logits)


@pytest.fixture(scope="module")
def problem():
    return eqx.filter_jit(draw_problem)(jr.key(0), PRIOR, DESIGN, BINS)


@pytest.fixture(scope="module")
def policy():
    return TwinPolicy(
        PolicyConfig(policy_hidden_dim=16, policy_n_layers=1),
        3 * SIZES.model_hidden_dim,
        key=jr.key(1),
    )


collect = eqx.filter_jit(grpo.collect_campaign)


@pytest.fixture(scope="module")
def simulator(problem):
    surrogate = eqx.filter_jit(ParentSetPredictionModel)(SIZES, key=jr.key(2))
    return grpo.Simulator(surrogate, problem.scm, problem.truth, RewardConfig())


@pytest.fixture(scope="module")
def campaign(problem, policy, simulator):
    return collect(jr.key(3), simulator, policy, problem.buffer, STEPS, CONFIG)


def test_a_full_buffer_is_refused_or_marked(policy, simulator, campaign):
    nearly = jax.tree.map(lambda leaf: leaf[: campaign[1].size + STEPS - 1], campaign[1])
    arguments = jr.key(3), simulator, policy, nearly, STEPS, CONFIG
    with pytest.raises(ValueError, match="too few for its rows and 3 experiments"):
        grpo.collect_campaign(*arguments)
    groups, _ = collect(*arguments)
    assert jnp.isnan(groups.reward.total).all() and jnp.isfinite(campaign[0].reward.total).all()


@pytest.fixture(scope="module")
def gradient():
    """`(policy, groups) -> ((loss, metrics), gradient)` with the policy as its own reference."""
    both = eqx.filter_value_and_grad(grpo.grpo_loss, has_aux=True)
    return eqx.filter_jit(lambda policy, groups: both(policy, policy, groups, CONFIG))


def like_the_first(groups):
    """Which candidates `[steps, group]` are the same action as the first of their group."""
    columns = np.asarray(groups.variable), np.asarray(groups.value)
    return np.all([column == column[:, :1] for column in columns], 0)


def with_rewards(groups, rewards):
    return eqx.tree_at(lambda g: g.reward.total, groups, jnp.asarray(rewards, jnp.float32))


def loop_advantages(rewards):
    """Centred per group, scaled by the deviation over groups whose rewards differ; the others get
    zeros.
    """
    live = np.array([np.max(group) - np.min(group) > 1e-4 for group in rewards])
    centred = np.array([group - np.mean(group) for group in rewards]) * live[:, None]
    return centred / np.sqrt(np.mean(centred[live] ** 2 if live.any() else 0) + 1e-12), live


def log_probs(policy, groups):
    return jax.vmap(lambda g: jax.vmap(policy(g.state).log_prob)(g.variable, g.value))(groups)


REWARDS = np.array([[0.1, -0.4, 0.3, 0.9, 0.0, 0.2], [0.5] * GROUP, [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    "rewards",
    [
        REWARDS,
        10.0 * REWARDS + 3.0,
        np.random.default_rng(0).normal(size=(3, GROUP)),
        np.full((2, 4), 0.7),
    ],
)
def test_advantages_agree_with_a_loop_and_sum_to_zero(rewards):
    advantages, live = grpo.group_advantages(jnp.asarray(rewards, jnp.float32))
    expected, alive = loop_advantages(rewards)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(advantages.sum(1), 0.0, atol=1e-5)
    assert live.tolist() == alive.tolist()


def test_a_problem_has_room_for_its_campaign(problem):
    scm, truth, buffer = problem
    observed = buffer.observational.sum()
    assert buffer.valid.shape[0] == DESIGN.max_obs + DESIGN.per_variable * PRIOR.max_vars + STEPS
    assert DESIGN.min_obs <= observed <= DESIGN.max_obs and buffer.size - observed == 3
    effects = jax.jit(lambda scm: scm.effect_table(value_grid(scm.low, scm.high, BINS)))(scm)
    np.testing.assert_allclose(truth.effects, effects, atol=1e-5)
    assert (truth.parents == scm.parents).all() and abs(truth.baseline) < 0.3


def test_a_campaign_adds_the_first_candidates_action_and_nothing_else(problem, campaign):
    groups, final = campaign
    start, steps = int(problem.buffer.size), np.arange(STEPS)
    assert final.size == start + STEPS
    assert (final.values[:start] == problem.buffer.values[:start]).all()
    variable, rows = np.asarray(groups.variable[:, 0]), np.asarray(final.values)[start:][:STEPS]
    chosen = variable[:, None] == np.arange(PRIOR.max_vars)
    assert (final.intervened[start + steps] == chosen).all()
    assert (rows[chosen] == groups.value[:, 0]).all()
    assert len(np.unique(rows[:, np.asarray(problem.scm.var_mask)], axis=0)) == STEPS
    state = groups.state
    assert (state.step == steps).all() and (state.steps_left == STEPS - steps).all()
    for t in range(STEPS):
        assert state.buffer.valid[t].sum() == start + t
        assert (state.buffer.values[t, : start + t] == final.values[: start + t]).all()


def test_twins_share_their_noise(problem, campaign):
    """Two candidates with the same action get the same outcome, hence the same reward, although the
    system is noisy; other actions get others.
    """
    groups, _ = campaign
    assert (problem.scm.noise_scale > 0.1).all()
    same = like_the_first(groups)
    one, two = (np.ma.array(groups.reward.total, mask=mask) for mask in (~same, same))
    assert one.ptp(1).max() < 1e-5 and two.ptp(1).max() < 1e-5
    assert (abs(one.min(1) - two.min(1)) > 1e-4).any()


def test_states_read_from_sums_are_those_of_the_whole_data(problem, simulator, campaign):
    task, last = problem.scm.task, jax.tree.map(lambda leaf: leaf[-1], campaign[0].state)
    whole = eqx.filter_jit(make_state)(simulator.surrogate, last.buffer, task, STEPS - 1, 1)
    one, two = (s.output.effect_mean[task.candidates] for s in (last, whole))
    np.testing.assert_allclose(one, two, atol=1e-3)
    np.testing.assert_allclose(last.output.marginals(), whole.output.marginals(), atol=1e-3)


def test_at_the_old_policy_the_gradient_is_that_of_reinforce(policy, campaign, gradient):
    groups = with_rewards(campaign[0], REWARDS)
    advantages, live = loop_advantages(REWARDS)
    weights = jnp.asarray(-advantages / live.sum() / GROUP, jnp.float32)
    (_, metrics), ours = gradient(policy, groups)
    reinforce = eqx.filter_grad(lambda p: (log_probs(p, groups) * weights).sum())
    theirs = eqx.filter_jit(reinforce)(policy)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(ours)) > 1e-3
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    found = metrics.without_signal, metrics.kl, metrics.clipped, metrics.reward
    np.testing.assert_allclose(found, [1 / 3, 0.0, 0.0, REWARDS.mean()], atol=1e-6)


def test_equal_rewards_give_no_gradient(policy, campaign, gradient):
    equal = with_rewards(campaign[0], np.full((STEPS, GROUP), 0.3))
    (loss, metrics), gradients = gradient(policy, equal)
    assert loss == 0 and metrics.without_signal == 1
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_clipped_objective_agrees_with_a_loop(policy, campaign, gradient):
    groups = with_rewards(campaign[0], REWARDS)
    ratio = np.exp(np.random.default_rng(1).normal(scale=0.3, size=REWARDS.shape))
    old = groups.log_prob - jnp.asarray(np.log(ratio), jnp.float32)
    (loss, metrics), _ = gradient(policy, eqx.tree_at(lambda g: g.log_prob, groups, old))
    advantages, live = loop_advantages(REWARDS)
    clipped = np.clip(ratio, 0.8, 1.2)
    terms = np.minimum(ratio * advantages, clipped * advantages)[live > 0]
    np.testing.assert_allclose(loss, -terms.mean(), atol=1e-4)
    np.testing.assert_allclose(metrics.clipped, (clipped != ratio).mean(), atol=1e-6)


def test_an_update_favours_the_better_twin(policy, campaign):
    groups, optimiser = campaign[0], optax.adam(CONFIG.learning_rate)
    learner, better = Learner.of(policy, optimiser), like_the_first(groups)
    assert not better.all(1).all()  # somewhere both twins were drawn
    update = eqx.filter_jit(lambda g: grpo.grpo_step(learner, optimiser, policy, g, CONFIG))
    (new, _), metrics = update(with_rewards(groups, better))
    gain = np.asarray(eqx.filter_jit(log_probs)(new, groups) - groups.log_prob)
    assert (gain * loop_advantages(better.astype(float))[0]).mean() > 0.004
    assert metrics.kl > 0  # before the last step, after the first
