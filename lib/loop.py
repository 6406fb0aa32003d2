"""The loops of the design documents, one step at a time: what training_loop_api.md and
multi_stage_training.md print can be run with these functions as it stands there.

For reading and for trying out on one system; the numbered scripts train on batches of problems,
with optimisers that remember. `params` are modules. What the documents leave open:

- the target of a bare buffer is its last variable, as in what `sample_problem` draws, and its
  ranges are those that its rows span; give `task` where it is otherwise;
- without a `key` every call draws from one common stream of keys;
- an update is one step of Adam from a fresh state: it moves every weight by up to `learning_rate`.
"""

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.grpo import Groups, GRPOConfig, grpo_step, sample_group
from lib.policy import AcquisitionPolicyNetwork, AcquisitionState, PolicyConfig
from lib.posterior import ParentSetPosterior
from lib.problems import DataDesign, GroundTruth, draw_data
from lib.rewards import RewardComponents, RewardConfig, experiment_reward
from lib.scm import AbstractSCM, Intervention, Task
from lib.scm_prior import SCMPrior, sample_scm
from lib.surrogate import (
    ParentSetPredictionModel,
    SurrogateConfig,
    SurrogateOutput,
    expert_kl,
    observed_task,
    surrogate_losses,
)
from lib.synthetic import SyntheticSCM
from lib.training import Learner, clipped_adam


SurrogateParams = ParentSetPredictionModel
AcquisitionParams = AcquisitionPolicyNetwork
Sample = Float[Array, " vars"]  # one row
KEYS = itertools.count()


def fresh(key: Key[Array, ""] | None) -> Key[Array, ""]:
    """`key`, or the next one of the common stream."""
    return jr.key(next(KEYS)) if key is None else key


class Belief(ParentSetPosterior):
    """A posterior over parent sets with all else that the surrogate said."""

    output: SurrogateOutput


# --- models ---


def initialize_surrogate(
    *, config: SurrogateConfig = SurrogateConfig(), key: Key[Array, ""] | None = None
) -> SurrogateParams:
    """An untrained surrogate."""
    return eqx.filter_jit(ParentSetPredictionModel)(config, key=fresh(key))


def initialize_acquisition(
    *,
    config: PolicyConfig = PolicyConfig(),
    surrogate: SurrogateConfig = SurrogateConfig(),
    key: Key[Array, ""] | None = None,
) -> AcquisitionParams:
    """An untrained policy that reads what a surrogate of that config says."""
    token_dim = 3 * surrogate.model_hidden_dim
    return eqx.filter_jit(AcquisitionPolicyNetwork)(config, token_dim, key=fresh(key))


def initialize_models(
    buffer: ExperienceBuffer,
    target: Int[Array, ""] | int,
    random_seed: int | None = None,
    *,
    config: SurrogateConfig = SurrogateConfig(),
) -> tuple[SurrogateParams, AcquisitionParams]:
    """Both models, untrained; their sizes do not depend on the data. `ValueError` for a target that
    is not a variable of `buffer`.
    """
    observed_task(buffer, target)
    surrogate_key, policy_key = jr.split(
        fresh(None if random_seed is None else jr.key(random_seed))
    )
    surrogate = initialize_surrogate(config=config, key=surrogate_key)
    return surrogate, initialize_acquisition(surrogate=config, key=policy_key)


# --- problems and states ---


def sample_problem(
    difficulty: tuple[SCMPrior, DataDesign] | None = None,
    *,
    key: Key[Array, ""] | None = None,
) -> tuple[SyntheticSCM, ExperienceBuffer]:
    """A system whose target is its last variable, and its first data with room for experiments."""
    prior, design = difficulty or (SCMPrior(max_vars=5, max_size=5), DataDesign(num_steps=8))
    return _sample_problem(fresh(key), prior, design)


@eqx.filter_jit
def _sample_problem(key, prior, design):
    scm_key, data_key = jr.split(key)
    scm, index = sample_scm(scm_key, prior), jnp.arange(prior.max_vars)
    # the target and the last variable (padding where there is some) change names
    last = prior.max_vars - 1
    swap = jnp.where(index == scm.target, last, jnp.where(index == last, scm.target, index))
    scm = scm.reordered(swap)
    return scm, draw_data(data_key, scm, design)


@eqx.filter_jit
def compute_posterior(
    buffer: ExperienceBuffer, surrogate_params: SurrogateParams, *, task: Task | None = None
) -> Belief:
    """What the surrogate believes of the target's parents."""
    output = surrogate_params.predict(buffer, task or bare_task(buffer))
    posterior = output.posterior()
    return Belief(posterior.target, posterior.sets, posterior.log_probs, output)


