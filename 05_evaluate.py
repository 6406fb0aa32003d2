"""Stage 5: every table and figure, on held-out problems, paired across methods, scored by noise-free E[Y | do].

Reads   artifacts/<preset>/demos.npz, surrogate.eqx, policy.eqx, bc_policy.eqx, curves.npz, acbo.eqx
Writes  artifacts/<preset>/results/: metrics.json, one .md, .csv and .tex per table, figures as .png, raw/*.npz (per-problem results, so a stopped run goes on)
Time    `small` about 3 minutes on 2 CPU cores.

    python 05_evaluate.py small --num-problems 300

Protocol. Every method starts from the same data (`num_obs` observational rows and `per_variable` interventions on each variable), experiments one row at a time,
and after t experiments recommends one action; the noise of experiment t is the same for all methods. Simple regret is E[Y | do(recommended)] minus the optimum, as a
share of E[Y] minus the optimum: 0 is optimal, 1 is doing nothing. What each method recommends: random, the experiment with the best outcome; the regressions and the
learned methods, the minimum of their predicted surface; the expert's family, the minimum of its Gaussian processes' means. The expert's family runs on fewer problems
(its cost), the first of the same list. Thresholds of the structure baselines are chosen on separate validation problems, to their advantage.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from lib.benchmarks import make_benchmark
from lib.metrics import Record, auroc, best_threshold, expected_calibration_error, pooled_f1, pooled_f1_interval, render, summarise, write_results
from tqdm import tqdm

from lib import baselines
from lib.artifacts import ArtifactError, fingerprint, load_arrays, read_header, save_arrays
from lib.config import errors_for_people, preset_arguments, use_compilation_cache
from lib.grpo import CampaignDesign, Problem, draw_problem
from lib.parent_scale import ParentScaleConfig, run_gp_ei, run_parent_scale
from lib.policy import AcquisitionPolicyNetwork
from lib.scm import AbstractSCM, Intervention
from lib.scm_prior import SCMPrior, initial_buffer
from lib.surrogate import ParentSetPredictionModel
from lib.system import TrainedACBOSystem, load_policy, load_surrogate, run_campaign


@dataclass(frozen=True)
class Config:
    """Settings of stage 5."""

    folder: Path = Path("artifacts/small")
    """Where the artifacts are; results go to its subfolder `results`."""
    seed: int = 1_000_003
    """Seed of the held-out problems; unlike any training seed."""
    sizes: tuple[int, ...] = (5, 8)
    """Numbers of variables of the held-out problems."""
    transfer_size: int = 16
    """A size never trained on."""
    num_problems: int = 150
    """Held-out problems per size."""
    expert_problems: int = 32
    """How many of them the expert's family runs on."""
    num_obs: int = 50
    """Observational rows at the start."""
    per_variable: int = 2
    """Initial interventions per variable."""
    num_steps: int = 10
    """Experiments per campaign."""
    literature_seeds: int = 10
    """Repetitions of each benchmark."""
    literature_steps: int = 15
    """Experiments on each benchmark."""


PRESETS = {
    "smoke": (
        "seconds, for CI",
        Config(Path("artifacts/smoke"), num_problems=16, expert_problems=4, num_steps=2, literature_seeds=2, literature_steps=2, sizes=(5,), transfer_size=10),
    ),
    "small": ("about 3 minutes on 2 CPU cores", Config()),
    "hour": ("larger systems and more problems", Config(Path("artifacts/hour"), sizes=(5, 8, 12), transfer_size=24, num_problems=400, expert_problems=64)),
    "paper": ("for one GPU", Config(Path("artifacts/paper"), sizes=(5, 10, 20), transfer_size=40, num_problems=1000, expert_problems=200, num_steps=30)),
}

REGRET_STEPS = (1, 3, 5, 10)
EXPERT_FAMILY = ("parent_scale", "parent_scale_amortized", "cbo_known_graph", "bo")
# Best Y after 30 trials as published for CBO-U (mean over runs; an outcome there is the mean of 1,000 samples). Source: result files of the original code.
PUBLISHED = {"toy": -1.925, "epidemiology": -1.397, "healthcare": 13.166}


