"""Stage 2: train the surrogate, which gives the posterior over parent sets and every intervention's
effect from any data set.

- Reads   artifacts/<preset>/demos.npz (not with --weights.expert 0)
- Writes  artifacts/<preset>/surrogate.eqx, and logs/surrogate.jsonl beside it
- Time    `small` about 11 minutes on 2 busy CPU cores, `hour` 12,000 steps of .25 s, so about 55 by
  estimate.

    python 02_train_surrogate.py small --steps 2000

Every step has problems of every size: they are padded to a few buckets, whose losses share one
program.

Deviations from phase4_training_infrastructure.md, section 2:
1. besides the expert's posterior (KL on its demonstrations) the network is taught the true parents
   by NLL on fresh draws of the simulator: the expert
   sees only the target's regression on a set, so imitating it alone would cap the student at its
   teacher. And the expert is listened to early on only (`expert_until`): all demonstrations start
   from equally many rows, and a network that hears it to the end learns to recognise such data and
   to answer as the expert does there, worse than it knows;
2. the same trunk learns the whole effect surface E[Y | do(X_i = v)], which the simulator knows
   exactly;
3. there are no epochs: simulated data never repeat, so that early stopping (`patience`) is for runs
   whose length nobody has tried.
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

from lib.artifacts import TrainingLog, fingerprint, load_checkpoint, save_checkpoint, save_module
from lib.config import (
    check_settings,
    errors_for_people,
    preset_arguments,
    stage_key,
    use_compilation_cache,
)
from lib.metrics import auroc, expected_calibration_error, median_seconds, parent_f1
from lib.parent_scale import ParentScaleConfig, replay_posterior
from lib.scm_prior import DataDesign, Example, SCMPrior, initial_buffer, sample_examples, sample_scm
from lib.surrogate import (
    ExpertExamples,
    LossWeights,
    ParentSetPredictionModel,
    SurrogateConfig,
    surrogate_optimiser,
    update_surrogate,
)
from lib.trajectories import extract_surrogate_training_data, load_trajectories


@dataclass(frozen=True)
class Bucket:
    """Problems that are padded to one size."""

    max_size: int
    """Most variables; the fewest are one more than the bucket before holds."""
    models: int
    """Fresh causal models of these sizes in a step."""


@dataclass(frozen=True)
class Config:
    """Settings of stage 2."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where demos.npz is read, unless `weights.expert` is 0, and surrogate.eqx is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=lambda: SCMPrior(max_vars=10, max_size=10))
    """Distribution of causal models."""
    buckets: tuple[Bucket, ...] = (Bucket(6, 4), Bucket(10, 4))
    """Sizes that problems are padded to, in ascending order; the last is the prior's."""
    buffers_per_model: int = 4
    """Data sets drawn from each model."""
    design: DataDesign = field(
        default_factory=lambda: DataDesign(max_obs=300, max_interventions=40)
    )
    """Distribution of data sets."""

    # --- network ---
    model: SurrogateConfig = field(default_factory=SurrogateConfig)
    """Sizes of the surrogate."""

    # --- training ---
    steps: int = 2600
    """Most gradient steps."""
    demos_per_step: int = 4
    """Expert states in a step."""
    weights: LossWeights = field(default_factory=LossWeights)
    """What the network learns from."""
    expert_until: float = 0.5
    """Share of the steps over which the weight of the expert's term falls to zero."""
    learning_rate: float = 4e-3
    """Peak learning rate, after warm-up and before cosine decay to zero."""
    warmup_steps: int = 150
    """Steps of linear warm-up."""
    average: float = 0.99
    """Decay of the moving average of the weights, which is what is evaluated and written; 0 is the
    last weights.
    """
    patience: int = 0
    """Stop after this many evaluations without a lower validation loss; 0 is never."""

    # --- bookkeeping ---
    chunk: int = 20
    """Steps in one compiled scan."""
    evaluate_every: int = 400
    """Steps between evaluations on held-out problems, as many as one chunk of steps uses; each at
    the first end of a chunk.
    """
    checkpoint_every: int = 200
    """Steps between checkpoints, likewise."""

    def __post_init__(self):
        check_settings(self)
        sizes = [bucket.max_size for bucket in self.buckets]
        if (
            sizes != sorted(set(sizes))
            or not sizes
            or sizes[-1] != self.prior.max_size
            or sizes[0] < self.prior.min_size
        ):
            raise ValueError(
                f"buckets: sizes {sizes} must ascend from at least "
                f"{self.prior.min_size} to the prior's largest, {self.prior.max_size}"
            )
        if self.expert_until <= 0:
            raise ValueError(
                f"expert_until = {self.expert_until} must be positive; "
                "--weights.expert 0 leaves the expert out"
            )

    @property
    def priors(self) -> tuple[SCMPrior, ...]:
        """The prior of each bucket."""
        largest = [bucket.max_size for bucket in self.buckets]
        smallest = [self.prior.min_size, *(size + 1 for size in largest[:-1])]
        return tuple(
            replace(self.prior, min_size=low, max_size=high, max_vars=high)
            for low, high in zip(smallest, largest, strict=True)
        )


