"""How near the surrogate comes to the exact posterior, by enumeration of every graph of linear
Gaussian systems.

    python benchmarks/fidelity.py

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


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.surrogate import (
    ACBO,
    MIXED,
    Problems,
    Report,
    host,
    score_effects,
    score_parents,
    share_of_improvement,
    trained_prior,
)
from benchmarks.surrogate import Config as ReportConfig
from lib.config import check_settings, errors_for_people, use_compilation_cache
from lib.enumeration import enumerated_effects, enumerated_posterior
from lib.metrics import auroc, paired_difference, parent_f1, render, summarise, write_results
from lib.scm_prior import SCMPrior
from lib.surrogate import ParentSetPredictionModel
from lib.system import load_surrogate


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    steps: int = 4000
    """Gradient steps of the training."""
    num_problems: int = 500
    """Held-out problems per cell."""
    folder: Path = Path("artifacts/fidelity")
    """Where weights and tables go."""

    def __post_init__(self):
        check_settings(self)


# Flags of 02_train_surrogate.py: the enumerated prior, and no expert.
ENUMERATED = (
    "--prior.mechanisms",
    "linear",
    "--prior.min-effect",
    "0",
    "--prior.min-size",
    "2",
    "--prior.max-size",
    "4",
    "--prior.max-vars",
    "4",
)
BUCKETS = (
    "--buckets.0.max-size",
    "2",
    "--buckets.1.max-size",
    "4",
    "--buckets.1.models",
    "12",
    "--weights.expert",
    "0",
)


def train(config: Config) -> Path:
    """The weights, trained if they are not there."""
    path = config.folder / "surrogate.eqx"
    if not path.exists():
        settings = ("--folder", config.folder, "--steps", config.steps, *ENUMERATED, *BUCKETS)
        subprocess.run(
            [sys.executable, "02_train_surrogate.py", "small", *map(str, settings)], check=True
        )
    return path


def measure_posterior(report: Report, size: int, prior: SCMPrior) -> None:
    """Against the posterior by enumeration, under the very prior that the weights were trained
    on.
    """
    config = report.config
    problems = report.problems(size, config.num_obs, prior)
    found = host(
        compare_with_enumeration(
            report.model, problems, replace(prior, max_vars=size, min_size=size, max_size=size)
        )
    )
    n, task = config.num_problems, f"d={size}"
    report.add("fidelity", task, ACBO, "total variation", summarise(found["distance"]), n)
    for name, suffix in ((ACBO, ""), ("enumeration", "_exact")):
        marginals, truth = found["marginals" + suffix], found["parents"]
        report.add("fidelity", task, name, "set NLL", summarise(-found["log_prob" + suffix]), n)
        report.add("fidelity", task, name, "entropy", summarise(found["entropy" + suffix]), n)
        report.add(
            "fidelity",
            task,
            name,
            "pooled F1",
            parent_f1(marginals > 0.5, truth, found["possible"]).pooled,
            n,
        )
        report.add("fidelity", task, name, "AUROC", auroc(marginals, truth, found["possible"]), n)
    gap = paired_difference(-found["log_prob"], -found["log_prob_exact"])
    report.add("fidelity", task, "difference", "set NLL", gap, n)


@eqx.filter_jit
def compare_with_enumeration(
    model: ParentSetPredictionModel, problems: Problems, prior: SCMPrior
) -> dict[str, jax.Array]:
    """Total variation over all parent sets, and both posteriors' beliefs."""

    def one(problem):
        scm = problem.scm
        exact, output = (
            enumerated_posterior(problem.buffer, scm.task, prior),
            model.predict(problem.buffer, scm.task),
        )
        allowed = ~(exact.sets & ~scm.task.possible_parents[None]).any(1)
        ours = jnp.where(allowed, jnp.exp(jax.vmap(output.log_prob)(exact.sets)), 0.0)
        entropy = -jnp.where(ours > 0, ours * jnp.log(jnp.where(ours > 0, ours, 1.0)), 0.0).sum()
        truth = {
            "parents": scm.parents,
            "possible": scm.task.possible_parents,
            "distance": 0.5 * jnp.abs(ours - exact.probs).sum(),
        }
        learned = {
            "marginals": output.marginals(),
            "log_prob": output.log_prob(scm.parents),
            "entropy": entropy,
        }
        return (
            truth
            | learned
            | {
                "marginals_exact": exact.marginals(),
                "log_prob_exact": exact.log_prob(scm.parents),
                "entropy_exact": exact.entropy(),
            }
        )

    return jax.lax.map(one, problems)  # one by one: enumeration is wide already


def measure_first_experiment(report: Report, size: int, prior: SCMPrior) -> None:
    """The first experiment with few rows, beside the Bayes-optimal one, where there is half a
    deviation to gain.
    """
    config = report.config
    problems = report.problems(size, config.few_obs, prior)
    exact_prior = replace(prior, max_vars=size, min_size=size, max_size=size)
    scores = host(score_effects(report.model, problems))
    scores["exact"] = np.asarray(best_effects(problems, exact_prior, report.model.config.num_bins))
    gain = scores["baseline"] - scores["effects"].min((1, 2)) >= MIXED.min_effect
    scores = {name: value[gain] for name, value in scores.items()}
    shares = {
        name: share_of_improvement(scores[of], scores)
        for name, of in ((ACBO, "mean"), ("enumeration", "exact"))
    }
    task, n = f"d={size}, {config.few_obs} rows", int(gain.sum())
    for name, share in shares.items():
        report.add("fidelity", task, name, "share of the improvement", summarise(share), n)
    report.add(
        "fidelity",
        task,
        "difference",
        "share of the improvement",
        paired_difference(shares[ACBO], shares["enumeration"]),
        n,
    )


@eqx.filter_jit
def best_effects(problems: Problems, prior: SCMPrior, num_bins: int) -> jax.Array:
    """Mean effects under the posterior over all graphs."""
    return jax.lax.map(
        lambda problem: enumerated_effects(problem.buffer, problem.scm.task, prior, num_bins),
        problems,
    )


def measure_two_variables(report: Report, prior: SCMPrior) -> None:
    """Where two variables cannot be told apart."""
    config = report.config
    problems = report.problems(2, config.num_obs, prior)
    blind = eqx.tree_at(
        lambda p: p.buffer.valid,
        problems,
        jax.vmap(lambda buffer: buffer.observational)(problems.buffer),
    )
    said = host(score_parents(report.model, blind))
    parent = said[ACBO].max(1)
    report.add(
        "fidelity",
        "two variables, observations only",
        ACBO,
        "P(the other is the parent)",
        summarise(parent),
        len(parent),
    )
    report.add(
        "fidelity",
        "two variables, observations only",
        ACBO,
        "mean distance from 1/2",
        summarise(np.abs(parent - 0.5)),
        len(parent),
    )
    within = summarise((np.abs(parent - 0.5) <= 0.05).astype(float))
    report.add(
        "fidelity",
        "two variables, observations only",
        ACBO,
        "share within .05 of 1/2",
        within,
        len(parent),
    )


def main(config: Config) -> None:
    """Train what is missing, measure, print and write the table."""
    use_compilation_cache(Path("artifacts/cache"))
    weights = train(config)
    report, prior = (
        Report(ReportConfig(num_problems=config.num_problems), load_surrogate(weights)[0]),
        trained_prior(weights),
    )
    for size in (3, 4):
        measure_posterior(report, size, prior)
        measure_first_experiment(report, size, prior)
    measure_two_variables(report, prior)
    write_results(config.folder, report.records)
    print(render(report.records, "fidelity"))


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.cli(Config, description=__doc__))
