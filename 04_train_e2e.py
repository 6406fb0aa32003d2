"""Stage 4: train surrogate and policy together, in turns, on problems of growing difficulty.

- Reads   artifacts/<preset>/surrogate.eqx, policy.eqx
- Writes  artifacts/<preset>/acbo.eqx, and logs/acbo.jsonl beside it
- Time    `small` about 4 minutes on 2 idle CPU cores

    python 04_train_e2e.py small --rounds 100

A round: the policy plays a batch of campaigns on problems of the present difficulty and is updated
by GRPO; the surrogate is then updated on fresh simulations and on the data that the policy has just
collected, cut at a random moment. The surrogate thus learns on what it will be asked about.

Departures from multi_stage_training.md, stage 3:
1. models are simulated, so the surrogate learns from the true parents and effects of every problem
   instead of from one buffer at a time;
2. both updates use batches of problems and groups of candidates, not one problem and one action.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from tyro.extras import overridable_config_cli

from lib import settings
from lib.buffer import ExperienceBuffer
from lib.grpo import GRPOConfig, grpo_iteration, grpo_optimiser
from lib.policy import AcquisitionPolicyNetwork
from lib.problems import DATA, DataDesign, Problem, draw_problems
from lib.rewards import RewardConfig
from lib.scm_prior import WORLD, SCMPrior, inherit
from lib.surrogate import (
    LossWeights,
    ParentSetPredictionModel,
    SurrogateLosses,
    surrogate_optimiser,
    surrogate_step,
)
from lib.system import TrainedACBOSystem, load_policy, load_surrogate
from lib.training import Learner, Progress, joined, train


@dataclass(frozen=True)
class Config:
    """Settings of stage 4."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where inputs are read and acbo.eqx is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=lambda: SCMPrior(**WORLD))
    """Distribution of causal models at full difficulty; left at its default, save sizes and shares,
    it is the surrogate's.
    """
    design: DataDesign = field(
        default_factory=lambda: DataDesign(
            min_obs=10, max_obs=200, per_variable=0, max_interventions=36, **DATA
        )
    )
    """Distribution of simulated data sets for the surrogate."""
    campaign: DataDesign = field(default_factory=lambda: DataDesign(num_steps=8))
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
        settings.validate(self)
        if not self.campaign.num_steps:
            raise ValueError("campaign.num_steps = 0 must be at least 1")


PRESETS = settings.presets(
    Config,
    smoke=dict(
        campaign=DataDesign(num_steps=3),
        grpo=GRPOConfig(group_size=4),
        levels=1,
        rounds=3,
        problems_per_round=4,
        surrogate_steps=2,
        models_per_step=4,
        checkpoint_every=2,
    ),
    hour=dict(rounds=600),
    paper=dict(
        campaign=DataDesign(num_steps=30),
        grpo=GRPOConfig(group_size=64, learning_rate=1e-4),
        rounds=5000,
        problems_per_round=64,
        models_per_step=64,
    ),
)


class TrainState(NamedTuple):
    """Everything that a checkpoint holds."""

    surrogate: Learner
    policy: Learner


