"""Our expert on the systems of its paper, beside the published numbers.

    python studies/expert.py --systems toy er10_linear --seeds 10

The published protocol: 200 observational rows and two interventions per variable to start with,
then 30 experiments on single variables, each of which reports the mean of 1,000 samples. Every seed
draws its own graph, weights and data; the published runs of one random size share all of these, so
that values on random systems cannot be compared, only how fast a run comes near its last value.
Their targets have no children, nor have ours, save in the systems whose name ends in `_any`. The
regression of the target has Fourier features save in linear systems, as published. `parent_scale`
is the expert with an unknown graph, `cbo_known_graph` the same program given the true parents.

*Best y* is the published measure, a minimum of outcomes that still carry noise: it can lie below
the optimum. *Best E[Y | do]* is the same without noise, of the same experiments; its regret is 0 at
the best single intervention and 1 at doing nothing. The published toy, epidemiology and healthcare
runs could also set two variables at once; the published graph4 is an earlier version of the system.
Intervals are 95 %, over seeds. Writes tables and a figure to `--folder`, and every finished run to
its folder `raw`: the same command continues where it was stopped.
"""

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array
from matplotlib.figure import Figure
from tqdm import tqdm

from lib import settings
from lib.accuracy import Arrays
from lib.artifacts import fingerprint, stored
from lib.buffer import ExperienceBuffer
from lib.expert import run_known_graph, run_parent_scale
from lib.expert_posterior import ParentScaleConfig
from lib.literature import BENCHMARKS, Benchmark, Do, System, Values, normal
from lib.metrics import Estimate, Record, cells, normalised_regret, render, summarise, write_results
from lib.problems import DataDesign, draw_data
from lib.scm import AbstractSCM, Intervention
from lib.table import DataError
from studies.erdos_renyi import ERDOS_RENYI_SIZES, erdos_renyi
from studies.published import PublishedConfig


def graph4(u: Values, do: Do) -> tuple[Array, ...]:
    """X = eX; Z = 1.5 tanh(X) + eZ; T = cos(X) + exp(-X) + eT; Y = Z^2 + sin(T) + eY;
    all e ~ N(0, 1).

    Range T [-2, 8]; nothing else may be set. y* = 0.887 at do(T = -pi / 2), and the same at
    do(T = 3 pi / 2); without intervention E[Y] = 2.18. Source: CBO-U (`Graph4`).
    """
    x = do("X", normal(u["X"]))
    z = do("Z", 1.5 * jnp.tanh(x) + normal(u["Z"]))
    t = do("T", jnp.cos(x) + jnp.exp(-x) + normal(u["T"]))
    return x, z, t, do("Y", z**2 + jnp.sin(t) + normal(u["Y"]))


BENCHMARKS["graph4"] = System(("X", "Z", "T", "Y"), ("Z", "T"), {"T": (-2.0, 8.0)}, graph4)
METHODS = ("parent_scale", "cbo_known_graph")
SYSTEMS = (
    *("toy", "graph4", "epidemiology", "healthcare"),
    *(f"er{size}_{kind}" for kind in ("linear", "nonlinear") for size in ERDOS_RENYI_SIZES),
    *(f"er{size}_{kind}_any" for kind in ("linear", "nonlinear") for size in (10, 20)),
)


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    systems: tuple[str, ...] = SYSTEMS
    """Names of `lib.literature`, or er<variables>_linear and er<variables>_nonlinear, both also
    with `_any` (target with or without children).
    """
    seeds: int = 10
    """Systems (of the fixed ones: data sets) per row."""
    first_seed: int = 0
    """The first of these seeds."""
    num_obs: int = 200
    """Observational rows."""
    num_steps: int = 30
    """Experiments."""
    published: bool = False
    """The expert by the rules of the published code (`studies/published.py`)."""
    folder: Path = Path("artifacts/studies/expert")
    """Where tables, figure and raw results go."""

    def __post_init__(self):
        settings.validate(self)


TRIALS = (1, 3, 10, 30)

