"""What one run of the expert costs, in seconds: the whole, and each of its parts timed alone on the same problems.

    python benchmarks/expert.py --size 10 --num-obs 200 --num-steps 20 --batch 16

The original code takes 90 to 280 s for a graph of this size at 30 steps.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.random as jr
import tyro

from lib.config import use_compilation_cache
from lib.parent_scale import ParentScaleConfig, effects_of_sets, initial_regression, prior_over_sets, run_parent_scale
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
    candidate_sets: Literal["bootstraps", "union"] = "union"
    """Candidate parent sets: bootstraps or union."""
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
    settings = ParentScaleConfig(num_obs=config.num_obs, num_steps=config.num_steps, candidate_sets=config.candidate_sets)
    prior = SCMPrior(max_vars=config.size, min_size=config.size, max_size=config.size)
    capacity = config.num_obs + 2 * config.size + config.num_steps
    key = jr.key(config.seed)
    keys = jr.split(key, config.batch)
    scms, buffers = eqx.filter_jit(eqx.filter_vmap(lambda k: sample_problem(k, prior, config.num_obs, 2, capacity)))(keys)

    def batched(function):
        return eqx.filter_jit(eqx.filter_vmap(function))

    def sets_of(key, scm, buffer):
        return prior_over_sets(key, scm, buffer.values[: config.num_obs], settings)

    def effects_of(scm, buffer, sets, log_prior):
        return effects_of_sets(buffer.values[: config.num_obs], scm, sets, log_prior, settings)

    def regression_of(key, scm, buffer, sets, log_prior):
        return initial_regression(key, sets, log_prior, buffer.values[: config.num_obs], scm.target, settings)

    first, whole, _ = seconds(batched(lambda k, s, b: run_parent_scale(k, s, b, settings)), keys, scms, buffers)
    _, prior_time, (sets, log_prior) = seconds(batched(sets_of), keys, scms, buffers)
    _, effects_time, _ = seconds(batched(effects_of), scms, buffers, sets, log_prior)
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
