"""The trained system: surrogate and policy together, from a buffer to the next experiment, without
the expert and without ground truth.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from lib.artifacts import load, save
from lib.buffer import ExperienceBuffer
from lib.campaign import Choice, run_campaign
from lib.check import BELIEFS, CheckConfig, check
from lib.grpo import Groups, GRPOConfig, grpo_step, sample_group
from lib.policy import (
    AcquisitionPolicyNetwork,
    AcquisitionState,
    InterventionDistribution,
    PolicyConfig,
    check_state,
    make_state,
)
from lib.posterior import ParentSetPosterior
from lib.programs import compiled
from lib.rewards import RewardComponents
from lib.scm import AbstractSCM, Task, check_index
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig
from lib.training import Learner


class OptimizationResult(eqx.Module):
    """A campaign: the experiments `[steps]`, what would have been recommended before the first and
    after each `[steps+1]`, and all data.
    """

    variable: Int[Array, " steps"]
    value: Float[Array, " steps"]
    outcome: Float[Array, " steps"]
    recommended_variable: Int[Array, " steps+1"]  # -1: do nothing
    recommended_value: Float[Array, " steps+1"]
    buffer: ExperienceBuffer


def play_campaign(
    key: Key[Array, ""],
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    num_steps: int,
    decide: Callable[[Key[Array, ""], ExperienceBuffer, Int[Array, ""]], tuple[Choice, Choice]],
) -> OptimizationResult:
    """A campaign (`lib.campaign.run_campaign`) of a method that looks at the data only:
    `decide(key, buffer, step)` returns the next experiment and the action that the method would
    recommend now.
    """
    buffer, _, (variable, value), recommended = run_campaign(
        key, scm, buffer, num_steps, lambda k, known, _, t: decide(k, known, t)
    )
    made = buffer.values[buffer.size - num_steps + jnp.arange(num_steps)]
    outcome = jnp.take(made, scm.target, axis=1)
    return OptimizationResult(variable, value, outcome, *recommended, buffer=buffer)


def flip_target(buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> ExperienceBuffer:
    """The same data with the target's sign changed: maximising one is minimising the other.

    Raises `ValueError` for a target that is not one of its variables, unless it is traced.
    """
    if not isinstance(target, Tracer):
        check_index(target, buffer.values.shape[1], "target")
    sign = jnp.where(jnp.arange(buffer.values.shape[1]) == target, -1.0, 1.0)
    return ExperienceBuffer(buffer.values * sign[None], buffer.intervened, buffer.valid)


class TrainedACBOSystem(eqx.Module):
    """Surrogate and policy (`TrainedACBOSystem` of phase4_training_infrastructure.md). The
    objective is minimised; see `flip_target` to maximise.
    """

    surrogate: ParentSetPredictionModel
    policy: AcquisitionPolicyNetwork

    def __check_init__(self):
        given, read = 3 * self.surrogate.config.model_hidden_dim, self.policy.token.in_features
        if given != read:
            raise ValueError(
                f"the policy reads tokens of {read} numbers, the surrogate gives "
                f"{given}: train the policy on this surrogate (stage 3)"
            )

    def state(
        self,
        buffer: ExperienceBuffer,
        task: Task,
        step: int | Array = 0,
        steps_left: int | Array = 10,
    ) -> AcquisitionState:
        """What the system knows, ready for a decision; compiled as `surrogate(...)` is."""
        rows = buffer.grow(-buffer.valid.shape[0] % 128)
        return eqx.filter_jit(make_state)(
            self.surrogate, rows, task, jnp.asarray(step), jnp.asarray(steps_left)
        )

    def predict_posterior(
        self, buffer: ExperienceBuffer, target: Int[Array, ""] | int
    ) -> ParentSetPosterior:
        """The posterior over the target's parent sets, as the surrogate gives it."""
        return self.surrogate(buffer, target)

    def distribution(
        self, state: AcquisitionState, exploration_rate: float = 0.0
    ) -> InterventionDistribution:
        """The policy's distribution, mixed with `exploration_rate` of a uniform one over candidate
        variables and values.
        """
        learned = self.policy(state)
        allowed = jnp.broadcast_to(state.task.candidates[:, None], learned.logits.shape)
        uniform = jnp.where(
            allowed, learned.log_widths[None] - jnp.log(state.task.candidates.sum()), -jnp.inf
        )
        mixed = jnp.logaddexp(
            learned.logits + jnp.log1p(-exploration_rate), uniform + jnp.log(exploration_rate)
        )
        return InterventionDistribution(state.task, jnp.where(allowed, mixed, -jnp.inf))

    def select_intervention(
        self,
        state: AcquisitionState,
        exploration_rate: float = 0.0,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Choice:
        """The next experiment: the policy's mode, or a draw from `distribution` if a key is given
        (the document's default rate is .1).

        Raises `ValueError` for a state that no decision can be based on (`check_state`),
        `TypeError` for anything but a state.
        """
        if not isinstance(state, AcquisitionState):
            raise TypeError(
                "a decision is based on an AcquisitionState, not "
                f"{type(state).__name__}: make one with state(buffer, task)"
            )
        check_state(state)
        if key is None:
            return _mode(self.policy, state)
        return self.distribution(state, exploration_rate).sample(key)

    def play(
        self,
        key: Key[Array, ""],
        scm: AbstractSCM,
        buffer: ExperienceBuffer,
        num_steps: int,
        *,
        online: bool = False,
        beliefs: CheckConfig | None = BELIEFS,
        most: int | None = None,
    ) -> OptimizationResult:
        """A campaign, jittable and vmappable; the buffer needs `num_steps` free rows.

        The surrogate is checked against the experiments (`lib.check`), of which there are at most
        `most` in the end (as many as places, if left out): the policy reads the averaged surface,
        and chooses among experiments that are worth making. With `online`, it is tuned at every
        state. Without `beliefs` the surrogate is believed as it is, and nothing is tuned.
        """
        most = buffer.valid.shape[0] if most is None else most

        def decide(key, buffer, step):
            """The next experiment and the action to recommend, with what is left to do."""
            left = num_steps - step
            if beliefs is None:
                state = make_state(self.surrogate, buffer, scm.task, step, left)
                return self.policy(state).mode(), state.output.best()
            checked = check(self.surrogate, buffer, scm.task, most, beliefs)
            state = AcquisitionState(buffer, checked.averaged, step, left)
            policy = self.policy(state)
            if online:
                policy = online_policy(key, self.policy, state, checked.gain)
            return checked.choose(policy.logits, beliefs.least_gain_share), checked.recommended(
                beliefs.least_gain_ratio
            )

        return play_campaign(key, scm, buffer, num_steps, decide)

    def run_optimization(
        self,
        scm: AbstractSCM,
        n_steps: int = 30,
        use_online_grpo: bool = True,
        *,
        buffer: ExperienceBuffer,
        key: Key[Array, ""],
    ) -> OptimizationResult:
        """Optimise a system that can be sampled, starting from the data in `buffer`; needs no free
        places in it.
        """
        play = eqx.filter_jit(self.play)
        return play(key, scm, buffer.grow(n_steps), n_steps, online=use_online_grpo)

    def save(self, path: Path | str, **about: Any) -> None:
        """Write the artifact of stage 4; `about` as `make_header` takes it, less the stage and the
        hyperparameters.
        """
        surrogate, policy = self.surrogate.config, self.policy.config
        shape = dict(
            surrogate=surrogate.hyperparameters,
            policy=asdict(policy),
            token_dim=3 * surrogate.model_hidden_dim,
        )
        save(Path(path), self, stage="acbo", hyperparameters=shape, **about)

    @staticmethod
    def load(path: Path | str) -> "TrainedACBOSystem":
        """Read the artifact of stage 4; raises `ArtifactError` as `lib.artifacts.load` does."""
        return load(
            Path(path),
            "acbo",
            lambda shape: TrainedACBOSystem(surrogate_like(shape["surrogate"]), policy_like(shape)),
        )[0]


def surrogate_like(shape: dict) -> ParentSetPredictionModel:
    """A surrogate of that config."""
    return ParentSetPredictionModel(SurrogateConfig(**shape), key=jr.key(0))


def policy_like(shape: dict) -> AcquisitionPolicyNetwork:
    """A policy of that config."""
    return AcquisitionPolicyNetwork(
        PolicyConfig(**shape["policy"]), shape["token_dim"], key=jr.key(0)
    )


def load_surrogate(path: Path | str) -> tuple[ParentSetPredictionModel, dict]:
    """The surrogate of stage 2 and its header."""
    return load(Path(path), "surrogate", surrogate_like)


def load_policy(path: Path | str) -> tuple[AcquisitionPolicyNetwork, dict]:
    """A policy of stage 3 and its header."""
    return load(Path(path), "policy", policy_like)


# --- deployment ---


# numbers of variables that data are padded to: one program each, whatever the data
BUCKETS = 8, 16, 32, 64, 128
AHEAD = 128  # experiments for which there are places from the start
# Without optimisation XLA compiles that program in 3 s instead of 10 s, and it answers in .012 s
# instead of .005 s (8 variables, 128 rows). Up to this size, rows times variables squared, an
# answer takes .15 s longer at most; 50,000 rows of 64 variables took 11 s instead of 5 s.
LARGEST_QUICK = 2**19


@dataclass(frozen=True)
class DeploymentConfig:
    """How a system answers."""

    objective: Literal["min", "max"] = "min"
    """Make the target small or large."""
    beliefs: CheckConfig = BELIEFS
    """How far the surrogate is believed."""


class Answer(NamedTuple):
    """What a deployed system says of a data set, in the units of its buffer.

    The next experiment; the action that it recommends now (variable -1: nothing is better than
    doing nothing); the probabilities of the target's parents, these if no edge were known, and the
    likeliest sets of them; mean and ends of the 90 % band of E[Y | do(X_i = grid[i, b])], the
    probability that it is better than doing nothing, and what that experiment is expected to gain;
    mean and ends of E[Y]; how many experiments were checked and how many lay in their band; and the
    weights `[2, vars]` of the surrogate's surface and of no effect.
    """

    experiment: Choice
    action: Choice
    marginals: Float[Array, " vars"]
    untold: Float[Array, " vars"]
    parent_sets: ParentSetPosterior
    grid: Float[Array, "vars bins"]
    mean: Float[Array, "vars bins"]
    low: Float[Array, "vars bins"]
    high: Float[Array, "vars bins"]
    better: Float[Array, "vars bins"]
    gain: Float[Array, "vars bins"]
    nothing: tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]
    spread: Float[Array, ""]
    experiments: Int[Array, ""]
    in_band: Int[Array, ""]
    widened_by: Float[Array, ""]
    weights: Float[Array, "2 vars"]