# Best y so far at the trials of `TRIALS`, mean and sd over runs, by published method: recomputed
# from the result files of the authors of CBO-U (Durand, Annadani, Bauer, Parbhoo 2025). Their
# Graph5 is epidemiology, Graph6 healthcare.
PUBLISHED = {
    "toy": {
        "CBO-U (n = 10)": ((-1.632, 0.323), (-1.866, 0.187), (-1.897, 0.155), (-1.925, 0.150)),
        "CBO (n = 10)": ((-1.294, 0.356), (-1.624, 0.378), (-1.960, 0.111), (-1.969, 0.109)),
    },
    "graph4": {"CBO (n = 10)": ((0.216, 0.045), (0.206, 0.038), (0.168, 0.045), (0.155, 0.040))},
    "epidemiology": {
        "CBO-U (n = 10)": ((-0.776, 0.700), (-1.041, 0.512), (-1.251, 0.403), (-1.397, 0.181)),
        "CBO (n = 10)": ((-1.016, 0.660), (-1.326, 0.308), (-1.477, 0.025), (-1.500, 0.018)),
    },
    "healthcare": {
        "CBO-U (n = 10)": ((13.602, 0.230), (13.499, 0.226), (13.254, 0.135), (13.166, 0.076)),
        "CBO (n = 10)": ((13.593, 0.399), (13.260, 0.021), (13.237, 0.020), (13.216, 0.012)),
    },
    "er10_linear": {
        "CBO-U (n = 7)": ((-11.923, 4.860), (-14.066, 0.048), (-14.079, 0.022), (-14.079, 0.022)),
        "CBO (n = 7)": ((-0.547, 14.404), (-13.466, 0.395), (-13.690, 0.376), (-13.731, 0.356)),
    },
    "er15_linear": {
        "CBO-U (n = 5)": ((-33.643, 0.218), (-35.977, 0.087), (-36.064, 0.029), (-36.104, 0.023)),
        "CBO (n = 5)": ((-23.060, 3.479), (-26.187, 5.939), (-31.001, 4.610), (-36.146, 0.025)),
    },
    "er20_linear": {
        "CBO-U (n = 6)": (
            (-101.774, 4.775),
            (-106.143, 2.981),
            (-108.250, 0.225),
            (-108.430, 0.038),
        ),
        "CBO (n = 6)": ((-86.729, 16.614), (-103.236, 7.286), (-107.547, 1.728), (-108.501, 0.018)),
    },
    "er10_nonlinear": {
        "CBO-U (n = 7)": ((0.788, 0.603), (0.127, 0.002), (0.126, 0.002), (0.126, 0.002))
    },
    "er15_nonlinear": {
        "CBO-U (n = 4)": ((1.236, 0.178), (0.901, 0.181), (0.751, 0.001), (0.744, 0.006))
    },
    "er20_nonlinear": {
        "CBO-U (n = 1)": ((-0.815, 0.0), (-1.136, 0.0), (-1.204, 0.0), (-1.212, 0.0))
    },
}


def random_system(system: str) -> re.Match[str] | None:
    """What the name of a random system says: size, kind, `_any`; None for a fixed system. Raises
    `DataError` for an unknown name.
    """
    match = re.fullmatch(r"er(\d+)_(linear|nonlinear)(_any)?", system)
    if match is None and system not in BENCHMARKS:
        raise DataError(
            f"unknown system '{system}': choose one of {', '.join(BENCHMARKS)}, "
            "er10_linear, er10_nonlinear_any, ..."
        )
    return match


def draw(system: str, seed: int, config: Config) -> tuple[AbstractSCM, ExperienceBuffer]:
    """A system and its first data set, with room for the experiments."""
    if kind := random_system(system):
        size, linear, childless = int(kind[1]), kind[2] == "linear", kind[3] is None
        scm, buffer = erdos_renyi(seed, size, linear, config.num_obs, childless=childless)
        return scm, buffer.grow(config.num_steps)
    scm = Benchmark(system)
    design = DataDesign(config.num_obs, config.num_obs, 2, num_steps=config.num_steps)
    return scm, draw_data(jr.fold_in(jr.key(seed), 0), scm, design)


@eqx.filter_jit
def play(key, scm, buffer, expert: ParentScaleConfig, known_graph: bool) -> dict[str, jax.Array]:
    """Outcomes and E[Y | do] of the experiments, E[Y | do] of the recommendations, the optimum over
    single interventions and E[Y] without one.
    """
    plays, num_vars = run_known_graph if known_graph else run_parent_scale, scm.low.shape[0]
    run = plays(key, scm, buffer, expert)
    mean = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, num_vars)))
    return {
        "outcome": run.outcome,
        "mean": mean(run.variable, run.value),
        "recommended": mean(run.recommended_variable, run.recommended_value),
        "optimum": scm.optimum().mean,
        "nothing": scm.mean_outcome(Intervention.none(num_vars)),
    }