def bare_task(buffer: ExperienceBuffer) -> Task:
    """The last variable is the target; what never varies is padding."""
    task = observed_task(buffer, jnp.array(buffer.values.shape[1] - 1))
    return Task(task.target, task.low, task.high, task.high > task.low)


def State(
    posterior: Belief, buffer: ExperienceBuffer, *, step: int = 0, steps_left: int = 1
) -> AcquisitionState:
    """What a decision is based on."""
    return AcquisitionState(buffer, posterior.output, jnp.array(step), jnp.array(steps_left))


def get_current_state(
    buffer: ExperienceBuffer, surrogate_params: SurrogateParams, *, task: Task | None = None
) -> AcquisitionState:
    """The state in which all that is known is `buffer`."""
    return State(compute_posterior(buffer, surrogate_params, task=task), buffer)


# --- experiments ---


MutilatedSCM = tuple[AbstractSCM, Intervention]  # a model and the intervention in force


def apply_intervention(scm: AbstractSCM, intervention: Intervention) -> MutilatedSCM:
    """The mutilated model in which `intervention` holds."""
    return scm, intervention


def sample_from_scm(
    scm: AbstractSCM | MutilatedSCM, *, key: Key[Array, ""] | None = None
) -> Sample:
    """One row from a model, or from a mutilated one."""
    whole = isinstance(scm, AbstractSCM)
    model, do = (scm, Intervention.none(scm.var_mask.shape[0])) if whole else scm
    return model.sample(fresh(key), do, 1)[0]


def generate_group_interventions(
    state: AcquisitionState,
    acquisition_params: AcquisitionParams,
    *,
    group_size: int = GRPOConfig.group_size,
    key: Key[Array, ""] | None = None,
) -> list[Intervention]:
    """Candidates, drawn independently from the policy."""
    return _draw(acquisition_params, state, fresh(key), group_size)


@eqx.filter_jit
def _draw(policy, state, key, group_size):
    size, drawn = state.buffer.values.shape[1], sample_group(key, policy(state), group_size)
    return [Intervention.single(i, value, size) for i, value in zip(*drawn, strict=True)]


def select_intervention(
    state: AcquisitionState,
    acquisition_params: AcquisitionParams,
    *,
    key: Key[Array, ""] | None = None,
) -> Intervention:
    """One experiment, drawn from the policy."""
    return generate_group_interventions(state, acquisition_params, group_size=1, key=key)[0]


def intervention_step(
    scm: AbstractSCM,
    acquisition_params: AcquisitionParams,
    buffer: ExperienceBuffer,
    posterior: Belief,
    *,
    key: Key[Array, ""] | None = None,
) -> tuple[Intervention, Sample]:
    """The experiment that the policy draws, and what comes of it."""
    choice_key, noise_key = jr.split(fresh(key))
    state = State(posterior, buffer)
    intervention = select_intervention(state, acquisition_params, key=choice_key)
    return intervention, sample_from_scm(apply_intervention(scm, intervention), key=noise_key)


def compute_verifiable_reward(
    state: AcquisitionState,
    intervention: Intervention,
    outcome: Sample,
    new_buffer: ExperienceBuffer,
    surrogate_params: SurrogateParams,
    *,
    truth: GroundTruth | None = None,
    config: RewardConfig = RewardConfig(),
) -> Float[Array, ""]:
    """Total reward of an experiment on one variable; its `outcome` is the last row of `new_buffer`.
    Without `truth`, by what the surrogate expects (`lib.rewards.experiment_reward`).
    """
    after = get_current_state(new_buffer, surrogate_params, task=state.task)
    return experiment_reward(state, jnp.argmax(intervention.mask), after, config, truth).total


# --- updates ---


@eqx.filter_jit
def update_surrogate(
    params: SurrogateParams,
    buffer: ExperienceBuffer,
    learning_rate: float,
    target_posteriors: ParentSetPosterior | None = None,
    *,
    task: Task | None = None,
    truth: GroundTruth | None = None,
) -> SurrogateParams:
    """One gradient step: towards the expert's belief `target_posteriors` (KL), towards the `truth`
    (NLL of parents and effects), or, where neither is known, towards the outcomes of the buffer's
    own experiments (Gaussian NLL under the effects that the observational rows predict).
    """
    task = task or bare_task(buffer)

    def loss(model):
        if target_posteriors is not None:
            return expert_kl(model.predict(buffer, task), target_posteriors), None
        if truth is not None:
            output = model.predict(buffer, task)
            parent_nll, effect_nll = surrogate_losses(output, truth.parents, truth.effects)
            return parent_nll + effect_nll, None
        observed = ExperienceBuffer(buffer.values, buffer.intervened, buffer.observational)
        return outcome_nll(model.predict(observed, task), buffer), None

    optimiser = clipped_adam(learning_rate)
    return Learner.of(params, optimiser).descend(optimiser, loss)[0].module