PRESETS = {
    "smoke": (
        "seconds, for CI",
        Config(
            Path("artifacts/smoke"),
            prior=SCMPrior(),
            buckets=(Bucket(8, 8),),
            steps=40,
            warmup_steps=10,
            evaluate_every=40,
            checkpoint_every=20,
        ),
    ),
    "small": ("about 11 minutes on 2 busy CPU cores", Config()),
    "hour": (
        "larger, about 55 minutes on 2 CPU cores",
        Config(
            Path("artifacts/hour"),
            prior=SCMPrior(max_vars=20, max_size=20),
            buckets=(Bucket(6, 4), Bucket(10, 4), Bucket(20, 1)),
            design=DataDesign(max_obs=500, max_interventions=80),
            model=SurrogateConfig(model_hidden_dim=96, model_n_layers=6),
            steps=12_000,
            learning_rate=3e-3,
            evaluate_every=1000,
        ),
    ),
    "paper": (
        "sizes of the design documents, for one GPU",
        Config(
            Path("artifacts/paper"),
            prior=SCMPrior(max_vars=20, max_size=20),
            buckets=(Bucket(6, 32), Bucket(10, 32), Bucket(20, 16)),
            design=DataDesign(max_obs=500, max_interventions=80),
            model=SurrogateConfig(
                model_hidden_dim=256, model_n_layers=8, num_products=64, mixed_precision=True
            ),
            steps=100_000,
            learning_rate=2e-3,
            patience=20,
            evaluate_every=1000,
        ),
    ),
}


class TrainState(eqx.Module):
    """Everything that a checkpoint holds: weights, their moving average, optimiser, the lowest
    validation loss and its step.
    """

    model: ParentSetPredictionModel
    average: ParentSetPredictionModel
    optimiser: optax.OptState
    best_loss: jax.Array
    best_step: jax.Array


@dataclass(frozen=True)
class SurrogateModelResult:
    """What training gave (phase4_training_infrastructure.md)."""

    model: ParentSetPredictionModel
    training_history: list[dict[str, float]]
    """Per chunk of steps, the mean losses."""
    validation_metrics: dict[str, float]
    """On held-out problems, at the end."""
    speedup_estimate: float
    """The expert's seconds per posterior over the surrogate's, on one problem, after
    compilation.
    """


def make_optimiser(config: Config) -> optax.GradientTransformation:
    return surrogate_optimiser(
        optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, config.steps
        )
    )


@eqx.filter_jit
def draw_chunk(
    key: jax.Array, first_step: jax.Array, count: int, config: Config
) -> tuple[Example, ...]:
    """Simulated examples of `count` steps, one batch per bucket: leading axes `[steps, batch]`."""

    def one_step(step):
        batches = []
        for index, (bucket, prior) in enumerate(zip(config.buckets, config.priors, strict=True)):
            keys = jr.split(jr.fold_in(jr.fold_in(key, step), index), bucket.models)
            draw = jax.vmap(
                lambda k, prior=prior: sample_examples(
                    k, prior, config.design, config.model.num_bins, config.buffers_per_model
                )
            )
            batches.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), draw(keys)))
        return tuple(batches)

    return jax.lax.map(one_step, first_step + jnp.arange(count))


@eqx.filter_jit
def train_chunk(
    state: TrainState,
    batches: tuple[Example, ...],
    demos: ExpertExamples | None,
    key: jax.Array,
    first_step: jax.Array,
    config: Config,
):
    """A gradient step on each of `batches`, in one program."""
    optimiser = make_optimiser(config)
    trained, static = eqx.partition((state.model, state.average, state.optimiser), eqx.is_array)

    def step(trained, inputs):
        (model, average, optimiser_state), (index, examples) = eqx.combine(trained, static), inputs
        chosen = None
        if demos is not None:
            rows = jr.randint(
                jr.fold_in(key, index), (config.demos_per_step,), 0, demos.task.target.shape[0]
            )
            chosen = jax.tree.map(lambda leaf: leaf[rows], demos)
        share = jnp.clip(1.0 - index / (config.expert_until * config.steps), 0.0, 1.0)
        model, optimiser_state, losses = update_surrogate(
            model, optimiser_state, optimiser, examples, chosen, config.weights, share
        )
        average = jax.tree.map(
            lambda a, b: config.average * a + (1.0 - config.average) * b if eqx.is_array(a) else a,
            average,
            model,
        )
        return eqx.filter((model, average, optimiser_state), eqx.is_array), losses

    count = batches[0].parents.shape[0]
    trained, losses = jax.lax.scan(step, trained, (first_step + jnp.arange(count), batches))
    model, average, optimiser_state = eqx.combine(trained, static)
    state = eqx.tree_at(
        lambda s: (s.model, s.average, s.optimiser), state, (model, average, optimiser_state)
    )
    return state, jax.tree.map(jnp.mean, losses)


