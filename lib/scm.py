"""Structural causal models: hard interventions, sampling, noise-free effects and the best single
intervention.

Axis names used throughout the project: `vars samples sets steps batch group bins dim`. Everything
here sees one model; batch with `jax.vmap`.
"""

import abc
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key


class Intervention(eqx.Module):
    """A hard intervention do(X_S = v): `mask[vars]` marks S, `values[vars]` holds v (ignored
    outside S).
    """

    mask: Bool[Array, " vars"]
    values: Float[Array, " vars"]

    @staticmethod
    def single(
        variable: Int[Array, ""] | int, value: Float[Array, ""] | float, num_vars: int
    ) -> "Intervention":
        """do(X_variable = value) in a system of `num_vars` variables.

        Raises `ValueError` for a variable that is not an index below `num_vars`, unless it is
        traced.
        """
        check_index(variable, num_vars, "variable")
        mask = jnp.arange(num_vars) == variable
        return Intervention(mask, jnp.where(mask, value, 0.0))

    @staticmethod
    def none(num_vars: int) -> "Intervention":
        """Passive observation."""
        return Intervention(jnp.zeros(num_vars, bool), jnp.zeros(num_vars))


def check_index(index: object, num_vars: int, what: str) -> None:
    """Raise `ValueError` unless `index` is a whole number from 0 to `num_vars` - 1, or traced;
    `what` is what the message calls it.
    """
    if isinstance(index, Tracer):
        return
    number = np.asarray(index)
    if (
        number.shape != ()
        or not np.issubdtype(number.dtype, np.integer)
        or not 0 <= int(number) < num_vars
    ):
        raise ValueError(
            f"{what} {index!r} is not one of the {num_vars} variables: give its "
            f"index, 0 to {num_vars - 1}"
        )


# folded into a campaign's key before the step: far from any index that a method folds in or splits
# off
EXPERIMENTS = 0x6E6F6973


class Optimum(NamedTuple):
    """The best single-variable intervention of a model: `variable`, `value`, and its E[Y | do]."""

    variable: Int[Array, ""]
    value: Float[Array, ""]
    mean: Float[Array, ""]