class DeployedACBOSystem(NamedTuple):
    """A trained system that answers about data of any size."""

    system: TrainedACBOSystem
    config: DeploymentConfig

    def __call__(self, buffer: ExperienceBuffer, task: Task, remaining: int) -> Answer:
        """What to do with `remaining` experiments left, the next one included; `ValueError` for
        more variables than the largest bucket. To maximise, the target is mirrored: the system
        minimises.
        """
        num_vars = buffer.values.shape[1]
        if num_vars > BUCKETS[-1]:
            raise ValueError(
                f"{num_vars} variables: at most {BUCKETS[-1]} are supported; leave out columns "
                "that cannot matter"
            )
        # In a campaign what was done grows as what remains falls: one program serves all of it, and
        # files of up to four times as many experiments.
        ahead, most = min(remaining, AHEAD), 16
        while most < (np.asarray(buffer.intervened).sum(1) == 1).sum() + ahead:
            most *= 4
        rows = 0, ahead + -(len(buffer.valid) + ahead) % 128
        columns = 0, min(b for b in BUCKETS if b >= num_vars) - num_vars
        # by numpy, which compiles nothing for another number of rows
        data = jax.tree.map(lambda x: np.pad(x, (rows, columns)[: x.ndim]), buffer)
        task = jax.tree.map(lambda x: np.pad(x, columns) if np.ndim(x) else x, task)
        sign = np.float32(1 if self.config.objective == "min" else -1)
        given = self.system, data, task, np.int32(remaining), sign
        quickly = len(data.valid) * data.values.shape[1] ** 2 <= LARGEST_QUICK
        found = compiled(_answer, given, (most, self.config.beliefs), quickly)
        return Answer(**found | {"parent_sets": ParentSetPosterior(*found["parent_sets"])})


