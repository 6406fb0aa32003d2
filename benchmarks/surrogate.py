"""How good a trained surrogate is: parents, calibration, effects, transfer, and beside the expert.

    python benchmarks/surrogate.py --weights artifacts/small/surrogate.eqx --parts accuracy effects
    transfer expert

Held-out problems of `SCMPrior`: `num_obs` observational rows and `per_variable` interventions on
each variable, families Erdős–Rényi and scale-free, half of them linear, unless a row says
otherwise. Intervals are 95 %, over problems. Thresholds of the baselines are chosen on as many
separate problems, to their advantage. Writes tables (.md, .csv, .tex), metrics.json and figures to
`--folder`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import tyro
from tqdm import tqdm

from lib import baselines
from lib.artifacts import read_header
from lib.buffer import DataError, ExperienceBuffer
from lib.config import check_settings, errors_for_people, use_compilation_cache
from lib.methods import in_batches
from lib.metrics import (
    Record,
    auroc,
    average_precision,
    best_threshold,
    expected_calibration_error,
    median_seconds,
    paired_difference,
    parent_f1,
    render,
    summarise,
    write_results,
)
from lib.parent_scale import ParentScaleConfig, prior_over_sets, replay_posterior
from lib.posterior import ParentSetPosterior
from lib.scm import MECHANISMS, NOISES, Intervention, SyntheticSCM, Task, value_grid
from lib.scm_prior import FAMILIES, SCMPrior, initial_buffer, sample_scm_and_family
from lib.surrogate import ParentSetPredictionModel
from lib.system import TrainedACBOSystem, load_surrogate


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    weights: Path = Path("artifacts/small/surrogate.eqx")
    """A surrogate of stage 2, or a system of stage 4."""
    parts: tuple[str, ...] = ("accuracy", "effects", "transfer", "expert")
    """What is measured: any of accuracy, effects, transfer, expert."""
    sizes: tuple[int, ...] = (5, 8, 10)
    """Numbers of variables."""
    transfer_sizes: tuple[int, ...] = (5, 8, 10, 15, 20, 30, 50)
    """Numbers of variables of the curves."""
    num_problems: int = 500
    """Held-out problems per cell."""
    num_obs: int = 200
    """Observational rows."""
    few_obs: int = 48
    """Observational rows where the effects are asked for."""
    per_variable: int = 2
    """Interventions per variable."""
    seed: int = 4_000_003
    """Seed of the problems; unlike any training seed."""
    folder: Path = Path("artifacts/surrogate")
    """Where tables and figures go."""

    def __post_init__(self):
        check_settings(self)


ACBO = "acbo"
STRUCTURE = ("all_ones", "absolute_correlation", "f_test")
RULES = {
    "least_squares": baselines.least_squares_surface,
    "additive_ridge": baselines.additive_ridge_surface,
}
MIXED = SCMPrior(families=("erdos_renyi", "scale_free"))  # what sizes are compared on
# Less noise, smooth mechanisms, short ranges: problems on which the figures of the design were
# measured.
NARROW = SCMPrior(
    families=("erdos_renyi",),
    max_noise=1.0,
    min_lengthscale=1.5,
    max_lengthscale=1.5,
    min_range=2.0,
    max_range=2.0,
    min_effect=0.3,
)
# Mean F1 of the predecessor's surrogate on 15 systems, data not recorded (its stored evaluations):
# family -> {variables: F1}.
PREDECESSOR = {
    "chain": {3: 0.889, 8: 0.800, 15: 0.711},
    "fork": {3: 0.956, 8: 0.933, 15: 0.778},
    "scale_free": {3: 0.556, 8: 0.474, 15: 0.268},
}
# of the true set, beside the expert: sets that its prior leaves out have none
LEAST_LOG_PROB = -10.0


# --- problems and scores ---

# everything about problems that some table needs, leading axis `batch`
Scores = dict[str, np.ndarray]


class Problems(eqx.Module):
    """Systems with their first data, and the index of each one's family."""

    scm: SyntheticSCM
    buffer: ExperienceBuffer
    family: jax.Array


@eqx.filter_jit
def draw(key: jax.Array, count: int, prior: SCMPrior, num_obs: int, per_variable: int) -> Problems:
    """Held-out problems."""

    def one(key):
        scm_key, data_key = jr.split(key)
        scm, family = sample_scm_and_family(scm_key, prior)
        buffer = initial_buffer(
            data_key, scm, num_obs, per_variable, num_obs + per_variable * prior.max_vars
        )
        return Problems(scm, buffer, family)

    return in_batches(one, jr.split(key, count))


