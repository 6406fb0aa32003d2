"""Verifiable rewards: improvement, structure discovery, and intervening on parents (multi_stage_training.md, stage 2)."""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lib.policy import AcquisitionState
from lib.scm import AbstractSCM, Intervention, value_grid


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the components in `total`."""

    optimization_weight: float = 1.0
    """Noise-free improvement over the incumbent, as a share of the possible improvement."""
    structure_weight: float = 0.05
    """Gain in the log-probability of the true parent set, in nats (clipped to +-2)."""
    parent_weight: float = 0.02
    """Intervening on a true parent."""
    recommendation_share: float = 0.7
    """Share of the improvement that is scored on the action recommended after the experiment; the rest is scored on the experiment itself."""


class RewardComponents(eqx.Module):
    """One experiment's reward: three components before weighting, and their weighted sum."""

    optimization: Float[Array, ""]
    structure_discovery: Float[Array, ""]
    parent_intervention: Float[Array, ""]
    total: Float[Array, ""]


class GroundTruth(eqx.Module):
    """What may enter a training reward or a metric and nothing else: `effects` E[Y | do] on the grid, `baseline` E[Y], and the true `parents`."""

    effects: Float[Array, "vars bins"]
    baseline: Float[Array, ""]
    parents: Bool[Array, " vars"]

    @staticmethod
    def of(scm: AbstractSCM, num_bins: int) -> "GroundTruth":
        """The truth about a simulated system."""
        effects = scm.effect_table(value_grid(scm.low, scm.high, num_bins))
        return GroundTruth(effects, scm.mean_outcome(Intervention.none(scm.var_mask.shape[0])), scm.parents)

    @property
    def possible_improvement(self) -> Float[Array, ""]:
        """E[Y] minus the best E[Y | do] on the grid; at least .05 so that shares stay finite."""
        return jnp.maximum(self.baseline - self.effects.min(), 0.05)

    def mean(self, state: AcquisitionState, variable: Int[Array, ""], value: Float[Array, ""]) -> Float[Array, ""]:
        """E[Y | do(variable = value)], interpolated between grid values."""
        return jnp.interp(value, state.output.grid[variable], self.effects[variable])


MAX_GAIN = 2.0  # nats: one lucky jump of the posterior must not dominate a batch of advantages


def compute_verifiable_reward(
    state: AcquisitionState,
    variable: Int[Array, ""],
    value: Float[Array, ""],
    new_state: AcquisitionState,
    config: RewardConfig,
    truth: GroundTruth | None = None,
) -> RewardComponents:
    """Reward of do(variable = value), where `new_state` is the state after its outcome joined the buffer.

    With `truth` (simulated training): optimisation is the noise-free gain over the incumbent, as a share of the possible improvement, of the
    experiment itself and of the action recommended after it; structure discovery is the gain in log-probability of the true set; parents are the true
    ones. Without (deployment): predicted gains, the drop of the posterior's entropy, and the posterior marginal.
    """
    variable_before, value_before = state.output.best()
    variable_after, value_after = new_state.output.best()
    if truth is None:
        gain_before = (state.best_value - jnp.interp(value, state.output.grid[variable], state.output.effect_mean[variable])) / state.output.spread
        gain_after = (state.best_value - new_state.best_value) / state.output.spread
        structure = state.posterior.entropy() - new_state.posterior.entropy()
        parent = state.output.marginals()[variable]
    else:
        incumbent = truth.mean(state, variable_before, value_before)
        gain_before = (incumbent - truth.mean(state, variable, value)) / truth.possible_improvement
        gain_after = (incumbent - truth.mean(state, variable_after, value_after)) / truth.possible_improvement
        structure = new_state.output.log_prob(truth.parents) - state.output.log_prob(truth.parents)
        parent = truth.parents[variable].astype(float)
    share = config.recommendation_share
    optimization = (1 - share) * jnp.clip(gain_before, -1.0, 1.0) + share * jnp.clip(gain_after, -1.0, 1.0)
    structure = jnp.clip(structure, -MAX_GAIN, MAX_GAIN)
    total = config.optimization_weight * optimization + config.structure_weight * structure + config.parent_weight * parent
    return RewardComponents(optimization, structure, parent, total)
