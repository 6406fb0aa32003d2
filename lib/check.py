"""How far the surrogate is believed on the data at hand: Bayesian model averaging (Hoeting et al.
1999) of its predictions and of what the file's own experiments say without it.

Hypotheses about the surface f_i(v) = E[Y | do(X_i = v)] of each variable:

- the surrogate's, with its standard deviations;
- flat: setting the variable has no effect;
- a Gaussian process around doing nothing (what the surrogate is wrong by, as the discrepancy of
  Kennedy and O'Hagan 2001, but of the whole surface).

These are averaged by Bayes' rule. A *world* w is the share of variables about which the surrogate
is wrong (one of `CheckConfig.wrong_shares`), or the case that no variable has an effect. Given the
world and the variance s of an outcome's noise, variables i are independent, each with one
hypothesis h:

    P(w, s | y) ~ P(w) P(s) prod_i sum_h P(h | w, i) p(y_i | h, s),

y_i the outcomes of the experiments on i. So what is found out about one variable tells how far to
trust the surrogate on the next. p(y_i | h, s), the evidence, is in closed form for a process; for
the surrogate it is the product of the densities of single outcomes, each predicted from the rows
that are no experiments. (Prequential evidence would predict each also from the experiments before
it: one pass of the network for each, and no measured gain.) One data set at a time; batch with
`vmap`.
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
from lib.improvement import expected_improvement
from lib.linalg import positive_inverse_and_log_det
from lib.regression import log_evidence, weight_posterior
from lib.scm import Task, highest
from lib.sums import Standardisation, Summary, sum_rows
from lib.surrogate import ParentSetPredictionModel, SurrogateOutput


PROCESS_AMPLITUDES = (0.5, 2.0)  # of a process, in units of what the outcomes span
PROCESS_LENGTHSCALE = 0.3  # of a process, in widths of a range
# of an outcome around its mean, in variances of Y: what all causes but the one that was set add
NOISE_VARIANCES = np.array([0.05, 0.3, 1.0])
# in a range, at most .67 lengthscales apart: a process's values there determine the others
INDUCING_POINTS = np.linspace(0.0, 1.0, 6)
REPEATS = 3  # of an experiment, when it is asked what it is worth


@dataclass(frozen=True)
class CheckConfig:
    """Prior probabilities and thresholds of the check, chosen on the systems of `studies/field`
    (reference/check.md).
    """

    wrong_shares: tuple[float, ...] = (0.005, 0.05, 0.5)
    """The worlds: shares of variables about which the surrogate may be wrong."""
    wrong_probs: tuple[float, ...] = (0.75, 0.2, 0.05)
    """Prior probabilities of these worlds."""
    untried_factor: float = 20.0
    """Factor by which the shares are larger in a file without experiments."""
    no_effects_prob: float = 0.04
    """Prior probability of the world in which no variable moves the target."""
    flat_prob: float = 0.5
    """Prior probability that a variable has no effect, where the surrogate is wrong about it; the
    rest is that of the Gaussian processes.
    """
    far_std: float = 4.0
    """Standard deviations up to which a range is like those of training; beyond, the surrogate is
    right with a probability that falls as (far / range)^2.
    """
    outlier_prob: float = 0.05
    """Probability that an outcome is an outlier, whatever the hypothesis."""
    loose_std: float = 0.1
    """Standard deviation of the noise where no smooth surface fits the outcomes, in units of what
    they span; its square is added to three times the variance of Y.
    """
    anchor_std: float = 0.5
    """Prior standard deviation, for processes, of the difference between doing nothing and setting
    a variable to its mean, in standard deviations of the target.
    """
    least_gain_ratio: float = 4.0
    """A setting is recommended if its expected gain over doing nothing is at least this many times
    its expected loss.
    """
    least_gain_share: float = 0.9
    """The policy chooses among experiments whose expected gain is at least this share of the
    largest.
    """


BELIEFS = CheckConfig()
# the Gaussian processes without the surrogate
PROCESSES = CheckConfig(wrong_shares=(1.0,), wrong_probs=(1.0,), no_effects_prob=0.0, flat_prob=0.0)


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
        """The first `most` of them; entries behind the last are not valid."""
        # people round values, and bounds: a twentieth of the range beyond its ends is inside
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
    normal components with `means` and `stds` `[components, vars, bins]`: the surrogate's surface,
    no effect, and the processes. `nothing` is the mean of the target where nothing is set,
    `nothing_std` its error.
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
    def against_nothing(self) -> tuple[Float[Array, "vars bins"], Float[Array, "vars bins"]]:
        """P(E[Y | do] < E[Y]) and E[max(E[Y] - E[Y | do], 0)]: whether a setting is better than
        doing nothing, and by how much if it is. One without effect is not.
        """
        std = jnp.hypot(self.stds, self.nothing_std)
        weights = self.weights.at[1].set(0.0)[..., None]
        below = ndtr((self.nothing - self.means) / std)
        gain = expected_improvement(self.means, std, self.nothing)
        return (weights * below).sum(0), (weights * gain).sum(0)

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
        i, b = highest(-mean, candidates[:, None])
        best = jnp.minimum(mean[i, b], self.nothing)
        other = jnp.minimum(mean.at[i].set(jnp.inf).min(), self.nothing)
        # 1e-6: where nothing was tried the bound is none
        variance = jnp.minimum(self.std**2, noise / jnp.maximum(tried, 1e-6))
        change = variance / jnp.sqrt(variance + noise / REPEATS)
        gain = expected_improvement(self.mean, change, best)
        rises = expected_improvement(-mean[i, b], change[i, b], -other)
        gain = gain.at[i, b].set(jnp.where(mean[i, b] < self.nothing, rises, gain[i, b]))
        return jnp.where(candidates[:, None], gain, 0.0)

    def quantile(self, q: float) -> Float[Array, "vars bins"]:
        """Of the mixture, by bisection from five standard deviations around all components (beyond
        are 6e-7 of a Gaussian) to 2^-16 of that width.
        """
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
    """What the surrogate predicts from a data set, and the average over the hypotheses;
    `predicted` is the mean and standard deviation `[done]` that it predicts of each experiment from
    the rows that are none.
    """

    output: SurrogateOutput
    belief: Belief
    done: Experiments
    predicted: tuple[Float[Array, " done"], Float[Array, " done"]]

    @property
    def averaged(self) -> SurrogateOutput:
        """The output with the averaged surface in place of the surrogate's."""
        surface = self.belief.mean, self.belief.std
        return eqx.tree_at(lambda o: (o.effect_mean, o.effect_std), self.output, surface)

    @property
    def gain(self) -> Float[Array, "vars bins"]:
        """What an experiment is expected to be worth (`Belief.gain`)."""
        grid, own = self.output.grid, self.done.by_variable(len(self.output.grid))
        # experiments per cell: a Gaussian kernel one grid step wide; 1e-6 is for an empty range
        bin_width = jnp.maximum(grid[:, 1] - grid[:, 0], 1e-6)[:, None, None]
        near = jnp.exp(-0.5 * ((grid[..., None] - self.done.value[None, None]) / bin_width) ** 2)
        tried = (own[:, None] * near).sum(-1)
        return self.belief.gain(self.output.task.candidates, self.output.observed_std**2, tried)

    @property
    def in_band(self) -> Bool[Array, " done"]:
        """Which outcomes lay in the 90 % band that the surrogate predicted for them."""
        mean, std = self.predicted
        # the 95 % quantile of the standard normal distribution
        band = 1.645 * jnp.sqrt(std**2 + self.output.observed_std**2)
        return self.done.valid & (jnp.abs(self.done.outcome - mean) <= band)

    def recommended(
        self, least_gain_ratio: float = BELIEFS.least_gain_ratio
    ) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """Variable and value of the lowest believed mean; variable -1, doing nothing, where its
        expected gain over that is not `least_gain_ratio` times its expected loss.
        """
        mean = self.belief.mean
        i, b = highest(-mean, self.output.task.candidates[:, None])
        gain = self.belief.against_nothing[1][i, b]
        loss = gain + mean[i, b] - self.belief.nothing
        pays = (gain > loss) & (gain >= least_gain_ratio * loss)
        return jnp.where(pays, i, -1), self.output.grid[i, b]

    def choose(
        self,
        preference: Float[Array, "vars bins"],
        least_gain_share: float = BELIEFS.least_gain_share,
    ) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The next experiment: the cell of the highest `preference` among those that are expected
        to gain at least the share `least_gain_share` of the most that one can. So an experiment of
        which little is left to learn is not repeated, whatever its preference.
        """
        worth = self.gain
        allowed = worth >= least_gain_share * worth.max()
        return self.output.task.highest(jnp.where(allowed, preference, -jnp.inf))


def check(
    surrogate: ParentSetPredictionModel,
    buffer: ExperienceBuffer,
    task: Task,
    most: int,
    config: CheckConfig = BELIEFS,
) -> Checked:
    """The surrogate's predictions from `buffer`, averaged with what its first `most` experiments
    say, all of which are predicted from the rows that are none of them.
    """
    done, bins = Experiments.of(buffer, task, most), surrogate.config.num_bins
    rest = buffer.valid.at[done.row].set(buffer.valid[done.row] & ~done.valid)
    # units are those of all rows: what experiments move is not clipped in the first prediction
    units = Standardisation.of(buffer, task, bins)
    others = eqx.tree_at(lambda b: b.valid, buffer, rest)
    before = Summary(units, sum_rows(others, units, task))
    made = ExperienceBuffer(buffer.values[done.row], buffer.intervened[done.row], done.valid)
    both = jax.tree.map(lambda *x: jnp.stack(x), before, before.add(made, task))
    outputs = jax.vmap(surrogate.predict, (0, None))(both, task)  # faster than one by one
    first, output = (jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in (0, 1))
    mean, std = (
        jax.vmap(jnp.interp)(done.value, first.grid[done.variable], surface[done.variable])
        for surface in (first.effect_mean, first.effect_std)
    )
    centre = units.scale.shift
    reach = jnp.abs(jnp.stack([task.low, task.high]) - centre[None]).max(0) / units.observed_std
    belief = average(
        output,
        (mean, std),
        done,
        usual=centre,
        reach=reach,
        observed=jnp.maximum(buffer.observational.sum(), 1),
        config=config,
    )
    return Checked(output, belief, done, (mean, std))


def prior_weights(reach, tried, config):
    """Prior of the components given a world `[worlds, vars, components]`, and of the worlds: shares
    of variables that the surrogate is wrong about, then the one in which none has an effect.
    """
    wrong = jnp.array(config.wrong_shares)
    # at most 0.9, or what is configured: a tenth is left to the surrogate
    untried = jnp.minimum(config.untried_factor * wrong, jnp.maximum(0.9, wrong))
    wrong = jnp.where(tried, wrong, untried)
    # 1e-6: a variable without a range reaches nowhere
    near = jnp.minimum(1.0, (config.far_std / jnp.maximum(reach, 1e-6)) ** 2)
    right = ((1 - wrong)[:, None] * near[None])[..., None]
    otherwise = jnp.array(
        [
            config.flat_prob,
            *[(1 - config.flat_prob) / len(PROCESS_AMPLITUDES)] * len(PROCESS_AMPLITUDES),
        ]
    )
    prior = jnp.concatenate([right, (1 - right) * otherwise[None, None]], axis=-1)
    no_effect = jnp.arange(prior.shape[-1]) == 1
    prior = jnp.concatenate([prior, jnp.broadcast_to(no_effect[None, None], prior[:1].shape)])
    worlds = jnp.append(
        (1 - config.no_effects_prob) * jnp.array(config.wrong_probs), config.no_effects_prob
    )
    return prior, worlds


def log_outcome(y, mean, std, outlier):
    """Log density of an outcome, a contaminated normal (Tukey 1960): `outlier` is the probability
    of an outlier, and the mean and standard deviation of its broad density, which bounds how much
    one outcome counts against a surface.
    """
    share, middle, broad = outlier
    regular = np.log1p(-share) + norm.logpdf(y, mean, std)
    return jnp.logaddexp(regular, jnp.log(share) + norm.logpdf(y, middle, broad))


def average(output, predicted, done, usual, reach, observed, config) -> Belief:
    """The mixture, from the surrogate's output for all rows, the mean and standard deviation
    `predicted` of every experiment from the rows that are none, the `usual` values (means) of
    variables and how far their ranges `reach`, in standard deviations.

    Bayes' rule over worlds w, noise variances s and, given these, over the component h of each
    variable on its own: P(w, s) prod_i sum_h P(h | w, i) p(outcomes of i | h, s), all s equally
    probable.
    """
    num_vars, task = len(reach), output.task
    nothing, moved = output.shift, jnp.where(done.valid, done.outcome - output.shift, 0.0)
    # what outcomes span: their root mean square, at least the standard deviation of the target
    unit = jnp.maximum(
        jnp.sqrt((moved**2).sum() / jnp.maximum(done.valid.sum(), 1)), output.observed_std
    )
    noise = jnp.append(
        output.observed_std**2 * NOISE_VARIANCES,
        3.0 * output.observed_std**2 + (config.loose_std * unit) ** 2,
    )
    outlier = config.outlier_prob, nothing, 3.0 * unit  # three times what outcomes span: anywhere
    own = done.by_variable(num_vars).astype(noise.dtype)

    # of the surrogate's surface and the flat one: [done, noises, 2]
    mean = jnp.stack([predicted[0], jnp.full_like(predicted[0], nothing)], -1)[:, None]
    std = jnp.stack([predicted[1], jnp.zeros_like(predicted[1])], -1)[:, None]
    std = jnp.hypot(std, jnp.sqrt(noise)[None, :, None])
    given = log_outcome(done.outcome[:, None, None], mean, std, outlier)
    process_evidence, means, stds = processes(
        output, done, own, noise, unit, usual, config.anchor_std
    )
    # [vars, noises, components]
    likelihood = jnp.concatenate([jnp.tensordot(own, given, 1), process_evidence], -1)

    prior, worlds = prior_weights(reach, done.valid.any(), config)
    # [worlds, noises, vars, components]
    joint = jnp.log(prior)[:, None] + jnp.moveaxis(likelihood, 1, 0)[None]
    evidence = logsumexp(joint, axis=-1)
    world = jnp.log(worlds)[:, None] + jnp.where(task.candidates[None, None], evidence, 0.0).sum(-1)
    world = jnp.exp(world - logsumexp(world))
    # [noises, vars, components]
    weights = (world[..., None, None] * jnp.exp(joint - evidence[..., None])).sum(0)

    # The surrogate's and the flat surface are the same whatever the noise; a process's is not, and
    # becomes the normal with the moments of its mixture over the noise. 1e-30: no 0 / 0 where a
    # process has no weight.
    share = 1e-30 + jnp.moveaxis(weights[..., 2:], 1, -1)[..., None]
    share = share / share.sum(0)[None]
    mean = (share * means).sum(0)
    std = jnp.sqrt((share * (stds**2 + (means - mean[None]) ** 2)).sum(0))
    weights = weights.sum(0).T
    nothing_std = output.observed_std / jnp.sqrt(observed)
    means = jnp.stack([output.effect_mean, jnp.full_like(output.effect_mean, nothing), *mean])
    stds = jnp.stack([output.effect_std, jnp.full_like(output.effect_std, nothing_std), *std])
    return Belief(weights, means, stds, nothing, nothing_std)


def basis_functions(position: Float[Array, " values"]) -> Float[Array, "values functions"]:
    """Basis functions along a range, at positions in widths of it, whose sums with independent
    standard normal weights are Gaussian processes of amplitude one with a squared exponential
    kernel k: k(x, Z) L^-T, L L' = k(Z, Z), Z the `INDUCING_POINTS` (the Nystroem approximation,
    Rasmussen and Williams 2006, section 8.1; the variance that is left out is below 1e-3).
    """

    def kernel(a, to):
        return to.exp(-0.5 * ((a[:, None] - INDUCING_POINTS[None]) / PROCESS_LENGTHSCALE) ** 2)

    return kernel(position, jnp) @ np.linalg.inv(np.linalg.cholesky(kernel(INDUCING_POINTS, np))).T


def processes(output, done, own, noise, unit, usual, anchor):
    """The Gaussian processes: log evidence `[vars, noises, processes]`, and mean and standard
    deviation `[noises, processes, vars, bins]` of each; they differ in amplitude.

    To set a variable to its `usual` value is much like doing nothing (standard deviation `anchor`):
    that is one more row, whose density is divided out of the evidence.
    """
    nothing, on_grid = output.shift, basis_functions(jnp.linspace(0.0, 1.0, output.grid.shape[1]))
    # at least a hundred roundings of the outcomes' variance: float32 tells no less apart
    noise = noise + 100 * jnp.finfo(noise.dtype).eps * unit**2
    anchor_variance = (anchor * output.observed_std) ** 2
    moved = jnp.append(done.outcome - nothing, 0.0)

    def of_variable(grid, usual, own):
        """All of one variable, whose experiments are `own` `[done]` (zeros and ones)."""
        width = jnp.where(grid[-1] > grid[0], grid[-1] - grid[0], 1.0)
        at_rows = basis_functions((jnp.append(done.value, usual) - grid[0]) / width)

        def process(amplitude, noise):
            """One of them: evidence, and mean and standard deviation `[bins]`."""
            # factors of rows: zero of other variables'; the anchor's gives it the noise of all
            scale = jnp.append(own, jnp.sqrt(noise / anchor_variance))
            phi, grid_phi = (amplitude * unit * x for x in (scale[:, None] * at_rows, on_grid))
            weights, covariance, log_det = weight_posterior(
                phi.T @ phi, phi.T @ (scale * moved), noise, positive_inverse_and_log_det
            )
            evidence = log_evidence(phi, scale * moved, own.sum() + 1, noise, weights, log_det)
            evidence -= norm.logpdf(0.0, 0.0, jnp.sqrt((phi[-1] ** 2).sum() + noise))
            # at least 1e-6 of the prior's: less is rounding, which may be negative
            variance = jnp.maximum(
                ((grid_phi @ covariance) * grid_phi).sum(1), 1e-6 * (grid_phi**2).sum(1)
            )
            return evidence, nothing + grid_phi @ weights, jnp.sqrt(variance)

        over = jax.vmap(jax.vmap(process, (0, None)), (None, 0))  # amplitudes within noises
        return over(jnp.array(PROCESS_AMPLITUDES), noise)

    evidence, means, stds = jax.vmap(of_variable)(output.grid, usual, own)
    return evidence, *(jnp.transpose(x, (1, 2, 0, 3)) for x in (means, stds))
