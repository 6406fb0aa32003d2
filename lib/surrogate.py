"""The surrogate: one network that maps any data set to the posterior over the target's parent sets and to every intervention's effect.

Rows are exchangeable, so they are not carried through the network: learned features of every scalar and its intervention flag are summed into
cross-moments between every pair of variables (one more row is one more term of a sum), and pair tokens go through row and column attention.
One example at a time; batch with `vmap`.

Cost: about 39 MFLOP forward (XLA's count) for 8 variables and 120 rows at width 64 and 4 blocks. Stage 2 at `small`, three times that per example and
36 examples in each of 7.8 steps a second on two CPU cores, runs at 33 GFLOP/s, a sixth of a large matmul there (197): small batched attention and
elementwise work dominate.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.evidence import NUM_ESTIMATES, NUM_EVIDENCE, NUM_STATISTICS, Frame, Rows, Sums, effect_evidence, pair_statistics, sum_rows
from lib.posterior import ParentSetPosterior
from lib.scm import Task, value_grid


NUM_PLAIN = 4  # features of a scalar beside the learned ones: itself, itself where it was set, whether it was set, one
NUM_MARKS = 5  # of a pair beside its statistics: which are the target, whether it is a variable with itself, how many rows there are


@dataclass(frozen=True)
class SurrogateConfig:
    """Sizes of the network (`SurrogateConfig` of phase4_training_infrastructure.md; training settings are the script's)."""

    model_hidden_dim: int = 64
    """Width of a pair token."""
    model_n_layers: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_moments: int = 10
    """Learned features of each scalar, whose pairwise moments are the network's input."""
    num_components: int = 6
    """Product-Bernoulli components of the parent-set head; 1 gives independent marginals."""
    num_bins: int = 16
    """Values per variable at which effects are predicted, both ends of the range included."""

    @property
    def hyperparameters(self) -> dict:
        """What an artifact needs to rebuild the model."""
        return asdict(self)


def linear(layer: eqx.nn.Linear, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """Apply a layer over the last axis of anything: one matrix product instead of a nest of vmaps."""
    return x @ layer.weight.T + jnp.reshape(layer.bias, (1,) * (x.ndim - 1) + (-1,))  # pyright: ignore[reportArgumentType]  # always has a bias


def mlp(layers: tuple[eqx.nn.Linear, ...], x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """Layers with ReLU between them, over the last axis."""
    for layer in layers[:-1]:
        x = jax.nn.relu(linear(layer, x))
    return linear(layers[-1], x)


def make_mlp(sizes: tuple[int, ...], *, key: Key[Array, ""]) -> tuple[eqx.nn.Linear, ...]:
    """Linear layers of the given sizes."""
    keys = jr.split(key, len(sizes) - 1)
    return tuple(eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True))


def rms_norm(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Root-mean-square normalisation without a learned scale."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


class Attention(eqx.Module):
    """Multi-head self-attention along the second axis of pair tokens."""

    project: eqx.nn.Linear
    out: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, dim: int, num_heads: int, *, key: Key[Array, ""]):
        project_key, out_key = jr.split(key)
        self.project = eqx.nn.Linear(dim, 3 * dim, key=project_key)
        self.out = eqx.nn.Linear(dim, dim, key=out_key)
        self.num_heads = num_heads

    def __call__(self, pairs: Float[Array, "vars vars dim"], var_mask: Bool[Array, " vars"]) -> Float[Array, "vars vars dim"]:
        packed = linear(self.project, rms_norm(pairs)).reshape(*pairs.shape[:-1], 3 * self.num_heads, -1)
        query, key, value = jnp.split(packed, 3, axis=-2)
        attended = jax.nn.dot_product_attention(query, key, value, mask=var_mask[None, None, None])
        return linear(self.out, attended.reshape(pairs.shape))


class Block(eqx.Module):
    """Attention along the rows of the pair matrix, then along its columns, then a feed-forward layer."""

    rows: Attention
    columns: Attention
    feed_forward: tuple[eqx.nn.Linear, ...]

    def __init__(self, dim: int, num_heads: int, *, key: Key[Array, ""]):
        row_key, column_key, forward_key = jr.split(key, 3)
        self.rows, self.columns = Attention(dim, num_heads, key=row_key), Attention(dim, num_heads, key=column_key)
        self.feed_forward = make_mlp((dim, 2 * dim, dim), key=forward_key)

    def __call__(self, pairs: Float[Array, "vars vars dim"], var_mask: Bool[Array, " vars"]) -> Float[Array, "vars vars dim"]:
        pairs = pairs + self.rows(pairs, var_mask)
        pairs = pairs + self.columns(pairs.swapaxes(0, 1), var_mask).swapaxes(0, 1)
        return pairs + mlp(self.feed_forward, rms_norm(pairs))


class SurrogateOutput(eqx.Module):
    """Everything the surrogate says about one data set, effects in the target's own units.

    `logits[components, vars]` and `log_weights[components]` are a mixture of product-Bernoullis over parent sets; `effect_mean` and `effect_std`
    `[vars, bins]` describe E[Y | do(X_i = grid[i, b])], meaningless outside `task.candidates`; `tokens[vars, dim]` and
    `evidence[vars, bins, features]` feed the policy.
    """

    task: Task
    logits: Float[Array, "components vars"]
    log_weights: Float[Array, " components"]
    grid: Float[Array, "vars bins"]
    effect_mean: Float[Array, "vars bins"]
    effect_std: Float[Array, "vars bins"]
    tokens: Float[Array, "vars dim"]
    evidence: Float[Array, "vars bins features"]
    shift: Float[Array, ""]
    spread: Float[Array, ""]

    def log_prob(self, parents: Bool[Array, " vars"]) -> Float[Array, ""]:
        """Exact log-probability of one parent set, in nats; variables that cannot be parents are left out."""
        each = jnp.where(parents[None], jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits))
        return jax.nn.logsumexp(self.log_weights + jnp.where(self.task.possible_parents[None], each, 0.0).sum(-1))

    def marginals(self) -> Float[Array, " vars"]:
        """Exact P(X_i is a parent)."""
        return jnp.where(self.task.possible_parents, jnp.exp(self.log_weights) @ jax.nn.sigmoid(self.logits), 0.0)

    def posterior(self, num_free: int = 8) -> ParentSetPosterior:
        """All subsets of the `num_free` most probable parents (2^num_free sets), renormalised: every set there is, up to `num_free + 1` variables."""
        num_free = min(num_free, self.logits.shape[-1])
        _, likely = jax.lax.top_k(jnp.where(self.task.possible_parents, self.marginals(), -1.0), num_free)
        members = jnp.asarray((np.arange(2**num_free)[:, None] >> np.arange(num_free)) & 1, bool)
        sets = jnp.zeros((2**num_free, self.logits.shape[-1]), bool).at[:, likely].set(members)
        allowed = ~(sets & ~self.task.possible_parents[None]).any(1)
        log_probs = jnp.where(allowed, jax.vmap(self.log_prob)(sets), -jnp.inf)
        return ParentSetPosterior(self.task.target, sets, log_probs - jax.nn.logsumexp(log_probs))

    def best(self) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The recommended action: variable and value of the lowest predicted mean effect."""
        mean = jnp.where(self.task.candidates[:, None], self.effect_mean, jnp.inf)
        variable, index = jnp.unravel_index(jnp.argmin(mean), mean.shape)
        return variable, self.grid[variable, index]


class ParentSetPredictionModel(eqx.Module):
    """The surrogate network; see the module's docstring."""

    scalar: tuple[eqx.nn.Linear, ...]
    embed: tuple[eqx.nn.Linear, ...]
    blocks: Block  # stacked along a leading axis: scanned over, so that depth does not lengthen compilation
    parent_head: tuple[eqx.nn.Linear, ...]
    weight_head: eqx.nn.Linear
    effect_head: tuple[eqx.nn.Linear, ...]
    config: SurrogateConfig = eqx.field(static=True)

    def __init__(self, config: SurrogateConfig, *, key: Key[Array, ""]):
        scalar_key, embed_key, block_key, parent_key, weight_key, effect_key = jr.split(key, 6)
        dim, bins = config.model_hidden_dim, config.num_bins
        self.scalar = make_mlp((2, 32, config.num_moments), key=scalar_key)
        self.embed = make_mlp(((config.num_moments + NUM_PLAIN) ** 2 + NUM_STATISTICS + NUM_MARKS, 2 * dim, dim), key=embed_key)
        make_block = eqx.filter_vmap(lambda k: Block(dim, config.num_heads, key=k))
        self.blocks = make_block(jr.split(block_key, config.model_n_layers))
        self.parent_head = make_mlp((3 * dim, dim, config.num_components), key=parent_key)
        self.weight_head = eqx.nn.Linear(dim, config.num_components, key=weight_key)
        self.effect_head = make_mlp((3 * dim + NUM_EVIDENCE * bins, 2 * dim, 2 * dim, (2 + NUM_ESTIMATES) * bins), key=effect_key)
        self.config = config

    def predict(self, buffer: ExperienceBuffer, task: Task) -> SurrogateOutput:
        """Posterior and effects for one data set."""
        return self.decode(self.encode(buffer, task), task)

    def encode(self, buffer: ExperienceBuffer, task: Task) -> "EncoderState":
        """Everything that the network keeps of a data set: sums over its rows."""
        frame = Frame.of(buffer, task, self.config.num_bins)
        return self._sum(Rows.of(buffer, frame, task.var_mask), frame, task)

    def update(self, state: "EncoderState", task: Task, values: Float[Array, " vars"], intervened: Bool[Array, " vars"]) -> "EncoderState":
        """One more row, at one row's share of the cost of `encode`.

        The units stay those of the first rows: after interventional rows the state is that of the whole data set; observational ones would have
        moved the units a little.
        """
        row = ExperienceBuffer(values[None], intervened[None], jnp.ones(1, bool))
        more = self._sum(Rows.of(row, state.frame, task.var_mask), state.frame, task)
        return EncoderState(state.frame, *jax.tree.map(jnp.add, (state.moments, state.sums), (more.moments, more.sums)))

    def decode(self, state: "EncoderState", task: Task) -> SurrogateOutput:
        """Posterior and effects from the sums."""
        frame = state.frame
        pairs = self._embed(state, task)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        pairs, _ = jax.lax.scan(lambda p, block: (eqx.combine(block, static)(p, task.var_mask), None), pairs, arrays)
        pairs = rms_norm(pairs)
        own = pairs[task.target, task.target]
        tokens = jnp.concatenate([pairs[:, task.target], pairs[task.target], jnp.broadcast_to(own, pairs.shape[1:])], -1)
        evidence = effect_evidence(state.sums, frame, task)
        head = mlp(self.effect_head, jnp.concatenate([tokens, evidence.reshape(evidence.shape[0], -1)], -1))
        free, log_std, gates = jnp.split(head.reshape(*evidence.shape[:2], -1), (1, 2), -1)
        means, log_std = free[..., 0] + (gates * evidence[..., :NUM_ESTIMATES]).sum(-1), log_std[..., 0]
        shift, spread = frame.shift[task.target], frame.spread[task.target]
        return SurrogateOutput(
            task,
            mlp(self.parent_head, tokens).T,
            jax.nn.log_softmax(linear(self.weight_head, own)),
            value_grid(task.low, task.high, self.config.num_bins),
            shift + spread * means,
            spread * jnp.exp(jnp.clip(log_std, -4.0, 2.0)),
            tokens,
            evidence,
            shift,
            spread,
        )

    def _sum(self, rows: Rows, frame: Frame, task: Task) -> "EncoderState":
        learned = mlp(self.scalar, jnp.stack([rows.values, rows.intervened], -1))
        plain = jnp.stack([rows.values, rows.values * rows.intervened, rows.intervened, jnp.ones_like(rows.values)], -1)
        features = jnp.concatenate([learned, plain], -1) * (rows.valid[:, None, None] * task.var_mask[None, :, None])
        flat = features.reshape(rows.values.shape[0], -1)
        return EncoderState(frame, flat.T @ flat, sum_rows(rows, frame, task))

    def _embed(self, state: "EncoderState", task: Task) -> Float[Array, "vars vars dim"]:
        sums, num_vars = state.sums, task.var_mask.shape[0]
        count = jnp.maximum(sums.count, 1.0)
        moments = (state.moments / count).reshape(num_vars, -1, num_vars, state.moments.shape[0] // num_vars)
        moments = moments.transpose(0, 2, 1, 3).reshape(num_vars, num_vars, -1)
        is_target = (jnp.arange(num_vars) == task.target).astype(moments.dtype)
        one = jnp.ones((num_vars, num_vars))
        marks = [
            is_target[:, None] * one,
            is_target[None] * one,
            jnp.eye(num_vars),
            one * jnp.log(sums.observational + 1.0) / 5.0,
            one * jnp.log(count - sums.observational + 1.0) / 5.0,
        ]
        squashed = jnp.sign(moments) * jnp.log1p(5.0 * jnp.abs(moments))
        return mlp(self.embed, jnp.concatenate([squashed, pair_statistics(sums, task.var_mask), jnp.stack(marks, -1)], -1))

    def __call__(self, buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> ParentSetPosterior:
        """The posterior over the target's parent sets."""
        return self.predict(buffer, observed_task(buffer, target)).posterior()

    def predict_effects(self, buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
        """Mean and deviation of E[Y | do(X_i = v)] on each variable's observed range."""
        output = self.predict(buffer, observed_task(buffer, target))
        return output.effect_mean, output.effect_std


class EncoderState(NamedTuple):
    """A data set as the network keeps it; `moments` are sums over rows of products of learned and plain features of all variables."""

    frame: Frame
    moments: Float[Array, "features features"]
    sums: Sums


def observed_task(buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> Task:
    """The task of a buffer without padding whose ranges are those that its rows span."""
    valid = buffer.valid[:, None]
    low, high = jnp.where(valid, buffer.values, jnp.inf).min(0), jnp.where(valid, buffer.values, -jnp.inf).max(0)
    return Task(jnp.asarray(target), low, high, jnp.ones(buffer.values.shape[1], bool))


class SurrogateLosses(NamedTuple):
    """Terms of the surrogate's loss for one example, in nats."""

    parent_nll: Float[Array, ""]
    effect_nll: Float[Array, ""]


def surrogate_losses(output: SurrogateOutput, parents: Bool[Array, " vars"], effects: Float[Array, "vars bins"]) -> SurrogateLosses:
    """NLL of the true parent set, and mean Gaussian NLL of the true effects (in deviations of the target) over candidate variables and values."""
    usable = output.task.candidates[:, None] & jnp.isfinite(effects)
    error = jnp.where(usable, effects, output.effect_mean) - output.effect_mean
    nll = 0.5 * (error / output.effect_std) ** 2 + jnp.log(output.effect_std / output.spread)
    return SurrogateLosses(-output.log_prob(parents), jnp.where(usable, nll, 0.0).sum() / jnp.maximum(usable.sum(), 1))


def expert_kl(output: SurrogateOutput, expert: ParentSetPosterior) -> Float[Array, ""]:
    """KL(expert || surrogate) over the expert's sets, in nats."""
    ours = jax.vmap(output.log_prob)(expert.sets)
    return (expert.probs * jnp.where(expert.probs > 0, expert.log_probs - ours, 0.0)).sum()
