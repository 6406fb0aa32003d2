"""Group-relative policy optimisation on simulated campaigns.

Deviations from GRPO as published (DeepSeekMath, arXiv 2402.03300), each numbered where it happens:
1. a group shares state, model and exogenous noise (common random numbers), and only its first member enters the buffer;
2. advantages are centred per group but scaled by the batch's deviation, not the group's, which would blow up groups without signal (Lite-PPO);
3. groups whose rewards do not differ are masked out and leave the denominator;
4. the divergence from the reference policy is the exact KL over cells instead of a per-sample estimate.
"""

from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.policy import AcquisitionPolicyNetwork, AcquisitionState, InterventionDistribution, make_state
from lib.rewards import GroundTruth, RewardComponents, RewardConfig, compute_verifiable_reward
from lib.scm import AbstractSCM, Intervention, SyntheticSCM
from lib.scm_prior import SCMPrior, initial_buffer, sample_scm
from lib.surrogate import ParentSetPredictionModel


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of GRPO."""

    group_size: int = 8
    """Candidate interventions per state."""
    grpo_epochs: int = 3
    """Gradient steps on each batch of groups."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    clip: float = 0.2
    """Clipping of the probability ratio."""
    kl_weight: float = 0.01
    """Weight of the exact KL to the cloned policy (a cold start has none and pays none)."""
    entropy_weight: float = 0.01
    """Weight of the entropy bonus."""
    min_spread: float = 1e-4
    """A group whose rewards spread less than this is dead: it carries no signal."""


class Groups(eqx.Module):
    """Groups of candidates collected along campaigns; leading axes are added by `vmap` (problems) and `scan` (steps)."""

    state: AcquisitionState
    variable: Int[Array, " group"]
    value: Float[Array, " group"]
    log_prob: Float[Array, " group"]
    reward: RewardComponents


def generate_group_interventions(key: Key[Array, ""], policy: InterventionDistribution, group_size: int):
    """`group_size` independent interventions from the policy: variables `[group]`, values `[group]`."""
    return jax.vmap(policy.sample)(jr.split(key, group_size))


def collect_campaign(
    key: Key[Array, ""],
    surrogate: ParentSetPredictionModel,
    policy: AcquisitionPolicyNetwork,
    scm: AbstractSCM,
    truth: GroundTruth,
    buffer: ExperienceBuffer,
    *,
    num_steps: int,
    group_size: int,
    rewards: RewardConfig,
) -> tuple[Groups, ExperienceBuffer]:
    """Play one campaign of `num_steps` experiments and score a group of candidates at every state: groups `[steps]`, and the final buffer.

    The buffer needs `num_steps` free places behind its valid rows.
    """
    num_vars, start = scm.var_mask.shape[0], buffer.size

    def step(carry, t):
        state = carry
        action_key, noise_key = jr.split(jr.fold_in(key, t))
        distribution = policy(state)
        variables, values = generate_group_interventions(action_key, distribution, group_size)
        noise = scm.draw_noise(noise_key, 1)  # deviation 1: the same exogenous noise for the whole group

        def simulate(variable, value):
            intervention = Intervention.single(variable, value, num_vars)
            extended = state.buffer.write(start + t, intervention, scm.simulate(noise, intervention)[0])
            new_state = make_state(surrogate, extended, scm.task, t + 1, num_steps - t - 1)
            return new_state, compute_verifiable_reward(state, variable, new_state, rewards, truth)

        new_states, reward = jax.vmap(simulate)(variables, values)
        log_prob = jax.vmap(distribution.log_prob)(variables, values)
        return jax.tree.map(lambda leaf: leaf[0], new_states), Groups(state, variables, values, log_prob, reward)

    first = make_state(surrogate, buffer, scm.task, 0, num_steps)
    last, groups = jax.lax.scan(step, first, jnp.arange(num_steps))
    return groups, last.buffer


class GRPOMetrics(NamedTuple):
    """What to watch: mean reward, policy entropy and KL to the reference in nats, share of dead groups and of clipped ratios."""

    reward: Float[Array, ""]
    entropy: Float[Array, ""]
    kl: Float[Array, ""]
    dead_groups: Float[Array, ""]
    clipped: Float[Array, ""]


def group_advantages(rewards: Float[Array, "batch group"], min_spread: float) -> tuple[Float[Array, "batch group"], Float[Array, " batch"]]:
    """Advantages centred per group and scaled by the deviation over all live groups, and which groups are live (1 or 0). Dead groups get zeros."""
    live = (rewards.max(1) - rewards.min(1) > min_spread).astype(rewards.dtype)  # deviation 3
    centred = (rewards - rewards.mean(1, keepdims=True)) * live[:, None]
    variance = (centred**2).sum() / jnp.maximum(live.sum() * rewards.shape[1], 1.0)
    return centred / jnp.sqrt(variance + 1e-12), live  # deviation 2


