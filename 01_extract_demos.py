"""Stage 1: sample causal models, run the expert on each, and make demonstrations of its runs:
validated, filtered, split and augmented.

- Reads   nothing
- Writes  artifacts/<preset>/demos.npz, and logs/demos.jsonl beside it
- Time    `small` about 2 minutes on 2 idle CPU cores

    python 01_extract_demos.py small --num-models 64

Every demonstration is a full run of PARENT_SCALE (lib/expert.py): the data it conditioned on, its
posterior after every experiment and its whole acquisition surface. A demonstration is kept if it is
consistent (its stored posterior follows from its stored data, replayed) and good enough by what the
expert itself can see (length, final entropy); ground truth takes no part in the choice.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tabulate import tabulate
from tyro.extras import overridable_config_cli

from lib import settings
from lib.artifacts import save
from lib.expert_posterior import ParentScaleConfig
from lib.graphs import FAMILIES
from lib.problems import DataDesign, draw_problems
from lib.scm_prior import SCMPrior
from lib.synthetic import MECHANISMS
from lib.table import DataError
from lib.training import Progress, merged, train
from lib.trajectories import (
    ExpertTrajectory,
    augment_expert_demonstrations,
    extract_expert_demonstrations,
    extract_multiple_trajectories,
    take,
    validate_demonstration_quality,
    validate_trajectory_consistency,
)


@dataclass(frozen=True)
class Config:
    """Settings of stage 1."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where demos.npz is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Distribution of causal models."""
    num_models: int = 160
    """Causal models; the expert runs once on each."""
    num_obs: int = 100
    """Observational rows that the expert starts from."""
    per_variable: int = 2
    """Initial interventions per variable."""

    # --- the expert ---
    num_steps: int = 10
    """Experiments per run."""
    num_bins: int = 16
    """Values per variable in the stored acquisition surface; the surrogate and the policy use the
    same grid.
    """

    # --- what is kept ---
    min_trajectory_length: int = 5
    """Fewest experiments."""
    max_posterior_entropy: float = 2.0
    """Largest entropy of the final posterior, in nats."""
    validation_split: float = 0.2
    """Share of models held out."""
    augmentation_factor: int = 2
    """Factor by which renaming variables and flipping signs multiplies the training part."""

    # --- bookkeeping ---
    batch: int = 16
    """Models in one program; also the interval of checkpoints."""

    def __post_init__(self):
        settings.validate(self)
        settings.validate(self.expert)
        if not 0 < round(self.num_models * self.validation_split) < self.num_models:
            raise ValueError(
                f"num_models = {self.num_models} cannot be split with "
                f"validation_split = {self.validation_split}: each side needs one"
            )

    @property
    def expert(self) -> ParentScaleConfig:
        """Settings of the expert."""
        return ParentScaleConfig(self.num_obs, self.num_steps, num_bins=self.num_bins)

    @property
    def design(self) -> DataDesign:
        """The data that the expert starts from."""
        rows = self.num_obs, self.num_obs, self.per_variable
        return DataDesign(*rows, num_steps=self.num_steps)


PRESETS = settings.presets(
    Config,
    smoke=dict(num_models=8, num_obs=40, num_steps=5, batch=4),
    hour=dict(num_models=1000, num_obs=200, num_steps=20, batch=50),
    paper=dict(num_models=1000, num_obs=200, num_steps=30),
)


@eqx.filter_jit
@jax.vmap
def final_beliefs(trajectory: ExpertTrajectory) -> tuple[jax.Array, ...]:
    """Parents' marginals `[batch, vars]`, the true parents, the true set's log-probability and the
    entropy in nats `[batch]`, after the last experiment of every trajectory (leading axis).
    """
    posterior, parents = trajectory.posterior(-1), trajectory.scm.parents
    return posterior.marginals(), parents, posterior.log_prob(parents), posterior.entropy()


def describe(trajectories: ExpertTrajectory) -> dict[str, float]:
    """Quality of a batch of demonstrations: final belief in the true set, parent F1 of the
    marginals, entropy in nats.
    """
    marginals, parents, log_prob, entropy = map(np.asarray, final_beliefs(trajectories))
    predicted = marginals > 0.5
    return {
        "true_set_probability": float(np.exp(log_prob).mean()),
        "parent_f1": float(
            2 * (predicted & parents).sum() / max(predicted.sum() + parents.sum(), 1)
        ),
        "final_entropy": float(entropy.mean()),
    }


