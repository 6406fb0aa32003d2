"""One place for a problem: a simulated system, the truth about it, and the data one starts from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.graphs import between, draw, log_between, pick, whole
from lib.scm import AbstractSCM, Intervention, SyntheticSCM, Task, value_grid
from lib.scm_prior import SCMPrior, sample_scm


def initial_buffer(
    key: Key[Array, ""],
    scm: AbstractSCM,
    num_obs: int,
    per_variable: int,
    capacity: int,
    *,
    valid_obs: Int[Array, ""] | None = None,
) -> ExperienceBuffer:
    """`num_obs` observational rows, then `per_variable` interventions at uniform values on every
    candidate, then free places up to `capacity`.

    Rows of variables that may not be intervened on are skipped by leaving their places free
    *behind* the filled ones. With `valid_obs`, only that many observational rows are filled (the
    rest stay free): a data set of varying length in an array of fixed length.
    """
    obs_key, value_key, row_key = jr.split(key, 3)
    num_vars = scm.var_mask.shape[0]
    observed = scm.sample(obs_key, Intervention.none(num_vars), num_obs)
    variables = jnp.tile(jnp.arange(num_vars), per_variable)
    values = between(
        jr.uniform(value_key, variables.shape), scm.low[variables], scm.high[variables]
    )
    kept_obs = jnp.arange(num_obs) < (num_obs if valid_obs is None else valid_obs)
    kept = jnp.concatenate([kept_obs, scm.candidates[variables]])
    buffer = with_experiments(row_key, scm, observed, variables, values).only(kept)
    front = jnp.argsort(~kept, stable=True)
    return jax.tree.map(lambda leaf: leaf[front], buffer).grow(capacity - len(front))


def with_experiments(
    key: Key[Array, ""],
    scm: AbstractSCM,
    observed: Float[Array, "observed vars"],
    variables: Int[Array, " done"],
    values: Float[Array, " done"],
) -> ExperienceBuffer:
    """The observed rows, then one under do(variables[n] = values[n]) for each n."""
    num_vars = observed.shape[1]
    done = jax.vmap(
        lambda noise, i, v: scm.simulate(noise[None], Intervention.single(i, v, num_vars))[0]
    )(scm.draw_noise(key, len(variables)), variables, values)
    chosen = jnp.concatenate([jnp.full(len(observed), -1), variables])
    rows, flags = jnp.concatenate([observed, done]), chosen[:, None] == jnp.arange(num_vars)[None]
    return ExperienceBuffer(rows, flags, jnp.ones(len(rows), bool))


def sample_problem(
    key: Key[Array, ""], prior: SCMPrior, num_obs: int, per_variable: int, capacity: int
) -> tuple[SyntheticSCM, ExperienceBuffer]:
    """A model and its first data set (multi_stage_training.md)."""
    scm_key, data_key = jr.split(key)
    scm = sample_scm(scm_key, prior)
    return scm, initial_buffer(data_key, scm, num_obs, per_variable, capacity)


@dataclass(frozen=True)
class DataDesign:
    """How much data a training example holds: every count is drawn anew, so one network serves all
    of them.
    """

    min_obs: int = 20
    """Fewest observational rows."""
    max_obs: int = 200
    """Most observational rows."""
    max_interventions: int = 36
    """Most interventional rows."""


class Example(NamedTuple):
    """One training example: a data set, what is public about its system, and the truth."""

    buffer: ExperienceBuffer
    task: Task
    parents: Bool[Array, " vars"]
    effects: Float[Array, "vars bins"]


def sample_examples(
    key: Key[Array, ""], prior: SCMPrior, design: DataDesign, num_bins: int, num_buffers: int = 2
) -> Example:
    """One random model with `num_buffers` independent data sets of different sizes (leading axis),
    which share the effect table, the costly part.
    """
    scm_key, noise_key, data_key = jr.split(key, 3)
    scm = sample_scm(scm_key, prior)
    half = jr.normal(noise_key, (16, prior.max_vars))
    effects = scm.effect_table(
        value_grid(scm.low, scm.high, num_bins), jnp.concatenate([half, -half])
    )
    buffers = jax.vmap(lambda k: varied_buffer(k, scm, design))(jr.split(data_key, num_buffers))
    truth = jax.tree.map(
        lambda x: jnp.broadcast_to(x[None], (num_buffers, *x.shape)),
        (scm.task, scm.parents, effects),
    )
    return Example(buffers, *truth)


def varied_buffer(key: Key[Array, ""], scm: SyntheticSCM, design: DataDesign) -> ExperienceBuffer:
    """A data set as it may stand at any moment of a campaign.

    Log-uniformly many observational rows; interventions first at uniform values, on random
    candidate variables or (every other time) going round them, then, from a random point on, more
    and more concentrated around one random variable and value, as an optimiser's are.
    """
    uniform_key, observation_key, row_key = jr.split(key, 3)
    num_vars, most, candidates = scm.var_mask.shape[0], design.max_interventions, scm.candidates
    u = draw(
        jr.uniform,
        uniform_key,
        **dict.fromkeys(("obs", "total", "wide", "focus", "centre", "round"), ()),
        **dict.fromkeys(("stray", "variable", "fraction"), (most,)),
    )
    observed = scm.sample(observation_key, Intervention.none(num_vars), design.max_obs)
    num_obs = log_between(u["obs"], design.min_obs, design.max_obs + 1)
    total, index = whole(u["total"], 0, most + 1), jnp.arange(most)
    spread_out = index < whole(u["wide"], 0, most + 1)
    number = jnp.maximum(candidates.sum(), 1)
    around = pick((index % number + 0.5) / number, candidates)
    roaming = jnp.where(u["round"] < 0.5, around, pick(u["variable"], candidates))
    variables = jnp.where(spread_out | (u["stray"] < 0.3), roaming, pick(u["focus"], candidates))
    near = jnp.clip(u["centre"] + 0.4 * (u["fraction"] - 0.5), 0.0, 1.0)
    values = between(
        jnp.where(spread_out, u["fraction"], near), scm.low[variables], scm.high[variables]
    )
    kept = jnp.concatenate([jnp.arange(design.max_obs) < num_obs, index < total])
    return with_experiments(row_key, scm, observed, variables, values).only(kept)


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


class GroundTruth(eqx.Module):
    """What may enter a training reward or a metric and nothing else: `effects` E[Y | do] on the
    grid, `baseline` E[Y], and the true `parents`.
    """

    effects: Float[Array, "vars bins"]
    baseline: Float[Array, ""]
    parents: Bool[Array, " vars"]

    @staticmethod
    def of(scm: AbstractSCM, num_bins: int) -> "GroundTruth":
        """The truth about a simulated system."""
        return GroundTruth(
            scm.effect_table(value_grid(scm.low, scm.high, num_bins)),
            scm.mean_outcome(Intervention.none(len(scm.low))),
            scm.parents,
        )

    @property
    def possible_improvement(self) -> Float[Array, ""]:
        """E[Y] minus the best E[Y | do] on the grid; at least .05 so that shares stay finite."""
        return jnp.maximum(self.baseline - self.effects.min(), 0.05)


class Problem(NamedTuple):
    """A simulated system, the truth about it, and its first data set."""

    scm: SyntheticSCM
    truth: GroundTruth
    buffer: ExperienceBuffer


def draw_problem(
    key: Key[Array, ""], prior: SCMPrior, design: CampaignDesign, num_bins: int
) -> Problem:
    """A random problem at the start of a campaign, log-uniform in its observational rows."""
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


def in_batches(function: Callable, inputs):
    """`function` over the leading axis, some at a time: equal batches, because a remainder would
    compile `function` once more.
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    return jax.lax.map(
        function, inputs, batch_size=max(size for size in range(1, 31) if count % size == 0)
    )


@eqx.filter_jit
def held_out_problems(
    key: Key[Array, ""], count: int, prior: SCMPrior, campaign: CampaignDesign, num_bins: int
) -> tuple[Problem, Float[Array, " batch"]]:
    """`count` held-out problems (a `Problem` with leading axis `batch`), and the optimum of each
    `[batch]`.
    """

    def one(key):
        problem = draw_problem(key, prior, campaign, num_bins)
        return problem, problem.scm.optimum().mean

    return in_batches(one, jr.split(key, count))


@eqx.filter_jit
def draw_mixture(
    key: Key[Array, ""],
    kinds: Sequence[tuple[SCMPrior, int]],
    campaign: CampaignDesign,
    num_bins: int,
) -> Problem:
    """So many problems of each prior, one kind after the other (leading axis `batch`)."""
    parts = [
        draw_problems(jr.fold_in(key, i), count, prior, campaign, num_bins)
        for i, (prior, count) in enumerate(kinds)
        if count
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