def deploy_trained_system(
    system: TrainedACBOSystem, deployment_config: DeploymentConfig = DeploymentConfig()
) -> DeployedACBOSystem:
    """The system ready to answer (phase4_training_infrastructure.md)."""
    return DeployedACBOSystem(system, deployment_config)


@eqx.filter_jit
def _mode(policy: AcquisitionPolicyNetwork, state: AcquisitionState) -> Choice:
    return policy(state).mode()


def _answer(system, buffer, task, remaining, sign, most, beliefs) -> dict:
    """The fields of `Answer`, of the parent sets leaves, about a target that is to be small, or,
    where `sign` is -1, large.
    """
    signs = jnp.where(jnp.arange(buffer.values.shape[1]) == task.target, sign, 1.0)
    buffer = eqx.tree_at(lambda b: b.values, buffer, buffer.values * signs[None])
    checked = check(system.surrogate, buffer, task, most, beliefs)
    belief, output = checked.belief, checked.output
    untold = output
    if task.known is not None:
        untold = system.surrogate.predict(buffer, replace(task, known=None))
    low, high = belief.quantile(0.05), belief.quantile(0.95)
    wider = jnp.where(task.candidates[:, None], (high - low) / (3.29 * output.effect_std), jnp.nan)
    band = 1.645 * belief.nothing_std

    def own(mean, *ends):
        """Mean and ends of a band, from those of what is to be small."""
        return sign * mean, *jnp.where(sign > 0, jnp.stack(ends), -jnp.stack(ends[::-1]))

    mean, low, high = own(belief.mean, low, high)
    # A campaign starts with the data that are there, in training as here: none of it is a step.
    state = AcquisitionState(buffer, checked.averaged, jnp.array(0), remaining)
    return dict(
        experiment=checked.choose(system.policy(state).logits, beliefs.least_gain_share),
        action=checked.recommended(beliefs.least_gain_ratio),
        marginals=output.marginals(),
        untold=untold.marginals(),
        parent_sets=jax.tree.leaves(output.posterior().top_k(5)),
        grid=output.grid,
        mean=mean,
        low=low,
        high=high,
        better=belief.against_nothing[0],
        gain=checked.gain,
        nothing=own(belief.nothing, belief.nothing - band, belief.nothing + band),
        spread=output.observed_std,
        experiments=checked.done.valid.sum(),
        in_band=checked.in_band.sum(),
        widened_by=jnp.nanmedian(wider),
        weights=belief.weights[:2],
    )


