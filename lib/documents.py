"""Every name of the three design documents, where one who comes from them looks first; nothing else
needs this module. Most are better known elsewhere and only stand here; those that are defined here
are the stages of training and of evaluation as functions of data. reference/documents.md says how
each differs from its document, and why. `params` are modules.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.random as jr

from lib.accuracy import Arrays, accuracy, regret_records
from lib.buffer import ExperienceBuffer
from lib.expert_posterior import ParentScaleConfig
from lib.grpo import GRPOConfig
from lib.imitation import (
    AcquisitionTrainingExample,
    ImitationConfig,
    extract_acquisition_training_data,
)
from lib.loop import (
    AcquisitionParams,
    Sample,
    State,
    SurrogateParams,
    apply_intervention,
    compute_posterior,
    compute_verifiable_reward,
    generate_group_interventions,
    get_current_state,
    initialize_acquisition,
    initialize_models,
    initialize_surrogate,
    intervention_step,
    sample_from_scm,
    sample_problem,
    select_intervention,
    train,
    update_acquisition,
    update_acquisition_grpo,
    update_surrogate,
)
from lib.methods import ON_SURFACE, ACBOPipeline, OptimizationScenario
from lib.metrics import Record
from lib.policy import AcquisitionPolicyNetwork, AcquisitionState, PolicyConfig
from lib.posterior import ParentSetPosterior
from lib.problems import GroundTruth, Problem, optima
from lib.scm import AbstractSCM, Intervention
from lib.settings import stage_key
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig, SurrogateTrainingExample
from lib.system import (
    DeployedACBOSystem,
    DeploymentConfig,
    OptimizationResult,
    TrainedACBOSystem,
    deploy_trained_system,
)
from lib.trajectories import (
    ExpertTrajectory,
    TrajectoryStep,
    augment_expert_demonstrations,
    expert_demonstration,
    extract_expert_demonstrations,
    extract_expert_trajectory,
    extract_multiple_trajectories,
    validate_demonstration_quality,
    validate_trajectory_consistency,
)


SCM = AbstractSCM
ParentScaleTrajectory = ExpertTrajectory
# --- training by parts ---


stage_2, stage_3, stage_4 = map(
    import_module, ("02_train_surrogate", "03_warmstart_acquisition", "04_train_e2e")
)
TrainingConfig, AcquisitionConfig = stage_2.Config, stage_3.Config
SurrogateModelResult = stage_2.SurrogateModelResult
AcquisitionModelResult = stage_3.AcquisitionModelResult
extract_surrogate_training_data = stage_2.extract_surrogate_training_data
adjust_difficulty, train_end_to_end = stage_4.adjust_difficulty, stage_4.train_end_to_end


def train_surrogate_with_expert_data(
    training_examples: SurrogateTrainingExample | None,
    model_config: SurrogateConfig,
    training_config=TrainingConfig(),
) -> Any:
    """Stage 2 on the expert's beliefs (none: without them) and on simulations."""
    return stage_2.train_surrogate(replace(training_config, model=model_config), training_examples)


def train_surrogate_component(
    trajectories: ExpertTrajectory, config: SurrogateConfig, *, training_config=TrainingConfig()
) -> Any:
    """Train only the surrogate, on whole demonstrations."""
    examples = extract_surrogate_training_data(trajectories, training_config.capacity)
    return train_surrogate_with_expert_data(examples, config, training_config)


