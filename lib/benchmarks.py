"""The three small systems of the causal Bayesian optimisation literature, with the equations of CBO-U (Durand, Annadani, Bauer, Parbhoo 2025).

`BENCHMARKS` maps names to classes; each class states its equations, its ranges and its optimum over single-variable interventions. All are minimised.
Optima are minima of the *expected* outcome; the y* of some papers are minima of noisy outcomes, which lie lower.
"""

import abc
import functools as ft
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from scipy.stats import qmc

from lib.scm import AbstractSCM


NUM_REFERENCE = 8192  # a power of two, as Sobol sequences want


class AbstractBenchmark(AbstractSCM):
    """A fixed system. `num_slots` pads it with absent variables to a bucket; it raises `ValueError` if the system does not fit.

    Noise is uniform on (0, 1) per variable, and `structural` maps it to the noise of the equations: `reference_noise` can then be a
    low-discrepancy sequence.
    """

    target: Int[Array, ""]
    low: Float[Array, " vars"]
    high: Float[Array, " vars"]
    parents: Bool[Array, " vars"]
    var_mask: Bool[Array, " vars"]

    NAMES: eqx.AbstractClassVar[tuple[str, ...]]
    PARENTS: eqx.AbstractClassVar[tuple[str, ...]]
    RANGES: eqx.AbstractClassVar[dict[str, tuple[float, float]]]

    def __init__(self, num_slots: int | None = None):
        slots = len(self.NAMES) if num_slots is None else num_slots
        if slots < len(self.NAMES):
            raise ValueError(f"{type(self).__name__} has {len(self.NAMES)} variables: they do not fit in {slots} places")
        padding = slots - len(self.NAMES)
        low, high = zip(*(self.RANGES.get(name, (0.0, 0.0)) for name in self.NAMES), strict=True)  # no range: may not be intervened on
        self.target = jnp.int32(self.NAMES.index("Y"))
        self.low = jnp.array([*low, *[0.0] * padding])
        self.high = jnp.array([*high, *[0.0] * padding])
        self.parents = jnp.array([name in self.PARENTS for name in self.NAMES] + [False] * padding)
        self.var_mask = jnp.arange(slots) < len(self.NAMES)

    @property
    def names(self) -> tuple[str, ...]:
        return self.NAMES

    @abc.abstractmethod
    def structural(self, u: dict[str, Array], do: Callable[[str, Array], Array]) -> dict[str, Array]:
        """All variables by name, from uniform noise by name; `do(name, natural)` is the value that was set, or else the natural one."""

    def draw_noise(self, key: Key[Array, ""], num_samples: int):
        return jr.uniform(key, (num_samples, self.var_mask.shape[0]), minval=1e-6, maxval=1.0 - 1e-6)

    def reference_noise(self):
        padding = self.var_mask.shape[0] - len(self.NAMES)
        return jnp.pad(jnp.asarray(low_discrepancy(len(self.NAMES))), ((0, 0), (0, padding)), constant_values=0.5)

    def simulate(self, noise, intervention):
        index = {name: i for i, name in enumerate(self.NAMES)}

        def do(name, natural):
            i = index[name]
            return jnp.where(intervention.mask[i], intervention.values[i], natural)

        values = self.structural({name: noise[:, i] for name, i in index.items()}, do)
        rows = jnp.stack([values[name] for name in self.NAMES], 1)
        return jnp.pad(rows, ((0, 0), (0, noise.shape[1] - rows.shape[1])))


