"""Stage 2: train the surrogate, which gives the posterior over parent sets and every intervention's
effect from any data set.

- Reads   artifacts/<preset>/demos.npz (not with --weights.expert 0)
- Writes  artifacts/<preset>/surrogate.eqx, and logs/surrogate.jsonl beside it
- Time    on 2 idle CPU cores 8 steps a second for `small` (without the expert), 3.4 for `hour`

    python 02_train_surrogate.py small --steps 2000

Every step has problems of every size: they are padded to a few buckets, whose losses share one
program.

Departures from phase4_training_infrastructure.md, section 2:
1. besides the expert's posterior (KL on its demonstrations) the network learns the true parents
   by NLL on fresh draws of the simulator: the expert sees only the target's regression on a set, so
   imitating it alone would cap the student at its teacher. And the expert is listened to early on
   only (`expert_until`): all demonstrations start from equally many rows, and a network that hears
   it to the end learns to recognise such data and to answer as the expert does there, worse than it
   knows;
2. the same trunk learns the whole effect surface E[Y | do(X_i = v)], which the simulator knows
   exactly;
3. there are no epochs and no early stopping: simulated data never repeat.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from tyro.extras import overridable_config_cli

from lib import settings, surrogate
from lib.accuracy import accuracy, posterior_seconds
from lib.artifacts import save
from lib.buffer import MIN_OBSERVATIONS
from lib.problems import DATA, DataDesign, Problem, draw_problem, draw_problems
from lib.scm_prior import WORLD, SCMPrior, inherit
from lib.training import Learner, Progress, drawn, merged, moving_average, train
from lib.trajectories import ExpertTrajectory, load_trajectories


@dataclass(frozen=True)
class Bucket:
    """Problems that are padded to one size."""

    max_size: int
    """Most variables; the fewest are one more than a smaller bucket holds."""
    models: int
    """Fresh causal models of these sizes in a step."""
    max_obs: int = 0
    """Most observational rows, if not those of the design."""


@dataclass(frozen=True)
class Config:
    """Settings of stage 2 (`TrainingConfig` of phase4_training_infrastructure.md)."""

    # --- files ---
    folder: Path = Path("artifacts/small")
    """Where demos.npz is read, unless `weights.expert` is 0, and surrogate.eqx is written."""
    seed: int = 0
    """Seed of everything random here."""

    # --- problems ---
    prior: SCMPrior = field(default_factory=lambda: SCMPrior(**WORLD))
    """Distribution of causal models; left at its default, save sizes and shares, it is that of the
    demonstrations. The largest sizes are those of the buckets.
    """
    buckets: tuple[Bucket, ...] = (Bucket(6, 4), Bucket(10, 3), Bucket(10, 1, 2000))
    """Sizes that problems are padded to, in ascending order."""
    buffers_per_model: int = 4
    """Data sets drawn from each model."""
    design: DataDesign = field(
        default_factory=lambda: DataDesign(
            min_obs=10, max_obs=300, per_variable=0, max_interventions=40, **DATA
        )
    )
    """Distribution of data sets."""

    # --- network ---
    model: surrogate.SurrogateConfig = field(default_factory=surrogate.SurrogateConfig)
    """Sizes of the surrogate."""

    # --- training ---
    steps: int = 3600
    """Most gradient steps."""
    demos_per_step: int = 4
    """Expert states in a step."""
    weights: surrogate.LossWeights = field(default_factory=surrogate.LossWeights)
    """What the network learns from."""
    expert_until: float = 0.5
    """Share of the steps over which the weight of the expert's term falls to zero."""
    learning_rate: float = 4e-3
    """Peak learning rate, after warm-up and before cosine decay to zero."""
    warmup_steps: int = 150
    """Steps of linear warm-up; the last step is never one of them."""
    average: float = 0.99
    """Decay of the moving average of the weights, which is what is evaluated and written; 0 is the
    last weights.
    """

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
        settings.validate(self)
        sizes = [bucket.max_size for bucket in self.buckets]
        if sizes != sorted(sizes) or sizes[0] < self.prior.min_size:
            raise ValueError(
                f"buckets: sizes {sizes} must ascend from at least {self.prior.min_size}"
            )
        if self.expert_until <= 0:
            raise ValueError(
                f"expert_until = {self.expert_until} must be positive; "
                "--weights.expert 0 leaves the expert out"
            )

    @property
    def capacity(self) -> int:
        """Most rows of a simulated data set."""
        return self.design.capacity(self.buckets[-1].max_size)

    @property
    def priors(self) -> tuple[SCMPrior, ...]:
        """The prior of each bucket."""
        sizes = [bucket.max_size for bucket in self.buckets]
        smaller = [[size for size in sizes if size < high] for high in sizes]
        return tuple(
            replace(
                self.prior,
                min_size=below[-1] + 1 if below else self.prior.min_size,
                max_size=high,
                max_vars=high,
            )
            for below, high in zip(smaller, sizes, strict=True)
        )


