"""Stage 5: every table and figure, on held-out problems, paired across methods, scored by
noise-free E[Y | do].

- Reads   artifacts/<preset>/surrogate.eqx, policy.eqx, bc_policy.eqx (if something was cloned),
  curves.npz, acbo.eqx
- Writes  artifacts/<preset>/results/: metrics.json, one .md, .csv and .tex per table, figures as
  .png,
        raw/*.npz (per-problem results, so a stopped run goes on)
- Time    `small` about 8 minutes on 2 busy CPU cores.

    python 05_evaluate.py small --num-problems 1000

Protocol. Every method starts from the same data (`num_obs` observational rows and `per_variable`
interventions on each variable), experiments one row at a time, and after t experiments recommends
one action; the noise of experiment t is the same for all methods. Simple regret is E[Y |
do(recommended)] minus the optimum, as a share of E[Y] minus the optimum: 0 is optimal, 1 is doing
nothing. What each method recommends: random, the experiment with the best outcome; the regressions
and the learned methods, the minimum of their predicted surface; the expert's family, the minimum of
its Gaussian processes' means. The expert's family runs on fewer problems (its cost), the first of
the same list. Thresholds of the structure baselines are chosen on separate validation problems, to
their advantage.
"""

import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from tqdm import tqdm

from lib import baselines
from lib.artifacts import ArtifactError, fingerprint, load_arrays, read_header, save_arrays
from lib.benchmarks import make_benchmark
from lib.buffer import ExperienceBuffer
from lib.config import (
    check_settings,
    errors_for_people,
    preset_arguments,
    stage_key,
    use_compilation_cache,
)
from lib.grpo import CampaignDesign, Problem
from lib.methods import EXPERT_FAMILY, METHODS, held_out_problems, in_batches, play
from lib.metrics import (
    Estimate,
    Record,
    auroc,
    average_precision,
    best_threshold,
    convergence_ratio,
    expected_calibration_error,
    median_seconds,
    normalised_regret,
    paired_difference,
    parent_f1,
    render,
    summarise,
    write_results,
)
from lib.parent_scale import ParentScaleConfig, replay_posterior
from lib.scm import AbstractSCM, Intervention
from lib.scm_prior import SCMPrior, initial_buffer
from lib.surrogate import ParentSetPredictionModel
from lib.system import TrainedACBOSystem, load_policy, load_surrogate


@dataclass(frozen=True)
class Config:
    """Settings of stage 5."""

    folder: Path = Path("artifacts/small")
    """Where the artifacts are; results go to its subfolder `results`."""
    seed: int = 1_000_003
    """Seed of the held-out problems; unlike any training seed."""
    methods: tuple[str, ...] = METHODS
    """Who plays; parent_scale and acbo always must."""
    sizes: tuple[int, ...] = (5, 8)
    """Numbers of variables of the held-out problems."""
    transfer_size: int = 16
    """A size never trained on."""
    num_problems: int = 300
    """Held-out problems per size."""
    expert_problems: int = 100
    """How many of them the expert's family runs on."""
    num_obs: int = 50
    """Observational rows at the start."""
    per_variable: int = 2
    """Initial interventions per variable."""
    num_steps: int = 10
    """Experiments per campaign."""
    literature: tuple[str, ...] = ("toy", "epidemiology", "healthcare")
    """Benchmarks of the literature."""
    literature_obs: int = 200
    """Observational rows at the start, on these."""
    literature_seeds: int = 10
    """Repetitions of each benchmark."""
    literature_steps: int = 15
    """Experiments on each benchmark."""

    def __post_init__(self):
        check_settings(self)
        if min(*self.sizes, self.transfer_size) < 2:
            raise ValueError(
                f"sizes {self.sizes} and transfer_size = {self.transfer_size} must "
                "be at least 2: a target and something to set"
            )
        if set(self.methods) - set(METHODS) or not {"parent_scale", "acbo"} <= set(self.methods):
            raise ValueError(
                f"methods: {', '.join(self.methods)} must be of "
                f"{', '.join(METHODS)}, with parent_scale and acbo among them"
            )


