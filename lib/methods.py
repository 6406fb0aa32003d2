"""Who plays: every method that chooses experiments, as a function of (key, scm, buffer), and how
good the actions are that it recommends.

A method sees the data, the target and the ranges; only `cbo_known_graph` is told the parents.
"""

import functools as ft
from collections.abc import Callable
from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from lib import baselines
from lib.buffer import ExperienceBuffer
from lib.check import BELIEFS, PROCESSES, check
from lib.expert import (
    ExpertRun,
    run_gp_ei,
    run_known_graph,
    run_parent_scale,
    run_with_posterior,
)
from lib.expert_posterior import ParentScaleConfig
from lib.metrics import normalised_regret
from lib.policy import expected_improvement_choice, thompson_choice
from lib.problems import DataDesign, Problem, draw_problems, in_batches
from lib.scm import AbstractSCM, Intervention
from lib.scm_prior import SCMPrior
from lib.system import TrainedACBOSystem, play_campaign


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
    "acbo_unchecked",
    "gaussian_processes",
    "acbo",
)
UNCHECKED = ("bc_policy", "grpo_policy", "acbo_unchecked")  # one program, three artifacts
EXPERT_FAMILY = ("parent_scale", "parent_scale_amortized", "cbo_known_graph", "bo")
ON_SURFACE = ("surrogate_greedy", "surrogate_ei", "surrogate_thompson")


class ACBOPipeline(eqx.Module):
    """The expert with the surrogate's posterior in place of its own
    (phase4_training_infrastructure.md).
    """

    system: TrainedACBOSystem
    config: ParentScaleConfig = eqx.field(static=True)

    def __call__(
        self, key: Key[Array, ""], scm: AbstractSCM, buffer: ExperienceBuffer
    ) -> ExpertRun:
        """A run of the expert; its candidates are the 16 sets most probable at the start."""
        surrogate = self.system.surrogate
        first = surrogate.predict(buffer, scm.task).posterior().top_k(16)

        def log_posterior(buffer):
            output = surrogate.predict(buffer, scm.task)
            return jax.nn.log_softmax(jax.vmap(output.log_prob)(first.sets))

        return run_with_posterior(key, scm, buffer, self.config, first, log_posterior)


def make_method(name: str, system: TrainedACBOSystem, num_obs: int, num_steps: int) -> Callable:
    """The method called `name` as a function of (key, scm, buffer); `system` is what the learned
    ones use, `num_obs` what the expert's family needs.

    What each recommends: random, the experiment with the best outcome; the regressions and the
    learned methods, the minimum of their predicted surface, or, checked, doing nothing; the
    expert's family, the minimum of its Gaussian processes' means. `acbo` is the checked system,
    `acbo_unchecked` believes its surrogate as it is, as `bc_policy` and `grpo_policy` do, and
    `gaussian_processes` is the check's processes around doing nothing alone. Raises `ValueError`
    for an unknown name.
    """
    expert = ParentScaleConfig(num_obs=num_obs, num_steps=num_steps)

    def campaign(decide, *how):
        return lambda key, scm, buffer: play_campaign(
            key, scm, buffer, num_steps, lambda k, b, _: decide(*how, scm, k, b)
        )

    def regression(choose, scm, key, buffer):
        choice = choose(buffer, scm.task)
        return choice, choice

    def random(scm, key, buffer):
        done = (buffer.intervened & scm.candidates[None]).any(1) & buffer.valid
        outcome = jnp.take(buffer.values, scm.target, axis=1)
        best = jnp.argmin(jnp.where(done, outcome, jnp.inf))
        variable = jnp.argmax(buffer.intervened[best])
        return baselines.random_choice(key, scm.task), (variable, buffer.values[best, variable])

    def on_surface(choose, scm, key, buffer):
        output = system.surrogate.predict(buffer, scm.task)
        return choose(key, output), output.best()

    def processes(scm, key, buffer):
        most = buffer.valid.shape[0] - num_obs
        checked = check(system.surrogate, buffer, scm.task, most, PROCESSES)
        return checked.choose(checked.gain), checked.recommended()

    def of_system(beliefs, key, scm, buffer):
        """The system's own campaign, which looks at no more experiments than there can be."""
        most = buffer.valid.shape[0] - num_obs
        return system.play(key, scm, buffer, num_steps, beliefs=beliefs, most=most)

    methods = {
        "random": campaign(random),
        "least_squares": campaign(regression, baselines.least_squares),
        "additive_ridge": campaign(regression, baselines.additive_ridge),
        "bo": ft.partial(run_gp_ei, config=expert),
        "cbo_known_graph": ft.partial(run_known_graph, config=expert),
        "parent_scale": ft.partial(run_parent_scale, config=expert),
        "parent_scale_amortized": ACBOPipeline(system, expert),
        "surrogate_greedy": campaign(on_surface, lambda key, output: output.best()),
        "surrogate_ei": campaign(
            on_surface, lambda key, output: expected_improvement_choice(output)
        ),
        "surrogate_thompson": campaign(on_surface, thompson_choice),
        **dict.fromkeys(UNCHECKED, ft.partial(of_system, None)),
        "gaussian_processes": campaign(processes),
        "acbo": ft.partial(of_system, BELIEFS),
    }
    if name not in methods:
        raise ValueError(f"unknown method '{name}': choose from {', '.join(methods)}")
    return methods[name]


@eqx.filter_jit
def play(
    name: str,
    system: TrainedACBOSystem,
    keys: Key[Array, " batch"],
    scms: AbstractSCM,
    buffers: ExperienceBuffer,
    num_obs: int,
    num_steps: int,
) -> dict[str, Array]:
    """Play `name` on a batch of problems.

    Returns `recommended`, the noise-free E[Y | do] of what it recommends before the first and after
    each experiment `[batch, steps + 1]`, and `marginals` `[batch, vars]`, the expert's parent
    marginals at the start (zeros for the others).
    """
    method = make_method(name, system, num_obs, num_steps)

    def one(inputs):
        key, scm, buffer = inputs
        run, num_vars = method(key, scm, buffer), scm.var_mask.shape[0]
        means = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, num_vars)))(
            run.recommended_variable, run.recommended_value
        )
        of_expert = name == "parent_scale"
        marginals = run.posterior(scm.target, 0).marginals() if of_expert else jnp.zeros(num_vars)
        return {"recommended": means, "marginals": marginals}

    return in_batches(one, (keys, scms, buffers))


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

    def draw(self, key: Key[Array, ""], count: int, num_bins: int) -> Problem:
        """`count` problems."""
        rows = self.num_obs, self.num_obs, self.per_variable
        design = DataDesign(*rows, num_steps=self.num_steps)
        return draw_problems(key, count, self.prior, design, num_bins)

    def regret(
        self,
        name: str,
        system: TrainedACBOSystem,
        problems: Problem,
        best: Float[Array, " batch"],
        key: Key[Array, ""],
    ) -> Float[np.ndarray, "batch steps"]:
        """Simple regret of `name` before the first and after each experiment, `best` being
        `lib.problems.optima`; the same `key` pairs methods.
        """
        problem = jr.split(key, len(best)), problems.scm, problems.buffer
        played = play(name, system, *problem, self.num_obs, self.num_steps)
        ends = best[:, None], problems.truth.baseline[:, None]
        return normalised_regret(played["recommended"], *ends)