# --- methods: (key, scm, buffer) -> recommended variables and values [steps + 1] ---


class Models(eqx.Module):
    """Everything trained: the end-to-end system, and what it was before stage 4."""

    acbo: TrainedACBOSystem
    surrogate: ParentSetPredictionModel
    bc_policy: AcquisitionPolicyNetwork
    grpo_policy: AcquisitionPolicyNetwork


def make_method(name: str, models: Models, config: Config, num_steps: int) -> Callable:
    """The method called `name` as a function of (key, scm, buffer)."""
    expert = ParentScaleConfig(num_obs=config.num_obs, num_steps=num_steps)

    def campaign(decide):
        return lambda key, scm, buffer: run_campaign(key, scm, buffer, num_steps, lambda k, b, t: decide(scm, k, b, t))

    def regression(choose):
        def decide(scm, key, buffer, step):
            choice = choose(buffer, scm.target, scm.low, scm.high, scm.candidates)
            return choice, choice

        return campaign(decide)

    def random(scm, key, buffer, step):
        outcome = jnp.take(buffer.values, scm.target, axis=1)
        best = jnp.argmin(jnp.where((buffer.intervened & scm.candidates[None]).any(1) & buffer.valid, outcome, jnp.inf))
        variable = jnp.argmax(buffer.intervened[best])
        return baselines.random_choice(key, scm.low, scm.high, scm.candidates), (variable, buffer.values[best, variable])

    def greedy(scm, key, buffer, step):
        choice = models.acbo.surrogate.predict(buffer, scm.task).best()
        return choice, choice

    def amortized(key, scm, buffer):
        first = models.acbo.surrogate.predict(buffer, scm.task).posterior().top_k(16)

        def believe(buffer):
            output = models.acbo.surrogate.predict(buffer, scm.task)
            return jax.nn.log_softmax(jax.vmap(output.log_prob)(first.sets))

        return run_parent_scale(key, scm, buffer, expert, candidate_sets=(first.sets, jax.nn.log_softmax(first.log_probs)), predict=believe)

    def known_graph(key, scm, buffer):
        return run_parent_scale(key, scm, buffer, expert, candidate_sets=(scm.parents[None], jnp.zeros(1)))

    methods = {
        "random": campaign(random),
        "least_squares": regression(baselines.least_squares),
        "additive_ridge": regression(baselines.additive_ridge),
        "bo": lambda key, scm, buffer: run_gp_ei(key, scm, buffer, expert),
        "cbo_known_graph": known_graph,
        "parent_scale": lambda key, scm, buffer: run_parent_scale(key, scm, buffer, expert),
        "parent_scale_amortized": amortized,
        "surrogate_greedy": campaign(greedy),
        "bc_policy": lambda key, scm, buffer: TrainedACBOSystem(models.surrogate, models.bc_policy).play(key, scm, buffer, num_steps),
        "grpo_policy": lambda key, scm, buffer: TrainedACBOSystem(models.surrogate, models.grpo_policy).play(key, scm, buffer, num_steps),
        "acbo": lambda key, scm, buffer: models.acbo.play(key, scm, buffer, num_steps),
    }
    if name not in methods:
        raise ValueError(f"unknown method '{name}': choose from {', '.join(methods)}")
    return methods[name]


METHODS = (
    "random",
    "least_squares",
    "additive_ridge",
    "bo",
    "cbo_known_graph",
    "parent_scale",
    "parent_scale_amortized",
    "surrogate_greedy",
    "bc_policy",
    "grpo_policy",
    "acbo",
)


