"""Structural causal models: hard interventions, sampling, noise-free effects and the best single
intervention.

Axis names used throughout the project: `vars samples sets steps batch group bins dim`. Everything
here sees one model; batch with `jax.vmap`.
"""

import abc
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
