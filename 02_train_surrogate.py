"""Stage 2: train the surrogate, which gives the posterior over parent sets and every intervention's effect from any data set.

- Reads   artifacts/<preset>/demos.npz
- Writes  artifacts/<preset>/surrogate.eqx, and logs/surrogate.jsonl beside it
- Time    `small` about 5 minutes on 2 CPU cores.

    python 02_train_surrogate.py small --steps 2000

Deviations from phase4_training_infrastructure.md, section 2:
1. besides the expert's posterior (KL on its demonstrations) the network is taught the true parents by NLL on fresh draws of the simulator: the expert
   sees only the target's regression on a set, so imitating it alone would cap the student at its teacher;
2. the same trunk learns the whole effect surface E[Y | do(X_i = v)], which the simulator knows exactly;
3. there are no epochs: simulated data never repeat.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from tqdm import tqdm

from lib.artifacts import TrainingLog, fingerprint, load_checkpoint, save_checkpoint, save_module
from lib.config import errors_for_people, preset_arguments, use_compilation_cache
from lib.metrics import auroc, parent_f1
from lib.scm_prior import DataDesign, Example, SCMPrior, sample_examples
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig, SurrogateOutput, expert_kl, surrogate_losses
from lib.trajectories import ExpertExamples, extract_surrogate_training_data, load_trajectories


@dataclass(frozen=True)
class Config:
    """Settings of stage 2."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where demos.npz is read and surrogate.eqx is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=SCMPrior)
    """Distribution of causal models."""
    design: DataDesign = field(default_factory=DataDesign)
    """Distribution of data sets."""

    # --- network ---
    model: SurrogateConfig = field(default_factory=SurrogateConfig)
    """Sizes of the surrogate."""

    # --- training ---
    steps: int = 2200
    """Gradient steps."""
    models_per_step: int = 16
    """Fresh causal models in a step."""
    buffers_per_model: int = 2
    """Data sets drawn from each of them."""
    demos_per_step: int = 4
    """Expert states in a step."""
    expert_weight: float = 0.1
    """Weight of KL(expert || surrogate)."""
    effect_weight: float = 1.0
    """Weight of the effect head's NLL."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW, after warm-up and before cosine decay to zero."""
    warmup_steps: int = 150
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""

    # --- bookkeeping ---
    chunk: int = 20
    """Steps in one compiled scan."""
    evaluate_every: int = 400
    """Steps between evaluations on held-out problems, as many as one chunk of steps uses."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""


PRESETS = {
    "smoke": ("seconds, for CI", Config(Path("artifacts/smoke"), steps=40, warmup_steps=10, evaluate_every=40, checkpoint_every=20)),
    "small": ("about 5 minutes on 2 CPU cores", Config()),
    "hour": (
        "at most 60 minutes on 2 CPU cores",
        Config(
            Path("artifacts/hour"),
            prior=SCMPrior(max_vars=12, max_size=12),
            model=SurrogateConfig(model_hidden_dim=96, model_n_layers=5),
            steps=8000,
        ),
    ),
    "paper": (
        "sizes of the design documents, for one GPU",
        Config(
            Path("artifacts/paper"),
            prior=SCMPrior(max_vars=20, max_size=20),
            model=SurrogateConfig(model_hidden_dim=256, model_n_layers=8, num_heads=8),
            steps=100_000,
            learning_rate=1e-3,
            models_per_step=64,
        ),
    ),
}


class TrainState(eqx.Module):
    """Everything that a checkpoint holds."""

    model: ParentSetPredictionModel
    optimiser: optax.OptState


class StepMetrics(NamedTuple):
    """Mean losses of a step, in nats: true parent set, effects, KL to the expert."""

    parent_nll: jax.Array
    effect_nll: jax.Array
    expert_kl: jax.Array


def make_optimiser(config: Config) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))


def loss_fn(model: ParentSetPredictionModel, examples: Example, demos: ExpertExamples, config: Config):
    """Weighted loss and its parts over simulated examples and expert states (leading axis `batch`)."""

    def simulated(example):
        return surrogate_losses(model.predict(example.buffer, example.task), example.parents, example.effects)

    def demonstrated(demo):
        return expert_kl(model.predict(demo.buffer, demo.task), demo.posterior)

    losses = jax.tree.map(jnp.mean, jax.vmap(simulated)(examples))
    metrics = StepMetrics(losses.parent_nll, losses.effect_nll, jax.vmap(demonstrated)(demos).mean())
    return metrics.parent_nll + config.effect_weight * metrics.effect_nll + config.expert_weight * metrics.expert_kl, metrics


@eqx.filter_jit
def draw_chunk(key: jax.Array, first_step: jax.Array, config: Config) -> Example:
    """Simulated examples of `chunk` steps: leading axes `[steps, batch]`."""

    def one_step(step):
        keys = jr.split(jr.fold_in(key, step), config.models_per_step)
        examples = jax.vmap(lambda k: sample_examples(k, config.prior, config.design, config.model.num_bins, config.buffers_per_model))(keys)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), examples)

    return jax.lax.map(one_step, first_step + jnp.arange(config.chunk))


@eqx.filter_jit
def train_chunk(state: TrainState, examples: Example, demos: ExpertExamples, key: jax.Array, first_step: jax.Array, config: Config):
    """`chunk` gradient steps in one program."""
    optimiser = make_optimiser(config)
    dynamic, static = eqx.partition(state, eqx.is_array)

    def step(dynamic, inputs):
        state, (index, batch) = eqx.combine(dynamic, static), inputs
        rows = jr.randint(jr.fold_in(key, index), (config.demos_per_step,), 0, demos.task.target.shape[0])
        chosen = jax.tree.map(lambda leaf: leaf[rows], demos)
        (_, metrics), gradients = eqx.filter_value_and_grad(loss_fn, has_aux=True)(state.model, batch, chosen, config)
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, eqx.filter(state.model, eqx.is_array))
        state = TrainState(eqx.apply_updates(state.model, updates), optimiser_state)
        return eqx.filter(state, eqx.is_array), metrics

    dynamic, metrics = jax.lax.scan(step, dynamic, (first_step + jnp.arange(config.chunk), examples))
    return eqx.combine(dynamic, static), jax.tree.map(jnp.mean, metrics)


@eqx.filter_jit
def predict(model: ParentSetPredictionModel, examples: Example) -> tuple[SurrogateOutput, jax.Array, jax.Array]:
    """Outputs, parent marginals and log-probability of the true set of every example."""

    def one(example):
        output = model.predict(example.buffer, example.task)
        return output, output.marginals(), output.log_prob(example.parents)

    return jax.vmap(one)(examples)


def evaluate(model: ParentSetPredictionModel, examples: Example) -> dict[str, float]:
    """Accuracy on held-out problems: parents, effects, and how good the surface's best point is as an action."""
    output, marginals, log_prob = predict(model, examples)
    candidates = np.asarray(jax.vmap(lambda task: task.possible_parents)(examples.task))
    truth, effects, mean = np.asarray(examples.parents), np.asarray(examples.effects), np.asarray(output.effect_mean)
    usable = np.isfinite(effects)
    chosen = np.where(usable, mean, np.inf).reshape(len(mean), -1).argmin(1)
    reached, best = effects.reshape(len(mean), -1)[np.arange(len(mean)), chosen], effects.min((1, 2))
    covered = np.abs(effects - mean)[usable] < 1.645 * np.asarray(output.effect_std)[usable]
    return {
        "validation_parent_f1": parent_f1(np.asarray(marginals) > 0.5, truth, candidates).pooled.value,
        "validation_parent_auroc": auroc(np.asarray(marginals), truth, candidates).value,
        "validation_set_nll": float(-np.asarray(log_prob).mean()),
        "validation_effect_r2": float(1 - ((effects - mean)[usable] ** 2).mean() / effects[usable].var()),
        "validation_coverage_90": float(covered.mean()),
        "validation_regret": float((reached - best).mean()),
    }


