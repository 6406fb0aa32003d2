"""Expert demonstrations: what the expert saw, believed, weighed and did, at every step
(phase4_training_infrastructure.md, section 1).

A batch of demonstrations is one `ExpertTrajectory` with a leading axis `batch` on every array: they
are filtered, split, augmented and stored as arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lib.artifacts import ArtifactError, load_arrays
from lib.buffer import ExperienceBuffer
from lib.parent_scale import ExpertRun, ParentScaleConfig, replay_posterior, run_parent_scale
from lib.policy import AcquisitionState, make_state
from lib.posterior import ParentSetPosterior
from lib.scm import AbstractSCM, SyntheticSCM
from lib.surrogate import ExpertExamples, ParentSetPredictionModel


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


class ExpertTrajectory(eqx.Module):
    """A run of the expert on `scm`.

    `buffer` holds all rows in order: the expert decided step t on the first `num_initial + t`.
    `log_probs[t]` over `sets` is its belief before step t, the last one its belief at the end.
    `surface[t]` is its expected improvement on the value grid. `reward[t]` is by how much the
    outcome improved on the best outcome of earlier interventions (0 if it did not). `key_data` is
    the random key of the run, from which the belief can be replayed. `failures` is
    `ExpertRun.failures`.

    `source` is "parent_scale" for a run of lib/parent_scale.py. For one of the original code, see
    `import_trajectory`, it is "imported": `key_data`, `surface` and `failures` are then unknown and
    zero, and rows of `buffer` that are not valid are known only in part.
    """

    scm: SyntheticSCM
    buffer: ExperienceBuffer
    num_initial: Int[Array, ""]
    sets: Bool[Array, "sets vars"]
    log_probs: Float[Array, "beliefs sets"]
    surface: Float[Array, "steps vars bins"]
    variable: Int[Array, " steps"]
    value: Float[Array, " steps"]
    outcome: Float[Array, " steps"]
    reward: Float[Array, " steps"]
    key_data: Array
    failures: Int[Array, ""]
    source: str = eqx.field(static=True)

    def buffer_before(self, step: Int[Array, ""] | int) -> ExperienceBuffer:
        """The rows that the expert knew before `step`, those that are recorded in full."""
        return self.buffer.first(self.num_initial + step)

    def posterior(self, step: Int[Array, ""] | int) -> ParentSetPosterior:
        """The expert's belief before `step`."""
        return ParentSetPosterior(self.scm.target, self.sets, self.log_probs[step])

    def step(self, index: int) -> TrajectoryStep:
        """Decision number `index`."""
        surface, variable, value, outcome, reward = (
            a[index] for a in (self.surface, self.variable, self.value, self.outcome, self.reward)
        )
        return TrajectoryStep(
            self.buffer_before(index),
            self.posterior(index),
            surface,
            variable,
            value,
            outcome,
            reward,
            index,
        )


# --- extraction ---


def extract_expert_trajectory(
    run: ExpertRun | Mapping[str, Any], scm: SyntheticSCM, key: Key[Array, ""] | None = None
) -> ExpertTrajectory:
    """The demonstration in a finished run; `key` is the one the run was given.

    `run` may also be the output of the original PARENT_SCALE code, without a key: see
    `import_trajectory`.
    """
    if isinstance(run, ExpertRun):
        if key is None:
            raise ValueError(
                "the belief is replayed from the key of the run: pass the key that "
                "run_parent_scale was given"
            )
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
            source="parent_scale",
        )
    if key is not None:
        raise ValueError(
            "an output of the original code cannot be replayed from a key: leave the key out"
        )
    return import_trajectory(run, scm)


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


@eqx.filter_jit
def extract_multiple_trajectories(
    keys: Key[Array, " batch"],
    scms: SyntheticSCM,
    buffers: ExperienceBuffer,
    config: ParentScaleConfig,
) -> ExpertTrajectory:
    """Run the expert on a batch of models from their first data, and extract every
    demonstration.
    """
    return jax.vmap(
        lambda k, s, b: extract_expert_trajectory(run_parent_scale(k, s, b, config), s, k)
    )(keys, scms, buffers)


