"""CBO-U's random systems (Durand, Annadani, Bauer, Parbhoo 2025)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lib.buffer import ExperienceBuffer
from lib.scm import Intervention
from lib.synthetic import MECHANISMS, NOISES, SyntheticSCM, index_of


ERDOS_RENYI_SIZES = (10, 15, 20, 50, 100)  # as published
NUM_HIDDEN = 5  # tanh units of a nonlinear mechanism
MAX_TARGET_PARENTS = 3


def erdos_renyi(
    seed: int,
    num_vars: int,
    linear: bool,
    num_obs: int = 200,
    per_variable: int = 2,
    *,
    childless: bool = True,
) -> tuple[SyntheticSCM, ExperienceBuffer]:
    """One of CBO-U's random systems, and its first data set. Drawn on the host: not for `jit`.

    Linear: weights ~ N(2, 1), noise N(0, 1). Nonlinear: per variable with parents one hidden layer
    of `NUM_HIDDEN` tanh units, weights and biases ~ N(0, 1), noise of deviation 0.1; a variable
    without parents is its noise. The graph is as `erdos_renyi_graph` says, the target a random
    variable with 1 to `MAX_TARGET_PARENTS` parents, and without children if `childless`. The ranges
    of intervention are those of the observational rows.

    The buffer holds `num_obs` observational rows, then `per_variable` rows for each variable save
    the target, in order, set to values uniform in [-5, 5], which may lie outside its range. It has
    no free places. The same seed gives the same graph and target for both kinds.

    Source: CBO-U's code, except that here each seed draws its own system. There all runs of one
    size share one graph, one target and one set of observational rows, so that the published
    deviations hold no variation over systems. No published target has a child (the graphs follow
    from the published seeds, tests/test_literature.py), which is what the doubly robust prior
    assumes; hence the default of `childless`. Raises `ValueError` for fewer than 3 variables (no
    graph would qualify).
    """
    if num_vars < 3:
        raise ValueError(f"a random system needs at least 3 variables, not {num_vars}")
    rng = np.random.default_rng(seed)
    graph, order, target = erdos_renyi_graph(rng, num_vars, childless)
    bias = np.where(graph[:, order].any(0) & (not linear), rng.standard_normal(num_vars), 0.0)
    scm = SyntheticSCM(  # pyright: ignore[reportCallIssue]  # `parents` and `names` are properties
        family=jnp.int32(0),
        order=jnp.asarray(order),
        adjacency=jnp.asarray(graph[order][:, order]),
        mechanism=jnp.full(num_vars, index_of("linear" if linear else "mlp", MECHANISMS)),
        noise_kind=jnp.full(num_vars, index_of("gaussian", NOISES)),
        weights=jnp.asarray(rng.normal(2.0, 1.0, (num_vars, num_vars))),
        frequencies=jnp.asarray(rng.standard_normal((num_vars, num_vars, NUM_HIDDEN))),
        phases=jnp.asarray(rng.standard_normal((num_vars, NUM_HIDDEN))),
        amplitudes=jnp.asarray(rng.standard_normal((num_vars, NUM_HIDDEN))),
        noise_scale=jnp.full(num_vars, 1.0 if linear else 0.1),
        shift=jnp.asarray(-bias),
        spread=jnp.ones(num_vars),
        target=jnp.int32(target),
        low=jnp.zeros(num_vars),
        high=jnp.zeros(num_vars),
        var_mask=jnp.ones(num_vars, bool),
        hidden=jnp.zeros(num_vars, bool),
    )
    variables = np.repeat(np.delete(np.arange(num_vars), target), per_variable)
    chosen = np.concatenate([np.full(num_obs, -1), variables])  # -1: nothing is set
    masks = jnp.asarray(chosen[:, None] == np.arange(num_vars)[None])
    values = jnp.asarray(np.where(masks, rng.uniform(-5.0, 5.0, (len(chosen), 1)), 0.0))
    noise = jnp.asarray(rng.standard_normal((len(chosen), num_vars)))
    rows = one_row_each(scm, noise, masks, values)
    low, high = rows[:num_obs].min(0), rows[:num_obs].max(0)
    scm = eqx.tree_at(lambda scm: (scm.low, scm.high), scm, (low, high))
    return scm, ExperienceBuffer(rows, masks, jnp.ones(len(chosen), bool))


@jax.jit
def one_row_each(
    scm: SyntheticSCM,
    noise: Float[Array, "samples vars"],
    masks: Bool[Array, "samples vars"],
    values: Float[Array, "samples vars"],
) -> Float[Array, "samples vars"]:
    """A row per intervention."""
    return jax.vmap(lambda n, m, v: scm.simulate(n[None], Intervention(m, v))[0])(
        noise, masks, values
    )


def erdos_renyi_graph(
    rng: np.random.Generator, num_vars: int, childless: bool = True
) -> tuple[Bool[np.ndarray, "vars vars"], Int[np.ndarray, " vars"], int]:
    """A graph `[parent, child]`, a topological order of it, and a random target with 1 to
    `MAX_TARGET_PARENTS` parents (and no child if `childless`).

    Every ordered pair of variables is an edge with probability 1 / (num_vars - 1). Redrawn until
    acyclic, with a Markov equivalence class of two or more members, and with a possible target: 40
    % of draws qualify at 10 variables, 25 % at 100.
    """
    while True:
        graph = (rng.random((num_vars, num_vars)) < 1.0 / (num_vars - 1)) & ~np.eye(
            num_vars, dtype=bool
        )
        order = topological_order(graph)
        possible = (
            (graph.sum(0) >= 1) & (graph.sum(0) <= MAX_TARGET_PARENTS) & ~(childless & graph.any(1))
        )
        if len(order) == num_vars and covered_edges(graph).any() and possible.any():
            return graph, order, int(rng.choice(np.flatnonzero(possible)))


def topological_order(graph: Bool[np.ndarray, "vars vars"]) -> Int[np.ndarray, " placed"]:
    """Variables with parents before children; those on a cycle, or behind one, are left out."""
    placed, order = np.zeros(len(graph), bool), []
    while len(ready := np.flatnonzero(~placed & ~graph[~placed].any(0))):
        placed[ready] = True
        order.extend(ready)
    return np.array(order, int)


def covered_edges(graph: Bool[np.ndarray, "vars vars"]) -> Bool[np.ndarray, "vars vars"]:
    """Edges x -> y for which y's parents are x and x's parents. A graph has a Markov-equivalent
    other one if and only if it has such an edge (Chickering, UAI 1995).
    """
    num_differences = (graph[:, :, None] != graph[:, None, :]).sum(0)  # x itself is one of them
    return graph & (num_differences == 1)
