"""`ParentSetPosterior`: a distribution over the parent sets of one target; entropies in nats."""

from itertools import compress

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class ParentSetPosterior(eqx.Module):
    """Probabilities of `sets[sets, vars]` for `target`; `log_probs[sets]` is normalised over the
    listed sets, -inf marks an unused place.
    """

    target: Int[Array, ""]
    sets: Bool[Array, "sets vars"]
    log_probs: Float[Array, " sets"]

    @property
    def probs(self) -> Float[Array, " sets"]:
        return jnp.exp(self.log_probs)

    def marginals(self) -> Float[Array, " vars"]:
        """P(X_i is a parent of the target)."""
        return self.probs @ self.sets.astype(self.log_probs.dtype)

    def entropy(self) -> Float[Array, ""]:
        """Entropy over sets, in nats."""
        return -(self.probs * jnp.where(self.probs > 0, self.log_probs, 0.0)).sum()

    def top_k(self, k: int) -> "ParentSetPosterior":
        """The `k` most probable sets, most probable first, with their probabilities as they are
        (not renormalised).
        """
        log_probs, index = jax.lax.top_k(self.log_probs, k)
        return ParentSetPosterior(self.target, self.sets[index], log_probs)

    def log_prob(self, parents: Bool[Array, " vars"]) -> Float[Array, ""]:
        """Log-probability of one set; -inf if it is not listed."""
        return jax.nn.logsumexp(
            jnp.where((self.sets == parents[None]).all(1), self.log_probs, -jnp.inf)
        )

    def to_dict(self, names: tuple[str, ...]) -> dict[frozenset[str], float]:
        """Named sets with positive probability, most probable first."""
        # by numpy, which compiles nothing
        sets, probs = np.asarray(self.sets), np.exp(self.log_probs)
        order = [i for i in np.argsort(-probs, kind="stable") if probs[i] > 0]
        return {frozenset(compress(names, sets[i])): float(probs[i]) for i in order}
