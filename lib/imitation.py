"""Behavioural cloning: the policy learns what the expert chose and weighed
(phase4_training_infrastructure.md, section 3).
"""

from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from lib.policy import AcquisitionPolicyNetwork, AcquisitionState, make_state
from lib.surrogate import ParentSetPredictionModel
from lib.training import Learner, clipped_adam
from lib.trajectories import ExpertTrajectory


# share of the target that is the expert's acquisition surface, normalised; the rest is its choice
SURFACE_WEIGHT = 0.5


@dataclass(frozen=True)
class ImitationConfig:
    """Learning from the expert (`ImitationConfig` of phase4_training_infrastructure.md)."""

    use_behavioral_cloning: bool = True
    """Clone before GRPO, and draw the policy to the clone; without it GRPO starts from random
    weights and no demonstrations are read.
    """
    imitation_epochs: int = 20
    """Passes over the demonstrations while cloning."""
    imitation_batch: int = 64
    """Expert states in a step."""
    learning_rate: float = 2e-3
    """Learning rate of Adam while cloning."""


class AcquisitionTrainingExample(NamedTuple):
    """The expert's decisions as the policy sees them, leading axis over all steps of all
    demonstrations.
    """

    state: AcquisitionState
    variable: Int[Array, " batch"]
    value: Float[Array, " batch"]
    surface: Float[Array, "batch vars bins"]


@eqx.filter_jit
def extract_acquisition_training_data(
    trajectories: ExpertTrajectory, surrogate: ParentSetPredictionModel
) -> AcquisitionTrainingExample:
    """States as the trained surrogate reads them, the expert's choices and acquisition surfaces."""
    count, num_steps = trajectories.variable.shape

    def one(inputs):
        trajectory, step = inputs
        state = make_state(
            surrogate, trajectory.buffer_before(step), trajectory.scm.task, step, num_steps - step
        )
        return AcquisitionTrainingExample(
            state, trajectory.variable[step], trajectory.value[step], trajectory.surface[step]
        )

    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, num_steps, axis=0), trajectories)
    return jax.lax.map(one, (repeated, jnp.tile(jnp.arange(num_steps), count)), batch_size=32)


class CloneMetrics(NamedTuple):
    """The cloning loss in nats, and agreement with the expert's choices as shares: of variables,
    and, of the states where these agree, of values (within a tenth of the range).
    """

    loss: Float[Array, ""]
    variable_agreement: Float[Array, ""]
    value_agreement: Float[Array, ""]


def clone_loss(
    policy: AcquisitionPolicyNetwork, examples: AcquisitionTrainingExample
) -> tuple[Float[Array, ""], CloneMetrics]:
    """Cross-entropy to the expert's choice and to its normalised acquisition surface, mean over the
    examples (leading axis `batch`).
    """

    def per_state(example):
        distribution, task = policy(example.state), example.state.task
        log_probs = jnp.where(task.candidates[:, None], distribution.logits, 0.0)
        total = example.surface.sum()
        share = example.surface / jnp.where(total > 0, total, 1.0)
        # where the expert expects no improvement anywhere, only its choice is left
        weight = jnp.where(total > 0, SURFACE_WEIGHT, 0.0)
        chosen = example.variable, distribution.cell(example.variable, example.value)
        choice, surface = log_probs[chosen], (share * log_probs).sum()
        variable, value = distribution.mode()
        near = jnp.abs(value - example.value) <= 0.1 * (task.high - task.low)[variable]
        same = variable == example.variable
        return -(1 - weight) * choice - weight * surface, same, same & near

    loss, same, near = jax.vmap(per_state)(examples)
    agreement = near.sum() / jnp.maximum(same.sum(), 1)
    return loss.mean(), CloneMetrics(loss.mean(), same.mean(), agreement)


@eqx.filter_jit
def clone(
    key: Key[Array, ""],
    policy: AcquisitionPolicyNetwork,
    examples: AcquisitionTrainingExample,
    config: ImitationConfig,
) -> AcquisitionPolicyNetwork:
    """The policy after all epochs, in one program."""
    count = examples.variable.shape[0]
    batch = min(config.imitation_batch, count)
    optimiser = clipped_adam(config.learning_rate)

    def step(learner, rows):
        chosen = jax.tree.map(lambda leaf: leaf[rows], examples)
        return learner.descend(optimiser, lambda p: clone_loss(p, chosen))

    orders = jax.vmap(lambda k: jr.permutation(k, count))(jr.split(key, config.imitation_epochs))
    rows = orders[:, : count // batch * batch].reshape(-1, batch)
    return jax.lax.scan(step, Learner.of(policy, optimiser), rows)[0].module
