"""Group-relative policy optimisation on simulated campaigns.

Departures from GRPO as published (DeepSeekMath, arXiv 2402.03300), each numbered where it happens:
1. a group shares state, model and exogenous noise (common random numbers), and only its first
   member enters the buffer;
2. advantages are centred per group but scaled by the batch's standard deviation, not the group's,
   which would enlarge the noise of groups whose rewards hardly differ (Lite-PPO, arXiv 2508.08221);
3. groups whose rewards do not differ are masked out and leave the denominator;
4. the divergence from the reference policy is the exact KL over cells instead of a per-sample
   estimate.
"""

from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from lib.buffer import ExperienceBuffer, nan_unless
from lib.campaign import run_campaign
from lib.policy import (
    AcquisitionPolicyNetwork,
    AcquisitionState,
    InterventionDistribution,
    feature_span,
    make_state,
)
from lib.problems import GroundTruth, Problem
from lib.rewards import RewardComponents, RewardConfig, experiment_reward, recommended_effect
from lib.scm import AbstractSCM, Intervention
from lib.sums import Summary
from lib.surrogate import ParentSetPredictionModel
from lib.training import Learner, clipped_adam, merged


CLIP = 0.2  # of the probability ratio, as in PPO (arXiv 1707.06347)
# A group whose rewards lie within this range carries no signal: rewards are of the order of one,
# and float32 tells some 1e-6 of them apart.
MIN_RANGE = 1e-4


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of GRPO."""

    group_size: int = 8
    """Candidate interventions per state."""
    grpo_epochs: int = 2
    """Gradient steps on each batch of groups."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    kl_weight: float = 0.01
    """Weight of the exact KL to the cloned policy (a cold start has none and pays none)."""
    entropy_weight: float = 0.03
    """Weight of the entropy bonus: in the long run the policy is a softmax of advantages at this
    temperature.
    """

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size = {self.group_size} must be at least 2")


class Groups(NamedTuple):
    """Groups of candidates collected along campaigns; leading axes are added by `vmap` (problems)
    and `scan` (steps).
    """

    state: AcquisitionState
    variable: Int[Array, " group"]
    value: Float[Array, " group"]
    log_prob: Float[Array, " group"]
    reward: RewardComponents  # of the candidate's experiment


def sample_group(key: Key[Array, ""], policy: InterventionDistribution, group_size: int):
    """`group_size` independent interventions from the policy: variables `[group]`, values
    `[group]`.
    """
    return jax.vmap(policy.sample)(jr.split(key, group_size))


class Simulator(NamedTuple):
    """A system whose truth is known, and what reads its data: experiments on it are scored."""

    surrogate: ParentSetPredictionModel
    scm: AbstractSCM
    truth: GroundTruth
    rewards: RewardConfig

    def start(self, buffer: ExperienceBuffer, num_steps: int) -> tuple[AcquisitionState, Summary]:
        """The state before the first of `num_steps` experiments, and the sums it rests on."""
        summary = Summary.of(buffer, self.scm.task, self.surrogate.config.num_bins)
        output = self.surrogate.predict(summary, self.scm.task)
        return AcquisitionState(buffer, output, jnp.array(0), jnp.array(num_steps)), summary

    def experiment(
        self,
        known: tuple[AcquisitionState, Summary],
        variable: Int[Array, ""],
        value: Float[Array, ""],
        noise: Float[Array, "samples vars"],
    ) -> tuple[tuple[AcquisitionState, Summary], RewardComponents]:
        """What is known after one more experiment, as `start` gives it, and its reward. One row is
        one term of the sums.
        """
        (state, summary), task = known, self.scm.task
        intervention = Intervention.single(variable, value, task.var_mask.shape[0])
        row = self.scm.simulate(noise, intervention)[0]
        one = ExperienceBuffer(row[None], intervention.mask[None], jnp.ones(1, bool))
        summary = summary.add(one, task)
        buffer = state.buffer.write(state.buffer.size, intervention, row)
        output = self.surrogate.predict(summary, task)
        after = AcquisitionState(buffer, output, state.step + 1, state.steps_left - 1)
        reward = experiment_reward(state, variable, after, self.rewards, self.truth)
        return (after, summary), reward


