"""What a run of the expert costs: seconds of the whole, and of each of its parts timed alone on the
same systems.

    python benchmarks/expert.py --sizes 5 10 20 50 100 --batches 1 64

200 observational rows, 2 interventions per variable, 30 experiments. `prior`: doubly robust
selection; `do-effects`: star-graph Gaussian processes; `posterior`: parent-set regressions, every
update; `GP`: the causal Gaussian processes of all variables at every step; `acquisition`: expected
improvement at every step. The parts are separate programs, so they do not add up to the whole
exactly. Seconds per system; the first call, which compiles, is left out. The original code takes 89
to 275 s for 10 variables and 30 steps.

`GFLOP` counts what a run needs in matrix products, factorisations and solves (`operations`),
`share` is that over the time of the whole, as a fraction of what a matrix product of 2,048 rows in
float32 reaches in the same process.

Each configuration runs in a process of its own, whose peak memory is in the table.
"""

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tabulate
import tyro

from lib.causal_gp import aggregate_effects
from lib.config import check_settings, use_compilation_cache
from lib.metrics import replace_text
from lib.parent_scale import (
    ParentScaleConfig,
    Scale,
    absorb_row,
    decide,
    effects_of_sets,
    fit_causal_gps,
    initial_regression,
    prior_over_sets,
    run_parent_scale,
)
from lib.scm_prior import SCMPrior, sample_problem


