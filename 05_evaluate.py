"""Stage 5: every table and figure, on held-out problems, paired across methods, scored by
noise-free E[Y | do].

- Reads   artifacts/<preset>/surrogate.eqx, policy.eqx, bc_policy.eqx (if something was cloned),
          curves.npz, acbo.eqx
- Writes  artifacts/<preset>/results/: metrics.json, one .md, .csv and .tex per table, figures as
          .png, raw/*.npz (per-problem results, so a stopped run goes on)
- Time    `small` about 8 minutes on 2 busy CPU cores

    python 05_evaluate.py small --num-problems 1000

Protocol. Every method starts from the same data (`num_obs` observational rows and `per_variable`
interventions on each variable), experiments one row at a time, and after t experiments recommends
one action; the noise of experiment t is the same for all methods. Simple regret is the distance of
E[Y | do(recommended)] from the optimum, as a share of that of E[Y]: 0 is optimal, 1 is doing
nothing. What each method recommends: random, the experiment with the best outcome; the regressions
and the learned methods, the minimum of their predicted surface, or, checked, doing nothing; the
expert's family, the minimum of its Gaussian processes' means. The expert's family runs on fewer
problems (its cost), the first of the same list. Thresholds of the structure baselines are chosen on
separate validation problems, to their advantage.
"""

import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from tqdm import tqdm
from tyro.extras import overridable_config_cli

from lib import settings
from lib.accuracy import (
    Arrays,
    accuracy,
    mean_f1,
    posterior_seconds,
    regret_records,
    structure_scores,
    surrogate_records,
)
from lib.artifacts import fingerprint, load_arrays, read_header, stored
from lib.expert_posterior import ParentScaleConfig
from lib.literature import Benchmark
from lib.methods import EXPERT_FAMILY, METHODS, UNCHECKED, OptimizationScenario, play
from lib.metrics import (
    Estimate,
    Record,
    cells,
    convergence_ratio,
    draw_regret,
    normalised_regret,
    render,
    summarise,
    write_results,
)
from lib.problems import Example, GroundTruth, Problem, initial_buffer
from lib.scm import Intervention
from lib.scm_prior import SCMPrior, inherit
from lib.surrogate import ParentSetPredictionModel
from lib.system import TrainedACBOSystem, load_policy, load_surrogate
from lib.trajectories import ExpertTrajectory