def collect_campaign(
    key: Key[Array, ""],
    simulator: Simulator,
    policy: AcquisitionPolicyNetwork,
    buffer: ExperienceBuffer,
    num_steps: int,
    config: GRPOConfig,
) -> tuple[Groups, ExperienceBuffer]:
    """Play one campaign of `num_steps` experiments and score a group of candidates at every state:
    groups `[steps]`, and the final buffer.

    The buffer needs `num_steps` free rows behind its valid rows: `ValueError` if it has fewer;
    where only a traced program can tell, every reward is nan.
    """
    fits = buffer.has_room(num_steps)

    def step(known, t):
        action_key, noise_key = jr.split(jr.fold_in(key, t))
        distribution = policy(known[0])
        variable, value = sample_group(action_key, distribution, config.group_size)
        # departure 1: the same exogenous noise for the whole group
        noise = simulator.scm.draw_noise(noise_key, 1)
        after, reward = jax.vmap(lambda i, v: simulator.experiment(known, i, v, noise))(
            variable, value
        )
        log_prob = jax.vmap(distribution.log_prob)(variable, value)
        groups = Groups(known[0], variable, value, log_prob, reward)
        # departure 1: the first candidate's experiment is the one that is made
        return jax.tree.map(lambda leaf: leaf[0], after), groups

    start = simulator.start(buffer, num_steps)
    (last, _), groups = jax.lax.scan(step, start, jnp.arange(num_steps))
    return groups._replace(reward=nan_unless(fits, groups.reward)), last.buffer


@eqx.filter_jit
def campaign_gains(
    key: Key[Array, ""],
    policy: AcquisitionPolicyNetwork,
    surrogate: ParentSetPredictionModel,
    problems: Problem,
    num_steps: int,
) -> tuple[Float[Array, " steps"], Float[Array, "2 features"]]:
    """What the policy's most probable experiments gain, `[steps]`: how much better the noise-free
    E[Y | do] of the recommended action is after each experiment than before the first, as a share
    of the possible improvement, mean over the problems. The same key gives every policy the same
    noise. And the span of every feature that the policy saw on the way.
    """

    def play(key, problem):
        scm, truth, buffer = problem

        def decide(_, buffer, __, t):
            state = make_state(surrogate, buffer, scm.task, t, num_steps - t)
            reached = recommended_effect(truth, state.output, temperature=0.0)
            return policy(state).mode(), (reached, feature_span(state))

        *_, (reached, spans) = run_campaign(key, scm, buffer, num_steps, decide)
        return (reached[0] - reached[1:]) / truth.possible_improvement, spans[:-1]

    keys = jr.split(key, problems.truth.baseline.shape[0])
    gains, spans = jax.vmap(play)(keys, problems)
    span = jnp.stack([spans[:, :, 0].min((0, 1)), spans[:, :, 1].max((0, 1))])
    return gains.mean(0), span


class GRPOMetrics(NamedTuple):
    """What to watch of a batch: mean `reward` of an experiment and its three components before
    weighting, `entropy` of the policy and `kl` to the reference in nats, and the shares of
    groups `without_signal` and of `clipped` ratios.
    """

    reward: Float[Array, ""]
    optimization: Float[Array, ""]
    structure_discovery: Float[Array, ""]
    parent_intervention: Float[Array, ""]
    entropy: Float[Array, ""]
    kl: Float[Array, ""]
    without_signal: Float[Array, ""]
    clipped: Float[Array, ""]


def group_advantages(
    rewards: Float[Array, "batch group"],
) -> tuple[Float[Array, "batch group"], Float[Array, " batch"]]:
    """Advantages, centred per group and scaled by the standard deviation over all groups that carry
    a signal, and which these are (1 or 0). The others get zeros.
    """
    # departure 3
    informative = (rewards.max(1) - rewards.min(1) > MIN_RANGE).astype(rewards.dtype)
    centred = (rewards - rewards.mean(1, keepdims=True)) * informative[:, None]
    variance = (centred**2).mean(1).sum() / jnp.maximum(informative.sum(), 1.0)
    return centred / jnp.sqrt(variance + 1e-12), informative  # departure 2


