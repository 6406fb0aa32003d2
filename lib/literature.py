"""The systems of the causal Bayesian optimisation literature that have fixed equations.

`BENCHMARKS` maps names to systems; studies/expert.py adds one that only it plays. The function of
each states its equations, its ranges and its optimum over single-variable interventions. All are
minimised. Optima are minima of the *expected* outcome; the y* of some papers are minima of noisy
outcomes, which lie lower.

Sources: CBO-U (Durand, Annadani, Bauer, Parbhoo 2025), CEO (Branchini et al., AISTATS 2023), each
as its code has it.
"""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from scipy.stats import qmc

from lib.scm import AbstractSCM, Intervention


NUM_REFERENCE = 8192  # a power of two, as Sobol sequences want
normal = jax.scipy.special.ndtri  # standard normal quantiles
Values = dict[str, Array]
Do = Callable[[str, Array], Array]


class System(NamedTuple):
    """A fixed system: its variables in causal order, the parents of Y, the ranges of what may be
    set, and `equations(u, do)`, all variables from uniform noise by name, where `do(name, natural)`
    is the value that was set, or else the natural one.
    """

    names: tuple[str, ...]
    parents: tuple[str, ...]
    ranges: dict[str, tuple[float, float]]
    equations: Callable[[Values, Do], tuple[Array, ...]]


def toy(u: Values, do: Do) -> tuple[Array, ...]:
    """X = eX; Z = 4 + exp(-X) + eZ; Y = cos(Z) - exp(-Z / 20) + eY; all e ~ N(0, 1).

    Ranges X [-5, 5], Z [-5.5, 13]. y* = -2.172 at do(Z = -3.20), also the optimum of joint
    interventions; a local optimum lies at Z = 3.07 (-1.85), do(X) reaches -1.23, and without
    intervention E[Y] = -0.66. Source: CBO-U, as in CEO.
    """
    x = do("X", normal(u["X"]))
    z = do("Z", 4.0 + jnp.exp(-x) + normal(u["Z"]))
    return x, z, do("Y", jnp.cos(z) - jnp.exp(-z / 20.0) + normal(u["Y"]))


def epidemiology(u: Values, do: Do) -> tuple[Array, ...]:
    """B ~ U(-1, 1); T ~ U(4, 8); L = logistic(T / 2 + B); R = 4 + L T;
    Y = 1/2 + cos(4 T) + sin(-L + 2 R) + B + eY; eY ~ N(0, 1).

    Ranges T [4, 8], R [5, 15]. y* = -1.438 at do(T = 5.495) over single interventions; jointly,
    do(T = 7.08, R = 5.98) reaches the -1.4995 of the literature. do(R) reaches -0.45, and without
    intervention E[Y] = 0.65. L and R have no noise of their own. Source: CBO-U (`Graph5`), after
    CEO. Its edge list omits L -> Y, which the equation has; here L is a parent.
    """
    b = do("B", 2.0 * u["B"] - 1.0)
    t = do("T", 4.0 + 4.0 * u["T"])
    viral = do("L", jax.nn.sigmoid(0.5 * t + b))
    r = do("R", 4.0 + viral * t)
    y = 0.5 + jnp.cos(4.0 * t) + jnp.sin(-viral + 2.0 * r) + b + normal(u["Y"])
    return b, t, viral, r, do("Y", y)


def healthcare(u: Values, do: Do) -> tuple[Array, ...]:
    """Prostate-specific antigen Y under aspirin and statin; s is the logistic function.

    Age ~ U(55, 75); BMI = 27 - 0.01 Age + N(0, var 0.7);
    Aspirin = s(-8 + 0.1 Age + 0.03 BMI); Statin = s(-13 + 0.1 Age + 0.2 BMI);
    Cancer = s(2.2 - 0.05 Age + 0.01 BMI - 0.04 Statin + 0.02 Aspirin);
    Y = 6.8 + 0.04 Age + 0.15 BMI - 0.6 Statin + 0.55 Aspirin + Cancer + N(0, var 0.4).

    Ranges Aspirin [0, 1], Statin [0, 1]. y* = 13.249 at do(Statin = 1) over single interventions;
    jointly, do(Aspirin = 0, Statin = 1) reaches the 13.060 of the literature. do(Aspirin = 0)
    reaches 13.52, and without intervention E[Y] = 13.71. Source: CBO-U (`Graph6`), after CEO.
    """
    age = do("Age", 55.0 + 20.0 * u["Age"])
    bmi = do("BMI", 27.0 - 0.01 * age + jnp.sqrt(0.7) * normal(u["BMI"]))
    aspirin = do("Aspirin", jax.nn.sigmoid(-8.0 + 0.1 * age + 0.03 * bmi))
    statin = do("Statin", jax.nn.sigmoid(-13.0 + 0.1 * age + 0.2 * bmi))
    risk = 2.2 - 0.05 * age + 0.01 * bmi - 0.04 * statin + 0.02 * aspirin
    cancer = do("Cancer", jax.nn.sigmoid(risk))
    mean = 6.8 + 0.04 * age + 0.15 * bmi - 0.6 * statin + 0.55 * aspirin + cancer
    y = do("Y", mean + jnp.sqrt(0.4) * normal(u["Y"]))
    return age, bmi, aspirin, statin, cancer, y