@dataclass(frozen=True)
class Config:
    """Settings of stage 5."""

    folder: Path = Path("artifacts/small")
    """Where the artifacts are; results go to its subfolder `results`."""
    seed: int = 1_000_003
    """Seed of the held-out problems; unlike any training seed."""
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Distribution of the held-out problems, save their sizes; left at its default, it is what
    acbo.eqx was trained on.
    """
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
        settings.check(self)
        settings.check(ParentScaleConfig(self.num_obs, self.num_steps))
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
            # one of each kind: the tests play them all
            methods=(
                "random",
                "additive_ridge",
                "parent_scale",
                "surrogate_ei",
                *UNCHECKED,
                "acbo",
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

ON_LITERATURE = ("random", "additive_ridge", "parent_scale", "acbo")
# Best Y after 30 trials as published for CBO-U (mean over runs; an outcome there is the mean of
# 1,000 samples): result files of the original code.
PUBLISHED = {"toy": -1.925, "epidemiology": -1.397, "healthcare": 13.166}


class Run(NamedTuple):
    """An evaluation under way: its settings, who plays with which system, and its files."""

    config: Config
    systems: dict[str, TrainedACBOSystem]
    inputs: list[Path]
    fingerprint: str

    def stored(self, name: str, compute: Callable[..., dict[str, jax.Array]], *args) -> Arrays:
        """`compute(*args)`, or what an earlier run with the same settings and inputs gave."""
        path, config = self.config.folder / "results" / "raw" / f"{name}.npz", self.config
        header = dict(config=asdict(config), seed=config.seed, parents=self.inputs)
        return stored(path, self.fingerprint, lambda: compute(*args), **header)

    def play(self, name: str, keys, scms, buffers, num_obs: int, num_steps: int):
        """Results of `lib.methods.play`, with the system that `name` is about: the unchecked
        policies are one program.
        """
        system = self.systems.get(name, self.systems["acbo"])
        name = "acbo_unchecked" if name in UNCHECKED else name
        return play(name, system, keys, scms, buffers, num_obs=num_obs, num_steps=num_steps)


class EvaluationReport(NamedTuple):
    """What an evaluation found: rows of the tables, and simple regret by method
    `[batch, steps + 1]` for each number of variables.
    """

    records: list[Record]
    regret: dict[str, Arrays]


# --- functions of data, as the documents name them ---


def evaluate_system_performance(
    system: TrainedACBOSystem,
    test_scms: Problem,
    baseline_method: str = "parent_scale",
    *,
    num_obs: int = 50,
    num_steps: int = 10,
    seed: int = 0,
) -> EvaluationReport:
    """The system beside one method on problems whose truth is known, with room for `num_steps`
    experiments behind `num_obs` observational rows (phase4_training_infrastructure.md).
    """
    scms = test_scms.scm
    optima = eqx.filter_jit(jax.vmap(lambda scm: scm.optimum().mean))(scms)
    scenario = OptimizationScenario(f"d={scms.low.shape[1]}", num_obs=num_obs, num_steps=num_steps)
    key = settings.stage_key(seed, "evaluation", "play")
    regret = {
        name: scenario.regret(name, system, test_scms, optima, key)
        for name in (baseline_method, "acbo")
    }
    records = regret_records(scenario.name, regret, np.asarray(scms.mechanism))
    return EvaluationReport(records, {scenario.name: regret})


def evaluate_surrogate_accuracy(
    surrogate: ParentSetPredictionModel, test_trajectories: ExpertTrajectory
) -> dict[str, float]:
    """Accuracy on all that held-out demonstrations ended with, against the truth about their
    systems (phase4_training_infrastructure.md).
    """
    num_bins = surrogate.config.num_bins

    @eqx.filter_jit
    def examples(trajectories):
        def one(scm, buffer):
            truth = GroundTruth.of(scm, num_bins)
            return Example(buffer, scm.task, truth.parents, truth.effects)

        return jax.vmap(one)(trajectories.scm, trajectories.buffer)

    return accuracy(surrogate, (examples(test_trajectories),))


# --- optimisation ---


def play_all(run: Run, size: int, problems: Problem, optima: np.ndarray) -> tuple[Arrays, Arrays]:
    """Simple regret by method, and what the expert's play gave."""
    config, task = run.config, f"d={size}"
    key = settings.stage_key(config.seed, "evaluation", "play", task)
    problem = jr.split(key, config.num_problems), problems.scm, problems.buffer
    baseline, regret, expert = np.asarray(problems.truth.baseline), {}, {}
    few = min(config.expert_problems, config.num_problems)
    methods = [name for name in config.methods if name != "bc_policy" or name in run.systems]
    for name in tqdm(methods, desc=f"methods, {task}"):
        count = few if name in EXPERT_FAMILY else config.num_problems
        part = jax.tree.map(lambda leaf, n=count: leaf[:n], problem)
        lengths = config.num_obs, config.num_steps
        result = run.stored(f"{name}_d{size}", run.play, name, *part, *lengths)
        expert = result if name == "parent_scale" else expert
        known = optima[:count, None], baseline[:count, None]
        regret[name] = normalised_regret(result["recommended"], *known)
    return regret, expert


# --- the design's criteria (phase4_training_infrastructure.md), and the literature ---


