"""Verifiable rewards: improvement, structure discovery, and intervening on parents
(multi_stage_training.md, stage 2).
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lib.policy import AcquisitionState, check_state
from lib.problems import GroundTruth
from lib.scm import highest
from lib.surrogate import SurrogateOutput


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the components in `total`, beside the noise-free improvement of the recommended
    action as a share of the possible improvement, which has weight 1.
    """

    temperature: float = 0.1
    """Recommend each action with a probability that falls by e per this many deviations of the
    target in its predicted mean; 0 recommends the best.

    Most experiments leave the best action what it was, so that at 0 two of three groups of
    candidates earn nothing at all.
    """
    structure_weight: float = 0.05
    """Gain in the log-probability of the true parent set, in nats (clipped to +-2)."""
    parent_weight: float = 0.02
    """Intervening on a true parent."""


class RewardComponents(eqx.Module):
    """One experiment's reward: three components before weighting, and their weighted sum."""

    optimization: Float[Array, ""]
    structure_discovery: Float[Array, ""]
    parent_intervention: Float[Array, ""]
    total: Float[Array, ""]


def recommended_effect(
    truth: GroundTruth, output: SurrogateOutput, temperature: float
) -> Float[Array, ""]:
    """E[Y | do] of what is recommended on the grid; its mean over recommendations where
    `temperature` is positive.
    """
    allowed, score = output.task.candidates[:, None], -output.effect_mean / output.spread
    if temperature == 0.0:
        return truth.effects[highest(score, allowed)]
    chance = jax.nn.softmax(score / temperature, (0, 1), allowed)
    return jnp.where(allowed, chance * truth.effects, 0.0).sum()


MAX_GAIN = 2.0  # nats: one lucky jump of the posterior must not dominate a batch of advantages


def experiment_reward(
    state: AcquisitionState,
    variable: Int[Array, ""],
    new_state: AcquisitionState,
    config: RewardConfig,
    truth: GroundTruth | None = None,
) -> RewardComponents:
    """Reward of an experiment on `variable`, where `new_state` is the state after its outcome
    joined the buffer.

    With `truth` (simulated training): optimisation is the noise-free gain of the action recommended
    after the experiment over the one recommended before, as a share of the possible improvement;
    structure discovery is the gain in log-probability of the true set; parents are the true ones.
    Without (deployment): the predicted gain, the drop of the posterior's entropy, and the posterior
    marginal.

    The experiment's own effect does not count: an experiment is worth what it teaches about the
    action to recommend. Raises `ValueError` if the two states are about different targets (unless
    traced).
    """
    check_state(new_state, state.task.target)
    if truth is None:
        gain = (state.output.best_value - new_state.output.best_value) / state.output.spread
        structure = state.posterior.entropy() - new_state.posterior.entropy()
        parent = state.output.marginals()[variable]
    else:
        before, after = (
            recommended_effect(truth, one.output, config.temperature) for one in (state, new_state)
        )
        gain = (before - after) / truth.possible_improvement
        structure = new_state.output.log_prob(truth.parents) - state.output.log_prob(truth.parents)
        parent = truth.parents[variable].astype(float)
    optimization = jnp.clip(gain, -1.0, 1.0)
    structure = jnp.clip(structure, -MAX_GAIN, MAX_GAIN)
    total = optimization + config.structure_weight * structure + config.parent_weight * parent
    return RewardComponents(optimization, structure, parent, total)