# --- evaluation ---


@eqx.filter_jit
def predict(model: ParentSetPredictionModel, examples: Example) -> dict[str, jax.Array]:
    """What the model says of every example, and its true effects in the same unit."""

    def one(example):
        output = model.predict(example.buffer, example.task)
        belief = {
            "marginals": output.marginals(),
            "log_prob": output.log_prob(example.parents),
            "possible": example.task.possible_parents,
        }
        effects = {"mean": output.effect_mean, "std": output.effect_std, "effects": example.effects}
        # in observed deviations of the target
        return belief | {name: value / output.spread for name, value in effects.items()}

    return jax.lax.map(one, examples, batch_size=32)


def evaluate(model: ParentSetPredictionModel, validation: tuple[Example, ...]) -> dict[str, float]:
    """Accuracy on held-out problems of all buckets together: parents, effects, and how good the
    surface's best point is as an action.

    Effects and regret are in observed deviations of the target, so no unit matters.
    """
    slots = max(batch.parents.shape[1] for batch in validation)
    parts = []
    for batch in validation:
        found = {name: np.asarray(value) for name, value in predict(model, batch).items()}
        found["parents"] = np.asarray(batch.parents)
        filler = {"effects": np.inf, "std": 1.0}

        def widened(name, value, filler=filler):
            wide = (
                ((0, 0), (0, slots - value.shape[1]), *[(0, 0)] * (value.ndim - 2))
                if value.ndim > 1
                else ((0, 0),)
            )
            return np.pad(value, wide, constant_values=filler.get(name, 0))

        parts.append({name: widened(name, value) for name, value in found.items()})
    all_of = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    marginals, truth, possible, effects, mean = (
        all_of[name] for name in ("marginals", "parents", "possible", "effects", "mean")
    )
    usable = np.isfinite(effects)
    chosen = np.where(usable, mean, np.inf).reshape(len(mean), -1).argmin(1)
    reached, best = (
        effects.reshape(len(mean), -1)[np.arange(len(mean)), chosen],
        effects.min((1, 2)),
    )
    error, std = (effects - mean)[usable], all_of["std"][usable]
    return {
        "validation_set_nll": float(-all_of["log_prob"].mean()),
        "validation_effect_nll": float((0.5 * (error / std) ** 2 + np.log(std)).mean()),
        "validation_parent_f1": parent_f1(marginals > 0.5, truth, possible).pooled.value,
        "validation_parent_auroc": auroc(marginals, truth, possible).value,
        "validation_ece": expected_calibration_error(marginals, truth, possible).value,
        "validation_effect_r2": float(1 - (error**2).mean() / effects[usable].var()),
        "validation_coverage_90": float((np.abs(error) < 1.645 * std).mean()),
        "validation_regret": float((reached - best).mean()),
    }


def estimate_speedup(key: jax.Array, model: ParentSetPredictionModel, config: Config) -> float:
    """The expert's seconds per posterior over the surrogate's, on one problem of the largest
    bucket, measured one after the other.
    """
    scm_key, data_key, expert_key = jr.split(key, 3)
    num_obs, prior = config.design.max_obs, config.priors[-1]
    scm = eqx.filter_jit(sample_scm)(scm_key, prior)
    buffer = initial_buffer(data_key, scm, num_obs, 2, num_obs + 2 * prior.max_vars)
    settings = ParentScaleConfig(num_obs=num_obs, num_steps=0, candidate_sets="union")
    infer = eqx.filter_jit(
        lambda key, scm, buffer: replay_posterior(key, scm, buffer, buffer.size, settings)
    )
    amortised = eqx.filter_jit(
        lambda model, buffer, task: model.predict(buffer, task).posterior().log_probs
    )
    expert = median_seconds(lambda: infer(expert_key, scm, buffer), 3)
    return expert / median_seconds(lambda: amortised(model, buffer, scm.task), 20)