LARGE = DataDesign(min_obs=10, max_obs=500, per_variable=0, max_interventions=80, **DATA)
PRESETS = settings.presets(
    Config,
    smoke=dict(
        buckets=(Bucket(8, 8),),
        steps=40,
        warmup_steps=10,
        evaluate_every=40,
        checkpoint_every=20,
    ),
    hour=dict(  # about 70 minutes on 2 idle CPU cores
        buckets=(Bucket(6, 4), Bucket(10, 3), Bucket(10, 1, 2000), Bucket(20, 1)),
        design=LARGE,
        model=surrogate.SurrogateConfig(model_hidden_dim=96, model_n_layers=6),
        steps=15_000,
        learning_rate=3e-3,
        evaluate_every=1000,
    ),
    paper=dict(
        buckets=(Bucket(6, 32), Bucket(10, 24), Bucket(10, 8, 2000), Bucket(20, 16)),
        design=LARGE,
        model=surrogate.SurrogateConfig(
            model_hidden_dim=256,
            model_n_layers=8,
            num_heads=4,
            head_dim=32,
            mixed_precision=True,
        ),
        steps=100_000,
        learning_rate=2e-3,
        evaluate_every=1000,
    ),
)


class TrainState(NamedTuple):
    """Everything that a checkpoint holds: weights and optimiser, and their moving average."""

    learner: Learner
    average: surrogate.ParentSetPredictionModel


@dataclass(frozen=True)
class SurrogateModelResult:
    """What training gave (phase4_training_infrastructure.md)."""

    model: surrogate.ParentSetPredictionModel
    training_history: list[dict[str, float]]
    """Per chunk of steps, the mean losses, and accuracy where it was measured."""
    validation_metrics: dict[str, float]
    """On held-out problems, at the end."""
    steps: int
    """Gradient steps taken."""
    speedup_estimate: float
    """The expert's seconds per posterior over the surrogate's: one problem, after compilation."""


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """Warm-up, then cosine decay to zero."""
    return surrogate.surrogate_optimiser(
        optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, min(config.warmup_steps, config.steps - 1), config.steps
        )
    )


@eqx.filter_jit
def draw_chunk(
    key: jax.Array, first_step: jax.Array, count: int, config: Config
) -> tuple[Problem, ...]:
    """Simulated problems of `count` steps, one batch per bucket: leading axes `[steps, batch]`."""

    def one_bucket(key, bucket, prior):
        sizes = config.model.num_bins, config.buffers_per_model
        design = replace(config.design, max_obs=bucket.max_obs or config.design.max_obs)
        return draw_problems(key, bucket.models, prior, design, *sizes, thin=2)

    def one_step(step):
        step_key, buckets = jr.fold_in(key, step), zip(config.buckets, config.priors, strict=True)
        return tuple(one_bucket(jr.fold_in(step_key, i), *each) for i, each in enumerate(buckets))

    return jax.lax.map(one_step, first_step + jnp.arange(count))


@eqx.filter_jit
def train_chunk(
    state: TrainState,
    batches: tuple[Problem, ...],
    demos: surrogate.SurrogateTrainingExample | None,
    key: jax.Array,
    first_step: jax.Array,
    config: Config,
) -> tuple[TrainState, surrogate.SurrogateLosses]:
    """A gradient step on each of `batches`, in one program; the mean losses too."""
    optimiser = make_optimiser(config)

    def step(state, inputs):
        index, problems = inputs
        chosen = None
        if demos is not None:
            chosen = drawn(jr.fold_in(key, index), demos, config.demos_per_step)
        share = jnp.clip(1.0 - index / (config.expert_until * config.steps), 0.0, 1.0)
        learner, losses = surrogate.surrogate_step(
            state.learner, optimiser, problems, chosen, config.weights, share
        )
        average = moving_average(state.average, learner.module, config.average)
        return TrainState(learner, average), losses

    indices = first_step + jnp.arange(len(batches[0].truth.baseline))
    state, losses = jax.lax.scan(step, state, (indices, batches))
    return state, jax.tree.map(jnp.mean, losses)


