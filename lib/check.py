"""How far the surrogate is believed on the data at hand: Bayesian model averaging of what it says
and of what the file's own experiments say without it.

Hypotheses about the surface f_i(v) = E[Y | do(X_i = v)] of each variable:

- the surrogate's, with its deviations, or with deviations 2, 4 or 8 times as wide;
- flat: setting the variable does nothing;
- a Gaussian process around doing nothing, or around what the surrogate says from the observational
  rows alone (the discrepancy of Kennedy and O'Hagan 2001; the kernel around the surrogate is
  CausalRBF of Aglietti et al. 2020, eq. 5).

The surrogate's evidence is the density of each outcome given rows before it (prequential: Dawid
1984), a process's its marginal likelihood. The surrogate may be wrong about some variables and
right about others: given the share of variables that it is wrong about, and the noise of an
outcome, variables are independent, and both are averaged over; so what was found out about one
variable tells how far to trust the surrogate on the next. In one more world no variable does
anything. One data set at a time; batch with `vmap`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp, ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float, Int

from lib.buffer import ExperienceBuffer
from lib.expert_gp import expected_improvement
from lib.linalg import positive_inverse_and_log_det
from lib.scm import Task
from lib.sums import Frame, Summary
from lib.surrogate import ParentSetPredictionModel, SurrogateOutput


WIDTHS = np.array([1.0, 2.0, 4.0, 8.0])  # of the surrogate's deviations
AMPLITUDES = (0.3, 1.0, 2.0)  # of a process, in units of what the outcomes span
LENGTHSCALES = (0.25, 0.7)  # of a process, in widths of a range
NOISES = np.array([0.05, 0.3, 1.0])  # variance of an outcome around its mean, in variances of Y
RANK = 6  # functions that a process is made of
REPEATS = 3  # of an experiment, when it is asked what it is worth
FIRST_BLOCK = 16  # experiments that are predicted from the observational rows alone


@dataclass(frozen=True)
class CheckConfig:
    """Prior probabilities of the check. Measured on `studies/field`, see reference/check.md."""

    widths: tuple[float, ...] = (0.95, 0.04, 0.008, 0.002)
    """Of the surrogate's deviations being right, and 2, 4 and 8 times too small, where it is right
    about the mean."""
    wrong: tuple[float, ...] = (0.005, 0.05, 0.5)
    """Possible shares of variables about which the surrogate is wrong."""
    wrong_probs: tuple[float, ...] = (0.75, 0.2, 0.05)
    """Of those shares."""
    untried: float = 10.0
    """By how much those shares are larger where no experiment was ever made."""
    nothing: float = 0.04
    """Of the world in which no variable moves the target."""
    flat: float = 0.5
    """Of no effect, where the surrogate is wrong about a variable."""
    around_surrogate: float = 0.5
    """Of a process around the surrogate's observational answer, among the two processes."""
    far: float = 5.0
    """Deviations up to which a range is like those of training; beyond, the surrogate is right with
    probability falling as (far / range)^2."""
    outliers: float = 0.05
    """Of an outcome that is anything, whatever the surface."""
    loose: float = 0.1
    """Deviation of an outcome where no smooth surface fits them all, in units of what they span;
    added to three times the variance of Y."""
    anchor: float = 0.5
    """Deviation between doing nothing and setting a variable to its usual value, in deviations of
    the target, as processes have it."""
    pays: float = 4.0
    """How many times its expected loss the expected gain of a setting over doing nothing must be,
    for it to be recommended."""
    enough: float = 0.9
    """Share of the most that an experiment is expected to gain, from which the policy may choose
    one."""


BELIEFS = CheckConfig()
# the Gaussian processes around doing nothing, without the surrogate
PROCESSES = CheckConfig(
    wrong=(1.0,), wrong_probs=(1.0,), nothing=0.0, flat=0.0, around_surrogate=0.0
)


