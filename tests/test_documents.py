"""The loops of the design documents, as they are printed there, at toy size; and every name that
the documents use.
"""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lib import documents
from lib.policy import PolicyConfig
from lib.problems import DataDesign, GroundTruth
from lib.scm_prior import SCMPrior
from lib.surrogate import SurrogateConfig


SIZES = SurrogateConfig(
    model_hidden_dim=8, model_n_layers=1, num_heads=2, head_dim=4, num_components=2, num_bins=6
)
EASY = SCMPrior(max_vars=3, max_size=3), DataDesign(12, 12, 1, num_steps=4)
RATE = 1e-3


@pytest.fixture(scope="module")
def models():
    policy = PolicyConfig(policy_hidden_dim=8, policy_n_layers=1)
    return (
        documents.initialize_surrogate(config=SIZES, key=jr.key(0)),
        documents.initialize_acquisition(config=policy, surrogate=SIZES, key=jr.key(1)),
    )


@pytest.fixture(scope="module")
def problem():
    return documents.sample_problem(EASY, key=jr.key(2))


def largest_change(before, after) -> float:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs if eqx.is_array(a))


def test_pretraining_as_printed(models, problem):
    buffer, start = problem[1], documents.initialize_surrogate(config=SIZES, key=jr.key(7))
    true_posteriors, surrogate_params = documents.compute_posterior(buffer, models[0]), start
    for _ in range(2):
        surrogate_params = documents.update_surrogate(
            params=surrogate_params,
            buffer=buffer,
            learning_rate=RATE,
            target_posteriors=true_posteriors,
        )

    def distance(params):  # in total variation
        change = documents.compute_posterior(buffer, params).probs - true_posteriors.probs
        return 0.5 * jnp.abs(change).sum()

    assert distance(surrogate_params) < distance(start)


def test_acquisition_training_as_printed(models):
    surrogate_params, acquisition_params = models
    for _ in range(2):
        scm, buffer = documents.sample_problem(EASY)
        state = documents.get_current_state(buffer, surrogate_params)
        interventions = documents.generate_group_interventions(
            state, acquisition_params, group_size=3
        )
        rewards = []
        for intervention in interventions:
            new_scm = documents.apply_intervention(scm, intervention)
            outcome = documents.sample_from_scm(new_scm)
            new_buffer = buffer.add_intervention(intervention, outcome)
            reward = documents.compute_verifiable_reward(
                state, intervention, outcome, new_buffer, surrogate_params
            )
            rewards.append(reward)
        acquisition_params = documents.update_acquisition_grpo(
            params=acquisition_params,
            state=state,
            interventions=interventions,
            rewards=rewards,
            learning_rate=RATE,
        )
    assert np.isfinite(rewards).all() and len(interventions) == 3
    # two steps on each of two groups, none of which moves a weight by more than the learning rate
    assert 0 < largest_change(models[1], acquisition_params) <= 4.01 * RATE


def test_end_to_end_training_as_printed(models):
    surrogate_params, acquisition_params = models
    adjust_difficulty = documents.adjust_difficulty
    assert adjust_difficulty(0)[0].max_size < adjust_difficulty(10**6)[0].max_size
    for _ in range(2):
        scm, buffer = documents.sample_problem(EASY)
        surrogate_params = documents.update_surrogate(
            params=surrogate_params, buffer=buffer, learning_rate=RATE
        )
        posterior = documents.compute_posterior(buffer, surrogate_params)
        state = documents.State(posterior=posterior, buffer=buffer)
        intervention = documents.select_intervention(state, acquisition_params)
        new_scm = documents.apply_intervention(scm, intervention)
        outcome = documents.sample_from_scm(new_scm)
        new_buffer = buffer.add_intervention(intervention, outcome)
        new_posterior = documents.compute_posterior(new_buffer, surrogate_params)
        new_state = documents.State(posterior=new_posterior, buffer=new_buffer)
        reward = documents.compute_verifiable_reward(
            state, intervention, outcome, new_buffer, surrogate_params
        )
        acquisition_params = documents.update_acquisition(
            params=acquisition_params,
            state=state,
            intervention=intervention,
            reward=reward,
            next_state=new_state,
            learning_rate=RATE,
        )
    assert 0 < largest_change(models[0], surrogate_params) <= 2.01 * RATE
    assert 0 < largest_change(models[1], acquisition_params) <= 2.01 * RATE


