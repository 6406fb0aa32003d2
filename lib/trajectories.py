"""Expert demonstrations: what the expert saw, believed, weighed and did, at every step
(phase4_training_infrastructure.md, section 1).

A batch of demonstrations is one `ExpertTrajectory` with a leading axis `batch` on every array: they
are filtered, split, augmented and stored as arrays.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lib.artifacts import ArtifactError, load
from lib.buffer import ExperienceBuffer
from lib.expert import Demonstration, ExpertRun, run_parent_scale
from lib.expert_posterior import ParentScaleConfig, replay_posterior
from lib.posterior import ParentSetPosterior
from lib.scm import AbstractSCM
from lib.synthetic import SyntheticSCM
from lib.training import joined


class TrajectoryStep(NamedTuple):
    """One decision: the data and belief it rests on, the acquisition surface, the choice, and what
    came of it.
    """

    buffer: ExperienceBuffer
    posterior: ParentSetPosterior
    surface: Float[Array, "vars bins"]
    variable: Int[Array, ""]
    value: Float[Array, ""]
    outcome: Float[Array, ""]
    reward: Float[Array, ""]
    step_number: int


class ExpertTrajectory(Demonstration):
    """A run of the expert on `scm`.

    `reward[t]` is by how much the outcome improved on the best outcome of earlier interventions (0
    if it did not). `key_data` is the random key of the run, from which the belief can be replayed.
    """

    scm: SyntheticSCM
    reward: Float[Array, " steps"]
    key_data: Array

    def buffer_before(self, step: Int[Array, ""] | int) -> ExperienceBuffer:
        """The rows that the expert knew before `step`."""
        return self.buffer.first(self.num_initial + step)

    def posterior(self, step: Int[Array, ""] | int) -> ParentSetPosterior:
        """The expert's belief before `step`."""
        return ParentSetPosterior(self.scm.target, self.sets, self.log_probs[step])

    def step(self, index: int) -> TrajectoryStep:
        """Decision number `index`."""
        made = (self.surface, self.variable, self.value, self.outcome, self.reward)
        known = self.buffer_before(index), self.posterior(index)
        return TrajectoryStep(*known, *(field[index] for field in made), step_number=index)


# --- extraction ---


def improvements(
    buffer: ExperienceBuffer,
    num_initial: Int[Array, ""],
    target: Int[Array, ""],
    outcome: Float[Array, " steps"],
) -> Float[Array, " steps"]:
    """By how much every outcome improved on the best of the interventions before it, 0 if it did
    not or if there were none.
    """
    earlier = buffer.intervened.any(1) & (jnp.arange(buffer.valid.shape[0]) < num_initial)
    first = jnp.where(earlier, jnp.take(buffer.values, target, axis=1), jnp.inf).min()
    best = jnp.minimum(first, jax.lax.cummin(jnp.concatenate([jnp.array([jnp.inf]), outcome[:-1]])))
    return jnp.where(jnp.isfinite(best), jnp.maximum(best - outcome, 0.0), 0.0)


def extract_expert_trajectory(
    run: ExpertRun, scm: SyntheticSCM, key: Key[Array, ""]
) -> ExpertTrajectory:
    """The demonstration in a finished run; `key` is the one the run was given, from which the
    belief is replayed.
    """
    shared = {name: getattr(run, name) for name in Demonstration.__dataclass_fields__}
    reward = improvements(run.buffer, run.num_initial, scm.target, run.outcome)
    return ExpertTrajectory(**shared, scm=scm, reward=reward, key_data=jr.key_data(key))


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
    config = replace(config, num_steps=num_interventions)
    key = jr.key(0) if key is None else key
    return run_parent_scale(key, scm, buffer.grow(num_interventions), config).buffer


# --- validation ---


def check_trajectory(
    trajectory: ExpertTrajectory, config: ParentScaleConfig
) -> dict[str, Bool[Array, ""]]:
    """Whether numbers are finite, beliefs normalised (they sum to one), choices in range,
    experiments recorded in the buffer as they are, and the stored posterior follows from the stored
    data and key (replayed to a total variation of .01). All of them have to hold.
    """
    scm, buffer, log_probs = trajectory.scm, trajectory.buffer, trajectory.log_probs
    variable, value, outcome = trajectory.variable, trajectory.value, trajectory.outcome
    numbers = buffer.values, trajectory.surface, value, outcome, trajectory.reward
    finite = jnp.stack([jnp.isfinite(a).all() for a in numbers]).all()
    low, high = scm.low[variable], scm.high[variable]
    margin = 1e-4 * (high - low)
    in_range = scm.candidates[variable] & (value >= low - margin) & (value <= high + margin)
    rows = trajectory.num_initial + jnp.arange(variable.shape[0])

    def stands(column, number):
        """Whether it is what the buffer has, to rounding."""
        return jnp.abs(buffer.values[rows, column] - number) <= 1e-5 + 1e-5 * jnp.abs(number)

    recorded = buffer.valid[rows] & buffer.intervened[rows, variable] & stands(variable, value)
    if config.outcome_samples == 1:
        recorded &= stands(scm.target, outcome)
    key = jr.wrap_key_data(trajectory.key_data)
    again = replay_posterior(key, scm, buffer, trajectory.num_initial, config)
    distance = 0.5 * jnp.abs(jnp.exp(again) - jnp.exp(log_probs)).sum(-1).max()
    return {
        "finite": finite & ~jnp.isnan(log_probs).any(),
        "normalised": (jnp.abs(jnp.exp(log_probs).sum(-1) - 1.0) < 1e-3).all(),
        "in_range": in_range.all(),
        "recorded": recorded.all(),
        "replayed": distance < 0.01,
    }


