"""The trained system: surrogate and policy together, from a buffer to the next experiment, without
the expert and without ground truth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from lib.artifacts import load_module, save_module
from lib.buffer import ExperienceBuffer
from lib.causal_gp import expected_improvement, fit_causal_gp
from lib.grpo import Groups, GRPOConfig, generate_group_interventions, update_acquisition_grpo
from lib.policy import (
    AcquisitionPolicyNetwork,
    AcquisitionState,
    InterventionDistribution,
    PolicyConfig,
    check_state,
    make_state,
)
from lib.posterior import ParentSetPosterior
from lib.rewards import RewardComponents
from lib.scm import AbstractSCM, Intervention, Task, experiment_key
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig, observed_task


Choice = tuple[Int[Array, ""], Float[Array, ""]]  # a variable and the value to set it to


class OptimizationResult(eqx.Module):
    """A campaign: the experiments `[steps]`, what would have been recommended before the first and
    after each `[steps+1]`, and all data.
    """

    variable: Int[Array, " steps"]
    value: Float[Array, " steps"]
    outcome: Float[Array, " steps"]
    recommended_variable: Int[Array, " steps+1"]
    recommended_value: Float[Array, " steps+1"]
    buffer: ExperienceBuffer


def run_campaign(
    key: Key[Array, ""],
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    num_steps: int,
    decide: Callable[[Key[Array, ""], ExperienceBuffer, Int[Array, ""]], tuple[Choice, Choice]],
) -> OptimizationResult:
    """`num_steps` single-row experiments with any method.

    `decide(key, buffer, step)` returns the next experiment and the action that the method would
    recommend now. The noise of experiment t is that of `experiment_key(key, t)`, so methods run
    with the same key are paired. The buffer needs `num_steps` free places behind its valid rows:
    `ValueError` if it has fewer; where only a traced program can tell, every number of the result
    is nan.
    """
    method_key = jr.fold_in(key, 0)
    num_vars, start, capacity = scm.var_mask.shape[0], buffer.size, buffer.valid.shape[0]
    if capacity < num_steps or not isinstance(start, Tracer) and int(start) + num_steps > capacity:
        raise ValueError(
            f"the buffer has {capacity} places, too few for its rows and {num_steps} "
            "experiments: use grow()"
        )

    def step(buffer, t):
        (variable, value), recommended = decide(jr.fold_in(method_key, t), buffer, t)
        intervention = Intervention.single(variable, value, num_vars)
        row = scm.sample(experiment_key(key, t), intervention, 1)[0]
        return buffer.write(start + t, intervention, row), (
            variable,
            value,
            jnp.take(row, scm.target),
            *recommended,
        )

    buffer, (variable, value, outcome, *recommended) = jax.lax.scan(
        step, buffer, jnp.arange(num_steps)
    )
    _, last = decide(jr.fold_in(method_key, num_steps), buffer, jnp.array(num_steps))
    recommended_variable, recommended_value = (
        jnp.append(path, end) for path, end in zip(recommended, last, strict=True)
    )
    result = OptimizationResult(
        variable, value, outcome, recommended_variable, recommended_value, buffer
    )
    fits = start + num_steps <= capacity
    return jax.tree.map(
        lambda leaf: jnp.where(fits, leaf, jnp.nan) if eqx.is_inexact_array(leaf) else leaf, result
    )


def flip_target(buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> ExperienceBuffer:
    """The same data with the target's sign changed: maximising one is minimising the other."""
    sign = jnp.where(jnp.arange(buffer.values.shape[1]) == target, -1.0, 1.0)
    return ExperienceBuffer(buffer.values * sign[None], buffer.intervened, buffer.valid)


@dataclass(frozen=True)
class OnlineConfig:
    """Fine-tuning of the policy at one state of a deployed campaign."""

    grpo: GRPOConfig = GRPOConfig(group_size=32, grpo_epochs=1, learning_rate=1e-3)
    """Settings of GRPO."""
    updates: int = 5
    """Groups scored before a decision."""


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
        """What the system knows, ready for a decision."""
        return make_state(self.surrogate, buffer, task, step, steps_left)

    def predict_posterior(
        self, buffer: ExperienceBuffer, target: Int[Array, ""] | int
    ) -> ParentSetPosterior:
        """The posterior over the target's parent sets; compiled, one program per number of
        variables and started 128 rows.

        Raises `ValueError` for a target that is not a variable of `buffer`.
        """
        task = observed_task(buffer, target)
        return _posterior(self.surrogate, buffer.grow(-buffer.valid.shape[0] % 128), task)

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
        online: OnlineConfig | None = None,
    ) -> OptimizationResult:
        """A campaign, jittable and vmappable; the buffer needs `num_steps` free places. With
        `online`, the policy is tuned at every state.
        """

        def decide(key, buffer, step):
            state = self.state(buffer, scm.task, step, num_steps - step)
            if online is None:
                return self.policy(state).mode(), state.output.best()
            return online_policy(key, self, state, online).mode(), state.output.best()

        return run_campaign(key, scm, buffer, num_steps, decide)

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
        online = OnlineConfig() if use_online_grpo else None
        return _play(self, key, scm, buffer.grow(n_steps), n_steps, online)

    def save(
        self,
        path: Path,
        *,
        config: dict,
        seed: int,
        step: int,
        parents: Sequence[Path],
        metrics: dict,
    ) -> None:
        """Write the artifact of stage 4."""
        token_dim = 3 * self.surrogate.config.model_hidden_dim
        shape = dict(
            surrogate=self.surrogate.config.hyperparameters,
            policy=self.policy.config.hyperparameters,
            token_dim=token_dim,
        )
        save_module(
            path,
            self,
            stage="acbo",
            config=config,
            hyperparameters=shape,
            seed=seed,
            step=step,
            parents=parents,
            metrics=metrics,
        )

    @staticmethod
    def load(path: Path | str) -> "TrainedACBOSystem":
        """Read the artifact of stage 4; raises `ArtifactError` as `load_module` does."""

        def build(shape):
            surrogate = ParentSetPredictionModel(
                SurrogateConfig(**shape["surrogate"]), key=jr.key(0)
            )
            return TrainedACBOSystem(
                surrogate,
                AcquisitionPolicyNetwork(
                    PolicyConfig(**shape["policy"]), shape["token_dim"], key=jr.key(0)
                ),
            )

        return load_module(Path(path), "acbo", build)[0]