def kinds(problem: Problems) -> dict[str, jax.Array]:
    """What problems are told apart by."""
    scm = problem.scm
    return {
        "mechanism": scm.mechanism,
        "noise": scm.noise_kind,
        "family": problem.family,
        "graph": scm.graph,
        "target": scm.target,
    }


@eqx.filter_jit
def score_parents(model: ParentSetPredictionModel, problems: Problems) -> dict[str, jax.Array]:
    """What the surrogate and the baselines say of the parents, and the truth."""

    def one(problem):
        scm, buffer = problem.scm, problem.buffer
        output = model.predict(buffer, scm.task)
        rivals = {
            name: getattr(baselines, name)(buffer, scm.target, scm.var_mask) for name in STRUCTURE
        }
        belief = {
            ACBO: output.marginals(),
            "log_prob": output.log_prob(scm.parents),
            "expected_f1": expected_f1(output.posterior(), scm.parents),
        }
        truth = {
            "parents": scm.parents,
            "possible": scm.task.possible_parents,
            "collinear": collinearity(buffer, scm),
        }
        return rivals | belief | truth | kinds(problem)

    return in_batches(one, problems)


@eqx.filter_jit
def score_effects(model: ParentSetPredictionModel, problems: Problems) -> dict[str, jax.Array]:
    """What the surrogate and the regressions say of the effects, and the truth, which costs
    most.
    """
    num_bins = model.config.num_bins

    def one(problem):
        scm, buffer = problem.scm, problem.buffer
        output = model.predict(buffer, scm.task)
        rules = {
            name: rule(buffer, scm.target, scm.low, scm.high, num_bins)
            for name, rule in RULES.items()
        }
        effects = scm.effect_table(value_grid(scm.low, scm.high, num_bins))
        truth = {
            "effects": effects,
            "baseline": scm.mean_outcome(Intervention.none(scm.var_mask.shape[0])),
        }
        return (
            rules | {"mean": output.effect_mean, "std": output.effect_std} | truth | kinds(problem)
        )

    return in_batches(one, problems)


def expected_f1(posterior: ParentSetPosterior, parents: jax.Array) -> jax.Array:
    """Mean F1 of a parent set drawn from the posterior, as the expert's paper scores it."""
    hits, total = (posterior.sets & parents[None]).sum(1), posterior.sets.sum(1) + parents.sum()
    return posterior.probs @ jnp.where(total > 0, 2.0 * hits / jnp.maximum(total, 1), 1.0)


def collinearity(buffer, scm: SyntheticSCM) -> jax.Array:
    """The largest observational |correlation| of a parent of the target with another candidate:
    where it is high, the two are substitutes.
    """
    rows = buffer.observational
    location, scale = baselines.column_moments(buffer.values, rows)
    z = jnp.where(rows[:, None], (buffer.values - location[None]) / scale[None], 0.0)
    correlation = jnp.abs(z.T @ z / jnp.maximum(rows.sum(), 1)) * (1.0 - jnp.eye(z.shape[1]))
    return jnp.where(scm.parents[:, None] & scm.task.possible_parents[None], correlation, 0.0).max()


def host(arrays: dict[str, jax.Array]) -> Scores:
    return {name: np.asarray(value) for name, value in arrays.items()}


def confounded(graphs: np.ndarray, targets: np.ndarray, variables: np.ndarray) -> np.ndarray:
    """Whether a variable of each problem and the target have a common cause that reaches the target
    by a path around that variable `[batch]`.
    """
    rows, size = np.arange(len(targets)), graphs.shape[1]
    around = graphs.astype(float)
    causes = np.linalg.matrix_power(around + np.eye(size), size)[rows, :, variables] > 0
    around[rows, variables] = 0.0  # no way out of the variable
    reaches = np.linalg.matrix_power(around + np.eye(size), size)[rows, :, targets] > 0
    others = np.arange(size)[None] != variables[:, None]
    return (causes & reaches & others).any(1)


def share_of_improvement(surface: np.ndarray, scores: Scores) -> np.ndarray:
    """(E[Y] - E[Y | do at the surface's lowest point]) / (E[Y] - least on the grid) of every
    problem, on candidate variables.
    """
    effects, count = scores["effects"].reshape(len(surface), -1), len(surface)
    chosen = np.where(np.isfinite(effects), surface.reshape(count, -1), np.inf).argmin(1)
    best = effects.min(1)
    return (scores["baseline"] - effects[np.arange(count), chosen]) / (scores["baseline"] - best)


