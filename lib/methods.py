"""Who plays: every method that chooses experiments, as a function of (key, scm, buffer), and how
good the actions are that it recommends.

A method sees the data, the target and the ranges; only `cbo_known_graph` is told the parents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from lib import baselines
from lib.buffer import ExperienceBuffer
from lib.grpo import CampaignDesign, Problem, draw_problem
from lib.metrics import normalised_regret, paired_difference, summarise
from lib.parent_scale import ParentScaleConfig, run_gp_ei, run_parent_scale
from lib.policy import expected_improvement_choice, thompson_choice
from lib.scm import AbstractSCM, Intervention
from lib.scm_prior import SCMPrior, multimodal
from lib.system import TrainedACBOSystem, run_campaign


METHODS = (
    "random",
    "least_squares",
    "additive_ridge",
    "bo",
    "cbo_known_graph",
    "parent_scale",
    "parent_scale_amortized",
    "surrogate_greedy",
    "surrogate_ei",
    "surrogate_thompson",
    "bc_policy",
    "grpo_policy",
    "acbo",
)
POLICIES = ("bc_policy", "grpo_policy", "acbo")
EXPERT_FAMILY = ("parent_scale", "parent_scale_amortized", "cbo_known_graph", "bo")
ON_SURFACE = ("surrogate_greedy", "surrogate_ei", "surrogate_thompson")


def make_method(name: str, system: TrainedACBOSystem, num_obs: int, num_steps: int) -> Callable:
    """The method called `name` as a function of (key, scm, buffer); `system` is what the learned
    ones use, `num_obs` what the expert's family needs.

    What each recommends: random, the experiment with the best outcome; the regressions and the
    learned methods, the minimum of their predicted surface; the expert's family, the minimum of its
    Gaussian processes' means. Raises `ValueError` for an unknown name.
    """
    # the one that teaches
    expert = ParentScaleConfig(num_obs=num_obs, num_steps=num_steps, candidate_sets="union")

    def campaign(decide):
        return lambda key, scm, buffer: run_campaign(
            key, scm, buffer, num_steps, lambda k, b, t: decide(scm, k, b, t)
        )

    def regression(choose):
        def decide(scm, key, buffer, step):
            choice = choose(buffer, scm.target, scm.low, scm.high, scm.candidates)
            return choice, choice

        return campaign(decide)

    def random(scm, key, buffer, step):
        outcome = jnp.take(buffer.values, scm.target, axis=1)
        best = jnp.argmin(
            jnp.where(
                (buffer.intervened & scm.candidates[None]).any(1) & buffer.valid, outcome, jnp.inf
            )
        )
        variable = jnp.argmax(buffer.intervened[best])
        return baselines.random_choice(key, scm.low, scm.high, scm.candidates), (
            variable,
            buffer.values[best, variable],
        )

    def on_surface(choose):
        def decide(scm, key, buffer, step):
            output = system.surrogate.predict(buffer, scm.task)
            return choose(key, output), output.best()

        return campaign(decide)

    def amortized(key, scm, buffer):
        first = system.surrogate.predict(buffer, scm.task).posterior().top_k(16)

        def believe(buffer):
            output = system.surrogate.predict(buffer, scm.task)
            return jax.nn.log_softmax(jax.vmap(output.log_prob)(first.sets))

        return run_parent_scale(
            key,
            scm,
            buffer,
            expert,
            candidate_sets=(first.sets, jax.nn.log_softmax(first.log_probs)),
            predict=believe,
        )

    def known_graph(key, scm, buffer):
        return run_parent_scale(
            key, scm, buffer, expert, candidate_sets=(scm.parents[None], jnp.zeros(1))
        )

    methods = {
        "random": campaign(random),
        "least_squares": regression(baselines.least_squares),
        "additive_ridge": regression(baselines.additive_ridge),
        "bo": lambda key, scm, buffer: run_gp_ei(key, scm, buffer, expert),
        "cbo_known_graph": known_graph,
        "parent_scale": lambda key, scm, buffer: run_parent_scale(key, scm, buffer, expert),
        "parent_scale_amortized": amortized,
        "surrogate_greedy": on_surface(lambda key, output: output.best()),
        "surrogate_ei": on_surface(lambda key, output: expected_improvement_choice(output)),
        "surrogate_thompson": on_surface(thompson_choice),
    } | dict.fromkeys(POLICIES, lambda key, scm, buffer: system.play(key, scm, buffer, num_steps))
    if name not in methods:
        raise ValueError(f"unknown method '{name}': choose from {', '.join(methods)}")
    return methods[name]


def in_batches(function: Callable, inputs):
    """`function` over the leading axis, some at a time: equal batches, because a remainder would
    compile `function` once more.
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    return jax.lax.map(
        function, inputs, batch_size=max(size for size in range(1, 31) if count % size == 0)
    )


