"""Group-relative policy optimisation on simulated campaigns.

Deviations from GRPO as published (DeepSeekMath, arXiv 2402.03300), each numbered where it happens:
1. a group shares state, model and exogenous noise (common random numbers), and only its first
   member enters the buffer. A candidate is credited with
   its own reward and those of the `lookahead` experiments that the policy makes after it, again
   with the same noise for the whole group;
2. advantages are centred per group but scaled by the batch's deviation, not the group's, which
   would blow up groups without signal (Lite-PPO);
   `scale="group"` is as published;
3. groups whose returns do not differ are masked out and leave the denominator;
4. the divergence from the reference policy is the exact KL over cells instead of a per-sample
   estimate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.policy import AcquisitionPolicyNetwork, AcquisitionState, InterventionDistribution
from lib.rewards import GroundTruth, RewardComponents, RewardConfig, compute_verifiable_reward
from lib.scm import AbstractSCM, Intervention, SyntheticSCM
from lib.scm_prior import SCMPrior, initial_buffer, sample_scm
from lib.surrogate import EncoderState, ParentSetPredictionModel


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of GRPO."""

    group_size: int = 8
    """Candidate interventions per state."""
    lookahead: int = 0
    """Further experiments, by the policy, that each candidate is followed by: their rewards count
    as its own. 0 looks one step ahead only.
    """
    discount: float = 1.0
    """Of the rewards of those, per step."""
    grpo_epochs: int = 2
    """Gradient steps on each batch of groups."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    clip: float = 0.2
    """Clipping of the probability ratio."""
    kl_weight: float = 0.01
    """Weight of the exact KL to the cloned policy (a cold start has none and pays none)."""
    entropy_weight: float = 0.03
    """Weight of the entropy bonus: in the long run the policy is a softmax of advantages at this
    temperature.
    """
    scale: Literal["batch", "group"] = "batch"
    """Advantages are divided by the standard deviation of returns in the batch or in the group."""
    min_spread: float = 1e-4
    """A group whose returns spread less than this is dead: it carries no signal."""

    def __post_init__(self):
        if self.group_size < 2 or self.lookahead < 0 or not 0 <= self.discount <= 1:
            raise ValueError(
                f"group_size = {self.group_size} must be at least 2, lookahead = {self.lookahead} "
                f"at least 0, discount = {self.discount} in [0, 1]"
            )


class Groups(eqx.Module):
    """Groups of candidates collected along campaigns; leading axes are added by `vmap` (problems)
    and `scan` (steps).
    """

    state: AcquisitionState
    variable: Int[Array, " group"]
    value: Float[Array, " group"]
    log_prob: Float[Array, " group"]
    reward: RewardComponents  # of the candidate's own experiment
    # its total, and those of the experiments that follow: what the candidate is credited with
    returns: Float[Array, " group"]


def generate_group_interventions(
    key: Key[Array, ""], policy: InterventionDistribution, group_size: int
):
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

    def start(
        self, buffer: ExperienceBuffer, num_steps: int
    ) -> tuple[AcquisitionState, EncoderState]:
        """The state before the first of `num_steps` experiments, and the sums that it is read
        from.
        """
        encoding = self.surrogate.encode(buffer, self.scm.task)
        return AcquisitionState(
            buffer,
            self.surrogate.decode(encoding, self.scm.task),
            jnp.zeros((), int),
            jnp.asarray(num_steps),
        ), encoding

    def experiment(
        self,
        known,
        variable: Int[Array, ""],
        value: Float[Array, ""],
        noise: Float[Array, "samples vars"],
    ):
        """What is known after one more experiment, as `start` gives it, and its `RewardComponents`.
        One row is one term of the sums.
        """
        state, encoding = known
        intervention = Intervention.single(variable, value, self.scm.var_mask.shape[0])
        row = self.scm.simulate(noise, intervention)[0]
        encoding = self.surrogate.update(encoding, self.scm.task, row, intervention.mask)
        buffer = state.buffer.write(state.buffer.size, intervention, row)
        after = AcquisitionState(
            buffer,
            self.surrogate.decode(encoding, self.scm.task),
            state.step + 1,
            state.steps_left - 1,
        )
        return (after, encoding), compute_verifiable_reward(
            state, variable, after, self.rewards, self.truth
        )


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

    The buffer needs `num_steps` free places behind its valid rows.
    """
    scm = simulator.scm

    def step(known, t):
        action_key, noise_key, later_key = jr.split(jr.fold_in(key, t), 3)
        state = known[0]
        distribution = policy(state)
        variables, values = generate_group_interventions(
            action_key, distribution, config.group_size
        )
        # deviation 1: the same exogenous noise for the whole group
        noise = scm.draw_noise(noise_key, 1)

        def follow(known, key):
            policy_key, noise_key = jr.split(key)
            weight = jnp.where(known[0].steps_left > 0, config.discount ** (known[0].step - t), 0.0)
            known, reward = simulator.experiment(
                known, *policy(known[0]).sample(policy_key), scm.draw_noise(noise_key, 1)
            )
            return known, weight * reward.total

        def score(variable, value):
            after, reward = simulator.experiment(known, variable, value, noise)
            if config.lookahead == 0:
                return after, reward, reward.total
            _, later = jax.lax.scan(follow, after, jr.split(later_key, config.lookahead))
            return after, reward, reward.total + later.sum()

        after, reward, returns = jax.vmap(score)(variables, values)
        log_prob = jax.vmap(distribution.log_prob)(variables, values)
        return jax.tree.map(lambda leaf: leaf[0], after), Groups(
            state, variables, values, log_prob, reward, returns
        )

    (last, _), groups = jax.lax.scan(
        step, simulator.start(buffer, num_steps), jnp.arange(num_steps)
    )
    return groups, last.buffer