PARTS = ("whole", "prior", "do-effects", "posterior", "GP", "acquisition")


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    sizes: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Numbers of variables."""
    batches: tuple[int, ...] = (1, 64)
    """Systems at once."""
    num_obs: int = 200
    """Observational rows."""
    num_steps: int = 30
    """Experiments."""
    candidate_sets: Literal["bootstraps", "union"] = "union"
    """Candidate parent sets of the expert."""
    seed: int = 0
    """Seed of the systems."""
    folder: Path = Path("artifacts/expert")
    """Where the table goes."""

    def __post_init__(self):
        check_settings(self)


def seconds(function, *args) -> tuple[float, Any]:
    """Seconds of a call after the first, which compiles (the better of two where they are short),
    and the result.
    """
    result, times = jax.block_until_ready(function(*args)), []
    while len(times) < 2 and sum(times) < 20:
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return min(times), result


def operations(
    sets: np.ndarray, log_prior: np.ndarray, num_rows: int, settings: ParentScaleConfig
) -> float:
    """Floating-point operations of a run whose candidates are `sets[sets, vars]` and whose buffer
    has `num_rows` places.

    Matrix products, Cholesky factors (n^3 / 3) and solves; exponentials and everything of lower
    order are left out.
    """
    (num_sets, num_vars), n, steps = sets.shape, settings.num_obs, settings.num_steps + 1
    bins, alive = settings.num_values, np.isfinite(log_prior)
    # Two regressions on all variables and without each: Gram matrix, and a factor for each of five
    # folds, in every bootstrap.
    m = 1 + num_vars + settings.num_features
    prior = (1 + num_vars) * 2 * settings.num_bootstraps * (2 * n * m**2 + 5 * m**3 / 3)
    # A likelihood at 25 hyperparameters on 100 rows; an inverse and a product on all rows, and one
    # more product for every member.
    with_others = 2 * n**3 + 4 * bins * n**2
    do_effects = (
        alive.sum() * (25 * 100**3 / 3 + 7 * n**3 / 3 + 2 * n**3) + sets[alive].sum() * with_others
    )
    # A Gram matrix and six inverses for the noise of Fourier and of linear features, one of each to
    # begin with; then a rank-one update for every row.
    f, rows = max(settings.num_features, num_vars), num_rows - n
    posterior = num_sets * (
        sum(2 * n * size**2 + 6 * 7 * size**3 / 3 for size in (f, num_vars))
        + 2 * n * f**2
        + 7 * f**3 / 3
        + rows * 5 * f**2
    )
    # A factor for every variable at every step (those of the likelihoods are on few rows), and
    # predictions on the grid.
    acquisition = steps * num_vars * (rows**3 / 3 + 3 * bins * rows**2)
    return prior + do_effects + posterior + acquisition


def matmul_rate(size: int = 2048) -> float:
    """Operations per second of a matrix product of `size` rows and columns in float32."""
    matrix = jr.normal(jr.key(0), (size, size))
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), matrix, matrix)[0]


def measure(size: int, batch: int, config: Config) -> dict[str, float]:
    """Seconds per system of every part, operations per system, their share of the machine's rate,
    and the peak memory of this process in GiB.
    """
    use_compilation_cache(Path("artifacts/cache"))
    settings = ParentScaleConfig(
        num_obs=config.num_obs, num_steps=config.num_steps, candidate_sets=config.candidate_sets
    )
    prior = SCMPrior(max_vars=size, min_size=size, max_size=size)
    capacity = config.num_obs + 2 * size + config.num_steps
    keys = jr.split(jr.key(config.seed), batch)

    def batched(function):
        return eqx.filter_jit(eqx.filter_vmap(function))

    scms, buffers = batched(lambda k: sample_problem(k, prior, config.num_obs, 2, capacity))(keys)
    times = {}
    times["whole"], runs = seconds(
        batched(lambda k, s, b: run_parent_scale(k, s, b, settings)), keys, scms, buffers
    )
    buffers = runs.buffer
    times["prior"], (sets, log_prior) = seconds(
        batched(lambda k, s, b: prior_over_sets(k, s, b.values[: config.num_obs], settings)),
        keys,
        scms,
        buffers,
    )
    times["do-effects"], (star, effects) = seconds(
        batched(lambda s, b, g, p: effects_of_sets(b.values[: config.num_obs], s, g, p, settings)),
        scms,
        buffers,
        sets,
        log_prior,
    )

    def follow(key, scm, buffer, sets, log_prior):
        scale = Scale.of(buffer.values[: config.num_obs])
        state = initial_regression(
            key, sets, log_prior, buffer.values[: config.num_obs], scm.target, settings
        )
        rows = jax.tree.map(
            lambda a: a[config.num_obs :], (buffer.values, buffer.intervened, buffer.valid)
        )
        return jax.lax.scan(
            lambda state, row: (absorb_row(state, scale, scm.target, settings, *row), None),
            state,
            rows,
        )[0]

    times["posterior"], _ = seconds(batched(follow), keys, scms, buffers, sets, log_prior)

    def fit(scm, buffer, log_probs, effects, star):
        scale = Scale.of(buffer.values[: config.num_obs])
        rows = scale(buffer.values[config.num_obs :])
        outcomes, share = rows[:, scm.target], jnp.ones(rows.shape[0])
        causal = aggregate_effects(log_probs[-1], effects, star)
        return fit_causal_gps(
            scm,
            scale,
            settings,
            causal,
            rows,
            buffer.intervened[config.num_obs :],
            outcomes,
            share,
            (1.0,),
        )

    times["GP"], gps = seconds(batched(fit), scms, buffers, runs.log_probs, effects, star)
    times["acquisition"], _ = seconds(
        batched(lambda s, b, g: decide(s, Scale.of(b.values[: config.num_obs]), g, s.candidates)),
        scms,
        buffers,
        gps,
    )
    for part in ("GP", "acquisition"):
        times[part] *= config.num_steps + 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    times = {part: value / batch for part, value in times.items()}
    count = float(
        np.mean(
            [
                operations(s, p, capacity, settings)
                for s, p in zip(np.asarray(sets), np.asarray(log_prior), strict=True)
            ]
        )
    )
    return times | {
        "GFLOP": count / 1e9,
        "share": count / times["whole"] / matmul_rate(),
        "GiB": memory,
    }


def main(config: Config) -> None:
    """Time every size and batch in a process of its own; print and write the table."""
    rows = []
    for size in config.sizes:
        for batch in config.batches:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                result = process.apply(measure, (size, batch, config))
            rows.append(
                [
                    size,
                    batch,
                    *(f"{result[name]:.3f}" for name in (*PARTS, "GFLOP", "share", "GiB")),
                ]
            )
            print(*rows[-1], sep="\t", flush=True)
    text = (
        f"Seconds per system, {config.num_obs} rows, {config.num_steps} experiments, "
        f"candidates: {config.candidate_sets}\n\n"
    )
    text += (
        tabulate.tabulate(
            rows,
            headers=["variables", "batch", *PARTS, "GFLOP", "share", "peak GiB"],
            tablefmt="github",
        )
        + "\n"
    )
    config.folder.mkdir(parents=True, exist_ok=True)
    replace_text(config.folder / "time.md", text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
