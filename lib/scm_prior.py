"""The distribution of causal models: random graphs and mechanisms, a target worth optimising."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Key

from lib.graphs import FAMILIES, between, draw, log_between, one_of, pick, sample_graph, whole
from lib.scm import (
    MECHANISMS,
    NOISES,
    Intervention,
    SyntheticSCM,
    antithetic_normal,
    value_grid,
)


NUM_HIDDEN = 16  # hidden units per mechanism: enough for a varied function of up to a few parents
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
    """Shortest distance from the observational mean to an end of a range of intervention."""
    max_range: float = 4.0
    """Longest distance from the observational mean to an end of a range of intervention."""
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


def inherit(prior: SCMPrior, header: dict) -> SCMPrior:
    """The prior of a stage that builds on an artifact with this `header`: its own sizes, and all
    else from the prior that the artifact was made with, unless a setting of its own departs from
    the default. So a prior that stage 1 was given reaches every later stage.
    """
    sizes = {name: getattr(prior, name) for name in ("max_vars", "min_size", "max_size")}
    if prior != SCMPrior(**sizes):
        return prior
    return SCMPrior(**prior_in(header) | sizes)


def prior_in(header: dict) -> dict[str, Any]:
    """The settings of the prior that the artifact with this `header` was made with."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in header["config"]["prior"].items()
    }


def multimodal(prior: SCMPrior) -> SCMPrior:
    """The same with wide ranges and responses that have several valleys (if its mechanisms have
    any): problems where it pays to look around.
    """
    return replace(
        prior,
        mechanisms=("fourier",) if "fourier" in prior.mechanisms else prior.mechanisms,
        min_lengthscale=0.4,
        max_lengthscale=1.0,
        min_range=3.0,
        max_range=4.0,
    )


def sample_scm(key: Key[Array, ""], prior: SCMPrior) -> SyntheticSCM:
    """A random model whose target has an ancestor that can lower it by at least `min_effect`
    standard deviations (redrawn until it does).
    """

    def attempt(state):
        key, draw_key = jr.split(state[0])
        return key, *_sample_once(draw_key, prior)

    shape = jax.eval_shape(lambda k: _sample_once(k, prior), key)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    return jax.lax.while_loop(lambda state: ~state[2], attempt, (key, *nothing))[1]


def _sample_once(key: Key[Array, ""], prior: SCMPrior) -> tuple[SyntheticSCM, Bool[Array, ""]]:
    """One draw, and whether some variable of it qualifies as a target."""
    d = prior.max_vars
    graph_key, uniform_key, normal_key, noise_key = jr.split(key, 4)
    u = draw(
        jr.uniform,
        uniform_key,
        **dict.fromkeys(("size", "family", "mechanism", "target"), ()),
        **dict.fromkeys(("order", "length", "noise"), (d,)),
        range=(2, d),
        weight=(d, d),
        sign=(d, d),
        phase=(d, NUM_HIDDEN),
    )
    n = draw(jr.normal, normal_key, frequency=(d, d, NUM_HIDDEN), amplitude=(d, NUM_HIDDEN))
    size = whole(u["size"], prior.min_size, prior.max_size + 1)
    family = one_of(u["family"], prior.families, FAMILIES)
    mechanism = one_of(u["mechanism"], prior.mechanisms, MECHANISMS)
    phases, fixed = (
        jnp.array([getattr(kind, name) for kind in MECHANISMS.values()])[mechanism]
        for name in ("phases", "lengthscale")
    )
    length = log_between(u["length"], prior.min_lengthscale, prior.max_lengthscale)
    lengthscale = jnp.where(jnp.isnan(fixed), length, fixed)
    low, high = between(u["range"], prior.min_range, prior.max_range)
    scm = SyntheticSCM(  # pyright: ignore[reportCallIssue]  # `parents` and `names` are properties
        family=family,
        # a random name for each place, padding kept last
        order=jnp.argsort(jnp.where(jnp.arange(d) < size, u["order"], 2.0 + jnp.arange(d))),
        adjacency=sample_graph(graph_key, family, size, d, (prior.min_density, prior.max_density)),
        mechanism=mechanism,
        noise_kind=one_of(jr.uniform(noise_key), prior.noises, NOISES),
        weights=between(u["weight"], 0.5, 2.0) * jnp.where(u["sign"] < 0.5, -1.0, 1.0),
        frequencies=n["frequency"] / lengthscale[None, :, None],
        phases=between(u["phase"], *phases),
        amplitudes=2.0 * jnp.sqrt(2.0 / NUM_HIDDEN) * n["amplitude"],
        noise_scale=log_between(u["noise"], prior.min_noise, prior.max_noise),
        shift=jnp.zeros(d),
        spread=jnp.ones(d),
        target=jnp.array(0),
        low=jnp.where(jnp.arange(d) < size, -low, 0.0),
        high=jnp.where(jnp.arange(d) < size, high, 0.0),
        var_mask=jnp.arange(d) < size,
    )
    mean, deviation = _moments(scm, prior.standardised)
    if prior.standardised:
        scm = replace(scm, shift=mean, spread=deviation)
        unit = jnp.ones(d)
    else:
        centre, unit = mean[scm.position], deviation[scm.position]
        low, high = (
            jnp.where(scm.var_mask, centre + unit * end, 0.0) for end in (scm.low, scm.high)
        )
        scm = replace(scm, low=low, high=high)
    qualifies = scm.var_mask & (_largest_drops(scm) >= prior.min_effect * unit)
    return replace(scm, target=pick(u["target"], qualifies)), qualifies.any()


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


def _largest_drops(scm: SyntheticSCM) -> Float[Array, " vars"]:
    """For every variable j as a target: the largest E[X_j] - E[X_j | do(X_i = v)] over other
    variables i and a coarse grid of values.
    """
    num_vars = scm.order.shape[0]
    noise = scm.reference_noise()[::4]
    shifted = scm.mean_table(value_grid(scm.low, scm.high, 5), noise)
    baseline = scm.simulate(noise, Intervention.none(num_vars)).mean(0)
    moved = (baseline[None, None] - shifted).max(1)
    return jnp.where(jnp.eye(num_vars, dtype=bool) | ~scm.var_mask[:, None], 0.0, moved).max(0)
