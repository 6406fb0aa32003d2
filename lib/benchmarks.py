"""The systems of the causal Bayesian optimisation literature: small ones with fixed equations, and
CBO-U's random ones (`erdos_renyi`).

`BENCHMARKS` maps names to classes; each class states its equations, its ranges and its optimum over
single-variable interventions. All are minimised. Optima are minima of the *expected* outcome; the
y* of some papers are minima of noisy outcomes, which lie lower.

Sources: CBO-U (Durand, Annadani, Bauer, Parbhoo 2025), CEO (Branchini et al., AISTATS 2023), CBO
(Aglietti et al., AISTATS 2020) and the TMLR benchmark (Huang, Le, Ma, Tran, TMLR 2026), each as its
code has it.
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

from lib.buffer import ExperienceBuffer
from lib.scm import MECHANISMS, NOISES, AbstractSCM, Intervention, SyntheticSCM


NUM_REFERENCE = 8192  # a power of two, as Sobol sequences want
ERDOS_RENYI_SIZES = (10, 15, 20, 50, 100)  # as published
NUM_HIDDEN = 5  # tanh units of a nonlinear mechanism
MAX_TARGET_PARENTS = 3


class AbstractBenchmark(AbstractSCM):
    """A fixed system. `num_slots` pads it with absent variables to a bucket; it raises `ValueError`
    if the system does not fit.

    Noise is uniform on (0, 1), a column per latent and per variable, then padding; `structural`
    maps it to the noise of the equations: `reference_noise` can then be a low-discrepancy sequence.
    `LATENTS` names noise that several variables share: unobserved confounders.
    """

    target: Int[Array, ""]
    low: Float[Array, " vars"]
    high: Float[Array, " vars"]
    parents: Bool[Array, " vars"]
    var_mask: Bool[Array, " vars"]

    NAMES: eqx.AbstractClassVar[tuple[str, ...]]
    PARENTS: eqx.AbstractClassVar[tuple[str, ...]]
    RANGES: eqx.AbstractClassVar[dict[str, tuple[float, float]]]
    LATENTS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_slots: int | None = None):
        slots = len(self.NAMES) if num_slots is None else num_slots
        if slots < len(self.NAMES):
            raise ValueError(
                f"{type(self).__name__} has {len(self.NAMES)} variables: they do not "
                f"fit in {slots} places"
            )
        padding = slots - len(self.NAMES)
        # no range: may not be intervened on
        low, high = zip(*(self.RANGES.get(name, (0.0, 0.0)) for name in self.NAMES), strict=True)
        self.target = jnp.int32(self.NAMES.index("Y"))
        self.low = jnp.array([*low, *[0.0] * padding])
        self.high = jnp.array([*high, *[0.0] * padding])
        self.parents = jnp.array([name in self.PARENTS for name in self.NAMES] + [False] * padding)
        self.var_mask = jnp.arange(slots) < len(self.NAMES)

    @property
    def names(self) -> tuple[str, ...]:
        return self.NAMES

    @abc.abstractmethod
    def structural(
        self, u: dict[str, Array], do: Callable[[str, Array], Array]
    ) -> dict[str, Array]:
        """All variables by name, from uniform noise by name; `do(name, natural)` is the value that
        was set, or else the natural one.
        """

    def draw_noise(self, key: Key[Array, ""], num_samples: int) -> Float[Array, "samples noise"]:
        return jr.uniform(
            key,
            (num_samples, len(self.LATENTS) + self.var_mask.shape[0]),
            minval=1e-6,
            maxval=1.0 - 1e-6,
        )

    def reference_noise(self) -> Float[Array, "samples noise"]:
        padding = self.var_mask.shape[0] - len(self.NAMES)
        points = jnp.asarray(low_discrepancy(len(self.LATENTS) + len(self.NAMES)))
        return jnp.pad(points, ((0, 0), (0, padding)), constant_values=0.5)

    def simulate(
        self, noise: Float[Array, "samples noise"], intervention: Intervention
    ) -> Float[Array, "samples vars"]:
        index = {name: i for i, name in enumerate(self.NAMES)}

        def do(name, natural):
            i = index[name]
            return jnp.where(intervention.mask[i], intervention.values[i], natural)

        values = self.structural(
            {name: noise[:, i] for i, name in enumerate((*self.LATENTS, *self.NAMES))}, do
        )
        rows = jnp.stack([values[name] for name in self.NAMES], 1)
        return jnp.pad(rows, ((0, 0), (0, self.var_mask.shape[0] - rows.shape[1])))


class AbstractToy(AbstractBenchmark):
    """X = eX; Z = OFFSET + exp(-X) + eZ; Y = cos(Z) - exp(-Z / 20) + eY; all e ~ N(0, 1)."""

    NAMES: ClassVar[tuple[str, ...]] = ("X", "Z", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("Z",)
    OFFSET: eqx.AbstractClassVar[float]

    def structural(self, u, do):
        x = do("X", normal(u["X"]))
        z = do("Z", self.OFFSET + jnp.exp(-x) + normal(u["Z"]))
        y = do("Y", jnp.cos(z) - jnp.exp(-z / 20.0) + normal(u["Y"]))
        return {"X": x, "Z": z, "Y": y}


class Toy(AbstractToy):
    """X = eX; Z = 4 + exp(-X) + eZ; Y = cos(Z) - exp(-Z / 20) + eY; all e ~ N(0, 1).

    Ranges X [-5, 5], Z [-5.5, 13]. y* = -2.172 at do(Z = -3.20), also the optimum of joint
    interventions; a local optimum lies at Z = 3.07 (-1.85), do(X) reaches -1.23, and without
    intervention E[Y] = -0.66. Source: CBO-U, as in CEO.
    """

    OFFSET: ClassVar[float] = 4.0
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"X": (-5.0, 5.0), "Z": (-5.5, 13.0)}


class ToyAglietti(AbstractToy):
    """X = eX; Z = exp(-X) + eZ; Y = cos(Z) - exp(-Z / 20) + eY; all e ~ N(0, 1).

    Ranges X [-5, 5], Z [-5, 20]. y* = -2.172 at do(Z = -3.20), also the optimum of joint
    interventions; do(X = -1.12) reaches -1.46, and without intervention E[Y] = -0.72. Source: CBO
    (`ToyGraph`).
    """

    OFFSET: ClassVar[float] = 0.0
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"X": (-5.0, 5.0), "Z": (-5.0, 20.0)}


class Synthetic2(AbstractToy):
    """X = eX; Z = exp(-X) + eZ; Y = cos(Z) - exp(-Z / 20) + eY; all e ~ N(0, 1).

    Ranges X [-3, 2], Z [-1, 1]. y* = -1.464 at do(X = -1.12), also the optimum of joint
    interventions; do(Z = -1) reaches -0.51, and without intervention E[Y] = -0.72: the range of Z
    leaves no good value to set it to. Source: the TMLR benchmark (`synthetic_2`). Its y* of -3.969
    is a noisy outcome: the least of 200 rows without intervention has median -3.92.
    """

    OFFSET: ClassVar[float] = 0.0
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"X": (-3.0, 2.0), "Z": (-1.0, 1.0)}


class Graph4(AbstractBenchmark):
    """X = eX; Z = 1.5 tanh(X) + eZ; T = cos(X) + exp(-X) + eT; Y = Z^2 + sin(T) + eY; all e ~ N(0,
    1).

    Range T [-2, 8]; nothing else may be set. y* = 0.887 at do(T = -pi / 2), and the same at do(T =
    3 pi / 2); without intervention E[Y] = 2.18. Source: CBO-U (`Graph4`).
    """

    NAMES: ClassVar[tuple[str, ...]] = ("X", "Z", "T", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("Z", "T")
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"T": (-2.0, 8.0)}

    def structural(self, u, do):
        x = do("X", normal(u["X"]))
        z = do("Z", 1.5 * jnp.tanh(x) + normal(u["Z"]))
        t = do("T", jnp.cos(x) + jnp.exp(-x) + normal(u["T"]))
        return {"X": x, "Z": z, "T": t, "Y": do("Y", z**2 + jnp.sin(t) + normal(u["Y"]))}


class Epidemiology(AbstractBenchmark):
    """B ~ U(-1, 1); T ~ U(4, 8); L = logistic(T / 2 + B); R = 4 + L T; Y = 1/2 + cos(4 T) + sin(-L
    + 2 R) + B + eY; eY ~ N(0, 1).

    Ranges T [4, 8], R [5, 15]. y* = -1.438 at do(T = 5.495) over single interventions; jointly,
    do(T = 7.08, R = 5.98) reaches the -1.4995 of the literature. do(R) reaches -0.45, and without
    intervention E[Y] = 0.65. L and R have no noise of their own. Source: CBO-U (`Graph5`), after
    CEO. Its edge list omits L -> Y, which the equation has; here L is a parent.
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


