"""Stage 3: clone the expert's choices, then improve the policy by GRPO with verifiable rewards; a cold-started twin runs beside it.

- Reads   artifacts/<preset>/demos.npz, surrogate.eqx
- Writes  artifacts/<preset>/policy.eqx (trained), bc_policy.eqx (cloned only), curves.npz, and logs/policy.jsonl beside them
- Time    `small` about 4 minutes on 2 CPU cores.

    python 03_warmstart_acquisition.py small --iterations 200

The cold start sees the same problems, noise and random keys as the warm start and differs in its first weights and in having no reference policy.
What is logged per GRPO iteration, for both: `reward` (mean total), `entropy` and `kl` in nats, `dead_groups` (share without signal), `clipped` (share
of ratios outside the clip). Deviations from textbook GRPO are numbered in lib/grpo.py.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from tqdm import tqdm

from lib.artifacts import TrainingLog, fingerprint, load_checkpoint, save_arrays, save_checkpoint, save_module
from lib.config import errors_for_people, preset_arguments, use_compilation_cache
from lib.grpo import CampaignDesign, GRPOConfig, GRPOMetrics, Problem, collect_campaign, draw_problems, update_acquisition_grpo
from lib.policy import AcquisitionPolicyNetwork, PolicyConfig
from lib.rewards import RewardConfig
from lib.scm_prior import SCMPrior
from lib.surrogate import ParentSetPredictionModel
from lib.system import load_surrogate
from lib.trajectories import AcquisitionExamples, extract_acquisition_training_data, join, load_trajectories


@dataclass(frozen=True)
class ImitationConfig:
    """Cloning (`ImitationConfig` of phase4_training_infrastructure.md)."""

    imitation_epochs: int = 20
    """Passes over the demonstrations."""
    imitation_batch: int = 64
    """Expert states in a step."""
    surface_weight: float = 0.5
    """Share of the target that is the expert's acquisition surface, normalised; the rest is its choice."""
    learning_rate: float = 2e-3
    """Learning rate of Adam while cloning."""


@dataclass(frozen=True)
class Config:
    """Settings of stage 3."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where inputs are read and the policy is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Distribution of causal models."""
    campaign: CampaignDesign = field(default_factory=CampaignDesign)
    """How campaigns start and how long they are."""

    # --- network and training ---
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Sizes of the policy."""
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    """Cloning."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """GRPO."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """Verifiable rewards."""
    iterations: int = 90
    """GRPO iterations: one batch of campaigns and its gradient steps each."""
    problems_per_iteration: int = 16
    """Campaigns in an iteration."""

    # --- bookkeeping ---
    checkpoint_every: int = 10
    """Iterations between checkpoints."""


PRESETS = {
    "smoke": (
        "seconds, for CI",
        Config(
            Path("artifacts/smoke"),
            campaign=CampaignDesign(num_steps=3),
            imitation=ImitationConfig(imitation_epochs=2),
            grpo=GRPOConfig(group_size=4),
            iterations=4,
            problems_per_iteration=4,
            checkpoint_every=2,
        ),
    ),
    "small": ("about 4 minutes on 2 CPU cores", Config()),
    "hour": (
        "at most 60 minutes on 2 CPU cores",
        Config(Path("artifacts/hour"), prior=SCMPrior(max_vars=12, max_size=12), grpo=GRPOConfig(group_size=16), iterations=500),
    ),
    "paper": (
        "sizes of the design documents, for one GPU",
        Config(
            Path("artifacts/paper"),
            prior=SCMPrior(max_vars=20, max_size=20),
            policy=PolicyConfig(policy_hidden_dim=128, policy_n_layers=4),
            campaign=CampaignDesign(num_steps=30),
            grpo=GRPOConfig(group_size=64, learning_rate=3e-4),
            iterations=5000,
            problems_per_iteration=64,
        ),
    ),
}


class Twins(eqx.Module):
    """Warm and cold policy, stacked along a leading axis of two, with their optimisers; a checkpoint holds this and the curves so far."""

    policy: AcquisitionPolicyNetwork
    optimiser: optax.OptState
    curves: GRPOMetrics


class CloneMetrics(NamedTuple):
    """Agreement with the expert on held-out demonstrations, as shares, and the cloning loss in nats."""

    loss: jax.Array
    variable_agreement: jax.Array
    value_agreement: jax.Array


# --- cloning ---


def clone_loss(policy: AcquisitionPolicyNetwork, examples: AcquisitionExamples, surface_weight: float) -> tuple[jax.Array, CloneMetrics]:
    """Cross-entropy to the expert's choice and to its normalised acquisition surface."""

    def per_state(example):
        distribution = policy(example.state)
        log_probs = jnp.where(example.state.task.candidates[:, None], distribution.logits, 0.0)
        index = distribution.cell(example.variable, example.value)
        total = example.surface.sum()
        share = example.surface / jnp.where(total > 0, total, 1.0)
        weight = jnp.where(total > 0, surface_weight, 0.0)  # where the expert expects no improvement anywhere, only its choice is left
        loss = -(1 - weight) * log_probs[example.variable, index] - weight * (share * log_probs).sum()
        variable, value = distribution.mode()
        width = (example.state.task.high - example.state.task.low)[variable]
        same = variable == example.variable
        return loss, same, same & (jnp.abs(value - example.value) <= 0.1 * width)

    loss, same_variable, same_value = jax.vmap(per_state)(examples)
    metrics = CloneMetrics(loss.mean(), same_variable.mean(), same_value.sum() / jnp.maximum(same_variable.sum(), 1))
    return metrics.loss, metrics


