"""Stage 4: train surrogate and policy together, in turns, on problems of growing difficulty.

- Reads   artifacts/<preset>/surrogate.eqx, policy.eqx
- Writes  artifacts/<preset>/acbo.eqx, and logs/acbo.jsonl beside it
- Time    `small` about 3 minutes on 2 busy CPU cores

    python 04_train_e2e.py small --rounds 100

A round: the policy plays a batch of campaigns on problems of the present difficulty and is updated
by GRPO; the surrogate is then updated on fresh simulations and on the data that the policy has just
collected, cut at a random moment. The surrogate thus learns on what it will be asked about.

Deviations from multi_stage_training.md, stage 3:
1. models are simulated, so the surrogate learns from the true parents and effects of every problem
   instead of from one buffer at a time;
2. both updates use batches of problems and groups of candidates, not one problem and one action.
"""

from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from tqdm import tqdm
from tyro.extras import overridable_config_cli

from lib import settings
from lib.buffer import ExperienceBuffer
from lib.grpo import GRPOConfig, GRPOMetrics, collect_groups, grpo_step
from lib.policy import AcquisitionPolicyNetwork
from lib.problems import (
    CampaignDesign,
    DataDesign,
    Example,
    Problem,
    draw_problems,
    sample_examples,
)
from lib.rewards import RewardConfig
from lib.scm_prior import SCMPrior, inherit
from lib.surrogate import (
    LossWeights,
    ParentSetPredictionModel,
    SurrogateConfig,
    SurrogateLosses,
    surrogate_optimiser,
    surrogate_step,
)
from lib.system import TrainedACBOSystem, load_policy, load_surrogate
from lib.training import Learner, Progress, clipped_adam, filter_scan
from lib.trajectories import ExpertTrajectory


@dataclass(frozen=True)
class Config:
    """Settings of stage 4."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where inputs are read and acbo.eqx is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Distribution of causal models at full difficulty; left at its default, save sizes, it is the
    surrogate's.
    """
    design: DataDesign = field(default_factory=DataDesign)
    """Distribution of simulated data sets for the surrogate."""
    campaign: CampaignDesign = field(default_factory=CampaignDesign)
    """How campaigns start and how long they are."""
    levels: int = 3
    """Levels of difficulty; each lasts an equal share of the rounds, the last of them twice as
    long.
    """

    # --- training ---
    grpo: GRPOConfig = field(default_factory=lambda: GRPOConfig(learning_rate=3e-4))
    """GRPO."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """Verifiable rewards."""
    rounds: int = 80
    """Alternations of policy and surrogate."""
    problems_per_round: int = 16
    """Campaigns in a round."""
    surrogate_steps: int = 6
    """Gradient steps of the surrogate in a round."""
    models_per_step: int = 12
    """Fresh causal models in such a step, two data sets each."""
    surrogate_learning_rate: float = 5e-4
    """Peak learning rate of the surrogate, with cosine decay."""

    # --- bookkeeping ---
    checkpoint_every: int = 5
    """Rounds between checkpoints."""

    def __post_init__(self):
        settings.check(self)


PRESETS = {
    "smoke": (
        "seconds, for CI",
        Config(
            Path("artifacts/smoke"),
            campaign=CampaignDesign(num_steps=3),
            grpo=GRPOConfig(group_size=4),
            levels=1,
            rounds=3,
            problems_per_round=4,
            surrogate_steps=2,
            models_per_step=4,
            checkpoint_every=2,
        ),
    ),
    "small": ("about 3 minutes on 2 busy CPU cores", Config()),
    "hour": (
        "at most 60 minutes on 2 CPU cores",
        Config(Path("artifacts/hour"), prior=SCMPrior(max_vars=12, max_size=12), rounds=600),
    ),
    "paper": (
        "sizes of the design documents, for one GPU",
        Config(
            Path("artifacts/paper"),
            prior=SCMPrior(max_vars=20, max_size=20),
            campaign=CampaignDesign(num_steps=30),
            grpo=GRPOConfig(group_size=64, learning_rate=1e-4),
            rounds=5000,
            problems_per_round=64,
            models_per_step=64,
        ),
    ),
}


class TrainState(NamedTuple):
    """Everything that a checkpoint holds."""

    surrogate: Learner
    policy: Learner


def adjust_difficulty(step: int, config: Config = Config()) -> tuple[SCMPrior, CampaignDesign]:
    """Problems of round `step`: small linear systems with many rows first, the whole distribution
    at the last level (multi_stage_training.md).

    Each level has one program: within it nothing depends on `step`.
    """
    level = min(step * (config.levels + 1) // config.rounds, config.levels - 1)
    if level == config.levels - 1:
        return config.prior, config.campaign
    share, prior, campaign = (level + 1) / config.levels, config.prior, config.campaign
    easier = replace(
        prior,
        max_size=prior.min_size + round(share * (prior.max_size - prior.min_size)),
        mechanisms=prior.mechanisms[:1] if level == 0 else prior.mechanisms,
        max_noise=max(prior.min_noise, share * prior.max_noise),
    )
    min_obs = round(campaign.max_obs * (1 - share)) + round(share * campaign.min_obs)
    return easier, replace(campaign, min_obs=min_obs)


def make_optimisers(
    config: Config,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Optimisers of the surrogate and of the policy, with cosine decay to zero."""
    decay, rounds, grpo = optax.cosine_decay_schedule, config.rounds, config.grpo
    surrogate = decay(config.surrogate_learning_rate, rounds * config.surrogate_steps)
    policy = decay(grpo.learning_rate, rounds * grpo.grpo_epochs)
    return surrogate_optimiser(surrogate), clipped_adam(policy)


