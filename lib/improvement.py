"""Expected improvement, by which the expert, the policy and the check weigh an experiment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_expected_improvement(
    mean: Float[Array, "*shape"], std: Float[Array, "*shape"], best: Float[Array, ""] | float
) -> Float[Array, "*shape"]:
    """log E[max(best - f, 0)] for f ~ N(mean, s^2), elementwise: the expected improvement is
    s (u Phi(u) + phi(u)) with u = (best - mean) / s, Phi and phi the standard normal distribution
    and density (Jones, Schonlau, Welch 1998, eq. 15).

    Its logarithm keeps variables ranked where the improvement itself underflows (Ament et al.
    2023). Below u = -5 the two terms cancel in float32; there it is the asymptotic series
    s phi(u) / u^2 (1 - 3 / u^2 + 15 / u^4), off by less than 1 %.
    """
    u = (best - mean) / std
    near, far = jnp.maximum(u, -5.0), jnp.minimum(u, -5.0)
    direct = jnp.log(near * jax.scipy.stats.norm.cdf(near) + jax.scipy.stats.norm.pdf(near))
    tail = (
        jax.scipy.stats.norm.logpdf(far) - 2 * jnp.log(-far) + jnp.log1p(-3 / far**2 + 15 / far**4)
    )
    return jnp.log(std) + jnp.where(u > -5, direct, tail)


def expected_improvement(
    mean: Float[Array, "*shape"], std: Float[Array, "*shape"], best: Float[Array, ""] | float
) -> Float[Array, "*shape"]:
    """E[max(best - f, 0)] for f ~ N(mean, std^2), in the units of `mean`."""
    return jnp.exp(log_expected_improvement(mean, std, best))
