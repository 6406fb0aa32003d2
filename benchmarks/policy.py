"""How good a trained policy is: agreement with the expert, regret beside every rival, the first
experiment, the time of a decision.

    python benchmarks/policy.py --folder artifacts/small --parts agreement regret exploration first
    choices time gradient headroom

Held-out problems of `SCMPrior`, all methods from the same data with the same noise, scored by the
noise-free E[Y | do] of the action that they then recommend. Intervals are 95 %, over problems;
differences are paired. `surrogate_greedy`, `surrogate_ei` and `surrogate_thompson` act on the
effect surface of the policy's own surrogate, so that what is between them and the policy is the
policy's doing.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.surrogate import NARROW, confounded
from lib import baselines
from lib.buffer import DataError
from lib.config import check_settings, errors_for_people, use_compilation_cache
from lib.grpo import (
    CampaignDesign,
    Groups,
    GRPOConfig,
    Problem,
    Simulator,
    collect_campaign,
    draw_problems,
    expected_reward,
    grpo_loss,
    reward_table,
)
from lib.methods import (
    ON_SURFACE,
    POLICIES,
    OptimizationScenario,
    exploration_scenario,
    in_batches,
    make_method,
)
from lib.metrics import (
    Record,
    median_seconds,
    normalised_regret,
    paired_difference,
    render,
    summarise,
    write_results,
)
from lib.parent_scale import ParentScaleConfig, run_parent_scale
from lib.policy import AcquisitionPolicyNetwork, expected_improvement_choice, thompson_choice
from lib.rewards import RewardConfig
from lib.scm import Intervention
from lib.scm_prior import SCMPrior, multimodal
from lib.system import TrainedACBOSystem, load_policy, load_surrogate
from lib.trajectories import extract_acquisition_training_data, load_trajectories


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    folder: Path = Path("artifacts/small")
    """Where surrogate.eqx, policy.eqx, bc_policy.eqx and demos.npz are."""
    parts: tuple[str, ...] = (
        "agreement",
        "regret",
        "exploration",
        "first",
        "choices",
        "time",
        "gradient",
        "headroom",
    )
    """What is measured: any of these."""
    sizes: tuple[int, ...] = (5, 10, 20)
    """Numbers of variables, for `regret`."""
    num_problems: int = 300
    """Held-out problems per cell, for the regressions and the expert's family one in
    `expert_share`.
    """
    many: int = 3000
    """Held-out problems per cell for the methods on the surrogate's surface, whose differences are
    small.
    """
    expert_share: int = 3
    """Of so many problems the expert's family plays one."""
    num_obs: int = 200
    """Observational rows, for `regret`."""
    few_obs: int = 48
    """Observational rows, for `first`."""
    seed: int = 5_000_003
    """Seed of the problems; unlike any training seed."""
    out: Path = Path("artifacts/policy")
    """Where tables go."""

    def __post_init__(self):
        check_settings(self)


STEPS = (1, 3, 5, 10, 20)
PLAIN = ("random", "least_squares", "additive_ridge")
OURS = "grpo_policy"


class Report:
    """Collects records, and plays methods on problems."""

    def __init__(self, config: Config):
        self.config, self.records = config, []
        surrogate = load_surrogate(config.folder / "surrogate.eqx")[0]
        self.cloned = TrainedACBOSystem(surrogate, load_policy(config.folder / "bc_policy.eqx")[0])
        self.system = TrainedACBOSystem(surrogate, load_policy(config.folder / "policy.eqx")[0])

    def add(
        self, table: str, task: str, method: str, metric: str, estimate, n: int, unit: str = ""
    ) -> None:
        """One row."""
        value, low, high = estimate
        self.records.append(Record(table, task, method, metric, value, low, high, n, unit))

    def compare(self, table: str, scenario: OptimizationScenario, counts: dict[str, int]) -> None:
        """Regret of every method on as many problems as `counts` says, and by how much it is above
        the policy's; linear and nonlinear apart.
        """
        config = self.config
        draw_key, play_key = jr.split(jr.fold_in(jr.key(config.seed), len(self.records)))
        most = max(counts.values())
        problems, optima = scenario.draw(draw_key, most, self.system.surrogate.config.num_bins)
        linear, regret = np.asarray(problems.scm.mechanism) == 0, {}
        for name, count in tqdm(counts.items(), desc=scenario.name):
            some, few = jax.tree.map(lambda leaf, n=count: leaf[:n], (problems, optima))
            regret[name] = scenario.regret(
                name, self.cloned if name == "bc_policy" else self.system, some, few, play_key
            )
        kinds = {"": linear | True} | (
            {"/linear": linear, "/nonlinear": ~linear} if linear.any() else {}
        )
        for kind, rows in kinds.items():
            for name, values in regret.items():
                chosen, ours = (
                    values[rows[: len(values)]],
                    regret[OURS][: len(values)][rows[: len(values)]],
                )
                for step in (step for step in STEPS if step <= scenario.num_steps):
                    self.add(
                        table,
                        scenario.name + kind,
                        name,
                        f"regret@{step}",
                        summarise(chosen[:, step]),
                        len(chosen),
                    )
                    if name != OURS:
                        more = paired_difference(chosen[:, step], ours[:, step])
                        self.add(
                            table,
                            f"{scenario.name}{kind}/above the policy's, paired",
                            name,
                            f"regret@{step}",
                            more,
                            len(chosen),
                        )


