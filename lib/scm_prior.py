"""The distribution of problems: random graphs, random mechanisms, a target worth optimising, and a
first data set.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from lib.buffer import ExperienceBuffer
from lib.scm import (
    MECHANISMS,
    NOISES,
    AbstractSCM,
    Intervention,
    SyntheticSCM,
    Task,
    antithetic_normal,
    value_grid,
)


FAMILIES = ("erdos_renyi", "scale_free", "chain", "fork", "collider", "watts_strogatz", "layered")
NUM_FEATURES = 16  # hidden units per mechanism: enough for a varied function of up to a few parents
REWIRING = 0.3  # chance of an edge of the ring lattice to get a new end (Watts & Strogatz 1998)
# lengthscale of a polynomial's squared forms: of ten variables, 99 % of models then keep |E[Y |
# do]| below 7 deviations
GENTLE = 5.0
NUM_CALIBRATION = 256  # rows behind each variable's standardisation


@dataclass(frozen=True)
class SCMPrior:
    """What `sample_scm` draws from. Values are in observational standard deviations of each
    variable, from its observational mean.
    """

    max_vars: int = 8
    """Size of the bucket that every model is padded to."""
    min_size: int = 3
    """Fewest variables."""
    max_size: int = 8
    """Most variables."""
    families: tuple[str, ...] = ("erdos_renyi", "scale_free", "chain", "fork", "collider")
    """Graph families, drawn with equal probability."""
    mechanisms: tuple[str, ...] = ("linear", "fourier")
    """Mechanism families, drawn with equal probability."""
    noises: tuple[str, ...] = ("gaussian",)
    """Kinds of noise, drawn with equal probability."""
    standardised: bool = True
    """Standardise every variable while it is generated (iSCM, arXiv 2406.11601); otherwise
    variances add up along the graph.
    """
    min_density: float = 0.15
    """Smallest edge probability of an Erdős–Rényi or layered graph."""
    max_density: float = 0.5
    """Largest edge probability of an Erdős–Rényi or layered graph."""
    min_noise: float = 0.3
    """Smallest noise scale, before standardisation."""
    max_noise: float = 3.0
    """Largest noise scale, before standardisation."""
    min_lengthscale: float = 0.4
    """Shortest lengthscale of a Fourier or MLP mechanism, in deviations of a parent."""
    max_lengthscale: float = 2.5
    """Longest lengthscale of a Fourier or MLP mechanism, in deviations of a parent."""
    min_range: float = 1.5
    """Shortest distance from the observational mean to an end of a variable's range of
    intervention.
    """
    max_range: float = 4.0
    """Longest distance from the observational mean to an end of a variable's range of
    intervention.
    """
    min_effect: float = 0.5
    """Standard deviations by which some intervention must lower the target, so that there is
    something to gain; 0 admits every variable as target.
    """

    def __post_init__(self):
        for field, known in (
            ("families", FAMILIES),
            ("mechanisms", MECHANISMS),
            ("noises", NOISES),
        ):
            unknown = [name for name in getattr(self, field) if name not in known]
            if unknown or not getattr(self, field):
                raise ValueError(
                    f"{field}: unknown or none: {', '.join(unknown) or '(empty)'}; "
                    f"choose from {', '.join(known)}"
                )
        if not 2 <= self.min_size <= self.max_size <= self.max_vars:
            raise ValueError(
                f"sizes {self.min_size} to {self.max_size} do not fit 2 <= min_size "
                f"<= max_size <= max_vars = {self.max_vars}"
            )
        for name in ("density", "noise", "lengthscale", "range"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name} = {low} is above max_{name} = {high}")
            if low <= 0 and name != "density":
                raise ValueError(f"min_{name} = {low} must be positive")


def multimodal(prior: SCMPrior) -> SCMPrior:
    """The same with wide ranges and responses that have several valleys: problems where it pays to
    look around.
    """
    return replace(
        prior,
        mechanisms=("fourier",),
        min_lengthscale=0.4,
        max_lengthscale=1.0,
        min_range=3.0,
        max_range=4.0,
    )


class Level(NamedTuple):
    """How hard a problem is: where its model comes from, and how many observational rows there
    are.
    """

    prior: SCMPrior
    num_obs: int


def _level(
    num_obs: int,
    size: int,
    mechanisms: tuple[str, ...],
    noises: tuple[str, ...],
    density: float,
    noise: float,
) -> Level:
    prior = SCMPrior(
        max_vars=10,
        min_size=size,
        max_size=size + 1,
        families=("erdos_renyi",),
        mechanisms=mechanisms,
        noises=noises,
        min_density=density,
        max_density=density + 0.1,
        min_noise=noise,
        max_noise=3 * noise,
    )
    return Level(prior, num_obs)


DIFFICULTY = (
    _level(200, 3, ("linear",), ("gaussian",), density=0.3, noise=0.3),
    _level(150, 4, ("linear", "polynomial"), ("gaussian",), density=0.35, noise=0.4),
    _level(
        100, 5, ("polynomial", "mlp"), ("gaussian", "laplace", "uniform"), density=0.4, noise=0.5
    ),
    _level(60, 7, ("mlp", "fourier"), NOISES, density=0.45, noise=0.65),
    _level(30, 9, ("fourier",), NOISES, density=0.5, noise=0.8),
)
"""Five levels from easy to hard in every respect (size, density, mechanisms, noise, data), in
buckets of one size.
"""


def draw(
    sampler: Callable, key: Key[Array, ""], **shapes: tuple[int, ...]
) -> dict[str, Float[Array, "..."]]:
    """Named independent draws from one call of `sampler` (`jr.uniform` or `jr.normal`): every
    further call costs half a second of compilation.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = jnp.split(sampler(key, (sum(sizes),)), list(itertools.accumulate(sizes))[:-1])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def between(fraction: Float[Array, "..."], low, high) -> Float[Array, "..."]:
    """Map the unit interval to [low, high)."""
    return low + (high - low) * fraction


