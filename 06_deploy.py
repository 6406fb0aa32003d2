"""Stage 6: the trained system at work, without the expert and without ground truth.

The next experiment for data of your own, and a whole campaign on a system whose truth is known:

    python 06_deploy.py suggest --data experiments.csv --target Y
    python 06_deploy.py demo --benchmark toy --seeds 3

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

from lib import settings
from lib.buffer import DataError, ExperienceBuffer, Units, read_bounds
from lib.literature import Benchmark
from lib.problems import initial_buffer
from lib.scm import Intervention, Task
from lib.surrogate import observed_task
from lib.system import DeploymentConfig, TrainedACBOSystem, deploy_trained_system


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
    """Play whole campaigns on a benchmark whose truth is known, and score what is recommended."""

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
        settings.check(self)


def read_task(
    config: Suggest, names: tuple[str, ...], buffer: ExperienceBuffer, units: Units
) -> tuple[Task, np.ndarray, np.ndarray]:
    """The task in deviations, and the lows and highs `[vars]` of its ranges in the columns' units.

    Raises `DataError` for a target that is no column, for bounds in another unit than the data, and
    where nothing may be set.
    """
    if config.target not in names:
        raise DataError(
            f"{config.data}: no column '{config.target}' to use as target; the "
            f"variables are {', '.join(names)}"
        )
    task = observed_task(buffer, names.index(config.target))
    low, high = units.raw(task.low), units.raw(task.high)
    if config.bounds is not None:
        low, high = read_bounds(config.bounds, names)
        ends = np.stack([units.deviations(low), units.deviations(high)])
        far = np.where(low < high, np.abs(ends).max(0), 0.0)
        if far.max() > FARTHEST_RANGE:
            raise DataError(
                f"{config.bounds}: the range of '{names[int(far.argmax())]}' ends {far.max():.0e} "
                "deviations from what was observed: check its unit"
            )
        first, last = jnp.asarray(np.where(low < high, ends, 0.0))
        task = Task(task.target, first, last, task.var_mask)
    if not bool(task.candidates.any()):
        raise DataError(
            f"{config.bounds or config.data}: no variable may be intervened on: give "
            f"one besides '{config.target}' a range"
        )
    return task, low, high


def suggest(config: Suggest) -> dict:
    """Answer for one data set; prints it and returns it."""
    names, buffer, units = ExperienceBuffer.from_csv(config.data)
    task, low, high = read_task(config, names, buffer, units)
    system = TrainedACBOSystem.load(config.system)
    deployed = deploy_trained_system(system, DeploymentConfig(config.objective))
    said = jax.device_get(deployed(buffer, task, config.remaining))

    # --- back to the columns' own units and digits ---
    target = int(task.target)

    def effect(variable, value, mean="predicted") -> dict:
        """do(variable = value) as a person reads it. Predictions get two digits more, or a narrow
        band would be rounded away.
        """
        i, value = int(variable), float(value)
        b = int(np.abs(said.grid[i] - value).argmin())
        written = min(max(units.written(i, value), float(low[i])), float(high[i]))
        std = float(said.std[i, b]) * float(units.spread[target])
        return {
            "variable": names[i],
            "value": written,
            mean: units.written(target, float(said.mean[i, b]), more=2),
            "std": round(std, units.digits[target] + 2),
        }

    sign = -1.0 if config.objective == "max" else 1.0
    settable = np.flatnonzero(np.asarray(task.candidates))
    surface = sign * said.mean
    by_effect = settable[np.argsort(surface[settable].min(1))]
    likely = np.argsort(-said.marginals[: len(names)])
    padding = [""] * (said.mean.shape[0] - len(names))
    sets = said.parent_sets.to_dict((*names, *padding))
    answer = {
        "target": config.target,
        "objective": config.objective,
        "next_experiment": effect(*said.experiment),
        "recommended_action": effect(*said.action),
        "parents": {names[i]: float(said.marginals[i]) for i in likely if i != target},
        "parent_sets": [{"parents": sorted(s), "probability": p} for s, p in sets.items()],
        "best_effects": [effect(i, said.grid[i, surface[i].argmin()], "mean") for i in by_effect],
    }
    print(json.dumps(answer) if config.json else as_text(answer))
    return answer


def as_text(answer: dict) -> str:
    """The answer for a person."""
    target, parents = answer["target"], answer["parents"].items()
    sets = ([f"{{{', '.join(s['parents'])}}}", s["probability"]] for s in answer["parent_sets"])
    effects = [
        [e["variable"], f"{e['value']:.4g}", f"{e['mean']:.4g}", f"+- {1.645 * e['std']:.2g}"]
        for e in answer["best_effects"]
    ]
    tables = (
        ([f"parent of {target}?", "probability"], [[n, f"{p:.2f}"] for n, p in parents]),
        (["most probable parent sets", "probability"], [[n, f"{p:.2f}"] for n, p in sets]),
        (["set", "to", f"expected {target}", "90 % band"], effects),
    )
    parts = [tabulate(rows, headers=header, disable_numparse=True) for header, rows in tables]
    for what, key in (
        ("Next experiment:   ", "next_experiment"),
        ("Best action so far:", "recommended_action"),
    ):
        one = answer[key]
        setting = f"{what} set {one['variable']} = {one['value']:.4g}"
        parts.append(f"{setting}   (predicted {target} {one['predicted']:.4g})")
    return "\n\n".join(parts)


def demo(config: Demo) -> list[float]:
    """Campaigns on a benchmark: prints every experiment of the first and the score of each; returns
    E[Y | do(recommended)] per seed.
    """
    system = TrainedACBOSystem.load(config.system)
    num_vars = DeploymentConfig.buckets[0]
    scm = Benchmark(config.benchmark, num_vars)
    optimum = scm.optimum()
    print(
        f"{config.benchmark}: optimum {float(optimum.mean):.3f} at "
        f"{scm.names[int(optimum.variable)]} = {float(optimum.value):.3f}, "
        f"doing nothing {float(scm.mean_outcome(Intervention.none(num_vars))):.3f}"
    )
    capacity = config.num_obs + config.per_variable * num_vars
    first = eqx.filter_jit(
        lambda key: initial_buffer(key, scm, config.num_obs, config.per_variable, capacity)
    )
    scores = []
    for seed in range(config.seeds):
        data_key, play_key = (settings.stage_key(seed, "demo", use) for use in ("data", "play"))
        result = system.run_optimization(
            scm, config.steps, config.online, buffer=first(data_key), key=play_key
        )
        if seed == 0:
            columns = map(np.asarray, (result.variable, result.value, result.outcome))
            rows = [
                [t, scm.names[i], f"{v:.3f}", f"{y:.3f}"]
                for t, (i, v, y) in enumerate(zip(*columns, strict=True), start=1)
            ]
            print(tabulate(rows, headers=["step", "set", "to", "outcome"]))
        variable, value = int(result.recommended_variable[-1]), float(result.recommended_value[-1])
        scores.append(float(scm.mean_outcome(Intervention.single(variable, value, num_vars))))
        print(
            f"seed {seed}: after {config.steps} experiments recommends {scm.names[variable]} = "
            f"{value:.3f}, E[Y | do] = {scores[-1]:.3f}"
        )
    return scores


if __name__ == "__main__":
    with settings.errors_for_people():
        settings.use_compilation_cache(HERE / "artifacts" / "cache")
        commands = (
            Annotated[Suggest, tyro.conf.subcommand("suggest")]
            | Annotated[Demo, tyro.conf.subcommand("demo")]
        )
        chosen_command = tyro.cli(commands, description=__doc__)
        suggest(chosen_command) if isinstance(chosen_command, Suggest) else demo(chosen_command)
