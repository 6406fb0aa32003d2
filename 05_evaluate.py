"""Stage 5: every table and figure, on held-out problems, paired across methods, scored by
noise-free E[Y | do].

- Reads   artifacts/<preset>/surrogate.eqx, policy.eqx, bc_policy.eqx (if something was cloned),
          curves.npz, acbo.eqx
- Writes  artifacts/<preset>/results/: metrics.json, one .md, .csv and .tex per table, figures as
          .png, raw/*.npz (per-problem results, so a stopped run goes on)
- Time    `small` about 8 minutes on 2 idle CPU cores

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
from typing import NamedTuple

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from tqdm import tqdm
from tyro.extras import overridable_config_cli

from lib import accuracy, metrics, settings
from lib.accuracy import Arrays, mean_f1, regret_records, structure_scores
from lib.artifacts import fingerprint, load, read_header, stored
from lib.expert_posterior import ParentScaleConfig
from lib.literature import Benchmark
from lib.methods import (
    EXPERT_FAMILY,
    METHODS,
    UNCHECKED,
    OptimizationScenario,
    play,
)
from lib.metrics import Estimate, Record, cells
from lib.problems import DataDesign, Problem, draw_data, optima
from lib.scm import Intervention
from lib.scm_prior import SCMPrior, inherit
from lib.system import TrainedACBOSystem, load_policy, load_surrogate


ON_LITERATURE = ("random", "additive_ridge", "parent_scale", "acbo")
LITERATURE_OBS = 200  # observational rows at the start, on the benchmarks
# Best Y after 30 trials as published for CBO-U (mean over runs; an outcome there is the mean of
# 1,000 samples): result files of the original code.
PUBLISHED = {"toy": -1.925, "epidemiology": -1.397, "healthcare": 13.166}


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
    literature: tuple[str, ...] = tuple(PUBLISHED)
    """Benchmarks of the literature."""
    literature_seeds: int = 10
    """Repetitions of each benchmark."""
    literature_steps: int = 15
    """Experiments on each benchmark."""

    def __post_init__(self):
        settings.validate(self)
        settings.validate(ParentScaleConfig(self.num_obs, self.num_steps))
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


PRESETS = settings.presets(
    Config,
    smoke=dict(
        # one of each kind: the tests play them all
        methods=(*ON_LITERATURE[:-1], "surrogate_ei", *UNCHECKED, "acbo"),
        num_problems=16,
        expert_problems=4,
        num_steps=2,
        literature=("toy",),
        literature_seeds=2,
        literature_steps=2,
        sizes=(5,),
        transfer_size=8,
    ),
    hour=dict(sizes=(5, 8, 12), transfer_size=24, num_problems=400, expert_problems=64),
    paper=dict(
        sizes=(5, 10, 20),
        transfer_size=40,
        num_problems=1000,
        expert_problems=200,
        num_steps=30,
    ),
)


class Run(NamedTuple):
    """An evaluation under way: its settings, who plays with which system, its files, and the places
    for variables that the surrogate was trained with.
    """

    config: Config
    systems: dict[str, TrainedACBOSystem]
    inputs: list[Path]
    bucket: int
    fingerprint: str

    def key(self, *use: str) -> jax.Array:
        """The random key of one use."""
        return settings.stage_key(self.config.seed, "evaluation", *use)

    def stored(self, name: str, compute: Callable[..., dict[str, jax.Array]], *args) -> Arrays:
        """`compute(*args)`, or what an earlier run with the same settings and inputs gave."""
        path, config = self.config.folder / "results" / "raw" / f"{name}.npz", self.config
        header = dict(config=asdict(config), seed=config.seed, parents=self.inputs)
        return stored(path, self.fingerprint, lambda: compute(*args), **header)

    def play(self, task: str, name: str, problem: tuple, num_obs: int, num_steps: int) -> Arrays:
        """Results of `lib.methods.play` on a `problem`, keys, systems and buffers, by the system
        that `name` is about: the unchecked policies are one program.
        """
        system = self.systems.get(name, self.systems["acbo"])
        program = "acbo_unchecked" if name in UNCHECKED else name
        return self.stored(f"{name}_{task}", play, program, system, *problem, num_obs, num_steps)


# --- what is played ---


def measure_parents(run: Run, size: int) -> tuple[Problem, Arrays, list[Record]]:
    """Held-out problems of one size, scores of their parents, and records of it."""
    config, surrogate, task = run.config, run.systems["acbo"].surrogate, f"d={size}"
    prior = replace(config.prior, max_vars=max(run.bucket, size), min_size=size, max_size=size)
    lengths = config.num_obs, config.per_variable, config.num_steps
    scenario = OptimizationScenario(task, prior, *lengths)
    problems, validation = (
        scenario.draw(run.key(use, task), config.num_problems, surrogate.config.num_bins)
        for use in ("problems", "validation")
    )
    scores, tuning = (
        run.stored(f"{name}_d{size}", structure_scores, surrogate, some)
        for name, some in (("structure", problems), ("structure_validation", validation))
    )
    records = accuracy.surrogate_records(task, scores, tuning, np.asarray(problems.truth.effects))
    return problems, scores, records


def play_all(run: Run, size: int, problems: Problem) -> tuple[Arrays, Arrays]:
    """Simple regret by method, and what the expert's play gave."""
    config, task = run.config, f"d={size}"
    best, nothing = optima(problems.scm), problems.truth.baseline
    problem = jr.split(run.key("play", task), len(best)), problems.scm, problems.buffer
    regret, played = {}, {}
    methods = [name for name in config.methods if name != "bc_policy" or name in run.systems]
    for name in tqdm(methods, desc=f"methods, {task}"):
        count = config.expert_problems if name in EXPERT_FAMILY else config.num_problems
        part = jax.tree.map(lambda leaf, n=count: leaf[:n], problem)
        played[name] = run.play(f"d{size}", name, part, config.num_obs, config.num_steps)
        ends = best[:count, None], nothing[:count, None]
        regret[name] = metrics.normalised_regret(played[name]["recommended"], *ends)
    return regret, played["parent_scale"]