def expert_demonstration(
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    num_interventions: int,
    config: ParentScaleConfig,
    *,
    key: Key[Array, ""],
) -> ExperienceBuffer:
    """The buffer after `num_interventions` experiments of the expert (training_loop_api.md); raises
    `ValueError` as `check_expert_input` does.
    """
    settings = replace(config, num_steps=num_interventions)
    return run_parent_scale(key, scm, buffer.grow(num_interventions), settings).buffer


# --- runs of the original code ---

REQUIRED = (
    "D_O",
    "intervention_set",
    "intervention_values",
    "current_y",
    "posterior_probabilities",
    "global_opt",
    "target",
)


def import_trajectory(output: Mapping[str, Any], scm: SyntheticSCM) -> ExpertTrajectory:
    """The demonstration in the output of the original PARENT_SCALE code
    (phase4_training_infrastructure.md, section 1), run on `scm`.

    - `D_O`: observational rows, a column `[rows]` or `[rows, 1]` per variable name, or one array
      `[rows, vars]` in the order of `scm.names`
    - `intervention_set`, `intervention_values`: a tuple of one name, and of its value, per
      experiment
    - `current_y`: the outcome of every experiment
    - `posterior_probabilities`: per experiment the belief before it, `{tuple or frozenset of names:
      probability}`, then the belief after all; a set
      that is absent has probability zero. Without the last one nothing is known about what the last
      experiment taught: it is then dropped.
    - `global_opt`: the best outcome after every experiment, with or without the one before the
      first
    - `target`: a name
    - `samples`, optional: `[experiments, vars]`, all variables under every experiment, in raw units

    The original records no other variables under an experiment. Without `samples`, the rows of
    experiments are therefore not valid: they hold the value that was set and the outcome, and
    `buffer_before` leaves them out, although the beliefs rest on them. The acquisition surface is
    not recorded either: it is zero, with the default number of bins. Rewards count from the first
    experiment on.

    Raises `ValueError` naming the key and entry that are missing, unknown, not finite or at odds
    with another.
    """
    missing = [key for key in REQUIRED if key not in output]
    if missing:
        raise ValueError(f"{missing[0]}: missing: the output needs {', '.join(REQUIRED)}")
    index = {
        name: i
        for i, (name, exists) in enumerate(zip(scm.names, np.asarray(scm.var_mask), strict=True))
        if exists
    }
    num_vars, target = scm.var_mask.shape[0], int(scm.target)
    if output["target"] != scm.names[target]:
        raise ValueError(
            f"target: {output['target']!r}, but the model's is "
            f"{scm.names[target]!r}: pass the model that was optimised"
        )
    observed = read_observations(output["D_O"], index, num_vars)
    variable, value, outcome = read_experiments(output, index, target)
    beliefs = [
        read_belief(f"posterior_probabilities[{t}]", belief, index, target)
        for t, belief in enumerate(output["posterior_probabilities"])
    ]
    if len(beliefs) - len(outcome) not in (0, 1):
        raise ValueError(
            f"posterior_probabilities: {len(beliefs)} beliefs for {len(outcome)} "
            "experiments: give one before each, and the last"
        )
    steps = len(beliefs) - 1
    if steps == 0:
        raise ValueError(
            "posterior_probabilities: a belief before the only experiment and none "
            "after it: add the last belief"
        )

    rows, flags = np.zeros((len(outcome), num_vars)), np.arange(num_vars)[None] == variable[:, None]
    rows[:, target], rows[flags] = outcome, value
    if "samples" in output:
        rows[:, list(index.values())] = read_numbers(
            "samples", output["samples"], (len(outcome), len(index))
        )
        wrong = np.abs(rows[flags] - value) > 1e-5 + 1e-5 * np.abs(value)
        if wrong.any():
            t = int(np.argmax(wrong))
            raise ValueError(
                f"samples[{t}]: {rows[flags][t]} where intervention_values[{t}] set "
                f"{value[t]}: give samples in raw units"
            )
    buffer = ExperienceBuffer(
        jnp.asarray(np.concatenate([observed, rows[:steps]]), jnp.float32),
        jnp.asarray(np.concatenate([np.zeros(observed.shape, bool), flags[:steps]])),
        jnp.arange(len(observed) + steps) < len(observed) + ("samples" in output) * steps,
    )
    named = sorted(set().union(*beliefs), key=lambda members: (len(members), sorted(members)))
    probabilities = np.array(
        [[belief.get(members, 0.0) for members in named] for belief in beliefs]
    )
    with np.errstate(divide="ignore"):
        log_probs = np.log(probabilities / probabilities.sum(1, keepdims=True))
    num_initial, outcome = jnp.asarray(len(observed)), jnp.asarray(outcome[:steps], jnp.float32)
    return ExpertTrajectory(
        scm=scm,
        buffer=buffer,
        num_initial=num_initial,
        sets=jnp.asarray([[i in members for i in range(num_vars)] for members in named]),
        log_probs=jnp.asarray(log_probs, jnp.float32),
        surface=jnp.zeros((steps, num_vars, ParentScaleConfig.num_bins)),
        variable=jnp.asarray(variable[:steps]),
        value=jnp.asarray(value[:steps], jnp.float32),
        outcome=outcome,
        reward=improvements(buffer, num_initial, scm.target, outcome),
        key_data=jnp.zeros_like(jr.key_data(jr.key(0))),
        failures=jnp.asarray(0),
        source="imported",
    )