class Report:
    """Problems of a cell are drawn and scored once; records are collected."""

    def __init__(self, config: Config, model: ParentSetPredictionModel):
        self.config, self.model = config, model
        self.records: list[Record] = []

    def add(
        self, table: str, task: str, method: str, metric: str, estimate, n: int, unit: str = ""
    ) -> None:
        value, low, high = estimate if isinstance(estimate, tuple) else (estimate, -np.inf, np.inf)
        self.records.append(
            Record(table, task, method, metric, float(value), float(low), float(high), n, unit)
        )

    def problems(
        self, size: int, num_obs: int, prior: SCMPrior = MIXED, stream: int = 0
    ) -> Problems:
        """Problems with `size` variables, padded to no more; `stream` 1 are those that thresholds
        are chosen on.
        """
        prior = replace(prior, max_vars=size, min_size=size, max_size=size)
        key = jr.fold_in(jr.fold_in(jr.fold_in(jr.key(self.config.seed), size), num_obs), stream)
        return draw(key, self.config.num_problems, prior, num_obs, self.config.per_variable)

    def parents(self, size: int, num_obs: int, prior: SCMPrior = MIXED) -> tuple[Scores, Scores]:
        """Scores of the parents in the problems, and in those that thresholds are chosen on."""
        first, second = (
            host(score_parents(self.model, self.problems(size, num_obs, prior, stream)))
            for stream in (0, 1)
        )
        return first, second

    def effects(self, size: int, num_obs: int, prior: SCMPrior = MIXED) -> Scores:
        """Scores of the effects in the problems."""
        return host(score_effects(self.model, self.problems(size, num_obs, prior)))

    def by_kind(
        self,
        score: Callable,
        size: int,
        num_obs: int,
        prior: SCMPrior,
        kind: str,
        values: range,
        stream: int = 0,
    ) -> dict[int, Scores]:
        """Scores of `num_problems` problems of each of the `values` of `kind`, a name among the
        scores, that the prior mixes evenly.
        """
        found: dict[int, list[Scores]] = {value: [] for value in values}
        wanted, part = self.config.num_problems, 0
        while min(sum(len(s["target"]) for s in scores) for scores in found.values()) < wanted:
            scores = host(score(self.model, self.problems(size, num_obs, prior, stream + 2 * part)))
            for value, kept in found.items():
                kept.append({name: array[scores[kind] == value] for name, array in scores.items()})
            part += 1
        return {
            v: {name: np.concatenate([s[name] for s in kept])[:wanted] for name in kept[0]}
            for v, kept in found.items()
        }


# --- the parts ---


def measure_structure(
    report: Report, table: str, task: str, scores: Scores, tuning: Scores
) -> None:
    """Parents: the surrogate at probability one half, the baselines at their best thresholds."""
    truth, possible, n = scores["parents"], scores["possible"], len(scores["parents"])
    said = {ACBO: scores[ACBO] > 0.5}
    said |= {
        name: scores[name] >= best_threshold(tuning[name], tuning["parents"], tuning["possible"])
        for name in STRUCTURE
    }
    ours = parent_f1(said[ACBO], truth, possible)
    for name, guess in said.items():
        f1 = parent_f1(guess, truth, possible)
        report.add(table, task, name, "pooled F1", f1.pooled, n)
        report.add(table, task, name, "parent F1", f1.mean, n)
        report.add(table, task, name, "AUROC", auroc(scores[name], truth, possible), n)
        report.add(table, task, name, "AUPRC", average_precision(scores[name], truth, possible), n)
        if name != ACBO:
            report.add(
                table,
                task,
                name,
                "F1 below acbo's, paired",
                paired_difference(ours.per_problem, f1.per_problem),
                n,
            )
    report.add(
        table,
        task,
        ACBO,
        "exact set",
        summarise(((said[ACBO] == truth) | ~possible).all(1).astype(float)),
        n,
    )
    report.add(table, task, ACBO, "set NLL", summarise(-scores["log_prob"]), n)
    report.add(
        table, task, ACBO, "ECE", expected_calibration_error(scores[ACBO], truth, possible), n
    )


