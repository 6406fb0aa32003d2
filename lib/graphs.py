"""Random directed acyclic graphs of several families.

A family is a function `(u, size)` of uniform random numbers and of the number of variables, at
least two; it gives the adjacency `[parent, child]` over `d` positions of a topological order, of
which only the first `size` count. A graph is of one family, so all may use the same numbers; all
are computed and one is kept, for under `vmap` a branch would compute them all too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key


REWIRING = 0.3  # chance of an edge of the ring lattice to get a new end (Watts & Strogatz 1998)


# --- random numbers ---


def draw(
    sampler: Callable, key: Key[Array, ""], **shapes: tuple[int, ...]
) -> dict[str, Float[Array, "..."]]:
    """Named independent draws from one call of `sampler` (`jr.uniform` or `jr.normal`): every
    further call costs half a second of compilation.
    """
    flat, unravel = ravel_pytree([jnp.zeros(shape) for shape in shapes.values()])
    return dict(zip(shapes, unravel(sampler(key, flat.shape)), strict=True))


def between(fraction: Float[Array, "..."], low, high) -> Float[Array, "..."]:
    """Map the unit interval to [low, high)."""
    return low + (high - low) * fraction


def log_between(fraction: Float[Array, "..."], low, high) -> Float[Array, "..."]:
    """Map the unit interval to [low, high), uniformly in the logarithm."""
    return jnp.exp(between(fraction, jnp.log(low), jnp.log(high)))


def whole(fraction: Float[Array, "..."], low, high) -> Int[Array, "..."]:
    """Map the unit interval to the whole numbers low, ..., high - 1."""
    return jnp.minimum(jnp.floor(between(fraction, low, high)).astype(int), high - 1)


def pick(fraction: Float[Array, "..."], allowed: Bool[Array, " vars"]) -> Int[Array, "..."]:
    """Map the unit interval to an index where `allowed`, uniformly (index 0 where none is)."""
    rank = whole(fraction, 0, jnp.maximum(allowed.sum(), 1))
    return jnp.argsort(~allowed, stable=True)[rank]


def one_of(u: Float[Array, ""], names: Sequence[str], known: Any) -> Int[Array, ""]:
    """The index among the `known` kinds (their names, in order) of one of `names`, uniformly."""
    index = list(known)
    return jnp.array([index.index(name) for name in names])[whole(u, 0, len(names))]


# --- families ---


class Uniforms(NamedTuple):
    """What a graph is made of: the probability of an edge, and uniform numbers."""

    density: Float[Array, ""]
    edge: Float[Array, "d d"]
    attach: Float[Array, "d d"]
    two: Float[Array, " d"]
    centre: Float[Array, ""]

    @property
    def index(self) -> Int[Array, " d"]:
        """Positions in the topological order."""
        return jnp.arange(len(self.two))

    @property
    def forward(self) -> Bool[Array, "d d"]:
        """All edges that a graph can have."""
        return self.index[:, None] < self.index[None]


def erdos_renyi(u: Uniforms, size: Int[Array, ""]) -> Bool[Array, "d d"]:
    """Every pair with the same probability."""
    return u.forward & (u.edge < u.density)


def scale_free(u: Uniforms, size: Int[Array, ""]) -> Bool[Array, "d d"]:
    """Each variable attaches to one or two earlier ones with probability proportional to degree + 1
    (Barabási and Albert 1999).
    """
    gumbel, two = -jnp.log(-jnp.log(u.attach + 1e-7)), u.two < 0.5

    def attach(adjacency, k):
        degree = (adjacency.sum(0) + adjacency.sum(1) + 1.0).astype(float)
        score = jnp.where(u.index < k, jnp.log(degree) + gumbel[k], -jnp.inf)
        rank = (score[:, None] < score[None]).sum(1)  # Gumbel top-k: draws without replacement
        return adjacency.at[:, k].set((rank < 1 + two[k]) & (u.index < k)), None

    return jax.lax.scan(attach, jnp.zeros(u.edge.shape, bool), u.index)[0]


def chain(u: Uniforms, size: Int[Array, ""]) -> Bool[Array, "d d"]:
    """Each variable causes the next."""
    return u.index[:, None] + 1 == u.index[None]


def fork(u: Uniforms, size: Int[Array, ""]) -> Bool[Array, "d d"]:
    """The first causes all others."""
    return (u.index[:, None] == 0) & (u.index[None] > 0)


def collider(u: Uniforms, size: Int[Array, ""]) -> Bool[Array, "d d"]:
    """A random variable has all earlier ones, up to three, as parents; the only other edges make a
    chain of those behind it.
    """
    centre = whole(u.centre, 1, size)
    parents = (u.index < centre) & (u.index >= centre - 3)
    into = parents[:, None] & (u.index[None] == centre)
    return into | (chain(u, size) & (u.index[None] > centre))


def watts_strogatz(u: Uniforms, size: Int[Array, ""]) -> Bool[Array, "d d"]:
    """On a ring of the variables in random order, each is joined to the nearest on either side (or,
    from six variables on and every other time, the nearest two); edges are rewired one after the
    other, and all point forward.
    """
    d, exists = len(u.index), u.index < size
    reach = jnp.where((size > 5) & (u.centre < 0.5), 2, 1)
    apart = u.index[:, None] - u.index[None]
    distance = jnp.minimum(apart % size, -apart % size)
    lattice = (distance > 0) & (distance <= reach) & exists[:, None] & exists[None]

    def rewire(ring, edge):
        step, i = edge // d, edge % d
        old, free = (i + 1 + step) % size, exists & (u.index != i) & ~ring[i]
        new = pick(u.attach[step, i], free)
        moved = (u.edge[step, i] < REWIRING) & (step < reach) & (i < size) & free.any()
        row = jnp.where(moved, (ring[i] & (u.index != old)) | (u.index == new), ring[i])
        return ring.at[i].set(row).at[:, i].set(row), None

    ring, _ = jax.lax.scan(rewire, lattice, jnp.arange(2 * d))
    seat = jnp.argsort(jnp.where(exists, u.two, 2.0 + u.index))
    return ring[seat][:, seat] & u.forward


def layered(u: Uniforms, size: Int[Array, ""]) -> Bool[Array, "d d"]:
    """Two to four layers of like size; each variable has parents in the layer before only, at least
    one.
    """
    layer = u.index * whole(u.centre, 2, jnp.minimum(size, 4) + 1) // size
    before = layer[:, None] + 1 == layer[None]
    least = jnp.argmax(jnp.where(before, u.attach, -1.0), axis=0)
    return before & ((u.edge < u.density) | (u.index[:, None] == least[None]))


FAMILIES = {
    family.__name__: family
    for family in (erdos_renyi, scale_free, chain, fork, collider, watts_strogatz, layered)
}


def sample_graph(
    key: Key[Array, ""],
    family: Int[Array, ""],
    size: Int[Array, ""],
    num_vars: int,
    density: tuple[float, float],
) -> Bool[Array, "vars vars"]:
    """Adjacency `[parent, child]` over the first `size` of `num_vars` positions of a topological
    order; at least one edge.

    `family` is an index into `FAMILIES`; `density` bounds the probability of an edge where a family
    has one.
    """
    square = (num_vars, num_vars)
    shapes = dict(density=(), edge=square, attach=square, two=(num_vars,), centre=())
    u = Uniforms(**draw(jr.uniform, key, **shapes))
    u = u._replace(density=between(u.density, *density))
    graph = jax.lax.select_n(family, *(make(u, size) for make in FAMILIES.values()))
    graph &= (u.index < size)[:, None] & (u.index < size)[None]
    return graph.at[0, 1].set(graph[0, 1] | ~graph.any())
