"""The doubly robust prior in closed form against the original's networks, and on more systems than
the networks could be run on.

    python benchmarks/prior.py --num-problems 200

First part: recorded runs of the original code (`*_dr1_*.npz` in tests/cases, or in the folder that
PARENT_SCALE_CASES names), both on the same observational rows. Second part: CBO-U's random systems,
here with any target, while no published target has children. Writes `prior.md` to `--folder`.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tabulate
import tyro
from tqdm import tqdm

from lib.benchmarks import erdos_renyi
from lib.config import check_settings, use_compilation_cache
from lib.doubly_robust import doubly_robust_prior
from lib.metrics import f1_of, paired_difference, replace_text, summarise


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    sizes: tuple[int, ...] = (5, 10, 20, 50)
    """Numbers of variables of the random systems."""
    num_problems: int = 200
    """Random systems per size, every other one linear; rounded up to whole batches."""
    num_obs: int = 200
    """Observational rows of these."""
    num_keys: int = 20
    """Random keys that ours is averaged over on each recorded case."""
    batch: int = 25
    """Systems in one program; at most five from 50 variables on."""
    seed: int = 1000
    """Seed of the first random system."""
    folder: Path = Path("artifacts/expert")
    """Where the tables go."""

    def __post_init__(self):
        check_settings(self)


VARIANTS = {
    "median bandwidth": {},
    "cross-validated bandwidth": dict(bandwidth="cross_validation"),
    "median bandwidth, union": dict(union=True),
}
CASES = Path(os.environ.get("PARENT_SCALE_CASES", "tests/cases"))
# one run of the original's prior, 5 to 50 variables, one thread on two shared cores
ORIGINAL_SECONDS = "18 to 71"
QUALITY = ("parent F1", "expected F1", "coverage", "sets")


@eqx.filter_jit
def priors(keys, rows, targets, **changes):
    """Sets and probabilities (leading axis)."""

    def one(key, rows, target):
        sets, log_probs = doubly_robust_prior(
            key, rows, target, jnp.ones(rows.shape[1], bool), **changes
        )
        return sets, jnp.exp(log_probs)

    return jax.vmap(one)(keys, rows, targets)


def timed(keys, rows, targets, **changes) -> tuple[np.ndarray, np.ndarray, float]:
    """Sets, probabilities, and the seconds that the whole batch took."""
    begin = time.perf_counter()
    sets, probs = jax.block_until_ready(priors(keys, rows, targets, **changes))
    return np.asarray(sets), np.asarray(probs), time.perf_counter() - begin


def quality(sets: np.ndarray, probs: np.ndarray, truth: np.ndarray) -> tuple[float, ...]:
    """`QUALITY` of one prior over `sets[sets, vars]`: F1 of the marginals above one half, mean F1
    of a set, whether the true set is there, sets.
    """
    # the original's may sum to less than one
    sets, probs = sets[probs > 0], probs[probs > 0] / probs.sum()
    said = np.concatenate([(probs @ sets > 0.5)[None], sets])
    f1 = f1_of(
        np.stack([(said & truth).sum(1), (said & ~truth).sum(1), (~said & truth).sum(1)]).astype(
            float
        )
    )
    return (
        float(f1[0]),
        float(probs @ f1[1:]),
        float((sets == truth).all(1).any()),
        float(len(sets)),
    )


def against_the_original(config: Config) -> str:
    """Means over the recorded cases, ours and its paired difference from the original's."""
    paths = sorted(CASES.glob("*_dr1_*.npz"))
    if not paths:
        print(
            f"no recorded cases in {CASES}: set PARENT_SCALE_CASES to their folder; this part "
            "is skipped"
        )
        return ""
    original, ours = [], {name: [] for name in VARIANTS}
    for path in tqdm(paths, desc="recorded cases"):
        case = np.load(path)
        target = int(case["target"])
        truth = case["adjacency"][:, target] > 0
        original.append(quality(case["sets"], case["prior"], truth))
        rows = jnp.broadcast_to(
            jnp.asarray(case["obs"], jnp.float32), (config.num_keys, *case["obs"].shape)
        )
        keys, targets = (
            jr.split(jr.key(config.seed), config.num_keys),
            jnp.full(config.num_keys, target),
        )
        for name, changes in VARIANTS.items():
            timed(keys, rows, targets, **changes)  # compiles
            sets, probs, seconds = timed(keys, rows, targets, **changes)
            found = np.mean(
                [quality(s, p, truth) for s, p in zip(sets, probs, strict=True)], axis=0
            )
            ours[name].append([*found, seconds / config.num_keys])
    reference = np.array(original)
    lines = [["original's networks", *(f"{x:.3f}" for x in reference.mean(0)), ORIGINAL_SECONDS]]
    for name, values in ours.items():
        table = np.array(values)
        lines.append(
            [name, *(f"{x:.3f}" for x in table[:, :-1].mean(0)), f"{table[:, -1].mean():.3f}"]
        )
        differences = (paired_difference(table[:, i], reference[:, i]) for i in range(len(QUALITY)))
        lines.append(
            [
                f"{name}: difference",
                *("{:+.3f} [{:+.3f}, {:+.3f}]".format(*d) for d in differences),
                "",
            ]
        )
    heading = (
        f"Against the original's networks: {len(paths)} recorded cases (5 and 10 variables, 200 "
        f"rows), ours averaged over {config.num_keys} keys"
    )
    return f"**{heading}**\n\n" + tabulate.tabulate(
        lines, headers=["prior", *QUALITY, "seconds"], tablefmt="github", disable_numparse=True
    )