def measure_accuracy(report: Report) -> None:
    """By size, then by family beside the predecessor."""
    config, pooled = report.config, []
    for size in tqdm(config.sizes, desc="accuracy"):
        scores, tuning = report.parents(size, config.num_obs)
        measure_structure(report, "surrogate", f"d={size}", scores, tuning)
        pooled.append((scores[ACBO][scores["possible"]], scores["parents"][scores["possible"]]))
        for kind, rows in (
            ("linear", scores["mechanism"] == 0),
            ("fourier", scores["mechanism"] == 1),
        ):
            part = {name: value[rows] for name, value in scores.items()}
            f1 = parent_f1(part[ACBO] > 0.5, part["parents"], part["possible"])
            report.add(
                "surrogate", f"d={size}", f"{ACBO}, {kind}", "pooled F1", f1.pooled, int(rows.sum())
            )
            report.add(
                "surrogate",
                f"d={size}",
                f"{ACBO}, {kind}",
                "AUROC",
                auroc(part[ACBO], part["parents"], part["possible"]),
                int(rows.sum()),
            )
        measure_structure(
            report, "surrogate", f"d={size}/narrow", *report.parents(size, config.num_obs, NARROW)
        )
    draw_reliability(
        config.folder / "reliability.png", *(np.concatenate(x) for x in zip(*pooled, strict=True))
    )
    families = range(len(FAMILIES))
    for size in tqdm((3, 8, 15), desc="families"):
        scores, tuning = (
            report.by_kind(
                score_parents,
                size,
                config.num_obs,
                SCMPrior(families=FAMILIES),
                "family",
                families,
                stream,
            )
            for stream in (0, 1)
        )
        for index, family in enumerate(FAMILIES):
            measure_structure(
                report, "surrogate", f"d={size}/{family}", scores[index], tuning[index]
            )
            if size in PREDECESSOR.get(family, {}):
                report.add(
                    "surrogate",
                    f"d={size}/{family}",
                    "predecessor",
                    "parent F1",
                    PREDECESSOR[family][size],
                    15,
                )


def measure_effects(report: Report) -> None:
    """R^2, coverage, and the first experiment at the surface's best point: by size, by family and
    by what makes a problem hard.
    """
    config = report.config

    def add(task, scores, rows):
        part = {name: value[rows] for name, value in scores.items()}
        n, usable = int(rows.sum()), np.isfinite(part["effects"])
        error = np.where(usable, part["effects"] - part["mean"], 0.0)
        inside = (np.abs(error) < 1.645 * part["std"]) & usable
        report.add(
            "effects",
            task,
            ACBO,
            "R2",
            float(1 - (error[usable] ** 2).mean() / part["effects"][usable].var()),
            n,
        )
        report.add(
            "effects",
            task,
            ACBO,
            "coverage of 90 % bands",
            summarise(inside.sum((1, 2)) / usable.sum((1, 2))),
            n,
        )
        for name in (ACBO, *RULES):
            surface = part["mean"] if name == ACBO else part[name]
            report.add(
                "effects",
                task,
                name,
                "share of the improvement",
                summarise(share_of_improvement(surface, part)),
                n,
            )

    curve = {}
    for size in tqdm(config.transfer_sizes, desc="effects"):
        scores = report.effects(size, config.few_obs)
        everyone = np.ones(len(scores["target"]), bool)
        add(f"d={size}", scores, everyone)
        curve[size] = {
            name: summarise(share_of_improvement(scores["mean" if name == ACBO else name], scores))
            for name in (ACBO, *RULES)
        }
        if size == 8:
            children = scores["graph"][np.arange(len(everyone)), scores["target"]].any(1)
            best = scores["effects"].min(2).argmin(1)
            mixed = confounded(scores["graph"], scores["target"], best)
            for kind, rows in (
                ("best variable confounded", mixed),
                ("children", children),
                ("fourier", scores["mechanism"] == 1),
            ):
                add(f"d=8/{kind}", scores, rows)
                add(f"d=8/not {kind}", scores, ~rows)
    for index, scores in report.by_kind(
        score_effects,
        8,
        config.few_obs,
        SCMPrior(families=FAMILIES),
        "family",
        range(len(FAMILIES)),
    ).items():
        add(f"d=8/{FAMILIES[index]}", scores, np.ones(len(scores["target"]), bool))
    for name, prior in {"narrow": NARROW, "all families trained on": SCMPrior()}.items():
        scores = report.effects(8, config.few_obs, prior)
        add(f"d=8/{name}", scores, np.ones(len(scores["target"]), bool))
    draw_curve(
        config.folder / "effects.png",
        curve,
        "share of the possible improvement,\nfirst experiment",
        config.few_obs,
        report,
    )