BENCHMARKS = {
    "toy": System(("X", "Z", "Y"), ("Z",), {"X": (-5.0, 5.0), "Z": (-5.5, 13.0)}, toy),
    "epidemiology": System(
        ("B", "T", "L", "R", "Y"),
        ("B", "T", "L", "R"),
        {"T": (4.0, 8.0), "R": (5.0, 15.0)},
        epidemiology,
    ),
    "healthcare": System(
        ("Age", "BMI", "Aspirin", "Statin", "Cancer", "Y"),
        ("Age", "BMI", "Aspirin", "Statin", "Cancer"),
        {"Aspirin": (0.0, 1.0), "Statin": (0.0, 1.0)},
        healthcare,
    ),
}


class Benchmark(AbstractSCM):
    """A fixed system, padded with absent variables to `num_slots`. Raises `ValueError` for an
    unknown name and if the system does not fit.

    Noise is uniform on (0, 1), a column per variable, then padding: `reference_noise` can then be a
    low-discrepancy sequence.
    """

    name: str = eqx.field(static=True)
    target: Int[Array, ""]
    low: Float[Array, " vars"]
    high: Float[Array, " vars"]
    parents: Bool[Array, " vars"]
    var_mask: Bool[Array, " vars"]

    def __init__(self, name: str, num_slots: int | None = None):
        if name not in BENCHMARKS:
            raise ValueError(f"unknown benchmark '{name}'; choose from {', '.join(BENCHMARKS)}")
        names, parents, ranges, _ = BENCHMARKS[name]
        slots = len(names) if num_slots is None else num_slots
        if slots < len(names):
            raise ValueError(
                f"{name} has {len(names)} variables: they do not fit in {slots} places"
            )
        self.name, self.target = name, jnp.int32(names.index("Y"))
        padded = (*names, *[""] * (slots - len(names)))
        # no range: may not be intervened on
        self.low, self.high = jnp.array([ranges.get(one, (0.0, 0.0)) for one in padded]).T
        self.parents = jnp.array([one in parents for one in padded])
        self.var_mask = jnp.arange(slots) < len(names)

    @property
    def names(self) -> tuple[str, ...]:
        return BENCHMARKS[self.name].names

    def draw_noise(self, key: Key[Array, ""], num_samples: int) -> Float[Array, "samples vars"]:
        shape = num_samples, self.var_mask.shape[0]
        return jr.uniform(key, shape, minval=1e-6, maxval=1.0 - 1e-6)

    def reference_noise(self) -> Float[Array, "samples vars"]:
        points, padding = low_discrepancy(len(self.names)), self.var_mask.shape[0] - len(self.names)
        return jnp.pad(jnp.asarray(points), ((0, 0), (0, padding)), constant_values=0.5)

    def simulate(
        self, noise: Float[Array, "samples vars"], intervention: Intervention
    ) -> Float[Array, "samples vars"]:
        def do(name, natural):
            i = self.names.index(name)
            return jnp.where(intervention.mask[i], intervention.values[i], natural)

        u = dict(zip(self.names, noise.T, strict=False))
        rows = jnp.stack(BENCHMARKS[self.name].equations(u, do), 1)
        return jnp.pad(rows, ((0, 0), (0, noise.shape[1] - rows.shape[1])))


@ft.cache
def low_discrepancy(dims: int) -> np.ndarray:
    """`NUM_REFERENCE` points of (0, 1)^dims, a scrambled Sobol sequence: `[samples, dims]`."""
    points = qmc.Sobol(dims, scramble=True, rng=np.random.default_rng(2026)).random(NUM_REFERENCE)
    return np.clip(points, 1e-6, 1.0 - 1e-6).astype(np.float32)
