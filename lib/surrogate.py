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

from lib.baselines import additive_ridge_surface, least_squares_surface, powers_of
from lib.buffer import ExperienceBuffer
from lib.linalg import positive_inverse
from lib.posterior import ParentSetPosterior
from lib.scm import Task, value_grid


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


class Standardised(NamedTuple):
    """A data set in units of each variable's observational mean and deviation."""

    values: Float[Array, "samples vars"]
    intervened: Float[Array, "samples vars"]
    valid: Float[Array, " samples"]
    observational: Float[Array, " samples"]
    grid: Float[Array, "vars bins"]
    shift: Float[Array, " vars"]
    spread: Float[Array, " vars"]


MAX_DEVIATIONS = 10.0  # further out, a scalar is clipped: an outlier must not swamp every moment


def standardise(buffer: ExperienceBuffer, task: Task, num_bins: int) -> Standardised:
    """Centre and scale every variable by its observational rows (all valid rows where there are fewer than two); padding is zero."""
    rows = jnp.where(buffer.observational.sum() >= 2, buffer.observational, buffer.valid)[:, None]
    count = jnp.maximum(rows.sum(), 1)
    present = task.var_mask[None]
    raw = jnp.where(buffer.valid[:, None] & present, buffer.values, 0.0)
    shift = jnp.where(rows, raw, 0.0).sum(0) / count
    variance = jnp.where(rows, (raw - shift[None]) ** 2, 0.0).sum(0) / count
    spread = jnp.sqrt(variance)
    spread = jnp.where(spread > 1e-6 * (1.0 + jnp.abs(shift)), spread, 1.0)
    values = jnp.clip((raw - shift[None]) / spread[None], -MAX_DEVIATIONS, MAX_DEVIATIONS)
    values = jnp.where(buffer.valid[:, None] & present, values, 0.0)
    grid = (value_grid(task.low, task.high, num_bins) - shift[:, None]) / spread[:, None]
    return Standardised(
        values,
        (buffer.intervened & buffer.valid[:, None]).astype(raw.dtype),
        buffer.valid.astype(raw.dtype),
        buffer.observational.astype(raw.dtype),
        jnp.where(task.var_mask[:, None], jnp.clip(grid, -MAX_DEVIATIONS, MAX_DEVIATIONS), 0.0),
        shift,
        spread,
    )


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
        self.embed = make_mlp(((config.num_moments + NUM_PLAIN) ** 2 + NUM_STATISTICS, 2 * dim, dim), key=embed_key)
        make_block = eqx.filter_vmap(lambda k: Block(dim, config.num_heads, key=k))
        self.blocks = make_block(jr.split(block_key, config.model_n_layers))
        self.parent_head = make_mlp((3 * dim, dim, config.num_components), key=parent_key)
        self.weight_head = eqx.nn.Linear(dim, config.num_components, key=weight_key)
        self.effect_head = make_mlp((3 * dim + NUM_EVIDENCE * bins, 2 * dim, 2 * dim, (2 + NUM_ESTIMATES) * bins), key=effect_key)
        self.config = config

    def predict(self, buffer: ExperienceBuffer, task: Task) -> SurrogateOutput:
        """Posterior and effects for one data set."""
        data = standardise(buffer, task, self.config.num_bins)
        pairs = self._embed(data, task)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        pairs, _ = jax.lax.scan(lambda p, block: (eqx.combine(block, static)(p, task.var_mask), None), pairs, arrays)
        pairs = rms_norm(pairs)
        own = pairs[task.target, task.target]
        tokens = jnp.concatenate([pairs[:, task.target], pairs[task.target], jnp.broadcast_to(own, pairs.shape[1:])], -1)
        evidence = jax.lax.stop_gradient(effect_evidence(data, task))
        head = mlp(self.effect_head, jnp.concatenate([tokens, evidence.reshape(evidence.shape[0], -1)], -1))
        free, log_std, gates = jnp.split(head.reshape(*evidence.shape[:2], -1), (1, 2), -1)
        means, log_std = free[..., 0] + (gates * evidence[..., :NUM_ESTIMATES]).sum(-1), log_std[..., 0]
        shift, spread = data.shift[task.target], data.spread[task.target]
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

    def _embed(self, data: Standardised, task: Task) -> Float[Array, "vars vars dim"]:
        present, count = task.var_mask, jnp.maximum(data.valid.sum(), 1.0)
        num_rows, num_vars = data.values.shape
        learned = mlp(self.scalar, jnp.stack([data.values, data.intervened], -1))
        plain = jnp.stack([data.values, data.values * data.intervened, data.intervened, jnp.ones_like(data.values)], -1)
        features = jnp.concatenate([learned, plain], -1) * (data.valid[:, None, None] * present[None, :, None])
        size = features.shape[-1]
        flat = features.reshape(num_rows, num_vars * size)
        moments = (flat.T @ flat / count).reshape(num_vars, size, num_vars, size).transpose(0, 2, 1, 3).reshape(num_vars, num_vars, -1)
        is_target = (jnp.arange(num_vars) == task.target).astype(flat.dtype)
        observed, everything = covariance(data.values, data.observational, present), covariance(data.values, data.valid, present)
        one = jnp.ones((num_vars, num_vars))
        statistics = [
            observed,
            partial_correlation(observed),
            partial_correlation(everything),
            smooth_correlation(data),
            is_target[:, None] * one,
            is_target[None] * one,
            jnp.eye(num_vars),
            one * jnp.log(data.observational.sum() + 1.0) / 5.0,
            one * jnp.log(count - data.observational.sum() + 1.0) / 5.0,
        ]
        squashed = jnp.sign(moments) * jnp.log1p(5.0 * jnp.abs(moments))
        return mlp(self.embed, jnp.concatenate([squashed, jnp.stack(statistics, -1)], -1))

    def __call__(self, buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> ParentSetPosterior:
        """The posterior over the target's parent sets."""
        return self.predict(buffer, observed_task(buffer, target)).posterior()

    def predict_effects(self, buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
        """Mean and deviation of E[Y | do(X_i = v)] on each variable's observed range."""
        output = self.predict(buffer, observed_task(buffer, target))
        return output.effect_mean, output.effect_std


NUM_PLAIN, NUM_STATISTICS = 4, 9  # hand-made features per scalar, and per pair, beside the learned ones


def observed_task(buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> Task:
    """The task of a buffer without padding whose ranges are those that its rows span."""
    valid = buffer.valid[:, None]
    low, high = jnp.where(valid, buffer.values, jnp.inf).min(0), jnp.where(valid, buffer.values, -jnp.inf).max(0)
    return Task(jnp.asarray(target), low, high, jnp.ones(buffer.values.shape[1], bool))


def covariance(values: Float[Array, "samples vars"], rows: Float[Array, " samples"], present: Bool[Array, " vars"]) -> Float[Array, "vars vars"]:
    """Second moments over the marked rows plus a ridge; the identity on padded variables, so that inverting it leaves the others alone."""
    weighted = values * rows[:, None]
    return weighted.T @ values / (rows.sum() + 1.0) + jnp.diag(jnp.where(present, 0.05, 1.0))


def partial_correlation(moments: Float[Array, "vars vars"]) -> Float[Array, "vars vars"]:
    """Partial correlations from a regularised covariance."""
    precision = positive_inverse(moments)
    scale = jnp.sqrt(jnp.diag(precision))
    return -precision / scale[:, None] / scale[None]


def bumps(values: Float[Array, "samples vars"], centres: Float[Array, "vars bins"], width: Float[Array, " vars"]):
    """Gaussian bumps `[samples, vars, bins]` around the centres of each variable."""
    return jnp.exp(-0.5 * ((values[:, :, None] - centres[None]) / width[None, :, None]) ** 2)


def smooth_correlation(data: Standardised) -> Float[Array, "vars vars"]:
    """Correlation `[i, j]` of variable j with the best smooth function of variable i over the observational rows: it sees waves that moments miss."""
    num_vars = data.values.shape[1]
    rows = data.observational[:, None] * data.values
    centres = jnp.broadcast_to(jnp.linspace(-2.5, 2.5, 11)[None], (num_vars, 11))
    features = bumps(data.values, centres, jnp.full(num_vars, 0.5)) * data.observational[:, None, None]
    features = features - features.sum(0, keepdims=True) / jnp.maximum(data.observational.sum(), 1.0) * data.observational[:, None, None]
    moments = jnp.einsum("nvp,nvq->vpq", features, features) + jnp.eye(11)[None]
    against = jnp.einsum("nvp,nw->vpw", features, rows)
    explained = jnp.einsum("vpw,vpq,vqw->vw", against, jax.vmap(positive_inverse)(moments), against)
    return jnp.sqrt(jnp.clip(explained / jnp.maximum((rows**2).sum(0), 1.0)[None], 0.0, 1.0))


NUM_ESTIMATES = 7  # the first of the evidence are estimates of the effect itself, which the network may pass on
NUM_EVIDENCE = 13


def effect_evidence(data: Standardised, task: Task) -> Float[Array, "vars bins features"]:
    """What plain statistics say about every (variable, value), in deviations of the target.

    Estimates: outcomes seen there and done there (two widths), and four regressions of the target: linear and additive cubic on all variables,
    cubic and smooth on this variable alone. Then how often each was seen, how sure the smooth one is, and where the value lies. The network learns
    when to believe which.
    """
    width = 0.5 * (data.grid[:, 1:] - data.grid[:, :-1]).mean(-1) + 0.15
    near, wide = bumps(data.values, data.grid, width), bumps(data.values, data.grid, 3.0 * width)
    outcome = jnp.take(data.values, task.target, axis=1)
    usable = data.valid * (1.0 - jnp.take(data.intervened, task.target, axis=1))
    observed, done = (data.observational * usable)[:, None, None], (data.intervened * usable[:, None])[:, :, None]
    seen_count, near_count, wide_count = (near * observed).sum(0), (near * done).sum(0), (wide * done).sum(0)
    seen_mean = jnp.einsum("nvb,n->vb", near * observed, outcome) / (seen_count + 1.0)
    near_mean = jnp.einsum("nvb,n->vb", near * done, outcome) / (near_count + 0.3)
    wide_mean = jnp.einsum("nvb,n->vb", wide * done, outcome) / (wide_count + 0.3)
    rows = ExperienceBuffer(data.values, data.intervened > 0, data.valid > 0)
    low, high, bins = data.grid[:, 0], data.grid[:, -1], data.grid.shape[1]
    alone = (observed + done)[..., 0]
    smooth, certainty = smooth_surface(near, outcome, alone, bumps(data.grid.T, data.grid, width).swapaxes(0, 1))
    estimates = [
        seen_mean,
        near_mean,
        wide_mean,
        least_squares_surface(rows, task.target, low, high, bins),
        additive_ridge_surface(rows, task.target, low, high, bins),
        single_cause_surface(data.values, outcome, alone, data.grid),
        smooth,
    ]
    counts = [jnp.log1p(seen_count), jnp.log1p(near_count), jnp.log1p(wide_count), near_count / (near_count + 0.3)]
    features = jnp.stack([*estimates, *counts, certainty, data.grid], -1)
    return jnp.where(task.var_mask[:, None, None], jnp.clip(features, -MAX_DEVIATIONS, MAX_DEVIATIONS), 0.0)


def single_cause_surface(
    values: Float[Array, "samples vars"], outcome: Float[Array, " samples"], weights: Float[Array, "samples vars"], grid: Float[Array, "vars bins"]
) -> Float[Array, "vars bins"]:
    """Cubic ridge regression of the outcome on each variable by itself over its weighted rows: its total effect where nothing confounds it."""
    middle, half = 0.5 * (grid[:, 0] + grid[:, -1]), jnp.maximum(0.5 * (grid[:, -1] - grid[:, 0]), 1e-3)
    powers = powers_of((values - middle[None]) / half[None], 3)  # [samples, vars, powers]
    total = jnp.maximum(weights.sum(0), 1.0)
    centre = jnp.einsum("nv,nvp->vp", weights, powers) / total[:, None]
    level = (weights * outcome[:, None]).sum(0) / total
    design = (powers - centre[None]) * weights[:, :, None]
    moments = jnp.einsum("nvp,nvq->vpq", design, powers - centre[None]) + jnp.eye(3)[None]
    slopes = jnp.einsum("vpq,vq->vp", jax.vmap(positive_inverse)(moments), jnp.einsum("nvp,n->vp", design, outcome))
    return level[:, None] + jnp.einsum("vbp,vp->vb", powers_of((grid - middle[:, None]) / half[:, None], 3) - centre[:, None], slopes)


def smooth_surface(
    near: Float[Array, "samples vars bins"],
    outcome: Float[Array, " samples"],
    weights: Float[Array, "samples vars"],
    at_grid: Float[Array, "vars bins bins"],
) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
    """Ridge regression of the outcome on bumps along each variable by itself, over its weighted rows, and the log of its variance on the grid."""
    total = jnp.maximum(weights.sum(0), 1.0)
    level = (weights * outcome[:, None]).sum(0) / total
    features = near * weights[:, :, None]
    moments = jnp.einsum("nvp,nvq->vpq", features, near) + 0.5 * jnp.eye(near.shape[-1])[None]
    inverse = jax.vmap(positive_inverse)(moments)
    slopes = jnp.einsum("vpq,nvq,nv->vp", inverse, features, outcome[:, None] - level[None])
    variance = jnp.einsum("vbp,vpq,vbq->vb", at_grid, inverse, at_grid)
    return level[:, None] + jnp.einsum("vbp,vp->vb", at_grid, slopes), jnp.log(variance + 1e-3)


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