@eqx.filter_jit
def _posterior(
    surrogate: ParentSetPredictionModel, buffer: ExperienceBuffer, task: Task
) -> ParentSetPosterior:
    return surrogate.predict(buffer, task).posterior()


@eqx.filter_jit
def _mode(policy: AcquisitionPolicyNetwork, state: AcquisitionState) -> Choice:
    return policy(state).mode()


@eqx.filter_jit
def _play(system, key, scm, buffer, num_steps, online):
    return system.play(key, scm, buffer, num_steps, online=online)


def load_surrogate(path: Path) -> tuple[ParentSetPredictionModel, dict]:
    """The surrogate of stage 2 and its header."""
    return load_module(
        path,
        "surrogate",
        lambda shape: ParentSetPredictionModel(SurrogateConfig(**shape), key=jr.key(0)),
    )


def load_policy(path: Path) -> tuple[AcquisitionPolicyNetwork, dict]:
    """A policy of stage 3 and its header."""
    return load_module(
        path,
        "policy",
        lambda shape: AcquisitionPolicyNetwork(
            PolicyConfig(**shape["policy"]), shape["token_dim"], key=jr.key(0)
        ),
    )


# --- deployment: the group is scored on a fitted model, never on the system ---


def effect_model(
    surrogate: ParentSetPredictionModel, state: AcquisitionState
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Mean and deviation of E[Y | do] on the grid from a causal-prior GP per variable: prior from
    the surrogate on the observational rows, data from the interventional ones.

    The surrogate sees no intervention here, so no row counts twice. Outcomes are single rows: their
    noise is fitted as a share of the variance of Y.
    """
    buffer, task = state.buffer, state.task
    observed = ExperienceBuffer(buffer.values, buffer.intervened, buffer.observational)
    prior = surrogate.predict(observed, task)
    outcome = jnp.take(buffer.values, task.target, axis=1)
    used = (buffer.intervened & buffer.valid[:, None] & task.candidates[None]).T
    variance = jnp.full(outcome.shape, prior.spread**2)

    def one_variable(grid, mean, deviation, points, used):
        gp = fit_causal_gp(
            grid,
            mean,
            deviation,
            points,
            outcome,
            variance,
            used,
            unit=prior.spread**2,
            noise_scales=(0.05, 0.2, 0.8),
        )
        return gp(grid)

    return jax.vmap(one_variable)(
        prior.grid, prior.effect_mean, prior.effect_std, buffer.values.T, used
    )


def online_policy(
    key: Key[Array, ""], system: TrainedACBOSystem, state: AcquisitionState, config: OnlineConfig
) -> InterventionDistribution:
    """The policy's distribution at `state` after a few GRPO updates on groups whose reward is
    expected improvement under `effect_model`.
    """
    mean, std = effect_model(system.surrogate, state)
    best = jnp.where(state.task.candidates[:, None], mean, jnp.inf).min()
    improvement = expected_improvement(mean, std, best) / state.output.spread
    optimiser = optax.adam(config.grpo.learning_rate)
    dynamic, static = eqx.partition(
        (system.policy, optimiser.init(eqx.filter(system.policy, eqx.is_array))), eqx.is_array
    )

    def update(dynamic, key):
        policy, optimiser_state = eqx.combine(dynamic, static)
        distribution = policy(state)
        variable, value = generate_group_interventions(key, distribution, config.grpo.group_size)

        def score(variable, value):
            gain = jnp.interp(value, state.output.grid[variable], improvement[variable])
            return RewardComponents(gain, jnp.zeros_like(gain), jnp.zeros_like(gain), gain)

        reward = jax.vmap(score)(variable, value)
        group = Groups(
            state,
            variable,
            value,
            jax.vmap(distribution.log_prob)(variable, value),
            reward,
            reward.total,
        )
        batch = jax.tree.map(lambda leaf: leaf[None], group)
        policy, optimiser_state, _ = update_acquisition_grpo(
            policy,
            optimiser_state,
            optimiser,
            system.policy,
            batch,
            config.grpo,
            config.grpo.kl_weight,
        )
        return eqx.filter((policy, optimiser_state), eqx.is_array), None

    dynamic, _ = jax.lax.scan(update, dynamic, jr.split(key, config.updates))
    return eqx.combine(dynamic, static)[0](state)
