"""What a first experiment can reach at all: the surrogate beside one who is told the whole graph
and the kind of every mechanism.

    python benchmarks/ceiling.py --weights artifacts/small/surrogate.eqx
    artifacts/hour/surrogate.eqx

Whoever knows the graph regresses every variable on its true parents, by a Gaussian process whose
kernel is that of the true kind of mechanism and whose lengthscale and noise have the largest
evidence, and simulates every intervention with the fits. What is missing to 1 is, roughly, what few
rows leave open about the mechanisms; what others lack beside it, what the graph is worth. An
estimate of the ceiling and no bound: the best fit is taken for the truth, where the optimum would
average over fits. Problems and shares are those of `effects` in benchmarks/surrogate.py, and the
narrow ones, on which the design's figures were measured. Intervals are 95 %, over problems.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float
from tqdm import tqdm

from benchmarks import surrogate as benchmark
from lib.buffer import ExperienceBuffer
from lib.config import check_settings, errors_for_people, use_compilation_cache
from lib.metrics import paired_difference, render, summarise, write_results
from lib.scm import MECHANISMS, SyntheticSCM, antithetic_normal, value_grid


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    weights: tuple[Path, ...] = (Path("artifacts/small/surrogate.eqx"),)
    """Surrogates of stage 2, or systems of stage 4; named by their folders."""
    sizes: tuple[int, ...] = (5, 8, 10)
    """Numbers of variables."""
    num_problems: int = 500
    """Held-out problems per cell."""
    folder: Path = Path("artifacts/ceiling")
    """Where the table goes."""

    def __post_init__(self):
        check_settings(self)


LENGTHSCALES = (0.4, 0.7, 1.0, 1.5, 2.5)
NOISES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 10.0)  # variances, in units of the kernel's
NUM_ROWS = 64  # simulated per intervention, antithetic


class Regression(NamedTuple):
    """One variable given its parents: mean at a point = `level` + k(point, rows) @ `dual`; `noise`
    is a deviation.
    """

    lengthscale: Float[Array, ""]
    dual: Float[Array, " samples"]
    level: Float[Array, ""]
    noise: Float[Array, ""]


def kernel(
    a: Float[Array, "left vars"], b: Float[Array, "right vars"], linear, lengthscale
) -> Float[Array, "left right"]:
    """Of linear mechanisms, or of random Fourier features, with a constant that no prior mean
    fixes; columns outside the parents are zero.
    """
    product = a @ b.T
    distance = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2.0 * product
    return 1.0 + jnp.where(linear, product, jnp.exp(-0.5 * distance / lengthscale**2))


def regress(
    x: Float[Array, "samples vars"], y: Float[Array, " samples"], used, linear
) -> Regression:
    """The Gaussian process of largest evidence among `LENGTHSCALES` and `NOISES`, its scale
    profiled out, on the rows `used`.
    """
    count = used.sum()
    level = jnp.where(used, y, 0.0).sum() / count
    centred = jnp.where(used, y - level, 0.0)

    def evidence(lengthscale, noise):
        within = jnp.where(used[:, None] & used[None], kernel(x, x, linear, lengthscale), 0.0)
        factor = jnp.linalg.cholesky(within + jnp.diag(jnp.where(used, noise, 1.0)))
        dual = jax.scipy.linalg.cho_solve((factor, True), centred)
        scale = centred @ dual / count
        log_det = jnp.log(jnp.where(used, jnp.diagonal(factor), 1.0)).sum()
        return -0.5 * count * jnp.log(scale) - log_det, Regression(
            lengthscale, dual, level, jnp.sqrt(noise * scale)
        )

    pairs = jnp.array([(lengthscale, noise) for lengthscale in LENGTHSCALES for noise in NOISES])
    evidences, fits = jax.vmap(evidence)(pairs[:, 0], pairs[:, 1])
    return jax.tree.map(lambda leaf: leaf[jnp.argmax(evidences)], fits)


def known_graph_surface(
    buffer: ExperienceBuffer, scm: SyntheticSCM, num_bins: int
) -> Float[Array, "vars bins"]:
    """E[Y | do(X_i = v)] on each variable's range, by regressions on the true parents."""
    rows, graph, linear = (
        jnp.where(buffer.valid[:, None], buffer.values, 0.0),
        scm.graph,
        scm.mechanism == MECHANISMS.index("linear"),
    )
    num_vars = rows.shape[1]
    noise = antithetic_normal(3, NUM_ROWS, num_vars)

    def fit(j):
        return regress(
            jnp.where(graph[None, :, j], rows, 0.0),
            rows[:, j],
            buffer.valid & ~buffer.intervened[:, j],
            linear,
        )

    fits = jax.vmap(fit)(jnp.arange(num_vars))

    def mean_outcome(variable, value):
        def generate(x, j):
            one: Regression = jax.tree.map(lambda leaf: leaf[j], fits)
            parents = graph[None, :, j]
            mean = (
                one.level
                + kernel(
                    jnp.where(parents, x, 0.0),
                    jnp.where(parents, rows, 0.0),
                    linear,
                    one.lengthscale,
                )
                @ one.dual
            )
            return x.at[:, j].set(
                jnp.where(j == variable, value, mean + one.noise * noise[:, j])
            ), None

        x, _ = jax.lax.scan(generate, jnp.zeros((NUM_ROWS, num_vars)), scm.order)
        return jnp.take(x, scm.target, axis=1).mean()

    grid = value_grid(scm.low, scm.high, num_bins)
    return jax.lax.map(lambda i: jax.vmap(partial(mean_outcome, i))(grid[i]), jnp.arange(num_vars))


