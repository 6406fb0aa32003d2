"""Methods that play, and the comparison of an untrained system with a rival: what is measured, not
how good it is.
"""

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from lib import documents, methods
from lib.policy import AcquisitionPolicyNetwork, PolicyConfig
from lib.problems import optima
from lib.scm import Intervention, experiment_key
from lib.scm_prior import SCMPrior
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig
from lib.system import TrainedACBOSystem
from studies.policy import exploration_scenario


SIZES = SurrogateConfig(
    model_hidden_dim=8, model_n_layers=1, num_heads=2, head_dim=4, num_components=2, num_bins=5
)
SCENARIO = methods.OptimizationScenario(
    "tiny", SCMPrior(max_vars=4, min_size=4, max_size=4), num_obs=12, per_variable=1, num_steps=3
)


@pytest.fixture(scope="module")
def system():
    surrogate = eqx.filter_jit(ParentSetPredictionModel)(SIZES, key=jr.key(1))
    return TrainedACBOSystem(
        surrogate,
        AcquisitionPolicyNetwork(PolicyConfig(8, 1), 3 * SIZES.model_hidden_dim, key=jr.key(2)),
    )


def test_every_method_has_its_name(system):
    assert all(callable(methods.make_method(name, system, 12, 3)) for name in methods.METHODS)
    with pytest.raises(ValueError, match="unknown method 'ridge': choose from random"):
        methods.make_method("ridge", system, 12, 3)


def test_regret_starts_and_ends_where_it_should_and_the_key_decides(system):
    problems = SCENARIO.draw(jr.key(0), 6, SIZES.num_bins)
    best = optima(problems.scm)
    assert (np.asarray(problems.truth.baseline) > np.asarray(best)).all()
    one, again, other = (
        SCENARIO.regret("random", system, problems, best, jr.key(key)) for key in (3, 3, 4)
    )
    assert one.shape == (6, SCENARIO.num_steps + 1) and (one > -0.05).all()
    np.testing.assert_array_equal(one, again)
    # before the first experiment only the data count
    np.testing.assert_array_equal(one[:, 0], other[:, 0])
    assert (one[:, 1:] != other[:, 1:]).any()


def test_the_system_is_held_against_its_rivals(system):
    found = documents.evaluate_acquisition_performance(
        system, [SCENARIO], num_problems=4, rivals=("random",)
    )
    for t in (1, 3):
        ours, theirs = (found[f"tiny/{name}/regret@{t}"] for name in ("acbo", "random"))
        cell = f"tiny/regret above acbo's, paired/random/regret@{t}"
        value, low, high = (found[cell + end] for end in ("", "/low", "/high"))
        assert low <= value <= high and abs(value - (theirs - ours)) < 1e-6


def test_exploration_means_few_rows_wide_ranges_and_valleys():
    scenario, usual = exploration_scenario(5), SCMPrior()
    sizes = scenario.prior.min_size, scenario.prior.max_size, scenario.prior.max_vars
    assert scenario.num_obs < 50 and sizes == (5, 5, 5)
    assert scenario.prior.mechanisms == ("fourier",) and scenario.prior.min_range > usual.min_range
    assert scenario.prior.max_lengthscale < usual.max_lengthscale


@pytest.mark.parametrize("name", ["surrogate_ei", "parent_scale", "bo"])
def test_the_noise_of_an_experiment_is_the_same_for_all_methods(system, name):
    """What every method saw is what its experiments give with the noise of (key, step)."""
    problems = SCENARIO.draw(jr.key(0), 1, SIZES.num_bins)
    scm, buffer = (
        jax.tree.map(lambda leaf: leaf[0], one) for one in (problems.scm, problems.buffer)
    )
    key = jr.key(5)
    run = eqx.filter_jit(methods.make_method(name, system, 12, 3))(key, scm, buffer)
    for t in range(3):
        intervention = Intervention.single(run.variable[t], run.value[t], 4)
        row = scm.sample(experiment_key(key, t), intervention, 1)[0]
        np.testing.assert_allclose(run.outcome[t], row[scm.target], atol=1e-4)
