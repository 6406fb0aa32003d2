"""Demonstrations from the output of the original PARENT_SCALE code
(phase4_training_infrastructure.md, section 1).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from lib.buffer import ExperienceBuffer
from lib.expert import ExpertRun, run_parent_scale
from lib.expert_posterior import ParentScaleConfig
from lib.scm import AbstractSCM, SyntheticSCM
from lib.trajectories import ExpertTrajectory, improvements


ParentScaleTrajectory = Mapping[str, Any]  # see `import_trajectory`
REQUIRED = (
    "D_O",
    "intervention_set",
    "intervention_values",
    "current_y",
    "posterior_probabilities",
    "target",
)
LARGEST = 1e30  # beyond this, float32 squares overflow


def insist(holds: bool, message: str) -> None:
    """Raise `ValueError` unless it holds."""
    if not holds:
        raise ValueError(message)


def import_trajectory(output: ParentScaleTrajectory, scm: SyntheticSCM) -> ExpertTrajectory:
    """The demonstration in the output of the original PARENT_SCALE code
    (phase4_training_infrastructure.md, section 1), run on `scm`.

    - `D_O`: observational rows, a column `[rows]` or `[rows, 1]` per variable name
    - `intervention_set`, `intervention_values`: a tuple of one name, and of its value, per
      experiment
    - `current_y`: the outcome of every experiment
    - `posterior_probabilities`: per experiment the belief before it, a dictionary from a tuple or
      frozenset of names to its probability, then the belief after all; a set that is absent has
      probability zero. Without the last one nothing is known about what the last experiment taught:
      it is then dropped.
    - `target`: a name

    The original records no other variables under an experiment. The rows of experiments are
    therefore not valid: they hold the value that was set and the outcome, and `buffer_before`
    leaves them out, although the beliefs rest on them. The acquisition surface is not recorded
    either: it is zero, with the default number of bins. Rewards count from the first experiment on.

    Raises `ValueError` naming the key and entry that are missing, unknown, not finite or at odds
    with another.
    """
    missing = [key for key in REQUIRED if key not in output]
    insist(not missing, f"{missing[:1]}: missing: the output needs {', '.join(REQUIRED)}")
    num_vars, target = scm.var_mask.shape[0], int(scm.target)
    index = {scm.names[i]: int(i) for i in np.flatnonzero(scm.var_mask)}
    insist(
        output["target"] == scm.names[target],
        f"target: {output['target']!r}, but the model's is {scm.names[target]!r}: pass the model "
        "that was optimised",
    )

    # --- observations ---
    columns = output["D_O"]
    insist(
        isinstance(columns, Mapping) and set(columns) == set(index),
        f"D_O: give a column for each of {', '.join(index)}, and no other",
    )
    num_obs = np.size(columns[scm.names[target]])
    observed = np.zeros((num_obs, num_vars))
    for name, i in index.items():
        observed[:, i] = read_numbers(f"D_O[{name!r}]", columns[name], num_obs)

    # --- experiments ---
    sets = [
        read_members(f"intervention_set[{t}]", names, index)
        for t, names in enumerate(output["intervention_set"])
    ]
    for t, members in enumerate(sets):
        insist(
            len(members) == 1 and target not in members,
            f"intervention_set[{t}]: only experiments on one variable, which is not the target, "
            "can be imported: leave it out",
        )
    for key in ("intervention_values", "current_y"):
        insist(
            len(output[key]) == len(sets) > 0,
            f"{key}: {len(output[key])} entries, but intervention_set has {len(sets)}: give one "
            "per experiment, and at least one",
        )
    variable = np.array([i for (i,) in sets])
    value = np.concatenate(
        [
            read_numbers(f"intervention_values[{t}]", given, 1)
            for t, given in enumerate(output["intervention_values"])
        ]
    )
    outcome = read_numbers("current_y", output["current_y"], len(sets))

    # --- beliefs ---
    beliefs = [
        read_belief(f"posterior_probabilities[{t}]", given, index, target)
        for t, given in enumerate(output["posterior_probabilities"])
    ]
    steps = len(beliefs) - 1
    insist(
        steps > 0 and len(sets) - steps in (0, 1),
        f"posterior_probabilities: {len(beliefs)} beliefs for {len(sets)} experiments: give one "
        "before each, and the last",
    )
    named = sorted(set().union(*beliefs), key=lambda members: (len(members), sorted(members)))
    probs = np.array([[belief.get(members, 0.0) for members in named] for belief in beliefs])
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs / probs.sum(1, keepdims=True))

    # --- the demonstration ---
    variable, value, outcome = (x[:steps] for x in (variable, value, outcome))
    flags = np.arange(num_vars)[None] == variable[:, None]
    rows = np.where(flags, value[:, None], 0.0)
    rows[:, target] = outcome
    buffer = ExperienceBuffer(
        jnp.asarray(np.concatenate([observed, rows]), jnp.float32),
        jnp.asarray(np.concatenate([np.zeros(observed.shape, bool), flags])),
        jnp.arange(num_obs + steps) < num_obs,
    )
    first, outcomes = jnp.asarray(num_obs), jnp.asarray(outcome, jnp.float32)
    return ExpertTrajectory(
        scm=scm,
        buffer=buffer,
        num_initial=first,
        sets=jnp.asarray([[i in members for i in range(num_vars)] for members in named]),
        log_probs=jnp.asarray(log_probs, jnp.float32),
        surface=jnp.zeros((steps, num_vars, ParentScaleConfig.num_bins)),
        variable=jnp.asarray(variable),
        value=jnp.asarray(value, jnp.float32),
        outcome=outcomes,
        reward=improvements(buffer, first, scm.target, outcomes),
        key_data=jnp.zeros_like(jr.key_data(jr.key(0))),
        failures=jnp.asarray(0),
        source="imported",
    )


def read_numbers(where: str, given: Any, length: int) -> Float[np.ndarray, " length"]:
    """`given`, `[length]` or `[length, 1]`, as finite numbers; `ValueError` that says where not."""
    try:
        numbers = np.asarray(given, float).reshape(length)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: give {length} numbers, as many as there are rows") from None
    wrong = np.flatnonzero(~(np.abs(numbers) < LARGEST))
    for i in wrong[:1]:
        raise ValueError(
            f"{where}[{i}]: {numbers[i]} is not a finite number below {LARGEST:.0e}: correct it, "
            "or leave the run out"
        )
    return numbers


def read_members(where: str, given: Any, index: Mapping[str, int]) -> frozenset[int]:
    """A tuple, list or frozenset of names as indices; `ValueError` if it is none, or for an unknown
    name.
    """
    insist(
        isinstance(given, (tuple, list, frozenset)),
        f"{where}: {given!r} is not a tuple of names: write ({given!r},) for one variable",
    )
    unknown = [name for name in given if name not in index]
    insist(
        not unknown, f"{where}: unknown variable {unknown[:1]}: the model's are {', '.join(index)}"
    )
    return frozenset(index[name] for name in given)


def read_belief(
    where: str, given: Any, index: Mapping[str, int], target: int
) -> dict[frozenset[int], float]:
    """Sets of positive probability, as indices; `ValueError` unless they are sets of possible
    parents and their probabilities sum to one.
    """
    insist(
        isinstance(given, Mapping),
        f"{where}: {type(given).__name__}: give a dictionary from tuples of names to probabilities",
    )
    belief = {}
    for names, probability in given.items():
        members = read_members(where, names, index)
        number = float(read_numbers(f"{where}[{names!r}]", probability, 1)[0])
        insist(
            number >= 0 and target not in members and members not in belief,
            f"{where}[{names!r}]: a set with the target, a set given twice, or a negative "
            "probability: correct it",
        )
        belief[members] = number
    total = sum(belief.values())
    insist(
        abs(total - 1.0) <= 1e-3,
        f"{where}: the probabilities sum to {total:.6g}: divide those of the sets that are left "
        "by their sum",
    )
    return {members: number for members, number in belief.items() if number > 0}


def extract_expert_trajectory(
    run: ExpertRun | ParentScaleTrajectory, scm: SyntheticSCM, key: Key[Array, ""] | None = None
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