def measure(system: str, config: Config) -> dict[str, Arrays]:
    """Every method's arrays (leading axis: seeds)."""
    kind = random_system(system)
    settings_of = PublishedConfig if config.published else ParentScaleConfig
    expert = settings_of(
        config.num_obs,
        config.num_steps,
        outcome_samples=1000,
        features="auto" if kind and kind[2] == "linear" else "fourier",
    )
    seeds = range(config.first_seed, config.first_seed + config.seeds)

    def runs(method):
        parts = []
        for seed in tqdm(seeds, desc=f"{system}, {method}", leave=False):
            key, known_graph = jr.fold_in(jr.key(seed), 1), method == "cbo_known_graph"
            parts.append(play(key, *draw(system, seed, config), expert, known_graph))
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def one(method):
        path = config.folder / "raw" / f"{system}.{method}.npz"
        what = config.published, config.seeds, config.first_seed
        mark = " ".join(map(str, (fingerprint(__file__, expert), *what)))
        header = dict(config=asdict(config), seed=config.first_seed, parents=[])
        return stored(path, mark, lambda: runs(method), **header)

    return {method: one(method) for method in METHODS}


def regret_so_far(result: Arrays) -> np.ndarray:
    """Regret of the best experiment so far `[seeds, trials]`."""
    best = np.minimum.accumulate(result["mean"], axis=1)
    return normalised_regret(best, result["optimum"][:, None], result["nothing"][:, None])


def records_of(system: str, results: dict[str, Arrays], config: Config) -> list[Record]:
    """Rows of one system, ours and published."""
    records, trials = [], [t for t in TRIALS if t <= config.num_steps]
    for method, result in results.items():
        n, best = len(result["optimum"]), np.minimum.accumulate(result["outcome"], axis=1)
        regret = regret_so_far(result)
        figures = {f"best y, t = {t}": summarise(best[:, t - 1]) for t in trials}
        figures |= {f"its regret, t = {t}": summarise(regret[:, t - 1]) for t in trials}
        figures["E[Y | do] recommended"] = summarise(result["recommended"][:, -1])
        records += cells("literature", system, method, figures, n)
    known = {name: summarise(results[METHODS[0]][name]) for name in ("optimum", "nothing")}
    for name, value in known.items():
        records += cells("literature", system, name, {"E[Y | do] recommended": value}, config.seeds)
    for method, values in PUBLISHED.get(system, {}).items():
        n = int(re.sub(r"\D", "", method))
        for t, (mean, sd) in zip(TRIALS, values, strict=True):
            half = 1.96 * sd / n**0.5 if n > 1 else np.inf
            figures = {f"best y, t = {t}": Estimate(mean, mean - half, mean + half)}
            records += cells("literature", system, f"published {method}", figures, n)
    return records


def draw_figure(results: dict[str, dict[str, Arrays]], path: Path) -> None:
    """Regret of the best experiment so far, a panel per system."""
    columns = min(len(results), 5)
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(2.4 * columns + 1.2, 2.2 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (system, methods) in zip(panels, results.items(), strict=False):
        for method, result in methods.items():
            values = regret_so_far(result)
            trials = np.arange(1, values.shape[1] + 1)
            axes.plot(trials, values.mean(0), label=method)
        axes.set(title=system.replace("_", " "), xscale="log", ylim=(-0.03, None))
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    panels[0].legend(fontsize=7, frameon=False)
    figure.supxlabel("trial")
    figure.supylabel("regret of the best experiment so far")
    figure.savefig(path, dpi=150)


def main(config: Config) -> Path:
    """Run or read every system; print and write tables and figure; returns the folder."""
    settings.use_compilation_cache(Path("artifacts/cache"))
    for system in config.systems:
        random_system(system)
    results = {system: measure(system, config) for system in tqdm(config.systems, desc="systems")}
    records = [r for system, found in results.items() for r in records_of(system, found, config)]
    write_results(config.folder, records, config.first_seed)
    draw_figure(results, config.folder / "expert.png")
    print(render(records, "literature"))
    return config.folder


if __name__ == "__main__":
    with settings.errors_for_people():
        main(tyro.cli(Config, description=__doc__))