class Experiments(NamedTuple):
    """The rows in which one candidate was set to a value in its range, and nothing else, in the
    order of the file.
    """

    row: Int[Array, " done"]
    variable: Int[Array, " done"]
    value: Float[Array, " done"]
    outcome: Float[Array, " done"]
    valid: Bool[Array, " done"]

    @staticmethod
    def of(buffer: ExperienceBuffer, task: Task, most: int) -> "Experiments":
        """The first `most` of them; places behind the last are not valid."""
        margin = 0.05 * (task.high - task.low)
        inside = (buffer.values >= (task.low - margin)[None]) & (
            buffer.values <= (task.high + margin)[None]
        )
        alone = buffer.intervened & (buffer.intervened.sum(1) == 1)[:, None]
        usable = buffer.valid & (alone & inside & task.candidates[None]).any(1)
        row = jnp.argsort(~usable, stable=True)[:most]
        variable = jnp.argmax(buffer.intervened[row], 1)
        outcome = jnp.take(buffer.values, task.target, axis=1)[row]
        return Experiments(row, variable, buffer.values[row, variable], outcome, usable[row])

    def by_variable(self, num_vars: int) -> Bool[Array, "vars done"]:
        """Which of them set each variable."""
        return (jnp.arange(num_vars)[:, None] == self.variable[None]) & self.valid[None]


class Belief(NamedTuple):
    """The mixture on the grid: `weights[components, vars]`, which sum to one over components, and
    normal components with `means` and `stds` `[components, vars, bins]`; the first four are the
    surrogate's. `nothing` is the mean of the target where nothing is set, `nothing_std` its error.
    """

    weights: Float[Array, "components vars"]
    means: Float[Array, "components vars bins"]
    stds: Float[Array, "components vars bins"]
    nothing: Float[Array, ""]
    nothing_std: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, "vars bins"]:
        """Of the mixture."""
        return (self.weights[..., None] * self.means).sum(0)

    @property
    def std(self) -> Float[Array, "vars bins"]:
        """Of the mixture: within and between its components."""
        square = self.stds**2 + (self.means - self.mean[None]) ** 2
        return jnp.sqrt((self.weights[..., None] * square).sum(0))

    @property
    def surrogate(self) -> Float[Array, " vars"]:
        """Weight of the surrogate's surface, as it is or wider."""
        return self.weights[: len(WIDTHS)].sum(0)

    @property
    def flat(self) -> Float[Array, " vars"]:
        """Weight of no effect."""
        return self.weights[len(WIDTHS)]

    @property
    def better(self) -> Float[Array, "vars bins"]:
        """P(E[Y | do] is below E[Y]); a setting without effect is not."""
        std = jnp.sqrt(self.stds**2 + self.nothing_std**2)
        below = ndtr((self.nothing - self.means) / std).at[len(WIDTHS)].set(0.0)
        return (self.weights[..., None] * below).sum(0)

    @property
    def upside(self) -> Float[Array, "vars bins"]:
        """E[max(E[Y] - E[Y | do], 0)]: what a setting is better than doing nothing, if it is."""
        std = jnp.sqrt(self.stds**2 + self.nothing_std**2)
        gain = expected_improvement(self.means, std, self.nothing).at[len(WIDTHS)].set(0.0)
        return (self.weights[..., None] * gain).sum(0)

    def gain(
        self,
        candidates: Bool[Array, " vars"],
        noise: Float[Array, ""],
        tried: Float[Array, "vars bins"],
    ) -> Float[Array, "vars bins"]:
        """What an experiment is expected to be worth, in the target's units: by how much the mean
        of the action to recommend falls (the knowledge gradient of Frazier, Powell and Dayanik
        2008), as if cells were independent, once it was made `REPEATS` times with the variance
        `noise` of one outcome.

        A cell pays by turning out lower than the action to recommend, that action's own cell by
        turning out higher than what another variable, or nothing, is expected to do. Where an
        experiment was `tried`, no more is left to learn than the mean of its outcomes leaves, for
        the surrogate does not know how to repeat one.
        """
        mean = jnp.where(candidates[:, None], self.mean, jnp.inf)
        i, b = jnp.unravel_index(jnp.argmin(mean), mean.shape)
        best = jnp.minimum(mean[i, b], self.nothing)
        other = jnp.minimum(mean.at[i].set(jnp.inf).min(), self.nothing)
        variance = jnp.minimum(self.std**2, noise / jnp.maximum(tried, 1e-6))
        change = variance / jnp.sqrt(variance + noise / REPEATS)
        gain = expected_improvement(self.mean, change, best)
        rises = expected_improvement(-mean[i, b], change[i, b], -other)
        gain = gain.at[i, b].set(jnp.where(mean[i, b] < self.nothing, rises, gain[i, b]))
        return jnp.where(candidates[:, None], gain, 0.0)

    def quantile(self, q: float) -> Float[Array, "vars bins"]:
        """Of the mixture, by bisection."""
        low, high = (self.means - 5 * self.stds).min(0), (self.means + 5 * self.stds).max(0)

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            below = (self.weights[..., None] * ndtr((middle[None] - self.means) / self.stds)).sum(
                0
            ) < q
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, 16, halve, (low, high))
        return 0.5 * (low + high)