def whole(fraction: Float[Array, "..."], low, high) -> Int[Array, "..."]:
    """Map the unit interval to the whole numbers low, ..., high - 1."""
    return jnp.minimum(jnp.floor(between(fraction, low, high)).astype(int), high - 1)


def pick(fraction: Float[Array, "..."], allowed: Bool[Array, " vars"]) -> Int[Array, "..."]:
    """Map the unit interval to an index where `allowed`, uniformly (index 0 where none is)."""
    rank = whole(fraction, 0, jnp.maximum(allowed.sum(), 1))
    return jnp.argsort(~allowed, stable=True)[rank]


def sample_graph(
    key: Key[Array, ""], family: Int[Array, ""], prior: SCMPrior, size: Int[Array, ""]
) -> Bool[Array, "vars vars"]:
    """Adjacency `[parent, child]` over the first `size` places of a topological order; at least one
    edge.

    `family` indexes `FAMILIES`. Scale-free: each variable attaches to one or two earlier ones with
    probability proportional to degree + 1 (Barabási–Albert). Chain: each variable causes the next.
    Fork: the first causes all others. Collider: a random variable has all earlier ones (up to
    three) as parents and there are no other edges except into a chain of its descendants.
    Watts–Strogatz: on a ring of the variables in random order, each is joined to the nearest on
    either side (or, from six variables on and every other time, the nearest two), edges are rewired
    one after the other, and all point forward. Layered: two to four layers of like size, with
    parents for each variable in the layer before only.
    """
    d = prior.max_vars
    u = draw(jr.uniform, key, density=(), edge=(d, d), attach=(d, d), two=(d,), centre=())
    index = jnp.arange(d)
    earlier = index[:, None] < index[None]

    erdos_renyi = (
        u["edge"] < between(u["density"], prior.min_density, prior.max_density)
    ) & earlier
    gumbel, two = -jnp.log(-jnp.log(u["attach"] + 1e-7)), u["two"] < 0.5

    def attach(adjacency, k):
        degree = (adjacency.sum(0) + adjacency.sum(1) + 1.0).astype(float)
        score = jnp.where(index < k, jnp.log(degree) + gumbel[k], -jnp.inf)
        rank = (score[:, None] < score[None]).sum(1)  # Gumbel top-k: draws without replacement
        return adjacency.at[:, k].set((rank < 1 + two[k]) & (index < k)), None

    scale_free, _ = jax.lax.scan(attach, jnp.zeros((d, d), bool), index)
    chain = index[:, None] + 1 == index[None]
    fork = (index[:, None] == 0) & (index[None] > 0)
    centre = whole(u["centre"], 1, size)
    collider = (
        (index[:, None] < centre) & (index[:, None] >= centre - 3) & (index[None] == centre)
    ) | (chain & (index[None] > centre))

    # a graph is of one family, so these two may use the others' numbers
    reach = jnp.where((size > 5) & (u["centre"] < 0.5), 2, 1)
    distance = jnp.minimum(
        (index[:, None] - index[None]) % size, (index[None] - index[:, None]) % size
    )
    lattice = (distance > 0) & (distance <= reach) & (index < size)[:, None] & (index < size)[None]

    def rewire(ring, edge):
        step, i = edge // d, edge % d
        old, free = (i + 1 + step) % size, (index < size) & (index != i) & ~ring[i]
        new = pick(u["attach"][step, i], free)
        moved = (u["edge"][step, i] < REWIRING) & (step < reach) & (i < size) & free.any()
        row = jnp.where(moved, (ring[i] & (index != old)) | (index == new), ring[i])
        return ring.at[i].set(row).at[:, i].set(row), None

    ring, _ = jax.lax.scan(rewire, lattice, jnp.arange(2 * d))
    seat = jnp.argsort(jnp.where(index < size, u["two"], 2.0 + index))
    watts_strogatz = ring[seat][:, seat] & earlier
    layer = index * whole(u["centre"], 2, jnp.minimum(size, 4) + 1) // size
    before = layer[:, None] + 1 == layer[None]
    one = index[:, None] == jnp.argmax(jnp.where(before, u["attach"], -1.0), axis=0)[None]
    layered = before & (
        (u["edge"] < between(u["density"], prior.min_density, prior.max_density)) | one
    )

    graph = jnp.stack([erdos_renyi, scale_free, chain, fork, collider, watts_strogatz, layered])[
        family
    ]
    graph &= (index < size)[:, None] & (index < size)[None]
    return graph.at[0, 1].set(graph[0, 1] | ~graph.any())