def literature_records(run: Run) -> list[Record]:
    """Benchmarks of the literature: E[Y | do] of the recommended action after `literature_steps`
    experiments.
    """
    config, records, count = run.config, [], run.config.literature_seeds
    lengths = LITERATURE_OBS, config.literature_steps
    design = DataDesign(
        LITERATURE_OBS, LITERATURE_OBS, config.per_variable, num_steps=config.literature_steps
    )
    data_keys, keys = (jr.split(run.key("literature", use), count) for use in ("data", "play"))

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(0, None))
    def first(key, scm):
        return scm, draw_data(key, scm, design)

    for benchmark in tqdm(config.literature, desc="literature"):
        scm = Benchmark(benchmark, run.bucket)
        problem = keys, *first(data_keys, scm)
        known: dict[str, tuple[float | Estimate, int]] = {
            "optimum": (float(scm.optimum().mean), 1),
            "doing nothing": (float(scm.mean_outcome(Intervention.none(run.bucket))), 1),
            "CBO-U as published (best of 30 trials)": (PUBLISHED[benchmark], 10),
        }
        for name in ON_LITERATURE:
            reached = run.play(benchmark, name, problem, *lengths)["recommended"]
            known[name] = metrics.summarise(reached[:, -1]), count
        for name, (value, n) in known.items():
            records += cells("literature", benchmark, name, {"E[Y | do]": value}, n)
    return records


# --- the design's criteria (phase4_training_infrastructure.md) ---

UNITS = {
    "accuracy_drop": "share of the expert's parent F1 lost; negative: better than the expert",
    "speedup": "our expert's seconds per posterior over the surrogate's",
    "surrogate_latency": "ms per posterior, one problem",
    "expert_agreement": "share of held-out expert steps, variable",
    "expert_value_agreement": "of these, value within 10 % of the range",
    "convergence_ratio": "warm iterations / cold iterations",
    "transfer_drop": "share of parent F1 lost against {}",
    "peak_memory": "MiB",
}


def training_rows(run: Run) -> list[tuple[str, str, str, float, int]]:
    """Task, method, criterion, value and number of measurements of what cloning gave, if anything
    was cloned.
    """
    if "bc_policy" not in run.systems:
        return []
    folder = run.config.folder
    measured = read_header(folder / "bc_policy.eqx")["metrics"]
    states = int(measured["validation_states"])
    rows = [
        ("demos", "bc_policy", "expert_agreement", measured["variable_agreement"], states),
        ("demos", "bc_policy", "expert_value_agreement", measured["value_agreement"], states),
    ]
    curves = folder / "curves.npz", folder / "cold" / "curves.npz"
    if curves[1].exists():
        gains = (load(path, "curves")[0]["validation"].mean(-1) for path in curves)
        ratio = metrics.convergence_ratio(*gains)
        rows.append(("training", "grpo_policy", "convergence_ratio", ratio, 1))
    return rows


