"""The surrogate: one network that maps any data set to the posterior over the target's parent sets
and to every intervention's effect.

Rows are exchangeable, so the network does not read them: it reads statistics (lib/statistics.py)
of sums over them (lib/sums.py). It embeds those of every ordered pair of variables and is a
transformer over the matrix of pairs. One example at a time; batch with `vmap`.

Cost (XLA's count): 40 MFLOP for 8 variables and 256 rows, of which the blocks are 19; for 128
variables 21 GFLOP, and 136 MiB beside the data, of which one block's attention needs 82.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.pairs import NUM_PAIR_STATISTICS
from lib.posterior import ParentSetPosterior
from lib.problems import Problem
from lib.scm import Task, check_index, value_grid
from lib.statistics import NUM_EFFECT_STATISTICS, NUM_ESTIMATES, statistics
from lib.sums import Summary
from lib.training import Learner


WEIGHT_DECAY = 0.01  # of matrices, decoupled
CERTAIN = 30.0  # a logit: in float32 its probability is one


@dataclass(frozen=True)
class SurrogateConfig:
    """Sizes of the network (`SurrogateConfig` of phase4_training_infrastructure.md; training
    settings are the script's).
    """

    model_hidden_dim: int = 64
    """Width of a pair token."""
    model_n_layers: int = 4
    """Number of blocks."""
    num_heads: int = 2
    """Heads of attention along rows, and as many along columns."""
    head_dim: int = 16
    """Width of a head's queries, keys and values."""
    num_components: int = 6
    """Product-Bernoulli components of the parent-set head; 1 gives independent marginals."""
    num_bins: int = 16
    """Values per variable at which effects are predicted, both ends of the range included."""
    mixed_precision: bool = False
    """Blocks in bfloat16: for a GPU, where it is faster; parameters and heads stay in float32."""

    @property
    def hyperparameters(self) -> dict:
        """What an artifact needs to rebuild the model."""
        return asdict(self)


def linear(layer: eqx.nn.Linear, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """A layer over the last axis of anything: one matrix product instead of a nest of vmaps."""
    bias = cast(Array, layer.bias)  # all layers have one
    return x @ layer.weight.T + jnp.reshape(bias, (1,) * (x.ndim - 1) + (-1,))


def mlp(
    layers: tuple[eqx.nn.Linear, ...], x: Float[Array, "*batch in"]
) -> Float[Array, "*batch out"]:
    """Layers with ReLU between them, over the last axis."""
    for layer in layers[:-1]:
        x = jax.nn.relu(linear(layer, x))
    return linear(layers[-1], x)


def make_mlp(sizes: tuple[int, ...], *, key: Key[Array, ""]) -> tuple[eqx.nn.Linear, ...]:
    """Linear layers of the given sizes."""
    keys = jr.split(key, len(sizes) - 1)
    return tuple(
        eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
    )


def rms_norm(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Root-mean-square normalisation without a learned scale; 1e-6 is for a vector of zeros."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


class Block(eqx.Module):
    """A transformer's block over the matrix of pairs: multi-head attention along its rows and along
    its columns, in parallel with a feed-forward layer (one projection in, one out).

    This is triangle attention (AlphaFold 2, Jumper et al. 2021, supplement, algorithms 13 and 14),
    without gates. In a row, the query of (i, j) meets the keys of all (i, k), with a bias from
    (j, k); in a column it meets those of all (k, j), with a bias from (k, i). The bias is what lets
    (i, k) and (k, j) meet, as variable elimination needs.
    """

    project: eqx.nn.Linear
    out: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)

    def __init__(self, dim: int, num_heads: int, head_dim: int, *, key: Key[Array, ""]):
        project_key, out_key = jr.split(key)
        attention = num_heads * (3 * head_dim + 1)  # per head: query, key, value and a bias
        self.project = eqx.nn.Linear(dim, 2 * attention + 2 * dim, key=project_key)
        self.out = eqx.nn.Linear(2 * num_heads * head_dim + 2 * dim, dim, key=out_key)
        self.num_heads, self.head_dim = num_heads, head_dim

    def __call__(
        self, pairs: Float[Array, "vars vars dim"], var_mask: Bool[Array, " vars"]
    ) -> Float[Array, "vars vars dim"]:
        attention = self.num_heads * (3 * self.head_dim + 1)
        rows, columns, forward = jnp.split(
            linear(self.project, rms_norm(pairs)), (attention, 2 * attention), -1
        )
        along_rows = self.attend(rows, var_mask)
        along_columns = self.attend(columns.swapaxes(0, 1), var_mask).swapaxes(0, 1)
        mixed = jnp.concatenate([along_rows, along_columns, jax.nn.relu(forward)], -1)
        return pairs + linear(self.out, mixed)

    def attend(
        self, projected: Float[Array, "vars vars channels"], var_mask: Bool[Array, " vars"]
    ) -> Float[Array, "vars vars values"]:
        """Attention within every row: from (i, j) to all (i, k) of variables k that exist."""
        heads = projected.reshape(*projected.shape[:2], self.num_heads, -1)
        # queries, keys and values [i, j, head, head_dim]; bias [j, k, head, 1]
        queries, keys, values, bias = jnp.split(heads, self.head_dim * np.arange(1, 4), -1)
        attended = jax.nn.dot_product_attention(
            queries, keys, values, bias=bias.transpose(3, 2, 0, 1), mask=var_mask[None, None, None]
        )
        return attended.reshape(*projected.shape[:2], -1)


class SurrogateOutput(eqx.Module):
    """Everything the surrogate predicts from one data set, effects in the target's own units.

    `logits[components, vars]` and `log_weights[components]` are a mixture of product-Bernoullis
    over parent sets; `effect_mean` and `effect_std` `[vars, bins]` describe
    E[Y | do(X_i = grid[i, b])], meaningless outside `task.candidates`; `tokens[vars, dim]` and
    `statistics[vars, bins, effect]` (of `effect_statistics`) feed the policy. `shift` and `spread`
    are the target's mean and unit, by which it was standardised, `observed_std` its standard
    deviation over the observational rows.
    """

    task: Task
    logits: Float[Array, "components vars"]
    log_weights: Float[Array, " components"]
    grid: Float[Array, "vars bins"]
    effect_mean: Float[Array, "vars bins"]
    effect_std: Float[Array, "vars bins"]
    tokens: Float[Array, "vars dim"]
    statistics: Float[Array, "vars bins effect"]
    shift: Float[Array, ""]
    spread: Float[Array, ""]
    observed_std: Float[Array, ""]

    def log_prob(self, parents: Bool[Array, " vars"]) -> Float[Array, ""]:
        """Exact log-probability of one parent set, in nats; variables that cannot be parents are
        left out.
        """
        each = jnp.where(
            parents[None], jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits)
        )
        return jax.nn.logsumexp(
            self.log_weights + jnp.where(self.task.possible_parents[None], each, 0.0).sum(-1)
        )

    def marginals(self) -> Float[Array, " vars"]:
        """Exact P(X_i is a parent)."""
        return jnp.where(
            self.task.possible_parents, jnp.exp(self.log_weights) @ jax.nn.sigmoid(self.logits), 0.0
        )

    def given(
        self, required: Bool[Array, " vars"], forbidden: Bool[Array, " vars"]
    ) -> "SurrogateOutput":
        """Conditioned, exactly, on some variables being parents and on others being none."""
        sign = jnp.where(required, 1.0, -1.0)[None]
        known = (required | forbidden) & self.task.possible_parents
        each = jnp.where(known[None], jax.nn.log_sigmoid(sign * self.logits), 0.0)
        logits = jnp.where(known[None], CERTAIN * sign, self.logits)
        log_weights = jax.nn.log_softmax(self.log_weights + each.sum(-1))
        return eqx.tree_at(lambda o: (o.logits, o.log_weights), self, (logits, log_weights))

    def posterior(self, num_free: int = 8) -> ParentSetPosterior:
        """All subsets of the `num_free` most probable parents (2^num_free sets), renormalised:
        every set there is, up to `num_free + 1` variables.
        """
        num_free = min(num_free, self.logits.shape[-1])
        _, likely = jax.lax.top_k(
            jnp.where(self.task.possible_parents, self.marginals(), -1.0), num_free
        )
        members = jnp.asarray((np.arange(2**num_free)[:, None] >> np.arange(num_free)) & 1, bool)
        sets = jnp.zeros((2**num_free, self.logits.shape[-1]), bool).at[:, likely].set(members)
        allowed = ~(sets & ~self.task.possible_parents[None]).any(1)
        log_probs = jnp.where(allowed, jax.vmap(self.log_prob)(sets), -jnp.inf)
        return ParentSetPosterior(self.task.target, sets, log_probs - jax.nn.logsumexp(log_probs))

    def best(self) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The recommended action: variable and value of the lowest predicted mean effect."""
        return self.task.highest(-self.effect_mean)

    @property
    def best_value(self) -> Float[Array, ""]:
        """The incumbent: predicted E[Y | do] of the recommended action."""
        return jnp.where(self.task.candidates[:, None], self.effect_mean, jnp.inf).min()


class ParentSetPredictionModel(eqx.Module):
    """The surrogate network; see the module's docstring."""

    embed: tuple[eqx.nn.Linear, ...]
    blocks: tuple[Block, ...]
    parent_head: tuple[eqx.nn.Linear, ...]
    weight_head: eqx.nn.Linear
    effect_head: tuple[eqx.nn.Linear, ...]
    config: SurrogateConfig = eqx.field(static=True)

    def __init__(self, config: SurrogateConfig, *, key: Key[Array, ""]):
        embed_key, block_key, parent_key, weight_key, effect_key = jr.split(key, 5)
        dim, bins = config.model_hidden_dim, config.num_bins
        self.embed = make_mlp((NUM_PAIR_STATISTICS, 2 * dim, dim), key=embed_key)
        self.blocks = tuple(
            Block(dim, config.num_heads, config.head_dim, key=k)
            for k in jr.split(block_key, config.model_n_layers)
        )
        self.parent_head = make_mlp((3 * dim, dim, config.num_components), key=parent_key)
        self.weight_head = eqx.nn.Linear(dim, config.num_components, key=weight_key)
        self.effect_head = make_mlp(
            (
                3 * dim + NUM_EFFECT_STATISTICS * bins,
                2 * dim,
                2 * dim,
                (2 + NUM_ESTIMATES) * bins,
            ),
            key=effect_key,
        )
        self.config = config

    def predict(self, data: ExperienceBuffer | Summary, task: Task) -> SurrogateOutput:
        """Posterior and effects for one data set, or for what is kept of it.

        The mean effect is the head's own term plus the estimates of `effect_statistics`, each times
        a weight that the head gives it in every cell.
        """
        pairs, effects, units = statistics(data, task, self.config.num_bins)
        pairs = mlp(self.embed, pairs)
        dtype = jnp.bfloat16 if self.config.mixed_precision else pairs.dtype
        blocks, pairs = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if eqx.is_array(leaf) else leaf, (self.blocks, pairs)
        )
        for block in blocks:
            pairs = block(pairs, task.var_mask)
        pairs = rms_norm(pairs.astype(effects.dtype))
        # of variable i, tokens of (i, Y), (Y, i) and (Y, Y)
        own = pairs[task.target, task.target]
        tokens = jnp.concatenate(
            [pairs[:, task.target], pairs[task.target], jnp.broadcast_to(own, pairs.shape[1:])], -1
        )
        head = mlp(
            self.effect_head, jnp.concatenate([tokens, effects.reshape(len(tokens), -1)], -1)
        ).reshape(*effects.shape[:2], -1)
        own_term, log_std, weights = jnp.split(head, (1, 2), -1)
        means = own_term[..., 0] + (weights * effects[..., :NUM_ESTIMATES]).sum(-1)
        shift, spread = (x[task.target] for x in units.scale)
        output = SurrogateOutput(
            task=task,
            logits=mlp(self.parent_head, tokens).T,
            log_weights=jax.nn.log_softmax(linear(self.weight_head, own)),
            grid=value_grid(task.low, task.high, self.config.num_bins),
            effect_mean=shift + spread * means,
            # between 0.018 and 55 units of the target: one cell must not have an unbounded loss
            effect_std=spread * jnp.exp(jnp.clip(log_std[..., 0], -4.0, 4.0)),
            tokens=tokens,
            statistics=effects,
            shift=shift,
            spread=spread,
            observed_std=units.observed_std[task.target],
        )
        if task.known is None:
            return output
        known = jnp.take(task.known, task.target, axis=1)
        return output.given(known > 0, known < 0)

    def __call__(
        self, buffer: ExperienceBuffer, target: Int[Array, ""] | int
    ) -> ParentSetPosterior:
        """The posterior over the target's parent sets. Compiled, as is `predict_effects`: one
        program per number of variables and started 128 rows.

        Raises `ValueError` for a target that is not a variable of `buffer`.
        """
        return _predicted(self, buffer, observed_task(buffer, target))[0]

    def predict_effects(
        self, buffer: ExperienceBuffer, target: Int[Array, ""] | int
    ) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
        """Mean and standard deviation of E[Y | do(X_i = v)] on each variable's observed range."""
        return _predicted(self, buffer, observed_task(buffer, target))[1:]


