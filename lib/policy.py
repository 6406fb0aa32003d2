"""The acquisition policy: from what is known to a distribution over single-variable interventions,
value included.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.improvement import expected_improvement, log_expected_improvement
from lib.posterior import ParentSetPosterior
from lib.scm import Task
from lib.statistics import NUM_EFFECT_STATISTICS
from lib.surrogate import ParentSetPredictionModel, SurrogateOutput, linear, make_mlp, mlp, rms_norm


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes of the policy network."""

    policy_hidden_dim: int = 64
    """Width of a (variable, value) cell."""
    policy_n_layers: int = 2
    """Layers, each of which also reads the mean and the maximum over all cells."""


class AcquisitionState(eqx.Module):
    """What a decision is based on: data, what the surrogate predicts from them, and how far the
    campaign is. Holds no ground truth.
    """

    buffer: ExperienceBuffer
    output: SurrogateOutput
    step: Int[Array, ""]
    steps_left: Int[Array, ""]

    @property
    def posterior(self) -> ParentSetPosterior:
        """The posterior over the target's parent sets."""
        return self.output.posterior()

    @property
    def task(self) -> Task:
        """Target, ranges and mask."""
        return self.output.task


def make_state(
    surrogate: ParentSetPredictionModel, buffer: ExperienceBuffer, task: Task, step, steps_left
) -> AcquisitionState:
    """The state after `step` experiments with `steps_left` to go."""
    return AcquisitionState(
        buffer, surrogate.predict(buffer, task), jnp.asarray(step), jnp.asarray(steps_left)
    )


def check_state(state: AcquisitionState, target: Int[Array, ""] | int | None = None) -> None:
    """Raise `ValueError` for a state that no decision can be based on; inside `jit`, where values
    are not known, only shapes are checked.

    Its data must have the variables that the surrogate's task has, its target must be one of them,
    that in `target` if given, and something must have a range.
    """
    task, found = state.task, state.buffer.values.shape[-1]
    if found != task.var_mask.shape[-1]:
        raise ValueError(
            f"the state's buffer has {found} variables, its task "
            f"{task.var_mask.shape[-1]}: predict from this buffer"
        )
    if isinstance(task.target, Tracer) or isinstance(target, Tracer):
        return
    if target is not None and int(target) != int(task.target):
        raise ValueError(
            f"the state is about target {int(task.target)}, not {int(target)}: "
            "predict for this target"
        )
    if not 0 <= int(task.target) < found or not bool(task.var_mask[task.target]):
        raise ValueError(
            f"target {int(task.target)} is not one of the {int(task.var_mask.sum())} "
            "variables of the task"
        )
    if not bool(task.candidates.any()):
        raise ValueError(
            "no variable can be set: give one besides the target a range of positive width"
        )


