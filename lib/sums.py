"""A data set as sums over its rows: one more row is one more term.

Rows are standardised by the observational ones; padding variables have zeros. Nothing here is
learned. One data set at a time; batch with `vmap`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lib.buffer import ExperienceBuffer
from lib.regression import Scale, powers_of, usable_rows
from lib.scm import Task, value_grid


MAX_DEVIATIONS = 10.0  # further out, a scalar is clipped: an outlier must not swamp every moment
# where powers end, in deviations or in half-widths of a range: a sixth power of more would leave
# float32 no digits for the rest
FARTHEST = 5.0
FREQUENCIES = (1.2, 2.4, 3.6)  # of the waves among the features of a scalar, per deviation
NUM_FEATURES = 14  # of a scalar


class Frame(NamedTuple):
    """Units of a data set, and the values in these units at which effects are predicted."""

    scale: Scale
    grid: Float[Array, "vars bins"]

    @staticmethod
    def of(buffer: ExperienceBuffer, task: Task, num_bins: int) -> "Frame":
        """From the observational rows, or all valid rows where there are fewer than two."""
        rows = jnp.where(buffer.observational.sum() >= 2, buffer.observational, buffer.valid)
        there = jnp.where(task.var_mask[None], buffer.values, 0.0)
        scale = Scale.of(there, rows)
        grid = scale(value_grid(task.low, task.high, num_bins).T).T
        grid = jnp.clip(grid, -MAX_DEVIATIONS, MAX_DEVIATIONS)
        # what has no range is looked at around its mean, whatever its units call zero
        ranged = task.var_mask & (task.high > task.low)
        return Frame(scale, jnp.where(ranged[:, None], grid, 0.0))

    def standardise(
        self, buffer: ExperienceBuffer, var_mask: Bool[Array, " vars"]
    ) -> Float[Array, "samples vars"]:
        """The values of the buffer in these units; free rows and padding are zero."""
        kept = buffer.valid[:, None] & var_mask[None]
        values = jnp.clip(self.scale(buffer.values), -MAX_DEVIATIONS, MAX_DEVIATIONS)
        return jnp.where(kept, values, 0.0)


class Sums(NamedTuple):
    """Sums over rows.

    Of pairs: `features` are products of the features of all scalars; `powers` those of one and
    three powers of all variables, `observed` over observational rows, and `under_do[j]` over the
    rows in which j was set.

    Of the target: `regression` are products of one, powers of every variable and the outcome over
    rows where the target was not set; `cubic[i]` those of one, powers of variable i and the outcome
    over rows where it alone may have been set, and `bumps[i]` those of bumps around the grid there;
    `seen`, `done` and `done_wide` those of a bump with one and with the outcome, observed and
    intervened.
    """

    count: Float[Array, ""]
    observational: Float[Array, ""]
    features: Float[Array, "features features"]
    powers: Float[Array, "powers powers"]
    observed: Float[Array, "powers powers"]
    under_do: Float[Array, "vars powers powers"]
    regression: Float[Array, "columns columns"]
    cubic: Float[Array, "vars 5 5"]
    bumps: Float[Array, "vars bins bins"]
    seen: Float[Array, "vars bins 2"]
    done: Float[Array, "vars bins 2"]
    done_wide: Float[Array, "vars bins 2"]


def scalar_features(
    values: Float[Array, "*shape"], intervened: Float[Array, "*shape"]
) -> Float[Array, "*shape features"]:
    """Of a standardised scalar: one, the first three Hermite polynomials with variance one, which
    are uncorrelated for a Gaussian (the first is the value itself), and waves; whether it was set,
    and to what.
    """
    u = jnp.clip(values, -FARTHEST, FARTHEST)
    waves = [wave(w * values) for w in FREQUENCIES for wave in (jnp.sin, jnp.cos)]
    return jnp.stack(
        [
            jnp.ones_like(values),
            values,
            (u**2 - 1.0) / jnp.sqrt(2.0),
            (u**3 - 3.0 * u) / jnp.sqrt(6.0),
            *waves,
            intervened,
            intervened * values,
            intervened * waves[0],
            intervened * waves[1],
        ],
        -1,
    )


def bumps(
    values: Float[Array, "samples vars"],
    centres: Float[Array, "vars bins"],
    width: Float[Array, " vars"],
) -> Float[Array, "samples vars bins"]:
    """Bumps of deviation `width` around the centres of each variable: (1 - u^2)^2, which ends and
    needs no exponential.
    """
    u = (values[:, :, None] - centres[None]) / (jnp.sqrt(7.0) * width[None, :, None])
    return jnp.square(jnp.maximum(1.0 - u * u, 0.0))


def bump_width(grid: Float[Array, "vars bins"]) -> Float[Array, " vars"]:
    """Half a step of the grid and a little more."""
    return 0.5 * (grid[:, 1:] - grid[:, :-1]).mean(-1) + 0.15


def range_scale(grid: Float[Array, "vars bins"]) -> Scale:
    """Centre and half-width of each variable's range; at least one deviation, and 2, about what
    observed values span, if the range has no width.
    """
    half = 0.5 * (grid[:, -1] - grid[:, 0])
    half = jnp.where(half > 0, jnp.maximum(half, 1.0), 2.0)
    return Scale(0.5 * (grid[:, 0] + grid[:, -1]), half)


def sum_rows(buffer: ExperienceBuffer, frame: Frame, task: Task) -> Sums:
    """The sums of some rows: those of a data set, or those of one row to be added."""
    values, dtype = frame.standardise(buffer, task.var_mask), buffer.values.dtype
    (num_rows, num_vars), outcome = values.shape, jnp.take(values, task.target, axis=1)
    intervened = (buffer.intervened & buffer.valid[:, None]).astype(dtype)
    valid, observed = buffer.valid.astype(dtype), buffer.observational.astype(dtype)

    def products(columns, weights):
        return (columns * weights[:, None]).T @ columns

    features = scalar_features(values, intervened) * task.var_mask[None, :, None]
    powers = jnp.concatenate([jnp.ones((num_rows, 1)), features[..., 1:4].reshape(num_rows, -1)], 1)
    powers = powers * valid[:, None]
    where_set = (intervened[:, :, None] * powers[:, None]).reshape(num_rows, -1)

    usable = usable_rows(buffer, task.target)
    done = intervened * usable[:, None]
    alone = observed[:, None] + done
    u = jnp.clip(range_scale(frame.grid)(values), -FARTHEST, FARTHEST)
    one = jnp.ones((num_rows, num_vars, 1))
    cubes, y = powers_of(u, 3), outcome[:, None]
    regression = jnp.concatenate([one[:, 0], cubes.reshape(num_rows, -1), y], 1)
    cubic = jnp.concatenate([one, cubes, one * y[:, None]], -1)
    level = jnp.stack([jnp.ones_like(outcome), outcome], -1)
    width = bump_width(frame.grid)
    near, wide = bumps(values, frame.grid, width), bumps(values, frame.grid, 3.0 * width)
    return Sums(
        valid.sum(),
        observed.sum(),
        products(features.reshape(num_rows, -1), valid),
        powers.T @ powers,
        products(powers, observed),
        (where_set.T @ powers).reshape(num_vars, powers.shape[1], powers.shape[1]),
        products(regression, usable),
        jnp.einsum("nv,nvp,nvq->vpq", alone, cubic, cubic),
        jnp.einsum("nv,nvp,nvq->vpq", alone, near, near),
        jnp.einsum("nvb,nc->vbc", near * observed[:, None, None], level),
        jnp.einsum("nvb,nc->vbc", near * done[:, :, None], level),
        jnp.einsum("nvb,nc->vbc", wide * done[:, :, None], level),
    )


class Summary(NamedTuple):
    """All that is kept of a data set: its units, and sums over its rows."""

    frame: Frame
    sums: Sums

    @staticmethod
    def of(buffer: ExperienceBuffer, task: Task, num_bins: int) -> "Summary":
        """Of all rows of `buffer`; effects will be told at `num_bins` values per variable."""
        frame = Frame.of(buffer, task, num_bins)
        return Summary(frame, sum_rows(buffer, frame, task))

    def add(self, buffer: ExperienceBuffer, task: Task) -> "Summary":
        """With the rows of `buffer` beside its own, each at one row's share of the cost of `of`.

        The units stay those of the first rows: after interventional rows the sums are those of the
        whole data set; observational ones would have moved the units a little.
        """
        return Summary(
            self.frame, jax.tree.map(jnp.add, self.sums, sum_rows(buffer, self.frame, task))
        )