class AbstractHealthcare(AbstractBenchmark):
    """Prostate-specific antigen Y under aspirin and statin; s is the logistic function.

    Age ~ U(55, 75); BMI = 27 - 0.01 Age + N(0, var 0.7); Aspirin = s(-8 + 0.1 Age + 0.03 BMI);
    Statin = s(-13 + 0.1 Age + 0.2 BMI); Cancer = s(2.2 - 0.05 Age + 0.01 BMI - 0.04 Statin + 0.02
    Aspirin); Y = 6.8 + 0.04 Age + BMI_EFFECT BMI - 0.6 Statin + 0.55 Aspirin + Cancer + N(0, var
    0.4).
    """

    NAMES: ClassVar[tuple[str, ...]] = ("Age", "BMI", "Aspirin", "Statin", "Cancer", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("Age", "BMI", "Aspirin", "Statin", "Cancer")
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"Aspirin": (0.0, 1.0), "Statin": (0.0, 1.0)}
    BMI_EFFECT: eqx.AbstractClassVar[float]

    def structural(self, u, do):
        age = do("Age", 55.0 + 20.0 * u["Age"])
        bmi = do("BMI", 27.0 - 0.01 * age + jnp.sqrt(0.7) * normal(u["BMI"]))
        aspirin = do("Aspirin", jax.nn.sigmoid(-8.0 + 0.1 * age + 0.03 * bmi))
        statin = do("Statin", jax.nn.sigmoid(-13.0 + 0.1 * age + 0.2 * bmi))
        cancer = do(
            "Cancer", jax.nn.sigmoid(2.2 - 0.05 * age + 0.01 * bmi - 0.04 * statin + 0.02 * aspirin)
        )
        mean = 6.8 + 0.04 * age + self.BMI_EFFECT * bmi - 0.6 * statin + 0.55 * aspirin + cancer
        return {
            "Age": age,
            "BMI": bmi,
            "Aspirin": aspirin,
            "Statin": statin,
            "Cancer": cancer,
            "Y": do("Y", mean + jnp.sqrt(0.4) * normal(u["Y"])),
        }