# --- tuning while deployed: the group is scored by what is believed, never on the system ---


ONLINE = GRPOConfig(group_size=32, grpo_epochs=1, learning_rate=1e-3)
ONLINE_UPDATES = 5  # groups scored before a decision


def online_policy(
    key: Key[Array, ""],
    policy: AcquisitionPolicyNetwork,
    state: AcquisitionState,
    gain: Float[Array, "vars bins"],
) -> InterventionDistribution:
    """The policy's distribution at `state` after a few GRPO updates on groups whose reward is what
    an experiment is expected to gain, in the target's unit.
    """
    optimiser, output = optax.adam(ONLINE.learning_rate), state.output

    def score(variable, value):
        worth = jnp.interp(value, output.grid[variable], gain[variable]) / output.spread
        return RewardComponents(worth, jnp.zeros_like(worth), jnp.zeros_like(worth), worth)

    def update(learner, key):
        distribution = learner.module(state)
        variable, value = sample_group(key, distribution, ONLINE.group_size)
        log_prob = jax.vmap(distribution.log_prob)(variable, value)
        group = Groups(state, variable, value, log_prob, jax.vmap(score)(variable, value))
        batch = jax.tree.map(lambda leaf: leaf[None], group)
        return grpo_step(learner, optimiser, policy, batch, ONLINE)

    start = Learner.of(policy, optimiser)
    learner, _ = jax.lax.scan(update, start, jr.split(key, ONLINE_UPDATES))
    return learner.module(state)