def success_records(
    run: Run, task: str, problems: Problem, scores: Arrays, expert: Arrays, transfer: Arrays
) -> list[Record]:
    """The criteria, on the problems of the largest trained size; `transfer` are the scores at the
    size that was never trained on.
    """
    config, surrogate = run.config, run.systems["acbo"].surrogate
    count, records = len(expert["marginals"]), []
    ours = mean_f1(scores, scores["acbo"][:count])
    theirs = mean_f1(scores, expert["marginals"])
    for name, f1 in (("parent_scale", theirs), ("acbo", ours)):
        part = f"{task}/expert's problems"
        records += cells("surrogate", part, name, {"parent F1": f1}, count)

    def criterion(task, method, metric, value, n, unit):
        records.extend(cells("success", task, method, {metric: value}, n, unit))

    drop = float(1 - ours.value / max(theirs.value, 1e-9))
    share = "share of the expert's parent F1 lost; negative: better than the expert"
    criterion(task, "acbo", "accuracy_drop", drop, count, share)
    # speed: one posterior for one problem, after compilation, on this machine
    scm, buffer = (jax.tree.map(lambda leaf: leaf[0], x) for x in problems[::2])
    slow, fast = posterior_seconds(surrogate, scm, buffer, config.num_obs)
    times = "our expert's seconds per posterior over the surrogate's"
    criterion(task, "acbo", "speedup", slow / fast, 1, times)
    each = "ms per posterior, one problem"
    criterion(task, "acbo", "surrogate_latency", 1000 * fast, 20, each)
    curves = [folder / "curves.npz" for folder in (config.folder, config.folder / "cold")]
    if "bc_policy" in run.systems:
        said = read_header(config.folder / "bc_policy.eqx")["metrics"]
        clone, steps = ("demos", "bc_policy"), int(said["validation_states"])
        variable, value = said["variable_agreement"], said["value_agreement"]
        share = "share of held-out expert steps, variable"
        criterion(*clone, "expert_agreement", variable, steps, share)
        share = "of these, value within 10 % of the range"
        criterion(*clone, "expert_value_agreement", value, steps, share)
    if "bc_policy" in run.systems and curves[1].exists():
        gains = [load_arrays(path, "curves")[0]["validation"].mean(-1) for path in curves]
        ratio, unit = convergence_ratio(np.stack(gains)), "warm iterations / cold iterations"
        criterion("training", "grpo_policy", "convergence_ratio", ratio, 1, unit)
    kept, moved = mean_f1(scores, scores["acbo"]), mean_f1(transfer, transfer["acbo"])
    lost = float(1 - moved.value / max(kept.value, 1e-9))
    size, share = f"d={config.transfer_size}", f"share of parent F1 lost against {task}"
    criterion(size, "acbo", "transfer_drop", lost, config.num_problems, share)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    criterion("evaluation", "acbo", "peak_memory", peak, 1, "MiB")
    return records


def literature_records(run: Run, bucket: int) -> list[Record]:
    """Benchmarks of the literature: E[Y | do] of the recommended action after `literature_steps`
    experiments.
    """
    config, records, count = run.config, [], run.config.literature_seeds
    num_obs, num_steps = config.literature_obs, config.literature_steps
    capacity = num_obs + config.per_variable * bucket + num_steps
    data_keys, keys = (
        jr.split(settings.stage_key(config.seed, "evaluation", "literature", use), count)
        for use in ("data", "play")
    )
    for benchmark in tqdm(config.literature, desc="literature"):
        scm = Benchmark(benchmark, bucket)

        @eqx.filter_jit
        @eqx.filter_vmap
        def first(key, scm=scm):
            return scm, initial_buffer(key, scm, num_obs, config.per_variable, capacity)

        scms, buffers = first(data_keys)
        known: dict[str, tuple[float | Estimate, int]] = {
            "optimum": (float(scm.optimum().mean), 1),
            "doing nothing": (float(scm.mean_outcome(Intervention.none(bucket))), 1),
            "CBO-U as published (best of 30 trials)": (PUBLISHED[benchmark], 10),
        }
        for name in ON_LITERATURE:
            problem = keys, scms, buffers, num_obs, num_steps
            result = run.stored(f"{name}_{benchmark}", run.play, name, *problem)
            known[name] = summarise(result["recommended"][:, -1]), len(keys)
        for name, (value, n) in known.items():
            records += cells("literature", benchmark, name, {"E[Y | do]": value}, n)
    return records