def pretrain_surrogate(
    expert_demonstrations: SurrogateTrainingExample,
    learning_rate: float,
    num_epochs: int,
    *,
    config=TrainingConfig(),
) -> SurrogateParams:
    """`num_epochs` passes over the demonstrations, with as many simulations beside them as `config`
    says.
    """
    batches = -(-expert_demonstrations.task.target.shape[0] // config.demos_per_step)
    config = replace(config, learning_rate=learning_rate, steps=num_epochs * batches)
    return stage_2.train_surrogate(config, expert_demonstrations).model


def train_acquisition_with_expert_warmstart(
    training_examples: AcquisitionTrainingExample | None,
    policy_config: PolicyConfig,
    grpo_config: GRPOConfig,
    imitation_config: ImitationConfig,
    *,
    surrogate: SurrogateParams,
    config=AcquisitionConfig(),
) -> Any:
    """Stage 3: clone the expert's choices, then improve by GRPO."""
    parts = dict(policy=policy_config, grpo=grpo_config, imitation=imitation_config)
    return stage_3.train_policy(replace(config, **parts), surrogate, training_examples)


def train_acquisition_component(trajectories: ExpertTrajectory, surrogate_result, config) -> Any:
    """Train only the policy, on whole demonstrations."""
    surrogate = surrogate_result.model
    examples = extract_acquisition_training_data(trajectories, surrogate)
    return stage_3.train_policy(config, surrogate, examples)


def train_acquisition(
    surrogate_params: SurrogateParams,
    expert_demonstrations: AcquisitionTrainingExample | None,
    learning_rate: float,
    num_steps: int,
    *,
    config=AcquisitionConfig(),
) -> AcquisitionParams:
    """`num_steps` GRPO iterations; demonstrations are cloned first, if there are any."""
    cloning = expert_demonstrations is not None
    config = replace(
        config,
        grpo=replace(config.grpo, learning_rate=learning_rate),
        imitation=replace(config.imitation, use_behavioral_cloning=cloning),
        iterations=num_steps,
        checkpoint_every=num_steps,
    )
    return stage_3.train_policy(config, surrogate_params, expert_demonstrations).policy


def train_complete_acbo_system(
    expert_trajectories: ExpertTrajectory,
    surrogate_config: SurrogateConfig,
    acquisition_config,
    training_config,
    *,
    config=stage_4.Config(),
) -> TrainedACBOSystem:
    """Stages 2 to 4 on demonstrations, without files; `config` is stage 4's."""
    surrogate = train_surrogate_component(
        expert_trajectories, surrogate_config, training_config=training_config
    )
    policy = train_acquisition_component(expert_trajectories, surrogate, acquisition_config)
    return train_end_to_end(surrogate.model, policy.policy, config.rounds, config=config)[0]


# --- evaluation and deployment ---


class EvaluationReport(NamedTuple):
    """What an evaluation found: rows of the tables, and simple regret by method
    `[batch, steps + 1]` for each number of variables.
    """

    records: list[Record]
    regret: dict[str, Arrays]


def evaluate_system_performance(
    system: TrainedACBOSystem,
    test_scms: Problem,
    baseline_method: str = "parent_scale",
    *,
    num_obs: int = 50,
    num_steps: int = 10,
    seed: int = 0,
) -> EvaluationReport:
    """The system beside one method on problems whose truth is known, with room for `num_steps`
    experiments behind `num_obs` observational rows (phase4_training_infrastructure.md).
    """
    task = f"d={test_scms.scm.low.shape[1]}"
    scenario = OptimizationScenario(task, num_obs=num_obs, num_steps=num_steps)
    key = stage_key(seed, "evaluation", "play")
    regret = {
        name: scenario.regret(name, system, test_scms, optima(test_scms.scm), key)
        for name in (baseline_method, "acbo")
    }
    records = regret_records(task, regret, test_scms.scm.mechanism[:, 0])
    return EvaluationReport(records, {task: regret})


def evaluate_acquisition_performance(
    system: TrainedACBOSystem,
    scenarios: Sequence[OptimizationScenario],
    *,
    num_problems: int = 300,
    seed: int = 1_000_003,
    rivals: Sequence[str] = ON_SURFACE,
) -> dict[str, float]:
    """Simple regret of the system's policy after 1, 3, 5, 10 and 20 experiments, and by how much
    each rival's is larger, paired.

    Keys are task, method and metric of `lib.accuracy.regret_records`, with `/low` and `/high`
    behind for the ends of its 95 % interval.
    """
    records = []
    for index, scenario in enumerate(scenarios):
        draw_key, play_key = jr.split(jr.fold_in(jr.key(seed), index))
        problems = scenario.draw(draw_key, num_problems, system.surrogate.config.num_bins)
        best = optima(problems.scm)
        regret = {
            name: scenario.regret(name, system, problems, best, play_key)
            for name in ("acbo", *rivals)
        }
        records += regret_records(scenario.name, regret, problems.scm.mechanism[:, 0])
    return {
        "/".join((r.task, r.method, r.metric)) + end: value
        for r in records
        for end, value in (("", r.value), ("/low", r.low), ("/high", r.high))
    }


def evaluate_surrogate_accuracy(surrogate, test_trajectories: ExpertTrajectory) -> dict[str, float]:
    """Accuracy on all that held-out demonstrations ended with, against the truth about their
    systems (phase4_training_infrastructure.md).
    """

    model, scms = surrogate.model, test_trajectories.scm
    truth = eqx.filter_jit(jax.vmap(lambda scm: GroundTruth.of(scm, model.config.num_bins)))(scms)
    return accuracy(model, (Problem(scms, truth, test_trajectories.buffer),))


def integrate_with_existing_pipeline(
    trained_system: TrainedACBOSystem, *, config: ParentScaleConfig | None = None
) -> ACBOPipeline:
    """The pipeline of the expert that asks the trained surrogate who the parents are."""
    return ACBOPipeline(trained_system, config or ParentScaleConfig(num_obs=50, num_steps=10))