def _predicted(model: ParentSetPredictionModel, buffer: ExperienceBuffer, task: Task):
    """Posterior, effects and their standard deviations. Rows are padded to a multiple of 128, so
    that not every new row needs a new program.
    """
    return _compiled(model, buffer.grow(-buffer.valid.shape[0] % 128), task)


@eqx.filter_jit
def _compiled(model, buffer, task):
    output = model.predict(buffer, task)
    return output.posterior(), output.effect_mean, output.effect_std


def observed_task(buffer: ExperienceBuffer, target: Int[Array, ""] | int) -> Task:
    """The task of a buffer without padding whose ranges are those that its rows span.

    Raises `ValueError` for a target that is not one of its variables, unless it is traced.
    """
    check_index(target, buffer.values.shape[1], "target")
    valid = buffer.valid[:, None]
    low, high = (
        jnp.where(valid, buffer.values, jnp.inf).min(0),
        jnp.where(valid, buffer.values, -jnp.inf).max(0),
    )
    return Task(jnp.asarray(target), low, high, jnp.ones(buffer.values.shape[1], bool))


class SurrogateTrainingExample(NamedTuple):
    """States of the expert with its posterior there (leading axis `batch`)."""

    buffer: ExperienceBuffer
    task: Task
    posterior: ParentSetPosterior


