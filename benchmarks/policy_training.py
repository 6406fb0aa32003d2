"""How the policy learns: the warm start beside its cold twin over several seeds, and what each
ingredient of stage 3 buys.

    python benchmarks/policy_training.py --parts twins variants

`twins`: 03_warmstart_acquisition.py at its `small` preset with `num_twins` seeds, and once more
with expected improvement cloned; a figure of the curves, and how soon either warm start is where
the cold one ends. `variants`: stage 3 with one thing changed at a time, by the flags in `VARIANTS`,
each with the same number of simulated experiments, without the twin and with seeds 0, 1 and so on.
Then all are held against the first, as it is, and against expected improvement on the same surface,
on the same held-out problems; differences are paired, with 95 % intervals over problems, whose
regret is the mean over seeds. What is trained already is not trained again.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.random as jr
import matplotlib
import numpy as np
import tyro
from tqdm import tqdm

from lib.artifacts import load_arrays, read_header
from lib.buffer import DataError
from lib.config import check_settings, errors_for_people, use_compilation_cache
from lib.methods import OptimizationScenario, exploration_scenario
from lib.metrics import (
    Record,
    convergence_ratio,
    paired_difference,
    render,
    summarise,
    write_results,
)
from lib.scm_prior import SCMPrior
from lib.system import TrainedACBOSystem, load_policy, load_surrogate


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    parts: tuple[str, ...] = ("twins", "variants")
    """What is done: any of these."""
    folder: Path = Path("artifacts/small")
    """Where demos.npz and surrogate.eqx are."""
    num_twins: int = 5
    """Seeds of `twins`."""
    variants: tuple[str, ...] = ()
    """Variants to compare with the default; all if none is named."""
    num_seeds: int = 3
    """Seeds of every variant."""
    iterations: int = 60
    """GRPO iterations of every variant."""
    num_problems: int = 600
    """Held-out problems of either kind."""
    seed: int = 6_000_003
    """Seed of the problems; unlike any training seed."""
    runs: Path = Path("artifacts/policy_runs")
    """Where weights go."""
    out: Path = Path("artifacts/policy_training")
    """Where tables and the figure go."""

    def __post_init__(self):
        check_settings(self)


AS_IT_IS, CLONE = "as it is", "its clone, before GRPO"
VARIANTS = {
    AS_IT_IS: (),
    "no cloning": ("--imitation.no-use-behavioral-cloning",),
    "no structure reward": ("--rewards.structure-weight", "0"),
    "no parent reward": ("--rewards.parent-weight", "0"),
    "improvement alone": ("--rewards.structure-weight", "0", "--rewards.parent-weight", "0"),
    "groups of 4": ("--grpo.group-size", "4", "--problems-per-iteration", "32"),
    "groups of 16": ("--grpo.group-size", "16", "--problems-per-iteration", "8"),
    "groups of 64": ("--grpo.group-size", "64", "--problems-per-iteration", "2"),
    "scaled by the group": ("--grpo.scale", "group"),
    "two more experiments": ("--grpo.lookahead", "2", "--problems-per-iteration", "6"),
    "expected improvement cloned": ("--imitation.teacher", "expected_improvement"),
    "Thompson sampling cloned": ("--imitation.teacher", "thompson"),
    "choice alone cloned": ("--imitation.surface-weight", "0"),
    "surface alone cloned": ("--imitation.surface-weight", "1"),
    "cloning to the end": ("--imitation.imitation-weight", "0.1"),
    "no temperature": ("--rewards.temperature", "0"),
    "last weights": ("--average", "0"),
}
STEPS = (1, 3, 5, 10)
# the first two are twins; the third sees the same problems
STARTS = ("cloned from the expert", "cold", "cloned from expected improvement")
RETURN = "share of the training needed, by the return on validation problems"


def train(config: Config, name: str, seed: int, flags: tuple[str, ...]) -> Path:
    """The folder in which stage 3 has run."""
    folder = config.runs / f"{name}, seed {seed}"  # all in one folder, to share compiled programs
    if not (folder / "policy.eqx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("demos.npz", "surrogate.eqx"):
            (folder / file).unlink(missing_ok=True)
            (folder / file).hardlink_to(config.folder / file)
        subprocess.run(
            [
                sys.executable,
                "03_warmstart_acquisition.py",
                "small",
                "--folder",
                str(folder),
                "--seed",
                str(seed),
                *flags,
            ],
            check=True,
        )
    return folder


# --- twins ---


def measure_twins(config: Config) -> list[Record]:
    """Share of the training that either warm start needs to where the cold one ends, per seed and
    of the mean curves; the figure.
    """
    flags = {
        "twins": (),
        "twins, expected improvement cloned": (
            "--imitation.teacher",
            "expected_improvement",
            "--no-cold-twin",
        ),
    }
    jobs = [(name, seed) for name in flags for seed in range(config.num_twins)]
    folders = {job: train(config, *job, flags[job[0]]) for job in tqdm(jobs, desc="twins")}
    loaded = {
        job: load_arrays(folder / "curves.npz", "curves")[0] for job, folder in folders.items()
    }

    def together(metric):
        return np.stack(
            [
                np.concatenate([loaded[name, seed][metric] for name in flags])
                for seed in range(config.num_twins)
            ]
        )

    # [seeds, starts, iterations]
    curves = {
        metric: together(metric)
        for metric in ("validation", "optimization", "entropy", "kl", "dead_groups")
    }
    records = []

    def add(task, method, metric, estimate, n, unit=""):
        value, low, high = estimate
        records.append(
            Record(
                "convergence", task, method, metric, float(value), float(low), float(high), n, unit
            )
        )

    # of the averaged policies, mean over the experiments of a campaign
    returns = curves["validation"].mean(-1)
    cold = STARTS.index("cold")
    for row, start in enumerate(STARTS):
        for name, of in (
            {
                "training to the cold end": {},
                "training to 95 % of the cold best": {"share": 0.95},
            }.items()
            if row != cold
            else ()
        ):
            each, task = (
                np.array([convergence_ratio(one[[row, cold]], **of) for one in returns]),
                f"{RETURN}: {start}",
            )
            for seed, ratio in enumerate(each):
                add(task, f"seed {seed}", name, (ratio, -np.inf, np.inf), 1)
            add(task, "mean of the seeds", name, summarise(each), len(each))
            add(
                task,
                "the seeds' mean curve",
                name,
                (convergence_ratio(returns.mean(0)[[row, cold]], **of), -np.inf, np.inf),
                len(each),
            )
        for name, step in {
            "before GRPO": 0,
            "halfway": returns.shape[2] // 2,
            "at the end": -1,
        }.items():
            add("return", start, name, summarise(returns[:, row, step]), len(returns))
            if row != cold:
                add(
                    "return",
                    f"{start}, above cold, paired",
                    name,
                    paired_difference(returns[:, row, step], returns[:, cold, step]),
                    len(returns),
                )
        for metric in ("optimization", "entropy", "kl", "dead_groups"):
            for when, part in {
                "first 20 iterations": slice(0, 20),
                "last 20 iterations": slice(-20, None),
            }.items():
                values = curves[metric][:, row, part].mean(1)
                add(when, start, metric, summarise(values), len(values))
    draw_curves(curves, config.out / "curves.png")
    return records


def draw_curves(curves: dict[str, np.ndarray], path: Path, window: int = 10) -> None:
    """Return, entropy, divergence and dead groups of every start: a thin line per seed, a thick one
    for their mean; smoothed but for the return.
    """
    panels = {
        "validation": "return on validation problems",
        "entropy": "entropy of the policy (nats)",
        "kl": "KL from the start (nats)",
        "dead_groups": "share of groups without signal",
    }
    iterations = curves["entropy"].shape[-1]
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharex=True)
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        for row, (start, colour) in enumerate(
            zip(STARTS, ("tab:blue", "tab:orange", "tab:green"), strict=True)
        ):
            if name == "validation":
                lines = curves[name][:, row].mean(-1)
                steps = np.linspace(0, iterations, lines.shape[1])
            else:
                lines = np.stack(
                    [
                        np.convolve(line, np.ones(window) / window, "valid")
                        for line in curves[name][:, row]
                    ]
                )
                steps = np.arange(lines.shape[1]) + window
            axis.plot(steps, lines.T, color=colour, linewidth=0.7, alpha=0.35)
            axis.plot(steps, lines.mean(0), color=colour, linewidth=2.2, label=start)
        axis.set_title(title, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("GRPO iteration")
    axes[0, 1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- variants ---


def measure_variants(config: Config) -> list[Record]:
    """Regret of every variant, and its change against the default and against expected
    improvement.
    """
    wanted = dict.fromkeys((AS_IT_IS, *(config.variants or VARIANTS)))
    # a run that is stopped has some seeds of all
    jobs = [(seed, name) for seed in range(config.num_seeds) for name in wanted]
    flags = ("--no-cold-twin", "--iterations", str(config.iterations))
    folders = {}
    for seed, name in tqdm(jobs, desc="training"):
        folders[seed, name] = train(
            config, f"{name}, {config.iterations} iterations", seed, (*flags, *VARIANTS[name])
        )
    surrogate, records = load_surrogate(config.folder / "surrogate.eqx")[0], []
    for name in wanted:
        agreements = [
            read_header(folders[seed, name] / "bc_policy.eqx")["metrics"]
            for seed in range(config.num_seeds)
        ]
        for metric in ("variable_agreement", "value_agreement") if agreements[0] else ():
            value = np.mean([one[metric] for one in agreements])
            records.append(
                Record(
                    "variants",
                    "the clone and the expert",
                    name,
                    metric,
                    float(value),
                    -np.inf,
                    np.inf,
                    len(agreements),
                    "",
                )
            )
    plain = OptimizationScenario("50 rows, d=8", SCMPrior(min_size=8, max_size=8), num_obs=50)
    for index, scenario in enumerate((plain, replace(exploration_scenario(8, 8), num_steps=10))):
        draw_key, play_key = jr.split(jr.fold_in(jr.key(config.seed), index))
        problems, optima = scenario.draw(draw_key, config.num_problems, surrogate.config.num_bins)

        def play(name, policy, scenario=scenario, problems=problems, optima=optima, key=play_key):
            return scenario.regret(
                name, TrainedACBOSystem(surrogate, policy), problems, optima, key
            )

        def over_seeds(name, file, play=play):
            return np.stack(
                [
                    play("acbo", load_policy(folders[seed, name] / file)[0])
                    for seed in range(config.num_seeds)
                ]
            )

        found = {name: over_seeds(name, "policy.eqx") for name in tqdm(wanted, desc=scenario.name)}
        found[CLONE] = over_seeds(AS_IT_IS, "bc_policy.eqx")
        default, rival = (
            found[AS_IT_IS].mean(0),
            play("surrogate_ei", load_policy(folders[0, AS_IT_IS] / "policy.eqx")[0]),
        )
        for name, values in found.items():
            mean = values.mean(0)
            for step in STEPS:
                cells = {
                    "regret": summarise(mean[:, step]),
                    "less expected improvement's": paired_difference(mean[:, step], rival[:, step]),
                    "less the default's": paired_difference(mean[:, step], default[:, step])
                    if name != AS_IT_IS
                    else None,
                    "deviation over seeds": (
                        values[:, :, step].mean(1).std(ddof=1),
                        -np.inf,
                        np.inf,
                    )
                    if len(values) > 1
                    else None,
                }
                for metric, estimate in cells.items():
                    if estimate is not None:
                        value, low, high = estimate
                        task = f"{scenario.name}, after {step}"
                        records.append(
                            Record(
                                "variants",
                                task,
                                name,
                                metric,
                                float(value),
                                float(low),
                                float(high),
                                len(mean),
                                "",
                            )
                        )
    return records


PARTS = {"twins": ("convergence", measure_twins), "variants": ("variants", measure_variants)}


def main(config: Config) -> None:
    """Train what is missing, measure, print and write."""
    for given, known in ((config.variants, VARIANTS), (config.parts, PARTS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise DataError(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    use_compilation_cache(Path("artifacts/cache"))
    records = []
    for part in config.parts:
        table, measure = PARTS[part]
        records += measure(config)
        write_results(config.out, records)
        print(f"\n## {part}\n\n{render(records, table)}")


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.cli(Config, description=__doc__))