def measure_regret(report: Report) -> None:
    """Linear and nonlinear systems with many rows: beside the expert, and everybody else."""
    config = report.config
    for size in config.sizes:
        scenario = OptimizationScenario(
            f"d={size}",
            SCMPrior(max_vars=size, min_size=size, max_size=size),
            config.num_obs,
            num_steps=20,
        )
        few = max(config.num_problems // config.expert_share, 1)
        counts = {
            OURS: config.many,
            **dict.fromkeys(ON_SURFACE, config.many),
            "bc_policy": config.num_problems,
        }
        counts |= dict.fromkeys(PLAIN, config.num_problems) | dict.fromkeys(
            ("bo", "parent_scale"), few
        )
        report.compare("regret", scenario, counts)


def measure_exploration(report: Report) -> None:
    """Few rows, wide ranges, several valleys: what the policy is for."""
    config = report.config
    for size in (5, 8, 10):
        counts = {
            OURS: config.many,
            **dict.fromkeys(ON_SURFACE, config.many),
            "bc_policy": config.num_problems,
            "random": config.num_problems,
        }
        report.compare("exploration", exploration_scenario(size, size), counts)


def measure_first(report: Report) -> None:
    """Few rows, eight variables: the share of the possible improvement that the recommended action
    reaches before and after a few experiments.
    """
    config = report.config
    for name, prior in {"d=8": SCMPrior(), "d=8, easier problems": NARROW}.items():
        scenario = OptimizationScenario(
            name, replace(prior, max_vars=8, min_size=8, max_size=8), config.few_obs, num_steps=5
        )
        draw_key, play_key = jr.split(jr.fold_in(jr.key(config.seed), len(report.records)))
        problems, optima = scenario.draw(
            draw_key, config.num_problems, report.system.surrogate.config.num_bins
        )
        graph, target, effects = (
            np.asarray(x)
            for x in (
                jax.vmap(lambda scm: scm.graph)(problems.scm),
                problems.scm.target,
                problems.truth.effects,
            )
        )
        effects = np.where(settable(problems.scm)[..., None], effects, np.inf)
        mixed = confounded(graph, target, effects.min(2).argmin(1))
        children, linear = (
            graph[np.arange(len(target)), target].any(1),
            np.asarray(problems.scm.mechanism) == 0,
        )
        kinds = {
            "": mixed | True,
            "/best variable confounded": mixed,
            "/not confounded": ~mixed,
            "/target has children": children,
        }
        kinds |= {"/no children": ~children, "/linear": linear, "/nonlinear": ~linear}
        for method in tqdm((*PLAIN, *ON_SURFACE, "bc_policy", OURS), desc=name):
            system = report.cloned if method == "bc_policy" else report.system
            share = 1.0 - scenario.regret(method, system, problems, optima, play_key)
            for kind, rows in kinds.items():
                for step in (0, 1, 3, 5):
                    report.add(
                        "first",
                        name + kind,
                        method,
                        f"share@{step}",
                        summarise(share[rows, step]),
                        int(rows.sum()),
                    )


@eqx.filter_jit
def read_by_the_surrogate(
    name: str, system: TrainedACBOSystem, keys, problems: Problem, num_obs: int, num_steps: int
):
    """Noise-free E[Y | do] of what the surrogate recommends before the first and after each
    experiment of a method `[batch, steps + 1]`.
    """
    method = make_method(name, system, num_obs, num_steps)

    def one(inputs):
        key, (scm, _, start) = inputs
        buffer, num_vars = method(key, scm, start).buffer, scm.var_mask.shape[0]

        def recommended(step):
            output = system.surrogate.predict(buffer.first(start.size + step), scm.task)
            return scm.mean_outcome(Intervention.single(*output.best(), num_vars))

        return jax.lax.map(recommended, jnp.arange(num_steps + 1))

    return in_batches(one, (keys, problems))


def measure_choices(report: Report) -> None:
    """What the experiments of each method are worth to the surrogate, which reads them all and
    recommends: how far a teacher's choices can lead.
    """
    config = report.config
    kinds = {
        "100 rows, as demonstrated": (SCMPrior(), 100),
        "24 rows, exploration": (multimodal(SCMPrior()), 24),
    }
    for scenario in (
        OptimizationScenario(name, prior, num_obs, num_steps=8)
        for name, (prior, num_obs) in kinds.items()
    ):
        draw_key, play_key = jr.split(jr.fold_in(jr.key(config.seed), len(report.records)))
        problems, optima = scenario.draw(
            draw_key, config.num_problems, report.system.surrogate.config.num_bins
        )
        keys, before, regret = (
            jr.split(play_key, len(optima)),
            np.asarray(problems.truth.baseline)[:, None],
            {},
        )
        for name in tqdm(
            ("random", "parent_scale", "bc_policy", *ON_SURFACE, OURS), desc=scenario.name
        ):
            system, method = (
                (report.cloned if name == "bc_policy" else report.system),
                ("acbo" if name in POLICIES else name),
            )
            means = read_by_the_surrogate(
                method, system, keys, problems, scenario.num_obs, scenario.num_steps
            )
            regret[name] = normalised_regret(np.asarray(means), np.asarray(optima)[:, None], before)
        for name, values in regret.items():
            for step in (0, 1, 3, 5, 8):
                report.add(
                    "choices",
                    scenario.name,
                    name,
                    f"regret@{step}",
                    summarise(values[:, step]),
                    len(values),
                )
                if name != "bc_policy":
                    more = paired_difference(values[:, step], regret["bc_policy"][:, step])
                    report.add(
                        "choices",
                        f"{scenario.name}/above bc_policy's, paired",
                        name,
                        f"regret@{step}",
                        more,
                        len(values),
                    )


def settable(batch) -> np.ndarray:
    """`candidates` of a batch of systems or tasks `[batch, vars]`."""
    return np.asarray(jax.vmap(lambda one: one.candidates)(batch))


@eqx.filter_jit
def plain_choices(examples, num_bins: int):
    """What the regressions would have chosen at the expert's states: `[batch]` variables and values
    per rule.
    """

    def one(example):
        buffer, task = example.state.buffer, example.state.task
        of = partial(getattr, baselines)
        return {
            name: of(name)(buffer, task.target, task.low, task.high, task.candidates)
            for name in ("least_squares", "additive_ridge")
        }

    return jax.lax.map(one, examples, batch_size=32)


def measure_agreement(report: Report) -> None:
    """Share of held-out expert steps with the same variable, and of these with a value within 10 %
    of the range.
    """
    train, validation = (
        load_trajectories(report.config.folder / "demos.npz", part)[0]
        for part in ("train", "validation")
    )
    examples = extract_acquisition_training_data(validation, report.system.surrogate)
    task, variable, value = (
        examples.state.task,
        np.asarray(examples.variable),
        np.asarray(examples.value),
    )
    low, high, rows = np.asarray(task.low), np.asarray(task.high), np.arange(len(variable))
    num_vars, model = low.shape[1], validation.variable.shape[1]

    def modes(policy: AcquisitionPolicyNetwork):
        return eqx.filter_jit(
            lambda policy, states: jax.lax.map(
                lambda state: policy(state).mode(), states, batch_size=64
            )
        )(policy, examples.state)

    # the constant rule sets the i-th variable that can be set to a fixed part of its range: those
    # that the expert likes best in training
    steps, known = train.variable.shape[1], train.scm.task
    chosen, picked = np.asarray(train.variable).reshape(-1), np.arange(train.variable.size)
    first, last, can = (
        np.repeat(np.asarray(x), steps, axis=0) for x in (known.low, known.high, settable(known))
    )
    fraction = (np.asarray(train.value).reshape(-1) - first[picked, chosen]) / (last - first)[
        picked, chosen
    ]
    rank = np.bincount(
        [int(c[:v].sum()) for v, c in zip(chosen, can, strict=True)], minlength=num_vars
    ).argmax()
    where = np.histogram(fraction, bins=np.linspace(0, 1, 6))[0].argmax() * 0.2 + 0.1
    constant = np.array([np.flatnonzero(c)[min(rank, c.sum() - 1)] for c in settable(task)])
    guesses = {"constant": (constant, low[rows, constant] + where * (high - low)[rows, constant])}
    guesses |= plain_choices(examples, 16)
    guesses |= {"surrogate_greedy": jax.vmap(lambda output: output.best())(examples.state.output)}
    guesses |= {"bc_policy": modes(report.cloned.policy), OURS: modes(report.system.policy)}
    for name, (i, v) in guesses.items():
        i, v = np.asarray(i), np.asarray(v)
        same = i == variable
        near = np.abs(v - value) <= 0.1 * (high - low)[rows, variable]
        per_model = same.reshape(-1, model).mean(1)  # steps of one campaign are not independent
        report.add(
            "agreement",
            "held-out demonstrations",
            name,
            "variable",
            summarise(per_model),
            len(per_model),
        )
        report.add(
            "agreement",
            "held-out demonstrations",
            name,
            "value, where the variable agrees",
            (near[same].mean(), -np.inf, np.inf),
            int(same.sum()),
        )


def measure_time(report: Report) -> None:
    """From a data set of ten variables to the next experiment; our expert for the same, and in a
    campaign of ten, whose start it pays once.
    """
    scenario = OptimizationScenario(
        "d=10", SCMPrior(max_vars=10, min_size=10, max_size=10), report.config.num_obs, num_steps=10
    )
    problems, _ = scenario.draw(
        jr.key(report.config.seed), 1, report.system.surrogate.config.num_bins
    )
    scm, buffer = jax.tree.map(lambda leaf: leaf[0], (problems.scm, problems.buffer))
    decide = eqx.filter_jit(
        lambda system, buffer, task: system.select_intervention(system.state(buffer, task))
    )
    fast = median_seconds(lambda: decide(report.system, buffer, scm.task), 200)
    report.add("time", "d=10", OURS, "decision", (1000 * fast, -np.inf, np.inf), 200, "ms")
    for steps in (1, 10):
        settings = ParentScaleConfig(
            num_obs=scenario.num_obs, num_steps=steps, candidate_sets="union"
        )
        expert = eqx.filter_jit(
            lambda key, scm, buffer, settings=settings: (
                run_parent_scale(key, scm, buffer, settings).recommended_value
            )
        )
        slow = median_seconds(lambda expert=expert: expert(jr.key(0), scm, buffer), 5) / steps
        name = f"parent_scale, campaign of {steps}"
        report.add("time", "d=10", name, "decision", (1000 * slow, -np.inf, np.inf), 5, "ms")
        report.add("time", "d=10", name, "times the policy's", (slow / fast, -np.inf, np.inf), 5)


def measure_gradient(report: Report) -> None:
    """Cosine between one-step policy gradients and the exact one, which is from the whole reward
    tables of the same states in the mean over noise.

    A whole table with a single draw of the noise says how much of the rest is the noise's and not
    the sampling's.
    """
    surrogate, policy, count, repeats, draws = (
        report.system.surrogate,
        report.cloned.policy,
        32,
        16,
        64,
    )
    rewards, num_bins = RewardConfig(), report.system.surrogate.config.num_bins
    problems = draw_problems(
        jr.key(report.config.seed), count, SCMPrior(), CampaignDesign(num_steps=1), num_bins
    )

    @eqx.filter_jit
    def exact(policy, problems, key):
        def table(problem):
            simulator = Simulator(surrogate, problem.scm, problem.truth, rewards)
            known = simulator.start(problem.buffer, 1)
            return known[0], reward_table(simulator, known, problem.scm.draw_noise(key, 1))

        states, tables = jax.lax.map(table, problems)
        return eqx.filter_grad(
            lambda policy: jax.vmap(partial(expected_reward, policy))(states, tables).mean()
        )(policy)

    @eqx.filter_jit
    def sampled(policy, problems, key, config):
        def groups(problem) -> Groups:
            simulator = Simulator(surrogate, problem.scm, problem.truth, rewards)
            return collect_campaign(key, simulator, policy, problem.buffer, 1, config)[0]

        batch = jax.tree.map(lambda leaf: leaf[:, 0], jax.lax.map(groups, problems))
        return eqx.filter_grad(lambda policy: -grpo_loss(policy, policy, batch, config, 0.0)[0])(
            policy
        )

    def flat(gradient):
        return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradient)])

    def add(name, gradients, reference, simulations):
        cosines = [g @ reference / np.linalg.norm(g) / np.linalg.norm(reference) for g in gradients]
        report.add(
            "gradient",
            f"{count} states",
            name,
            "cosine with the exact gradient",
            summarise(np.array(cosines)),
            len(cosines),
        )
        report.add(
            "gradient",
            f"{count} states",
            name,
            "experiments per state",
            (simulations, -np.inf, np.inf),
            1,
        )

    tables = [
        flat(exact(policy, problems, jr.key(i)))
        for i in tqdm(range(repeats + draws), desc="gradient")
    ]
    reference = np.mean(tables[repeats:], 0)
    cells = num_bins * int(settable(problems.scm).sum(1).mean())
    add("whole table", tables[:repeats], reference, cells)
    for size in (4, 8, 16, 64):
        config = GRPOConfig(group_size=size, lookahead=0, entropy_weight=0.0)
        add(
            f"groups of {size}",
            [flat(sampled(policy, problems, jr.key(100 + i), config)) for i in range(repeats)],
            reference,
            size,
        )


