"""Demonstrations from runs of the expert (phase4_training_infrastructure.md, section 1)."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Key

from lib.buffer import ExperienceBuffer
from lib.expert import ExpertRun, run_parent_scale
from lib.expert_posterior import ParentScaleConfig
from lib.scm import AbstractSCM, SyntheticSCM
from lib.trajectories import ExpertTrajectory, improvements


ParentScaleTrajectory = ExpertTrajectory  # the document has two names for one thing


def extract_expert_trajectory(
    run: ExpertRun, scm: SyntheticSCM, key: Key[Array, ""]
) -> ExpertTrajectory:
    """The demonstration in a finished run; `key` is the one the run was given, from which the
    belief is replayed.
    """
    return ExpertTrajectory(
        scm=scm,
        buffer=run.buffer,
        num_initial=run.num_initial,
        sets=run.sets,
        log_probs=run.log_probs,
        surface=run.surface,
        variable=run.variable,
        value=run.value,
        outcome=run.outcome,
        reward=improvements(run.buffer, run.num_initial, scm.target, run.outcome),
        key_data=jr.key_data(key),
        failures=run.failures,
    )


@eqx.filter_jit
def extract_multiple_trajectories(
    keys: Key[Array, " batch"],
    scms: SyntheticSCM,
    buffers: ExperienceBuffer,
    config: ParentScaleConfig,
) -> ExpertTrajectory:
    """Run the expert on a batch of models from their first data, and extract each demonstration."""
    return jax.vmap(
        lambda k, s, b: extract_expert_trajectory(run_parent_scale(k, s, b, config), s, k)
    )(keys, scms, buffers)


def expert_demonstration(
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    num_interventions: int,
    *,
    config: ParentScaleConfig | None = None,
    key: Key[Array, ""] | None = None,
) -> ExperienceBuffer:
    """The buffer after `num_interventions` experiments of the expert (training_loop_api.md); raises
    `ValueError` as `check_expert_input` does.

    Without a `config` the expert works from all observational rows, which must come first.
    """
    config = config or ParentScaleConfig(int(buffer.observational.sum()), num_interventions)
    settings = replace(config, num_steps=num_interventions)
    key = jr.key(0) if key is None else key
    return run_parent_scale(key, scm, buffer.grow(num_interventions), settings).buffer