PRESETS = {
    "smoke": (
        "seconds, for CI",
        Config(
            Path("artifacts/smoke"),
            # the same code as surrogate_ei
            methods=tuple(
                name for name in METHODS if name not in ("surrogate_greedy", "surrogate_thompson")
            ),
            num_problems=16,
            expert_problems=4,
            num_steps=2,
            literature=("toy",),
            literature_seeds=2,
            literature_steps=2,
            sizes=(5,),
            transfer_size=8,
        ),
    ),
    "small": ("about 8 minutes on 2 busy CPU cores", Config()),
    "hour": (
        "larger systems and more problems",
        Config(
            Path("artifacts/hour"),
            sizes=(5, 8, 12),
            transfer_size=24,
            num_problems=400,
            expert_problems=64,
        ),
    ),
    "paper": (
        "for one GPU",
        Config(
            Path("artifacts/paper"),
            sizes=(5, 10, 20),
            transfer_size=40,
            num_problems=1000,
            expert_problems=200,
            num_steps=30,
        ),
    ),
}

REGRET_STEPS = (1, 3, 5, 10)
STRUCTURE_BASELINES = ("all_ones", "absolute_correlation", "f_test")
# Best Y after 30 trials as published for CBO-U (mean over runs; an outcome there is the mean of
# 1,000 samples): result files of the original code.
PUBLISHED = {"toy": -1.925, "epidemiology": -1.397, "healthcare": 13.166}


# --- scores ---


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
        rivals = {
            name: getattr(baselines, name)(buffer, scm.target, scm.var_mask)
            for name in STRUCTURE_BASELINES
        }
        rest = {
            "log_prob": output.log_prob(scm.parents),
            "effect_mean": output.effect_mean,
            "effect_std": output.effect_std,
        }
        return (
            rivals
            | {
                "acbo": output.marginals(),
                "parents": scm.parents,
                "possible": scm.task.possible_parents,
            }
            | rest
        )

    return in_batches(one, problems)


# --- the run ---


class Evaluation:
    """Collects records; keeps per-problem results on disk, so that a stopped evaluation goes on
    where it was.
    """

    def __init__(self, config: Config, systems: dict[str, TrainedACBOSystem], inputs: list[Path]):
        self.config, self.systems, self.inputs = config, systems, inputs
        self.records: list[Record] = []
        self.mark = fingerprint(__file__, config, inputs)

    def add(
        self,
        table: str,
        task: str,
        method: str,
        metric: str,
        estimate: Estimate | float,
        n: int,
        unit: str = "",
    ) -> None:
        """One row of the results; a bare number is a single measurement and has no interval."""
        value, low, high = (
            estimate if isinstance(estimate, Estimate) else (estimate, -np.inf, np.inf)
        )
        self.records.append(Record(table, task, method, metric, value, low, high, n, unit))

    def play(
        self,
        name: str,
        keys: jax.Array,
        scms: AbstractSCM,
        buffers: ExperienceBuffer,
        num_obs: int,
        num_steps: int,
    ) -> dict[str, jax.Array]:
        """Results of `lib.methods.play`, with the system that `name` is about."""
        return play(
            name,
            self.systems.get(name, self.systems["acbo"]),
            keys,
            scms,
            buffers,
            num_obs=num_obs,
            num_steps=num_steps,
        )

    def stored(
        self, name: str, compute: Callable[[], dict[str, jax.Array]]
    ) -> dict[str, np.ndarray]:
        """`compute()`, unless the file of an earlier run with the same settings and inputs holds
        it.
        """
        path = self.config.folder / "results" / "raw" / f"{name}.npz"
        if path.exists() and read_header(path)["hyperparameters"].get("fingerprint") == self.mark:
            return load_arrays(path, "evaluation")[0]
        arrays = {key: np.asarray(value) for key, value in compute().items()}
        save_arrays(
            path,
            arrays,
            stage="evaluation",
            config=asdict(self.config),
            hyperparameters={"fingerprint": self.mark},
            seed=self.config.seed,
            step=0,
            parents=self.inputs,
            metrics={},
        )
        return arrays