def outcome_nll(output: SurrogateOutput, buffer: ExperienceBuffer) -> Float[Array, ""]:
    """Mean NLL of the outcomes under interventions on one variable: predicted effect, and the
    target's own variance beside that of the effect, in deviations of the target.
    """
    task = output.task
    alone = buffer.valid & ((buffer.intervened & task.candidates[None]).sum(1) == 1)

    def one(row, mask):
        i = jnp.argmax(mask)
        mean, std = (
            jnp.interp(row[i], output.grid[i], table[i])
            for table in (output.effect_mean, output.effect_std)
        )
        variance = 1.0 + (std / output.observed_std) ** 2
        error = (row[task.target] - mean) / output.observed_std
        return 0.5 * (error**2 / variance + jnp.log(variance))

    nll = jax.vmap(one)(buffer.values, buffer.intervened)
    return jnp.where(alone, nll, 0.0).sum() / jnp.maximum(alone.sum(), 1)


@eqx.filter_jit
def update_acquisition_grpo(
    params: AcquisitionParams,
    state: AcquisitionState,
    interventions: Sequence[Intervention],
    rewards: Sequence[Float[Array, ""]],
    learning_rate: float,
    *,
    config: GRPOConfig = GRPOConfig(),
) -> AcquisitionParams:
    """GRPO's steps on one group of candidates, whose total `rewards` are given."""
    variable = jnp.stack([jnp.argmax(each.mask) for each in interventions])
    value = jnp.stack([each.values.sum() for each in interventions])
    reward = jax.vmap(lambda total: RewardComponents(*[total] * 4))(jnp.stack(list(rewards)))
    log_prob = jax.vmap(params(state).log_prob)(variable, value)
    group = Groups(state, variable, value, log_prob, reward)
    batch, optimiser = jax.tree.map(lambda leaf: leaf[None], group), clipped_adam(learning_rate)
    return grpo_step(Learner.of(params, optimiser), optimiser, params, batch, config)[0].module


@eqx.filter_jit
def update_acquisition(
    params: AcquisitionParams,
    state: AcquisitionState,
    intervention: Intervention,
    reward: Float[Array, ""],
    next_state: AcquisitionState,
    learning_rate: float,
) -> AcquisitionParams:
    """One step of REINFORCE (Williams 1992) on one experiment; `reward` has seen `next_state`."""
    variable, value = jnp.argmax(intervention.mask), intervention.values.sum()
    optimiser = clipped_adam(learning_rate)
    learner, _ = Learner.of(params, optimiser).descend(
        optimiser, lambda policy: (-reward * policy(state).log_prob(variable, value), None)
    )
    return learner.module


def train(
    scm: AbstractSCM,
    initial_buffer: ExperienceBuffer,
    num_steps: int,
    surrogate_lr: float,
    acquisition_lr: float,
    true_parent_set: Bool[Array, " vars"] | None = None,
    *,
    models: tuple[SurrogateParams, AcquisitionParams] | None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[SurrogateParams, AcquisitionParams, ExperienceBuffer]:
    """The main loop of training_loop_api.md on one simulated system; `models` to go on with.

    The surrogate's target are the parents and effects that the simulator knows; `true_parent_set`
    is for the score only that is printed.
    """
    buffer, key = initial_buffer.grow(num_steps), fresh(key)
    surrogate, policy = models or initialize_models(buffer, int(scm.target), 0)
    truth = GroundTruth.of(scm, surrogate.config.num_bins)
    for step in range(num_steps):
        surrogate = update_surrogate(surrogate, buffer, surrogate_lr, task=scm.task, truth=truth)
        posterior = compute_posterior(buffer, surrogate, task=scm.task)
        if true_parent_set is not None:
            log_prob = float(posterior.output.log_prob(true_parent_set))
            print(f"step {step}: log-probability of the true parent set {log_prob:.2f}")
        state, step_key = State(posterior, buffer), jr.fold_in(key, step)
        intervention, outcome = intervention_step(scm, policy, buffer, posterior, key=step_key)
        buffer = buffer.add_intervention(intervention, outcome)
        reward = compute_verifiable_reward(
            state, intervention, outcome, buffer, surrogate, truth=truth
        )
        after = get_current_state(buffer, surrogate, task=scm.task)
        policy = update_acquisition(policy, state, intervention, reward, after, acquisition_lr)
    return surrogate, policy, buffer