@eqx.filter_jit
def known_graph_surfaces(problems: benchmark.Problems, num_bins: int) -> jax.Array:
    """`known_graph_surface` of every problem."""
    return jax.lax.map(
        lambda problem: known_graph_surface(problem.buffer, problem.scm, num_bins),
        problems,
        batch_size=4,
    )


def main(config: Config) -> None:
    """Measure, print and write the table."""
    use_compilation_cache(Path("artifacts/cache"))
    models = {
        f"{benchmark.ACBO}, {path.parent.name}": benchmark.load(path) for path in config.weights
    }
    settings = benchmark.Config(num_problems=config.num_problems)
    report = benchmark.Report(settings, next(iter(models.values())))
    for suffix, prior in (("", benchmark.MIXED), ("/narrow", benchmark.NARROW)):
        for size in tqdm(config.sizes, desc="narrow" if suffix else "mixed"):
            problems = report.problems(size, settings.few_obs, prior)
            all_scores = {
                name: benchmark.host(benchmark.score_effects(model, problems))
                for name, model in models.items()
            }
            scores = next(iter(all_scores.values()))
            surfaces = {name: one["mean"] for name, one in all_scores.items()} | {
                name: scores[name] for name in benchmark.RULES
            }
            surfaces["known graph"] = np.asarray(
                known_graph_surfaces(problems, report.model.config.num_bins)
            )
            shares = {
                name: benchmark.share_of_improvement(surface, scores)
                for name, surface in surfaces.items()
            }
            everyone, linear = (
                np.ones(len(scores["mechanism"]), bool),
                scores["mechanism"] == MECHANISMS.index("linear"),
            )
            for kind, rows in (("all", everyone), ("linear", linear), ("fourier", ~linear)):
                for name, share in shares.items():
                    report.add(
                        "ceiling",
                        f"d={size}{suffix}",
                        name,
                        kind,
                        summarise(share[rows]),
                        int(rows.sum()),
                    )
                    if name != "known graph":
                        short = paired_difference(shares["known graph"][rows], share[rows])
                        report.add(
                            "ceiling",
                            f"d={size}{suffix}",
                            name,
                            f"{kind}, short of it",
                            short,
                            int(rows.sum()),
                        )
            write_results(config.folder, report.records)
    print(render(report.records, "ceiling"))


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.cli(Config, description=__doc__))
