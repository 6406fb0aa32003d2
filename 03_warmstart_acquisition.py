"""Stage 3: clone the expert's choices, then improve the policy by GRPO with verifiable rewards; a
cold-started twin runs beside it.

- Reads   artifacts/<preset>/demos.npz (not with --imitation.no-use-behavioral-cloning),
  surrogate.eqx
- Writes  artifacts/<preset>/policy.eqx (trained), bc_policy.eqx (the expert's clone, if there is
  one), curves.npz, and logs/policy.jsonl beside them
- Time    `small` about 6 minutes on 2 busy CPU cores.

    python 03_warmstart_acquisition.py small --iterations 200

The cold start sees the same problems, noise and random keys as the warm start and differs in its
first weights and in having no reference policy. What is logged per GRPO iteration, for both
(`lib.grpo.GRPOMetrics`): `reward`, mean total of an experiment, and its components before
weighting; `returns`, what a candidate is credited with; `entropy` of the policy and `kl` to the
cloned one in nats; `dead_groups`, the share without signal; `clipped`, the share of ratios outside
the clip. Entropy that falls to that of a single cell, or dead groups that approach one, would be a
collapse. At every checkpoint the averaged policies play the same validation problems: `validation`
in curves.npz is what their recommendations have gained after each experiment. The reward of sampled
candidates on ever new problems is too noisy to compare two policies by.

Deviations from textbook GRPO are numbered in lib/grpo.py. Here: the policy that is written is a
moving average over the iterations (`average`), because a reward is a rare jump of the
recommendation and every gradient mostly noise.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from tqdm import tqdm

from lib.artifacts import (
    TrainingLog,
    fingerprint,
    load_checkpoint,
    save_arrays,
    save_checkpoint,
    save_module,
)
from lib.causal_gp import expected_improvement
from lib.config import (
    check_settings,
    errors_for_people,
    preset_arguments,
    stage_key,
    use_compilation_cache,
)
from lib.grpo import (
    CampaignDesign,
    GRPOConfig,
    GRPOMetrics,
    Problem,
    Simulator,
    collect_campaign,
    draw_problems,
    update_acquisition_grpo,
)
from lib.policy import (
    AcquisitionPolicyNetwork,
    PolicyConfig,
    expected_improvement_choice,
    thompson_choice,
)
from lib.rewards import RewardConfig
from lib.scm_prior import SCMPrior, multimodal
from lib.surrogate import ParentSetPredictionModel
from lib.system import load_surrogate
from lib.trajectories import (
    AcquisitionExamples,
    extract_acquisition_training_data,
    join,
    load_trajectories,
)


@dataclass(frozen=True)
class ImitationConfig:
    """Learning from the expert (`ImitationConfig` of phase4_training_infrastructure.md)."""

    use_behavioral_cloning: bool = True
    """Clone before GRPO; without it the policy starts from random weights and no demonstrations are
    read.
    """
    teacher: Literal["expert", "expected_improvement", "thompson"] = "expert"
    """Whose clone GRPO starts from: the expert's, or that of a rule on the surrogate's effect
    surface at the states that the expert came to.
    """
    grpo_warmstart: bool = True
    """Start GRPO from a clone; otherwise from random weights, as the cold twin does, with the
    expert's clone written but not used.
    """
    imitation_weight: float = 0.0
    """Weight of the cloning loss beside GRPO's, on as many demonstrations as cloning takes in a
    step.
    """
    imitation_epochs: int = 20
    """Passes over the demonstrations while cloning."""
    imitation_batch: int = 64
    """Expert states in a step."""
    surface_weight: float = 0.5
    """Share of the target that is the teacher's acquisition surface, normalised; the rest is its
    choice.
    """
    learning_rate: float = 2e-3
    """Learning rate of Adam while cloning."""

    def __post_init__(self):
        if self.imitation_weight and not self.use_behavioral_cloning:
            raise ValueError(
                "imitation_weight needs demonstrations, and use_behavioral_cloning = "
                "False reads none"
            )

    @property
    def warm(self) -> bool:
        """Whether GRPO starts from the clone, and is then drawn to it."""
        return self.use_behavioral_cloning and self.grpo_warmstart


@dataclass(frozen=True)
class AcquisitionConfig:
    """Settings of stage 3 (`AcquisitionConfig` of phase4_training_infrastructure.md)."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where inputs are read and the policy is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Distribution of causal models."""
    multimodal_share: float = 0.5
    """Share of the problems whose ranges are wide and whose responses have several valleys, where
    it pays to look around.
    """
    campaign: CampaignDesign = field(default_factory=CampaignDesign)
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
    cold_twin: bool = True
    """Train the cold start as well, for the same time again; not where there is no warm start to
    compare it with.
    """

    # --- bookkeeping ---
    validation_problems: int = 64
    """Problems, apart from those of training, that the averaged policies play at every checkpoint;
    kinds as in training.
    """
    checkpoint_every: int = 10
    """Iterations between checkpoints."""

    def __post_init__(self):
        check_settings(self)
        if not 0 <= self.multimodal_share <= 1 or not 0 <= self.average < 1:
            raise ValueError(
                f"multimodal_share = {self.multimodal_share} must be in [0, 1], "
                f"average = {self.average} in [0, 1)"
            )
        if self.validation_problems < 1 or not 1 <= self.checkpoint_every <= self.iterations:
            raise ValueError(
                f"validation_problems = {self.validation_problems} must be at least 1, "
                f"checkpoint_every = {self.checkpoint_every} between 1 and iterations = "
                f"{self.iterations}"
            )
        if self.iterations % self.checkpoint_every:
            raise ValueError(
                f"iterations = {self.iterations} must be a multiple of checkpoint_every = "
                f"{self.checkpoint_every}: the curve ends with training"
            )

    @property
    def runs(self) -> tuple[str, ...]:
        """What is trained: without a warm start there is nothing that a cold twin could be compared
        with.
        """
        return ("warm", "cold")[: 1 + self.cold_twin] if self.imitation.warm else ("cold",)


