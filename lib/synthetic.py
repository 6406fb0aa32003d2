"""Random structural causal models: the kinds of mechanisms and noises that there are, and a model
made of them, perhaps with hidden variables and feedback.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lib.scm import NUM_REFERENCE, AbstractSCM, Intervention, Task, antithetic_normal


class Mechanism(NamedTuple):
    """How a variable follows from its parents x: one hidden layer h(x F + p) a, and x w beside it
    where `linear`.
    """

    hidden: Callable[[Array], Array]
    """h, elementwise."""
    linear: bool = False
    """Whether x w is added."""
    phases: tuple[float, float] = (-np.pi, np.pi)
    """What p is drawn from, uniformly."""
    lengthscale: float = np.nan
    """Of F, in deviations of a parent; NaN where it is drawn from the prior."""


def tamed_square(z: Array) -> Array:
    """z^2, beyond |z| = 1 along its tangent: squares of squares would explode."""
    return jnp.where(jnp.abs(z) < 1.0, jnp.square(z), 2.0 * jnp.abs(z) - 1.0)


# A kind of one's own is one more entry; `--prior.mechanisms` of stage 1 names it, and every later
# stage draws from the prior of the stage before. Models hold its index.
MECHANISMS = {
    "linear": Mechanism(jnp.zeros_like, linear=True),
    "fourier": Mechanism(jnp.cos, phases=(0.0, 2 * np.pi)),
    "mlp": Mechanism(jnp.tanh),  # its steps lie on both sides of the mean
    # so gentle that of ten variables 99 % of models keep |E[Y | do]| below 9 deviations
    "polynomial": Mechanism(tamed_square, linear=True, phases=(0.0, 0.0), lengthscale=3.0),
}


def tails(noise: Array) -> Array:
    """P(|N| > |noise|): 1 minus a probability near 1 would have lost its digits."""
    return jax.lax.erfc(jnp.abs(noise) / jnp.sqrt(2.0))


# standard normals mapped, quantile by quantile, to a distribution of unit variance
NOISES: dict[str, Callable[[Array], Array]] = {
    "gaussian": lambda noise: noise,
    "laplace": lambda noise: -jnp.sign(noise) * jnp.log(tails(noise)) / jnp.sqrt(2.0),
    "uniform": lambda noise: jnp.sign(noise) * jnp.sqrt(3.0) * (1.0 - tails(noise)),
    "heteroscedastic": lambda noise: noise,  # and its deviation varies (`structural_equation`)
    # Tukey's h distribution, h = 0.15, of variance (1 - 2 h)^(-3/2): a kurtosis of 10
    "heavy": lambda noise: 0.7**0.75 * noise * jnp.exp(0.075 * noise**2),
    "switch": jnp.sign,  # a variable without parents has two levels
}


def index_of(name: str, kinds: Iterable[str]) -> Int[Array, ""]:
    """The index of one of the names of `kinds`, as models hold it."""
    return jnp.int32(list(kinds).index(name))


MAX_HIDDEN = 2  # most hidden variables of a model
# Of feedback: rounds through the variables until none moves by more than `SETTLED` deviations.
MAX_ROUNDS, SETTLED = 15, 0.01


class SyntheticSCM(AbstractSCM):
    """A random model, each variable with a kind of mechanism and of additive noise, standardised
    while it is generated.

    Mechanism arrays are in topological order: row and column k belong to the k-th variable
    generated, which is variable `order[k]` for everyone outside. Standardisation inside generation
    (`shift`, `spread`) removes the variance ordering that makes plain simulations easy (iSCM, arXiv
    2406.11601).

    Variables that are `hidden` are simulated like all others, but nobody sees or sets them: for an
    experimenter they are padding, out of `var_mask` and zero in every row. An edge that goes back
    in the order is feedback: values are those of the equilibrium.
    """

    family: Int[Array, ""]  # index into lib.graphs.FAMILIES
    order: Int[Array, " vars"]
    # adjacency[i, k]: the i-th generated variable is a parent of the k-th
    adjacency: Bool[Array, "vars vars"]
    mechanism: Int[Array, " vars"]  # index into MECHANISMS
    noise_kind: Int[Array, " vars"]  # index into NOISES
    weights: Float[Array, "vars vars"]
    frequencies: Float[Array, "vars vars features"]  # [parent, child, feature]
    phases: Float[Array, "vars features"]
    amplitudes: Float[Array, "vars features"]
    noise_scale: Float[Array, " vars"]
    shift: Float[Array, " vars"]
    spread: Float[Array, " vars"]
    target: Int[Array, ""]
    low: Float[Array, " vars"]
    high: Float[Array, " vars"]
    var_mask: Bool[Array, " vars"]
    hidden: Bool[Array, " vars"]
    known: Int[Array, "vars vars"] | None = None  # as that of `Task`

    @property
    def task(self) -> Task:
        """The public part of the model."""
        return Task(self.target, self.low, self.high, self.var_mask, self.known)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"X{i}" for i in range(self.var_mask.shape[-1]))

    @property
    def position(self) -> Int[Array, " vars"]:
        """Inverse of `order`: when each variable is generated."""
        return jnp.argsort(self.order)

    @property
    def graph(self) -> Bool[Array, "vars vars"]:
        """`graph[i, j]`: variable i is a parent of variable j, in outside indices."""
        return self.adjacency[self.position][:, self.position]

    @property
    def seen_graph(self) -> Bool[Array, "vars vars"]:
        """The graph among what is seen: an edge is a directed path whose inner nodes are hidden."""
        graph, hidden = self.graph, self.hidden
        found = graph
        for _ in range(MAX_HIDDEN):
            found |= (found[:, :, None] & (hidden[:, None] & graph)[None]).any(1)
        # feedback through a hidden variable leads back to where it starts
        return found & ~hidden[:, None] & ~hidden[None] & ~jnp.eye(len(hidden), dtype=bool)

    @property
    def parents(self) -> Bool[Array, " vars"]:
        """Those of the target in `seen_graph`."""
        return jnp.take(self.seen_graph, self.target, axis=1)

    def reordered(self, old: Int[Array, " vars"]) -> "SyntheticSCM":
        """The same model with other indices outside: variable j is the former `old[j]`."""
        new = jnp.argsort(old)
        moved = {name: getattr(self, name)[old] for name in ("low", "high", "var_mask", "hidden")}
        known = None if self.known is None else self.known[old][:, old]
        return replace(self, order=new[self.order], target=new[self.target], known=known, **moved)

    def disturbance(self, noise: Float[Array, "samples vars"]) -> Float[Array, "samples vars"]:
        """Standard normals mapped, quantile by quantile, to the unit-variance distribution that the
        model's noise has.
        """
        kinds = jnp.broadcast_to(self.noise_kind[None], noise.shape)
        return jax.lax.select_n(kinds, *(kind(noise) for kind in NOISES.values()))

    def structural_equation(
        self,
        x: Float[Array, "samples vars"],
        disturbance: Float[Array, "samples vars"],
        k: Int[Array, ""] | int,
    ) -> Float[Array, " samples"]:
        """The k-th variable from those generated before it (`x`) and its disturbance, before
        standardisation.

        What its parents give is as `MECHANISMS` says; a variable without parents is its noise.
        Heteroscedastic noise has log-deviation tanh(x w) (multiplicative, Harvey 1976, here
        bounded): it varies by a factor of e either way.
        """
        edges = self.adjacency[:, k]
        linear = x @ jnp.where(edges, self.weights[:, k], 0.0)
        z = x @ jnp.where(edges[:, None], self.frequencies[:, k], 0.0) + self.phases[k][None]
        kinds = MECHANISMS.values()
        hidden = jax.lax.switch(self.mechanism[k], [kind.hidden for kind in kinds], z)
        direct = jnp.array([kind.linear for kind in kinds])[self.mechanism[k]]
        effect = hidden @ self.amplitudes[k] + jnp.where(direct, linear, 0.0)
        effect = jnp.where(edges.any(), effect, 0.0)
        varies = self.noise_kind[k] == index_of("heteroscedastic", NOISES)
        scale = jnp.where(varies, jnp.exp(jnp.tanh(linear)), 1.0)
        return effect + self.noise_scale[k] * scale * disturbance[:, k]

    def draw_noise(self, key, num_samples):
        return jr.normal(key, (num_samples, self.order.shape[0]))

    def reference_noise(self):
        return antithetic_normal(2026, NUM_REFERENCE, self.order.shape[0])

    def simulate(self, noise, intervention):
        return self.settle(noise, intervention)[0]

    def settle(
        self, noise: Float[Array, "samples vars"], intervention: Intervention
    ) -> tuple[Float[Array, "samples vars"], Float[Array, ""]]:
        """What `simulate` gives, and by how much the last round of feedback moved any of it."""
        fixed, values = intervention.mask[self.order], intervention.values[self.order]
        present, disturbance = (self.var_mask | self.hidden)[self.order], self.disturbance(noise)

        def generate(x, k):
            raw = self.structural_equation(x, disturbance, k)
            natural = jnp.where(present[k], (raw - self.shift[k]) / self.spread[k], 0.0)
            return x.at[:, k].set(jnp.where(fixed[k], values[k], natural)), None

        def once_more(state):
            x, _, number = state
            after, _ = jax.lax.scan(generate, x, jnp.arange(noise.shape[1]))
            return after, jnp.abs(after - x).max(), number + 1

        feedback = jnp.tril(self.adjacency).any()
        x, change, _ = jax.lax.while_loop(
            lambda state: (
                (state[2] == 0) | (feedback & (state[1] > SETTLED) & (state[2] < MAX_ROUNDS))
            ),
            once_more,
            (jnp.zeros_like(noise), jnp.array(0.0), 0),
        )
        rows = jnp.where(self.hidden[None], 0.0, x[:, self.position])
        return rows, jnp.where(feedback, change, 0.0)


def check_scm(scm: AbstractSCM) -> None:
    """Raise `ValueError` if a range of a model, one and not traced, is not finite or upside down,
    or if nothing can be set; if it is a synthetic one, also if it is not acyclic, not finite, or
    has nothing by which its target could be moved.
    """
    low, high = np.asarray(scm.low), np.asarray(scm.high)
    wrong = ~(np.isfinite(low) & np.isfinite(high) & (low <= high))
    candidates, target = np.asarray(scm.candidates), int(scm.target)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"{scm.labels[i]} may be set from {low[i]} to {high[i]}: give finite numbers, "
            "low not above high"
        )
    if not candidates.any():
        raise ValueError(
            f"no variable but the target {scm.labels[target]} has a range of intervention: "
            "give at least one of them low < high"
        )
    if not isinstance(scm, SyntheticSCM):
        return
    order = np.asarray(scm.order)
    if sorted(order.tolist()) != list(range(len(order))):
        raise ValueError(f"order must hold every variable once, but is {order.tolist()}")
    by_child = {"weights": scm.weights.T, "frequencies": jnp.moveaxis(scm.frequencies, 1, 0)}
    for name in (*by_child, "phases", "amplitudes", "noise_scale", "shift", "spread"):
        values = np.asarray(by_child.get(name, getattr(scm, name)))[scm.position]
        infinite = ~np.isfinite(values).reshape(len(order), -1).all(1)
        if infinite.any():
            raise ValueError(
                f"{name} of {scm.names[np.argmax(infinite)]} is not finite: give numbers"
            )
    backward = np.argwhere(np.tril(scm.adjacency))
    if len(backward):
        parent, child = (scm.names[order[place]] for place in backward[0])
        raise ValueError(
            f"the edge from {parent} to {child} does not go forward in order: remove "
            f"it, or put {parent} before {child}"
        )
    paths = np.linalg.matrix_power(np.asarray(scm.graph, float) + np.eye(len(order)), len(order))
    if not (candidates & (paths[:, target] > 0)).any():
        raise ValueError(
            f"the target {scm.names[target]} has no ancestor that may be set: choose another "
            "target, or add an edge into it from a candidate"
        )
