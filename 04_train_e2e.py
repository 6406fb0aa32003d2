"""Stage 4: train surrogate and policy together, in turns, on problems of growing difficulty.

- Reads   artifacts/<preset>/surrogate.eqx, policy.eqx
- Writes  artifacts/<preset>/acbo.eqx, and logs/e2e.jsonl beside it
- Time    `small` about 3 minutes on 2 busy CPU cores.

    python 04_train_e2e.py small --rounds 100

A round: the policy plays a batch of campaigns on problems of the present difficulty and is updated
by GRPO; the surrogate is then updated on fresh simulations and on the data that the policy has just
collected, cut at a random moment. The surrogate thus learns on what it will be asked about.

Deviations from multi_stage_training.md, stage 3:
1. models are simulated, so the surrogate learns from the true parents and effects of every problem
   instead of from one buffer at a time;
2. both updates use batches of problems and groups of candidates, not one problem and one action.
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from tqdm import tqdm

from lib.artifacts import TrainingLog, fingerprint, load_checkpoint, save_checkpoint
from lib.buffer import ExperienceBuffer
from lib.config import (
    check_settings,
    errors_for_people,
    preset_arguments,
    stage_key,
    use_compilation_cache,
)
from lib.grpo import (
    CampaignDesign,
    Groups,
    GRPOConfig,
    Problem,
    Simulator,
    collect_campaign,
    draw_problems,
    update_acquisition_grpo,
)
from lib.policy import AcquisitionPolicyNetwork
from lib.rewards import RewardConfig
from lib.scm_prior import DataDesign, Example, SCMPrior, sample_examples
from lib.surrogate import LossWeights, surrogate_optimiser, update_surrogate
from lib.system import TrainedACBOSystem, load_policy, load_surrogate


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
    """Distribution of causal models at full difficulty."""
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
    effect_weight: float = 1.0
    """Weight of the effect head's NLL."""

    # --- bookkeeping ---
    checkpoint_every: int = 5
    """Rounds between checkpoints."""

    def __post_init__(self):
        check_settings(self)


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


class TrainState(eqx.Module):
    """Everything that a checkpoint holds."""

    system: TrainedACBOSystem
    surrogate_optimiser: optax.OptState
    policy_optimiser: optax.OptState


def adjust_difficulty(step: int, config: Config) -> tuple[SCMPrior, CampaignDesign]:
    """Problems of round `step`: small linear systems with many rows first, the whole distribution
    at the last level (multi_stage_training.md).

    Each level has one program: within it nothing depends on `step`.
    """
    level = min(step * (config.levels + 1) // config.rounds, config.levels - 1)
    if level == config.levels - 1:
        return config.prior, config.campaign
    share = (level + 1) / config.levels
    largest = config.prior.min_size + round(share * (config.prior.max_size - config.prior.min_size))
    mechanisms = config.prior.mechanisms[:1] if level == 0 else config.prior.mechanisms
    prior = replace(
        config.prior,
        max_size=largest,
        mechanisms=mechanisms,
        max_noise=max(config.prior.min_noise, share * config.prior.max_noise),
    )
    return prior, replace(
        config.campaign,
        min_obs=round(config.campaign.max_obs * (1 - share))
        + round(share * config.campaign.min_obs),
    )


def make_optimisers(
    config: Config,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Optimisers of the surrogate and of the policy."""
    surrogate = optax.cosine_decay_schedule(
        config.surrogate_learning_rate, config.rounds * config.surrogate_steps
    )
    policy = optax.cosine_decay_schedule(
        config.grpo.learning_rate, config.rounds * config.grpo.grpo_epochs
    )
    return (
        surrogate_optimiser(surrogate),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(policy)),
    )


@eqx.filter_jit
def play(
    key: jax.Array, system: TrainedACBOSystem, problems: Problem, config: Config
) -> tuple[Groups, ExperienceBuffer]:
    """Campaigns with the present policy: groups `[problems * steps]`, final buffers
    `[problems]`.
    """

    def one(key, problem):
        simulator = Simulator(system.surrogate, problem.scm, problem.truth, config.rewards)
        return collect_campaign(
            key, simulator, system.policy, problem.buffer, config.campaign.num_steps, config.grpo
        )

    groups, buffers = jax.vmap(one)(jr.split(key, config.problems_per_round), problems)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups), buffers


@eqx.filter_jit
def train_acquisition_component(
    state: TrainState, reference: AcquisitionPolicyNetwork, groups: Groups, config: Config
):
    """GRPO steps of the policy on the groups of a round."""
    _, optimiser = make_optimisers(config)
    policy, optimiser_state, metrics = update_acquisition_grpo(
        state.system.policy,
        state.policy_optimiser,
        optimiser,
        reference,
        groups,
        config.grpo,
        config.grpo.kl_weight,
    )
    return TrainState(
        TrainedACBOSystem(state.system.surrogate, policy),
        state.surrogate_optimiser,
        optimiser_state,
    ), metrics


def collected_examples(
    key: jax.Array, problems: Problem, buffers: ExperienceBuffer, capacity: int
) -> Example:
    """The campaigns' data, each cut at a random moment, as training examples for the surrogate."""

    def one(key, scm, truth, buffer):
        rows = jnp.arange(buffer.valid.shape[0])
        first = (buffer.observational & buffer.valid).sum()
        kept = buffer.valid & (rows < jr.randint(key, (), first, buffer.size + 1))
        cut = ExperienceBuffer(
            jnp.where(kept[:, None], buffer.values, 0.0), buffer.intervened & kept[:, None], kept
        )
        return Example(cut.grow(capacity - rows.shape[0]), scm.task, truth.parents, truth.effects)

    keys = jr.split(key, buffers.valid.shape[0])
    return jax.vmap(one)(keys, problems.scm, problems.truth, buffers)


@eqx.filter_jit
def train_surrogate_component(
    key: jax.Array, state: TrainState, problems: Problem, buffers: ExperienceBuffer, config: Config
):
    """`surrogate_steps` gradient steps on fresh simulations and on the collected data."""
    optimiser, _ = make_optimisers(config)
    weights = LossWeights(effects=config.effect_weight)
    dynamic, static = eqx.partition(
        (state.system.surrogate, state.surrogate_optimiser), eqx.is_array
    )

    def step(dynamic, key):
        surrogate, optimiser_state = eqx.combine(dynamic, static)
        fresh_key, cut_key = jr.split(key)
        keys = jr.split(fresh_key, config.models_per_step)
        fresh = jax.vmap(
            lambda k: sample_examples(k, config.prior, config.design, surrogate.config.num_bins)
        )(keys)
        fresh = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), fresh)
        collected = collected_examples(cut_key, problems, buffers, fresh.buffer.valid.shape[1])
        examples = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), fresh, collected)
        surrogate, optimiser_state, losses = update_surrogate(
            surrogate, optimiser_state, optimiser, [examples], None, weights
        )
        return eqx.filter((surrogate, optimiser_state), eqx.is_array), losses

    dynamic, losses = jax.lax.scan(step, dynamic, jr.split(key, config.surrogate_steps))
    surrogate, optimiser_state = eqx.combine(dynamic, static)
    state = TrainState(
        TrainedACBOSystem(surrogate, state.system.policy), optimiser_state, state.policy_optimiser
    )
    return state, jax.tree.map(jnp.mean, losses)