# surfaces drawn per state for the distribution over what Thompson sampling would choose
THOMPSON_DRAWS = 64

PRESETS = {
    "smoke": (
        "seconds, for CI",
        AcquisitionConfig(
            Path("artifacts/smoke"),
            campaign=CampaignDesign(num_steps=3),
            imitation=ImitationConfig(imitation_epochs=2),
            grpo=GRPOConfig(group_size=4),
            iterations=4,
            problems_per_iteration=4,
            validation_problems=4,
            checkpoint_every=2,
        ),
    ),
    "small": ("about 6 minutes on 2 busy CPU cores", AcquisitionConfig()),
    "hour": (
        "at most 60 minutes on 2 CPU cores",
        AcquisitionConfig(
            Path("artifacts/hour"),
            prior=SCMPrior(max_vars=10, max_size=10),
            campaign=CampaignDesign(max_obs=200, num_steps=12),
            imitation=ImitationConfig(imitation_epochs=6),
            iterations=400,
            problems_per_iteration=24,
            average=0.98,
            cold_twin=False,
        ),
    ),
    "paper": (
        "sizes of the design documents, for one GPU",
        AcquisitionConfig(
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


class Runs(eqx.Module):
    """Policies in training along a leading axis, the warm start first, with their moving averages
    and optimisers; metrics of training `[runs, iterations]`, and what the averages gain on the
    validation problems `[runs, checkpoints, steps]`, the first before GRPO.
    """

    policy: AcquisitionPolicyNetwork
    average: AcquisitionPolicyNetwork
    optimiser: optax.OptState
    curves: GRPOMetrics
    validation: jax.Array


class AcquisitionModelResult(NamedTuple):
    """What stage 3 learned: the trained and the cloned policy, every metric's curve `[runs,
    iterations]`, gains on the validation problems `[runs, checkpoints, steps]`, and the clone's
    agreement.
    """

    policy: AcquisitionPolicyNetwork
    cloned: AcquisitionPolicyNetwork
    curves: dict[str, np.ndarray]
    validation: np.ndarray
    validation_metrics: dict[str, float]


class CloneMetrics(NamedTuple):
    """Agreement with the teacher on held-out demonstrations, as shares, and the cloning loss in
    nats.
    """

    loss: jax.Array
    variable_agreement: jax.Array
    value_agreement: jax.Array


# --- cloning ---


def taught(key: jax.Array, examples: AcquisitionExamples, teacher: str) -> AcquisitionExamples:
    """The examples with what a rule would have done in the expert's place. The surface of Thompson
    sampling is how often each cell is drawn.
    """

    def expected_improvement_example(inputs):
        _, example = inputs
        output = example.state.output
        surface = expected_improvement(
            output.effect_mean, output.effect_std, example.state.best_value
        )
        surface = jnp.where(output.task.candidates[:, None], surface, 0.0)
        return AcquisitionExamples(example.state, *expected_improvement_choice(output), surface)

    def thompson_example(inputs):
        key, example = inputs
        output = example.state.output
        variable, value = jax.vmap(lambda k: thompson_choice(k, output))(
            jr.split(key, THOMPSON_DRAWS)
        )
        index = jnp.argmin(jnp.abs(output.grid[variable] - value[:, None]), 1)
        surface = jnp.zeros_like(output.effect_mean).at[variable, index].add(1.0)
        return AcquisitionExamples(example.state, variable[0], value[0], surface)

    rule = {"expected_improvement": expected_improvement_example, "thompson": thompson_example}[
        teacher
    ]
    keys = jr.split(key, examples.variable.shape[0])
    return eqx.filter_jit(
        lambda keys, examples: jax.lax.map(rule, (keys, examples), batch_size=32)
    )(keys, examples)


def clone_loss(
    policy: AcquisitionPolicyNetwork, examples: AcquisitionExamples, surface_weight: float
) -> tuple[jax.Array, CloneMetrics]:
    """Cross-entropy to the teacher's choice and to its normalised acquisition surface."""

    def per_state(example):
        distribution = policy(example.state)
        log_probs = jnp.where(example.state.task.candidates[:, None], distribution.logits, 0.0)
        index = distribution.cell(example.variable, example.value)
        total = example.surface.sum()
        share = example.surface / jnp.where(total > 0, total, 1.0)
        # where the teacher expects no improvement anywhere, only its choice is left
        weight = jnp.where(total > 0, surface_weight, 0.0)
        loss = (
            -(1 - weight) * log_probs[example.variable, index] - weight * (share * log_probs).sum()
        )
        variable, value = distribution.mode()
        width = (example.state.task.high - example.state.task.low)[variable]
        same = variable == example.variable
        return loss, same, same & (jnp.abs(value - example.value) <= 0.1 * width)

    loss, same_variable, same_value = jax.vmap(per_state)(examples)
    metrics = CloneMetrics(
        loss.mean(), same_variable.mean(), same_value.sum() / jnp.maximum(same_variable.sum(), 1)
    )
    return metrics.loss, metrics


@eqx.filter_jit
def clone(
    key: jax.Array,
    policy: AcquisitionPolicyNetwork,
    examples: AcquisitionExamples,
    config: ImitationConfig,
) -> AcquisitionPolicyNetwork:
    """Behavioural cloning: all epochs in one program."""
    count = examples.variable.shape[0]
    batch = min(config.imitation_batch, count)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    dynamic, static = eqx.partition(
        (policy, optimiser.init(eqx.filter(policy, eqx.is_array))), eqx.is_array
    )

    def step(dynamic, rows):
        policy, state = eqx.combine(dynamic, static)
        chosen = jax.tree.map(lambda leaf: leaf[rows], examples)
        (_, _), gradients = eqx.filter_value_and_grad(clone_loss, has_aux=True)(
            policy, chosen, config.surface_weight
        )
        updates, state = optimiser.update(gradients, state, eqx.filter(policy, eqx.is_array))
        return eqx.filter((eqx.apply_updates(policy, updates), state), eqx.is_array), None

    orders = jax.vmap(lambda k: jr.permutation(k, count))(jr.split(key, config.imitation_epochs))
    rows = orders[:, : count // batch * batch].reshape(-1, batch)
    dynamic, _ = jax.lax.scan(step, dynamic, rows)
    return eqx.combine(dynamic, static)[0]


# --- GRPO ---


def make_optimiser(config: AcquisitionConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(
        config.grpo.learning_rate, config.iterations * config.grpo.grpo_epochs
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@eqx.filter_jit
def draw_batch(key: jax.Array, config: AcquisitionConfig, number: int, num_bins: int) -> Problem:
    """`number` problems, the multimodal ones last."""
    count = round(config.multimodal_share * number)
    kinds = [(config.prior, number - count), (multimodal(config.prior), count)]
    parts = [
        draw_problems(jr.fold_in(key, i), n, prior, config.campaign, num_bins)
        for i, (prior, n) in enumerate(kinds)
        if n
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@eqx.filter_jit
def iterate(
    key: jax.Array,
    runs: Runs,
    references: AcquisitionPolicyNetwork,
    surrogate: ParentSetPredictionModel,
    problems: Problem,
    demos: AcquisitionExamples | None,
    index: jax.Array,
    config: AcquisitionConfig,
) -> Runs:
    """One GRPO iteration of every run on the same problems with the same keys; only the first is
    drawn to its teacher.
    """
    keys, optimiser = jr.split(key, config.problems_per_iteration), make_optimiser(config)

    def one_run(policy, optimiser_state, reference, is_first):
        def play(key, problem):
            simulator = Simulator(surrogate, problem.scm, problem.truth, config.rewards)
            return collect_campaign(
                key, simulator, policy, problem.buffer, config.campaign.num_steps, config.grpo
            )[0]

        def imitate(policy):
            assert demos is not None
            return (
                is_first
                * config.imitation.imitation_weight
                * clone_loss(policy, demos, config.imitation.surface_weight)[0]
            )

        groups = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.vmap(play)(keys, problems)
        )
        kl_weight, extra = (
            is_first * config.imitation.warm * config.grpo.kl_weight,
            None if demos is None else imitate,
        )
        return update_acquisition_grpo(
            policy, optimiser_state, optimiser, reference, groups, config.grpo, kl_weight, extra
        )

    first = (jnp.arange(runs.curves.reward.shape[0]) == 0).astype(float)
    policy, optimiser_state, metrics = eqx.filter_vmap(one_run)(
        runs.policy, runs.optimiser, references, first
    )
    average = jax.tree.map(
        lambda a, b: config.average * a + (1.0 - config.average) * b if eqx.is_array(a) else a,
        runs.average,
        policy,
    )
    curves = jax.tree.map(lambda curve, now: curve.at[:, index].set(now), runs.curves, metrics)
    return Runs(policy, average, optimiser_state, curves, runs.validation)


@eqx.filter_jit
def validate(
    key: jax.Array,
    policies: AcquisitionPolicyNetwork,
    surrogate: ParentSetPredictionModel,
    problems: Problem,
    num_steps: int,
) -> jax.Array:
    """What the most probable experiments of each policy gain: share of the possible improvement
    that the noise-free E[Y | do] of the recommended action has improved by after each experiment,
    mean over the problems `[runs, steps]`. The same noise for all.
    """

    def play(key, problem, policy):
        simulator = Simulator(surrogate, problem.scm, problem.truth, RewardConfig(temperature=0.0))

        def step(known, key):
            variable, value = policy(known[0]).mode()
            known, reward = simulator.experiment(
                known, variable, value, problem.scm.draw_noise(key, 1)
            )
            return known, reward.optimization

        return jnp.cumsum(
            jax.lax.scan(
                step, simulator.start(problem.buffer, num_steps), jr.split(key, num_steps)
            )[1]
        )

    keys = jr.split(key, problems.truth.baseline.shape[0])
    return eqx.filter_vmap(
        lambda policy: jax.vmap(lambda k, p: play(k, p, policy))(keys, problems).mean(0)
    )(policies)


def stack(policies: list[AcquisitionPolicyNetwork]) -> AcquisitionPolicyNetwork:
    """Policies along a new leading axis."""
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *policies
    )


def train_acquisition(
    config: AcquisitionConfig,
    surrogate: ParentSetPredictionModel,
    starts: list[AcquisitionPolicyNetwork],
    demos: AcquisitionExamples | None,
    inputs: list[Path],
) -> Runs:
    """GRPO from every one of `starts`, the first of which is the warm one, or on from a checkpoint;
    `demos` are for `imitation_weight`.
    """
    uses = ("problems", "play", "demonstrations", "validation", "validation noise")
    problem_key, play_key, demo_key, held_out_key, noise_key = (
        stage_key(config.seed, "policy", use) for use in uses
    )
    num_bins = surrogate.config.num_bins
    checkpoint_path, names = config.folder / "policy.ckpt", config.runs
    references, optimiser = stack(starts), make_optimiser(config)
    optimiser_state = eqx.filter_vmap(
        lambda policy: optimiser.init(eqx.filter(policy, eqx.is_array))
    )(references)
    held_out = draw_batch(held_out_key, config, config.validation_problems, num_bins)

    def validated(runs: Runs, index: int) -> Runs:
        gains = validate(noise_key, runs.average, surrogate, held_out, config.campaign.num_steps)
        return eqx.tree_at(
            lambda runs: runs.validation, runs, runs.validation.at[:, index].set(gains)
        )

    nothing = jnp.zeros((len(starts), config.iterations))
    unknown = jnp.zeros(
        (len(starts), 1 + config.iterations // config.checkpoint_every, config.campaign.num_steps)
    )
    runs = Runs(
        references,
        references,
        optimiser_state,
        GRPOMetrics(*[nothing] * len(GRPOMetrics._fields)),
        unknown,
    )
    mark = fingerprint(__file__, config, inputs)
    resumed = load_checkpoint(checkpoint_path, runs, mark)
    runs, start = resumed if resumed else (validated(runs, 0), 0)

    log = TrainingLog(config.folder / "logs" / "policy.jsonl", start)
    with tqdm(
        total=config.iterations, initial=start, desc="policy", unit="iteration", mininterval=2
    ) as bar:
        for step in range(start, config.iterations):
            problems, chosen = (
                draw_batch(
                    jr.fold_in(problem_key, step), config, config.problems_per_iteration, num_bins
                ),
                None,
            )
            if demos is not None and config.imitation.imitation_weight:
                rows = jr.randint(
                    jr.fold_in(demo_key, step),
                    (config.imitation.imitation_batch,),
                    0,
                    demos.variable.shape[0],
                )
                chosen = jax.tree.map(lambda leaf, r=rows: leaf[r], demos)
            runs = iterate(
                jr.fold_in(play_key, step),
                runs,
                references,
                surrogate,
                problems,
                chosen,
                jnp.array(step),
                config,
            )
            now = {
                name: np.asarray(curve[:, step]) for name, curve in runs.curves._asdict().items()
            }
            log.write(
                step=step + 1,
                **{
                    f"{run}_{name}": float(v[i])
                    for name, v in now.items()
                    for i, run in enumerate(names)
                },
            )
            if (step + 1) % config.checkpoint_every == 0:
                runs = validated(runs, (step + 1) // config.checkpoint_every)
                save_checkpoint(checkpoint_path, runs, fingerprint=mark, step=step + 1)
            bar.update()
            bar.set_postfix(
                {run: f"{now['optimization'][i]:.4f}" for i, run in enumerate(names)},
                entropy=f"{now['entropy'][0]:.2f}",
            )
    return runs


def train_acquisition_with_expert_warmstart(config: AcquisitionConfig) -> AcquisitionModelResult:
    """Clone, improve, write (`train_acquisition_with_expert_warmstart` of
    phase4_training_infrastructure.md).

    Raises `ArtifactError` if demos.npz or surrogate.eqx is missing or damaged.
    """
    demos_path, surrogate_path = config.folder / "demos.npz", config.folder / "surrogate.eqx"
    inputs = (
        [demos_path, surrogate_path]
        if config.imitation.use_behavioral_cloning
        else [surrogate_path]
    )
    warm_key, cold_key, clone_key, teacher_key = (
        stage_key(config.seed, "policy", use) for use in ("warm", "cold", "clone", "teacher")
    )
    surrogate, _ = load_surrogate(surrogate_path)

    # --- clone (deterministic and short, so a resumed run repeats it) ---
    token_dim, build, imitation = (
        3 * surrogate.config.model_hidden_dim,
        eqx.filter_jit(AcquisitionPolicyNetwork),
        config.imitation,
    )
    cloned = start = blank = build(config.policy, token_dim, key=warm_key)
    lessons, agreement = None, {}
    if imitation.use_behavioral_cloning:
        parts = [load_trajectories(demos_path, part)[0] for part in ("train", "validation")]
        examples, count = (
            extract_acquisition_training_data(join(parts), surrogate),
            parts[0].variable.size,
        )

        def learn(
            examples: AcquisitionExamples, teacher: str
        ) -> tuple[AcquisitionPolicyNetwork, AcquisitionExamples, dict[str, float]]:
            train, validation = (
                jax.tree.map(lambda leaf, r=rows: leaf[r], examples)
                for rows in (slice(None, count), slice(count, None))
            )
            policy = clone(clone_key, blank, train, imitation)
            measured = eqx.filter_jit(clone_loss)(policy, validation, imitation.surface_weight)[1]
            metrics = {name: float(value) for name, value in measured._asdict().items()} | {
                "validation_states": len(validation.variable)
            }
            print(
                f"cloned from {teacher}: "
                + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            )
            return policy, train, metrics

        cloned, lessons, agreement = learn(examples, "expert")
        start = cloned
        if imitation.teacher != "expert":
            start, lessons, _ = learn(
                taught(teacher_key, examples, imitation.teacher), imitation.teacher
            )

    # --- improve ---
    fresh = build(config.policy, token_dim, key=cold_key)
    runs = train_acquisition(
        config,
        surrogate,
        [start if run == "warm" else fresh for run in config.runs],
        lessons,
        inputs,
    )
    trained = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, runs.average)

    # --- write ---
    header: dict[str, Any] = dict(
        config=asdict(config), seed=config.seed, step=config.iterations, parents=inputs
    )
    shape = dict(policy=config.policy.hyperparameters, token_dim=token_dim)
    curves = {name: np.asarray(curve) for name, curve in runs.curves._asdict().items()}
    validation = {"validation": np.asarray(runs.validation)}
    save_arrays(
        config.folder / "curves.npz",
        curves | validation,
        stage="curves",
        hyperparameters={"runs": config.runs},
        metrics={},
        **header,
    )
    if imitation.use_behavioral_cloning:
        save_module(
            config.folder / "bc_policy.eqx",
            cloned,
            stage="policy",
            hyperparameters=shape,
            metrics=agreement,
            **header,
        )
    else:
        # of an earlier run: nothing was cloned in this one
        (config.folder / "bc_policy.eqx").unlink(missing_ok=True)
    last = {f"last_{name}": float(curve[0, -10:].mean()) for name, curve in curves.items()}
    save_module(
        config.folder / "policy.eqx",
        trained,
        stage="policy",
        hyperparameters=shape,
        metrics=agreement | last,
        **header,
    )
    (config.folder / "policy.ckpt").unlink(missing_ok=True)
    return AcquisitionModelResult(trained, cloned, curves, validation["validation"], agreement)


def main(config: AcquisitionConfig) -> AcquisitionModelResult:
    """Train the policy and say how it ended."""
    use_compilation_cache(config.folder.parent / "cache")
    result = train_acquisition_with_expert_warmstart(config)
    print(
        "last ten iterations: "
        + "  ".join(f"{name} {curve[0, -10:].mean():.4f}" for name, curve in result.curves.items())
    )
    return result


if __name__ == "__main__":
    with errors_for_people():
        main(
            tyro.extras.overridable_config_cli(
                PRESETS, args=preset_arguments(sys.argv[1:]), description=__doc__
            )
        )
