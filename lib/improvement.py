"""Expected improvement, by which the expert, the policy and the check weigh an experiment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_expected_improvement(
    mean: Float[Array, "*shape"], std: Float[Array, "*shape"], best: Float[Array, ""] | float
) -> Float[Array, "*shape"]:
    """log E[max(best - f, 0)] for f ~ N(mean, std^2): the improvement is s (u Phi(u) + phi(u)) with
    u = (best - mean) / s.

    Below u = -5 by its asymptotic series, so that variables stay ranked where the improvement
    itself underflows (Ament et al. 2023).
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