def success_records(
    run: Run, task: str, problems: Problem, scores: Arrays, expert: Arrays, transfer: Arrays
) -> list[Record]:
    """The criteria, on the problems of the largest trained size; `transfer` are the scores at the
    size that was never trained on.
    """
    config, count, records = run.config, len(expert["marginals"]), []
    theirs = mean_f1(scores, expert["marginals"])
    ours = mean_f1(scores, scores["acbo"][:count])
    for name, f1 in (("parent_scale", theirs), ("acbo", ours)):
        records += cells("surrogate", f"{task}/expert's problems", name, {"parent F1": f1}, count)
    # speed: one posterior for one problem, after compilation, on this machine
    scm, _, buffer = jax.tree.map(lambda leaf: leaf[0], problems)
    slow, fast = accuracy.posterior_seconds(
        run.systems["acbo"].surrogate, scm, buffer, config.num_obs
    )
    kept, moved = (mean_f1(some, some["acbo"]).value for some in (scores, transfer))
    lost = 1 - moved / max(kept, 1e-9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = [
        (task, "acbo", "accuracy_drop", 1 - ours.value / max(theirs.value, 1e-9), count),
        (task, "acbo", "speedup", slow / fast, 1),
        (task, "acbo", "surrogate_latency", 1000 * fast, 20),
        *training_rows(run),
        (f"d={config.transfer_size}", "acbo", "transfer_drop", lost, config.num_problems),
        ("evaluation", "acbo", "peak_memory", peak, 1),
    ]
    for where, method, metric, value, n in rows:
        records += cells("success", where, method, {metric: value}, n, UNITS[metric].format(task))
    return records


# --- the run ---


def evaluate(run: Run) -> tuple[list[Record], dict[str, Arrays]]:
    """Rows of all tables, in their order, and simple regret by method `[batch, steps + 1]` for each
    number of variables.
    """
    config, records, regret, found = run.config, [], {}, {}
    for size in config.sizes:
        task = f"d={size}"
        problems, scores, of_parents = measure_parents(run, size)
        regret[task], expert = play_all(run, size, problems)
        records += of_parents + regret_records(task, regret[task], problems.scm.mechanism[:, 0])
        found[size] = task, problems, scores, expert
    _, transfer, of_parents = measure_parents(run, config.transfer_size)
    records += of_parents + success_records(run, *found[max(config.sizes)], transfer=transfer)
    return records + literature_records(run), regret


def main(config: Config) -> Path:
    """Run every comparison, print and write the tables; returns the results folder."""
    settings.use_compilation_cache(config.folder.parent / "cache")
    folder, results = config.folder, config.folder / "results"
    policies = {"grpo_policy": folder / "policy.eqx"}
    inputs = [folder / name for name in ("surrogate.eqx", "acbo.eqx", "curves.npz")]
    if read_header(folder / "policy.eqx")["config"]["imitation"]["use_behavioral_cloning"]:
        policies["bc_policy"] = folder / "bc_policy.eqx"
        inputs += [path for path in [folder / "cold" / "curves.npz"] if path.exists()]
    inputs += policies.values()
    config = replace(config, prior=inherit(config.prior, read_header(folder / "acbo.eqx")))
    surrogate, header = load_surrogate(folder / "surrogate.eqx")
    systems = {"acbo": TrainedACBOSystem.load(folder / "acbo.eqx")}
    for name, path in policies.items():
        systems[name] = TrainedACBOSystem(surrogate, load_policy(path)[0])
    bucket = header["config"]["buckets"][-1]["max_size"]
    records, regrets = evaluate(
        Run(config, systems, inputs, bucket, fingerprint(__file__, config, inputs))
    )
    metrics.write_results(results, records, config.seed)
    for task, regret in regrets.items():
        size = task.removeprefix("d=")
        metrics.draw_regret(regret, results / f"regret_d{size}.png", f"{size} variables")
    for table in dict.fromkeys(record.table for record in records):
        print(f"\n## {table}\n\n{metrics.render(records, table)}")
    print(f"\nwritten to {results}")
    return results


if __name__ == "__main__":
    with settings.errors_for_people():
        main(overridable_config_cli(PRESETS, args=settings.preset_arguments(), description=__doc__))