@eqx.filter_jit
def improve_policy(
    key: jax.Array,
    state: TrainState,
    reference: AcquisitionPolicyNetwork,
    problems: Problem,
    config: Config,
) -> tuple[TrainState, ExperienceBuffer, GRPOMetrics]:
    """A campaign of the present policy on each problem, and the GRPO steps on their groups; returns
    the final buffers `[problems]` too.
    """
    num_steps, (_, optimiser) = config.campaign.num_steps, make_optimisers(config)
    surrogate, policy = state.surrogate.module, state.policy.module
    groups, buffers = collect_groups(
        key, surrogate, policy, problems, num_steps, config.rewards, config.grpo
    )
    learner, metrics = grpo_step(state.policy, optimiser, reference, groups, config.grpo)
    return TrainState(state.surrogate, learner), buffers, metrics


def collected_examples(
    key: jax.Array, problems: Problem, buffers: ExperienceBuffer, capacity: int
) -> Example:
    """The campaigns' data, each cut at a random moment, as training examples for the surrogate."""

    def one(key, scm, truth, buffer):
        first = (buffer.observational & buffer.valid).sum()
        cut = buffer.first(jr.randint(key, (), first, buffer.size + 1))
        room = capacity - buffer.valid.shape[0]
        return Example(cut.grow(room), scm.task, truth.parents, truth.effects)

    keys = jr.split(key, buffers.valid.shape[0])
    return jax.vmap(one)(keys, problems.scm, problems.truth, buffers)


@eqx.filter_jit
def improve_surrogate(
    key: jax.Array, state: TrainState, problems: Problem, buffers: ExperienceBuffer, config: Config
) -> tuple[TrainState, SurrogateLosses]:
    """`surrogate_steps` gradient steps on fresh simulations and on the collected data."""
    optimiser, _ = make_optimisers(config)
    num_bins = state.surrogate.module.config.num_bins

    def step(learner, key):
        fresh_key, cut_key = jr.split(key)
        fresh = jax.vmap(lambda k: sample_examples(k, config.prior, config.design, num_bins))(
            jr.split(fresh_key, config.models_per_step)
        )
        fresh = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), fresh)
        collected = collected_examples(cut_key, problems, buffers, fresh.buffer.valid.shape[1])
        examples = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), fresh, collected)
        return surrogate_step(learner, optimiser, [examples], None, LossWeights())

    keys = jr.split(key, config.surrogate_steps)
    learner, losses = filter_scan(step, state.surrogate, keys)
    return TrainState(learner, state.policy), jax.tree.map(jnp.mean, losses)


