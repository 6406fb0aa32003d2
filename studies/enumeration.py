"""The true posterior over a target's parent sets for small linear Gaussian systems, by enumeration
of every graph: what a surrogate is held against.

Under the simulator's own prior (`SCMPrior` with linear mechanisms and Gaussian noise), from
observational and interventional rows, each graph has the weight

    P(G) * prod_j p(x_j | its parents) * P(the target is the one that was chosen | G, coefficients).

A variable's rows are those in which it was not set (Cooper and Yoo, UAI 1999). Its marginal
likelihood integrates over intercept, coefficients and noise of the standardised mechanism by
importance sampling; its units are unknown, as they are to anyone who only sees the data. The choice
of the target, which must have something to gain, is taken at the coefficients' posterior means.
"""

import itertools
from functools import lru_cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lib.buffer import ExperienceBuffer
from lib.graphs import FAMILIES, sample_graph
from lib.posterior import ParentSetPosterior
from lib.scm import Task
from lib.scm_prior import SCMPrior
from lib.sums import Standardisation


MAX_ENUMERATED = 5  # 29,281 graphs; with six variables there are 3.8 million
NUM_GRAPHS = 400_000  # that the prior over graphs is simulated with
NUM_DRAWS = 2048  # of the importance sampler, per variable and parent set
# of its t distribution: the prior keeps coefficients away from zero, so the tails count
FREEDOM = 4.0
WIDTH = 1.5  # by which it is wider than the likelihood
# probability of a target that has too little to gain at the mean coefficients: they err
LEAST_CHOSEN = 1e-6


@lru_cache
def enumerate_dags(num_vars: int) -> Bool[np.ndarray, "dags vars vars"]:
    """Every directed acyclic graph `[parent, child]` over 2 to `MAX_ENUMERATED` variables. Raises
    `ValueError` for other numbers.
    """
    if not 2 <= num_vars <= MAX_ENUMERATED:
        raise ValueError(
            f"graphs over 2 to {MAX_ENUMERATED} variables can be enumerated, not {num_vars}"
        )
    pairs = list(itertools.combinations(range(num_vars), 2))
    # no edge, forward, backward
    state = np.array(list(itertools.product(range(3), repeat=len(pairs))))
    graphs = np.zeros((len(state), num_vars, num_vars), bool)
    for column, (i, j) in enumerate(pairs):
        graphs[:, i, j], graphs[:, j, i] = state[:, column] == 1, state[:, column] == 2
    reach = np.linalg.matrix_power(
        graphs.astype(np.int64) + np.eye(num_vars, dtype=np.int64), num_vars
    )
    cyclic = ((reach > 0) & (reach.swapaxes(1, 2) > 0) & ~np.eye(num_vars, dtype=bool)).any((1, 2))
    return graphs[~cyclic]


@lru_cache
def log_graph_prior(num_vars: int, prior: SCMPrior) -> Float[np.ndarray, " dags"]:
    """Log-probabilities of `enumerate_dags` under `sample_graph` with the families of `prior` and a
    random order of the variables.

    By simulation of `NUM_GRAPHS` graphs; -inf for those that never came.
    """

    def one(key):
        family_key, graph_key, order_key = jr.split(key, 3)
        kinds = jnp.array([list(FAMILIES).index(name) for name in prior.families])
        family, density = jr.choice(family_key, kinds), (prior.min_density, prior.max_density)
        graph = sample_graph(graph_key, family, jnp.array(num_vars), prior.max_vars, density)
        graph = graph[:num_vars, :num_vars]
        order = jr.permutation(order_key, num_vars)
        return (graph[order][:, order].reshape(-1) * 2 ** jnp.arange(num_vars**2)).sum()

    with jax.ensure_compile_time_eval():
        drawn = np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(0), NUM_GRAPHS)))
    codes = (enumerate_dags(num_vars).reshape(-1, num_vars**2) * 2 ** np.arange(num_vars**2)).sum(1)
    with np.errstate(divide="ignore"):
        return np.log(np.bincount(drawn, minlength=2 ** (num_vars**2))[codes] / NUM_GRAPHS)


def subsets(num_vars: int) -> Bool[np.ndarray, "sets vars"]:
    """Every set of variables; the members of set k are the ones among the binary digits of k."""
    return (np.arange(2**num_vars)[:, None] >> np.arange(num_vars) & 1).astype(bool)