def main(config: Config) -> Path:
    """Train the surrogate and write it; returns the artifact's path."""
    use_compilation_cache(config.folder.parent / "cache")
    demos_path, out, checkpoint_path = config.folder / "demos.npz", config.folder / "surrogate.eqx", config.folder / "surrogate.ckpt"
    model_key, data_key, demo_key, validation_key = jr.split(jr.key(config.seed), 4)

    # --- read ---
    trajectories, _ = load_trajectories(demos_path, "train")
    demos = extract_surrogate_training_data(trajectories, config.design.max_obs + config.design.max_interventions)

    # --- build, or continue ---
    model = eqx.filter_jit(ParentSetPredictionModel)(config.model, key=model_key)
    state = TrainState(model, make_optimiser(config).init(eqx.filter(model, eqx.is_array)))
    mark = fingerprint(config, [demos_path])
    resumed = load_checkpoint(checkpoint_path, state, mark)
    state, start = resumed if resumed else (state, 0)
    validation = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), draw_chunk(validation_key, jnp.array(0), config))

    # --- train ---
    log, metrics = TrainingLog(config.folder / "logs" / "surrogate.jsonl", start), {}
    with tqdm(total=config.steps, initial=start, desc="surrogate", unit="step", mininterval=2) as bar:
        for step in range(start, config.steps, config.chunk):
            index = jnp.array(step)
            state, losses = train_chunk(state, draw_chunk(data_key, index, config), demos, demo_key, index, config)
            done = step + config.chunk
            bar.update(config.chunk)
            record = {name: float(value) for name, value in losses._asdict().items()}
            if done % config.evaluate_every == 0 or done >= config.steps:
                metrics = evaluate(state.model, validation)
                bar.set_postfix(f1=f"{metrics['validation_parent_f1']:.3f}", r2=f"{metrics['validation_effect_r2']:.3f}")
            if done % config.checkpoint_every == 0:
                save_checkpoint(checkpoint_path, state, fingerprint=mark, step=done)
            log.write(step=done, **record, **(metrics if done % config.evaluate_every == 0 else {}))

    # --- write ---
    if not metrics:
        metrics = evaluate(state.model, validation)
    save_module(
        out,
        state.model,
        stage="surrogate",
        config=asdict(config),
        hyperparameters=config.model.hyperparameters,
        seed=config.seed,
        step=config.steps,
        parents=[demos_path],
        metrics=metrics,
    )
    checkpoint_path.unlink(missing_ok=True)
    print("  ".join(f"{name.removeprefix('validation_')} {value:.3f}" for name, value in metrics.items()))
    return out


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.extras.overridable_config_cli(PRESETS, args=preset_arguments(sys.argv[1:]), description=__doc__))
