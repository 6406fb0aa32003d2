"""The expert: causal Bayesian optimisation with an unknown graph, as one jitted program.

PARENT_SCALE, published as CBO-U (Durand, Annadani, Bauer, Parbhoo 2025, arXiv 2503.19554):

1. a doubly robust prior over the target's parent sets          lib/expert_prior.py
2. a sequential closed-form posterior over them                 lib/expert_posterior.py
3. star-graph do-effects, averaged over that posterior          lib/expert_gp.py
4. a causal-prior Gaussian process per variable                 lib/expert_gp.py
5. expected improvement over single-variable interventions      lib/improvement.py
   on possible parents

Step 1 and the do-effects of every single set rest on the observational rows and are done once per
run. Before every experiment `Expert.decide` averages the effects and does steps 4 and 5; after it
`Expert.update` does step 2. `run_parent_scale` is the method; `run_known_graph`,
`run_with_posterior` and `run_gp_ei` are its relatives, made of the same parts. Where the published
code departs from the method, this follows the method; `studies/published.py` restores the code.

Differences that remain: inputs and target are standardised by the observational rows also for the
Gaussian processes; their hyperparameters come from finite lists instead of a gradient search (that
file restores both for the do-effects); the acquisition is maximised on a grid and refined once; an
outcome is one noisy sample by default, so the Gaussian processes carry observation noise.

Cost (reference/time.md): with 10 variables, 200 observational rows, 30 experiments and the subsets
of four variables as candidates, 3.8 GFLOP: 1.6 for the doubly robust prior, 1.4 for do-effects (in
float64), .7 for the regressions on parent sets, .1 for the causal GPs and the acquisition. Two CPU
cores take .34 s for it in a batch of 64, 6 % of what a large matrix product reaches there; 5
variables take .25 s.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.campaign import Choice, run_campaign
from lib.expert_gp import (
    CausalGP,
    CausalPrior,
    Outcomes,
    StarEffects,
    StarGraphs,
    average_effects,
    fit_causal_gp,
)
from lib.expert_posterior import (
    NOISE_FLOOR,
    ParentScaleConfig,
    ParentSetRegression,
    PosteriorOfRows,
)
from lib.improvement import log_expected_improvement
from lib.posterior import ParentSetPosterior
from lib.regression import Scale
from lib.scm import AbstractSCM, Task, refine
from lib.synthetic import check_scm


# sets below this probability do not count for the exploration set (the published pruning threshold)
SUPPORT = 1e-4


class Demonstration(eqx.Module):
    """What the expert believed, computed and did. Axis `beliefs` starts before the first step.

    `buffer` holds all rows in order: the expert decided step t on the first `num_initial + t`.
    `log_probs[t]` over `sets` is its posterior before step t, the last one that at the end.
    `surface` is the expected improvement, in units of Y, on `value_grid(low, high, num_bins)`, zero
    outside the exploration set. `variable`, `value`, `outcome` are the experiments. `failures`
    counts hyperparameters of Gaussian processes that were left out because their Cholesky factor
    failed (the best of the others was taken).
    """

    buffer: ExperienceBuffer
    num_initial: Int[Array, ""]
    sets: Bool[Array, "sets vars"]
    log_probs: Float[Array, "beliefs sets"]
    surface: Float[Array, "steps vars bins"]
    variable: Int[Array, " steps"]
    value: Float[Array, " steps"]
    outcome: Float[Array, " steps"]
    failures: Int[Array, ""]


class ExpertRun(Demonstration):
    """A run as it was made, with the recommendations before the first and after every experiment:
    the intervention of least posterior mean over all candidates.
    """

    recommended_variable: Int[Array, " beliefs"]
    recommended_value: Float[Array, " beliefs"]

    def posterior(self, target: Int[Array, ""] | int, step: int = -1) -> ParentSetPosterior:
        """The posterior after `step` experiments (default: at the end)."""
        return ParentSetPosterior(jnp.asarray(target), self.sets, self.log_probs[step])


# --- one decision ---


def exploration_set(
    sets: Bool[Array, "sets vars"],
    log_probs: Float[Array, " sets"],
    candidates: Bool[Array, " vars"],
) -> Bool[Array, " vars"]:
    """Variables that experiments are considered on: possible parents, which are the members of any
    set more probable than `SUPPORT`, among the `candidates` for an intervention; all candidates if
    there is none.
    """
    parents = (sets & (log_probs > jnp.log(SUPPORT))[:, None]).any(0) & candidates
    return jnp.where(parents.any(), parents, candidates)


def acquire(
    task: Task, scale: Scale, gps: CausalGP, explored: Bool[Array, " vars"]
) -> tuple[Float[Array, "vars bins"], Choice, Choice]:
    """Maximise expected improvement over the variables in `explored`. Returns, in raw units, the
    surface, the next experiment, and the intervention that is recommended.

    `gps` has one standardised GP per variable (leading axis). The incumbent is the least posterior
    mean over evaluated points of all variables (without noise: the best outcome seen); before any
    experiment it is the observational mean, which standardised is zero.
    """

    def predict(variable, values) -> tuple[Array, Array]:
        return jax.tree.map(lambda leaf: leaf[variable], gps)(values)

    def raw(variable, value) -> Choice:
        value = value * scale.spread[variable] + scale.shift[variable]
        return variable, jnp.clip(value, task.low[variable], task.high[variable])

    used, grid = gps.data.used, gps.causal_prior.grid
    at_points, _ = jax.vmap(CausalGP.__call__)(gps, gps.data.points)
    incumbent = jnp.where(used.any(), jnp.where(used, at_points, jnp.inf).min(), 0.0)
    mean, std = jax.vmap(CausalGP.__call__)(gps, grid)
    table = log_expected_improvement(mean, std, incumbent)
    chosen = refine(
        lambda i, v: log_expected_improvement(*predict(i, v), incumbent), grid, table, explored
    )
    recommended = refine(lambda i, v: -predict(i, v)[0], grid, -mean, task.candidates)
    # every second value: the search grid has one more between any two of the stored surface
    surface = jnp.where(explored[:, None], jnp.exp(table[:, ::2]), 0.0)
    return surface * jnp.take(scale.spread, task.target), raw(*chosen), raw(*recommended)


# --- a run ---


class ExpertState(NamedTuple):
    """What an expert keeps beside the buffer: its posterior, and the outcome of every row as the
    Gaussian processes see it, in raw units.
    """

    posterior: ParentSetRegression | PosteriorOfRows
    outcomes: Float[Array, " samples"]


class Expert(eqx.Module):
    """What stays fixed during a run: the task, the units of the observational rows, the candidate
    star graphs; of how many samples every row's outcome is the mean; and what `fit_causal_gp` may
    multiply the noise variance by.
    """

    config: ParentScaleConfig = eqx.field(static=True)
    task: Task
    scale: Scale
    graphs: StarGraphs
    num_averaged: Float[Array, " samples"]
    noise_factors: tuple[float, ...] = eqx.field(static=True)

    def decide(self, key, buffer: ExperienceBuffer, state: ExpertState, t) -> tuple[Choice, tuple]:
        """Steps 3 to 5: the next experiment from everything known, without chance; and, to be
        reported, the log-probabilities of the sets, the surface, the recommendation, and how many
        hyperparameters failed.
        """
        graphs, log_probs = self.graphs, state.posterior.log_posterior(buffer)
        causal_prior = average_effects(graphs.grid, log_probs, graphs.effects)
        gps, failures = self.fit_gps(causal_prior, buffer, state.outcomes)
        explored = exploration_set(graphs.sets, log_probs, self.task.candidates)
        surface, chosen, recommended = acquire(self.task, self.scale, gps, explored)
        return chosen, (log_probs, surface, recommended, failures.sum())

    def update(self, state: ExpertState, index, rows: Float[Array, "rows vars"]) -> ExpertState:
        """Step 2, after an experiment whose row has this `index` in the buffer, and whose samples
        are `rows`. The first, which the buffer keeps, is not among those averaged, as in the
        published protocol, unless it is the only one.
        """
        outcome = jnp.take(rows[-self.config.outcome_samples :].mean(0), self.task.target)
        return ExpertState(state.posterior.update(rows[0]), state.outcomes.at[index].set(outcome))

    def fit_gps(
        self,
        causal_prior: CausalPrior,
        buffer: ExperienceBuffer,
        outcomes: Float[Array, " samples"],
    ) -> tuple[CausalGP, Int[Array, " vars"]]:
        """The causal-prior GP of every variable (leading axis), standardised, and how many
        hyperparameters were left out. A row counts for a variable if it alone was set; the noise
        variance of a mean of n outcomes is that of one over n.
        """
        target, first = self.task.target, self.config.num_obs
        _, rows = self.config.split(buffer)
        standard = self.scale(rows.values.at[:, target].set(outcomes[first:]))
        alone = (rows.valid & (rows.intervened.sum(1) == 1))[:, None] & rows.intervened

        def fit(causal_prior, points, used):
            one = jnp.interp(points, causal_prior.grid, causal_prior.outcome_variance)
            noise_variance = jnp.maximum(one / self.num_averaged[first:], NOISE_FLOOR)
            data = Outcomes(points, standard[:, target], noise_variance, used)
            return fit_causal_gp(causal_prior, data, self.noise_factors)

        return jax.vmap(fit)(causal_prior, standard.T, (alone & self.task.candidates[None]).T)


def optimise(
    key: Key[Array, ""],
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    config: ParentScaleConfig,
    graphs: StarGraphs,
    posterior: ParentSetRegression | PosteriorOfRows,
    noise_factors: tuple[float, ...] = (1.0,),
) -> ExpertRun:
    """`num_steps` experiments with these candidate `graphs` and the `posterior` over their sets
    before the first.

    Raises `ValueError` if the buffer has no room for `num_steps` experiments; where only a traced
    program can count its rows, every number in the result is nan.
    """
    buffer.has_room(config.num_steps, config.num_obs)
    start, samples, capacity = buffer.size, config.outcome_samples, len(buffer.valid)
    num_averaged = jnp.where(jnp.arange(capacity) < start, 1.0, samples)
    scale = Scale.of(config.split(buffer)[0])
    expert = Expert(config, scm.task, scale, graphs, num_averaged, noise_factors)
    buffer, state, (variable, value), reports = run_campaign(
        key,
        scm,
        buffer,
        config.num_steps,
        expert.decide,
        state=ExpertState(posterior, jnp.take(buffer.values, scm.target, axis=1)),
        update=lambda state, t, rows: expert.update(state, start + t, rows),
        num_rows=samples + (samples > 1),
    )
    log_probs, surface, recommended, failures = reports
    return ExpertRun(
        sets=graphs.sets,
        log_probs=log_probs,
        surface=surface[:-1],
        variable=variable,
        value=value,
        outcome=state.outcomes[start + jnp.arange(config.num_steps)],
        recommended_variable=recommended[0],
        recommended_value=recommended[1],
        num_initial=start,
        buffer=buffer,
        failures=failures.sum() + graphs.failures,
    )


@jax.ensure_compile_time_eval()  # what is checked may be constants of a program that is traced
def check_expert_input(
    scm: AbstractSCM, buffer: ExperienceBuffer, config: ParentScaleConfig
) -> None:
    """Raise `ValueError` if the expert cannot work on `scm` from `buffer`, or as `check_scm` does;
    nothing can be told where these are traced.

    Refused are fewer observational rows than `config.num_obs` at the front of the buffer; numbers
    in filled rows that are not finite; a target that is constant over the observational rows; no
    room for the experiments. Variables other than the target may be constant over the observational
    rows: they count with spread one, and the doubly robust prior never selects them as parents, so
    their effect is taken to be constant.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((scm, buffer))):
        return
    buffer.has_room(config.num_steps, config.num_obs)
    names, values, filled = scm.labels, np.asarray(buffer.values), np.asarray(buffer.valid)
    other = ~np.asarray(buffer.observational)[: config.num_obs]
    if other.any():
        raise ValueError(
            f"row {int(np.argmax(other))} of the buffer is free or interventional, but the first "
            f"num_obs = {config.num_obs} must be observational: "
            "add observations before interventions, or lower num_obs"
        )
    for row, variable in np.argwhere(~np.isfinite(values) & filled[:, None]):
        raise ValueError(
            f"row {row} of the buffer, {names[variable]}: {values[row, variable]} is "
            "not a finite number: correct or remove the row"
        )
    target = int(scm.target)
    if np.ptp(values[: config.num_obs, target]) == 0:
        raise ValueError(
            f"the target {names[target]} is constant over the {config.num_obs} "
            "observational rows: add rows in which it varies"
        )
    check_scm(scm)