@dataclass(frozen=True)
class LossWeights:
    """What the surrogate learns from; every term is in nats."""

    parents: float = 1.0
    """Of the NLL of the true parent set."""
    effects: float = 1.0
    """Of the effect head's NLL."""
    expert: float = 0.1
    """Of KL(expert || surrogate), at the start."""


class SurrogateLosses(NamedTuple):
    """Terms of the surrogate's loss, in nats."""

    parent_nll: Float[Array, "*batch"]
    effect_nll: Float[Array, "*batch"]
    expert_kl: Float[Array, "*batch"]


def surrogate_losses(
    output: SurrogateOutput, parents: Bool[Array, " vars"], effects: Float[Array, "vars bins"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """NLL of the true parent set, and mean Gaussian NLL of the true effects (in the unit of the
    target) over candidate variables and values.
    """
    usable = output.task.candidates[:, None] & jnp.isfinite(effects)
    error = jnp.where(usable, effects, output.effect_mean) - output.effect_mean
    nll = 0.5 * (error / output.effect_std) ** 2 + jnp.log(output.effect_std / output.spread)
    return -output.log_prob(parents), jnp.where(usable, nll, 0.0).sum() / jnp.maximum(
        usable.sum(), 1
    )


def expert_kl(output: SurrogateOutput, expert: ParentSetPosterior) -> Float[Array, ""]:
    """KL(expert || surrogate) over the expert's sets, in nats."""
    ours = jax.vmap(output.log_prob)(expert.sets)
    return (expert.probs * jnp.where(expert.probs > 0, expert.log_probs - ours, 0.0)).sum()


def mean_losses(
    model: ParentSetPredictionModel,
    batches: Sequence[Problem],
    demos: SurrogateTrainingExample | None,
) -> SurrogateLosses:
    """Means over all simulated problems, in batches each of its own number of slots, and over the
    expert's states.
    """

    def simulated(problem):
        output, truth = model.predict(problem.buffer, problem.scm.task), problem.truth
        return surrogate_losses(output, truth.parents, truth.effects)

    parts = [jax.vmap(simulated)(batch) for batch in batches]
    parent_nll, effect_nll = (jnp.concatenate(terms).mean() for terms in zip(*parts, strict=True))
    if demos is None:
        return SurrogateLosses(parent_nll, effect_nll, jnp.zeros(()))
    kl = jax.vmap(lambda demo: expert_kl(model.predict(demo.buffer, demo.task), demo.posterior))(
        demos
    )
    return SurrogateLosses(parent_nll, effect_nll, kl.mean())


def surrogate_optimiser(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices and Adam for biases, both with steps of the size that
    Adam's have (arXiv 2502.16982, whose 0.2 is the root mean square of Adam's), after clipping.
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(learning_rate, weight_decay=WEIGHT_DECAY, consistent_rms=0.2),
    )


def surrogate_step(
    learner: Learner,
    optimiser: optax.GradientTransformation,
    batches: Sequence[Problem],
    demos: SurrogateTrainingExample | None,
    weights: LossWeights,
    expert_share: Float[Array, ""] | float = 1.0,
) -> tuple[Learner, SurrogateLosses]:
    """One gradient step on simulated examples and on the expert's states; `expert_share` is the
    part of its weight that the expert's term still has.
    """

    def loss(model):
        losses = mean_losses(model, batches, demos)
        truth = weights.parents * losses.parent_nll + weights.effects * losses.effect_nll
        return truth + expert_share * weights.expert * losses.expert_kl, losses

    return learner.descend(optimiser, loss)
