"""What one run of the expert costs, in seconds: the whole, and each of its parts timed alone on the same problems.

    python benchmarks/expert.py --size 10 --num-obs 200 --num-steps 20 --batch 16

The original code takes 90 to 280 s for a graph of this size at 30 steps.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.random as jr
import tyro

from lib.causal_gp import fit_star_gp, star_effects
from lib.config import use_compilation_cache
from lib.doubly_robust import doubly_robust_prior
from lib.parent_scale import ParentScaleConfig, Scale, initial_regression, run_parent_scale
from lib.scm import value_grid
from lib.scm_prior import SCMPrior, sample_problem


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    size: int = 10
    """Variables."""
    num_obs: int = 200
    """Observational rows."""
    num_steps: int = 20
    """Experiments."""
    batch: int = 16
    """Problems in one program."""
    seed: int = 0
    """Seed of the problems."""


def seconds(function, *args) -> tuple[float, float, Any]:
    """Seconds of the first call (compilation included), of the best of two more, and the result."""
    times, result = [], None
    for _ in range(3):
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return times[0], min(times[1:]), result


def main(config: Config) -> None:
    """Time the expert and its parts, and print a table."""
    use_compilation_cache(Path("artifacts/cache"))
    settings = ParentScaleConfig(num_obs=config.num_obs, num_steps=config.num_steps)
    prior = SCMPrior(max_vars=config.size, min_size=config.size, max_size=config.size)
    capacity = config.num_obs + 2 * config.size + config.num_steps
    key = jr.key(config.seed)
    keys = jr.split(key, config.batch)
    scms, buffers = eqx.filter_jit(eqx.filter_vmap(lambda k: sample_problem(k, prior, config.num_obs, 2, capacity)))(keys)

    def batched(function):
        return eqx.filter_jit(eqx.filter_vmap(function))

    def sets_of(key, scm, buffer):
        rows = buffer.values[: config.num_obs]
        return doubly_robust_prior(key, rows, scm.target, scm.var_mask, num_bootstraps=settings.num_bootstraps, num_features=settings.num_features)

    def effects_of(scm, buffer, sets):
        rows = buffer.values[: config.num_obs]
        scale = Scale.of(rows)
        x, y = scale(rows), scale(rows)[:, scm.target]
        grid = (value_grid(scm.low, scm.high, settings.num_values) - scale.shift[:, None]) / scale.spread[:, None]
        return star_effects(x, y, sets, fit_star_gp(x, y, sets), grid)

    def regression_of(key, scm, buffer, sets, log_prior):
        return initial_regression(key, sets, log_prior, buffer.values[: config.num_obs], scm.target, settings)

    first, whole, _ = seconds(batched(lambda k, s, b: run_parent_scale(k, s, b, settings)), keys, scms, buffers)
    _, prior_time, (sets, log_prior) = seconds(batched(sets_of), keys, scms, buffers)
    _, effects_time, _ = seconds(batched(effects_of), scms, buffers, sets)
    _, regression_time, _ = seconds(batched(regression_of), keys, scms, buffers, sets, log_prior)
    rows = [
        ("whole run", whole),
        ("doubly robust prior", prior_time),
        ("do-effects", effects_time),
        ("parent-set regression", regression_time),
        ("experiments (the rest)", whole - prior_time - effects_time - regression_time),
    ]
    print(f"d = {config.size}, {config.num_obs} rows, {config.num_steps} experiments, batch {config.batch}; first call {first:.1f} s")
    for name, value in rows:
        print(f"{name:<24} {value / config.batch:8.3f} s per run")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
