"""Trained systems side by side in the own simulator: the same problems, first data and noise.

    python studies/weights.py --systems pretrained/acbo.eqx artifacts/small/acbo.eqx

Per number of variables: parent F1 before any experiment, and simple regret (0 the best single
intervention, 1 doing nothing) of the recommended action before the first and after 1, 5 and 10
experiments of the system's own policy, each with its 95 % interval over problems; below, the
paired difference of every other system to the first. Then, for the numbers of variables in
`band_sizes`, how many of the true effects the 90 % bands hold, by the size of the effect: the
distance of E[Y | do] from E[Y] in observed deviations of Y. Prints Markdown.
"""

import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # run as `python studies/weights.py`

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tabulate import tabulate

from lib.config import check_settings, errors_for_people, stage_key, use_compilation_cache
from lib.methods import OptimizationScenario
from lib.metrics import bootstrap, paired_difference, parent_f1, summarise
from lib.scm_prior import SCMPrior
from lib.system import TrainedACBOSystem


@dataclass(frozen=True)
class Config:
    """What is compared, and on what."""

    systems: tuple[Path, ...]
    """Trained systems; differences are to the first."""
    sizes: tuple[int, ...] = (5, 8)
    """Numbers of variables."""
    num_obs: int = 50
    """Observational rows at the start, beside two interventions per variable."""
    num_problems: int = 300
    """Held-out problems per size."""
    band_sizes: tuple[int, ...] = (8, 30, 60)
    """Numbers of variables at which bands are measured."""
    band_problems: int = 60
    """Held-out problems per such size."""
    seed: int = 6_000_003
    """Seed of problems and noise; no other script has it."""

    def __post_init__(self):
        check_settings(self)


STEPS = (0, 1, 5, 10)
EFFECTS = {"below .1": (0.0, 0.1), ".1 to .3": (0.1, 0.3), "above .3": (0.3, np.inf)}


@eqx.filter_jit
def marginals(system: TrainedACBOSystem, problems) -> jax.Array:
    """P(parent) `[batch, vars]` at the start of every problem."""

    def one(problem):
        return system.surrogate.predict(problem.buffer, problem.scm.task).marginals()

    return jax.lax.map(one, problems, batch_size=30)


def measure(system: TrainedACBOSystem, size: int, config: Config) -> dict[str, np.ndarray]:
    """Figures per problem `[batch]` of one system."""
    prior = SCMPrior(max_vars=max(size, 8), min_size=size, max_size=size)
    scenario = OptimizationScenario(f"d={size}", prior, config.num_obs, num_steps=max(STEPS))
    keys = (stage_key(config.seed, "weights", use, f"d={size}") for use in ("problems", "play"))
    problem_key, play_key = keys
    problems, optima = scenario.draw(
        problem_key, config.num_problems, system.surrogate.config.num_bins
    )
    regret = scenario.regret("acbo", system, problems, optima, play_key)
    truth = problems.truth.parents
    possible = jax.vmap(lambda scm: scm.task.possible_parents)(problems.scm)
    f1 = parent_f1(np.asarray(marginals(system, problems)) > 0.5, truth, possible)
    return {"parent F1": f1.per_problem} | {f"regret after {t}": regret[:, t] for t in STEPS}


@eqx.filter_jit
def inside_bands(system: TrainedACBOSystem, problems) -> tuple[jax.Array, jax.Array]:
    """Size of every true effect `[batch, vars, bins]`, NaN where nothing can be set, and whether
    the 90 % band holds it.
    """

    def one(problem):
        output = system.surrogate.predict(problem.buffer, problem.scm.task)
        effects, usable = problem.truth.effects, problem.scm.candidates[:, None]
        size = jnp.where(usable, jnp.abs(effects - problem.truth.baseline) / output.spread, jnp.nan)
        return size, jnp.abs(effects - output.effect_mean) <= 1.645 * output.effect_std

    return jax.lax.map(one, problems)


def measure_bands(
    system: TrainedACBOSystem, size: int, config: Config
) -> tuple[list[str], list[str]]:
    """Coverage of the bands by size of effect, pooled, with intervals over problems; and the share
    of the effects of that size.
    """
    prior = SCMPrior(max_vars=size, min_size=size, max_size=size)
    scenario = OptimizationScenario(f"d={size}", prior, config.num_obs)
    key = stage_key(config.seed, "weights", "bands", f"d={size}")
    problems, _ = scenario.draw(key, config.band_problems, system.surrogate.config.num_bins)
    effect, inside = (np.asarray(x) for x in inside_bands(system, problems))
    cells, shares = [], []
    for low, high in ((0.0, np.inf), *EFFECTS.values()):
        chosen = (effect >= low) & (effect < high)
        counts = np.stack([(inside & chosen).sum((1, 2)), chosen.sum((1, 2))], 1).astype(float)
        found = bootstrap(lambda c: float(c[:, 0].sum() / max(c[:, 1].sum(), 1)), counts)
        cells.append(f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]")
        shares.append(f"{counts[:, 1].sum() / np.isfinite(effect).sum():.2f}")
    return cells, shares


def main(config: Config) -> dict[tuple[int, Path], dict[str, np.ndarray]]:
    """Measure every system and print the tables; returns the figures per problem."""
    use_compilation_cache(Path("artifacts/cache"))
    systems = {path: TrainedACBOSystem.load(path) for path in config.systems}
    found = {
        (d, path): measure(system, d, config)
        for d in config.sizes
        for path, system in systems.items()
    }
    rows = []
    for (size, path), figures in found.items():
        first = found[size, config.systems[0]]
        cells = [
            f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in map(summarise, figures.values())
        ]
        rows.append([f"{path.stem}, {size} variables", *cells])
        if path != config.systems[0]:
            more = [paired_difference(figures[name], first[name]) for name in figures]
            cells = [f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for e in more]
            rows.append([f"{path.stem} less {config.systems[0].stem}, {size} variables", *cells])
    names = list(next(iter(found.values())))
    print(tabulate(rows, ["system", *names], tablefmt="github", disable_numparse=True))
    bands = []
    for size in config.band_sizes:
        for path, system in systems.items():
            cells, shares = measure_bands(system, size, config)
            bands.append([f"{path.stem}, {size} variables", *cells])
        bands.append([f"share of effects, {size} variables", *shares])
    print("\n90 % bands hold, by size of effect:\n")
    print(tabulate(bands, ["system", "all", *EFFECTS], tablefmt="github", disable_numparse=True))
    return found


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.cli(Config, description=__doc__))