@eqx.filter_jit
def run_method(name: str, models: Models, keys: jax.Array, scms: AbstractSCM, buffers, config: Config, num_steps: int) -> dict[str, jax.Array]:
    """Play `name` on a batch of problems: noise-free E[Y | do(recommended)] `[batch, steps + 1]`, and, for the expert, its final marginals."""
    method = make_method(name, models, config, num_steps)

    def one(inputs):
        key, scm, buffer = inputs
        run = method(key, scm, buffer)
        num_vars = scm.var_mask.shape[0]
        means = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, num_vars)))(run.recommended_variable, run.recommended_value)
        marginals = run.posterior(scm.target, 0).marginals() if name == "parent_scale" else jnp.zeros(num_vars)
        return {"recommended": means, "marginals": marginals}

    return jax.lax.map(one, (keys, scms, buffers), batch_size=16)


@eqx.filter_jit
def draw_problems(key: jax.Array, count: int, prior: SCMPrior, campaign: CampaignDesign, num_bins: int) -> tuple[Problem, jax.Array]:
    """Held-out problems and the optimum of each."""

    def one(key):
        problem = draw_problem(key, prior, campaign, num_bins)
        return problem, problem.scm.optimum().mean

    return jax.lax.map(one, jr.split(key, count), batch_size=32)


@eqx.filter_jit
def structure_scores(surrogate: ParentSetPredictionModel, problems: Problem) -> dict[str, jax.Array]:
    """Parent scores `[batch, vars]` of the surrogate and of every structure baseline; log-probability of the true set; effects and their deviation."""

    def one(problem):
        scm, buffer = problem.scm, problem.buffer
        output = surrogate.predict(buffer, scm.task)
        rivals = {name: getattr(baselines, name)(buffer, scm.target, scm.var_mask) for name in ("all_ones", "absolute_correlation")}
        rivals["f_test"] = -baselines.f_test_log_p(buffer, scm.target, scm.var_mask)
        rest = {"log_prob": output.log_prob(scm.parents), "effect_mean": output.effect_mean, "effect_std": output.effect_std}
        return rivals | {"acbo": output.marginals(), "parents": scm.parents, "possible": scm.task.possible_parents} | rest

    return jax.lax.map(one, problems, batch_size=32)


# --- the run ---


class Evaluation:
    """Collects records; keeps per-problem results on disk, so that a stopped evaluation goes on where it was."""

    def __init__(self, config: Config, models: Models, inputs: list[Path]):
        self.config, self.models, self.inputs = config, models, inputs
        self.records: list[Record] = []
        self.mark = fingerprint(config, inputs)

    def add(self, table: str, task: str, method: str, metric: str, interval: tuple[float, float, float], n: int, unit: str = "") -> None:
        """One row of the results."""
        value, low, high = (float(x) for x in interval)
        self.records.append(Record(table, task, method, metric, value, low, high, n, unit))

    def single(self, table: str, task: str, method: str, metric: str, value: float, n: int, unit: str = "") -> None:
        """A row without an interval: one measurement."""
        self.add(table, task, method, metric, (value, value, value), n, unit)

    def stored(self, name: str, compute: Callable[[], dict[str, jax.Array]]) -> dict[str, np.ndarray]:
        """`compute()`, unless the file of an earlier run with the same settings and inputs holds it."""
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


def held_out(config: Config, size: int, bucket: int, num_bins: int, count: int, key: jax.Array) -> tuple[Problem, np.ndarray]:
    """Problems of one size in their bucket, and their optima."""
    prior = SCMPrior(max_vars=bucket, min_size=size, max_size=size)
    campaign = CampaignDesign(config.num_obs, config.num_obs, config.per_variable, config.num_steps)
    problems, optima = draw_problems(key, count, prior, campaign, num_bins)
    return problems, np.asarray(optima)