# --- the run ---


def evaluate(run: Run) -> EvaluationReport:
    """Every comparison, in the order of the tables."""
    config, surrogate = run.config, run.systems["acbo"].surrogate
    trained = read_header(config.folder / "surrogate.eqx")["config"]["prior"]["max_vars"]
    records, regret, transfer = [], {}, {}
    largest: dict[str, Any] = {}
    for size in (*config.sizes, config.transfer_size):
        task = f"d={size}"
        prior = replace(config.prior, max_vars=max(trained, size), min_size=size, max_size=size)
        scenario = OptimizationScenario(
            task, prior, config.num_obs, config.per_variable, config.num_steps
        )
        draw = config.num_problems, surrogate.config.num_bins
        uses = (("evaluation", use, task) for use in ("problems", "validation"))
        (problems, optima), (validation, _) = (
            scenario.draw(settings.stage_key(config.seed, *use), *draw) for use in uses
        )
        scores = run.stored(f"structure_d{size}", structure_scores, surrogate, problems)
        file = f"structure_validation_d{size}"
        tuning = run.stored(file, structure_scores, surrogate, validation)
        records += surrogate_records(task, scores, tuning, np.asarray(problems.truth.effects))
        if size == config.transfer_size:
            transfer = scores
            continue
        regret[task], expert = play_all(run, size, problems, np.asarray(optima))
        records += regret_records(task, regret[task], np.asarray(problems.scm.mechanism))
        if size == max(config.sizes):
            largest = dict(task=task, problems=problems, scores=scores, expert=expert)
    records += success_records(run, **largest, transfer=transfer)
    return EvaluationReport(records + literature_records(run, trained), regret)


def main(config: Config) -> Path:
    """Run every comparison, print and write the tables; returns the results folder."""
    settings.use_compilation_cache(config.folder.parent / "cache")
    results, policy_path = config.folder / "results", config.folder / "policy.eqx"
    cloned = read_header(policy_path)["config"]["imitation"]["use_behavioral_cloning"]
    names = ("surrogate.eqx", "policy.eqx", *["bc_policy.eqx"] * cloned, "curves.npz", "acbo.eqx")
    inputs = [config.folder / name for name in names]
    config = replace(config, prior=inherit(config.prior, read_header(inputs[-1])))
    surrogate = load_surrogate(inputs[0])[0]
    systems = {"acbo": TrainedACBOSystem.load(inputs[-1])}
    for path in inputs[1 : 2 + cloned]:
        name = path.stem if path.stem == "bc_policy" else "grpo_policy"
        systems[name] = TrainedACBOSystem(surrogate, load_policy(path)[0])
    cold = config.folder / "cold" / "curves.npz"
    inputs += [cold] if cloned and cold.exists() else []
    results.mkdir(parents=True, exist_ok=True)
    run = Run(config, systems, inputs, fingerprint(__file__, config, inputs))
    report = evaluate(run)
    write_results(results, report.records, config.seed)
    for task, regret in report.regret.items():
        size = task.removeprefix("d=")
        draw_regret(regret, results / f"regret_d{size}.png", f"{size} variables")
    for table in dict.fromkeys(record.table for record in report.records):
        print(f"\n## {table}\n\n{render(report.records, table)}")
    print(f"\nwritten to {results}")
    return results


if __name__ == "__main__":
    with settings.errors_for_people():
        main(overridable_config_cli(PRESETS, args=settings.preset_arguments(), description=__doc__))