def grpo_loss(
    policy: AcquisitionPolicyNetwork,
    reference: AcquisitionPolicyNetwork,
    groups: Groups,
    config: GRPOConfig,
    kl_weight: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], GRPOMetrics]:
    """Clipped surrogate objective plus KL and entropy terms over a batch of groups (leading axis `batch`)."""
    advantages, live = group_advantages(groups.reward.total, config.min_spread)

    def per_group(group):
        distribution = policy(group.state)
        log_prob = jax.vmap(distribution.log_prob)(group.variable, group.value)
        return log_prob, distribution.kl(reference(group.state)), distribution.entropy()  # deviation 4

    log_prob, kl, entropy = jax.vmap(per_group)(groups)
    ratio = jnp.exp(log_prob - groups.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    objective = (jnp.minimum(ratio * advantages, clipped * advantages).mean(1) * live).sum() / jnp.maximum(live.sum(), 1.0)
    loss = -objective + kl_weight * kl.mean() - config.entropy_weight * entropy.mean()
    outside = (jnp.abs(ratio - 1) > config.clip).mean()
    return loss, GRPOMetrics(groups.reward.total.mean(), entropy.mean(), kl.mean(), 1 - live.mean(), outside)


def update_acquisition_grpo(
    policy: AcquisitionPolicyNetwork,
    optimiser_state: optax.OptState,
    optimiser: optax.GradientTransformation,
    reference: AcquisitionPolicyNetwork,
    groups: Groups,
    config: GRPOConfig,
    kl_weight: Float[Array, ""] | float,
) -> tuple[AcquisitionPolicyNetwork, optax.OptState, GRPOMetrics]:
    """`grpo_epochs` gradient steps on one batch of groups; the metrics are those before the last step."""
    dynamic, static = eqx.partition((policy, optimiser_state), eqx.is_array)

    def epoch(dynamic, _):
        policy, optimiser_state = eqx.combine(dynamic, static)
        (_, metrics), gradients = eqx.filter_value_and_grad(grpo_loss, has_aux=True)(policy, reference, groups, config, kl_weight)
        updates, optimiser_state = optimiser.update(gradients, optimiser_state, eqx.filter(policy, eqx.is_array))
        return eqx.filter((eqx.apply_updates(policy, updates), optimiser_state), eqx.is_array), metrics

    dynamic, metrics = jax.lax.scan(epoch, dynamic, None, length=config.grpo_epochs)
    policy, optimiser_state = eqx.combine(dynamic, static)
    return policy, optimiser_state, jax.tree.map(lambda leaf: leaf[-1], metrics)


@dataclass(frozen=True)
class CampaignDesign:
    """The data a simulated campaign starts from, and its length."""

    min_obs: int = 20
    """Fewest observational rows."""
    max_obs: int = 100
    """Most observational rows."""
    per_variable: int = 2
    """Initial interventions on every candidate variable."""
    num_steps: int = 8
    """Experiments in a campaign."""


class Problem(NamedTuple):
    """A simulated system, the truth about it, and its first data set."""

    scm: SyntheticSCM
    truth: GroundTruth
    buffer: ExperienceBuffer


def draw_problem(key: Key[Array, ""], prior: SCMPrior, design: CampaignDesign, num_bins: int) -> Problem:
    """A random problem at the start of a campaign, log-uniform in its number of observational rows."""
    scm_key, data_key, count_key = jr.split(key, 3)
    scm = sample_scm(scm_key, prior)
    count = jnp.exp(jr.uniform(count_key, (), minval=jnp.log(design.min_obs), maxval=jnp.log(design.max_obs + 1)))
    capacity = design.max_obs + design.per_variable * prior.max_vars + design.num_steps
    buffer = initial_buffer(data_key, scm, design.max_obs, design.per_variable, capacity, valid_obs=jnp.minimum(count, design.max_obs).astype(int))
    return Problem(scm, GroundTruth.of(scm, num_bins), buffer)


@eqx.filter_jit
def draw_problems(key: Key[Array, ""], count: int, prior: SCMPrior, campaign: CampaignDesign, num_bins: int) -> Problem:
    """`count` fresh problems (leading axis `batch`)."""
    return jax.vmap(lambda k: draw_problem(k, prior, campaign, num_bins))(jr.split(key, count))