def read_numbers(where: str, given: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """`given` as finite numbers in one of these shapes (-1: any length but zero), made the first of
    them; or a `ValueError` that says where not.
    """
    try:
        numbers = np.asarray(given, float)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: not an array of numbers: give finite numbers, every row as "
            "long as the others"
        ) from None
    if not any(
        len(shape) == numbers.ndim
        and all(n == m or m < 0 < n for n, m in zip(numbers.shape, shape, strict=True))
        for shape in shapes
    ):
        allowed = " or ".join(
            f"({', '.join('any' if n < 0 else str(n) for n in shape)})" for shape in shapes
        )
        raise ValueError(f"{where}: its shape is {numbers.shape}: give shape {allowed}")
    wrong = np.argwhere(~(np.abs(numbers) < 1e30))  # beyond this, float32 squares overflow
    if len(wrong):
        entry = "".join(f"[{i}]" for i in wrong[0])
        raise ValueError(
            f"{where}{entry}: {numbers[tuple(wrong[0])]} is not a finite number "
            "below 1e30: correct it, or leave the run out"
        )
    return numbers.reshape(shapes[0])


def read_variables(where: str, given: Any, index: Mapping[str, int]) -> frozenset[int]:
    """A tuple, list or frozenset of names as indices; `ValueError` if it is none, or for an unknown
    name.
    """
    if not isinstance(given, (tuple, list, frozenset)):
        raise ValueError(
            f"{where}: {given!r} is not a tuple of names: write "
            f"('{next(iter(index))}',) for one variable"
        )
    unknown = [name for name in given if name not in index]
    if unknown:
        raise ValueError(
            f"{where}: unknown variable {unknown[0]!r}: the model's are {', '.join(index)}"
        )
    return frozenset(index[name] for name in given)


def read_observations(
    given: Any, index: Mapping[str, int], num_vars: int
) -> Float[np.ndarray, "rows vars"]:
    """`D_O` as one array, with zeros for variables that do not exist."""
    if isinstance(given, Mapping):
        read_variables("D_O", tuple(given), index)
        missing = [name for name in index if name not in given]
        if missing:
            raise ValueError(
                f"D_O: no column {missing[0]!r}: give one for each of {', '.join(index)}"
            )
        columns = {}
        for name in index:
            length = len(next(iter(columns.values()), ())) or -1
            columns[name] = read_numbers(f"D_O[{name!r}]", given[name], (length,), (length, 1))
        table = np.stack(list(columns.values()), 1)
    else:
        table = read_numbers("D_O", given, (-1, len(index)))
    rows = np.zeros((len(table), num_vars))
    rows[:, list(index.values())] = table
    return rows