def grpo_loss(
    policy: AcquisitionPolicyNetwork,
    reference: AcquisitionPolicyNetwork,
    groups: Groups,
    config: GRPOConfig,
) -> tuple[Float[Array, ""], GRPOMetrics]:
    """PPO's clipped objective, -mean(min(r A, clip(r, 1 - CLIP, 1 + CLIP) A)), r the ratio of
    probabilities and A the advantage, with KL and entropy terms; over a batch of groups (leading
    axis `batch`).
    """
    advantages, informative = group_advantages(groups.reward.total)

    def per_group(group):
        distribution = policy(group.state)
        log_prob = jax.vmap(distribution.log_prob)(group.variable, group.value)
        # departure 4
        return log_prob, distribution.kl(reference(group.state)), distribution.entropy()

    log_prob, kl, entropy = jax.vmap(per_group)(groups)
    ratio = jnp.exp(log_prob - groups.log_prob)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    gain = jnp.minimum(ratio * advantages, clipped * advantages).mean(1)
    loss = (
        -(gain * informative).sum() / jnp.maximum(informative.sum(), 1.0)
        + config.kl_weight * kl.mean()
        - config.entropy_weight * entropy.mean()
    )
    reward = jax.tree.map(jnp.mean, groups.reward)
    return loss, GRPOMetrics(
        reward=reward.total,
        optimization=reward.optimization,
        structure_discovery=reward.structure_discovery,
        parent_intervention=reward.parent_intervention,
        entropy=entropy.mean(),
        kl=kl.mean(),
        without_signal=1 - informative.mean(),
        clipped=(jnp.abs(ratio - 1) > CLIP).mean(),
    )


def grpo_optimiser(config: GRPOConfig, iterations: int) -> optax.GradientTransformation:
    """Adam with cosine decay to zero over so many iterations."""
    steps = iterations * config.grpo_epochs
    return clipped_adam(optax.cosine_decay_schedule(config.learning_rate, steps))


def grpo_step(
    learner: Learner,
    optimiser: optax.GradientTransformation,
    reference: AcquisitionPolicyNetwork,
    groups: Groups,
    config: GRPOConfig,
) -> tuple[Learner, GRPOMetrics]:
    """`grpo_epochs` gradient steps of a policy on one batch of groups; the metrics are those before
    the last step.
    """

    def step(learner, _):
        return learner.descend(optimiser, lambda p: grpo_loss(p, reference, groups, config))

    learner, metrics = jax.lax.scan(step, learner, length=config.grpo_epochs)
    return learner, jax.tree.map(lambda leaf: leaf[-1], metrics)


def grpo_iteration(
    key: Key[Array, ""],
    learner: Learner,
    reference: AcquisitionPolicyNetwork,
    surrogate: ParentSetPredictionModel,
    problems: Problem,
    *,
    num_steps: int,
    rewards: RewardConfig,
    config: GRPOConfig,
    iterations: int,
) -> tuple[Learner, ExperienceBuffer, GRPOMetrics]:
    """One of `iterations`, over which the learning rate falls: the present policy plays a campaign
    of `num_steps` experiments on each of `problems` (leading axis), and takes GRPO's steps on all
    groups; the final buffers `[problems]` too.
    """

    def play(key, problem):
        simulator = Simulator(surrogate, problem.scm, problem.truth, rewards)
        return collect_campaign(key, simulator, learner.module, problem.buffer, num_steps, config)

    keys = jr.split(key, problems.truth.baseline.shape[0])
    groups, buffers = jax.vmap(play)(keys, problems)
    optimiser = grpo_optimiser(config, iterations)
    learner, metrics = grpo_step(learner, optimiser, reference, merged(groups), config)
    return learner, buffers, metrics