class InterventionDistribution(eqx.Module):
    """A piecewise-constant density over each candidate variable's range.

    A cell is a variable and the values nearest to one bin of its grid; cells at the ends of the
    range are half as wide. Values are measured as a fraction of the range, so log-probabilities,
    entropies and divergences are exact and free of units.
    """

    task: Task
    logits: Float[Array, "vars bins"]  # normalised log-probabilities of cells

    @property
    def num_bins(self) -> int:
        """Cells per variable."""
        return self.logits.shape[-1]

    @property
    def log_widths(self) -> Float[Array, " bins"]:
        """Log of each cell's share of the range."""
        end = jnp.arange(self.num_bins) % (self.num_bins - 1) == 0
        return jnp.log(jnp.where(end, 0.5, 1.0) / (self.num_bins - 1))

    def cell(self, variable: Int[Array, ""], value: Float[Array, ""]) -> Int[Array, ""]:
        """Index of the cell of `variable` that holds `value`."""
        low, high = self.task.low[variable], self.task.high[variable]
        return jnp.clip(
            jnp.round((value - low) / (high - low) * (self.num_bins - 1)), 0, self.num_bins - 1
        ).astype(int)

    def log_prob(self, variable: Int[Array, ""], value: Float[Array, ""]) -> Float[Array, ""]:
        """Log-density of one intervention, per unit of (variable, fraction of its range)."""
        index = self.cell(variable, value)
        return self.logits[variable, index] - self.log_widths[index]

    def sample(self, key: Key[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """A variable and a value."""
        cell_key, value_key = jr.split(key)
        variable, index = jnp.unravel_index(
            jr.categorical(cell_key, self.logits.reshape(-1)), self.logits.shape
        )
        fraction = (index + jr.uniform(value_key, minval=-0.5, maxval=0.5)) / (self.num_bins - 1)
        # the ends' cells are half cells: fold the outer half back in
        folded = jnp.where(fraction > 1, 2 - fraction, jnp.abs(fraction))
        return variable, self.value(variable, folded)

    def mode(self) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The centre of the most probable cell."""
        return self.task.highest(self.logits)

    def value(self, variable: Int[Array, ""], fraction: Float[Array, ""]) -> Float[Array, ""]:
        """The value that lies at `fraction` of a variable's range."""
        return self.task.low[variable] + (self.task.high - self.task.low)[variable] * fraction

    def entropy(self) -> Float[Array, ""]:
        """Differential entropy in nats (0 is uniform over the range of a single variable)."""
        return -(jnp.exp(self.logits) * (self._finite - self.log_widths[None])).sum()

    def kl(self, other: "InterventionDistribution") -> Float[Array, ""]:
        """KL(self || other) in nats."""
        return (jnp.exp(self.logits) * (self._finite - other._finite)).sum()

    @property
    def _finite(self):
        return jnp.where(self.task.candidates[:, None], self.logits, 0.0)


# --- rules on the effect surface: what a policy has to beat ---


def expected_improvement_choice(output: SurrogateOutput) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The variable and value whose expected improvement on the lowest predicted mean is largest."""
    return output.task.highest(
        log_expected_improvement(output.effect_mean, output.effect_std, output.best_value)
    )


def thompson_choice(
    key: Key[Array, ""], output: SurrogateOutput
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The lowest point of a surface drawn from the predicted one (Thompson sampling).

    The surrogate gives a standard deviation for every cell but no correlations. Errors along a
    variable's range share their cause: one draw serves them all, and each variable has its own.
    """
    error = jr.normal(key, (output.effect_mean.shape[0], 1))
    return output.task.highest(-(output.effect_mean + output.effect_std * error))


# --- the policy ---


NUM_CELL_FEATURES = 8 + NUM_EFFECT_STATISTICS
LARGEST_FEATURE = 10.0  # beyond, clipped: units of the target, or logarithms


def cell_features(state: AcquisitionState) -> Float[Array, "vars bins features"]:
    """What the policy sees of a (variable, value), in the unit of the target.

    8 numbers: predicted effect above the incumbent, and tanh of it; log of its standard deviation;
    their ratio; log of the expected improvement; probability that the variable is a parent;
    experiments to go and made. Then the 13 of `effect_statistics`.
    """
    output = state.output
    std = output.effect_std / output.spread
    gap = (output.effect_mean - output.best_value) / output.spread
    everywhere = jnp.ones_like(gap)
    features = [
        gap,
        jnp.tanh(gap),
        jnp.log(std),
        gap / (std + 0.1),  # bounded where the surrogate is sure to a tenth
        jnp.log(expected_improvement(gap, std, 0.0) + 1e-3),  # less is no improvement at all
        output.marginals()[:, None] * everywhere,
        # log(20) is three: campaigns of twenty experiments span one
        jnp.log1p(state.steps_left.astype(gap.dtype)) * everywhere / 3.0,
        jnp.log1p(state.step.astype(gap.dtype)) * everywhere / 3.0,
    ]
    return jnp.concatenate([jnp.stack(features, -1), output.statistics], -1).clip(
        -LARGEST_FEATURE, LARGEST_FEATURE
    )


def feature_span(state: AcquisitionState) -> Float[Array, "2 features"]:
    """Lowest and highest of every feature over all cells that may be set."""
    allowed, features = state.task.candidates[:, None, None], cell_features(state)
    low = jnp.where(allowed, features, LARGEST_FEATURE).min((0, 1))
    return jnp.stack([low, jnp.where(allowed, features, -LARGEST_FEATURE).max((0, 1))])


class AcquisitionPolicyNetwork(eqx.Module):
    """Scores every (variable, value) cell from its features, its variable's token and the mean and
    maximum over all cells; no gradient reaches the surrogate.

    The features also reach the score directly: predicted effect and expected improvement are good
    acquisitions already, to be corrected only. They are clipped to `span`, the lowest and highest
    of each that the campaigns before the first GRPO iteration showed, in training and later: a
    longer campaign or a wider range than any in training gives no input that training never had.
    """

    cell: eqx.nn.Linear
    token: eqx.nn.Linear
    layers: tuple[tuple[eqx.nn.Linear, ...], ...]
    score: tuple[eqx.nn.Linear, ...]
    direct: eqx.nn.Linear
    span: Float[Array, "2 features"]
    config: PolicyConfig = eqx.field(static=True)

    def __init__(self, config: PolicyConfig, token_dim: int, *, key: Key[Array, ""]):
        cell_key, token_key, layer_key, score_key, direct_key = jr.split(key, 5)
        dim = config.policy_hidden_dim
        self.cell = eqx.nn.Linear(NUM_CELL_FEATURES, dim, key=cell_key)
        self.token = eqx.nn.Linear(token_dim, dim, key=token_key)
        self.layers = tuple(
            make_mlp((3 * dim, dim, dim), key=k)
            for k in jr.split(layer_key, config.policy_n_layers)
        )
        self.score = make_mlp((dim, dim, 1), key=score_key)
        self.direct = eqx.nn.Linear(NUM_CELL_FEATURES, 1, key=direct_key)
        self.span = jnp.array([[-LARGEST_FEATURE], [LARGEST_FEATURE]]).repeat(NUM_CELL_FEATURES, 1)
        self.config = config

    def __call__(self, state: AcquisitionState) -> InterventionDistribution:
        state = jax.lax.stop_gradient(state)
        allowed = state.task.candidates[:, None, None]
        span = jax.lax.stop_gradient(self.span)[:, None, None]
        features = jnp.clip(cell_features(state), *span)
        hidden = linear(self.cell, features) + linear(self.token, state.output.tokens)[:, None]
        cells = jnp.maximum(allowed.sum() * hidden.shape[1], 1)
        for layer in self.layers:
            mean = jnp.where(allowed, hidden, 0.0).sum((0, 1)) / cells
            peak = jnp.where(allowed, hidden, -jnp.inf).max((0, 1))
            context = jnp.broadcast_to(
                jnp.concatenate([mean, jnp.where(jnp.isfinite(peak), peak, 0.0)]),
                (*hidden.shape[:2], 2 * mean.shape[0]),
            )
            hidden = hidden + mlp(layer, jnp.concatenate([rms_norm(hidden), rms_norm(context)], -1))
        scores = mlp(self.score, rms_norm(hidden)) + linear(self.direct, features)
        logits = jnp.where(allowed[..., 0], scores[..., 0], -jnp.inf)
        return InterventionDistribution(state.task, jax.nn.log_softmax(logits, axis=(0, 1)))
