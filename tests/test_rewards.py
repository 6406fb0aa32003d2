"""Rewards on hand-made cases. Four slots: variable 0 and 1 can be set, 2 is the target, 3 is
padding; three values -1, 0, 1.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.buffer import ExperienceBuffer
from lib.policy import AcquisitionState
from lib.problems import GroundTruth
from lib.rewards import MAX_GAIN, RewardConfig, experiment_reward, recommended_effect
from lib.scm import Task, value_grid
from lib.statistics import NUM_EFFECT_STATISTICS
from lib.surrogate import SurrogateOutput


REAL = jnp.array([True, True, True, False])
TASK = Task(jnp.array(2), jnp.where(REAL, -1.0, 0.0), jnp.where(REAL, 1.0, 0.0), REAL)
EFFECTS = [[2.0, 1.0, 0.0], [1.0, 1.0, -1.0], [np.inf] * 3, [np.inf] * 3]
# possible improvement: 1 - (-1) = 2
TRUTH = GroundTruth(jnp.array(EFFECTS), jnp.array(1.0), jnp.array([True, False, False, False]))
reward_of = eqx.filter_jit(experiment_reward)


def make_state(best, logits=(0.0, 0.0), spread=1.0):
    """A state in which the cell `best` is recommended, with independent parents of the given
    logits.
    """
    mean = jnp.ones((4, 3)).at[best].set(0.0).at[2:].set(-9.0)
    each = jnp.array([[*logits, 5.0, 5.0]])  # those of target and padding must not count
    blank = (
        jnp.zeros((4, 2)),
        jnp.zeros((4, 3, NUM_EFFECT_STATISTICS)),
        jnp.array(0.0),
        jnp.array(spread),
        jnp.array(spread),
    )
    surface = value_grid(TASK.low, TASK.high, 3), mean, jnp.ones((4, 3))
    output = SurrogateOutput(TASK, each, jnp.zeros(1), *surface, *blank)
    return AcquisitionState(ExperienceBuffer.empty(4, 2), output, jnp.array(0), jnp.array(3))


def score(before, variable, after, truth: GroundTruth | None = TRUTH, **weights):
    return reward_of(
        before, jnp.array(variable), after, RewardConfig(**(dict(temperature=0.0) | weights)), truth
    )


def test_possible_improvement_stays_positive():
    low = GroundTruth(TRUTH.effects, jnp.array(-2.0), TRUTH.parents)
    np.testing.assert_allclose([TRUTH.possible_improvement, low.possible_improvement], [2.0, 0.05])


ODDS = np.exp(-1 / 0.5 / 2.0)  # spread 2


@pytest.mark.parametrize(
    ("best", "spread", "temperature", "expected", "tolerance"),
    [
        ((0, 1), 1.0, 0.0, 1.0, 1e-6),
        ((1, 2), 1.0, 0.0, -1.0, 1e-6),
        ((0, 1), 2.0, 0.5, (1.0 + ODDS * (2 + 0 + 1 + 1 - 1)) / (1 + 5 * ODDS), 1e-6),
        ((0, 1), 1.0, 0.01, 1.0, 1e-5),
    ],
)
def test_what_is_recommended_is_worth_its_true_effect(
    best, spread, temperature, expected, tolerance
):
    """At a temperature, all cells count: one predicted at 0, five at 1 (those of the target and of
    padding, at -9, do not).
    """
    found = recommended_effect(TRUTH, make_state(best, spread=spread).output, temperature)
    np.testing.assert_allclose(found, expected, atol=tolerance)


RIGHT, WRONG = ((0, 1), (1.0, -1.0)), ((0, 1), (-30.0, 30.0))
SLIGHT = GroundTruth(TRUTH.effects, jnp.array(-1.0), TRUTH.parents)
GAIN = 2 * np.log(1 / (1 + np.exp(-1.0)) / 0.5)


@pytest.mark.parametrize(
    ("before", "variable", "after", "truth", "expected"),
    [
        # incumbent do(X0 = 0), worth 1; after an experiment on X1 do(X0 = 1), worth 0: 1 of 2
        (((0, 1),), 1, ((0, 2),), TRUTH, (0.5, 0.0, 0.0)),
        # from 0 to 2: minus one share; where nothing is to gain, shares of .05 are clipped
        *((((0, 2),), 0, ((0, 0),), truth, (-1.0, 0.0, 1.0)) for truth in (TRUTH, SLIGHT)),
        # repeating the incumbent and learning nothing
        *(((best,), best[0], (best,), TRUTH, (0, 0, best[0] == 0)) for best in ((0, 2), (1, 2))),
        # the gain in log-probability of the true set, clipped
        (((0, 1),), 0, RIGHT, TRUTH, (0.0, GAIN, 1.0)),
        (((0, 1),), 0, WRONG, TRUTH, (0.0, -MAX_GAIN, 1.0)),
        (WRONG, 0, RIGHT, TRUTH, (0.0, MAX_GAIN, 1.0)),
        # parents are the true ones, although the surrogate is wrong about both
        *((WRONG, i, WRONG, TRUTH, (0.0, 0.0, 1.0 - i)) for i in (0, 1)),
    ],
)
def test_cases_worked_out_by_hand(before, variable, after, truth, expected):
    reward = score(make_state(*before), variable, make_state(*after), truth)
    found = reward.optimization, reward.structure_discovery, reward.parent_intervention
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_add_up():
    weights = dict(structure_weight=0.5, parent_weight=0.25)
    reward = score(make_state((0, 1)), 0, make_state((1, 2), (2.0, -1.0)), **weights)
    parts = reward.optimization, reward.structure_discovery, reward.parent_intervention
    np.testing.assert_allclose(reward.total, np.dot([1.0, 0.5, 0.25], parts), atol=1e-6)
    assert np.abs(parts).min() > 0.1


def test_what_has_nothing_to_do_with_the_action_does_not_move_the_reward():
    before, after = make_state((0, 1)), make_state((0, 2), (1.0, 0.0))
    unmoved = jax.tree.leaves(score(before, 0, after))
    # another variable, still above the minimum
    others = GroundTruth(TRUTH.effects.at[1, :2].set(0.5), TRUTH.baseline, TRUTH.parents)
    # target and padding
    spoilt = eqx.tree_at(lambda s: s.output.logits, after, after.output.logits.at[:, 2:].set(-50.0))
    for changed in (score(before, 0, after, others), score(before, 0, spoilt)):
        np.testing.assert_allclose(jax.tree.leaves(changed), unmoved, atol=1e-6)


def test_without_truth_only_predictions_count():
    """Predicted gains in standard deviations of the target, the drop of the entropy, and the
    marginal: what deployment can know.
    """
    before, after = make_state((0, 1), spread=2.0), make_state((1, 2), (3.0, -3.0), spread=2.0)
    mean = after.output.effect_mean.at[1, 2].set(-0.5)
    reward = score(before, 0, eqx.tree_at(lambda s: s.output.effect_mean, after, mean), None)
    p = 1 / (1 + np.exp(-3.0))
    drop = 2 * np.log(2) + 2 * (p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(reward.structure_discovery, drop, atol=1e-4)
    found = reward.optimization, reward.parent_intervention
    np.testing.assert_allclose(found, [0.5 / 2, 0.5], atol=1e-6)


def test_states_about_different_targets_have_no_reward():
    other = eqx.tree_at(lambda s: s.output.task.target, make_state((0, 1)), jnp.array(1))
    with pytest.raises(ValueError, match="about target 1, not 2"):
        experiment_reward(make_state((0, 1)), jnp.array(0), other, RewardConfig(), TRUTH)


# --- exploits: three experiments that teach nothing must not pay ---


def test_exploits_earn_less_than_learning():
    """Repeating one parent, setting the noisiest variable, and intervening where nothing moves:
    without a better recommendation or belief, the parent bonus is all there is, and it stays below
    the value of finding an action that is better by a tenth of what is possible.
    """
    state = make_state((0, 1))
    repeated = score(state, 0, state)  # a parent, again, with nothing learned
    worthless = score(state, 1, state)  # not a parent, nothing moves
    # a noisy outcome that misleads: the recommendation gets worse
    noise = score(state, 1, make_state((0, 0)))
    tenth = GroundTruth(TRUTH.effects.at[0, 2].set(0.8), TRUTH.baseline, TRUTH.parents)
    learned = score(state, 1, make_state((0, 2)), tenth)
    assert worthless.total == 0.0 and noise.total < 0.0
    np.testing.assert_allclose(learned.optimization, 0.1, atol=1e-6)
    assert learned.total > repeated.total >= 0.0


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_campaign_cannot_earn_by_going_round_in_circles(temperature):
    """Rewards telescope: leaving the best action and finding it again earns what staying does, at
    any temperature.
    """
    path = [make_state(best) for best in ((0, 1), (0, 2), (1, 0), (0, 1))]
    settings = dict(parent_weight=0.0, temperature=temperature)
    rewards = [float(score(a, 0, b, **settings).total) for a, b in itertools.pairwise(path)]
    np.testing.assert_allclose(sum(rewards), 0.0, atol=1e-6)
