"""Structural causal models: hard interventions, sampling, noise-free effects and the best single intervention.

Axis names used throughout the project: `vars samples sets steps batch group bins dim`. Everything here sees one model; batch with `jax.vmap`.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


class Intervention(eqx.Module):
    """A hard intervention do(X_S = v): `mask[vars]` marks S, `values[vars]` holds v (ignored outside S)."""

    mask: Bool[Array, " vars"]
    values: Float[Array, " vars"]

    @staticmethod
    def single(variable: Int[Array, ""] | int, value: Float[Array, ""] | float, num_vars: int) -> "Intervention":
        """do(X_variable = value) in a system of `num_vars` variables."""
        mask = jnp.arange(num_vars) == variable
        return Intervention(mask, jnp.where(mask, value, 0.0))

    @staticmethod
    def none(num_vars: int) -> "Intervention":
        """Passive observation."""
        return Intervention(jnp.zeros(num_vars, bool), jnp.zeros(num_vars))


class Optimum(NamedTuple):
    """The best single-variable intervention of a model: `variable`, `value`, and its E[Y | do]."""

    variable: Int[Array, ""]
    value: Float[Array, ""]
    mean: Float[Array, ""]


class Task(eqx.Module):
    """What an experimenter knows about a system before any data: which variable is the target, which exist, and in what range each may be set."""

    target: Int[Array, ""]
    low: Float[Array, " vars"]
    high: Float[Array, " vars"]
    var_mask: Bool[Array, " vars"]

    @property
    def possible_parents(self) -> Bool[Array, " vars"]:
        """Variables that may be parents of the target: those that exist, save the target."""
        return self.var_mask & (jnp.arange(self.var_mask.shape[0]) != self.target)

    @property
    def candidates(self) -> Bool[Array, " vars"]:
        """Variables that may be intervened on: possible parents with a range of positive width."""
        return self.possible_parents & (self.high > self.low)


class AbstractSCM(eqx.Module):
    """A causal model with a target. Variables with `var_mask` false are padding: always zero, never intervened on."""

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
    def simulate(self, noise: Float[Array, "samples vars"], intervention: Intervention) -> Float[Array, "samples vars"]:
        """Push exogenous noise through the (mutilated) mechanisms: the same noise gives common random numbers across interventions."""

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

    def sample(self, key: Key[Array, ""], intervention: Intervention, num_samples: int) -> Float[Array, "samples vars"]:
        """`num_samples` rows under do(intervention), in each variable's own units."""
        return self.simulate(self.draw_noise(key, num_samples), intervention)

    def mean_outcome(self, intervention: Intervention, noise: Float[Array, "samples vars"] | None = None) -> Float[Array, ""]:
        """E[Y | do(intervention)], averaged over `noise` (`reference_noise` unless given): deterministic, so differences carry no sampling noise."""
        noise = self.reference_noise() if noise is None else noise
        return jnp.take(self.simulate(noise, intervention).mean(0), self.target)

    def effect_table(self, grid: Float[Array, "vars bins"], noise: Float[Array, "samples vars"] | None = None) -> Float[Array, "vars bins"]:
        """E[Y | do(X_i = grid[i, b])] for every variable and value; +inf where intervening is not allowed (target, padding)."""
        num_vars = grid.shape[0]

        def row(i):
            return jax.vmap(lambda v: self.mean_outcome(Intervention.single(i, v, num_vars), noise))(grid[i])

        table = jax.lax.map(row, jnp.arange(num_vars))
        return jnp.where(self.candidates[:, None], table, jnp.inf)

    def optimum(self, num_values: int = 33) -> Optimum:
        """Minimum of E[Y | do(X_i = v)] over single interventions: a do-grid over total effects, refined once around its best point."""
        grid = value_grid(self.low, self.high, num_values)
        table = self.effect_table(grid)
        variable, index = jnp.unravel_index(jnp.argmin(table), table.shape)
        step = (self.high[variable] - self.low[variable]) / (num_values - 1)
        centre = grid[variable, index]
        fine = jnp.clip(centre + step * jnp.linspace(-1.0, 1.0, num_values), self.low[variable], self.high[variable])
        means = jax.vmap(lambda v: self.mean_outcome(Intervention.single(variable, v, grid.shape[0])))(fine)
        best = jnp.argmin(means)
        return Optimum(variable, fine[best], means[best])