def test_the_training_loop_api(models, problem, capsys):
    scm, buffer = problem
    first = documents.initialize_models(buffer, 2, 0, config=SIZES)
    second = documents.initialize_models(buffer, 2, 0, config=SIZES)
    assert largest_change(first, second) == 0
    posterior = documents.compute_posterior(buffer, models[0], task=scm.task)
    intervention, sample = documents.intervention_step(scm, models[1], buffer, posterior)
    assert intervention.mask.sum() == 1 and not intervention.mask[scm.target]
    np.testing.assert_array_equal(sample[intervention.mask], intervention.values[intervention.mask])
    surrogate, policy, final = documents.train(
        scm, buffer, 3, RATE, RATE, scm.parents, models=models, key=jr.key(4)
    )
    assert final.size == buffer.size + 3 and final.intervened[buffer.size : final.size].any(1).all()
    assert 0 < largest_change(models, (surrogate, policy)) <= 3.01 * RATE
    assert capsys.readouterr().out.count("log-probability of the true parent set") == 3


def test_the_loop_learns_the_truth(models, problem):
    scm, buffer = problem
    truth, surrogate = GroundTruth.of(scm, SIZES.num_bins), models[0]
    before = documents.compute_posterior(buffer, surrogate, task=scm.task).output
    for _ in range(20):
        surrogate = documents.update_surrogate(surrogate, buffer, 1e-2, task=scm.task, truth=truth)
    after = documents.compute_posterior(buffer, surrogate, task=scm.task).output
    assert after.log_prob(scm.parents) > before.log_prob(scm.parents) + 0.1


def test_the_target_is_the_last_variable_of_what_is_drawn():
    for seed in range(4):
        scm, buffer = documents.sample_problem(EASY, key=jr.key(seed))
        assert scm.target == 2 and not scm.parents[2] and scm.parents.any()
        assert buffer.intervened[:, :2].any(0).all() and not buffer.intervened[:, 2].any()


NAMES = """
ACBOPipeline AcquisitionConfig AcquisitionModelResult AcquisitionParams AcquisitionPolicyNetwork
AcquisitionState AcquisitionTrainingExample DeployedACBOSystem DeploymentConfig EvaluationReport
ExperienceBuffer ExpertTrajectory GRPOConfig ImitationConfig Intervention OptimizationResult
OptimizationScenario ParentScaleTrajectory ParentSetPosterior ParentSetPredictionModel
PolicyConfig SCM Sample State SurrogateConfig SurrogateModelResult SurrogateParams
SurrogateTrainingExample TrainedACBOSystem TrainingConfig TrajectoryStep adjust_difficulty
apply_intervention augment_expert_demonstrations compute_posterior compute_verifiable_reward
deploy_trained_system evaluate_acquisition_performance evaluate_surrogate_accuracy
evaluate_system_performance expert_demonstration extract_acquisition_training_data
extract_expert_demonstrations extract_expert_trajectory extract_multiple_trajectories
extract_surrogate_training_data generate_group_interventions get_current_state
initialize_acquisition initialize_models initialize_surrogate integrate_with_existing_pipeline
intervention_step pretrain_surrogate sample_from_scm sample_problem select_intervention train
train_acquisition train_acquisition_component train_acquisition_with_expert_warmstart
train_complete_acbo_system train_end_to_end train_surrogate_component
train_surrogate_with_expert_data update_acquisition update_acquisition_grpo update_surrogate
validate_demonstration_quality validate_trajectory_consistency
"""  # every function, class and type of the three documents
METHODS_OF_THE_SYSTEM = ("predict_posterior", "run_optimization", "select_intervention")


def test_every_name_of_the_documents_exists():
    missing = [name for name in NAMES.split() if not hasattr(documents, name)]
    assert not missing
    system = documents.TrainedACBOSystem
    assert all(hasattr(system, name) for name in METHODS_OF_THE_SYSTEM)
    assert len({*NAMES.split(), *METHODS_OF_THE_SYSTEM}) == 72


def test_nothing_needs_the_documents():
    root = Path(__file__).parents[1]
    for path in (*root.glob("*.py"), *root.glob("lib/*.py"), *root.glob("studies/*.py")):
        assert not re.search(r"^(from|import) lib.*documents", path.read_text(), re.M), path