def train_surrogate(
    config: Config,
    examples: surrogate.SurrogateTrainingExample | None = None,
    progress: Progress | None = None,
) -> SurrogateModelResult:
    """Train on the expert's beliefs, if there are any, and on simulations; with `progress`, go on
    where a checkpoint is.
    """
    uses = ("model", "problems", "demonstrations", "validation", "time")
    model_key, data_key, demo_key, validation_key, time_key = (
        settings.stage_key(config.seed, "surrogate", use) for use in uses
    )
    model = eqx.filter_jit(surrogate.ParentSetPredictionModel)(config.model, key=model_key)
    learner = Learner.of(model, make_optimiser(config))
    validation = merged(draw_chunk(validation_key, jnp.array(0), config.chunk, config))

    # the next problems are drawn while the network learns from these
    drawing, ahead = ThreadPoolExecutor(1), {}

    def drawn_ahead(step, count):
        return drawing.submit(draw_chunk, data_key, jnp.array(step), count, config)

    def advance(state, step, count):
        index, done, every = jnp.array(step), step + count, config.evaluate_every
        batches = (ahead.pop(step, None) or drawn_ahead(step, count)).result()
        if done < config.steps:
            ahead[done] = drawn_ahead(done, min(config.chunk, config.steps - done))
        state, losses = train_chunk(state, batches, examples, demo_key, index, config)
        record = losses._asdict()
        if done // every > step // every or done == config.steps:
            record |= accuracy(state.average, validation)
        return state, record

    state, history = train(
        "surrogate",
        advance,
        TrainState(learner, model),
        config.steps,
        chunk=config.chunk,
        checkpoint_every=config.checkpoint_every,
        shown={"f1": "validation_parent_f1", "r2": "validation_effect_r2"},
        progress=progress,
    )
    metrics = {k: v for k, v in history[-1].items() if k.startswith("validation")}
    # one problem of the largest bucket
    num_obs = max(config.design.max_obs, MIN_OBSERVATIONS)
    scm, _, buffer = draw_problem(time_key, config.priors[-1], DataDesign(num_obs, num_obs), 2)
    expert, ours = posterior_seconds(state.average, scm, buffer, num_obs)
    return SurrogateModelResult(state.average, history, metrics, config.steps, expert / ours)


@eqx.filter_jit
def extract_surrogate_training_data(
    trajectories: ExpertTrajectory, capacity: int
) -> surrogate.SurrogateTrainingExample:
    """The expert's belief after every number of experiments, with the data it followed from, in
    buffers of at least `capacity` rows.
    """
    room = max(capacity - trajectories.buffer.valid.shape[1], 0)

    def one(trajectory, step):
        known, task = trajectory.buffer_before(step).grow(room), trajectory.scm.task
        return surrogate.SurrogateTrainingExample(known, task, trajectory.posterior(step))

    each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    return merged(each(trajectories, jnp.arange(trajectories.log_probs.shape[1])))


def main(config: Config) -> Path:
    """Train on the folder's demonstrations, write the surrogate and say how good it is; returns
    its path.

    Raises `ArtifactError` if demos.npz is missing or damaged, unless the expert's term has no
    weight.
    """
    settings.use_compilation_cache(config.folder.parent / "cache")
    inputs, examples = [], None
    if config.weights.expert:
        inputs = [config.folder / "demos.npz"]
        trajectories, header = load_trajectories(inputs[0], "train")
        config = replace(config, prior=inherit(config.prior, header))
        examples = extract_surrogate_training_data(trajectories, config.capacity)
    progress = Progress(config.folder, "surrogate", __file__, config, inputs)
    result = train_surrogate(config, examples, progress)
    out = config.folder / "surrogate.eqx"
    save(
        out,
        result.model,
        stage="surrogate",
        hyperparameters=config.model.hyperparameters,
        step=result.steps,
        metrics=result.validation_metrics,
        **progress.header,
    )
    progress.finish()
    print("  ".join(f"{k[11:]} {v:.3f}" for k, v in result.validation_metrics.items()))
    print(f"a posterior takes {result.speedup_estimate:.0f} times less than our expert's: {out}")
    return out


if __name__ == "__main__":
    with settings.errors_for_people():
        main(overridable_config_cli(PRESETS, args=settings.preset_arguments(), description=__doc__))