def sample_scm(key: Key[Array, ""], prior: SCMPrior) -> SyntheticSCM:
    """A random model whose target has an ancestor that can lower it by at least `min_effect`
    standard deviations (redrawn until it does).
    """
    return sample_scm_and_family(key, prior)[0]


def sample_scm_and_family(
    key: Key[Array, ""], prior: SCMPrior
) -> tuple[SyntheticSCM, Int[Array, ""]]:
    """The model that `sample_scm` draws, and the index in `FAMILIES` of the family that its graph
    is from.
    """

    def attempt(state):
        key, _, _ = state
        key, draw_key = jr.split(key)
        scm, family, qualifies = _sample_once(draw_key, prior)
        return key, (scm, family), qualifies

    shape = jax.eval_shape(lambda k: _sample_once(k, prior)[:2], key)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    return jax.lax.while_loop(lambda state: ~state[2], attempt, (key, nothing, jnp.array(False)))[1]


def _sample_once(
    key: Key[Array, ""], prior: SCMPrior
) -> tuple[SyntheticSCM, Int[Array, ""], Bool[Array, ""]]:
    """One draw, the family of its graph, and whether some variable of it qualifies as a target."""
    d = prior.max_vars
    graph_key, uniform_key, normal_key, noise_key = jr.split(key, 4)
    names = dict(
        size=(),
        family=(),
        mechanism=(),
        target=(),
        order=(d,),
        length=(d,),
        noise=(d,),
        range=(2, d),
    )
    u = draw(jr.uniform, uniform_key, **names, weight=(d, d), sign=(d, d), phase=(d, NUM_FEATURES))
    n = draw(jr.normal, normal_key, frequency=(d, d, NUM_FEATURES), amplitude=(d, NUM_FEATURES))
    size = whole(u["size"], prior.min_size, prior.max_size + 1)
    family = jnp.array([FAMILIES.index(f) for f in prior.families])[
        whole(u["family"], 0, len(prior.families))
    ]
    mechanism = jnp.array([MECHANISMS.index(m) for m in prior.mechanisms])[
        whole(u["mechanism"], 0, len(prior.mechanisms))
    ]
    kind = jr.uniform(noise_key)
    length = between(u["length"], jnp.log(prior.min_lengthscale), jnp.log(prior.max_lengthscale))
    lengthscale = jnp.exp(
        jnp.where(mechanism == MECHANISMS.index("polynomial"), jnp.log(GENTLE), length)
    )
    low, high = between(u["range"], prior.min_range, prior.max_range)
    phase = 2 * jnp.pi * u["phase"]
    scm = SyntheticSCM(  # pyright: ignore[reportCallIssue]  # `parents` and `names` are properties
        # a random name for each place, padding kept last
        order=jnp.argsort(jnp.where(jnp.arange(d) < size, u["order"], 2.0 + jnp.arange(d))),
        adjacency=sample_graph(graph_key, family, prior, size),
        mechanism=mechanism,
        noise_kind=jnp.array([NOISES.index(name) for name in prior.noises])[
            whole(kind, 0, len(prior.noises))
        ],
        weights=between(u["weight"], 0.5, 2.0) * jnp.where(u["sign"] < 0.5, -1.0, 1.0),
        frequencies=n["frequency"] / lengthscale[None, :, None],
        # an MLP's steps lie on both sides of the mean
        phases=jnp.stack([phase, phase, phase - jnp.pi, jnp.zeros_like(phase)])[mechanism],
        amplitudes=2.0 * jnp.sqrt(2.0 / NUM_FEATURES) * n["amplitude"],
        noise_scale=jnp.exp(
            between(u["noise"], jnp.log(prior.min_noise), jnp.log(prior.max_noise))
        ),
        shift=jnp.zeros(d),
        spread=jnp.ones(d),
        target=jnp.array(0),
        low=jnp.where(jnp.arange(d) < size, -low, 0.0),
        high=jnp.where(jnp.arange(d) < size, high, 0.0),
        var_mask=jnp.arange(d) < size,
    )
    mean, deviation = _moments(scm, prior.standardised)
    if prior.standardised:
        scm = _replace(scm, shift=mean, spread=deviation)
        unit = jnp.ones(d)
    else:
        centre, unit = mean[scm.position], deviation[scm.position]
        scm = _replace(
            scm,
            low=jnp.where(scm.var_mask, centre + unit * scm.low, 0.0),
            high=jnp.where(scm.var_mask, centre + unit * scm.high, 0.0),
        )
    qualifies = scm.var_mask & (_largest_drops(scm) >= prior.min_effect * unit)
    return _replace(scm, target=pick(u["target"], qualifies)), family, qualifies.any()