class Checked(NamedTuple):
    """What the surrogate says of a data set, and what is believed of it; `said` is the mean and
    deviation `[done]` that it predicted for each experiment before it.
    """

    output: SurrogateOutput
    belief: Belief
    done: Experiments
    said: tuple[Float[Array, " done"], Float[Array, " done"]]

    @property
    def averaged(self) -> SurrogateOutput:
        """The output with the averaged surface in place of the surrogate's."""
        surface = self.belief.mean, self.belief.std
        return eqx.tree_at(lambda o: (o.effect_mean, o.effect_std), self.output, surface)

    @property
    def gain(self) -> Float[Array, "vars bins"]:
        """What an experiment is expected to be worth (`Belief.gain`)."""
        grid, own = self.output.grid, self.done.by_variable(len(self.output.grid))
        bin_width = jnp.maximum(grid[:, 1] - grid[:, 0], 1e-6)[:, None, None]
        apart = (grid[..., None] - self.done.value[None, None]) / bin_width
        tried = (own[:, None] * jnp.exp(-0.5 * apart**2)).sum(-1)
        return self.belief.gain(self.output.task.candidates, self.output.spread**2, tried)

    @property
    def in_band(self) -> Bool[Array, " done"]:
        """Which outcomes lay in the 90 % band that the surrogate predicted for them."""
        mean, std = self.said
        band = 1.645 * jnp.sqrt(std**2 + self.output.spread**2)
        return self.done.valid & (jnp.abs(self.done.outcome - mean) <= band)

    def recommended(self, pays: float = BELIEFS.pays) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """Variable and value of the lowest believed mean; variable -1, doing nothing, where its
        expected gain over that is not `pays` times its expected loss.
        """
        candidates, mean = self.output.task.candidates[:, None], self.belief.mean
        mean = jnp.where(candidates, mean, jnp.inf)
        i, b = jnp.unravel_index(jnp.argmin(mean), mean.shape)
        gain = self.belief.upside[i, b]
        loss = gain + mean[i, b] - self.belief.nothing
        return jnp.where((gain > loss) & (gain >= pays * loss), i, -1), self.output.grid[i, b]

    def choose(
        self, preference: Float[Array, "vars bins"], enough: float = BELIEFS.enough
    ) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The next experiment: the cell of the highest `preference` among those that are expected
        to gain at least the share `enough` of the most that one can. So an experiment that has
        taught what it can is not repeated, whatever a policy thinks of it.
        """
        worth = self.gain
        allowed = self.output.task.candidates[:, None] & (worth >= enough * worth.max())
        return self.output.highest(jnp.where(allowed, preference, -jnp.inf))


def check(
    surrogate: ParentSetPredictionModel,
    buffer: ExperienceBuffer,
    task: Task,
    most: int,
    config: CheckConfig = BELIEFS,
) -> Checked:
    """The surrogate's answer about `buffer`, averaged with what its first `most` experiments say.

    Experiments are predicted from the observational rows, and, from the 17th on, from the first 16,
    64, 256, ... experiments beside them: some predictions at once, in place of one for each.
    """
    done = Experiments.of(buffer, task, most)
    starts = [0, *(FIRST_BLOCK * 4**k for k in range(8) if FIRST_BLOCK * 4**k < most)]
    told = predictions(surrogate, buffer, task, done, [*starts, most])
    first, output = (jax.tree.map(lambda leaf, i=i: leaf[i], told) for i in (0, -1))
    when = np.searchsorted(starts, np.arange(len(done.row)), side="right") - 1
    along = jax.vmap(at, (None, 0, 0, 0))
    mean, std = (
        along(output.grid, surface[when], done.variable, done.value)
        for surface in (told.effect_mean, told.effect_std)
    )
    frame = Frame.of(buffer, task, surrogate.config.num_bins)
    ends = jnp.abs(jnp.stack([task.low, task.high]) - frame.shift[None])
    observed = jnp.maximum(buffer.observational.sum(), 1)
    reach = ends.max(0) / frame.spread
    belief = average(first, output, (mean, std), done, frame.shift, reach, observed, config)
    return Checked(output, belief, done, (mean, std))


def predictions(surrogate, buffer, task, done, counts) -> SurrogateOutput:
    """What the surrogate says (leading axis) when it knows so many of the experiments, and every
    row that is none of them.
    """
    others = buffer.valid.at[done.row].set(buffer.valid[done.row] & ~done.valid)
    base = Summary.of(
        eqx.tree_at(lambda b: b.valid, buffer, others), task, surrogate.config.num_bins
    )

    def predict(count):
        known = done.valid & (jnp.arange(len(done.row)) < count)
        rows = ExperienceBuffer(buffer.values[done.row], buffer.intervened[done.row], known)
        return surrogate.predict(base.add_rows(rows, task), task)

    return jax.vmap(predict)(jnp.array(counts))


def at(grid, surface, variable, value) -> Float[Array, ""]:
    """A surface `[vars, bins]` at one value of one variable."""
    return jnp.interp(value, grid[variable], surface[variable])


def prior_weights(reach, tried, num_processes, config):
    """Prior of the components given a world `[worlds, vars, components]`, and of the worlds: shares
    of variables that the surrogate is wrong about, then the one in which none has an effect.
    """
    wrong = jnp.array(config.wrong)
    untried = jnp.minimum(config.untried * wrong, jnp.maximum(0.9, wrong))
    wrong = jnp.where(tried, wrong, untried)
    near = jnp.minimum(1.0, (config.far / jnp.maximum(reach, 1e-6)) ** 2)
    right = ((1 - wrong)[:, None] * near[None])[..., None]
    widths = jnp.array(config.widths) / sum(config.widths)
    half = num_processes // 2  # around nothing, and around the surrogate
    kinds = jnp.array([1 - config.around_surrogate, config.around_surrogate])
    each = (1 - config.flat) * jnp.repeat(kinds / half, half)
    otherwise = jnp.append(config.flat, each)
    prior = jnp.concatenate(
        [right * widths[None, None], (1 - right) * otherwise[None, None]], axis=-1
    )
    no_effect = jnp.arange(prior.shape[-1]) == len(WIDTHS)
    prior = jnp.concatenate([prior, jnp.broadcast_to(no_effect[None, None], prior[:1].shape)])
    worlds = jnp.append((1 - config.nothing) * jnp.array(config.wrong_probs), config.nothing)
    return prior, worlds


def log_outcome(y, mean, std, broad):
    """Log density of an outcome that is now and then anything: `broad` is how often, and the mean
    and deviation then. So one outcome cannot say more against a surface than that.
    """
    share, middle, wide = broad
    usual = np.log1p(-share) + norm.logpdf(y, mean, std)
    return jnp.logaddexp(usual, jnp.log(share) + norm.logpdf(y, middle, wide))


def span(output, done):
    """What outcomes span: root mean square of their distance from doing nothing, at least the
    deviation of the target.
    """
    moved = jnp.where(done.valid, done.outcome - output.shift, 0.0)
    mean_square = (moved**2).sum() / jnp.maximum(done.valid.sum(), 1)
    return jnp.maximum(jnp.sqrt(mean_square), output.spread)


def average(first, output, said, done, usual, reach, observed, config) -> Belief:
    """The mixture, from the surrogate's answer to the observational rows and to all rows, what it
    `said` (mean and deviation) of every experiment before it, and how far ranges reach.
    """
    num_vars, task = len(reach), output.task
    nothing, unit = output.shift, span(output, done)
    noise = jnp.append(
        output.spread**2 * NOISES, 3.0 * output.spread**2 + (config.loose * unit) ** 2
    )
    broad = config.outliers, nothing, 3.0 * unit
    own = done.by_variable(num_vars).astype(noise.dtype)

    def by_variable(log_density):  # [done, ...] to [vars, ...]
        return jnp.tensordot(own, log_density, 1)

    outcome, mean, std = (x[:, None, None] for x in (done.outcome, *said))
    wide = jnp.sqrt((WIDTHS[None, None] * std) ** 2 + noise[None, :, None])
    surrogate_evidence = by_variable(log_outcome(outcome, mean, wide, broad))
    flat_std = jnp.sqrt(noise)[None, :, None]
    flat_evidence = by_variable(log_outcome(outcome, nothing, flat_std, broad))
    process_evidence, means, stds = processes(
        first, output, done, own, noise, unit, usual, config.anchor
    )
    # [vars, noises, components]
    likelihood = jnp.concatenate([surrogate_evidence, flat_evidence, process_evidence], -1)

    prior, worlds = prior_weights(reach, done.valid.any(), means.shape[1], config)

    # [worlds, noises, vars, components]
    joint = jnp.log(prior)[:, None] + jnp.moveaxis(likelihood, 1, 0)[None]
    evidence = logsumexp(joint, axis=-1)
    world = jnp.log(worlds)[:, None] + jnp.where(task.candidates[None, None], evidence, 0.0).sum(-1)
    world = jnp.exp(world - logsumexp(world))
    weights = world[..., None, None] * jnp.exp(joint - evidence[..., None])
    weights = weights.sum(0)  # [noises, vars, components]

    # the surrogate's and the flat surface are the same whatever the noise; a process's is not, and
    # becomes the normal with the moments of its mixture over the noise
    share = 1e-30 + jnp.moveaxis(weights[..., len(WIDTHS) + 1 :], 1, -1)[..., None]
    share = share / share.sum(0)[None]
    mean = (share * means).sum(0)
    std = jnp.sqrt((share * (stds**2 + (means - mean[None]) ** 2)).sum(0))
    weights = weights.sum(0).T
    shape = output.grid.shape
    nothing_std = output.spread / jnp.sqrt(observed)
    return Belief(
        weights,
        jnp.concatenate(
            [
                jnp.broadcast_to(output.effect_mean, (len(WIDTHS), *shape)),
                jnp.broadcast_to(nothing, (1, *shape)),
                mean,
            ]
        ),
        jnp.concatenate(
            [
                WIDTHS[:, None, None] * output.effect_std[None],
                jnp.broadcast_to(nothing_std, (1, *shape)),
                std,
            ]
        ),
        nothing,
        nothing_std,
    )


def basis(num_bins: int) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Functions along a range whose sums with independent standard normal weights are Gaussian
    processes of amplitude one: at `num_bins` values of it `[lengthscales, bins, rank]`, and the
    matrix `[lengthscales, bins, rank]` that gives them anywhere from the kernel with those values
    (Rasmussen and Williams 2006, section 8.1; the rest of the variance is below 1e-3).
    """
    place = np.linspace(0.0, 1.0, num_bins)
    values, vectors = np.linalg.eigh(np.exp(-0.5 * in_lengthscales(place, place) ** 2))
    roots, vectors = np.sqrt(values[:, None, -RANK:]), vectors[..., -RANK:]
    return (vectors * roots).astype(np.float32), (vectors / roots).astype(np.float32)