def held_out(
    config: Config, size: int, bucket: int, num_bins: int, count: int, key: jax.Array
) -> tuple[Problem, np.ndarray]:
    """Problems of one size in their bucket, and their optima."""
    prior = SCMPrior(max_vars=bucket, min_size=size, max_size=size)
    campaign = CampaignDesign(config.num_obs, config.num_obs, config.per_variable, config.num_steps)
    problems, optima = held_out_problems(key, count, prior, campaign, num_bins)
    return problems, np.asarray(optima)


def evaluate_optimisation(
    evaluation: Evaluation, size: int, problems: Problem, optima: np.ndarray
) -> np.ndarray:
    """Simple regret of every method, and paired differences to the deployed system; returns the
    expert's parent marginals before any experiment `[batch, vars]`.
    """
    config, task = evaluation.config, f"d={size}"
    keys = jr.split(stage_key(config.seed, "evaluation", "play", task), config.num_problems)
    baseline = np.asarray(problems.truth.baseline)
    regret, marginals = {}, np.zeros(0)
    methods = [name for name in config.methods if name != "bc_policy" or name in evaluation.systems]
    for name in tqdm(methods, desc=f"methods, {task}"):
        count = (
            min(config.expert_problems, config.num_problems)
            if name in EXPERT_FAMILY
            else config.num_problems
        )
        part = jax.tree.map(lambda leaf, n=count: leaf[:n], (keys, problems.scm, problems.buffer))
        result = evaluation.stored(
            f"{name}_d{size}",
            partial(evaluation.play, name, *part, config.num_obs, config.num_steps),
        )
        regret[name] = normalised_regret(
            result["recommended"], optima[:count, None], baseline[:count, None]
        )
        if name == "parent_scale":
            marginals = result["marginals"]
    steps = [s for s in REGRET_STEPS if s <= config.num_steps]
    mechanism = np.asarray(problems.scm.mechanism)
    for kind, rows in (
        ("", mechanism >= 0),
        ("/linear", mechanism == 0),
        ("/fourier", mechanism == 1),
    ):
        for name, values in regret.items():
            chosen = values[rows[: len(values)]]
            for step in steps:
                evaluation.add(
                    "optimisation",
                    task + kind,
                    name,
                    f"regret@{step}",
                    summarise(chosen[:, step]),
                    len(chosen),
                )
    for name, values in regret.items():
        for step in steps:
            if name != "acbo":
                more = paired_difference(values[:, step], regret["acbo"][: len(values), step])
                evaluation.add(
                    "optimisation",
                    f"{task}/regret above acbo's, paired",
                    name,
                    f"regret@{step}",
                    more,
                    len(values),
                )
    final = regret["acbo"][:, -1]
    evaluation.add(
        "success",
        task,
        "acbo",
        "stability",
        summarise((final < 1.0).astype(float)),
        len(final),
        "share of problems better than doing nothing",
    )
    draw_regret(regret, config, size)
    return marginals


