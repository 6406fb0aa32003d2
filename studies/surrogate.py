"""How good a trained surrogate is: parents, calibration, effects and the first experiment, by size,
graph family, mechanism and noise, those that it was trained on and others.

    python studies/surrogate.py --system pretrained/acbo.eqx --num-problems 500

Held-out problems of `SCMPrior`: `num_obs` observational rows, two interventions on each variable.
Thresholds of the structure baselines are chosen on as many separate problems, to their advantage.
The first experiment is the lowest point of a predicted surface: its regret is 0 at the best single
intervention on the grid and 1 at doing nothing. Intervals are 95 %, over problems. Writes tables
and `transfer.png` to `--folder`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from lib import baselines, metrics, settings
from lib.accuracy import STRUCTURE_BASELINES, Arrays, structure_scores, surrogate_records
from lib.graphs import FAMILIES
from lib.methods import OptimizationScenario
from lib.problems import Problem, in_batches
from lib.scm_prior import SCMPrior
from lib.surrogate import ParentSetPredictionModel
from lib.synthetic import MECHANISMS, NOISES
from lib.system import TrainedACBOSystem


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    system: Path = Path("pretrained/acbo.eqx")
    """Whose surrogate."""
    sizes: tuple[int, ...] = (5, 8, 10, 15, 20, 30, 50)
    """Numbers of variables."""
    shift_sizes: tuple[int, ...] = (8,)
    """Numbers of variables where families, mechanisms and noises are told apart."""
    num_problems: int = 500
    """Held-out problems per cell."""
    num_obs: int = 50
    """Observational rows."""
    seed: int = 4_000_003
    """Seed of the problems; unlike any training seed."""
    folder: Path = Path("artifacts/studies/surrogate")
    """Where tables and figures go."""

    def __post_init__(self):
        settings.validate(self)


def kinds(config: Config) -> dict[str, SCMPrior]:
    """Priors by the names of their problems."""
    found = {f"d={d}": SCMPrior(max_vars=d, min_size=d, max_size=d) for d in config.sizes}
    for size in config.shift_sizes:
        base = SCMPrior(max_vars=size, min_size=size, max_size=size)
        found |= {f"d={size}/{name}": replace(base, families=(name,)) for name in FAMILIES}
        found |= {f"d={size}/{name}": replace(base, mechanisms=(name,)) for name in MECHANISMS}
        found |= {f"d={size}/{name} noise": replace(base, noises=(name,)) for name in NOISES}
        found[f"d={size}/not standardised"] = replace(base, standardised=False)
    return found


@eqx.filter_jit
def surfaces(surrogate: ParentSetPredictionModel, problems: Problem) -> dict[str, jax.Array]:
    """E[Y | do] on the grid, by who predicts it `[batch, vars, bins]`, each in units of its own."""

    def one(problem):
        scm, buffer = problem.scm, problem.buffer
        linear, cubic = baselines.surfaces(buffer, scm.task, surrogate.config.num_bins)
        mean = surrogate.predict(buffer, scm.task).effect_mean
        return {"least_squares": linear, "additive_ridge": cubic, "acbo": mean}

    return in_batches(one, problems)


def first_regret(predicted: Arrays, effects: np.ndarray, baseline: np.ndarray) -> Arrays:
    """Regret of each surface's lowest point `[batch]`, by who predicts it; `effects` are the true
    ones `[batch, vars, bins]`, `baseline` E[Y] `[batch]`.
    """
    count, found = len(effects), {}
    effects = effects.reshape(count, -1)
    for name, surface in predicted.items():
        chosen = np.where(np.isfinite(effects), surface.reshape(count, -1), np.inf).argmin(1)
        reached = effects[np.arange(count), chosen]
        found[name] = metrics.normalised_regret(reached, effects.min(1), baseline)
    return found


def measure(
    surrogate: ParentSetPredictionModel, task: str, prior: SCMPrior, config: Config
) -> list[metrics.Record]:
    """All records of one kind of problem."""
    scenario = OptimizationScenario(task, prior, config.num_obs)
    problems, validation = (
        scenario.draw(
            settings.stage_key(config.seed, "surrogate", use, task),
            config.num_problems,
            surrogate.config.num_bins,
        )
        for use in ("problems", "validation")
    )
    truth = jax.device_get(problems.truth)
    scores, tuning = (
        jax.device_get(structure_scores(surrogate, some)) for some in (problems, validation)
    )
    records = surrogate_records(task, scores, tuning, truth.effects)
    predicted = jax.device_get(surfaces(surrogate, problems))
    regret = first_regret(predicted, truth.effects, truth.baseline)
    for name, values in regret.items():
        figures = {"regret": metrics.summarise(values)}
        if name != "acbo":
            figures["above acbo's, paired"] = metrics.summarise(values - regret["acbo"])
        part = f"{task}/first experiment"
        records += metrics.cells("surrogate", part, name, figures, len(values))
    return records


def draw_transfer(records: list[metrics.Record], config: Config, path: Path) -> None:
    """Mean parent F1, by which thresholds are chosen, against the number of variables, with 95 %
    bands.
    """
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in ("acbo", *STRUCTURE_BASELINES):
        chosen = {r.task: r for r in records if (r.method, r.metric) == (name, "parent F1")}
        rows = [chosen[f"d={size}"] for size in config.sizes]
        axes.plot(config.sizes, [r.value for r in rows], marker="o", label=name)
        axes.fill_between(config.sizes, [r.low for r in rows], [r.high for r in rows], alpha=0.15)
    axes.set(xlabel="variables", ylabel="parent F1", xscale="log", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(config: Config) -> Path:
    """Measure every kind of problem, print and write; returns the folder."""
    settings.use_compilation_cache(Path("artifacts/cache"))
    surrogate = TrainedACBOSystem.load(config.system).surrogate
    records = []
    for task, prior in tqdm(kinds(config).items(), desc="kinds of problems"):
        records += measure(surrogate, task, prior, config)
    metrics.write_results(config.folder, records, config.seed)
    draw_transfer(records, config, config.folder / "transfer.png")
    print(metrics.render(records, "surrogate"))
    return config.folder


if __name__ == "__main__":
    with settings.errors_for_people():
        main(tyro.cli(Config, description=__doc__))