def log_coefficient_prior(coefficients, noise, members, prior: SCMPrior) -> Float[Array, ""]:
    """Log density of a standardised mechanism `b = w / s`, `noise = n / s` with s, the scale that
    standardisation removes, of unknown size.

    |w| uniform in [.5, 2] with either sign, log n uniform, and density 1 / s: the integral over s
    runs between the values at which a w or n would leave its range, and is a power of s. -inf where
    there are none.
    """
    size = members.sum()
    magnitude = jnp.where(members, jnp.abs(coefficients), 1.0)
    low = jnp.where(members, 0.5 / magnitude, 0.0).max(initial=prior.min_noise / noise)
    high = jnp.where(members, 2.0 / magnitude, jnp.inf).min(initial=prior.max_noise / noise)
    possible = high > low
    low, high = jnp.where(possible, low, 1.0), jnp.where(possible, high, 2.0)
    power = jnp.maximum(size, 1)
    integral = jnp.where(size > 0, (high**power - low**power) / power, jnp.log(high / low))
    density = (
        jnp.log(integral)
        - size * jnp.log(3.0)
        - jnp.log(noise)
        - jnp.log(jnp.log(prior.max_noise / prior.min_noise))
    )
    return jnp.where(possible, density, -jnp.inf)


@lru_cache
def integration_points(
    num_vars: int,
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, "draws vars"]]:
    """Fixed draws of a t distribution for the noise and, independent of it, of a multivariate one
    for the coefficients.
    """
    rng = np.random.default_rng(0)
    noise = rng.standard_t(FREEDOM, NUM_DRAWS)
    coefficients = rng.standard_normal((NUM_DRAWS, num_vars)) / np.sqrt(
        rng.chisquare(FREEDOM, (NUM_DRAWS, 1)) / FREEDOM
    )
    return noise.astype(np.float32), coefficients.astype(np.float32)


def fit_mechanism(
    x, y, used, members, prior: SCMPrior
) -> tuple[Float[Array, ""], Float[Array, " vars"]]:
    """Log marginal likelihood of `y[samples]` given the `members` among `x[samples, vars]` over the
    rows `used`, and the mean coefficients.
    """
    weights = used.astype(x.dtype)
    count = weights.sum()
    centre = (weights @ x) / count
    x = jnp.where(members[None] & used[:, None], x - centre[None], 0.0)
    y = jnp.where(used, y - (weights @ y) / count, 0.0)
    # variables outside the set: independent and of no consequence
    gram = x.T @ x + jnp.diag(jnp.where(members, 1e-3, 1.0))
    moment, square = x.T @ y, y @ y
    factor = jnp.linalg.cholesky(gram)
    mode = jax.scipy.linalg.cho_solve((factor, True), moment)
    size = members.sum()
    variance = jnp.maximum(square - moment @ mode, 1e-6 * square) / (count - 1 - size)

    t, scaled = integration_points(len(members))
    scaled = jnp.where(members[None], scaled, 0.0)
    spread = WIDTH / jnp.sqrt(2 * (count - 1))
    noise = jnp.sqrt(variance) * jnp.exp(spread * t)
    log_proposal = jax.scipy.stats.t.logpdf(t, FREEDOM) - jnp.log(spread * noise)
    # covariance gram^-1; a triangular solve is slow with so many right-hand sides
    offset = scaled @ jnp.linalg.inv(factor)
    coefficients = jnp.where(members[None], mode[None] + WIDTH * jnp.sqrt(variance) * offset, 0.0)
    log_det = jnp.log(jnp.diagonal(factor)).sum() - size * jnp.log(WIDTH * jnp.sqrt(variance))
    constant = (
        jax.scipy.special.gammaln((FREEDOM + size) / 2)
        - jax.scipy.special.gammaln(FREEDOM / 2)
        - 0.5 * size * jnp.log(FREEDOM * jnp.pi)
    )
    log_proposal += (
        constant + log_det - 0.5 * (FREEDOM + size) * jnp.log1p((scaled**2).sum(1) / FREEDOM)
    )

    residual = (
        square
        - 2 * coefficients @ moment
        + jnp.einsum("sv,vw,sw->s", coefficients, x.T @ x, coefficients)
    )
    log_likelihood = (
        -(count - 1) * jnp.log(noise)
        - 0.5 * (count - 1) * jnp.log(2 * jnp.pi)
        - 0.5 * jnp.log(count)
        - 0.5 * residual / noise**2
    )
    log_prior = jax.vmap(lambda b, n: log_coefficient_prior(b, n, members, prior))(
        coefficients, noise
    )
    log_weights = log_likelihood + log_prior - log_proposal
    evidence = jax.nn.logsumexp(log_weights) - jnp.log(NUM_DRAWS)
    share = jnp.where(jnp.isfinite(evidence), jnp.exp(log_weights - evidence) / NUM_DRAWS, 0.0)
    return evidence, share @ coefficients