def yields(
    trajectories: ExpertTrajectory, kept: np.ndarray
) -> dict[str, dict[str, dict[str, int]]]:
    """How many of a batch of models there are and how many were `kept[batch]`, by graph family,
    mechanism and number of variables.
    """
    scm = trajectories.scm
    kinds = {
        "family": np.array(list(FAMILIES))[np.asarray(scm.family)],
        "mechanism": np.array(list(MECHANISMS))[np.asarray(scm.mechanism[:, 0])],
        "variables": np.asarray(scm.var_mask.sum(1)),
    }
    return {
        kind: {
            str(label): {
                "models": int((labels == label).sum()),
                "kept": int((kept & (labels == label)).sum()),
            }
            for label in np.unique(labels)
        }
        for kind, labels in kinds.items()
    }


def main(config: Config) -> Path:
    """Make the demonstrations and write them; returns the artifact's path."""
    settings.use_compilation_cache(config.folder.parent / "cache")
    problem_key, expert_key, augment_key = (
        settings.stage_key(config.seed, "demos", name)
        for name in ("problems", "expert", "augmentation")
    )
    out, num_batches = config.folder / "demos.npz", -(-config.num_models // config.batch)

    # --- run the expert ---
    def run_batch(index):
        draw_key, num_bins = jr.fold_in(problem_key, index), config.num_bins
        scms, _, buffers = draw_problems(
            draw_key, config.batch, config.prior, config.design, num_bins
        )
        keys = jr.split(jr.fold_in(expert_key, index), config.batch)
        trajectories = extract_multiple_trajectories(keys, scms, buffers, config.expert)
        return trajectories, validate_trajectory_consistency(trajectories, config.expert)

    shape = eqx.filter_eval_shape(run_batch, 0)
    nothing = jax.tree.map(lambda leaf: jnp.zeros((num_batches, *leaf.shape), leaf.dtype), shape)

    def advance(runs, index, _):
        batch, consistent = run = run_batch(index)
        runs = jax.tree.map(lambda whole, part: whole.at[index].set(part), runs, run)
        counts = {"consistent": consistent.mean(), "failures": batch.failures.sum()}
        return runs, counts | describe(batch)

    progress = Progress(config.folder, "demos", __file__, config)
    shown = {"f1": "parent_f1", "true_set": "true_set_probability"}
    runs, _ = train(
        "expert", advance, nothing, num_batches, checkpoint_every=1, shown=shown, progress=progress
    )

    # --- filter, split, augment, write ---
    trajectories, consistent = jax.tree.map(lambda leaf: leaf[: config.num_models], merged(runs))
    good = validate_demonstration_quality(
        trajectories, config.min_trajectory_length, config.max_posterior_entropy
    )
    kept = np.asarray(consistent & good)
    if not 0 < round(kept.sum() * config.validation_split) < kept.sum():
        raise DataError(
            f"{kept.sum()} of {config.num_models} demonstrations were kept, too few to hold "
            f"{config.validation_split:.0%} out: "
            "raise --num-models, or --max-posterior-entropy"
        )
    chosen = take(trajectories, np.flatnonzero(kept))
    training, validation = extract_expert_demonstrations(chosen, config.validation_split)
    training = augment_expert_demonstrations(training, config.augmentation_factor, key=augment_key)
    metrics = {
        "models": config.num_models,
        "consistent": int(consistent.sum()),
        "kept": int(kept.sum()),
        "failures": int(trajectories.failures.sum()),
        **describe(chosen),
    }
    by_kind = yields(trajectories, kept)
    save(
        out,
        {"train": training, "validation": validation},
        stage="demos",
        hyperparameters=asdict(config.expert),
        step=num_batches,
        metrics=metrics | {"yield": by_kind},
        **progress.header,
    )
    progress.finish()
    rounded = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in metrics.items()}
    print("  ".join(f"{name} {value}" for name, value in rounded.items()))
    rows = [
        [kind, label, n["models"], n["kept"], f"{n['kept'] / n['models']:.0%}"]
        for kind, part in by_kind.items()
        for label, n in part.items()
    ]
    print(tabulate(rows, headers=["", "", "models", "kept", "yield"], disable_numparse=True))
    return out


if __name__ == "__main__":
    with settings.errors_for_people():
        main(overridable_config_cli(PRESETS, args=settings.preset_arguments(), description=__doc__))