# --- training ---


def train_surrogate_with_expert_data(config: Config) -> SurrogateModelResult:
    """Train on `folder`'s demonstrations and on simulations, or go on where a checkpoint is.

    Raises `ArtifactError` if demos.npz is missing or damaged, unless the expert's term has no
    weight.
    """
    checkpoint_path = config.folder / "surrogate.ckpt"
    names = ("model", "problems", "demonstrations", "validation", "time")
    model_key, data_key, demo_key, validation_key, time_key = (
        stage_key(config.seed, "surrogate", name) for name in names
    )

    # --- read ---
    demo_paths, demos = [config.folder / "demos.npz"] if config.weights.expert else [], None
    for path in demo_paths:
        demos = extract_surrogate_training_data(
            load_trajectories(path, "train")[0],
            config.design.max_obs + config.design.max_interventions,
        )

    # --- build, or continue ---
    model = eqx.filter_jit(ParentSetPredictionModel)(config.model, key=model_key)
    optimiser_state = make_optimiser(config).init(eqx.filter(model, eqx.is_array))
    state = TrainState(model, model, optimiser_state, jnp.array(jnp.inf), jnp.array(0))
    mark = fingerprint(__file__, config, demo_paths)
    resumed = load_checkpoint(checkpoint_path, state, mark)
    state, start = resumed if resumed else (state, 0)
    validation = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]),
        draw_chunk(validation_key, jnp.array(0), config.chunk, config),
    )

    # --- train ---
    log, history, metrics, done = (
        TrainingLog(config.folder / "logs" / "surrogate.jsonl", start),
        [],
        {},
        start,
    )
    with tqdm(
        total=config.steps, initial=start, desc="surrogate", unit="step", mininterval=2
    ) as bar:
        for step in range(start, config.steps, config.chunk):
            # a shorter last chunk is a program of its own
            index, count = jnp.array(step), min(config.chunk, config.steps - step)
            state, losses = train_chunk(
                state, draw_chunk(data_key, index, count, config), demos, demo_key, index, config
            )
            done = step + count
            bar.update(count)
            record = {name: float(value) for name, value in losses._asdict().items()}
            history.append({"step": done, **record})
            metrics = {}
            if (
                done // config.evaluate_every > step // config.evaluate_every
                or done >= config.steps
            ):
                metrics = evaluate(state.average, validation)
                bar.set_postfix(
                    f1=f"{metrics['validation_parent_f1']:.3f}",
                    r2=f"{metrics['validation_effect_r2']:.3f}",
                )
                loss = (
                    config.weights.parents * metrics["validation_set_nll"]
                    + config.weights.effects * metrics["validation_effect_nll"]
                )
                if loss < float(state.best_loss):
                    state = eqx.tree_at(
                        lambda s: (s.best_loss, s.best_step),
                        state,
                        (jnp.array(loss), jnp.array(done)),
                    )
            if done // config.checkpoint_every > step // config.checkpoint_every:
                save_checkpoint(checkpoint_path, state, fingerprint=mark, step=done)
            log.write(step=done, **record, **metrics)
            if (
                metrics
                and config.patience
                and done - int(state.best_step) >= config.patience * config.evaluate_every
            ):
                print(
                    f"stopped at step {done}: no lower validation loss since step "
                    f"{int(state.best_step)}"
                )
                break

    metrics = metrics or evaluate(state.average, validation)
    speedup = estimate_speedup(time_key, state.average, config)
    save_module(
        config.folder / "surrogate.eqx",
        state.average,
        stage="surrogate",
        config=asdict(config),
        hyperparameters=config.model.hyperparameters,
        seed=config.seed,
        step=done,
        parents=demo_paths,
        metrics=metrics,
    )
    checkpoint_path.unlink(missing_ok=True)
    return SurrogateModelResult(state.average, history, metrics, speedup)


def main(config: Config) -> SurrogateModelResult:
    """Train the surrogate, write it, and say how good it is."""
    use_compilation_cache(config.folder.parent / "cache")
    result = train_surrogate_with_expert_data(config)
    print(
        "  ".join(
            f"{name.removeprefix('validation_')} {value:.3f}"
            for name, value in result.validation_metrics.items()
        )
    )
    print(
        f"a posterior takes {result.speedup_estimate:.0f} times less than our expert's; written "
        f"to {config.folder / 'surrogate.eqx'}"
    )
    return result


if __name__ == "__main__":
    with errors_for_people():
        main(
            tyro.extras.overridable_config_cli(
                PRESETS, args=preset_arguments(sys.argv[1:]), description=__doc__
            )
        )