def reward_table(
    simulator: Simulator,
    known: tuple[AcquisitionState, EncoderState],
    noise: Float[Array, "samples vars"],
) -> Float[Array, "vars bins"]:
    """Total reward of an experiment at every point of the action grid, with the same noise for all;
    0 where nothing can be set.

    With it the gradient of the policy's expected reward at a state is exact (`expected_reward`); a
    group of candidates is a sample of it.
    """
    grid, candidates = known[0].output.grid, known[0].task.candidates

    def cell(variable, value):
        return simulator.experiment(known, variable, value, noise)[1].total

    table = jax.lax.map(
        lambda i: jax.vmap(lambda value: cell(i, value))(grid[i]), jnp.arange(grid.shape[0])
    )
    return jnp.where(candidates[:, None], table, 0.0)


def expected_reward(
    policy: AcquisitionPolicyNetwork, state: AcquisitionState, table: Float[Array, "vars bins"]
) -> Float[Array, ""]:
    """Mean of `table` under the policy: its gradient is the exact policy gradient of a one-step
    problem.
    """
    return (jnp.exp(policy(state).logits) * table).sum()


class GRPOMetrics(NamedTuple):
    """What to watch of a batch: mean `reward` of an experiment and its three components before
    weighting, mean `returns` of a candidate, `entropy` of the policy and `kl` to the reference in
    nats, and the shares of `dead_groups` and of `clipped` ratios.
    """

    reward: Float[Array, ""]
    optimization: Float[Array, ""]
    structure_discovery: Float[Array, ""]
    parent_intervention: Float[Array, ""]
    returns: Float[Array, ""]
    entropy: Float[Array, ""]
    kl: Float[Array, ""]
    dead_groups: Float[Array, ""]
    clipped: Float[Array, ""]


def group_advantages(
    rewards: Float[Array, "batch group"], config: GRPOConfig
) -> tuple[Float[Array, "batch group"], Float[Array, " batch"]]:
    """Advantages, centred per group and scaled by the deviation of all live groups or its own, and
    which are live (1 or 0). Dead ones get zeros.
    """
    # deviation 3
    live = (rewards.max(1) - rewards.min(1) > config.min_spread).astype(rewards.dtype)
    centred = (rewards - rewards.mean(1, keepdims=True)) * live[:, None]
    own = (centred**2).mean(1, keepdims=True)
    variance = own.sum() / jnp.maximum(live.sum(), 1.0) if config.scale == "batch" else own
    return centred / jnp.sqrt(variance + 1e-12), live  # deviation 2


