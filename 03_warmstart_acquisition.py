"""Stage 3: clone the expert's choices, then improve the policy by GRPO with verifiable rewards.

- Reads   artifacts/<preset>/demos.npz (not with --imitation.no-use-behavioral-cloning),
          surrogate.eqx
- Writes  artifacts/<preset>/policy.eqx (trained), bc_policy.eqx (the expert's clone, if there is
          one), curves.npz, and logs/policy.jsonl beside them
- Time    `small` about 5 minutes on 2 idle CPU cores, its cold twin beside it

    python 03_warmstart_acquisition.py small --iterations 200
    python 03_warmstart_acquisition.py small --folder artifacts/small/cold \\
        --imitation.no-use-behavioral-cloning

The second command is the cold twin that `make run` trains beside the warm start (a copy of
surrogate.eqx is in its folder): the same problems, noise and random keys; other first weights, and
no reference policy. What is logged per GRPO iteration (`lib.grpo.GRPOMetrics`): `reward`, mean
total of an experiment, and its components before weighting; `entropy` of the policy and `kl` to the
cloned one in nats; `without_signal`, the share of groups whose rewards do not differ; `clipped`,
the share of ratios outside the clip. Entropy that falls to that of a single cell, or a share
without signal that approaches one, would be a collapse. At every checkpoint the averaged policy
plays the same validation problems: `validation` in curves.npz is what its recommendations have
gained after each experiment. The reward of sampled candidates on ever new problems is too noisy to
compare two policies by.

Departures from textbook GRPO are numbered in lib/grpo.py. Here: the policy that is written is a
moving average over the iterations (`average`), because a reward is a rare jump of the
recommendation and every gradient mostly noise.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from tyro.extras import overridable_config_cli

from lib import settings
from lib.artifacts import save
from lib.grpo import GRPOConfig, GRPOMetrics, campaign_gains, grpo_iteration, grpo_optimiser
from lib.imitation import (
    AcquisitionTrainingExample,
    ImitationConfig,
    clone,
    clone_loss,
    extract_acquisition_training_data,
)
from lib.policy import AcquisitionPolicyNetwork, PolicyConfig
from lib.problems import DataDesign, Problem, draw_problems
from lib.rewards import RewardConfig
from lib.scm_prior import SCMPrior, inherit, multimodal
from lib.surrogate import ParentSetPredictionModel
from lib.system import load_surrogate
from lib.training import Learner, Progress, joined, moving_average, train
from lib.trajectories import load_trajectories


@dataclass(frozen=True)
class Config:
    """Settings of stage 3 (`AcquisitionConfig` of phase4_training_infrastructure.md)."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where inputs are read and the policy is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Distribution of causal models; left at its default, save sizes and shares, it is the
    surrogate's.
    """
    multimodal_share: float = 0.5
    """Share of the problems whose ranges are wide and whose responses have several valleys, where
    it pays to look around.
    """
    campaign: DataDesign = field(default_factory=lambda: DataDesign(num_steps=8))
    """How campaigns start and how long they are."""

    # --- network and training ---
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Sizes of the policy."""
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    """Learning from the expert."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """GRPO."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """Verifiable rewards."""
    iterations: int = 110
    """GRPO iterations: one batch of campaigns and its gradient steps each."""
    problems_per_iteration: int = 16
    """Campaigns in an iteration."""
    average: float = 0.95
    """Decay of the moving average of the weights over iterations, which is what is written; 0 is
    the last weights.
    """

    # --- bookkeeping ---
    validation_problems: int = 64
    """Problems, apart from those of training, that the averaged policy plays at every checkpoint;
    kinds as in training.
    """
    checkpoint_every: int = 10
    """Iterations between checkpoints."""

    def __post_init__(self):
        settings.validate(self)
        if not 0 <= self.multimodal_share <= 1 or not 0 <= self.average < 1:
            raise ValueError(
                f"multimodal_share = {self.multimodal_share} must be in [0, 1], "
                f"average = {self.average} in [0, 1)"
            )
        if not self.campaign.num_steps:
            raise ValueError("campaign.num_steps = 0 must be at least 1")
        if self.iterations % self.checkpoint_every:
            raise ValueError(
                f"iterations = {self.iterations} must be a multiple of checkpoint_every = "
                f"{self.checkpoint_every}: the curve ends with training"
            )


PRESETS = settings.presets(
    Config,
    smoke=dict(
        campaign=DataDesign(num_steps=3),
        imitation=ImitationConfig(imitation_epochs=2),
        grpo=GRPOConfig(group_size=4),
        iterations=4,
        problems_per_iteration=4,
        validation_problems=4,
        checkpoint_every=2,
    ),
    hour=dict(  # 16 minutes on 2 CPU cores
        campaign=DataDesign(max_obs=200, num_steps=12),
        imitation=ImitationConfig(imitation_epochs=6),
        iterations=200,
        problems_per_iteration=24,
        average=0.98,
    ),
    paper=dict(
        policy=PolicyConfig(policy_hidden_dim=128, policy_n_layers=4),
        campaign=DataDesign(num_steps=30),
        grpo=GRPOConfig(group_size=64, learning_rate=3e-4),
        iterations=5000,
        problems_per_iteration=64,
    ),
)


class TrainState(NamedTuple):
    """Everything that a checkpoint holds: the policy and its optimiser, and its moving average."""

    learner: Learner
    average: AcquisitionPolicyNetwork


class AcquisitionModelResult(NamedTuple):
    """What stage 3 learned: the trained and the cloned policy (without cloning, untrained), every
    metric's curve `[iterations]`, gains on the validation problems `[checkpoints, steps]`, the
    first before GRPO, and the clone's agreement with held-out choices of the expert.
    """

    policy: AcquisitionPolicyNetwork
    cloned: AcquisitionPolicyNetwork
    curves: dict[str, np.ndarray]
    validation: np.ndarray
    validation_metrics: dict[str, float]


@eqx.filter_jit
def draw_batch(key: jax.Array, config: Config, number: int, num_bins: int) -> Problem:
    """`number` problems, the multimodal ones last."""
    count = round(config.multimodal_share * number)
    kinds = ((config.prior, number - count), (multimodal(config.prior), count))
    return joined(
        [
            draw_problems(jr.fold_in(key, i), some, prior, config.campaign, num_bins)
            for i, (prior, some) in enumerate(kinds)
            if some
        ]
    )


@eqx.filter_jit
def iterate(
    key: jax.Array,
    state: TrainState,
    reference: AcquisitionPolicyNetwork,
    surrogate: ParentSetPredictionModel,
    problems: Problem,
    config: Config,
) -> tuple[TrainState, GRPOMetrics]:
    """One GRPO iteration."""
    # a cold start has no clone to stay close to
    kl_weight = config.grpo.kl_weight if config.imitation.use_behavioral_cloning else 0.0
    learner, _, metrics = grpo_iteration(
        key,
        state.learner,
        reference,
        surrogate,
        problems,
        num_steps=config.campaign.num_steps,
        rewards=config.rewards,
        config=replace(config.grpo, kl_weight=kl_weight),
        iterations=config.iterations,
    )
    average = moving_average(state.average, learner.module, config.average)
    return TrainState(learner, average), metrics


def improve(
    config: Config,
    surrogate: ParentSetPredictionModel,
    start: AcquisitionPolicyNetwork,
    progress: Progress | None,
) -> tuple[AcquisitionPolicyNetwork, TrainState, dict[str, np.ndarray]]:
    """GRPO from the policy `start`, or on from a checkpoint: that policy, its features from now on
    clipped to the range that they have on the validation problems, the state at the end, and the
    curve of every metric `[iterations]` and of `validation`, what the averaged policy gains on the
    validation problems `[checkpoints, steps]`, the first before GRPO.
    """
    problem_key, play_key, held_out_key, noise_key = (
        settings.stage_key(config.seed, "policy", use)
        for use in ("problems", "play", "validation", "validation noise")
    )
    num_bins, every = surrogate.config.num_bins, config.checkpoint_every
    held_out = draw_batch(held_out_key, config, config.validation_problems, num_bins)

    def validate(policy: AcquisitionPolicyNetwork) -> tuple[jax.Array, jax.Array]:
        return campaign_gains(noise_key, policy, surrogate, held_out, config.campaign.num_steps)

    def advance(state, step, _):
        draw_key = jr.fold_in(problem_key, step)
        problems = draw_batch(draw_key, config, config.problems_per_iteration, num_bins)
        key = jr.fold_in(play_key, step)
        state, metrics = iterate(key, state, start, surrogate, problems, config)
        record = metrics._asdict()
        if (step + 1) % every == 0:
            record["validation"] = validate(state.average)[0]
        return state, record

    first_gains, span = validate(start)
    start = eqx.tree_at(lambda policy: policy.span, start, span)
    learner = Learner.of(start, grpo_optimiser(config.grpo, config.iterations))
    state, records = train(
        "policy",
        advance,
        TrainState(learner, start),
        config.iterations,
        checkpoint_every=every,
        shown={"gain": "optimization", "entropy": "entropy"},
        progress=progress,
    )
    names = GRPOMetrics._fields
    curves = {name: np.array([one[name] for one in records], np.float32) for name in names}
    gains = [first_gains, *(one["validation"] for one in records if "validation" in one)]
    return start, state, curves | {"validation": np.array(gains, np.float32)}


def train_policy(
    config: Config,
    surrogate: ParentSetPredictionModel,
    examples: AcquisitionTrainingExample | None = None,
    held_out: AcquisitionTrainingExample | None = None,
    progress: Progress | None = None,
) -> AcquisitionModelResult:
    """Clone the expert's choices, then improve by GRPO. The clone's agreement is measured on
    `held_out` examples; without cloning none are needed.

    With `progress`, GRPO goes on where a checkpoint is; cloning is short, and the same again.
    """
    cloning, agreement = config.imitation.use_behavioral_cloning, {}
    clone_key, first_key = (
        settings.stage_key(config.seed, "policy", use)
        for use in ("clone", "warm" if cloning else "cold")
    )
    token_dim = 3 * surrogate.config.model_hidden_dim
    build = eqx.filter_jit(AcquisitionPolicyNetwork)
    start = build(config.policy, token_dim, key=first_key)
    if cloning:
        if examples is None:
            raise ValueError("cloning needs examples, or use_behavioral_cloning=False")
        start = clone(clone_key, start, examples, config.imitation)
        if held_out is not None:
            measured = eqx.filter_jit(clone_loss)(start, held_out)[1]
            agreement = {name: float(value) for name, value in measured._asdict().items()}
            agreement |= {"validation_states": len(held_out.variable)}
            print("clone: " + "  ".join(f"{k} {v:.3f}" for k, v in agreement.items()))
    start, state, curves = improve(config, surrogate, start, progress)
    validation = curves.pop("validation")
    return AcquisitionModelResult(state.average, start, curves, validation, agreement)


def main(config: Config) -> Path:
    """Train the policy on the folder's surrogate and demonstrations, write it and say how it ended;
    returns its path.

    Raises `ArtifactError` if demos.npz or surrogate.eqx is missing or damaged.
    """
    settings.use_compilation_cache(config.folder.parent / "cache")
    demos, inputs = config.folder / "demos.npz", [config.folder / "surrogate.eqx"]
    surrogate, made = load_surrogate(inputs[0])
    config = replace(config, prior=inherit(config.prior, made))
    train = held_out = None
    cloning = config.imitation.use_behavioral_cloning
    if cloning:
        inputs = [demos, *inputs]
        parts = [load_trajectories(demos, part)[0] for part in ("train", "validation")]
        # together: one program
        both = extract_acquisition_training_data(joined(parts), surrogate)
        count = parts[0].variable.size
        train, held_out = (
            jax.tree.map(lambda leaf, rows=rows: leaf[rows], both)
            for rows in (slice(count), slice(count, None))
        )
    progress = Progress(config.folder, "policy", __file__, config, inputs)
    result = train_policy(config, surrogate, train, held_out, progress)

    header: dict[str, Any] = progress.header | {"step": config.iterations}
    curves, path = result.curves | {"validation": result.validation}, config.folder / "curves.npz"
    save(path, curves, stage="curves", **header)
    shape = dict(policy=asdict(config.policy), token_dim=result.policy.token.in_features)
    header |= dict(stage="policy", hyperparameters=shape)
    out, cloned = config.folder / "policy.eqx", config.folder / "bc_policy.eqx"
    cloned.unlink(missing_ok=True)  # of an earlier run, perhaps with a clone
    if cloning:
        save(cloned, result.cloned, metrics=result.validation_metrics, **header)
    last = {f"last_{name}": float(curve[-10:].mean()) for name, curve in result.curves.items()}
    save(out, result.policy, metrics=result.validation_metrics | last, **header)
    progress.finish()
    print("last ten iterations: " + "  ".join(f"{k[5:]} {v:.4f}" for k, v in last.items()))
    return out


if __name__ == "__main__":
    with settings.errors_for_people():
        main(overridable_config_cli(PRESETS, args=settings.preset_arguments(), description=__doc__))
