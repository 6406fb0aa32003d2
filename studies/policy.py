"""Trained systems in the own simulator beside each other, beside simple rules on the surface of the
first one's surrogate, and beside regressions: the same problems, first data and noise for all.

    python studies/policy.py --systems pretrained/acbo.eqx pretrained/acbo_small.eqx

Simple regret (0 the best single intervention, 1 doing nothing) of the recommended action before and
after experiments, and its paired difference to that of the first system, called `acbo`; between
`surrogate_greedy`, `surrogate_ei`, `surrogate_thompson` and it lies what its policy does. Then how
many of the true effects the 90 % bands hold, by the size of the effect: the distance of E[Y | do]
from E[Y] in observed deviations of Y. Intervals are 95 %, over problems.
"""

import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from lib import settings
from lib.accuracy import regret_records
from lib.methods import ON_SURFACE, OptimizationScenario
from lib.metrics import Record, bootstrap, cells, render, write_results
from lib.problems import Problem, in_batches, optima
from lib.scm_prior import SCMPrior, multimodal
from lib.system import TrainedACBOSystem


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    systems: tuple[Path, ...] = (Path("pretrained/acbo.eqx"),)
    """Trained systems; differences are to the first."""
    sizes: tuple[int, ...] = (5, 8)
    """Numbers of variables of problems as in training."""
    exploration_sizes: tuple[int, ...] = (8,)
    """Numbers of variables of problems where it pays to look around."""
    rivals: tuple[str, ...] = (*ON_SURFACE, "random", "least_squares", "additive_ridge")
    """Methods beside the systems."""
    num_problems: int = 300
    """Held-out problems per kind."""
    num_obs: int = 50
    """Observational rows at the start, beside two interventions per variable."""
    num_steps: int = 10
    """Experiments per campaign."""
    band_sizes: tuple[int, ...] = (8, 30, 60)
    """Numbers of variables at which bands are measured."""
    band_problems: int = 60
    """Held-out problems per such size."""
    seed: int = 6_000_003
    """Seed of problems and noise; no other script has it."""
    folder: Path = Path("artifacts/studies/policy")
    """Where tables go."""

    def __post_init__(self):
        settings.validate(self)


EFFECTS = {
    "all": (0.0, np.inf),
    "below .1": (0.0, 0.1),
    ".1 to .3": (0.1, 0.3),
    "above .3": (0.3, np.inf),
}


def of_size(size: int, config: Config) -> OptimizationScenario:
    """Problems as in training."""
    prior = SCMPrior(max_vars=max(size, 8), min_size=size, max_size=size)
    return OptimizationScenario(f"d={size}", prior, config.num_obs, num_steps=config.num_steps)


def exploration_scenario(size: int) -> OptimizationScenario:
    """Where it pays to look around: few rows, wide ranges, responses with several valleys."""
    prior = multimodal(SCMPrior(max_vars=size, min_size=size, max_size=size))
    return OptimizationScenario(f"exploration, d={size}", prior, num_obs=24, num_steps=20)


def measure_regret(
    systems: dict[str, TrainedACBOSystem], scenario: OptimizationScenario, config: Config
) -> list[Record]:
    """Regret of every system and rival on one kind of problem."""
    draw_key, play_key = (
        settings.stage_key(config.seed, "policy", use, scenario.name) for use in ("draw", "play")
    )
    bins = systems["acbo"].surrogate.config.num_bins
    problems = scenario.draw(draw_key, config.num_problems, bins)
    best = optima(problems.scm)
    players = {name: ("acbo", system) for name, system in systems.items()}
    players |= {name: (name, systems["acbo"]) for name in config.rivals}
    regret = {
        name: scenario.regret(*player, problems, best, play_key)
        for name, player in tqdm(players.items(), desc=scenario.name)
    }
    return regret_records(scenario.name, regret, problems.scm.mechanism[:, 0])


@eqx.filter_jit
def inside_bands(system: TrainedACBOSystem, problems: Problem) -> tuple[jax.Array, jax.Array]:
    """Size of every true effect `[batch, vars, bins]`, NaN where nothing can be set, and whether
    the 90 % band holds it.
    """

    def one(problem):
        output = system.surrogate.predict(problem.buffer, problem.scm.task)
        effects, usable = problem.truth.effects, problem.scm.candidates[:, None]
        size = jnp.where(usable, jnp.abs(effects - problem.truth.baseline) / output.spread, jnp.nan)
        return size, jnp.abs(effects - output.effect_mean) <= 1.645 * output.effect_std

    return in_batches(one, problems)


def measure_bands(systems: dict[str, TrainedACBOSystem], size: int, config: Config) -> list[Record]:
    """Coverage of the bands by size of effect, pooled."""
    scenario, records = of_size(size, config), []
    key = settings.stage_key(config.seed, "policy", "bands", scenario.name)
    for name, system in systems.items():
        bins = system.surrogate.config.num_bins
        problems = scenario.draw(key, config.band_problems, bins)
        effect, inside = jax.device_get(inside_bands(system, problems))
        for label, (low, high) in EFFECTS.items():
            chosen = (effect >= low) & (effect < high)
            held, known = (inside & chosen).sum((1, 2)), chosen.sum((1, 2))
            share = bootstrap(lambda a, b: float(a.sum() / max(b.sum(), 1)), held, known)
            figures = {f"bands hold, {label}": share}
            records += cells("effects", scenario.name, name, figures, len(held))
    return records


def main(config: Config) -> Path:
    """Measure, print and write the tables; returns the folder."""
    settings.use_compilation_cache(Path("artifacts/cache"))
    names = ("acbo", *(path.stem for path in config.systems[1:]))
    systems = {
        name: TrainedACBOSystem.load(path) for name, path in zip(names, config.systems, strict=True)
    }
    scenarios = [of_size(size, config) for size in config.sizes]
    scenarios += [exploration_scenario(size) for size in config.exploration_sizes]
    records = [r for one in scenarios for r in measure_regret(systems, one, config)]
    records += [r for d in config.band_sizes for r in measure_bands(systems, d, config)]
    write_results(config.folder, records, config.seed)
    for table in ("optimisation", "effects"):
        print(render(records, table), end="\n\n")
    return config.folder


if __name__ == "__main__":
    with settings.errors_for_people():
        main(tyro.cli(Config, description=__doc__))