def train_end_to_end(
    surrogate_params: ParentSetPredictionModel,
    acquisition_params: AcquisitionPolicyNetwork,
    num_steps: int,
    *,
    config: Config | None = None,
    progress: Progress | None = None,
) -> tuple[TrainedACBOSystem, dict[str, float]]:
    """Both models in turns for `num_steps` rounds (multi_stage_training.md, stage 3), or on from a
    checkpoint; the system, and what the last round logged.
    """
    config = replace(config or Config(), rounds=num_steps)
    keys = [settings.stage_key(config.seed, "acbo", u) for u in ("problems", "play", "surrogate")]
    models = surrogate_params, acquisition_params
    state = TrainState(*map(Learner.of, models, make_optimisers(config)))
    state, start = progress.resume(state) if progress else (state, 0)
    num_bins, record = surrogate_params.config.num_bins, {}
    bar = tqdm(range(start, num_steps), "end to end", initial=start, total=num_steps)
    for step in bar:
        problem_key, play_key, surrogate_key = (jr.fold_in(key, step) for key in keys)
        prior, campaign = adjust_difficulty(step, config)
        problems = draw_problems(problem_key, config.problems_per_round, prior, campaign, num_bins)
        state, buffers, metrics = improve_policy(
            play_key, state, acquisition_params, problems, config
        )
        state, losses = improve_surrogate(surrogate_key, state, problems, buffers, config)
        record = {k: float(v) for k, v in (metrics._asdict() | losses._asdict()).items()}
        if progress:
            kept = (step + 1) % config.checkpoint_every == 0 and step + 1 < num_steps
            progress.keep(step + 1, {"largest": prior.max_size} | record, state if kept else None)
        bar.set_postfix(reward=f"{record['reward']:.3f}", nll=f"{record['parent_nll']:.3f}")
    return TrainedACBOSystem(state.surrogate.module, state.policy.module), record


def train_complete_acbo_system(
    expert_trajectories: tuple[ExpertTrajectory, ExpertTrajectory],
    surrogate_config: SurrogateConfig,
    acquisition_config,
    training_config,
    *,
    config: Config | None = None,
) -> TrainedACBOSystem:
    """Stages 2 to 4 on demonstrations, of training and held out, without files
    (phase4_training_infrastructure.md). The configs are an `AcquisitionConfig` and a
    `TrainingConfig`, of stages 3 and 2.
    """
    stage_2, stage_3 = map(import_module, ("02_train_surrogate", "03_warmstart_acquisition"))
    surrogate = stage_2.train_surrogate_component(
        expert_trajectories[0], surrogate_config, training_config=training_config
    ).model
    policy = stage_3.train_acquisition_component(
        expert_trajectories, surrogate, acquisition_config
    ).policy
    config = config or Config()
    return train_end_to_end(surrogate, policy, config.rounds, config=config)[0]


def main(config: Config) -> Path:
    """Train both models of the folder, write the system; returns its path."""
    settings.use_compilation_cache(config.folder.parent / "cache")
    inputs = [config.folder / "surrogate.eqx", config.folder / "policy.eqx"]
    (surrogate, header), (policy, _) = load_surrogate(inputs[0]), load_policy(inputs[1])
    config = replace(config, prior=inherit(config.prior, header))
    progress = Progress(config.folder, "acbo", __file__, config, inputs)
    system, record = train_end_to_end(
        surrogate, policy, config.rounds, config=config, progress=progress
    )
    out = config.folder / "acbo.eqx"
    made = dict(seed=config.seed, step=config.rounds, parents=inputs, metrics=record)
    system.save(out, config=asdict(config), **made)
    progress.finish()
    return out


if __name__ == "__main__":
    with settings.errors_for_people():
        main(overridable_config_cli(PRESETS, args=settings.preset_arguments(), description=__doc__))