def evaluate_optimisation(evaluation: Evaluation, size: int, problems: Problem, optima: np.ndarray) -> None:
    """Simple regret of every method, and paired differences to the deployed system."""
    config, task = evaluation.config, f"d={size}"
    keys = jr.split(jr.fold_in(jr.key(config.seed), size), config.num_problems)
    baseline = np.asarray(problems.truth.baseline)
    regret = {}
    for name in tqdm(METHODS, desc=f"methods, {task}"):
        count = min(config.expert_problems, config.num_problems) if name in EXPERT_FAMILY else config.num_problems
        part = jax.tree.map(lambda leaf: leaf[:count], (keys, problems.scm, problems.buffer))
        result = evaluation.stored(f"{name}_d{size}", lambda: run_method(name, evaluation.models, *part, config, config.num_steps))
        regret[name] = (result["recommended"] - optima[:count, None]) / (baseline - optima)[:count, None]
    nonlinear = np.asarray(problems.scm.nonlinear)
    for name, values in regret.items():
        for step in (s for s in REGRET_STEPS if s <= config.num_steps):
            evaluation.add("optimisation", task, name, f"regret@{step}", summarise(values[:, step]), len(values), "share")
            ours = regret["acbo"][: len(values)]
            if name != "acbo":
                interval = summarise(values[:, step] - ours[:, step])
                evaluation.add("optimisation_difference", task, name, f"regret@{step} minus acbo", interval, len(values), "share")
            for kind, rows in (("linear", ~nonlinear), ("fourier", nonlinear)):
                chosen = values[rows[: len(values)], step]
                evaluation.add("optimisation_by_mechanism", f"{task}/{kind}", name, f"regret@{step}", summarise(chosen), len(chosen), "share")
    final = regret["acbo"][:, -1]
    evaluation.add("success", task, "acbo", "stability", summarise((final < 1.0).astype(float)), len(final), "share of problems better than doing nothing")
    draw_regret(regret, config, size)


def evaluate_structure(evaluation: Evaluation, size: int, problems: Problem, validation: Problem) -> None:
    """Parent accuracy of the surrogate against baselines whose thresholds are chosen on validation problems; effects and calibration."""
    task, surrogate = f"d={size}", evaluation.models.acbo.surrogate
    scores = evaluation.stored(f"structure_d{size}", lambda: structure_scores(surrogate, problems))
    tuning = evaluation.stored(f"structure_validation_d{size}", lambda: structure_scores(surrogate, validation))
    truth, possible = scores["parents"], scores["possible"]
    said = {"acbo": scores["acbo"] > 0.5}
    for name in ("all_ones", "absolute_correlation", "f_test"):
        said[name] = scores[name] >= best_threshold(tuning[name], tuning["parents"], tuning["possible"])
    for name, guess in said.items():
        evaluation.add("surrogate", task, name, "parent F1", pooled_f1_interval(guess, truth, possible), len(truth))
        evaluation.single("surrogate", task, name, "AUROC", auroc(scores[name], truth, possible), len(truth))
        if name != "acbo":
            gain = pooled_f1_interval(said["acbo"], truth, possible, guess)
            evaluation.add("surrogate", task, name, "F1 gain of acbo", gain, len(truth))
    evaluation.add("surrogate", task, "acbo", "set NLL (nats)", summarise(-scores["log_prob"]), len(truth))
    evaluation.single("surrogate", task, "acbo", "ECE", expected_calibration_error(scores["acbo"][possible], truth[possible]), len(truth))
    effects = np.asarray(problems.truth.effects)
    usable, error = np.isfinite(effects), effects - scores["effect_mean"]
    evaluation.single("surrogate", task, "acbo", "effect R2", 1 - (error[usable] ** 2).mean() / effects[usable].var(), len(truth))
    inside = (np.abs(error) < 1.645 * scores["effect_std"]) & usable
    evaluation.add("surrogate", task, "acbo", "coverage of 90 % bands", summarise(inside.sum((1, 2)) / usable.sum((1, 2))), len(truth))