def on_random_systems(size: int, config: Config) -> str:
    """Means over random systems with 95 % intervals."""
    batch = min(config.batch if size < 50 else min(config.batch, 5), config.num_problems)
    found, spent = {name: [] for name in VARIANTS}, dict.fromkeys(VARIANTS, 0.0)
    children: list[bool] = []
    starts = range(0, config.num_problems, batch)
    linear = np.arange(len(starts) * batch) % 2 == 0
    for start in tqdm(starts, desc=f"d = {size}", unit="batch"):
        problems = [
            erdos_renyi(
                config.seed + i,
                size,
                bool(linear[i]),
                config.num_obs,
                per_variable=0,
                childless=False,
            )
            for i in range(start, start + batch)
        ]
        children += [bool(scm.graph[scm.target].any()) for scm, _ in problems]
        rows = jnp.stack([buffer.values for _, buffer in problems])
        targets = jnp.stack([scm.target for scm, _ in problems])
        truth = np.stack([np.asarray(scm.parents) for scm, _ in problems])
        keys = jax.vmap(lambda i: jr.fold_in(jr.key(config.seed), i))(
            jnp.arange(start, start + batch)
        )
        for name, changes in VARIANTS.items():
            if start == 0:
                timed(keys, rows, targets, **changes)  # compiles
            sets, probs, seconds = timed(keys, rows, targets, **changes)
            spent[name] += seconds
            found[name] += [quality(*one) for one in zip(sets, probs, truth, strict=True)]
    lines = []
    for name, values in found.items():
        table = np.array(values)
        kinds = {
            "linear": linear,
            "nonlinear": ~linear,
            "childless": ~np.array(children),
            "children": np.array(children),
        }
        by_kind = [
            f"{table[kind, QUALITY.index('parent F1')].mean():.3f}" for kind in kinds.values()
        ]
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*summarise(column)) for column in table.T]
        lines.append([name, cells[0], *by_kind, *cells[1:], f"{spent[name] / len(table):.3f}"])
    header = [
        "prior",
        QUALITY[0],
        "linear",
        "nonlinear",
        "childless",
        "with children",
        *QUALITY[1:],
        "seconds",
    ]
    heading = (
        f"CBO-U's random systems, d = {size}, {config.num_obs} rows, n = {len(linear)}, half of "
        "them linear; "
        f"{np.mean(children):.0%} of targets have children"
    )
    return f"**{heading}**\n\n" + tabulate.tabulate(
        lines, headers=header, tablefmt="github", disable_numparse=True
    )


def main(config: Config) -> None:
    """Run both parts; print and write the tables."""
    use_compilation_cache(Path("artifacts/cache"))
    parts = [
        "# The doubly robust prior in closed form",
        "Parent F1: of the marginals above one half. Expected F1: mean over the prior's sets. "
        "Coverage: the true set has positive probability. Sets: "
        "with positive probability. Seconds: per prior, in batches, after compilation. Intervals "
        "are 95 %.",
        against_the_original(config),
        *(on_random_systems(size, config) for size in config.sizes),
    ]
    text = "\n\n".join(part for part in parts if part)
    config.folder.mkdir(parents=True, exist_ok=True)
    replace_text(config.folder / "prior.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