def adjust_difficulty(step: int, config: Config = Config()) -> tuple[SCMPrior, DataDesign]:
    """Problems of round `step`: small linear systems with many rows first, the whole distribution
    at the last level (multi_stage_training.md).

    Each level has one program: within it nothing depends on `step`.
    """
    level = min(step * (config.levels + 1) // config.rounds, config.levels - 1)
    share, campaign = (level + 1) / config.levels, config.campaign
    prior = replace(config.prior, inert=0.0)  # where nothing can be gained no experiment can earn
    if share == 1.0:
        return prior, campaign
    easier = replace(
        prior,
        max_size=prior.min_size + round(share * (prior.max_size - prior.min_size)),
        mechanisms=prior.mechanisms[:1] if level == 0 else prior.mechanisms,
        max_noise=max(prior.min_noise, share * prior.max_noise),
    )
    min_obs = round(campaign.max_obs * (1 - share)) + round(share * campaign.min_obs)
    return easier, replace(campaign, min_obs=min_obs)


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """The surrogate's, with cosine decay to zero."""
    steps = config.rounds * config.surrogate_steps
    return surrogate_optimiser(optax.cosine_decay_schedule(config.surrogate_learning_rate, steps))


improve_policy = eqx.filter_jit(grpo_iteration)


@eqx.filter_jit
def improve_surrogate(
    key: jax.Array, learner: Learner, problems: Problem, buffers: ExperienceBuffer, config: Config
) -> tuple[Learner, SurrogateLosses]:
    """`surrogate_steps` gradient steps on fresh simulations and on the campaigns' data, each cut at
    a random moment.
    """
    optimiser, design = make_optimiser(config), config.design
    room = design.capacity(config.prior.max_vars) - buffers.valid.shape[1]

    def cut(key, buffer):
        known = jr.randint(key, (), buffer.observational.sum(), buffer.size + 1)
        return buffer.first(known).grow(room)

    def step(learner, key):
        fresh_key, cut_key = jr.split(key)
        number, num_bins = config.models_per_step, learner.module.config.num_bins
        fresh = draw_problems(fresh_key, number, config.prior, design, num_bins, data_sets=2)
        known = jax.vmap(cut)(jr.split(cut_key, len(buffers.valid)), buffers)
        both = joined([fresh, problems._replace(buffer=known)])
        return surrogate_step(learner, optimiser, [both], None, LossWeights())

    keys = jr.split(key, config.surrogate_steps)
    learner, losses = jax.lax.scan(step, learner, keys)
    return learner, jax.tree.map(jnp.mean, losses)


def train_end_to_end(
    surrogate_params: ParentSetPredictionModel,
    acquisition_params: AcquisitionPolicyNetwork,
    num_steps: int,
    *,
    config: Config = Config(),
    progress: Progress | None = None,
) -> tuple[TrainedACBOSystem, dict[str, float]]:
    """Both models in turns for `num_steps` rounds (multi_stage_training.md, stage 3), or on from a
    checkpoint; the system, and what the last round logged.
    """
    config = replace(config, rounds=num_steps)
    keys = [settings.stage_key(config.seed, "acbo", u) for u in ("problems", "play", "surrogate")]
    num_bins = surrogate_params.config.num_bins

    def advance(state, step, _):
        problem_key, play_key, surrogate_key = (jr.fold_in(key, step) for key in keys)
        prior, campaign = adjust_difficulty(step, config)
        problems = draw_problems(problem_key, config.problems_per_round, prior, campaign, num_bins)
        policy, buffers, metrics = improve_policy(
            play_key,
            state.policy,
            acquisition_params,
            state.surrogate.module,
            problems,
            num_steps=config.campaign.num_steps,
            rewards=config.rewards,
            config=config.grpo,
            iterations=config.rounds,
        )
        surrogate, losses = improve_surrogate(
            surrogate_key, state.surrogate, problems, buffers, config
        )
        record = {"largest": prior.max_size, **metrics._asdict(), **losses._asdict()}
        return TrainState(surrogate, policy), record

    state = TrainState(
        Learner.of(surrogate_params, make_optimiser(config)),
        Learner.of(acquisition_params, grpo_optimiser(config.grpo, config.rounds)),
    )
    state, records = train(
        "end to end",
        advance,
        state,
        config.rounds,
        checkpoint_every=config.checkpoint_every,
        shown={"reward": "reward", "nll": "parent_nll"},
        progress=progress,
    )
    return TrainedACBOSystem(state.surrogate.module, state.policy.module), records[-1]


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
    metrics = {name: value for name, value in record.items() if name not in ("step", "largest")}
    system.save(out, step=config.rounds, metrics=metrics, **progress.header)
    progress.finish()
    return out


if __name__ == "__main__":
    with settings.errors_for_people():
        main(overridable_config_cli(PRESETS, args=settings.preset_arguments(), description=__doc__))
