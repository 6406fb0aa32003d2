"""The room above an expert that only considers parents: how often the best single intervention is
on another ancestor, and what ignoring it costs.

    python benchmarks/ancestors.py --num-problems 300

From noise-free E[Y | do] over a grid of values, on systems of `SCMPrior` and on CBO-U's random
ones. Cost of restricting oneself to parents: (best over parents - best over all) / (nothing - best
over all), 1 at most, as one may always do nothing. Writes `ancestors.md` and `ancestors.png` to
`--folder`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import tabulate
import tyro
from tqdm import tqdm

from lib.benchmarks import erdos_renyi
from lib.config import check_settings, use_compilation_cache
from lib.metrics import replace_text, summarise
from lib.scm import Intervention, value_grid
from lib.scm_prior import SCMPrior, sample_scm


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    sizes: tuple[int, ...] = (3, 5, 8, 10, 15, 20)
    """Numbers of variables of `SCMPrior`."""
    num_problems: int = 300
    """Systems per size of `SCMPrior`."""
    erdos_sizes: tuple[int, ...] = (10, 20, 50)
    """Numbers of variables of CBO-U's random systems."""
    erdos_problems: int = 100
    """Systems per size and kind of these."""
    num_values: int = 33
    """Values per variable."""
    batch: int = 25
    """Systems in one program."""
    seed: int = 2000
    """Seed of the systems, and the first one of CBO-U's."""
    folder: Path = Path("artifacts/expert")
    """Where table and figure go."""

    def __post_init__(self):
        check_settings(self)


KINDS = {"SCMPrior": "black", "CBO-U linear": "tab:blue", "CBO-U nonlinear": "tab:orange"}


@eqx.filter_jit
def draw(keys, prior: SCMPrior):
    """Systems (leading axis)."""
    return jax.vmap(lambda key: sample_scm(key, prior))(keys)


@eqx.filter_jit
def best_interventions(scms, num_values: int):
    """Least E[Y | do] over all variables and over parents (inf without any), E[Y], and whether the
    first is on a parent (leading axis).
    """

    def one(scm):
        least = scm.effect_table(value_grid(scm.low, scm.high, num_values)).min(1)
        nothing = scm.mean_outcome(Intervention.none(scm.low.shape[0]))
        return (
            least.min(),
            jnp.where(scm.parents, least, jnp.inf).min(),
            nothing,
            scm.parents[jnp.argmin(least)],
        )

    return jax.vmap(one)(scms)


def measure(kind: str, size: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Per system: whether its best intervention is on a non-parent, and the cost of parents only.
    Systems that nothing improves are left out.
    """
    count = config.num_problems if kind == "SCMPrior" else config.erdos_problems
    parts = []
    for start in tqdm(
        range(0, count, config.batch), desc=f"{kind}, d = {size}", unit="batch", leave=False
    ):
        if kind == "SCMPrior":
            keys = jr.split(jr.fold_in(jr.fold_in(jr.key(config.seed), size), start), config.batch)
            scms = draw(keys, SCMPrior(max_vars=size, min_size=size, max_size=size))
        else:
            seeds = range(config.seed + start, config.seed + start + config.batch)
            scms = [
                erdos_renyi(seed, size, kind == "CBO-U linear", per_variable=0, childless=False)[0]
                for seed in seeds
            ]
            scms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scms)
        parts.append([np.asarray(x, float) for x in best_interventions(scms, config.num_values)])
    best, best_parent, nothing, on_parent = (
        np.concatenate(x)[:count] for x in zip(*parts, strict=True)
    )
    kept = nothing > best
    cost = (np.minimum(best_parent, nothing) - best)[kept] / (nothing - best)[kept]
    return (on_parent == 0)[kept], cost


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of shares, which lie between 0 and 1."""
    value, low, high = summarise(values)
    return value, max(low, 0.0), min(high, 1.0)


def table(results: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]) -> str:
    """Share and cost by kind and size, with 95 % intervals."""
    style = "{:.3f} [{:.3f}, {:.3f}]".format
    rows = [
        [
            kind,
            str(size),
            str(len(other)),
            style(*interval(other)),
            style(*interval(cost)),
            f"{cost[other].mean():.3f}" if other.any() else "-",
        ]
        for (kind, size), (other, cost) in results.items()
    ]
    header = [
        "systems",
        "d",
        "n",
        "best is on a non-parent",
        "cost of parents only",
        "cost where it is",
    ]
    return tabulate.tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def draw_figure(results: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Share and cost against the number of variables."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
    labels = (
        "share of systems whose best\nintervention is on a non-parent",
        "mean cost of parents only\n(share of the possible improvement)",
    )
    for panel, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        for index, (kind, colour) in enumerate(KINDS.items()):
            sizes = [size for name, size in results if name == kind]
            if not sizes:
                continue
            value, low, high = np.array([interval(results[kind, size][panel]) for size in sizes]).T
            # side by side, so that intervals do not hide each other
            at = np.array(sizes) * 1.02 ** (index - 1)
            axis.errorbar(
                at,
                value,
                [value - low, high - value],
                color=colour,
                label=kind,
                marker="o",
                markersize=4,
                capsize=2,
                clip_on=False,
            )
        ticks = sorted({size for _, size in results})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(size) for size in ticks])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="number of variables", ylabel=label, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    """Measure every kind and size; print and write table and figure."""
    use_compilation_cache(Path("artifacts/cache"))
    tasks = [
        (kind, size)
        for kind in KINDS
        for size in (config.sizes if kind == "SCMPrior" else config.erdos_sizes)
    ]
    results = {
        (kind, size): measure(kind, size, config)
        for kind, size in tqdm(tasks, desc="kinds and sizes")
    }
    text = "\n\n".join(
        [
            "# The room above an expert that only considers parents",
            f"Noise-free E[Y given do] on {config.num_values} values per variable; one variable "
            "is set at a time. Cost 0: a parent is as good as any "
            "variable, 1: with parents alone nothing can be gained. Intervals are 95 %.",
            table(results),
        ]
    )
    config.folder.mkdir(parents=True, exist_ok=True)
    replace_text(config.folder / "ancestors.md", text + "\n")
    draw_figure(results, config.folder / "ancestors.png")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
