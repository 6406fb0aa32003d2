"""How right a surrogate and how good its decisions are on problems whose truth is known, as records
of the tables; and how long a posterior takes.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from lib import baselines, metrics
from lib.buffer import ExperienceBuffer
from lib.expert_posterior import ParentScaleConfig, replay_posterior
from lib.problems import Problem, in_batches
from lib.scm import AbstractSCM, highest
from lib.surrogate import ParentSetPredictionModel
from lib.synthetic import MECHANISMS


REGRET_STEPS = (1, 3, 5, 10, 20)
STRUCTURE_BASELINES = ("all_ones", "absolute_correlation", "f_test")
Arrays = dict[str, np.ndarray]


@eqx.filter_jit
def predictions(model: ParentSetPredictionModel, problems: Problem) -> dict[str, jax.Array]:
    """What the model says of every problem beside the truth; effects in the unit that the
    target is seen in, so its own does not matter.
    """

    def one(problem):
        output, truth = model.predict(problem.buffer, problem.scm.task), problem.truth
        mean, effects = output.effect_mean, truth.effects
        usable = jnp.isfinite(effects)
        return {
            "marginals": output.marginals(),
            "parents": truth.parents,
            "possible": output.task.possible_parents,
            "log_prob": output.log_prob(truth.parents),
            "usable": usable,
            "effects": effects / output.spread,
            "error": (effects - mean) / output.spread,
            "std": output.effect_std / output.spread,
            "regret": (effects[highest(-mean, usable)] - effects.min()) / output.spread,
        }

    return jax.lax.map(one, problems, batch_size=32)


def accuracy(model: ParentSetPredictionModel, validation: tuple[Problem, ...]) -> dict[str, float]:
    """Accuracy on held-out problems of all buckets together: parents, effects, and how good the
    surface's best point is as an action.
    """
    parts = [jax.device_get(predictions(model, batch)) for batch in validation]
    decisions = [metrics.pooled(p["marginals"], p["parents"], p["possible"]) for p in parts]
    marginals, truth = map(np.concatenate, zip(*decisions, strict=True))
    # interventions that are not allowed have no effect
    error, std, effects = (
        np.concatenate([part[name][part["usable"]] for part in parts])
        for name in ("error", "std", "effects")
    )
    log_prob, regret = (
        np.concatenate([part[name] for part in parts]) for name in ("log_prob", "regret")
    )
    return {
        "validation_set_nll": -float(log_prob.mean()),
        "validation_effect_nll": float((0.5 * (error / std) ** 2 + np.log(std)).mean()),
        "validation_parent_f1": float(metrics.f1(marginals > 0.5, truth)),
        "validation_parent_auroc": metrics.auroc(marginals, truth),
        "validation_ece": metrics.calibration_error(marginals, truth),
        "validation_effect_r2": float(1 - (error**2).mean() / effects.var()),
        "validation_coverage_90": float((np.abs(error) < 1.645 * std).mean()),
        "validation_regret": float(regret.mean()),
    }


def posterior_seconds(
    model: ParentSetPredictionModel, scm: AbstractSCM, buffer: ExperienceBuffer, num_obs: int
) -> tuple[float, float]:
    """Seconds that our expert and the surrogate take for one posterior, after compilation, one
    measured after the other; the first `num_obs` rows of `buffer` are observational.
    """
    settings = ParentScaleConfig(num_obs=num_obs, num_steps=0)
    infer = eqx.filter_jit(lambda k, s, b: replay_posterior(k, s, b, b.size, settings))
    predict = eqx.filter_jit(lambda m, s, b: m.predict(b, s.task).posterior().log_probs)
    expert = metrics.median_seconds(lambda: infer(jr.key(0), scm, buffer), 3)
    return expert, metrics.median_seconds(lambda: predict(model, scm, buffer), 20)


# --- records of the tables ---


@eqx.filter_jit
def structure_scores(
    surrogate: ParentSetPredictionModel, problems: Problem
) -> dict[str, jax.Array]:
    """Parent scores `[batch, vars]` of the surrogate and of every structure baseline;
    log-probability of the true set; effects.
    """

    def one(problem):
        scm, buffer = problem.scm, problem.buffer
        output = surrogate.predict(buffer, scm.task)
        scores = {name: getattr(baselines, name)(buffer, scm.task) for name in STRUCTURE_BASELINES}
        return scores | {
            "acbo": output.marginals(),
            "parents": scm.parents,
            "possible": scm.task.possible_parents,
            "log_prob": output.log_prob(scm.parents),
            "effect_mean": output.effect_mean,
            "effect_std": output.effect_std,
        }

    return in_batches(one, problems)


def surrogate_records(
    task: str, scores: Arrays, tuning: Arrays, effects: np.ndarray
) -> list[metrics.Record]:
    """Parent accuracy of the surrogate against baselines whose thresholds are chosen on the
    problems behind `tuning`; calibration, and true effects `[batch, vars, bins]` in its bands.
    """
    truth, possible = scores["parents"], scores["possible"]
    predicted = {
        name: scores[name]
        >= metrics.best_threshold(tuning[name], tuning["parents"], tuning["possible"])
        for name in STRUCTURE_BASELINES
    } | {"acbo": scores["acbo"] > 0.5}
    f1 = {name: metrics.parent_f1(chosen, truth, possible) for name, chosen in predicted.items()}
    records, n = [], len(truth)
    for name, values in f1.items():
        figures = {
            "parent F1": metrics.summarise(values),
            "pooled F1": metrics.bootstrap_pooled(metrics.f1, predicted[name], truth, possible),
            "AUROC": metrics.bootstrap_pooled(metrics.auroc, scores[name], truth, possible),
            "AUPRC": metrics.bootstrap_pooled(
                metrics.average_precision, scores[name], truth, possible
            ),
        }
        if name != "acbo":
            figures["F1 below acbo's, paired"] = metrics.summarise(f1["acbo"] - values)
        records += metrics.cells("surrogate", task, name, figures, n)
    usable, error = np.isfinite(effects), effects - scores["effect_mean"]
    inside = (np.abs(error) < 1.645 * scores["effect_std"]) & usable
    beliefs = {
        "exact set": metrics.summarise((predicted["acbo"] == truth).all(1)),
        "set NLL (nats)": metrics.summarise(-scores["log_prob"]),
        "ECE": metrics.bootstrap_pooled(metrics.calibration_error, scores["acbo"], truth, possible),
        "effect R2": float(1 - (error[usable] ** 2).mean() / effects[usable].var()),
        "coverage of 90 % bands": metrics.summarise(inside.sum((1, 2)) / usable.sum((1, 2))),
    }
    return records + metrics.cells("surrogate", f"{task}/beliefs and effects", "acbo", beliefs, n)


def mean_f1(scores: Arrays, marginals: np.ndarray) -> metrics.Estimate:
    """Mean parent F1 of marginals on the first problems, as many as there are."""
    first = slice(len(marginals))
    truth, possible = scores["parents"][first], scores["possible"][first]
    return metrics.summarise(metrics.parent_f1(marginals > 0.5, truth, possible))


def regret_records(task: str, regret: Arrays, mechanism: jax.Array) -> list[metrics.Record]:
    """Simple regret of every method, by kind of mechanism too; the paired difference of each to
    acbo; and how often acbo ends better than doing nothing.
    """
    ours, steps = regret["acbo"], [s for s in REGRET_STEPS if s < regret["acbo"].shape[1]]
    kinds = {"": mechanism >= 0} | {f"/{n}": mechanism == i for i, n in enumerate(MECHANISMS)}
    parts = [
        (task + kind, name, values[np.asarray(rows)[: len(values)]])
        for kind, rows in kinds.items()
        for name, values in regret.items()
    ]
    parts += [
        (f"{task}/regret above acbo's, paired", name, values - ours[: len(values)])
        for name, values in regret.items()
        if name != "acbo"
    ]
    records = []
    for part, name, values in parts:
        if len(values):
            figures = {f"regret@{s}": metrics.summarise(values[:, s]) for s in steps}
            records += metrics.cells("optimisation", part, name, figures, len(values))
    stability = {"stability": metrics.summarise(ours[:, -1] < 1.0)}
    unit = "share of problems better than doing nothing"
    return records + metrics.cells("success", task, "acbo", stability, len(ours), unit)