def evaluate_surrogate_accuracy(
    evaluation: Evaluation, size: int, problems: Problem, validation: Problem
) -> dict[str, np.ndarray]:
    """Parent accuracy of the surrogate against baselines whose thresholds are chosen on validation
    problems; effects and calibration.

    Returns the scores of `structure_scores`.
    """
    task, surrogate = f"d={size}", evaluation.systems["acbo"].surrogate
    scores = evaluation.stored(f"structure_d{size}", lambda: structure_scores(surrogate, problems))
    tuning = evaluation.stored(
        f"structure_validation_d{size}", lambda: structure_scores(surrogate, validation)
    )
    truth, possible = scores["parents"], scores["possible"]
    n = len(truth)
    said = {
        name: scores[name] >= best_threshold(tuning[name], tuning["parents"], tuning["possible"])
        for name in STRUCTURE_BASELINES
    }
    said["acbo"] = scores["acbo"] > 0.5
    ours = parent_f1(said["acbo"], truth, possible)
    for name, guess in said.items():
        f1 = parent_f1(guess, truth, possible)
        evaluation.add("surrogate", task, name, "parent F1", f1.mean, n)
        evaluation.add("surrogate", task, name, "pooled F1", f1.pooled, n)
        evaluation.add("surrogate", task, name, "AUROC", auroc(scores[name], truth, possible), n)
        evaluation.add(
            "surrogate", task, name, "AUPRC", average_precision(scores[name], truth, possible), n
        )
        if name != "acbo":
            evaluation.add(
                "surrogate",
                task,
                name,
                "F1 below acbo's, paired",
                paired_difference(ours.per_problem, f1.per_problem),
                n,
            )
    effects = np.asarray(problems.truth.effects)
    usable, error = np.isfinite(effects), effects - scores["effect_mean"]
    inside = (np.abs(error) < 1.645 * scores["effect_std"]) & usable
    task = f"{task}/beliefs and effects"
    evaluation.add(
        "surrogate",
        task,
        "acbo",
        "exact set",
        summarise((said["acbo"] == truth).all(1).astype(float)),
        n,
    )
    evaluation.add("surrogate", task, "acbo", "set NLL (nats)", summarise(-scores["log_prob"]), n)
    evaluation.add(
        "surrogate",
        task,
        "acbo",
        "ECE",
        expected_calibration_error(scores["acbo"], truth, possible),
        n,
    )
    evaluation.add(
        "surrogate",
        task,
        "acbo",
        "effect R2",
        float(1 - (error[usable] ** 2).mean() / effects[usable].var()),
        n,
    )
    evaluation.add(
        "surrogate",
        task,
        "acbo",
        "coverage of 90 % bands",
        summarise(inside.sum((1, 2)) / usable.sum((1, 2))),
        n,
    )
    return scores