def in_lengthscales(a, b):
    """Distances `[lengthscales, a, b]` of places, which are in widths of a range."""
    return (a[:, None] - b[None])[None] / np.array(LENGTHSCALES)[:, None, None]


def processes(first, output, done, own, noise, unit, usual, anchor):
    """The Gaussian processes: log evidence `[vars, noises, processes]`, and mean and deviation
    `[noises, processes, vars, bins]` of each. They differ in what they lie around (doing nothing,
    or the surrogate's observational answer `first`), in lengthscale and in amplitude.

    Around the surrogate, its deviation is one more function beside those of `basis`: the kernel is
    CausalRBF of Aglietti et al. 2020, eq. 5. To set a variable to its `usual` value is much like
    doing nothing (deviation `anchor`): that is one more row, whose density is no evidence.
    """
    nothing, bins = output.shift, np.linspace(0.0, 1.0, output.grid.shape[1])
    on_grid, to_basis = basis(len(bins))
    noise = noise + 100 * jnp.finfo(noise.dtype).eps * unit**2  # float32 tells no less apart
    anchor_variance = (anchor * output.spread) ** 2

    def of_variable(grid, mean, deviation, usual, own):
        """All of one variable, whose experiments are `own` `[done]` (zeros and ones)."""
        value, outcome = jnp.append(done.value, usual), jnp.append(done.outcome, nothing)
        width = jnp.where(grid[-1] > grid[0], grid[-1] - grid[0], 1.0)
        reached = jnp.exp(-0.5 * in_lengthscales((value - grid[0]) / width, bins) ** 2) @ to_basis

        def process(surface, informed, reached, on_grid, amplitude, noise):
            """One of them: evidence, and mean and deviation `[bins]`."""
            start = jnp.interp(value, grid, surface)
            made, told = (
                jnp.concatenate([unit * amplitude * functions, informed * wrong[:, None]], axis=1)
                for functions, wrong in (
                    (reached, jnp.interp(value, grid, deviation)),
                    (on_grid, deviation),
                )
            )
            trust = jnp.append(own, jnp.sqrt(noise / anchor_variance))
            made, residual = trust[:, None] * made, trust * (outcome - start)
            evidence, move, std = regression(made, residual, own.sum() + 1, told, noise)
            evidence -= norm.logpdf(residual[-1], 0.0, jnp.sqrt((made[-1] ** 2).sum() + noise))
            return evidence, surface + move, std

        over = jax.vmap(process, (None,) * 5 + (0,))  # noises last
        over = jax.vmap(over, (None,) * 4 + (0, None))  # amplitudes
        over = jax.vmap(over, (None, None, 0, 0, None, None))  # lengthscales
        over = jax.vmap(over, (0, 0) + (None,) * 4)  # what they lie around
        surfaces = jnp.stack([jnp.broadcast_to(nothing, mean.shape), mean])
        informed, amplitudes = jnp.array([0.0, 1.0]), jnp.array(AMPLITUDES)
        return over(surfaces, informed, reached, jnp.asarray(on_grid), amplitudes, noise)

    found = jax.vmap(of_variable)(output.grid, first.effect_mean, first.effect_std, usual, own)
    evidence, means, stds = (x.reshape(len(usual), -1, len(noise), *x.shape[5:]) for x in found)
    means, stds = (jnp.transpose(x, (2, 1, 0, 3)) for x in (means, stds))
    return evidence.swapaxes(1, 2), means, stds


def regression(made, outcome, count, told, noise):
    """Bayesian linear regression with independent standard normal weights: log evidence of
    `outcome[done]` given columns `made[done, columns]` (both zero where a row does not count), and
    mean and deviation at `told[bins, columns]` (Rasmussen and Williams 2006, section 2.1).
    """
    covariance, log_det = positive_inverse_and_log_det(
        made.T @ made / noise + jnp.eye(made.shape[1])
    )
    weights = covariance @ (made.T @ outcome) / noise
    # a sum of squares: the usual difference of two large numbers has no digits in float32
    misfit = ((outcome - made @ weights) ** 2).sum() / noise + (weights**2).sum()
    evidence = -0.5 * (misfit + log_det + count * jnp.log(2 * jnp.pi * noise))
    variance = ((told @ covariance) * told).sum(1)
    return evidence, told @ weights, jnp.sqrt(jnp.maximum(variance, 1e-6 * (told**2).sum(1)))