@eqx.filter_jit
def _play(
    name: str,
    system: TrainedACBOSystem,
    keys: Key[Array, " batch"],
    scms: AbstractSCM,
    buffers: ExperienceBuffer,
    num_obs: int,
    num_steps: int,
):
    method = make_method(name, system, num_obs, num_steps)

    def one(inputs):
        key, scm, buffer = inputs
        run = method(key, scm, buffer)
        num_vars = scm.var_mask.shape[0]
        means = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, num_vars)))(
            run.recommended_variable, run.recommended_value
        )
        marginals = (
            run.posterior(scm.target, 0).marginals()
            if name == "parent_scale"
            else jnp.zeros(num_vars)
        )
        return {"recommended": means, "marginals": marginals}

    return in_batches(one, (keys, scms, buffers))


def play(
    name: str,
    system: TrainedACBOSystem,
    keys: Key[Array, " batch"],
    scms: AbstractSCM,
    buffers: ExperienceBuffer,
    *,
    num_obs: int,
    num_steps: int,
) -> dict[str, Array]:
    """Play `name` on a batch of problems.

    Returns `recommended`, the noise-free E[Y | do] of what it recommends before the first and after
    each experiment `[batch, steps + 1]`, and `marginals` `[batch, vars]`, the expert's parent
    marginals at the start (zeros for the others). The learned policies are one program.
    """
    return _play(
        "acbo" if name in POLICIES else name, system, keys, scms, buffers, num_obs, num_steps
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


# --- kinds of problems ---


@dataclass(frozen=True)
class OptimizationScenario:
    """A kind of problem that methods are compared on."""

    name: str
    """What tables call it."""
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Where its systems come from."""
    num_obs: int = 50
    """Observational rows at the start."""
    per_variable: int = 2
    """Initial interventions per variable."""
    num_steps: int = 10
    """Experiments per campaign."""

    def draw(
        self, key: Key[Array, ""], count: int, num_bins: int
    ) -> tuple[Problem, Float[Array, " batch"]]:
        """`count` problems and their optima."""
        return held_out_problems(
            key,
            count,
            self.prior,
            CampaignDesign(self.num_obs, self.num_obs, self.per_variable, self.num_steps),
            num_bins,
        )

    def regret(
        self,
        name: str,
        system: TrainedACBOSystem,
        problems: Problem,
        optima: Float[Array, " batch"],
        key: Key[Array, ""],
    ) -> Float[np.ndarray, "batch steps"]:
        """Simple regret of `name` before the first and after each experiment; the same `key` pairs
        methods.
        """
        keys = jr.split(key, len(optima))
        result = play(
            name,
            system,
            keys,
            problems.scm,
            problems.buffer,
            num_obs=self.num_obs,
            num_steps=self.num_steps,
        )
        return normalised_regret(
            np.asarray(result["recommended"]),
            np.asarray(optima)[:, None],
            np.asarray(problems.truth.baseline)[:, None],
        )


def exploration_scenario(size: int, max_vars: int) -> OptimizationScenario:
    """Problems where it pays to look around: few rows, wide ranges, responses with several
    valleys.
    """
    prior = multimodal(SCMPrior(max_vars=max_vars, min_size=size, max_size=size))
    return OptimizationScenario(f"exploration, d={size}", prior, num_obs=24, num_steps=20)


def evaluate_acquisition_performance(
    system: TrainedACBOSystem,
    scenarios: Sequence[OptimizationScenario],
    *,
    num_problems: int = 300,
    seed: int = 1_000_003,
    rivals: Sequence[str] = ON_SURFACE,
) -> dict[str, float]:
    """Simple regret of the system's policy after 1, 3, 5, 10 and 20 experiments, and by how much
    each rival's is larger, paired.

    Keys are `scenario/regret@t` and `scenario/rival/difference@t`, with `/low` and `/high` behind
    for the ends of its 95 % interval.
    """
    found = {}
    for index, scenario in enumerate(scenarios):
        draw_key, play_key = jr.split(jr.fold_in(jr.key(seed), index))
        problems, optima = scenario.draw(draw_key, num_problems, system.surrogate.config.num_bins)
        played = partial(
            scenario.regret, system=system, problems=problems, optima=optima, key=play_key
        )
        ours = played("acbo")
        steps = [t for t in (1, 3, 5, 10, 20) if t <= scenario.num_steps]
        found |= {f"{scenario.name}/regret@{t}": summarise(ours[:, t]).value for t in steps}
        for rival in rivals:
            theirs = played(rival)
            for t in steps:
                value, low, high = paired_difference(theirs[:, t], ours[:, t])
                name = f"{scenario.name}/{rival}/difference@{t}"
                found |= {name: value, f"{name}/low": low, f"{name}/high": high}
    return found
