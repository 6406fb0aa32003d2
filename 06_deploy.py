"""Stage 6: the trained system at work, without the expert and without ground truth.

    python 06_deploy.py suggest --data experiments.csv --target Y       the next experiment for your
    own data
    python 06_deploy.py demo --benchmark toy --seeds 3                  a full ask/tell campaign on
    a known system

Data: one row per experiment, one column per variable, and a column `intervened` that names the
variable set by hand in that row (empty for an observation). Ranges (`--bounds`): a CSV with columns
variable,low,high; a variable that it does not list is never intervened on. Without it, each
variable's observed range. Bad input ends with one line that says where it is and what to do, and
exit status 2.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tabulate import tabulate

from lib.benchmarks import make_benchmark
from lib.buffer import DataError, ExperienceBuffer, read_bounds
from lib.config import check_settings, errors_for_people, stage_key, use_compilation_cache
from lib.scm import Intervention, Task
from lib.scm_prior import initial_buffer
from lib.surrogate import observed_task
from lib.system import TrainedACBOSystem, flip_target


HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "pretrained" / "acbo.eqx"
MAX_REMAINING = 1_000_000
FARTHEST_RANGE = 1e6  # deviations: beyond, bounds and data have different units


@dataclass(frozen=True)
class Suggest:
    """Read experiments, print likely parents, expected effects and the next experiment."""

    data: Path
    """CSV of experiments."""
    target: str
    """Column to optimise."""
    objective: Literal["min", "max"] = "min"
    """Make the target small or large."""
    bounds: Path | None = None
    """CSV of ranges of intervention (variable,low,high)."""
    system: Path = SHIPPED
    """Trained system; the default is the one that comes with this script."""
    remaining: int = 10
    """Experiments that you can still afford, this one included."""
    json: bool = False
    """Print one JSON object instead of text."""

    def __post_init__(self):
        if not 1 <= self.remaining <= MAX_REMAINING:
            raise DataError(
                f"--remaining {self.remaining}: give the experiments that you can "
                f"still afford, 1 to {MAX_REMAINING}"
            )


@dataclass(frozen=True)
class Demo:
    """Play whole campaigns on a benchmark whose truth is known, and score the recommended
    action.
    """

    benchmark: Literal["toy", "epidemiology", "healthcare"] = "toy"
    """System to play on."""
    steps: int = 15
    """Experiments per campaign."""
    seeds: int = 1
    """Campaigns."""
    num_obs: int = 200
    """Observational rows at the start."""
    per_variable: int = 2
    """Initial interventions on each variable that may be set."""
    online: bool = False
    """Tune the policy by GRPO at every state, scored on a fitted causal Gaussian process."""
    system: Path = SHIPPED
    """Trained system; the default is the one that comes with this script."""

    def __post_init__(self):
        check_settings(self)


BUCKETS = (8, 16, 32, 64, 128)  # variables; one program each, whatever the data


def padded(buffer: ExperienceBuffer, task: Task) -> tuple[ExperienceBuffer, Task]:
    """Buffer and task padded to the next bucket of variables and to a multiple of 128 rows."""
    num_rows, num_vars = buffer.values.shape
    if num_vars > BUCKETS[-1]:
        raise DataError(
            f"{num_vars} variables: at most {BUCKETS[-1]} are supported; leave out "
            "columns that cannot matter"
        )
    extra = next(b for b in BUCKETS if b >= num_vars) - num_vars

    def columns(x):
        return jnp.pad(x, ((0, 0), (0, extra)))

    wide = ExperienceBuffer(columns(buffer.values), columns(buffer.intervened), buffer.valid)
    low, high, var_mask = (jnp.pad(x, (0, extra)) for x in (task.low, task.high, task.var_mask))
    return wide.grow(-num_rows % 128), Task(task.target, low, high, var_mask)


@eqx.filter_jit
def decide(system: TrainedACBOSystem, buffer: ExperienceBuffer, task: Task, remaining: jax.Array):
    """Next experiment, recommended action, and everything the system believes.

    The policy reads how many experiments were made, in training as here: those of the data.
    """
    made = (buffer.intervened.any(1) & buffer.valid).sum()
    state = system.state(buffer, task, made, remaining)
    return (
        state,
        system.select_intervention(state),
        state.output.best(),
        state.output.marginals(),
        state.posterior.top_k(5),
    )


def suggest(config: Suggest) -> dict:
    """Answer for one data set; prints it and returns it."""
    names, buffer, units = ExperienceBuffer.from_csv(config.data)
    if config.target not in names:
        raise DataError(
            f"{config.data}: no column '{config.target}' to use as target; the "
            f"variables are {', '.join(names)}"
        )
    target = names.index(config.target)
    task = observed_task(buffer, target)
    low, high = units.raw(task.low), units.raw(task.high)
    if config.bounds is not None:
        low, high = read_bounds(config.bounds, names)
        far = np.where(
            low < high,
            np.maximum(np.abs(low - units.shift), np.abs(high - units.shift)) / units.spread,
            0.0,
        )
        if far.max() > FARTHEST_RANGE:
            name = names[int(far.argmax())]
            raise DataError(
                f"{config.bounds}: the range of '{name}' ends {far.max():.0e} "
                "deviations from what was observed: check its unit"
            )
        first, last = (
            jnp.asarray(np.where(low < high, units.deviations(ends), 0.0), jnp.float32)
            for ends in (low, high)
        )
        task = Task(task.target, first, last, task.var_mask)
    if not bool(task.candidates.any()):
        raise DataError(
            f"{config.bounds or config.data}: no variable may be intervened on: give "
            f"one besides '{config.target}' a range"
        )
    system = TrainedACBOSystem.load(config.system)

    # --- the system minimises: to maximise, mirror the target ---
    sign = -1.0 if config.objective == "max" else 1.0
    wide, wide_task = padded(flip_target(buffer, target) if sign < 0 else buffer, task)
    state, chosen, best, marginals, top = decide(
        system, wide, wide_task, jnp.array(config.remaining)
    )

    # --- back to the columns' own units and digits ---
    # predictions get two digits more, or a narrow band would be rounded away
    def effect(variable, index):
        mean, std = (
            float(state.output.effect_mean[variable, index]),
            float(state.output.effect_std[variable, index]),
        )
        return units.written(target, sign * mean, more=2), round(
            std * float(units.spread[target]), units.digits[target] + 2
        )

    def setting(variable, deviation):
        return min(
            max(units.written(variable, deviation), float(low[variable])), float(high[variable])
        )

    def described(choice):
        variable, value = int(choice[0]), float(choice[1])
        mean, std = effect(
            variable, int(np.abs(np.asarray(state.output.grid[variable]) - value).argmin())
        )
        return {
            "variable": names[variable],
            "value": setting(variable, value),
            "predicted": mean,
            "std": std,
        }

    def best_effects():
        """For every variable that may be set: its best value and the target expected there, best
        first.
        """
        surface = np.where(
            np.asarray(state.task.candidates)[:, None], np.asarray(state.output.effect_mean), np.inf
        )
        places = [
            (int(i), int(surface[i].argmin()))
            for i in np.argsort(surface.min(1))
            if np.isfinite(surface[i]).all()
        ]
        found = [(i, setting(i, float(state.output.grid[i, b])), *effect(i, b)) for i, b in places]
        return [
            {"variable": names[i], "value": value, "mean": mean, "std": std}
            for i, value, mean, std in found
        ]

    answer = {
        "target": config.target,
        "objective": config.objective,
        "next_experiment": described(chosen),
        "recommended_action": described(best),
        "parents": {
            names[i]: float(marginals[i])
            for i in np.argsort(-np.asarray(marginals)[: len(names)])
            if i != target
        },
        "parent_sets": [
            {"parents": sorted(members), "probability": p}
            for members, p in top.to_dict(
                (*names, *[""] * (wide.values.shape[1] - len(names)))
            ).items()
        ],
        "best_effects": best_effects(),
    }
    print(json.dumps(answer) if config.json else as_text(answer))
    return answer


def as_text(answer: dict) -> str:
    """The answer for a person."""
    parents = [[name, f"{p:.2f}"] for name, p in answer["parents"].items()]
    sets = [
        ["{" + ", ".join(s["parents"]) + "}", f"{s['probability']:.2f}"]
        for s in answer["parent_sets"]
    ]
    effects = [
        [e["variable"], f"{e['value']:.4g}", f"{e['mean']:.4g}", f"+- {1.645 * e['std']:.2g}"]
        for e in answer["best_effects"]
    ]
    chosen, best = answer["next_experiment"], answer["recommended_action"]
    return "\n\n".join(
        [
            tabulate(
                parents,
                headers=[f"parent of {answer['target']}?", "probability"],
                disable_numparse=True,
            ),
            tabulate(
                sets, headers=["most probable parent sets", "probability"], disable_numparse=True
            ),
            tabulate(
                effects,
                headers=["set", "to", f"expected {answer['target']}", "90 % band"],
                disable_numparse=True,
            ),
            f"Next experiment:    set {chosen['variable']} = {chosen['value']:.4g}   (predicted "
            f"{answer['target']} {chosen['predicted']:.4g})",
            f"Best action so far: set {best['variable']} = {best['value']:.4g}   (predicted "
            f"{answer['target']} {best['predicted']:.4g})",
        ]
    )


def demo(config: Demo) -> list[float]:
    """Campaigns on a benchmark: prints every experiment of the first and the score of each; returns
    E[Y | do(recommended)] per seed.
    """
    system = TrainedACBOSystem.load(config.system)
    scm = make_benchmark(config.benchmark, BUCKETS[0])
    optimum = scm.optimum()
    print(
        f"{config.benchmark}: optimum {float(optimum.mean):.3f} at "
        f"{scm.names[int(optimum.variable)]} = {float(optimum.value):.3f}, "
        f"doing nothing {float(scm.mean_outcome(Intervention.none(BUCKETS[0]))):.3f}"
    )
    capacity = config.num_obs + config.per_variable * BUCKETS[0]
    first = eqx.filter_jit(
        lambda key: initial_buffer(key, scm, config.num_obs, config.per_variable, capacity)
    )
    scores = []
    for seed in range(config.seeds):
        data_key, play_key = (stage_key(seed, "demo", use) for use in ("data", "play"))
        result = system.run_optimization(
            scm, config.steps, config.online, buffer=first(data_key), key=play_key
        )
        if seed == 0:
            rows = zip(
                np.asarray(result.variable),
                np.asarray(result.value),
                np.asarray(result.outcome),
                strict=True,
            )
            print(
                tabulate(
                    [
                        [t + 1, scm.names[i], f"{v:.3f}", f"{y:.3f}"]
                        for t, (i, v, y) in enumerate(rows)
                    ],
                    headers=["step", "set", "to", "outcome"],
                )
            )
        variable, value = int(result.recommended_variable[-1]), float(result.recommended_value[-1])
        scores.append(float(scm.mean_outcome(Intervention.single(variable, value, BUCKETS[0]))))
        print(
            f"seed {seed}: after {config.steps} experiments recommends {scm.names[variable]} = "
            f"{value:.3f}, E[Y | do] = {scores[-1]:.3f}"
        )
    return scores


if __name__ == "__main__":
    with errors_for_people():
        use_compilation_cache(HERE / "artifacts" / "cache")
        commands = (
            Annotated[Suggest, tyro.conf.subcommand("suggest")]
            | Annotated[Demo, tyro.conf.subcommand("demo")]
        )
        chosen_command = tyro.cli(commands, description=__doc__)
        suggest(chosen_command) if isinstance(chosen_command, Suggest) else demo(chosen_command)
