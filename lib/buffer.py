"""`ExperienceBuffer`: what has been observed and what has been done, as fixed-size arrays that jit,
vmap and scan.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from lib.scm import Intervention


MIN_OBSERVATIONS = 10


class ExperienceBuffer(eqx.Module):
    """Rows of experience; immutable, every change returns a new buffer.

    `values[samples, vars]`, `intervened[samples, vars]` (true where the value was set by hand),
    `valid[samples]` (false rows are free space).
    """

    values: Float[Array, "samples vars"]
    intervened: Bool[Array, "samples vars"]
    valid: Bool[Array, " samples"]

    @staticmethod
    def empty(num_vars: int, capacity: int) -> "ExperienceBuffer":
        """A buffer with room for `capacity` rows of `num_vars` variables."""
        return ExperienceBuffer(
            jnp.zeros((capacity, num_vars)),
            jnp.zeros((capacity, num_vars), bool),
            jnp.zeros(capacity, bool),
        )

    @property
    def size(self):
        """How many rows are filled."""
        return self.valid.sum()

    @property
    def observational(self) -> Bool[Array, " samples"]:
        """Filled rows without an intervention."""
        return self.valid & ~self.intervened.any(1)

    def grow(self, extra: int) -> "ExperienceBuffer":
        """The same rows with `extra` more free rows at the end."""
        return ExperienceBuffer(
            jnp.pad(self.values, ((0, extra), (0, 0))),
            jnp.pad(self.intervened, ((0, extra), (0, 0))),
            jnp.pad(self.valid, (0, extra)),
        )

    def widen(self, extra: int) -> "ExperienceBuffer":
        """The same rows with `extra` padding variables behind."""
        return ExperienceBuffer(
            jnp.pad(self.values, ((0, 0), (0, extra))),
            jnp.pad(self.intervened, ((0, 0), (0, extra))),
            self.valid,
        )

    def first(self, count) -> "ExperienceBuffer":
        """What was known when `count` rows were filled; the others are free rows again."""
        return self.only(jnp.arange(self.valid.shape[0]) < count)

    def only(self, kept: Bool[Array, " samples"]) -> "ExperienceBuffer":
        """The rows that are `kept`, each in its place; the others are free rows."""
        known = self.valid & kept
        return ExperienceBuffer(
            jnp.where(known[:, None], self.values, 0.0), self.intervened & known[:, None], known
        )

    def add_intervention(
        self, intervention: Intervention, outcome: Float[Array, " vars"]
    ) -> "ExperienceBuffer":
        """One more row, observed under `intervention`.

        The row takes the first free row; rows are filled from the front. Raises `ValueError` if
        the buffer is full. Inside `jit` that cannot be known (a host callback could tell, and can
        deadlock on CPU): there the caller reserves capacity.
        """
        if not isinstance(self.valid, Tracer) and self.size >= self.valid.shape[0]:
            raise ValueError(
                f"the ExperienceBuffer is full ({self.valid.shape[0]} rows): make room with grow()"
            )
        return self.write(self.size, intervention, outcome)

    def has_room(self, extra: int, filled: int = 0) -> Bool[Array, ""]:
        """Whether `extra` more rows fit behind those that there are, at least `filled`. Raises
        `ValueError` where it can be told that they do not; inside `jit`, where rows cannot be
        counted, the caller has to mark what it returns (`nan_unless`).
        """
        capacity, size = self.valid.shape[0], self.size
        rows = filled if isinstance(size, Tracer) else max(int(size), filled)
        if rows + extra > capacity:
            raise ValueError(
                f"the buffer has {capacity} places, too few for its rows and {extra} experiments "
                f"(at least {rows} rows): use grow()"
            )
        return size + extra <= capacity

    def write(
        self, index, intervention: Intervention, outcome: Float[Array, " vars"]
    ) -> "ExperienceBuffer":
        """`add_intervention` at a known free row, without the check of room: for loops that count
        their own steps.

        Raises `ValueError` unless `outcome` has one number, and `intervention` one flag, per
        variable.
        """
        num_vars = self.values.shape[1]
        for what, shape in (
            ("outcome", jnp.shape(outcome)),
            ("intervention", intervention.mask.shape),
        ):
            if shape != (num_vars,):
                raise ValueError(
                    f"the {what} has shape {shape}, the buffer {num_vars} variables: "
                    "give one number for each"
                )
        return ExperienceBuffer(
            self.values.at[index].set(outcome),
            self.intervened.at[index].set(intervention.mask),
            self.valid.at[index].set(True),
        )


def nan_unless(fits: Bool[Array, ""], tree: PyTree) -> PyTree:
    """The tree with nan for every number unless `fits`: what a program that could only count rows
    as it ran returns in place of raising. Not `eqx.error_if`: a host callback inside a batched loop
    can deadlock on a machine with few cores.
    """
    return jax.tree.map(
        lambda leaf: jnp.where(fits, leaf, jnp.nan) if eqx.is_inexact_array(leaf) else leaf, tree
    )