def measure_transfer(report: Report) -> None:
    """Sizes, mechanisms and noise that training never showed; families are among those of
    `accuracy`.
    """
    config, curve = report.config, {}
    for size in tqdm(config.transfer_sizes, desc="transfer"):
        scores, tuning = report.parents(size, config.num_obs)
        truth, possible = scores["parents"], scores["possible"]
        curve[size] = {ACBO: parent_f1(scores[ACBO] > 0.5, truth, possible).pooled}
        curve[size] |= {
            name: parent_f1(
                scores[name] >= best_threshold(tuning[name], tuning["parents"], tuning["possible"]),
                truth,
                possible,
            ).pooled
            for name in STRUCTURE
        }
        for name, f1 in curve[size].items():
            report.add("transfer", f"d={size}", name, "pooled F1", f1, len(truth))
    draw_curve(config.folder / "transfer.png", curve, "parent F1", config.num_obs, report)
    new_mechanisms, new_noises = MECHANISMS[2:], NOISES[1:]
    shifts = {
        "mechanisms: ": (
            new_mechanisms,
            "mechanism",
            range(2, len(MECHANISMS)),
            replace(MIXED, mechanisms=new_mechanisms),
        ),
        "noise: ": (new_noises, "noise", range(1, len(NOISES)), replace(MIXED, noises=new_noises)),
    }
    for label, (names, kind, values, prior) in tqdm(shifts.items(), desc="shifts"):
        scores, tuning = (
            report.by_kind(score_parents, 8, config.num_obs, prior, kind, values, stream)
            for stream in (0, 1)
        )
        for name, value in zip(names, values, strict=True):
            measure_structure(
                report, "transfer", f"d=8/{label}{name}", scores[value], tuning[value]
            )
    measure_structure(
        report,
        "transfer",
        "d=8/not standardised",
        *report.parents(8, config.num_obs, replace(MIXED, standardised=False)),
    )


def measure_expert(report: Report) -> None:
    """The expert's posterior on the same data, and what one posterior costs."""
    config, settings = (
        report.config,
        ParentScaleConfig(num_obs=report.config.num_obs, num_steps=0, candidate_sets="union"),
    )
    for size in config.sizes:
        problems = report.problems(size, config.num_obs)
        expert = host(
            expert_beliefs(jr.split(jr.key(config.seed), config.num_problems), problems, settings)
        )
        scores = host(score_parents(report.model, problems))
        truth, possible, n = scores["parents"], scores["possible"], len(scores["parents"])
        task = f"d={size}/beside the expert"
        both = {
            ACBO: (scores[ACBO], scores["log_prob"]),
            "parent_scale": (expert["marginals"], expert["log_prob"]),
        }
        both = {
            name: (marginals, -np.maximum(log_prob, LEAST_LOG_PROB))
            for name, (marginals, log_prob) in both.items()
        }
        mean_f1 = {ACBO: scores["expected_f1"], "parent_scale": expert["expected_f1"]}
        f1 = {
            name: parent_f1(marginals > 0.5, truth, possible)
            for name, (marginals, _) in both.items()
        }
        for name, (marginals, nll) in both.items():
            report.add("surrogate", task, name, "pooled F1", f1[name].pooled, n)
            report.add("surrogate", task, name, "parent F1", f1[name].mean, n)
            report.add("surrogate", task, name, "expected F1", summarise(mean_f1[name]), n)
            report.add("surrogate", task, name, "set NLL", summarise(nll), n)
            report.add("surrogate", task, name, "AUROC", auroc(marginals, truth, possible), n)
        report.add(
            "surrogate",
            task,
            "difference",
            "expected F1",
            paired_difference(mean_f1[ACBO], mean_f1["parent_scale"]),
            n,
        )
        gain = paired_difference(f1[ACBO].per_problem, f1["parent_scale"].per_problem)
        report.add("surrogate", task, "difference", "parent F1", gain, n)
        report.add(
            "surrogate",
            task,
            "difference",
            "set NLL",
            paired_difference(both[ACBO][1], both["parent_scale"][1]),
            n,
        )
        one = jax.tree.map(lambda leaf: leaf[0], problems)
        slow = median_seconds(partial(infer, jr.key(0), one.scm, one.buffer, settings), 5)
        fast = median_seconds(partial(amortised, report.model, one.buffer, one.scm.task), 50)
        report.add("surrogate", task, ACBO, "ms per posterior", 1000 * fast, 1)
        report.add("surrogate", task, "parent_scale", "ms per posterior", 1000 * slow, 1)
        report.add("surrogate", task, "difference", "ms per posterior", slow / fast, 1, "ratio")


