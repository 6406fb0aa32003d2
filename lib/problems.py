"""One place for a problem: a simulated system, the truth about it, and the data that are there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.graphs import between, draw, log_between, pick, whole
from lib.scm import AbstractSCM, Intervention, value_grid
from lib.scm_prior import KINDS, SCMPrior, Special, sample_scm
from lib.synthetic import SyntheticSCM
from lib.training import merged


# --- data ---


# of a campaign that has found where to look: widths of a range, and share of experiments elsewhere
FOCUS_WIDTH, STRAY_SHARE = 0.4, 0.3
LEAST_DESIGNED = 10  # experiments where nothing is observed


@dataclass(frozen=True)
class DataDesign:
    """The data that are there, at the start of a campaign or at any moment of one. Numbers that
    have a range are drawn anew for every data set, so that one network serves all of them.
    """

    min_obs: int = 20
    """Fewest observational rows."""
    max_obs: int = 100
    """Most observational rows."""
    per_variable: int = 2
    """Interventions on every candidate at uniform values."""
    max_interventions: int = 0
    """Most interventions beside these, as a campaign makes them."""
    num_steps: int = 0
    """Experiments to come, for which there are free rows."""
    designed: float = 0.0
    """Share of data sets whose experiments set several variables at once, at two to five levels;
    every other one of these has no observational row.
    """
    levels: float = 0.0
    """Share of the others whose experiments are at two to five levels."""
    alone: float = 0.0
    """Share whose experiments are all on one variable."""

    def capacity(self, num_vars: int) -> int:
        """Rows of a data set of `num_vars` variables, filled or free."""
        fixed = self.max_obs + self.max_interventions + self.num_steps
        return fixed + self.per_variable * num_vars


# The data that the surrogate is trained on, beside those of campaigns.
DATA: dict[str, Any] = dict(designed=0.1, levels=0.2, alone=0.1)


def draw_data(key: Key[Array, ""], scm: AbstractSCM, design: DataDesign) -> ExperienceBuffer:
    """A data set of `scm`: log-uniformly many observational rows, then interventions, then free
    rows, `design.capacity` in all.
    """
    obs_key, value_key, row_key, campaign_key, count_key = jr.split(key, 5)
    num_vars, candidates = scm.var_mask.shape[0], scm.candidates
    number = design.per_variable * num_vars + design.max_interventions
    u = draw(
        jr.uniform,
        jr.fold_in(key, KINDS),
        **dict.fromkeys(("designed", "bare", "levels", "coarse", "alone", "share"), ()),
        **dict.fromkeys(("set", "fraction"), (number, num_vars)),
    )
    designed = u["designed"] < design.designed
    bare = designed & (u["bare"] < 0.5)
    observed = scm.sample(obs_key, Intervention.none(num_vars), design.max_obs)
    count = log_between(jr.uniform(count_key), design.min_obs, design.max_obs + 1).astype(int)
    count = jnp.where(bare, 0, jnp.clip(count, design.min_obs, design.max_obs))
    first = jnp.tile(jnp.arange(num_vars), design.per_variable)
    later, fraction, made = campaign_so_far(
        campaign_key,
        candidates,
        design.max_interventions,
        jnp.where(bare, LEAST_DESIGNED, 0),
        u["alone"] < design.alone,
    )
    fraction = jnp.concatenate([jr.uniform(value_key, first.shape), fraction])[:, None]
    intervened = jnp.concatenate([first, later])[:, None] == jnp.arange(num_vars)[None]
    # every other time all candidates are set, or each with a probability of this data set's
    share = jnp.maximum(2.0 * u["share"], 0.2)
    several = candidates[None] & (u["set"] < share)
    intervened |= designed & several
    fraction = jnp.where(designed, u["fraction"], fraction)
    gaps = whole(u["levels"], 1, 5)
    coarse = designed | (u["coarse"] < design.levels)
    fraction = jnp.where(coarse, jnp.round(fraction * gaps) / gaps, fraction)
    settings = between(fraction, scm.low[None], scm.high[None])
    kept = jnp.concatenate([jnp.arange(design.max_obs) < count, candidates[first], made])
    buffer = with_experiments(row_key, scm, observed, intervened, settings).only(kept)
    front = jnp.argsort(~kept, stable=True)
    return jax.tree.map(lambda leaf: leaf[front], buffer).grow(design.num_steps)


def campaign_so_far(
    key: Key[Array, ""],
    candidates: Bool[Array, " vars"],
    most: int,
    least: Int[Array, ""] | int = 0,
    alone: Bool[Array, ""] | bool = False,
) -> tuple[Int[Array, " most"], Float[Array, " most"], Bool[Array, " most"]]:
    """The interventions of a campaign at a random moment: variables, values as shares of their
    ranges, and which were made.

    Up to a random moment at uniform values, on random candidates or (every other time) going round
    them; from then on, as an optimiser's are, around one random variable and value: within
    `FOCUS_WIDTH`, but for the share `STRAY_SHARE` that is on any candidate. If `alone`, all are on
    that variable.
    """
    u = draw(
        jr.uniform,
        key,
        **dict.fromkeys(("total", "wide", "focus", "centre", "round"), ()),
        **dict.fromkeys(("stray", "variable", "fraction"), (most,)),
    )
    index, number = jnp.arange(most), jnp.maximum(candidates.sum(), 1)
    spread_out = index < whole(u["wide"], 0, most + 1)
    around = pick((index % number + 0.5) / number, candidates)
    roaming = jnp.where(u["round"] < 0.5, around, pick(u["variable"], candidates))
    elsewhere = (spread_out | (u["stray"] < STRAY_SHARE)) & ~jnp.asarray(alone)
    variables = jnp.where(elsewhere, roaming, pick(u["focus"], candidates))
    near = jnp.clip(u["centre"] + FOCUS_WIDTH * (u["fraction"] - 0.5), 0.0, 1.0)
    fraction = jnp.where(spread_out, u["fraction"], near)
    return variables, fraction, index < whole(u["total"], least, most + 1)


def with_experiments(
    key: Key[Array, ""],
    scm: AbstractSCM,
    observed: Float[Array, "observed vars"],
    intervened: Bool[Array, "done vars"],
    settings: Float[Array, "done vars"],
) -> ExperienceBuffer:
    """The observed rows, then one under each row of interventions."""
    done = jax.vmap(
        lambda noise, mask, values: scm.simulate(noise[None], Intervention(mask, values))[0]
    )(scm.draw_noise(key, len(settings)), intervened, settings)
    rows = jnp.concatenate([observed, done])
    flags = jnp.concatenate([jnp.zeros(observed.shape, bool), intervened])
    return ExperienceBuffer(rows, flags, jnp.ones(len(rows), bool))


# --- problems ---


class GroundTruth(eqx.Module):
    """What may enter a training target, a training reward or a metric and nothing else: `effects`
    E[Y | do] on the grid, `baseline` E[Y], and the true `parents`.
    """

    effects: Float[Array, "vars bins"]
    baseline: Float[Array, ""]
    parents: Bool[Array, " vars"]

    @staticmethod
    def of(scm: AbstractSCM, num_bins: int, thin: int = 1) -> "GroundTruth":
        """The truth about a simulated system, effects over every `thin`-th row of noise."""
        noise = scm.reference_noise()[::thin]
        return GroundTruth(
            scm.effect_table(value_grid(scm.low, scm.high, num_bins), noise),
            scm.mean_outcome(Intervention.none(len(scm.low))),
            scm.parents,
        )

    @property
    def possible_improvement(self) -> Float[Array, ""]:
        """E[Y] minus the best E[Y | do] on the grid; at least .05 so that shares stay finite."""
        return jnp.maximum(self.baseline - self.effects.min(), 0.05)


class Problem(NamedTuple):
    """A simulated system, the truth about it, and a data set."""

    scm: SyntheticSCM
    truth: GroundTruth
    buffer: ExperienceBuffer


def draw_problem(
    key: Key[Array, ""],
    prior: SCMPrior,
    design: DataDesign,
    num_bins: int,
    feedback: Bool[Array, ""] | None = None,
    thin: int = 1,
) -> Problem:
    """A random problem, its effects at `num_bins` values per variable."""
    scm_key, data_key = jr.split(key)
    scm = sample_scm(scm_key, prior, feedback)
    return Problem(scm, GroundTruth.of(scm, num_bins, thin), draw_data(data_key, scm, design))


@eqx.filter_jit
def draw_problems(
    key: Key[Array, ""],
    count: int,
    prior: SCMPrior,
    design: DataDesign,
    num_bins: int,
    data_sets: int = 1,
    thin: int = 1,
) -> Problem:
    """`count` problems, or as many models with several `data_sets` of each, which share the truth,
    the costly part (leading axis `count * data_sets`). All have feedback or none has: a batch takes
    as many rounds as its slowest.
    """
    feedback = jr.uniform(jr.fold_in(key, KINDS)) < prior.feedback

    def one(key):
        scm, truth, buffer = draw_problem(key, prior, design, num_bins, feedback, thin)
        buffers = jax.tree.map(lambda leaf: leaf[None], buffer)
        if data_sets > 1:  # all drawn anew; `draw_problem` has split 0 and 1 off the key
            keys = jr.split(jr.fold_in(key, 2), data_sets)
            buffers = jax.vmap(lambda k: draw_data(k, scm, design))(keys)
        return jax.vmap(lambda buffer: Problem(scm, truth, buffer))(buffers)

    return merged(over_models(one, jr.split(key, count)))


# Kinds of problems to judge a system by: what is special about the model, and about the data.
SUITES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "old": ({}, {}),
    "hidden": (dict(hidden=1.0), {}),
    "quiet": (dict(quiet=1.0), {}),
    "rows": ({}, dict(min_obs=300, max_obs=20_000)),
    "inert": (dict(inert=1.0), {}),
    "copies": (dict(tight=1.0), {}),
    "feedback": (dict(feedback=1.0), {}),
    "designed": ({}, dict(designed=1.0, max_interventions=40)),
    "mixed": (dict(mixed=1.0), {}),
}


def suite(name: str, prior: SCMPrior, design: DataDesign) -> tuple[SCMPrior, DataDesign]:
    """The two with nothing special but what that of `SUITES` has; `ValueError` for another name."""
    if name not in SUITES:
        raise ValueError(f"unknown suite '{name}': choose from {', '.join(SUITES)}")
    models, data = SUITES[name]
    prior = replace(prior, **dict.fromkeys(Special._fields, 0.0) | models)
    return prior, replace(design, **dict.fromkeys(DATA, 0.0) | data)


@eqx.filter_jit
def optima(scms: AbstractSCM) -> Float[Array, " batch"]:
    """The best E[Y | do] of each of a batch of models."""
    return over_models(lambda scm: scm.optimum().mean, scms)


def over_models(function: Callable, inputs):
    """`function`, which simulates, over the leading axis: on a CPU one model at a time, for then
    mechanisms that it lacks, and rounds of feedback that others need, cost nothing.
    """
    return (jax.lax.map if jax.default_backend() == "cpu" else in_batches)(function, inputs)


def in_batches(function: Callable, inputs):
    """`function` over the leading axis, some at a time: equal batches, because a remainder would
    compile `function` once more.
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    return jax.lax.map(
        function, inputs, batch_size=max(size for size in range(1, 31) if count % size == 0)
    )