def read_experiments(
    output: Mapping[str, Any], index: Mapping[str, int], target: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variable, value and outcome `[experiments]` of every experiment, checked against one another
    and against `global_opt`.
    """
    sets, count = output["intervention_set"], len(output["intervention_set"])
    for key in ("intervention_values", "current_y"):
        if len(output[key]) != count:
            raise ValueError(
                f"{key}: {len(output[key])} entries, but intervention_set has "
                f"{count}: give one per experiment"
            )
    if count == 0:
        raise ValueError("intervention_set: no experiments: leave the run out")
    chosen = [
        read_variables(f"intervention_set[{t}]", names, index) for t, names in enumerate(sets)
    ]
    for t, members in enumerate(chosen):
        if len(members) != 1 or target in members:
            raise ValueError(
                f"intervention_set[{t}]: {tuple(sets[t])}: only experiments on one variable, "
                "which is not the target, can be imported: leave it out"
            )
    variable = np.array([next(iter(members)) for members in chosen])
    value = np.array(
        [
            read_numbers(f"intervention_values[{t}]", v, (1,), ())[0]
            for t, v in enumerate(output["intervention_values"])
        ]
    )
    outcome = read_numbers("current_y", output["current_y"], (count,), (count, 1))
    best = read_numbers("global_opt", output["global_opt"], (-1,), (-1, 1))
    rounding = 1e-5 * (1.0 + np.abs(best).max())
    if len(best) - count not in (0, 1):
        raise ValueError(
            f"global_opt: {len(best)} entries for {count} experiments: give one "
            "after each, with or without one before the first"
        )
    rises = np.diff(best) > rounding
    if rises.any():
        t = int(np.argmax(rises)) + 1
        raise ValueError(
            f"global_opt[{t}]: {best[t]} is above the entry before it: the target is "
            "minimised, give the best outcome so far"
        )
    least = min([*outcome, *best[: len(best) - count]])
    if abs(best[-1] - least) > rounding:
        raise ValueError(
            f"global_opt[{len(best) - 1}]: {best[-1]}, but the best of current_y is "
            f"{least}: give both from the same run"
        )
    return variable, value, outcome


def read_belief(
    where: str, given: Any, index: Mapping[str, int], target: int
) -> dict[frozenset[int], float]:
    """Sets of positive probability, as indices; `ValueError` unless they are sets of possible
    parents and their probabilities sum to one.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where}: {type(given).__name__}: give a dictionary from tuples of "
            "names to probabilities"
        )
    belief = {}
    for names, probability in given.items():
        members = read_variables(where, names, index)
        number = float(read_numbers(f"{where}[{names!r}]", probability, (), (1,)))
        if number < 0 or target in members or members in belief:
            raise ValueError(
                f"{where}[{names!r}]: a set with the target, a set given twice, or a "
                "negative probability: correct it"
            )
        belief[members] = number
    total = sum(belief.values())
    if abs(total - 1.0) > 1e-3:
        raise ValueError(
            f"{where}: the probabilities sum to {total:.6g}: divide those of the "
            "sets that are left by their sum"
        )
    return {members: number for members, number in belief.items() if number > 0}


# --- validation ---


class Consistency(NamedTuple):
    """What `check_trajectory` found; all of them have to hold."""

    finite: Bool[Array, ""]
    normalised: Bool[Array, ""]
    in_range: Bool[Array, ""]
    recorded: Bool[Array, ""]
    replayed: Bool[Array, ""]