class Healthcare(AbstractHealthcare):
    """The equations of `AbstractHealthcare` with + 0.15 BMI.

    Ranges Aspirin [0, 1], Statin [0, 1]. y* = 13.249 at do(Statin = 1) over single interventions;
    jointly, do(Aspirin = 0, Statin = 1) reaches the 13.060 of the literature. do(Aspirin = 0)
    reaches 13.52, and without intervention E[Y] = 13.71. Source: CBO-U (`Graph6`), after CEO.
    """

    BMI_EFFECT: ClassVar[float] = 0.15


class HealthcareAglietti(AbstractHealthcare):
    """The equations of `AbstractHealthcare` with - 0.15 BMI.

    Ranges Aspirin [0, 1], Statin [0, 1]. y* = 5.344 at do(Statin = 1) over single interventions;
    jointly, do(Aspirin = 0, Statin = 1) reaches the 5.155 of the literature. do(Aspirin = 0)
    reaches 5.62, and without intervention E[Y] = 5.81. Source: the example of CBO, equations as in
    the code of MCBO (Sussex et al., ICLR 2023).
    """

    BMI_EFFECT: ClassVar[float] = -0.15


class Complete(AbstractBenchmark):
    """F = eF; A = F^2 + U1 + eA; B = U2 + eB; C = exp(-B) + eC; D = exp(-C) / 10 + eD; E = cos(A) +
    C / 10 + eE; Y = cos(D) - D / 5 + sin(E) - E / 4 + U1 + exp(-U2) + eY; U1, U2 and all e ~ N(0,
    1).

    U1 and U2 are unobserved confounders, of A and Y and of B and Y: noise, not variables. `parents`
    are the direct causes of Y among the variables, D and E; given them, Y still depends on A and B.

    Ranges B [-5, 4], D [-5, 5], E [-6, 3]; F has a range in the literature that is never used. y* =
    -1.228 at do(B = -5) over single interventions; jointly, do(B = -5, D = 3.343) reaches -3.483.
    do(D = 3.343) reaches 0.07, do(E = -1.318) 1.60, both together -0.638, and without intervention
    E[Y] = 2.31. Source: CBO (`CompleteGraph`).
    """

    NAMES: ClassVar[tuple[str, ...]] = ("F", "A", "B", "C", "D", "E", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("D", "E")
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "B": (-5.0, 4.0),
        "D": (-5.0, 5.0),
        "E": (-6.0, 3.0),
    }
    LATENTS: ClassVar[tuple[str, ...]] = ("U1", "U2")

    def structural(self, u, do):
        u1, u2 = normal(u["U1"]), normal(u["U2"])
        f = do("F", normal(u["F"]))
        a = do("A", f**2 + u1 + normal(u["A"]))
        b = do("B", u2 + normal(u["B"]))
        c = do("C", jnp.exp(-b) + normal(u["C"]))
        d = do("D", jnp.exp(-c) / 10.0 + normal(u["D"]))
        e = do("E", jnp.cos(a) + c / 10.0 + normal(u["E"]))
        y = do(
            "Y", jnp.cos(d) - d / 5.0 + jnp.sin(e) - e / 4.0 + u1 + jnp.exp(-u2) + normal(u["Y"])
        )
        return {"F": f, "A": a, "B": b, "C": c, "D": d, "E": e, "Y": y}


