"""The check: its parts against closed forms, and what it does with experiments that confirm or
contradict a surrogate whose answers are made up.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from lib import check as checks
from lib.buffer import ExperienceBuffer
from lib.check import Belief, CheckConfig, check
from lib.linalg import inverse_and_log_det, positive_inverse_and_log_det
from lib.regression import log_evidence, weight_posterior
from lib.scm import Task, value_grid
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig, SurrogateOutput


BINS, NUM_OBS = 16, 40


class Fixed(ParentSetPredictionModel):
    """A surrogate that predicts that Y falls by `slope[i]` per unit of variable i, give or take .1,
    whatever the data.
    """

    slope: jax.Array

    def __init__(self, slope):
        self.embed = self.blocks = self.parent_head = self.effect_head = ()
        self.weight_head, self.config = eqx.nn.Linear(1, 1, key=jr.key(0)), SurrogateConfig()
        self.slope = jnp.array(slope)

    def predict(self, summary, task):
        size = len(task.low)
        slope = jnp.zeros(size).at[: len(self.slope)].set(self.slope)
        grid = value_grid(task.low, task.high, BINS)
        scale, some = summary.units.scale, jnp.zeros((size, BINS, 1))
        shift, spread = (x[task.target] for x in scale)
        deviation = summary.units.observed_std[task.target]
        mean, std = shift - slope[:, None] * grid, jnp.full_like(grid, 0.1)
        return SurrogateOutput(
            task,
            jnp.zeros((1, size)),
            jnp.zeros(1),
            grid,
            mean,
            std,
            some[:, 0],
            some,
            shift,
            spread,
            deviation,
        )


def data(experiments, *, extra=0, reach=2.0, noise=1.0):
    """Forty observations of two causes and Y, then `experiments` (variable, value, outcome)."""
    values = np.zeros((64, 3 + extra), np.float32)
    observed = np.random.default_rng(0).normal(size=(NUM_OBS, 3))
    values[:NUM_OBS, :3] = (observed - observed.mean(0)) / observed.std(0) * [1, 1, noise]
    set_by_hand = np.zeros(values.shape, bool)
    for row, (variable, value, outcome) in enumerate(experiments, start=NUM_OBS):
        values[row, [variable, 2]] = value, outcome
        set_by_hand[row, variable] = True
    valid = np.arange(64) < NUM_OBS + len(experiments)
    there = np.arange(3 + extra) < 2
    task = Task(
        jnp.array(2),
        jnp.asarray(np.where(there, -reach, 0.0), jnp.float32),
        jnp.asarray(np.where(there, reach, 0.0), jnp.float32),
        jnp.arange(3 + extra) < 3,
    )
    return ExperienceBuffer(*map(jnp.asarray, (values, set_by_hand, valid))), task


RUN = eqx.filter_jit(check)


def checked(experiments, slope=(1.0, 0.0), **settings):
    return RUN(Fixed(slope), *data(experiments, **settings), 16)


def test_processes_are_gaussian_processes():
    """The basis functions of a process have its kernel, also a little outside its range."""
    place = np.random.default_rng(0).uniform(-0.05, 1.05, 30)
    found = checks.basis_functions(jnp.asarray(place))
    kernel = np.exp(-0.5 * ((place[:, None] - place) / checks.PROCESS_LENGTHSCALE) ** 2)
    np.testing.assert_allclose(found @ found.T, kernel, atol=2e-3)


@pytest.mark.parametrize("invert", [positive_inverse_and_log_det, inverse_and_log_det])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_regression_has_the_evidence_and_the_posterior_of_its_formulas(scale, invert):
    """Against the normal distribution of the outcomes, in float64; outcomes far beyond the noise
    leave enough digits.
    """
    rng = np.random.default_rng(1)
    made, told, noise = scale * rng.normal(size=(12, 4)), scale * rng.normal(size=(5, 4)), 0.3
    outcome = made @ rng.normal(size=4) + noise**0.5 * rng.normal(size=12)
    of_outcome = made @ made.T + noise * np.eye(12)
    across = told @ made.T @ np.linalg.inv(of_outcome)
    phi, y, variance = (jnp.asarray(x, jnp.float32) for x in (made, outcome, noise))
    mean, covariance, log_det = weight_posterior(phi.T @ phi, phi.T @ y, variance, invert)
    found = log_evidence(phi, y, 12, variance, mean, log_det)
    wanted = stats.multivariate_normal(np.zeros(12), of_outcome).logpdf(outcome)
    np.testing.assert_allclose(found, wanted, rtol=2e-3)
    np.testing.assert_allclose(told @ mean, across @ outcome, atol=0.01 * scale)
    variance = told @ told.T - across @ made @ told.T
    found = np.diag(told @ covariance @ told.T)
    np.testing.assert_allclose(np.sqrt(found), np.sqrt(np.diag(variance)), rtol=0.05)


def test_without_experiments_the_weights_are_the_prior():
    config = CheckConfig()
    belief = checked([]).belief
    shares = [min(config.untried_factor * share, 0.9) for share in config.wrong_shares]
    wanted = (1 - config.no_effects_prob) * (1 - np.dot(shares, config.wrong_probs))
    np.testing.assert_allclose(belief.weights.sum(0), 1.0, atol=1e-5)
    np.testing.assert_allclose(belief.weights[0][:2], wanted, atol=1e-4)
    assert belief.nothing == pytest.approx(0.0, abs=1e-5)
    assert belief.nothing_std == pytest.approx(NUM_OBS**-0.5, rel=1e-4)


TRUE = [
    (0, v, -v + e) for v, e in ((2, 0.3), (-2, -0.3), (1, 0.2), (-1, 0.1), (1.5, -0.4), (-1.5, 0))
]
FLAT = [(0, v, e) for (_, v, _), e in zip(TRUE, (0.3, -0.3, 0.2, 0.1, -0.4, 0), strict=True)]
OPPOSITE = [(0, v, -y) for _, v, y in TRUE]


def test_the_surrogate_is_believed_as_far_as_its_variable_was_right():
    right, none, flat, opposite = (checked(e).belief for e in (TRUE, [], FLAT, OPPOSITE))
    assert right.weights[0][0] > 0.97 > none.weights[0][0] > 0.3 > flat.weights[0][0]
    assert flat.weights[1][0] > 0.5 and opposite.weights[0][0] < 0.01
    # where experiments contradict it, they are believed, and the band holds what they show
    for belief, slope in ((right, -1.0), (flat, 0.0), (opposite, 1.0)):
        grid = np.linspace(-2, 2, BINS)
        low, high = belief.quantile(0.05)[0], belief.quantile(0.95)[0]
        assert ((low < slope * grid + 0.01) & (slope * grid - 0.01 < high)).mean() > 0.9
        assert np.abs(belief.mean[0] - slope * grid).max() < 0.7
    # and on the other variable, on which nothing was tried, it is believed less than before
    assert right.weights[0][1] > opposite.weights[0][1] + 0.05


def test_one_outcome_moves_the_belief_by_what_its_noise_allows():
    """The same contradiction counts for less where outcomes are noisy."""
    clear, noisy = (checked(OPPOSITE, noise=n).belief.weights[0][0] for n in (1.0, 8.0))
    assert clear < 1e-2 and noisy > 0.05


def test_beyond_what_was_trained_on_experiments_are_believed_sooner():
    near, far = (checked([], reach=r).belief.weights[0][:2] for r in (4.0, 20.0))
    assert (far < 0.2 * near).all()


def test_padding_and_the_order_of_experiments_change_nothing():
    plain = checked(TRUE).belief
    for other in (checked(TRUE, extra=5), checked(TRUE[::-1])):
        np.testing.assert_allclose(other.belief.mean[:2], plain.mean[:2], atol=1e-4)
        np.testing.assert_allclose(other.belief.weights[0][:2], plain.weights[0][:2], atol=1e-4)


def test_rows_with_several_settings_or_outside_the_range_are_not_checked_against():
    buffer, task = data([*TRUE, (1, 9.0, 50.0)])
    both = eqx.tree_at(lambda b: b.intervened, buffer, buffer.intervened.at[NUM_OBS, 1].set(True))
    found = RUN(Fixed((1.0, 0.0)), both, task, 16)
    assert found.done.valid.sum() == len(TRUE) - 1


def test_experiments_are_predicted_from_the_other_rows():
    """By a real network; its answer about all rows is the one that is averaged."""
    sizes = SurrogateConfig(8, 1, 4, 2, BINS)
    surrogate = eqx.filter_jit(ParentSetPredictionModel)(sizes, key=jr.key(0))
    experiments = [(k % 2, 0.2 * (k % 9) - 0.8, 0.1 * k) for k in range(18)]
    buffer, task = data(experiments)
    found = RUN(surrogate, buffer, task, 18)
    np.testing.assert_array_equal(found.done.row, NUM_OBS + np.arange(18))
    before, after = (eqx.filter_jit(surrogate.predict)(buffer.first(n), task) for n in (40, 58))
    wanted = [np.interp(v, before.grid[i], before.effect_mean[i]) for i, v, _ in experiments]
    np.testing.assert_allclose(found.predicted[0], wanted, atol=1e-4)
    np.testing.assert_allclose(found.output.effect_mean, after.effect_mean, atol=1e-4)


def mixture(means, stds, weights, nothing=0.0):
    """A belief about one variable (and one that cannot be set) on two cells."""
    means, stds = (jnp.asarray(x, jnp.float32)[:, None].repeat(2, 1) for x in (means, stds))
    # behind two components of weight zero, of the surrogate and without effect
    weights = jnp.concatenate([jnp.zeros(2), jnp.asarray(weights, jnp.float32)])[:, None].repeat(
        2, 1
    )
    means, stds = (jnp.concatenate([x[:1].repeat(2, 0), x]) for x in (means, stds))
    return Belief(weights, means, stds, jnp.array(nothing), jnp.array(0.0))


def test_quantiles_and_probabilities_are_of_the_mixture():
    one = mixture([[1.0, 2.0]], [[0.5, 1.0]], [1.0])
    np.testing.assert_allclose(one.quantile(0.05)[0], [1 - 0.822, 2 - 1.645], atol=1e-3)
    np.testing.assert_allclose(one.against_nothing[0][0], stats.norm.cdf([-2.0, -2.0]), atol=1e-5)
    two = mixture([[0.0, 0.0], [10.0, -10.0]], [[1.0, 1.0]] * 2, [0.97, 0.03])
    low, high = two.quantile(0.05)[0], two.quantile(0.95)[0]
    for end, q in ((low, 0.05), (high, 0.95)):
        below = 0.97 * stats.norm.cdf(end) + 0.03 * stats.norm.cdf(end - np.array([10.0, -10.0]))
        np.testing.assert_allclose(below, q, atol=1e-4)
    np.testing.assert_allclose(two.mean[0], [0.3, -0.3], atol=1e-5)
    np.testing.assert_allclose(two.std[0], np.sqrt(0.97 * 0.09 + 1 + 0.03 * 9.7**2), rtol=1e-4)


def test_the_gain_of_an_experiment_is_what_it_may_change():
    can, tried = jnp.array([True, False]), jnp.zeros((2, 2))
    sure = mixture([[-1.0, -1.0]], [[0.01, 0.5]], [1.0])
    gain = sure.gain(can, jnp.array(1.0), tried)
    assert gain.shape == (2, 2) and (gain[1] == 0).all()
    # cells are apart: the first is known and best, the second is uncertain
    assert gain[0, 0] < 1e-6 < gain[0, 1]
    change = 0.25 / np.sqrt(0.25 + 1 / checks.REPEATS)
    np.testing.assert_allclose(gain[0, 1], change * stats.norm.pdf(0), rtol=1e-3)
    # what only noise keeps from being known is worth less
    assert sure.gain(can, jnp.array(100.0), tried)[0, 1] < 0.2 * gain[0, 1]
    # and what forty outcomes have shown has an error of 1 / sqrt(40), whatever the surrogate says
    change = 0.025 / np.sqrt(0.025 + 1 / checks.REPEATS)
    np.testing.assert_allclose(
        sure.gain(can, jnp.array(1.0), tried + 40)[0, 1], change * stats.norm.pdf(0), rtol=1e-3
    )
    # where nothing pays, only what may fall below doing nothing does
    worse = mixture([[1.0, 3.0]], [[0.5, 0.5]], [1.0]).gain(can, jnp.array(1.0), tried)[0]
    assert worse[0] > 10 * worse[1] > 0


def test_doing_nothing_is_recommended_where_nothing_pays():
    assert checked(TRUE).recommended()[0] == 0 and float(checked(TRUE).recommended()[1]) == 2.0
    nothing = checked(FLAT * 2, slope=(0.0, 0.0))
    assert nothing.recommended()[0] == -1


def test_an_experiment_of_which_little_is_left_to_learn_is_not_made_again():
    """A policy that wants one cell whatever happened gets another when that one is known."""
    wanted = jnp.zeros((3, BINS)).at[1, 3].set(10.0)
    first = checked(TRUE)
    known = [(1, float(first.output.grid[1, 3]), 0.0)] * 9
    found = [
        one.choose(wanted, least_gain_share=0.5)
        for one in (checked([], slope=(0.0, 0.0)), checked(known, slope=(0.0, 0.0)))
    ]
    assert found[0][0] == 1 and found[0][1] == first.output.grid[1, 3]
    assert found[1] != found[0]