@eqx.filter_jit
def clone(key: jax.Array, policy: AcquisitionPolicyNetwork, examples: AcquisitionExamples, config: ImitationConfig) -> AcquisitionPolicyNetwork:
    """Behavioural cloning: all epochs in one program."""
    count = examples.variable.shape[0]
    batch = min(config.imitation_batch, count)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    dynamic, static = eqx.partition((policy, optimiser.init(eqx.filter(policy, eqx.is_array))), eqx.is_array)

    def step(dynamic, rows):
        policy, state = eqx.combine(dynamic, static)
        chosen = jax.tree.map(lambda leaf: leaf[rows], examples)
        (_, _), gradients = eqx.filter_value_and_grad(clone_loss, has_aux=True)(policy, chosen, config.surface_weight)
        updates, state = optimiser.update(gradients, state, eqx.filter(policy, eqx.is_array))
        return eqx.filter((eqx.apply_updates(policy, updates), state), eqx.is_array), None

    orders = jax.vmap(lambda k: jr.permutation(k, count))(jr.split(key, config.imitation_epochs))
    rows = orders[:, : count // batch * batch].reshape(-1, batch)
    dynamic, _ = jax.lax.scan(step, dynamic, rows)
    return eqx.combine(dynamic, static)[0]


# --- GRPO ---


def make_optimiser(config: Config) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.grpo.learning_rate, config.iterations * config.grpo.grpo_epochs)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@eqx.filter_jit
def iterate(
    key: jax.Array,
    twins: Twins,
    references: AcquisitionPolicyNetwork,
    surrogate: ParentSetPredictionModel,
    problems: Problem,
    index: jax.Array,
    config: Config,
) -> Twins:
    """One GRPO iteration of both twins on the same problems with the same keys."""
    keys = jr.split(key, config.problems_per_iteration)

    def one_twin(policy, optimiser_state, reference, kl_weight):
        def play(key, problem):
            return collect_campaign(
                key,
                surrogate,
                policy,
                problem.scm,
                problem.truth,
                problem.buffer,
                num_steps=config.campaign.num_steps,
                group_size=config.grpo.group_size,
                rewards=config.rewards,
            )[0]

        groups = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.vmap(play)(keys, problems))
        return update_acquisition_grpo(policy, optimiser_state, make_optimiser(config), reference, groups, config.grpo, kl_weight)

    weights = jnp.array([config.grpo.kl_weight, 0.0])
    policy, optimiser_state, metrics = eqx.filter_vmap(one_twin)(twins.policy, twins.optimiser, references, weights)
    curves = jax.tree.map(lambda curve, now: curve.at[:, index].set(now), twins.curves, metrics)
    return Twins(policy, optimiser_state, curves)


def stack(first: AcquisitionPolicyNetwork, second: AcquisitionPolicyNetwork) -> AcquisitionPolicyNetwork:
    """Two policies along a new leading axis."""
    return jax.tree.map(lambda a, b: jnp.stack([a, b]) if eqx.is_array(a) else a, first, second)