def graph_posterior(
    buffer: ExperienceBuffer, task: Task, prior: SCMPrior, num_bins: int = 2
) -> tuple[
    Standardisation, Float[Array, " dags"], Int[Array, " dags"], Float[Array, "dags vars vars"]
]:
    """Weigh every graph over the buffer's variables, of which none is padding: the units of the
    data; P(graph | data) over `enumerate_dags`; the number in `subsets` of the target's parents in
    each; and the mean total effects of every variable.

    Coefficients of different mechanisms are independent given the data, and no path meets a
    mechanism twice: the total effect of mean coefficients is the mean total effect.

    Pure: `jit` and `vmap` over the first two arguments. Raises `ValueError` for a prior that is not
    linear, Gaussian and standardised, and for more than `MAX_ENUMERATED` variables.
    """
    kinds = (prior.mechanisms, prior.noises, prior.standardised)
    if kinds != (("linear",), ("gaussian",), True):
        raise ValueError(
            f"only standardised linear Gaussian systems can be enumerated, not {kinds}"
        )
    num_vars = buffer.values.shape[1]
    graphs, sets = jnp.asarray(enumerate_dags(num_vars)), jnp.asarray(subsets(num_vars))
    units = Standardisation.of(buffer, task, num_bins)
    x = units.values(buffer, task.var_mask)

    def variable(i):
        used = buffer.valid & ~buffer.intervened[:, i]
        others = sets & (jnp.arange(num_vars) != i)[None]
        return jax.vmap(lambda members: fit_mechanism(x, x[:, i], used, members, prior))(others)

    own = jnp.arange(num_vars)
    # log marginal likelihood and mean coefficients of every variable given every set
    evidence, coefficients = jax.lax.map(variable, own)
    # [dags, vars]: which set each variable's parents are
    code = jnp.tensordot(2**own, graphs.astype(int), axes=(0, 1))
    direct = coefficients[own[None], code].swapaxes(1, 2)  # [dags, parent, child]
    total = jnp.linalg.inv(jnp.eye(num_vars)[None] - direct) - jnp.eye(num_vars)[None]
    # the target is one of the variables that some intervention lowers by `min_effect`
    ends = units.grid[:, jnp.array([0, -1])]
    drop = (-total[..., None] * ends[None, :, None]).max((1, 3))
    qualifies = drop >= prior.min_effect
    chosen = jnp.maximum(
        qualifies[:, task.target] / jnp.maximum(qualifies.sum(1), 1),
        LEAST_CHOSEN * (drop[:, task.target] > 1e-3),
    )
    log_weights = (
        jnp.asarray(log_graph_prior(num_vars, prior), x.dtype)
        + evidence[own[None], code].sum(1)
        + jnp.log(chosen)
    )
    return units, jax.nn.softmax(log_weights), code[:, task.target], total


def enumerated_posterior(
    buffer: ExperienceBuffer, task: Task, prior: SCMPrior
) -> ParentSetPosterior:
    """P(parents of the target | data), over all `2^vars` sets, those with the target included at
    probability zero.

    As pure as `graph_posterior`, and with its errors.
    """
    _, probs, parent_set, _ = graph_posterior(buffer, task, prior)
    sets = jnp.asarray(subsets(buffer.values.shape[1]))
    log_probs = jnp.log(jnp.zeros(len(sets)).at[parent_set].add(probs))
    return ParentSetPosterior(task.target, sets, log_probs)


def enumerated_effects(
    buffer: ExperienceBuffer, task: Task, prior: SCMPrior, num_bins: int
) -> Float[Array, "vars bins"]:
    """The posterior mean of E[Y | do(X_i = v)] on each variable's range, in the target's own units:
    its lowest point is the best first experiment.

    Means without intervention are those of the observational rows. As pure as `graph_posterior`,
    and with its errors.
    """
    units, probs, _, total = graph_posterior(buffer, task, prior, num_bins)
    slope = jnp.einsum("g,gi->i", probs, jnp.take(total, task.target, axis=2))
    shift, spread = (x[task.target] for x in units.scale)
    return shift + spread * slope[:, None] * units.grid
