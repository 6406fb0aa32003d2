"""What is kept of a data set: sums over its rows, to which one more row adds one term.

The way from rows to the network is one way: `Summary.of(buffer, task, num_bins)` sums features of
the rows here, `statistics` (lib/statistics.py) makes two arrays of the sums, and the surrogate
(lib/surrogate.py) reads these. A simulated campaign calls `Summary.add` for each new row and never
reads the others again. Nothing here is learned. One data set at a time; batch with `vmap`.

Values are standardised: in the units that `Standardisation.of` says, from the observational mean.
Padding variables are zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.regression import Scale, powers_of, usable_rows
from lib.scm import Task, value_grid


FARTHEST_END = 5.0  # units to the further end of a range
OUTLIER = 10.0  # deviations of all other observations, beyond which a single one does not count
MAX_DEVIATIONS = 10.0  # values are clipped there, lest one outlier decide every sum
# Polynomials are of values clipped there: the sums hold products of two cubes, and of one row at
# 5^6 = 15,625 float32 (7 digits) still keeps what rows near the mean add.
MAX_POWER_BASE = 5.0
# Of the Fourier features, in radians per standard deviation: one, two and three periods over 5.2
# standard deviations, where all but 1 % of a Gaussian's values are.
FREQUENCIES = (1.2, 2.4, 3.6)
MOST_ROWS = 1024  # that are summed at once
NUM_FEATURES = 14  # of a scalar: `scalar_features`


class Standardisation(NamedTuple):
    """Mean and unit of every variable, its grid of values in these units, and its standard
    deviation over the observational rows.
    """

    scale: Scale
    grid: Float[Array, "vars bins"]
    observed_std: Float[Array, " vars"]

    @staticmethod
    def of(buffer: ExperienceBuffer, task: Task, num_bins: int) -> "Standardisation":
        """Mean and standard deviation are of the observational rows, or of all valid ones where
        fewer than two are observational (one has no standard deviation), without a single row
        beyond `OUTLIER` deviations of all others. The unit is that deviation, but where a system is
        quiet, what experiments do to it must not be clipped: so at least a `FARTHEST_END`th of the
        distance to the further end of the range, what as much of another variable does to it by its
        slope, a third of the deviation over the rows in which the variable was not set, and a
        `MAX_DEVIATIONS`th of the furthest but one of them. The grid has `num_bins` values from
        `low` to `high`.
        """
        values = jnp.where(task.var_mask[None], buffer.values, 0.0)
        rows = jnp.where(buffer.observational.sum() >= 2, buffer.observational, buffer.valid)
        observed, lone = without_outlier(values, rows)
        ends = jnp.abs(jnp.stack([task.low, task.high]) - observed.shift[None])
        reach = jnp.where(task.candidates, ends.max(0) / FARTHEST_END, 0.0)
        free = buffer.valid[:, None] & ~buffer.intervened & ~lone
        count = jnp.maximum(free.sum(0), 1)
        mean = jnp.where(free, values, 0.0).sum(0) / count
        moved = jnp.sqrt(jnp.where(free, (values - mean[None]) ** 2, 0.0).sum(0) / count) / 3.0
        elsewhere = free & ~rows[:, None]
        distance = jnp.where(elsewhere, jnp.abs(values - observed.shift[None]), 0.0)
        second = jnp.where(distance < distance.max(0)[None], distance, 0.0).max(0) / MAX_DEVIATIONS
        # correlations less two standard errors, times how many deviations a unit is
        near = jnp.where(rows[:, None] & ~lone, observed(values), 0.0)
        near, number = near.clip(-MAX_DEVIATIONS, MAX_DEVIATIONS), jnp.maximum(rows.sum(), 1)
        slopes = jnp.abs(near.T @ near) / number - 2.0 / jnp.sqrt(number)
        slopes = (slopes * (reach / observed.spread)[:, None]).max(0) * observed.spread
        unit = jnp.stack([observed.spread, reach, slopes, moved, second]).max(0)
        scale = Scale(observed.shift, unit)
        grid = scale(value_grid(task.low, task.high, num_bins).T).T.clip(
            -MAX_DEVIATIONS, MAX_DEVIATIONS
        )
        # without a range: the variable's mean, so that where its zero lies changes nothing
        ranged = task.var_mask & (task.high > task.low)
        grid = jnp.where(ranged[:, None], grid, 0.0)
        return Standardisation(scale, grid, observed.spread)

    def values(
        self, buffer: ExperienceBuffer, var_mask: Bool[Array, " vars"]
    ) -> Float[Array, "samples vars"]:
        """Those of the buffer, standardised and clipped; zero in free rows and for padding."""
        kept = buffer.valid[:, None] & var_mask[None]
        values = self.scale(buffer.values).clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        return jnp.where(kept, values, 0.0)


def without_outlier(
    values: Float[Array, "samples vars"], rows: Bool[Array, " samples"]
) -> tuple[Scale, Bool[Array, "samples vars"]]:
    """Mean and standard deviation of every variable over `rows`, but without a single value that
    lies beyond `OUTLIER` deviations of all others; and which value that is, where there is one.
    """
    all_rows, index = Scale.of(values, rows), jnp.arange(len(values))[:, None]
    distance = jnp.where(rows[:, None], jnp.abs(values - all_rows.shift[None]), -1.0)
    furthest = index == distance.argmax(0)[None]
    others = rows[:, None] & ~furthest
    rest = Scale.of(values, others)
    apart = jnp.abs(values - rest.shift[None])
    # MIN_OBSERVATIONS, that vary, say what is usual
    usual = (others.sum(0) >= MIN_OBSERVATIONS) & (jnp.where(others, apart, 0.0).max(0) > 0)
    lone = rows[:, None] & furthest & usual[None] & (apart > OUTLIER * rest.spread[None])
    return Scale(*(jnp.where(lone.any(0), *x) for x in zip(rest, all_rows, strict=True))), lone


class Sums(NamedTuple):
    """Sums over rows of products of columns: Gram matrices X'X, or X'y.

    Rows are all, the observational ones, those in which j was set (`under_do[j]`), those in which
    the target Y was not set (`usable_rows`), or of these those in which nothing but i may have been
    set. Columns are

    - features: `scalar_features` of every variable;
    - polynomials: one, and the three Hermite polynomials among these features;
    - powers: one, u, u^2 and u^3 of `range_scale`, and Y;
    - kernels: `biweight_kernel` around the grid of variable i.
    """

    count: Float[Array, ""]  # all rows
    observational: Float[Array, ""]  # the observational ones
    features: Float[Array, "features features"]  # all rows; variables times their features
    polynomials: Float[Array, "polynomials polynomials"]  # all rows; 1 + 3 vars
    observed: Float[Array, "vars vars"]  # values, observational rows
    under_do: Float[Array, "vars polynomials polynomials"]  # polynomials, rows in which j was set
    powers: Float[Array, "powers powers"]  # of all variables, Y not set; 2 + 3 vars
    own_powers: Float[Array, "vars 5 5"]  # of variable i, nothing but i set
    kernels: Float[Array, "vars bins bins"]  # nothing but i set
    kernels_observed: Float[Array, "vars bins 2"]  # times one and Y, observational rows
    kernels_done: Float[Array, "vars bins 2"]  # times one and Y, rows in which i was set, Y not
    wide_kernels_done: Float[Array, "vars bins 2"]  # the same with three times the bandwidth

    @property
    def not_intervened(self) -> Float[Array, "vars polynomials polynomials"]:
        """Polynomials over the rows in which i was not intervened on."""
        return self.polynomials[None] - self.under_do


def scalar_features(
    values: Float[Array, "*shape"], intervened: Float[Array, "*shape"]
) -> Float[Array, "*shape features"]:
    """14 features of a standardised scalar x, `intervened` one where it was set and zero elsewhere.

    One; the Hermite polynomials He_k(x) / sqrt(k!) for k = 1, 2, 3 (the first is x), which are
    uncorrelated with variance one for a Gaussian; Fourier features sin(w x) and cos(w x) of three
    frequencies; whether x was set, and then x, sin(w x) and cos(w x) of the lowest.
    """
    u = jnp.clip(values, -MAX_POWER_BASE, MAX_POWER_BASE)
    fourier = [f(w * values) for w in FREQUENCIES for f in (jnp.sin, jnp.cos)]
    return jnp.stack(
        [
            jnp.ones_like(values),
            values,
            (u**2 - 1.0) / jnp.sqrt(2.0),  # He_2 / sqrt(2!)
            (u**3 - 3.0 * u) / jnp.sqrt(6.0),  # He_3 / sqrt(3!)
            *fourier,
            intervened,
            intervened * values,
            intervened * fourier[0],
            intervened * fourier[1],
        ],
        -1,
    )


def biweight_kernel(
    values: Float[Array, "samples vars"],
    centres: Float[Array, "vars bins"],
    bandwidth: Float[Array, " vars"],
) -> Float[Array, "samples vars bins"]:
    """(1 - u^2)^2 for |u| < 1 around every centre (the biweight kernel, Silverman 1986, table 3.1,
    at height one), `bandwidth` its standard deviation. Unlike a Gaussian it ends, and it needs no
    exponential.
    """
    # as a density on [-1, 1] its variance is 1 / 7: it ends at sqrt(7) standard deviations
    u = (values[:, :, None] - centres[None]) / (jnp.sqrt(7.0) * bandwidth[None, :, None])
    return jnp.square(jnp.maximum(1.0 - u * u, 0.0))


def kernel_bandwidth(grid: Float[Array, "vars bins"]) -> Float[Array, " vars"]:
    """Half a step of the grid, at which neighbouring kernels overlap to a smooth basis, and 0.15
    standard deviations, so that those of a short range still reach some rows.
    """
    return 0.5 * (grid[:, 1:] - grid[:, :-1]).mean(-1) + 0.15


def range_scale(grid: Float[Array, "vars bins"]) -> Scale:
    """Centre and half-width of each variable's range, for powers u^p that are one at its end.

    The half-width is at least one standard deviation, lest the powers of most observed values be
    huge, and 2, which hold 95 % of a Gaussian's values, where there is no range.
    """
    half = 0.5 * (grid[:, -1] - grid[:, 0])
    half = jnp.where(half > 0, jnp.maximum(half, 1.0), 2.0)
    return Scale(0.5 * (grid[:, 0] + grid[:, -1]), half)


def sum_rows(buffer: ExperienceBuffer, units: Standardisation, task: Task) -> Sums:
    """The sums of some rows: those of a data set, or those of one row to be added. Of many they are
    added up `MOST_ROWS` by `MOST_ROWS`: the products whose sums are `under_do` take 3 vars^2
    numbers a row.
    """
    if len(buffer.valid) > MOST_ROWS:
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(-1, MOST_ROWS, *leaf.shape[1:]),
            buffer.grow(-len(buffer.valid) % MOST_ROWS),
        )
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(lambda: sum_rows(first, units, task)),
        )

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, sum_rows(part, units, task)), None

        return jax.lax.scan(add, zeros, parts)[0]
    values, dtype = units.values(buffer, task.var_mask), buffer.values.dtype
    (num_rows, num_vars), outcome = values.shape, jnp.take(values, task.target, axis=1)
    intervened = (buffer.intervened & buffer.valid[:, None]).astype(dtype)
    valid, observed = buffer.valid.astype(dtype), buffer.observational.astype(dtype)

    def products(columns, weights):
        return (columns * weights[:, None]).T @ columns

    features = scalar_features(values, intervened) * task.var_mask[None, :, None]
    # of each variable, columns 1 to 3 of its features
    polynomials = valid[:, None] * jnp.concatenate(
        [jnp.ones((num_rows, 1)), features[..., 1:4].reshape(num_rows, -1)], 1
    )
    where_set = (intervened[:, :, None] * polynomials[:, None]).reshape(num_rows, -1)

    usable = usable_rows(buffer, task.target)
    done = intervened * usable[:, None]
    alone = observed[:, None] + done
    u = jnp.clip(range_scale(units.grid)(values), -MAX_POWER_BASE, MAX_POWER_BASE)
    one, cubes, y = jnp.ones((num_rows, num_vars, 1)), powers_of(u, 3), outcome[:, None]
    powers = jnp.concatenate([one[:, 0], cubes.reshape(num_rows, -1), y], 1)
    own_powers = jnp.concatenate([one, cubes, one * y[:, None]], -1)

    one_and_y = jnp.stack([jnp.ones_like(outcome), outcome], -1)
    bandwidth = kernel_bandwidth(units.grid)
    # two bandwidths: three grid steps still find an experiment where the nearest one is some away
    near, wide = (biweight_kernel(values, units.grid, b) for b in (bandwidth, 3.0 * bandwidth))
    return Sums(
        count=valid.sum(),
        observational=observed.sum(),
        features=products(features.reshape(num_rows, -1), valid),
        polynomials=polynomials.T @ polynomials,
        observed=products(values, observed),
        under_do=(where_set.T @ polynomials).reshape(num_vars, *2 * polynomials.shape[1:]),
        powers=products(powers, usable),
        own_powers=jnp.einsum("nv,nvp,nvq->vpq", alone, own_powers, own_powers),
        kernels=jnp.einsum("nv,nvp,nvq->vpq", alone, near, near),
        kernels_observed=jnp.einsum("nvb,nc->vbc", near * observed[:, None, None], one_and_y),
        kernels_done=jnp.einsum("nvb,nc->vbc", near * done[:, :, None], one_and_y),
        wide_kernels_done=jnp.einsum("nvb,nc->vbc", wide * done[:, :, None], one_and_y),
    )


class Summary(NamedTuple):
    """All that is kept of a data set: its units, and sums over its rows."""

    units: Standardisation
    sums: Sums

    @staticmethod
    def of(buffer: ExperienceBuffer, task: Task, num_bins: int) -> "Summary":
        """Of all rows of `buffer`; effects are estimated at `num_bins` values per variable."""
        units = Standardisation.of(buffer, task, num_bins)
        return Summary(units, sum_rows(buffer, units, task))

    def add(self, buffer: ExperienceBuffer, task: Task) -> "Summary":
        """With the rows of `buffer` too, at the cost of these rows alone.

        The units stay those of the first rows, where `of` for all rows together might widen them.
        """
        return Summary(
            self.units, jax.tree.map(jnp.add, self.sums, sum_rows(buffer, self.units, task))
        )