def evaluate_success(
    evaluation: Evaluation,
    size: int,
    problems: Problem,
    scores: dict[str, np.ndarray],
    expert_marginals: np.ndarray,
    transfer: tuple[float, float],
) -> None:
    """The criteria of phase4_training_infrastructure.md. `transfer` is the parent F1 at the largest
    trained and at the transfer size.
    """
    config, surrogate, task = evaluation.config, evaluation.systems["acbo"].surrogate, f"d={size}"
    count = len(expert_marginals)
    truth, possible = scores["parents"][:count], scores["possible"][:count]
    ours, theirs = (
        parent_f1(marginals[:count] > 0.5, truth, possible)
        for marginals in (scores["acbo"], expert_marginals)
    )
    drop = float(1 - ours.mean.value / max(theirs.mean.value, 1e-9))
    evaluation.add(
        "success",
        task,
        "acbo",
        "accuracy_drop",
        drop,
        count,
        "share of the expert's parent F1 lost; negative: better than the expert",
    )
    evaluation.add(
        "surrogate", f"{task}/expert's problems", "parent_scale", "parent F1", theirs.mean, count
    )
    evaluation.add("surrogate", f"{task}/expert's problems", "acbo", "parent F1", ours.mean, count)

    # speed: one posterior for one problem, after compilation, on this machine
    one = jax.tree.map(
        lambda leaf: leaf[0], (jr.split(jr.key(0), 1), problems.scm, problems.buffer)
    )
    settings = ParentScaleConfig(num_obs=config.num_obs, num_steps=0, candidate_sets="union")
    infer = eqx.filter_jit(lambda k, s, b: replay_posterior(k, s, b, b.size, settings))
    predict = eqx.filter_jit(lambda model, s, b: model.predict(b, s.task).posterior().log_probs)
    slow, fast = (
        median_seconds(lambda: infer(*one), 3),
        median_seconds(lambda: predict(surrogate, *one[1:]), 20),
    )
    evaluation.add(
        "success",
        task,
        "acbo",
        "speedup",
        slow / fast,
        1,
        "our expert's seconds per posterior over the surrogate's",
    )
    evaluation.add(
        "success",
        task,
        "acbo",
        "surrogate_latency",
        1000 * fast,
        20,
        "ms per posterior, one problem",
    )

    if "bc_policy" in evaluation.systems:
        header = read_header(config.folder / "bc_policy.eqx")["metrics"]
        demos, clone = int(header["validation_states"]), ("success", "demos", "bc_policy")
        evaluation.add(
            *clone,
            "expert_agreement",
            header["variable_agreement"],
            demos,
            "share of held-out expert steps, variable",
        )
        evaluation.add(
            *clone,
            "expert_value_agreement",
            header["value_agreement"],
            demos,
            "of these, value within 10 % of the range",
        )
    curves, _ = load_arrays(config.folder / "curves.npz", "curves")
    if len(curves["validation"]) == 2:
        ratio = convergence_ratio(curves["validation"].mean(-1))
        evaluation.add(
            "success",
            "training",
            "grpo_policy",
            "convergence_ratio",
            ratio,
            1,
            "warm iterations / cold iterations",
        )
    lost = float(1 - transfer[1] / max(transfer[0], 1e-9))
    evaluation.add(
        "success",
        f"d={config.transfer_size}",
        "acbo",
        "transfer_drop",
        lost,
        config.num_problems,
        f"share of parent F1 lost against {task}",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    evaluation.add("success", "evaluation", "acbo", "peak_memory", peak, 1, "MiB")


def evaluate_literature(evaluation: Evaluation, bucket: int) -> None:
    """Benchmarks of the literature: E[Y | do] of the recommended action after `literature_steps`
    experiments.
    """
    config = evaluation.config
    capacity = config.literature_obs + config.per_variable * bucket + config.literature_steps
    data_keys, keys = (
        jr.split(stage_key(config.seed, "evaluation", "literature", use), config.literature_seeds)
        for use in ("data", "play")
    )
    runs = [
        (benchmark, name)
        for benchmark in config.literature
        for name in ("random", "additive_ridge", "parent_scale", "acbo")
    ]
    for benchmark, name in tqdm(runs, desc="literature"):
        scm = make_benchmark(benchmark, bucket)
        first = partial(
            initial_buffer,
            scm=scm,
            num_obs=config.literature_obs,
            per_variable=config.per_variable,
            capacity=capacity,
        )
        buffers = eqx.filter_jit(eqx.filter_vmap(first))(data_keys)
        scms = jax.tree.map(
            lambda leaf: (
                jnp.broadcast_to(leaf, (len(keys), *leaf.shape)) if eqx.is_array(leaf) else leaf
            ),
            scm,
        )
        if name == "random":
            evaluation.add(
                "literature", benchmark, "optimum", "E[Y | do]", float(scm.optimum().mean), 1
            )
            evaluation.add(
                "literature",
                benchmark,
                "doing nothing",
                "E[Y | do]",
                float(scm.mean_outcome(Intervention.none(bucket))),
                1,
            )
            evaluation.add(
                "literature",
                benchmark,
                "CBO-U as published (best of 30 trials)",
                "E[Y | do]",
                PUBLISHED[benchmark],
                10,
            )
        play = partial(
            evaluation.play,
            name,
            keys,
            scms,
            buffers,
            config.literature_obs,
            config.literature_steps,
        )
        result = evaluation.stored(f"{name}_{benchmark}", play)
        evaluation.add(
            "literature",
            benchmark,
            name,
            "E[Y | do]",
            summarise(result["recommended"][:, -1]),
            len(keys),
        )


def draw_regret(regret: dict[str, np.ndarray], config: Config, size: int) -> None:
    """Mean simple regret against experiments, with 95 % bands for the deployed system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    colours = dict(zip(regret, matplotlib.color_sequences["tab20"], strict=False)) | {
        "acbo": "black"
    }
    for name, values in regret.items():
        steps, mean, ours = np.arange(values.shape[1]), values.mean(0), name == "acbo"
        axes.plot(
            steps,
            mean,
            label=f"{name} (n={len(values)})",
            color=colours[name],
            linewidth=2.5 if ours else 1.3,
            zorder=3 if ours else 2,
        )
        if ours:
            half = 1.96 * values.std(0) / np.sqrt(len(values))
            axes.fill_between(steps, mean - half, mean + half, color=colours[name], alpha=0.15)
    axes.set(
        xlabel="experiments",
        ylabel="simple regret (share of the possible improvement)",
        title=f"{size} variables",
        ylim=(0, None),
    )
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(config.folder / "results" / f"regret_d{size}.png", dpi=150)
    plt.close(figure)


def main(config: Config) -> Path:
    """Run every comparison, print and write the tables; returns the results folder."""
    use_compilation_cache(config.folder.parent / "cache")
    results, policy_path = config.folder / "results", config.folder / "policy.eqx"
    cloned = read_header(policy_path)["config"]["imitation"]["use_behavioral_cloning"]
    names = ("surrogate.eqx", "policy.eqx", *["bc_policy.eqx"] * cloned, "curves.npz", "acbo.eqx")
    inputs = [config.folder / name for name in names]
    for path in inputs:
        if not path.exists():
            raise ArtifactError(path, "missing")
    before = load_surrogate(config.folder / "surrogate.eqx")[0]
    systems = {
        "grpo_policy": TrainedACBOSystem(before, load_policy(policy_path)[0]),
        "acbo": TrainedACBOSystem.load(config.folder / "acbo.eqx"),
    }
    if cloned:
        systems["bc_policy"] = TrainedACBOSystem(
            before, load_policy(config.folder / "bc_policy.eqx")[0]
        )
    evaluation = Evaluation(config, systems, inputs)
    bucket = read_header(config.folder / "surrogate.eqx")["config"]["prior"]["max_vars"]
    num_bins = before.config.num_bins
    results.mkdir(parents=True, exist_ok=True)
    f1, played = {}, {}
    for size in (*config.sizes, config.transfer_size):
        problem_key, validation_key = (
            stage_key(config.seed, "evaluation", use, f"d={size}")
            for use in ("problems", "validation")
        )
        slots = max(bucket, size)
        problems, optima = held_out(config, size, slots, num_bins, config.num_problems, problem_key)
        validation, _ = held_out(config, size, slots, num_bins, config.num_problems, validation_key)
        scores = evaluate_surrogate_accuracy(evaluation, size, problems, validation)
        f1[size] = next(
            r.value
            for r in evaluation.records
            if (r.task, r.method, r.metric) == (f"d={size}", "acbo", "parent F1")
        )
        if size != config.transfer_size:
            played[size] = (
                problems,
                scores,
                evaluate_optimisation(evaluation, size, problems, optima),
            )
    largest = max(config.sizes)
    evaluate_success(
        evaluation, largest, *played[largest], transfer=(f1[largest], f1[config.transfer_size])
    )
    evaluate_literature(evaluation, bucket)
    write_results(results, evaluation.records)
    for table in ("success", "surrogate", "optimisation", "literature"):
        print(f"\n## {table}\n\n{render(evaluation.records, table)}")
    print(f"\nwritten to {results}")
    return results


if __name__ == "__main__":
    with errors_for_people():
        main(
            tyro.extras.overridable_config_cli(
                PRESETS, args=preset_arguments(sys.argv[1:]), description=__doc__
            )
        )
