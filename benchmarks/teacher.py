"""Which expert should teach? Its variants on the same random systems: structure found, and regret
of what it recommends.

    python benchmarks/teacher.py --sizes 5 10 --num-problems 200

Parent F1 of the marginals above one half, the posterior probability of the true set, how often that
set is a candidate at all (coverage), and the simple regret of the recommended action (0 the best
single intervention, 1 doing nothing). Differences are paired with the first variant. Writes
`teacher_d<size>.md` to `--folder` for every size.
"""

import sys
from dataclasses import dataclass, replace
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

from lib.config import check_settings, use_compilation_cache
from lib.metrics import f1_of, normalised_regret, paired_difference, summarise
from lib.parent_scale import ParentScaleConfig, run_parent_scale
from lib.scm import Intervention
from lib.scm_prior import SCMPrior, sample_problem


VARIANTS = {
    "bootstraps": {},
    "union": dict(candidate_sets="union"),
    "union, cross-validated bandwidth": dict(candidate_sets="union", bandwidth="cross_validation"),
    "bootstraps, empty set deleted": dict(drop_empty=True),
    "bootstraps, published likelihood": dict(likelihood="published", unit_noise=True),
    "uniform": dict(prior="uniform"),
}


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    sizes: tuple[int, ...] = (5, 10)
    """Numbers of variables."""
    num_problems: int = 200
    """Systems per size."""
    num_obs: int = 200
    """Observational rows."""
    num_steps: int = 10
    """Experiments."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which variants (the uniform prior is slow above some 8 variables)."""
    batch: int = 25
    """Problems in one program."""
    seed: int = 31
    """Seed of the systems: of no other script, so that nothing reported elsewhere is chosen
    here.
    """
    folder: Path = Path("artifacts/expert")
    """Where the tables go."""

    def __post_init__(self):
        check_settings(self)
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            raise ValueError(f"unknown variant {unknown[:1]}: choose from {', '.join(VARIANTS)}")


@eqx.filter_jit
def draw(keys, prior: SCMPrior, config: Config):
    """Systems, first data sets, true parents, optimum and E[Y] without intervention (leading
    axis).
    """
    capacity = config.num_obs + 2 * prior.max_vars + config.num_steps

    def one(key):
        scm, buffer = sample_problem(key, prior, config.num_obs, 2, capacity)
        return (
            scm,
            buffer,
            scm.parents,
            scm.optimum().mean,
            scm.mean_outcome(Intervention.none(prior.max_vars)),
        )

    return jax.vmap(one)(keys)


@eqx.filter_jit
def play(keys, scms, buffers, settings: ParentScaleConfig):
    """E[Y | do] of the recommendations `[batch, steps+1]`; final marginals, belief in the true set,
    and whether it was a candidate.
    """

    def one(key, scm, buffer):
        run = run_parent_scale(key, scm, buffer, settings)
        mean = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, scm.low.shape[0])))(
            run.recommended_variable, run.recommended_value
        )
        posterior, before = run.posterior(scm.target), run.posterior(scm.target, 0)
        return (
            mean,
            posterior.marginals(),
            jnp.exp(posterior.log_prob(scm.parents)),
            jnp.isfinite(before.log_prob(scm.parents)),
        )

    return jax.vmap(one)(keys, scms, buffers)


def measure(size: int, config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Per variant and per quantity, one number per problem."""
    prior = SCMPrior(max_vars=size, min_size=size, max_size=size)
    base = ParentScaleConfig(num_obs=config.num_obs, num_steps=config.num_steps)
    results = {name: [] for name in config.variants}
    starts = range(0, config.num_problems, config.batch)
    for start in tqdm(starts, desc=f"d = {size}", unit="batch"):
        keys = jr.split(jr.fold_in(jr.key(config.seed), start), 2 * config.batch).reshape(2, -1)
        scms, buffers, truth, optimum, nothing = draw(keys[0], prior, config)
        for name in config.variants:
            mean, marginals, true_set, covered = (
                np.asarray(x) for x in play(keys[1], scms, buffers, replace(base, **VARIANTS[name]))
            )
            said, truth = marginals > 0.5, np.asarray(truth)
            f1 = f1_of(
                np.stack(
                    [(said & truth).sum(1), (said & ~truth).sum(1), (~said & truth).sum(1)]
                ).astype(float)
            )
            regret = normalised_regret(
                mean, np.asarray(optimum)[:, None], np.asarray(nothing)[:, None]
            )
            results[name].append(
                {"parent F1": f1, "P(true set)": true_set, "coverage": covered.astype(float)}
                | {f"regret after {t}": regret[:, t] for t in (1, 5, 10) if t <= config.num_steps}
            )
    return {
        name: {
            key: np.concatenate([part[key] for part in parts])[: config.num_problems]
            for key in parts[0]
        }
        for name, parts in results.items()
    }


def main(config: Config) -> None:
    """Run every variant on every size; print and write a table for each size."""
    use_compilation_cache(Path("artifacts/cache"))
    config.folder.mkdir(parents=True, exist_ok=True)
    first = config.variants[0]
    for size in config.sizes:
        results = measure(size, config)
        quantities, rows = list(results[first]), []
        for name, values in results.items():
            rows.append(
                [
                    name,
                    *("{:.3f} [{:.3f}, {:.3f}]".format(*summarise(values[q])) for q in quantities),
                ]
            )
            if name != first:
                rows.append(
                    [
                        "  difference",
                        *(
                            "{:+.3f} [{:+.3f}, {:+.3f}]".format(
                                *paired_difference(values[q], results[first][q])
                            )
                            for q in quantities
                        ),
                    ]
                )
        text = (
            f"d = {size}, {config.num_obs} rows, 2 interventions per variable, "
            f"{config.num_steps} experiments, n = {config.num_problems}, "
        )
        text += (
            f"seed {config.seed}\n\n"
            + tabulate.tabulate(rows, headers=["expert", *quantities], tablefmt="github")
            + "\n"
        )
        (config.folder / f"teacher_d{size}.md").write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