def grpo_loss(
    policy: AcquisitionPolicyNetwork,
    reference: AcquisitionPolicyNetwork,
    groups: Groups,
    config: GRPOConfig,
    kl_weight: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], GRPOMetrics]:
    """Clipped surrogate objective plus KL and entropy terms over a batch of groups (leading axis
    `batch`).
    """
    advantages, live = group_advantages(groups.returns, config)

    def per_group(group):
        distribution = policy(group.state)
        log_prob = jax.vmap(distribution.log_prob)(group.variable, group.value)
        # deviation 4
        return log_prob, distribution.kl(reference(group.state)), distribution.entropy()

    log_prob, kl, entropy = jax.vmap(per_group)(groups)
    ratio = jnp.exp(log_prob - groups.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    objective = (
        jnp.minimum(ratio * advantages, clipped * advantages).mean(1) * live
    ).sum() / jnp.maximum(live.sum(), 1.0)
    loss = -objective + kl_weight * kl.mean() - config.entropy_weight * entropy.mean()
    outside = (jnp.abs(ratio - 1) > config.clip).mean()
    reward = jax.tree.map(jnp.mean, groups.reward)
    parts = (
        reward.total,
        reward.optimization,
        reward.structure_discovery,
        reward.parent_intervention,
    )
    return loss, GRPOMetrics(
        *parts, groups.returns.mean(), entropy.mean(), kl.mean(), 1 - live.mean(), outside
    )


def update_acquisition_grpo(
    policy: AcquisitionPolicyNetwork,
    optimiser_state: optax.OptState,
    optimiser: optax.GradientTransformation,
    reference: AcquisitionPolicyNetwork,
    groups: Groups,
    config: GRPOConfig,
    kl_weight: Float[Array, ""] | float,
    extra_loss: Callable[[AcquisitionPolicyNetwork], Float[Array, ""]] | None = None,
) -> tuple[AcquisitionPolicyNetwork, optax.OptState, GRPOMetrics]:
    """`grpo_epochs` gradient steps on one batch of groups; the metrics are those before the last
    step. `extra_loss` is added to GRPO's.
    """
    dynamic, static = eqx.partition((policy, optimiser_state), eqx.is_array)

    def loss_fn(policy):
        loss, metrics = grpo_loss(policy, reference, groups, config, kl_weight)
        return loss + (0.0 if extra_loss is None else extra_loss(policy)), metrics

    def epoch(dynamic, _):
        policy, optimiser_state = eqx.combine(dynamic, static)
        (_, metrics), gradients = eqx.filter_value_and_grad(loss_fn, has_aux=True)(policy)
        updates, optimiser_state = optimiser.update(
            gradients, optimiser_state, eqx.filter(policy, eqx.is_array)
        )
        return eqx.filter(
            (eqx.apply_updates(policy, updates), optimiser_state), eqx.is_array
        ), metrics

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


def draw_problem(
    key: Key[Array, ""], prior: SCMPrior, design: CampaignDesign, num_bins: int
) -> Problem:
    """A random problem at the start of a campaign, log-uniform in its number of observational
    rows.
    """
    scm_key, data_key, count_key = jr.split(key, 3)
    scm = sample_scm(scm_key, prior)
    count = jnp.exp(
        jr.uniform(
            count_key, (), minval=jnp.log(design.min_obs), maxval=jnp.log(design.max_obs + 1)
        )
    )
    capacity = design.max_obs + design.per_variable * prior.max_vars + design.num_steps
    buffer = initial_buffer(
        data_key,
        scm,
        design.max_obs,
        design.per_variable,
        capacity,
        valid_obs=jnp.minimum(count, design.max_obs).astype(int),
    )
    return Problem(scm, GroundTruth.of(scm, num_bins), buffer)


@eqx.filter_jit
def draw_problems(
    key: Key[Array, ""], count: int, prior: SCMPrior, campaign: CampaignDesign, num_bins: int
) -> Problem:
    """`count` fresh problems (leading axis `batch`)."""
    return jax.vmap(lambda k: draw_problem(k, prior, campaign, num_bins))(jr.split(key, count))