def check_trajectory(trajectory: ExpertTrajectory, config: ParentScaleConfig) -> Consistency:
    """Whether numbers are finite, beliefs sum to one, choices lie in range, experiments stand in
    the buffer as recorded, and the stored posterior follows from the stored data and key (replayed
    to a total variation of .01).

    An imported run has no key: its posterior is not replayed, and experiments of which no full row
    is known count as recorded.
    """
    scm, steps = trajectory.scm, jnp.arange(trajectory.variable.shape[0])
    numbers = (
        trajectory.buffer.values,
        trajectory.surface,
        trajectory.value,
        trajectory.outcome,
        trajectory.reward,
    )
    finite = (
        jnp.stack([jnp.isfinite(a).all() for a in numbers]).all()
        & ~jnp.isnan(trajectory.log_probs).any()
    )
    normalised = (jnp.abs(jnp.exp(trajectory.log_probs).sum(-1) - 1.0) < 1e-3).all()
    variable, value = trajectory.variable, trajectory.value
    margin = 1e-4 * (scm.high - scm.low)[variable]
    in_range = (
        scm.candidates[variable]
        & (value >= scm.low[variable] - margin)
        & (value <= scm.high[variable] + margin)
    )
    rows = trajectory.num_initial + steps
    imported = trajectory.source == "imported"
    recorded = trajectory.buffer.intervened[rows, variable] & (
        jnp.abs(trajectory.buffer.values[rows, variable] - value) <= 1e-5 + 1e-5 * jnp.abs(value)
    )
    if config.outcome_samples == 1:
        recorded &= jnp.abs(
            trajectory.buffer.values[rows, scm.target] - trajectory.outcome
        ) <= 1e-5 + 1e-5 * jnp.abs(trajectory.outcome)
    recorded = jnp.where(trajectory.buffer.valid[rows], recorded, imported)
    if imported:
        return Consistency(finite, normalised, in_range.all(), recorded.all(), jnp.array(True))
    log_probs = replay_posterior(
        jr.wrap_key_data(trajectory.key_data),
        scm,
        trajectory.buffer,
        trajectory.num_initial,
        config,
    )
    distance = 0.5 * jnp.abs(jnp.exp(log_probs) - jnp.exp(trajectory.log_probs)).sum(-1).max()
    return Consistency(finite, normalised, in_range.all(), recorded.all(), distance < 0.01)


@eqx.filter_jit
def validate_trajectory_consistency(
    trajectories: ExpertTrajectory, config: ParentScaleConfig
) -> Bool[Array, " batch"]:
    """Which of a batch of demonstrations are consistent (see `check_trajectory`)."""
    checks = jax.vmap(lambda t: check_trajectory(t, config))(trajectories)
    return jnp.stack(checks).all(0)


def validate_demonstration_quality(
    trajectories: ExpertTrajectory,
    min_trajectory_length: int = 5,
    max_posterior_entropy: float = 2.0,
) -> Bool[Array, " batch"]:
    """Which demonstrations are long enough and end sure enough (entropy in nats). Both are visible
    to the expert: no ground truth takes part.
    """
    entropy = jax.vmap(lambda t: t.posterior(-1).entropy())(trajectories)
    return (entropy <= max_posterior_entropy) & (
        trajectories.variable.shape[1] >= min_trajectory_length
    )


# --- splitting and augmentation ---


def take(trajectories: ExpertTrajectory, rows: np.ndarray) -> ExpertTrajectory:
    """The chosen demonstrations of a batch."""
    return jax.tree.map(lambda leaf: leaf[rows], trajectories)