class Task(eqx.Module):
    """What an experimenter knows about a system before any data: which variable is the target,
    which exist, and in what range each may be set.
    """

    target: Int[Array, ""]
    low: Float[Array, " vars"]
    high: Float[Array, " vars"]
    var_mask: Bool[Array, " vars"]
    known: Int[Array, "vars vars"] | None = None
    """Of each edge i -> j: 1 where it is known to be there, -1 where to be absent, else 0."""

    @property
    def possible_parents(self) -> Bool[Array, " vars"]:
        """Variables that may be parents of the target: those that exist, save the target."""
        return self.var_mask & (jnp.arange(self.var_mask.shape[0]) != self.target)

    @property
    def candidates(self) -> Bool[Array, " vars"]:
        """Variables that may be intervened on: possible parents with a range of positive width."""
        return self.possible_parents & (self.high > self.low)

    def highest(self, score: Float[Array, "vars bins"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The action of the highest score: a candidate (there must be one) and a value of
        `value_grid(low, high, bins)`, on which `score` lies.
        """
        variable, index = highest(score, self.candidates[:, None])
        return variable, value_grid(self.low, self.high, score.shape[1])[variable, index]

    def widen(self, extra: int) -> "Task":
        """The same task with `extra` padding variables behind."""
        return jax.tree.map(lambda x: jnp.pad(x, (0, extra)) if x.ndim else x, self)


class AbstractSCM(eqx.Module):
    """A causal model with a target. Variables with `var_mask` false are padding: always zero, never
    intervened on.
    """

    target: eqx.AbstractVar[Int[Array, ""]]
    low: eqx.AbstractVar[Float[Array, " vars"]]
    high: eqx.AbstractVar[Float[Array, " vars"]]
    parents: eqx.AbstractVar[Bool[Array, " vars"]]
    var_mask: eqx.AbstractVar[Bool[Array, " vars"]]
    names: eqx.AbstractVar[tuple[str, ...]]

    @abc.abstractmethod
    def draw_noise(self, key: Key[Array, ""], num_samples: int) -> Float[Array, "samples vars"]:
        """Exogenous noise in the form that `simulate` takes."""

    @abc.abstractmethod
    def simulate(
        self, noise: Float[Array, "samples vars"], intervention: Intervention
    ) -> Float[Array, "samples vars"]:
        """Push exogenous noise through the (mutilated) mechanisms: the same noise gives common
        random numbers across interventions.
        """

    @abc.abstractmethod
    def reference_noise(self) -> Float[Array, "samples vars"]:
        """The fixed noise over which noise-free means are taken, the same at every call."""

    @property
    def candidates(self) -> Bool[Array, " vars"]:
        """Variables that may be intervened on."""
        return self.task.candidates

    @property
    def task(self) -> Task:
        """The public part of the model."""
        return Task(self.target, self.low, self.high, self.var_mask)

    @property
    def labels(self) -> list[str]:
        """The names, and what the padding behind them is called."""
        return [*self.names, *(f"padding {i}" for i in range(len(self.names), len(self.low)))]

    def sample(
        self, key: Key[Array, ""], intervention: Intervention, num_samples: int
    ) -> Float[Array, "samples vars"]:
        """`num_samples` rows under do(intervention), in each variable's own units."""
        return self.simulate(self.draw_noise(key, num_samples), intervention)

    def mean_outcome(self, intervention: Intervention) -> Float[Array, ""]:
        """E[Y | do(intervention)], averaged over `reference_noise`: deterministic, so differences
        carry no sampling noise.
        """
        return jnp.take(self.simulate(self.reference_noise(), intervention).mean(0), self.target)

    def mean_table(
        self, grid: Float[Array, "vars bins"], noise: Float[Array, "samples vars"]
    ) -> Float[Array, "vars bins vars"]:
        """E[X_j | do(X_i = grid[i, b])], averaged over `noise`, for every i, b and j."""

        def means(i, value):
            return self.simulate(noise, Intervention.single(i, value, len(grid))).mean(0)

        return jax.lax.map(lambda i: jax.vmap(means, (None, 0))(i, grid[i]), jnp.arange(len(grid)))

    def effect_table(
        self, grid: Float[Array, "vars bins"], noise: Float[Array, "samples vars"] | None = None
    ) -> Float[Array, "vars bins"]:
        """E[Y | do(X_i = grid[i, b])] for every variable and value; +inf where intervening is not
        allowed (target, padding).
        """
        means = self.mean_table(grid, self.reference_noise() if noise is None else noise)
        return jnp.where(self.candidates[:, None], jnp.take(means, self.target, axis=2), jnp.inf)

    def optimum(self) -> Optimum:
        """Minimum of E[Y | do(X_i = v)] over single interventions: a do-grid over total effects,
        refined once around its best point.
        """
        grid = value_grid(self.low, self.high, 33)

        def mean(variable, value):
            return self.mean_outcome(Intervention.single(variable, value, len(grid)))

        variable, value = refine(
            lambda i, values: -jax.vmap(mean, (None, 0))(i, values),
            grid,
            -self.effect_table(grid),
            self.candidates,
            num_values=33,
        )
        return Optimum(variable, value, mean(variable, value))


def experiment_key(key: Key[Array, ""], step: Int[Array, ""] | int) -> Key[Array, ""]:
    """The key of the exogenous noise of experiment `step` in a campaign with `key`: the same for
    every method, which makes comparisons paired.
    """
    return jr.fold_in(jr.fold_in(key, EXPERIMENTS), step)


def value_grid(
    low: Float[Array, " vars"], high: Float[Array, " vars"], num_values: int
) -> Float[Array, "vars bins"]:
    """`num_values` evenly spaced values per variable, both ends of its range included, and none a
    rounding beyond them.
    """
    values = low[:, None] + (high - low)[:, None] * jnp.linspace(0.0, 1.0, num_values)[None]
    return jnp.clip(values, low[:, None], high[:, None])


def highest(
    score: Float[Array, "rows columns"], allowed: Bool[Array, "rows #columns"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Row and column of the highest score among cells that are allowed; of equal ones the first."""
    best = jnp.argmax(jnp.where(allowed, score, -jnp.inf))
    return jnp.divmod(best, score.shape[1])


def refine(
    score,
    grid: Float[Array, "vars bins"],
    table: Float[Array, "vars bins"],
    allowed: Bool[Array, " vars"],
    num_values: int = 17,
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Variable, one that is allowed, and value that maximise `table[vars, bins]`, the value refined
    once between its neighbours on the grid.

    `score(variable, values)` gives the same quantity at any `values`.
    """
    variable, index = highest(table, allowed[:, None])
    values = grid[variable]
    steps = (values[1] - values[0]) * jnp.linspace(-1.0, 1.0, num_values)
    fine = jnp.clip(values[index] + steps, values[0], values[-1])
    return variable, fine[jnp.argmax(score(variable, fine))]


# Antithetic noise rows behind every noise-free mean: exact for linear mechanisms. Over 200 systems
# of the prior the standard error of a mean at the end of a range is .03 deviations (root mean
# square), .08 in one of twenty, .11 at most.
NUM_REFERENCE = 128


def antithetic_normal(seed: int, num_samples: int, num_vars: int) -> Float[Array, "samples vars"]:
    """Fixed standard-normal rows in pairs of opposite sign: means are exact for linear mechanisms.
    Drawn by numpy, a constant to the compiler.
    """
    half = np.random.default_rng(seed).standard_normal(
        (num_samples // 2, num_vars), dtype=np.float32
    )
    return jnp.asarray(np.concatenate([half, -half]))


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


MAX_HIDDEN = 2  # variables of a model
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
        hidden = jax.lax.select_n(self.mechanism[k], *(kind.hidden(z) for kind in kinds))
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