def measure_headroom(report: Report) -> None:
    """What the next experiment gains, in the mean over noise, where it pays to look around: each
    choice, and the best there is on the grid.

    The best cell is chosen by half of the draws of the noise and scored by the other half, which
    gives a lower bound of what knowing all would gain.
    """
    scenario, count, draws = exploration_scenario(8, 8), 60, 16
    surrogate, policy = report.system.surrogate, report.system.policy
    rewards = RewardConfig(temperature=0.0, structure_weight=0.0, parent_weight=0.0)
    problems, _ = scenario.draw(jr.key(report.config.seed), count, surrogate.config.num_bins)

    @eqx.filter_jit
    def tables(problems, key):
        def table(problem):
            simulator = Simulator(surrogate, problem.scm, problem.truth, rewards)
            known = simulator.start(problem.buffer, scenario.num_steps)
            output = known[0].output
            rules = {
                "surrogate_greedy": output.best(),
                "surrogate_ei": expected_improvement_choice(output),
            }
            rules |= {
                "surrogate_thompson": thompson_choice(key, output),
                OURS: policy(known[0]).mode(),
            }
            cells = {
                name: variable * output.grid.shape[1] + abs(output.grid[variable] - value).argmin()
                for name, (variable, value) in rules.items()
            }
            return cells, reward_table(simulator, known, problem.scm.draw_noise(key, 1)).reshape(-1)

        return jax.lax.map(table, problems)

    found = [tables(problems, jr.key(i)) for i in tqdm(range(draws), desc="headroom")]
    # [draws, problems, cells]
    gains, rows = np.stack([np.asarray(table) for _, table in found]), np.arange(count)
    allowed = np.repeat(settable(problems.scm), surrogate.config.num_bins, axis=1)
    results = {"random": (gains.mean(0) * allowed).sum(1) / allowed.sum(1)}
    for name in found[0][0]:
        results[name] = np.mean(
            [
                table[rows, np.asarray(cells[name])]
                for (cells, _), table in zip(found, gains, strict=True)
            ],
            0,
        )
    halves = [np.where(allowed, half.mean(0), -np.inf) for half in (gains[::2], gains[1::2])]
    results["the best cell"] = np.mean([b[rows, a.argmax(1)] for a, b in (halves, halves[::-1])], 0)
    for name, gain in results.items():
        report.add(
            "headroom", scenario.name, name, "gain of the first experiment", summarise(gain), count
        )
        if name != OURS:
            report.add(
                "headroom",
                scenario.name,
                name,
                "above the policy's, paired",
                paired_difference(gain, results[OURS]),
                count,
            )


PARTS = {
    "agreement": measure_agreement,
    "regret": measure_regret,
    "exploration": measure_exploration,
    "first": measure_first,
    "choices": measure_choices,
    "time": measure_time,
    "gradient": measure_gradient,
    "headroom": measure_headroom,
}


def main(config: Config) -> Path:
    """Measure, print and write."""
    unknown = set(config.parts) - set(PARTS)
    if unknown:
        raise DataError(
            f"parts: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}"
        )
    use_compilation_cache(Path("artifacts/cache"))
    report = Report(config)
    for part in config.parts:
        PARTS[part](report)
        print(f"\n## {part}\n\n{render(report.records, part)}")
        write_results(config.out, report.records)
    return config.out


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.cli(Config, description=__doc__))