def join(parts: Sequence[ExpertTrajectory]) -> ExpertTrajectory:
    """Batches one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


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
    return join([trajectories, *copies])


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
    renamed = SyntheticSCM(  # pyright: ignore[reportCallIssue]  # `parents` and `names` are properties
        order=new[scm.order],
        adjacency=scm.adjacency,
        mechanism=scm.mechanism,
        noise_kind=scm.noise_kind,
        weights=scm.weights * generated[:, None],
        frequencies=scm.frequencies * generated[:, None, None],
        phases=scm.phases,
        amplitudes=scm.amplitudes,
        noise_scale=scm.noise_scale,
        shift=scm.shift,
        spread=scm.spread * generated,
        target=new[scm.target],
        low=low[old],
        high=high[old],
        var_mask=scm.var_mask[old],
    )
    buffer = trajectory.buffer
    surface = jnp.where(flip[None, :, None], trajectory.surface[..., ::-1], trajectory.surface)
    return replace(
        trajectory,
        scm=renamed,
        buffer=ExperienceBuffer(
            (buffer.values * sign[None])[:, old], buffer.intervened[:, old], buffer.valid
        ),
        sets=trajectory.sets[:, old],
        surface=surface[:, old],
        variable=new[trajectory.variable],
        value=trajectory.value * sign[trajectory.variable],
    )


# --- files ---


def to_arrays(trajectories: ExpertTrajectory, part: str) -> dict[str, np.ndarray]:
    """Named arrays of a batch, each name starting with `part`."""
    arrays = {}
    for name in ExpertTrajectory.__dataclass_fields__:
        field = getattr(trajectories, name)
        if isinstance(field, eqx.Module):
            arrays |= {
                f"{part}/{name}/{inner}": np.asarray(getattr(field, inner))
                for inner in field.__dataclass_fields__
            }
        else:
            arrays[f"{part}/{name}"] = np.asarray(field)
    return arrays


def load_trajectories(path: Path, part: str) -> tuple[ExpertTrajectory, dict]:
    """The demonstrations of one part, `train` or `validation`, and the file's header; raises
    `ArtifactError` if the file cannot be used.
    """
    arrays, header = load_arrays(path, "demos")

    parts = {"scm": SyntheticSCM, "buffer": ExperienceBuffer}

    def fields(kind, prefix):
        return {
            name: jnp.asarray(arrays[f"{prefix}/{name}"])
            for name in kind.__dataclass_fields__
            if name not in (*parts, "source")
        }

    try:
        source = str(arrays[f"{part}/source"])
        inner = {name: fields(kind, f"{part}/{name}") for name, kind in parts.items()}
        rest = fields(ExpertTrajectory, part)
    except KeyError as error:
        raise ArtifactError(path, f"it holds no {error}", "demos") from error

    def build(inner, rest):
        return ExpertTrajectory(
            **{name: kind(**inner[name]) for name, kind in parts.items()}, **rest, source=source
        )

    return jax.vmap(build)(inner, rest), header


# --- what students learn from ---


@eqx.filter_jit
def extract_surrogate_training_data(
    trajectories: ExpertTrajectory, capacity: int
) -> ExpertExamples:
    """The expert's belief after every number of experiments, with the data it followed from, in
    buffers of at least `capacity` rows.
    """
    num_steps, room = (
        trajectories.variable.shape[1],
        max(capacity - trajectories.buffer.valid.shape[1], 0),
    )

    def one(trajectory, step):
        buffer = trajectory.buffer_before(step)
        return ExpertExamples(buffer.grow(room), trajectory.scm.task, trajectory.posterior(step))

    examples = jax.vmap(lambda t: jax.vmap(lambda s: one(t, s))(jnp.arange(num_steps + 1)))(
        trajectories
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), examples)


class AcquisitionExamples(NamedTuple):
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
) -> AcquisitionExamples:
    """States as the trained surrogate reads them, with the expert's choice and acquisition
    surface.
    """
    num_steps = trajectories.variable.shape[1]

    def one(inputs):
        trajectory, step = inputs
        state = make_state(
            surrogate, trajectory.buffer_before(step), trajectory.scm.task, step, num_steps - step
        )
        return AcquisitionExamples(
            state, trajectory.variable[step], trajectory.value[step], trajectory.surface[step]
        )

    count = trajectories.variable.shape[0]
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, num_steps, axis=0), trajectories)
    return jax.lax.map(one, (repeated, jnp.tile(jnp.arange(num_steps), count)), batch_size=32)