def _replace(scm: SyntheticSCM, **changes) -> SyntheticSCM:
    return SyntheticSCM(
        **({name: getattr(scm, name) for name in scm.__dataclass_fields__} | changes)
    )


def _moments(
    scm: SyntheticSCM, standardised: bool
) -> tuple[Float[Array, " vars"], Float[Array, " vars"]]:
    """Observational mean and deviation of every variable in the order of generation, each from
    parents already `standardised` or as they are.
    """
    disturbance = scm.disturbance(antithetic_normal(7, NUM_CALIBRATION, scm.order.shape[0]))

    def generate(x, k):
        raw = scm.structural_equation(x, disturbance, k)
        mean, deviation = raw.mean(), raw.std()
        return x.at[:, k].set((raw - mean) / deviation if standardised else raw), (mean, deviation)

    _, moments = jax.lax.scan(
        generate, jnp.zeros_like(disturbance), jnp.arange(disturbance.shape[1])
    )
    return moments


def _largest_drops(scm: SyntheticSCM, num_values: int = 5) -> Float[Array, " vars"]:
    """For every variable j as a target: the largest E[X_j] - E[X_j | do(X_i = v)] over other
    variables i and a coarse grid of values.
    """
    num_vars = scm.order.shape[0]
    grid = value_grid(scm.low, scm.high, num_values)
    noise = scm.reference_noise()[::4]

    def means(i, v):
        return scm.simulate(noise, Intervention.single(i, v, num_vars)).mean(0)

    shifted = jax.lax.map(lambda i: jax.vmap(lambda v: means(i, v))(grid[i]), jnp.arange(num_vars))
    baseline = scm.simulate(noise, Intervention.none(num_vars)).mean(0)
    moved = (baseline[None, None] - shifted).max(1)
    return jnp.where(jnp.eye(num_vars, dtype=bool) | ~scm.var_mask[:, None], 0.0, moved).max(0)