def evaluate_success(evaluation: Evaluation, size: int, problems: Problem, optima: np.ndarray, transfer: tuple[float, float]) -> None:
    """The criteria of phase4_training_infrastructure.md."""
    config, models, task = evaluation.config, evaluation.models, f"d={size}"
    count = min(config.expert_problems, config.num_problems)
    scores = evaluation.stored(f"structure_d{size}", lambda: structure_scores(models.acbo.surrogate, problems))
    expert = evaluation.stored(f"parent_scale_d{size}", lambda: {})
    truth, possible = scores["parents"][:count], scores["possible"][:count]
    ours, theirs = scores["acbo"][:count] > 0.5, expert["marginals"] > 0.5
    f1 = {"acbo": pooled_f1(ours, truth, possible), "parent_scale": pooled_f1(theirs, truth, possible)}
    drop = 1 - f1["acbo"] / max(f1["parent_scale"], 1e-9)
    evaluation.single("success", task, "acbo", "accuracy_drop", drop, count, "relative F1 lost against the expert; negative: better")
    evaluation.add("surrogate", task, "parent_scale", "parent F1", pooled_f1_interval(theirs, truth, possible), count)

    # speed: one posterior for one problem, after compilation, on this machine
    one = jax.tree.map(lambda leaf: leaf[0], (jr.split(jr.key(0), 1), problems.scm, problems.buffer))
    settings = ParentScaleConfig(num_obs=config.num_obs, num_steps=1)
    infer = eqx.filter_jit(lambda k, s, b: run_parent_scale(k, s, b, settings).log_probs)
    predict = eqx.filter_jit(lambda model, s, b: model.predict(b, s.task).posterior().log_probs)
    slow, fast = median_seconds(lambda: infer(*one), 3), median_seconds(lambda: predict(models.acbo.surrogate, *one[1:]), 20)
    evaluation.single("success", task, "acbo", "speedup", slow / fast, 1, "expert's seconds per posterior (and one decision) over the surrogate's")
    evaluation.single("success", task, "acbo", "surrogate_latency", 1000 * fast, 20, "ms per posterior, one problem")

    agreement = read_header(config.folder / "bc_policy.eqx")["metrics"]
    evaluation.single("success", "demos", "bc_policy", "expert_agreement", agreement["variable_agreement"], 0, "share of held-out expert steps, variable")
    evaluation.single("success", "demos", "bc_policy", "expert_value_agreement", agreement["value_agreement"], 0, "of these, value within 10 % of the range")
    curves, _ = load_arrays(config.folder / "curves.npz", "curves")
    evaluation.single("success", "training", "grpo_policy", "convergence_ratio", convergence_ratio(curves["reward"]), 1, "warm iterations / cold iterations")
    evaluation.single("success", f"d={config.transfer_size}", "acbo", "transfer_drop", 1 - transfer[1] / transfer[0], config.num_problems, "relative F1 lost")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    evaluation.single("success", "evaluation", "acbo", "peak_memory", peak, 1, "MiB")