def main(config: Config) -> Path:
    """Clone, improve, write; returns the policy's path."""
    use_compilation_cache(config.folder.parent / "cache")
    demos_path, surrogate_path = config.folder / "demos.npz", config.folder / "surrogate.eqx"
    out, checkpoint_path = config.folder / "policy.eqx", config.folder / "policy.ckpt"
    warm_key, cold_key, clone_key, problem_key, play_key = jr.split(jr.key(config.seed), 5)

    # --- read ---
    surrogate, _ = load_surrogate(surrogate_path)
    parts = [load_trajectories(demos_path, part)[0] for part in ("train", "validation")]
    examples = extract_acquisition_training_data(join(parts), surrogate)
    count = parts[0].variable.size
    train, validation = (jax.tree.map(lambda leaf, r=rows: leaf[r], examples) for rows in (slice(None, count), slice(count, None)))

    # --- clone (deterministic and short, so a resumed run repeats it) ---
    token_dim, build = 3 * surrogate.config.model_hidden_dim, eqx.filter_jit(AcquisitionPolicyNetwork)
    cloned = clone(clone_key, build(config.policy, token_dim, key=warm_key), train, config.imitation)
    _, agreement = eqx.filter_jit(clone_loss)(cloned, validation, config.imitation.surface_weight)
    agreement = {name: float(value) for name, value in agreement._asdict().items()} | {"validation_states": len(validation.variable)}
    print("cloned: " + "  ".join(f"{name} {value:.3f}" for name, value in agreement.items()))

    # --- build, or continue ---
    references = stack(cloned, build(config.policy, token_dim, key=cold_key))
    optimiser_state = eqx.filter_vmap(lambda policy: make_optimiser(config).init(eqx.filter(policy, eqx.is_array)))(references)
    nothing = jnp.zeros((2, config.iterations))
    twins = Twins(references, optimiser_state, GRPOMetrics(*[nothing] * len(GRPOMetrics._fields)))
    mark = fingerprint(config, [demos_path, surrogate_path])
    resumed = load_checkpoint(checkpoint_path, twins, mark)
    twins, start = resumed if resumed else (twins, 0)

    # --- improve ---
    log = TrainingLog(config.folder / "logs" / "policy.jsonl", start)
    num_bins = surrogate.config.num_bins
    with tqdm(total=config.iterations, initial=start, desc="policy", unit="iteration", mininterval=2) as bar:
        for step in range(start, config.iterations):
            problems = draw_problems(jr.fold_in(problem_key, step), config.problems_per_iteration, config.prior, config.campaign, num_bins)
            twins = iterate(jr.fold_in(play_key, step), twins, references, surrogate, problems, jnp.array(step), config)
            now = {name: np.asarray(curve[:, step]) for name, curve in twins.curves._asdict().items()}
            log.write(step=step + 1, **{f"{twin}_{name}": float(v[i]) for name, v in now.items() for i, twin in enumerate(("warm", "cold"))})
            if (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(checkpoint_path, twins, fingerprint=mark, step=step + 1)
            bar.update()
            bar.set_postfix(warm=f"{now['reward'][0]:.3f}", cold=f"{now['reward'][1]:.3f}", entropy=f"{now['entropy'][0]:.2f}")

    # --- write ---
    header: dict[str, Any] = dict(config=asdict(config), seed=config.seed, step=config.iterations, parents=[demos_path, surrogate_path])
    shape = dict(policy=config.policy.hyperparameters, token_dim=token_dim)
    curves = {name: np.asarray(curve) for name, curve in twins.curves._asdict().items()}
    save_arrays(config.folder / "curves.npz", curves, stage="curves", hyperparameters={"twins": ["warm", "cold"]}, metrics={}, **header)
    save_module(config.folder / "bc_policy.eqx", cloned, stage="policy", hyperparameters=shape, metrics=agreement, **header)
    trained = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, twins.policy)
    last = {f"last_{name}": float(curve[0, -10:].mean()) for name, curve in curves.items()}
    save_module(out, trained, stage="policy", hyperparameters=shape, metrics=agreement | last, **header)
    checkpoint_path.unlink(missing_ok=True)
    return out


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.extras.overridable_config_cli(PRESETS, args=preset_arguments(sys.argv[1:]), description=__doc__))