def main(config: Config) -> Path:
    """Train both, write the system; returns its path."""
    use_compilation_cache(config.folder.parent / "cache")
    inputs = [config.folder / "surrogate.eqx", config.folder / "policy.eqx"]
    out, checkpoint_path = config.folder / "acbo.eqx", config.folder / "acbo.ckpt"
    problem_key, play_key, surrogate_key = (
        stage_key(config.seed, "acbo", use) for use in ("problems", "play", "surrogate")
    )

    # --- read; build, or continue ---
    (surrogate, _), (policy, _) = load_surrogate(inputs[0]), load_policy(inputs[1])
    optimisers = make_optimisers(config)
    state = TrainState(
        TrainedACBOSystem(surrogate, policy),
        optimisers[0].init(eqx.filter(surrogate, eqx.is_array)),
        optimisers[1].init(eqx.filter(policy, eqx.is_array)),
    )
    mark = fingerprint(__file__, config, inputs)
    resumed = load_checkpoint(checkpoint_path, state, mark)
    state, start = resumed if resumed else (state, 0)

    # --- train in turns ---
    log, record = TrainingLog(config.folder / "logs" / "e2e.jsonl", start), {}
    with tqdm(
        total=config.rounds, initial=start, desc="end to end", unit="round", mininterval=2
    ) as bar:
        for step in range(start, config.rounds):
            prior, campaign = adjust_difficulty(step, config)
            problems = draw_problems(
                jr.fold_in(problem_key, step),
                config.problems_per_round,
                prior,
                campaign,
                surrogate.config.num_bins,
            )
            groups, buffers = play(jr.fold_in(play_key, step), state.system, problems, config)
            state, metrics = train_acquisition_component(state, policy, groups, config)
            state, losses = train_surrogate_component(
                jr.fold_in(surrogate_key, step), state, problems, buffers, config
            )
            record = {
                name: float(np.asarray(value))
                for name, value in (metrics._asdict() | losses._asdict()).items()
            }
            log.write(step=step + 1, largest=prior.max_size, **record)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.rounds:
                save_checkpoint(checkpoint_path, state, fingerprint=mark, step=step + 1)
            bar.update()
            bar.set_postfix(
                reward=f"{record['reward']:.3f}",
                nll=f"{record['parent_nll']:.3f}",
                vars=prior.max_size,
            )

    # --- write ---
    state.system.save(
        out,
        config=asdict(config),
        seed=config.seed,
        step=config.rounds,
        parents=inputs,
        metrics=record,
    )
    checkpoint_path.unlink(missing_ok=True)
    return out


if __name__ == "__main__":
    with errors_for_people():
        main(
            tyro.extras.overridable_config_cli(
                PRESETS, args=preset_arguments(sys.argv[1:]), description=__doc__
            )
        )
