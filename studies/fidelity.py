"""How near the surrogate comes to the exact posterior, by enumeration of every graph of linear
Gaussian systems.

    python studies/fidelity.py

Trains `small` for `--steps` steps on the enumerated prior itself: linear, Gaussian, 2 to 4
variables, any target (some 10 minutes on two CPU cores; weights that are there are not trained
again). Then 500 held-out systems each of 3 and 4 variables: 200 observational rows and two
interventions per variable for the posterior, 48 rows for the first experiment beside the
Bayes-optimal one. And two variables known from observations alone, where either is the other's
parent with probability one half. Intervals are 95 %, over problems.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lib import metrics, settings
from lib.artifacts import code_digest, read_header
from lib.methods import OptimizationScenario
from lib.problems import DATA, Problem
from lib.scm_prior import SCMPrior, Special, prior_in
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig
from lib.system import load_surrogate
from studies.enumeration import enumerated_effects, enumerated_posterior
from studies.surrogate import first_regret


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    steps: int = 4000
    """Gradient steps of the training."""
    num_problems: int = 500
    """Held-out problems per cell."""
    num_obs: int = 200
    """Observational rows for the posterior."""
    few_obs: int = 48
    """Observational rows for the first experiment."""
    seed: int = 4_000_003
    """Seed of the problems; unlike any training seed."""
    folder: Path = Path("artifacts/studies/fidelity")
    """Where weights and tables go."""

    def __post_init__(self):
        settings.validate(self)


# Flags of 02_train_surrogate.py: the enumerated prior, and no expert.
ENUMERATED = (
    "--prior.mechanisms linear --prior.min-effect 0 --prior.min-size 2 --prior.max-size 4 "
    "--prior.max-vars 4 --buckets.0.max-size 2 --buckets.1.max-size 4 --buckets.1.models 12 "
    "--buckets.2.max-size 4 --weights.expert 0 "
    + " ".join(f"--prior.{name} 0" for name in Special._fields)
    + "".join(f" --design.{name} 0" for name in DATA)
)
LEAST_GAIN = 0.5  # deviations of the target: less is no problem of optimisation


def train(config: Config) -> Path:
    """The weights: those that are there, if this code trained them for as many steps."""
    path, wanted = config.folder / "surrogate.eqx", (code_digest(), config.steps)
    header = read_header(path) if path.exists() else {"code": "", "step": 0}
    if (header["code"], header["step"]) != wanted:
        flags = ("--folder", config.folder, "--steps", config.steps, *ENUMERATED.split())
        script = Path(__file__).parents[1] / "02_train_surrogate.py"
        subprocess.run([sys.executable, str(script), "small", *map(str, flags)], check=True)
    return path


def draw(size: int, num_obs: int, prior: SCMPrior, config: Config) -> tuple[SCMPrior, Problem]:
    """The prior of one size, and problems of it."""
    prior = replace(prior, max_vars=size, min_size=size, max_size=size)
    task = f"d={size}, {num_obs} rows"
    key = settings.stage_key(config.seed, "fidelity", task)
    scenario = OptimizationScenario(task, prior, num_obs, num_steps=1)
    return prior, scenario.draw(key, config.num_problems, SurrogateConfig.num_bins)


def measure_posterior(
    model: ParentSetPredictionModel, size: int, prior: SCMPrior, config: Config
) -> list[metrics.Record]:
    """Against the posterior by enumeration, under the prior that the weights were trained on."""
    prior, problems = draw(size, config.num_obs, prior, config)
    found = jax.device_get(compare_with_enumeration(model, problems, prior))
    ours, exact = found["ours"], found["exact"]
    truth, possible, task = found["parents"], found["possible"], f"d={size}"
    n = len(truth)
    figures = {"total variation": metrics.summarise(found["distance"])}
    records = metrics.cells("fidelity", task, "acbo", figures, n)
    for name, said in (("acbo", ours), ("enumeration", exact)):
        marginals = said["marginals"]
        figures = {
            "set NLL": metrics.summarise(-said["log_prob"]),
            "entropy": metrics.summarise(said["entropy"]),
            "pooled F1": metrics.bootstrap_pooled(metrics.f1, marginals > 0.5, truth, possible),
            "AUROC": metrics.bootstrap_pooled(metrics.auroc, marginals, truth, possible),
        }
        records += metrics.cells("fidelity", task, name, figures, n)
    gap = {"set NLL": metrics.summarise(exact["log_prob"] - ours["log_prob"])}
    return records + metrics.cells("fidelity", task, "difference", gap, n)


@eqx.filter_jit
def compare_with_enumeration(
    model: ParentSetPredictionModel, problems: Problem, prior: SCMPrior
) -> dict[str, Any]:
    """Total variation over all parent sets, and both posteriors' beliefs."""

    def one(problem):
        scm, buffer = problem.scm, problem.buffer
        exact = enumerated_posterior(buffer, scm.task, prior)
        output = model.predict(buffer, scm.task)
        allowed = ~(exact.sets & ~scm.task.possible_parents[None]).any(1)
        ours = jnp.where(allowed, jnp.exp(jax.vmap(output.log_prob)(exact.sets)), 0.0)

        def belief(of, entropy):
            log_prob = of.log_prob(scm.parents)
            return {"marginals": of.marginals(), "log_prob": log_prob, "entropy": entropy}

        return {
            "parents": scm.parents,
            "possible": scm.task.possible_parents,
            "distance": 0.5 * jnp.abs(ours - exact.probs).sum(),
            "ours": belief(output, jax.scipy.special.entr(ours).sum()),
            "exact": belief(exact, exact.entropy()),
        }

    return jax.lax.map(one, problems)  # one by one: enumeration is wide already