class Chain(AbstractBenchmark):
    """X = eX; W = eW; Z = -X / 2 + eZ; Y = -W - 3 Z X + eY; all e ~ N(0, 1).

    Ranges Z [-1, 1], W [-1, 1]. y* = 0.000 at do(Z = z) for every z: setting Z breaks its
    dependence on X, and E[X] = 0. do(W = 1) reaches 0.5, and without intervention E[Y] = 1.5;
    jointly, do(W = 1, Z = z) reaches -1 for every z. Source: the TMLR benchmark (`chain`). Its y*
    of -15.806 is a noisy outcome: the least of 200 rows without intervention has median -7.4.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("X", "W", "Z", "Y")
    PARENTS: ClassVar[tuple[str, ...]] = ("X", "W", "Z")
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"W": (-1.0, 1.0), "Z": (-1.0, 1.0)}

    def structural(self, u, do):
        x, w = do("X", normal(u["X"])), do("W", normal(u["W"]))
        z = do("Z", -0.5 * x + normal(u["Z"]))
        return {"X": x, "W": w, "Z": z, "Y": do("Y", -w - 3.0 * z * x + normal(u["Y"]))}


BENCHMARKS = {
    "toy": Toy,
    "toy_aglietti": ToyAglietti,
    "graph4": Graph4,
    "epidemiology": Epidemiology,
    "healthcare": Healthcare,
    "healthcare_aglietti": HealthcareAglietti,
    "complete": Complete,
    "synthetic_2": Synthetic2,
    "chain": Chain,
}


def make_benchmark(name: str, num_slots: int | None = None) -> AbstractBenchmark:
    """The benchmark called `name`, padded to `num_slots` variables. Raises `ValueError` for an
    unknown name or too few places.
    """
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


def erdos_renyi(
    key_or_seed: Key[Array, ""] | int,
    num_vars: int,
    linear: bool,
    num_obs: int = 200,
    per_variable: int = 2,
    *,
    childless: bool = True,
    num_slots: int | None = None,
) -> tuple[SyntheticSCM, ExperienceBuffer]:
    """One of CBO-U's random systems, padded to `num_slots` variables, and its first data set. Drawn
    on the host: not for `jit`.

    Linear: weights ~ N(2, 1), noise N(0, 1). Nonlinear: per variable with parents one hidden layer
    of `NUM_HIDDEN` tanh units, weights and biases ~ N(0, 1), noise of deviation 0.1; a variable
    without parents is its noise. The graph is as `erdos_renyi_graph` says, the target a random
    variable with 1 to `MAX_TARGET_PARENTS` parents, and without children if `childless`. The ranges
    of intervention are those of the observational rows.

    The buffer holds `num_obs` observational rows, then `per_variable` rows for each variable save
    the target, in order, set to values uniform in [-5, 5], which may lie outside its range. It has
    no free places. The same seed gives the same graph and target for both kinds and the same system
    in every padding.

    Source: CBO-U's code, except that here each seed draws its own system. There all runs of one
    size share one graph, one target and one set of observational rows, so that the published
    deviations hold no variation over systems. No published target has a child (the graphs follow
    from the published seeds, tests/test_benchmarks.py), which is what the doubly robust prior
    assumes; hence the default of `childless`. Raises `ValueError` for fewer than 3 variables (no
    graph would qualify) or too few places.
    """
    slots = num_vars if num_slots is None else num_slots
    if num_vars < 3:
        raise ValueError(f"a random system needs at least 3 variables, not {num_vars}")
    if slots < num_vars:
        raise ValueError(f"{num_vars} variables do not fit in {slots} places")

    def pad(x: np.ndarray, num_axes: int = 1) -> Array:
        """`x` with the first `num_axes` axes lengthened from `num_vars` to `slots`."""
        return jnp.asarray(
            np.pad(x, [(0, slots - num_vars)] * num_axes + [(0, 0)] * (x.ndim - num_axes))
        )

    rng = np.random.default_rng(
        key_or_seed if isinstance(key_or_seed, int) else np.asarray(jr.key_data(key_or_seed))
    )
    graph, order, target = erdos_renyi_graph(rng, num_vars, childless)
    bias = np.where(graph[:, order].any(0) & (not linear), rng.standard_normal(num_vars), 0.0)
    scm = SyntheticSCM(  # pyright: ignore[reportCallIssue]  # `parents` and `names` are properties
        order=jnp.asarray(np.concatenate([order, np.arange(num_vars, slots)])),
        adjacency=pad(graph[order][:, order], 2),
        mechanism=jnp.int32(MECHANISMS.index("linear" if linear else "mlp")),
        noise_kind=jnp.int32(NOISES.index("gaussian")),
        weights=pad(rng.normal(2.0, 1.0, (num_vars, num_vars)), 2),
        frequencies=pad(rng.standard_normal((num_vars, num_vars, NUM_HIDDEN)), 2),
        phases=pad(rng.standard_normal((num_vars, NUM_HIDDEN))),
        amplitudes=pad(rng.standard_normal((num_vars, NUM_HIDDEN))),
        noise_scale=pad(np.full(num_vars, 1.0 if linear else 0.1)),
        shift=pad(-bias),
        spread=jnp.ones(slots),
        target=jnp.int32(target),
        low=jnp.zeros(slots),
        high=jnp.zeros(slots),
        var_mask=jnp.arange(slots) < num_vars,
    )
    variables = np.repeat(np.delete(np.arange(num_vars), target), per_variable)
    chosen = np.concatenate([np.full(num_obs, -1), variables])  # -1: nothing is set
    masks = jnp.asarray(chosen[:, None] == np.arange(slots)[None])
    values = jnp.asarray(np.where(masks, rng.uniform(-5.0, 5.0, (len(chosen), 1)), 0.0))
    rows = one_row_each(scm, pad(rng.standard_normal((len(chosen), num_vars)).T).T, masks, values)
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