class Toy(AbstractBenchmark):
    """X = eX; Z = 4 + exp(-X) + eZ; Y = cos(Z) - exp(-Z / 20) + eY; all e ~ N(0, 1).

    Ranges X [-5, 5], Z [-5.5, 13]. y* = -2.172 at do(Z = -3.20), also the optimum of joint interventions; a local optimum lies at Z = 3.07 (-1.85),
    do(X) reaches -1.23, and without intervention E[Y] = -0.66.
    Source: CBO-U's code, as in CEO (Branchini et al., AISTATS 2023). The graph of Aglietti et al. (AISTATS 2020) has no 4 and Z up to 20, and the
    same y*.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("X", "Z", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("Z",)
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"X": (-5.0, 5.0), "Z": (-5.5, 13.0)}

    def structural(self, u, do):
        x = do("X", normal(u["X"]))
        z = do("Z", 4.0 + jnp.exp(-x) + normal(u["Z"]))
        y = do("Y", jnp.cos(z) - jnp.exp(-z / 20.0) + normal(u["Y"]))
        return {"X": x, "Z": z, "Y": y}


class Epidemiology(AbstractBenchmark):
    """B ~ U(-1, 1); T ~ U(4, 8); L = logistic(T / 2 + B); R = 4 + L T; Y = 1/2 + cos(4 T) + sin(-L + 2 R) + B + eY; eY ~ N(0, 1).

    Ranges T [4, 8], R [5, 15]. y* = -1.438 at do(T = 5.495) over single interventions; jointly, do(T = 7.08, R = 5.98) reaches the -1.4995 of the
    literature. do(R) reaches -0.45, and without intervention E[Y] = 0.65. L and R have no noise of their own.
    Source: CBO-U's code (`Graph5`), after CEO. Its edge list omits L -> Y, which the equation has; here L is a parent.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("B", "T", "L", "R", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("B", "T", "L", "R")
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"T": (4.0, 8.0), "R": (5.0, 15.0)}

    def structural(self, u, do):
        b = do("B", 2.0 * u["B"] - 1.0)
        t = do("T", 4.0 + 4.0 * u["T"])
        viral = do("L", jax.nn.sigmoid(0.5 * t + b))
        r = do("R", 4.0 + viral * t)
        y = do("Y", 0.5 + jnp.cos(4.0 * t) + jnp.sin(-viral + 2.0 * r) + b + normal(u["Y"]))
        return {"B": b, "T": t, "L": viral, "R": r, "Y": y}


class Healthcare(AbstractBenchmark):
    """Prostate-specific antigen Y under aspirin and statin; s is the logistic function.

    Age ~ U(55, 75); BMI = 27 - 0.01 Age + N(0, var 0.7); Aspirin = s(-8 + 0.1 Age + 0.03 BMI); Statin = s(-13 + 0.1 Age + 0.2 BMI);
    Cancer = s(2.2 - 0.05 Age + 0.01 BMI - 0.04 Statin + 0.02 Aspirin);
    Y = 6.8 + 0.04 Age + 0.15 BMI - 0.6 Statin + 0.55 Aspirin + Cancer + N(0, var 0.4).

    Ranges Aspirin [0, 1], Statin [0, 1]. y* = 13.249 at do(Statin = 1) over single interventions; jointly, do(Aspirin = 0, Statin = 1) reaches the
    13.060 of the literature. do(Aspirin = 0) reaches 13.52, and without intervention E[Y] = 13.71.
    Source: CBO-U's code (`Graph6`), after CEO. Aglietti et al. (2020) have -0.15 BMI, which lowers all values of Y by about 7.9.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("Age", "BMI", "Aspirin", "Statin", "Cancer", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("Age", "BMI", "Aspirin", "Statin", "Cancer")
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"Aspirin": (0.0, 1.0), "Statin": (0.0, 1.0)}

    def structural(self, u, do):
        age = do("Age", 55.0 + 20.0 * u["Age"])
        bmi = do("BMI", 27.0 - 0.01 * age + jnp.sqrt(0.7) * normal(u["BMI"]))
        aspirin = do("Aspirin", jax.nn.sigmoid(-8.0 + 0.1 * age + 0.03 * bmi))
        statin = do("Statin", jax.nn.sigmoid(-13.0 + 0.1 * age + 0.2 * bmi))
        cancer = do("Cancer", jax.nn.sigmoid(2.2 - 0.05 * age + 0.01 * bmi - 0.04 * statin + 0.02 * aspirin))
        mean = 6.8 + 0.04 * age + 0.15 * bmi - 0.6 * statin + 0.55 * aspirin + cancer
        return {"Age": age, "BMI": bmi, "Aspirin": aspirin, "Statin": statin, "Cancer": cancer, "Y": do("Y", mean + jnp.sqrt(0.4) * normal(u["Y"]))}


BENCHMARKS = {"toy": Toy, "epidemiology": Epidemiology, "healthcare": Healthcare}


def make_benchmark(name: str, num_slots: int | None = None) -> AbstractBenchmark:
    """The benchmark called `name`, padded to `num_slots` variables. Raises `ValueError` for an unknown name or too few places."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark '{name}'; choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name](num_slots)


def normal(u: Float[Array, " samples"]) -> Float[Array, " samples"]:
    """Standard normal quantiles."""
    return jax.scipy.special.ndtri(u)


@ft.cache
def low_discrepancy(dims: int) -> np.ndarray:
    """`NUM_REFERENCE` points of (0, 1)^dims, a scrambled Sobol sequence: `[samples, dims]`."""
    points = qmc.Sobol(dims, scramble=True, rng=np.random.default_rng(2026)).random(NUM_REFERENCE)
    return np.clip(points, 1e-6, 1.0 - 1e-6).astype(np.float32)