def measure_first_experiment(
    model: ParentSetPredictionModel, size: int, prior: SCMPrior, config: Config
) -> list[metrics.Record]:
    """The first experiment with few rows, beside the Bayes-optimal one, where there is half a
    deviation to gain.
    """
    prior, problems = draw(size, config.few_obs, prior, config)
    predicted, truth = jax.device_get((predicted_effects(model, problems, prior), problems.truth))
    gain = truth.baseline - truth.effects.min((1, 2)) >= LEAST_GAIN
    predicted, effects, baseline = jax.tree.map(
        lambda x: x[gain], (predicted, truth.effects, truth.baseline)
    )
    regret = first_regret(predicted, effects, baseline)
    figures = {name: metrics.summarise(values) for name, values in regret.items()}
    figures["difference"] = metrics.summarise(regret["acbo"] - regret["enumeration"])
    task, n = f"d={size}, {config.few_obs} rows", len(baseline)
    return [
        record
        for name, value in figures.items()
        for record in metrics.cells(
            "fidelity", task, name, {"regret of the first experiment": value}, n
        )
    ]


@eqx.filter_jit
def predicted_effects(
    model: ParentSetPredictionModel, problems: Problem, prior: SCMPrior
) -> dict[str, jax.Array]:
    """Mean effects `[batch, vars, bins]` of the surrogate, and under the posterior over graphs."""

    def one(problem):
        buffer, task = problem.buffer, problem.scm.task
        exact = enumerated_effects(buffer, task, prior, model.config.num_bins)
        return {"acbo": model.predict(buffer, task).effect_mean, "enumeration": exact}

    return jax.lax.map(one, problems)


def measure_two_variables(
    model: ParentSetPredictionModel, prior: SCMPrior, config: Config
) -> list[metrics.Record]:
    """Where two variables cannot be told apart."""
    _, problems = draw(2, config.num_obs, prior, config)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0))
    def marginals(model, problem):
        buffer = replace(problem.buffer, valid=problem.buffer.observational)
        return model.predict(buffer, problem.scm.task).marginals()

    parent = np.asarray(marginals(model, problems)).max(1)
    distance = np.abs(parent - 0.5)
    figures = {
        "P(the other is the parent)": metrics.summarise(parent),
        "mean distance from 1/2": metrics.summarise(distance),
        "share within .05 of 1/2": metrics.summarise(distance <= 0.05),
    }
    return metrics.cells(
        "fidelity", "two variables, observations only", "acbo", figures, len(parent)
    )


def main(config: Config) -> Path:
    """Train what is missing, measure, print and write the table; returns the folder."""
    settings.use_compilation_cache(Path("artifacts/cache"))
    model, header = load_surrogate(train(config))
    prior = SCMPrior(**prior_in(header))  # what the weights were trained on
    records = measure_two_variables(model, prior, config)
    for size in (3, 4):
        records += measure_posterior(model, size, prior, config)
        records += measure_first_experiment(model, size, prior, config)
    metrics.write_results(config.folder, records, config.seed)
    print(metrics.render(records, "fidelity"))
    return config.folder


if __name__ == "__main__":
    with settings.errors_for_people():
        main(tyro.cli(Config, description=__doc__))