@eqx.filter_jit
def infer(
    key: jax.Array, scm: SyntheticSCM, buffer: ExperienceBuffer, settings: ParentScaleConfig
) -> jax.Array:
    """The expert's posterior from all rows of one buffer."""
    return replay_posterior(key, scm, buffer, buffer.size, settings)


@eqx.filter_jit
def amortised(model: ParentSetPredictionModel, buffer: ExperienceBuffer, task: Task) -> jax.Array:
    """The surrogate's posterior from one buffer."""
    return model.predict(buffer, task).posterior().log_probs


@eqx.filter_jit
def expert_beliefs(
    keys: jax.Array, problems: Problems, settings: ParentScaleConfig
) -> dict[str, jax.Array]:
    """Parent marginals of the expert, and its log-probability of the true set, -inf for a set that
    it does not consider.
    """

    def one(inputs):
        key, problem = inputs
        scm, buffer = problem.scm, problem.buffer
        log_probs = replay_posterior(key, scm, buffer, buffer.size, settings)[-1]
        sets, _ = prior_over_sets(
            jr.split(key, 3)[0], scm, buffer.values[: settings.num_obs], settings
        )
        posterior = ParentSetPosterior(scm.target, sets, log_probs)
        said = {"marginals": posterior.marginals(), "log_prob": posterior.log_prob(scm.parents)}
        return said | {"expected_f1": expected_f1(posterior, scm.parents)}

    return in_batches(one, (keys, problems))


def trained_prior(path: Path) -> SCMPrior:
    """What the weights were trained on."""
    stored = read_header(path)["config"]["prior"]
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    return SCMPrior(**settings)


# --- figures ---


def draw_reliability(path: Path, probability: np.ndarray, label: np.ndarray) -> None:
    """Share of parents against the probability that the surrogate gave, all sizes together, with 95
    % intervals of the shares.
    """
    figure, axis = plt.subplots(figsize=(4.2, 4.0), layout="constrained")
    index = np.minimum((probability * 10).astype(int), 9)
    for b in range(10):
        chosen = index == b
        if chosen.sum() >= 10:
            share, n = label[chosen].mean(), chosen.sum()
            half = 1.96 * np.sqrt(max(share * (1 - share), 1e-4) / n)
            axis.errorbar(
                probability[chosen].mean(),
                share,
                half,
                color="black",
                marker="o",
                markersize=5,
                capsize=3,
            )
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    axis.set(
        xlabel="probability that a variable is a parent",
        ylabel="share of parents",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curve(path: Path, curve: dict, label: str, num_obs: int, report: Report) -> None:
    """A figure of every method against the number of variables; the sizes that were trained on are
    shaded.
    """
    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    sizes = np.array(list(curve))
    prior = trained_prior(report.config.weights)
    axis.axvspan(prior.min_size, prior.max_size, color="grey", alpha=0.12, linewidth=0)
    for name in next(iter(curve.values())):
        value, low, high = np.array([curve[size][name] for size in sizes]).T
        colour = "black" if name == ACBO else None
        axis.errorbar(
            sizes,
            value,
            [value - low, high - value],
            label=name,
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
        )
    axis.set_xscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xticks([], minor=True)
    axis.set(
        xlabel="variables (shaded: trained on)",
        ylabel=label,
        ylim=(0, 1),
        title=f"{num_obs} observational rows, {report.config.per_variable} per variable",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


PARTS = {
    "accuracy": measure_accuracy,
    "effects": measure_effects,
    "transfer": measure_transfer,
    "expert": measure_expert,
}


def load(path: Path) -> ParentSetPredictionModel:
    """The surrogate of stage 2, or that of a whole system."""
    return (
        TrainedACBOSystem.load(path).surrogate
        if read_header(path)["stage"] == "acbo"
        else load_surrogate(path)[0]
    )


def main(config: Config) -> None:
    """Measure the parts that were asked for; print and write them."""
    unknown = [part for part in config.parts if part not in PARTS]
    if unknown:
        raise DataError(f"parts: unknown {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    use_compilation_cache(Path("artifacts/cache"))
    report = Report(config, load(config.weights))
    config.folder.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        PARTS[part](report)
        # after every part: a stopped run keeps what it has
        write_results(config.folder, report.records)
    for table in dict.fromkeys(record.table for record in report.records):
        print(f"\n## {table}\n\n{render(report.records, table)}")


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.cli(Config, description=__doc__))