def initial_buffer(
    key: Key[Array, ""],
    scm: AbstractSCM,
    num_obs: int,
    per_variable: int,
    capacity: int,
    *,
    valid_obs: Int[Array, ""] | None = None,
) -> ExperienceBuffer:
    """`num_obs` observational rows, then `per_variable` interventions at uniform values on every
    candidate, then free places up to `capacity`.

    Rows of variables that may not be intervened on are skipped by leaving their places free
    *behind* the filled ones. With `valid_obs`, only that many observational rows are filled (the
    rest stay free): a data set of varying length in an array of fixed length.
    """
    obs_key, value_key, row_key = jr.split(key, 3)
    num_vars = scm.var_mask.shape[0]
    observed = scm.sample(obs_key, Intervention.none(num_vars), num_obs)
    variables = jnp.tile(jnp.arange(num_vars), per_variable)
    values = scm.low[variables] + (scm.high - scm.low)[variables] * jr.uniform(
        value_key, variables.shape
    )
    noise = scm.draw_noise(row_key, variables.shape[0])
    masks = variables[:, None] == jnp.arange(num_vars)[None]
    done = jax.vmap(
        lambda n, m, v: scm.simulate(n[None], Intervention(m, jnp.where(m, v, 0.0)))[0]
    )(noise, masks, values)
    rows, flags = (
        jnp.concatenate([observed, done]),
        jnp.concatenate([jnp.zeros((num_obs, num_vars), bool), masks]),
    )
    kept_obs = jnp.ones(num_obs, bool) if valid_obs is None else jnp.arange(num_obs) < valid_obs
    valid = jnp.concatenate([kept_obs, scm.candidates[variables]])
    front = jnp.argsort(~valid, stable=True)
    rows, flags, valid = rows[front], flags[front], valid[front]
    keep = valid[:, None]
    return ExperienceBuffer(jnp.where(keep, rows, 0.0), flags & keep, valid).grow(
        capacity - rows.shape[0]
    )


def sample_problem(
    key: Key[Array, ""], prior: SCMPrior, num_obs: int, per_variable: int, capacity: int
) -> tuple[SyntheticSCM, ExperienceBuffer]:
    """A model and its first data set (multi_stage_training.md)."""
    scm_key, data_key = jr.split(key)
    scm = sample_scm(scm_key, prior)
    return scm, initial_buffer(data_key, scm, num_obs, per_variable, capacity)