def median_seconds(call: Callable[[], jax.Array], repeats: int) -> float:
    """Median wall-clock seconds of a call, the first (compiling) one left out."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def convergence_ratio(reward: np.ndarray, window: int = 10) -> float:
    """Iterations the warm start needs to reach the reward that the cold start ends with (moving averages), over all iterations; infinite if it never does."""
    window = min(window, reward.shape[1])
    smooth = np.stack([np.convolve(r, np.ones(window) / window, "valid") for r in reward])
    reached = np.flatnonzero(smooth[0] >= smooth[1, -1])
    return float((reached[0] + 1) / smooth.shape[1]) if len(reached) else float("inf")


def evaluate_literature(evaluation: Evaluation, bucket: int) -> None:
    """Benchmarks of the literature: E[Y | do] of the recommended action after `literature_steps` experiments."""
    config = evaluation.config
    campaign = CampaignDesign(config.num_obs, config.num_obs, config.per_variable, config.literature_steps)
    for benchmark in ("toy", "epidemiology", "healthcare"):
        scm = make_benchmark(benchmark, bucket)
        capacity = campaign.max_obs + campaign.per_variable * bucket + campaign.num_steps
        keys = jr.split(jr.fold_in(jr.key(config.seed), 7), config.literature_seeds)
        buffers = eqx.filter_jit(jax.vmap(lambda k: initial_buffer(k, scm, campaign.max_obs, campaign.per_variable, capacity)))(keys)
        scms = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(keys), *leaf.shape)) if eqx.is_array(leaf) else leaf, scm)
        best = float(scm.optimum().mean)
        evaluation.single("literature", benchmark, "optimum", "E[Y | do]", best, 1)
        evaluation.single("literature", benchmark, "nothing", "E[Y | do]", float(scm.mean_outcome(Intervention.none(bucket))), 1)
        evaluation.single("literature", benchmark, "CBO-U (published best noisy Y, 30 trials)", "E[Y | do]", PUBLISHED[benchmark], 10)
        for name in ("random", "additive_ridge", "parent_scale", "acbo"):
            result = evaluation.stored(
                f"{name}_{benchmark}", lambda: run_method(name, evaluation.models, keys, scms, buffers, config, config.literature_steps)
            )
            evaluation.add("literature", benchmark, name, "E[Y | do]", summarise(result["recommended"][:, -1]), len(keys))


def draw_regret(regret: dict[str, np.ndarray], config: Config, size: int) -> None:
    """Mean simple regret against experiments, with 95 % bands for the deployed system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, values in regret.items():
        steps, mean = np.arange(values.shape[1]), values.mean(0)
        (line,) = axes.plot(steps, mean, label=f"{name} (n={len(values)})", linewidth=2.5 if name == "acbo" else 1.2, zorder=3 if name == "acbo" else 2)
        if name == "acbo":
            half = 1.96 * values.std(0) / np.sqrt(len(values))
            axes.fill_between(steps, mean - half, mean + half, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="experiments", ylabel="simple regret (share of the possible improvement)", title=f"{size} variables", ylim=(0, None))
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(config.folder / "results" / f"regret_d{size}.png", dpi=150)
    plt.close(figure)


def main(config: Config) -> Path:
    """Run every comparison, print and write the tables; returns the results folder."""
    use_compilation_cache(config.folder.parent / "cache")
    names = ("demos.npz", "surrogate.eqx", "policy.eqx", "bc_policy.eqx", "curves.npz", "acbo.eqx")
    inputs, results = [config.folder / name for name in names], config.folder / "results"
    for path in inputs:
        if not path.exists():
            raise ArtifactError(path, "missing")
    models = Models(
        TrainedACBOSystem.load(config.folder / "acbo.eqx"),
        load_surrogate(config.folder / "surrogate.eqx")[0],
        load_policy(config.folder / "bc_policy.eqx")[0],
        load_policy(config.folder / "policy.eqx")[0],
    )
    evaluation = Evaluation(config, models, inputs)
    bucket = read_header(config.folder / "surrogate.eqx")["config"]["prior"]["max_vars"]
    num_bins = models.surrogate.config.num_bins
    results.mkdir(parents=True, exist_ok=True)
    f1 = {}
    for size in (*config.sizes, config.transfer_size):
        problem_key, validation_key = jr.split(jr.fold_in(jr.key(config.seed), 1000 + size))
        slots = bucket if size <= bucket else size
        problems, optima = held_out(config, size, slots, num_bins, config.num_problems, problem_key)
        validation, _ = held_out(config, size, slots, num_bins, config.num_problems, validation_key)
        evaluate_structure(evaluation, size, problems, validation)
        f1[size] = next(r.value for r in evaluation.records if (r.task, r.method, r.metric) == (f"d={size}", "acbo", "parent F1"))
        if size in config.sizes:
            evaluate_optimisation(evaluation, size, problems, optima)
            last = size, problems, optima
    evaluate_success(evaluation, *last, transfer=(f1[config.sizes[-1]], f1[config.transfer_size]))
    evaluate_literature(evaluation, bucket)
    write_results(results, evaluation.records)
    for table in ("success", "surrogate", "optimisation", "optimisation_difference", "literature"):
        print(f"\n## {table}\n\n{render(evaluation.records, table)}")
    print(f"\nwritten to {results}")
    return results


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.extras.overridable_config_cli(PRESETS, args=preset_arguments(sys.argv[1:]), description=__doc__))