# --- the expert and its relatives ---


def run_parent_scale(
    key: Key[Array, ""], scm: AbstractSCM, buffer: ExperienceBuffer, config: ParentScaleConfig
) -> ExpertRun:
    """Run the expert on `scm` (used only for its target, its ranges and to sample experiments),
    starting from `buffer`.

    `buffer` holds `config.num_obs` observational rows, then any number of interventional ones, then
    room for at least `config.num_steps` more. The key is consumed. Pure: `jit` and `vmap` over the
    first three arguments. Raises `ValueError` as `check_expert_input` does.
    """
    check_expert_input(scm, buffer, config)
    observed, experiments = config.split(buffer)
    sets, first = config.initial_posterior(key, scm.task, observed)
    graphs = config.star_graphs(scm.task, observed, sets, first.log_probs > -jnp.inf)
    posterior, _ = first.update_all(experiments)
    return optimise(key, scm, buffer, config, graphs, posterior)


def run_with_posterior(
    key: Key[Array, ""],
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    config: ParentScaleConfig,
    first: ParentSetPosterior,
    log_posterior: Callable[[ExperienceBuffer], Float[Array, " sets"]],
) -> ExpertRun:
    """The expert with another posterior over parent sets instead of steps 1 and 2, such as that of
    an amortised model; otherwise as `run_parent_scale`.

    The candidates are the sets of `first`, the posterior before the first experiment;
    `log_posterior` maps a buffer to their log-probabilities.
    """
    check_expert_input(scm, buffer, config)
    observed, _ = config.split(buffer)
    graphs = config.star_graphs(scm.task, observed, first.sets, first.log_probs > -jnp.inf)
    return optimise(key, scm, buffer, config, graphs, PosteriorOfRows(log_posterior))