@dataclass(frozen=True)
class DataDesign:
    """How much data a training example holds: every count is drawn anew, so one network serves all
    of them.
    """

    min_obs: int = 20
    """Fewest observational rows."""
    max_obs: int = 200
    """Most observational rows."""
    max_interventions: int = 36
    """Most interventional rows."""


class Example(NamedTuple):
    """One training example: a data set, what is public about its system, and the truth."""

    buffer: ExperienceBuffer
    task: Task
    parents: Bool[Array, " vars"]
    effects: Float[Array, "vars bins"]


def sample_examples(
    key: Key[Array, ""], prior: SCMPrior, design: DataDesign, num_bins: int, num_buffers: int = 2
) -> Example:
    """One random model with `num_buffers` independent data sets of different sizes (leading axis),
    which share the effect table, the costly part.
    """
    scm_key, noise_key, data_key = jr.split(key, 3)
    scm = sample_scm(scm_key, prior)
    half = jr.normal(noise_key, (16, prior.max_vars))
    effects = scm.effect_table(
        value_grid(scm.low, scm.high, num_bins), jnp.concatenate([half, -half])
    )
    buffers = jax.vmap(lambda k: varied_buffer(k, scm, design))(jr.split(data_key, num_buffers))

    def repeat(x):
        return jnp.broadcast_to(x[None], (num_buffers, *x.shape))

    return Example(buffers, jax.tree.map(repeat, scm.task), repeat(scm.parents), repeat(effects))


def varied_buffer(key: Key[Array, ""], scm: SyntheticSCM, design: DataDesign) -> ExperienceBuffer:
    """A data set as it may stand at any moment of a campaign.

    Log-uniformly many observational rows; interventions first at uniform values, on random
    candidate variables or (every other time) going round them, then, from a random point on, more
    and more concentrated around one random variable and value, as an optimiser's are.
    """
    uniform_key, observation_key, row_key = jr.split(key, 3)
    num_vars, most, candidates = scm.var_mask.shape[0], design.max_interventions, scm.candidates
    u = draw(
        jr.uniform,
        uniform_key,
        obs=(),
        total=(),
        wide=(),
        focus=(),
        centre=(),
        round=(),
        stray=(most,),
        variable=(most,),
        fraction=(most,),
    )
    observed = scm.sample(observation_key, Intervention.none(num_vars), design.max_obs)
    noise = scm.draw_noise(row_key, most)
    num_obs = jnp.exp(between(u["obs"], jnp.log(design.min_obs), jnp.log(design.max_obs + 1)))
    total, index = whole(u["total"], 0, most + 1), jnp.arange(most)
    spread_out = index < whole(u["wide"], 0, most + 1)
    around = pick(
        (index % jnp.maximum(candidates.sum(), 1) + 0.5) / jnp.maximum(candidates.sum(), 1),
        candidates,
    )
    roaming = jnp.where(u["round"] < 0.5, around, pick(u["variable"], candidates))
    variables = jnp.where(spread_out | (u["stray"] < 0.3), roaming, pick(u["focus"], candidates))
    near = jnp.clip(u["centre"] + 0.4 * (u["fraction"] - 0.5), 0.0, 1.0)
    values = between(
        jnp.where(spread_out, u["fraction"], near), scm.low[variables], scm.high[variables]
    )
    masks = variables[:, None] == jnp.arange(num_vars)[None]
    done = jax.vmap(
        lambda n, m, v: scm.simulate(n[None], Intervention(m, jnp.where(m, v, 0.0)))[0]
    )(noise, masks, values)
    valid = jnp.concatenate([jnp.arange(design.max_obs) < num_obs, index < total])
    flags = jnp.concatenate([jnp.zeros((design.max_obs, num_vars), bool), masks])
    return ExperienceBuffer(
        jnp.where(valid[:, None], jnp.concatenate([observed, done]), 0.0),
        flags & valid[:, None],
        valid,
    )