def value_grid(low: Float[Array, " vars"], high: Float[Array, " vars"], num_values: int) -> Float[Array, "vars bins"]:
    """`num_values` evenly spaced values per variable, both ends of its range included."""
    return low[:, None] + (high - low)[:, None] * jnp.linspace(0.0, 1.0, num_values)[None]


NUM_REFERENCE = 128  # antithetic noise rows behind every noise-free mean; the standard error of a mean is then well below .05 standard deviations


def antithetic_normal(seed: int, num_samples: int, num_vars: int) -> Float[Array, "samples vars"]:
    """Fixed standard-normal rows in pairs of opposite sign: means are exact for linear mechanisms. Drawn by numpy, a constant to the compiler."""
    half = np.random.default_rng(seed).standard_normal((num_samples // 2, num_vars), dtype=np.float32)
    return jnp.asarray(np.concatenate([half, -half]))


class SyntheticSCM(AbstractSCM):
    """A random model with linear or Fourier-feature mechanisms and additive Gaussian noise, each variable standardised while it is generated.

    Mechanism arrays are in topological order: row and column k belong to the k-th variable generated, which is variable `order[k]` for
    everyone outside. Standardisation inside generation removes the variance ordering that makes plain simulations easy
    (iSCM, arXiv 2406.11601).
    """

    order: Int[Array, " vars"]
    adjacency: Bool[Array, "vars vars"]  # adjacency[i, k]: the i-th generated variable is a parent of the k-th
    nonlinear: Bool[Array, ""]
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
        position = self.position
        return self.adjacency[position][:, position]

    @property
    def parents(self) -> Bool[Array, " vars"]:
        return jnp.take(self.graph, self.target, axis=1)

    def mechanism(self, x: Float[Array, "samples vars"], k: Int[Array, ""] | int) -> Float[Array, " samples"]:
        """f_k of the variables generated before k (before noise and standardisation)."""
        edges = self.adjacency[:, k]
        linear = x @ jnp.where(edges, self.weights[:, k], 0.0)
        wave = jnp.cos(x @ jnp.where(edges[:, None], self.frequencies[:, k], 0.0) + self.phases[k][None]) @ self.amplitudes[k]
        return jnp.where(self.nonlinear, jnp.where(edges.any(), wave, 0.0), linear)

    def draw_noise(self, key, num_samples):
        return jr.normal(key, (num_samples, self.order.shape[0]))

    def reference_noise(self):
        return antithetic_normal(2026, NUM_REFERENCE, self.order.shape[0])

    def simulate(self, noise, intervention):
        fixed, values = intervention.mask[self.order], intervention.values[self.order]
        present = self.var_mask[self.order]

        def generate(x, k):
            raw = self.mechanism(x, k) + self.noise_scale[k] * noise[:, k]
            natural = jnp.where(present[k], (raw - self.shift[k]) / self.spread[k], 0.0)
            return x.at[:, k].set(jnp.where(fixed[k], values[k], natural)), None

        x, _ = jax.lax.scan(generate, jnp.zeros_like(noise), jnp.arange(noise.shape[1]))
        return x[:, self.position]


def apply_intervention(scm: AbstractSCM, intervention: Intervention) -> "MutilatedSCM":
    """The mutilated model in which `intervention` holds (multi_stage_training.md)."""
    return MutilatedSCM(scm, intervention)


class MutilatedSCM(eqx.Module):
    """A model together with the intervention that is in force."""

    scm: AbstractSCM
    intervention: Intervention


def sample_from_scm(key: Key[Array, ""], scm: AbstractSCM | MutilatedSCM, num_samples: int = 1) -> Float[Array, "samples vars"]:
    """Rows from a model, or from a mutilated one (multi_stage_training.md)."""
    if isinstance(scm, MutilatedSCM):
        return scm.scm.sample(key, scm.intervention, num_samples)
    return scm.sample(key, Intervention.none(scm.var_mask.shape[-1]), num_samples)