def run_known_graph(
    key: Key[Array, ""], scm: AbstractSCM, buffer: ExperienceBuffer, config: ParentScaleConfig
) -> ExpertRun:
    """CBO (Aglietti et al. 2020): the expert that is told the target's parents."""
    certain = ParentSetPosterior(scm.target, scm.parents[None], jnp.zeros(1))
    return run_with_posterior(key, scm, buffer, config, certain, lambda _: jnp.zeros(1))


def run_gp_ei(
    key: Key[Array, ""], scm: AbstractSCM, buffer: ExperienceBuffer, config: ParentScaleConfig
) -> ExpertRun:
    """Plain Bayesian optimisation over all candidates: the expert's Gaussian processes and
    acquisition without a graph.

    The causal prior says nothing: its mean is the observational mean of Y, its deviation zero; the
    noise is a fitted fraction of the variance of Y. Its `sets` are one empty set with probability
    one.
    """
    grid = Scale.of(config.split(buffer)[0])(config.search_grid(scm.task).T).T
    zeros, ones = jnp.zeros((1, *grid.shape)), jnp.ones((1, *grid.shape))
    effects = StarEffects(mean=zeros, variance=zeros, outcome_variance=ones)
    graphs = StarGraphs(jnp.zeros((1, len(grid)), bool), grid, effects)
    certain = PosteriorOfRows(lambda _: jnp.zeros(1))
    # from nearly exact outcomes to outcomes that tell nothing
    return optimise(key, scm, buffer, config, graphs, certain, (0.03, 0.1, 0.3, 1.0))