@eqx.filter_jit
def validate_trajectory_consistency(
    trajectories: ExpertTrajectory, config: ParentScaleConfig
) -> Bool[Array, " batch"]:
    """Which of a batch of demonstrations are consistent (see `check_trajectory`)."""
    checks = jax.vmap(lambda t: check_trajectory(t, config))(trajectories)
    return jnp.stack(list(checks.values())).all(0)


def validate_demonstration_quality(
    trajectories: ExpertTrajectory,
    min_trajectory_length: int = 5,
    max_posterior_entropy: float = 2.0,
) -> Bool[Array, " batch"]:
    """Which demonstrations are long enough and end sure enough (entropy in nats). Both are visible
    to the expert: no ground truth takes part.
    """
    entropy = jax.vmap(lambda t: t.posterior(-1).entropy())(trajectories)
    long = trajectories.variable.shape[1] >= min_trajectory_length
    return long & (entropy <= max_posterior_entropy)


# --- splitting and augmentation ---


def take(trajectories: ExpertTrajectory, rows: np.ndarray) -> ExpertTrajectory:
    """The chosen demonstrations of a batch."""
    return jax.tree.map(lambda leaf: leaf[rows], trajectories)


def extract_expert_demonstrations(
    trajectories: ExpertTrajectory, validation_split: float = 0.2
) -> tuple[ExpertTrajectory, ExpertTrajectory]:
    """Training and validation demonstrations. The split is by causal model: one run each, so no
    model is on both sides.

    Raises `ValueError` if either side would be empty.
    """
    count = trajectories.variable.shape[0]
    held_out = round(count * validation_split)
    if not 0 < held_out < count:
        raise ValueError(
            f"{count} demonstrations cannot be split with validation_split = "
            f"{validation_split}: each side needs at least one"
        )
    return take(trajectories, np.arange(held_out, count)), take(trajectories, np.arange(held_out))


@eqx.filter_jit
def augment_expert_demonstrations(
    trajectories: ExpertTrajectory, augmentation_factor: int = 2, *, key: Key[Array, ""]
) -> ExpertTrajectory:
    """`augmentation_factor` times as many demonstrations: the originals, then copies with variables
    renamed and signs flipped, both at random.
    """
    count = trajectories.variable.shape[0]
    copies = [
        jax.vmap(transform)(jr.split(jr.fold_in(key, i), count), trajectories)
        for i in range(augmentation_factor - 1)
    ]
    return joined([trajectories, *copies])


def transform(key: Key[Array, ""], trajectory: ExpertTrajectory) -> ExpertTrajectory:
    """The same demonstration with its variables permuted and the signs of some of them, never the
    target's, flipped. Padding stays where it is.

    The belief of the copy cannot be replayed from its key: random features are drawn per variable.
    """
    order_key, sign_key = jr.split(key)
    scm, num_vars = trajectory.scm, trajectory.sets.shape[-1]
    index = jnp.arange(num_vars)
    # new variable j is old variable old[j]
    old = jnp.argsort(jnp.where(scm.var_mask, jr.uniform(order_key, (num_vars,)), 2.0 + index))
    new = jnp.argsort(old)
    # in old indices
    flip = jr.bernoulli(sign_key, 0.5, (num_vars,)) & scm.var_mask & (index != scm.target)
    sign = jnp.where(flip, -1.0, 1.0)
    low, high = jnp.where(flip, -scm.high, scm.low), jnp.where(flip, -scm.low, scm.high)
    # a flipped variable divides by a negative spread, and its children undo the sign
    generated = sign[scm.order]
    renamed = replace(
        scm,
        weights=scm.weights * generated[:, None],
        frequencies=scm.frequencies * generated[:, None, None],
        spread=scm.spread * generated,
        low=low,
        high=high,
    ).reordered(old)
    buffer = trajectory.buffer
    surface = jnp.where(flip[None, :, None], trajectory.surface[..., ::-1], trajectory.surface)
    return replace(
        trajectory,
        scm=renamed,
        buffer=replace(
            buffer,
            values=(buffer.values * sign[None])[:, old],
            intervened=buffer.intervened[:, old],
        ),
        sets=trajectory.sets[:, old],
        surface=surface[:, old],
        variable=new[trajectory.variable],
        value=trajectory.value * sign[trajectory.variable],
    )


# --- files ---


def load_trajectories(path: Path, part: str) -> tuple[ExpertTrajectory, dict]:
    """The demonstrations of one part, `train` or `validation`, and the file's header; raises
    `ArtifactError` if the file cannot be used.
    """
    arrays, header = load(path, "demos")

    def module(row: Array, kind: Any = ExpertTrajectory, prefix: str = part) -> Any:
        """One demonstration, or a part of it: every field is an array, or a module likewise."""
        return kind(
            **{
                name: module(row, field.type, f"{prefix}/{name}")
                if isinstance(field.type, type) and issubclass(field.type, eqx.Module)
                else jnp.asarray(arrays[f"{prefix}/{name}"])[row]
                for name, field in kind.__dataclass_fields__.items()
                # one that may be None is then not in the file
                if field.default is not None or f"{prefix}/{name}" in arrays
            }
        )

    try:
        # one row at a time: annotations are about one demonstration
        return jax.vmap(module)(jnp.arange(len(arrays[f"{part}/reward"]))), header
    except KeyError as error:
        raise ArtifactError(path, f"it holds no {error}", "demos") from error
