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

import itertools
import json
import math
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
from lib.buffer import FARTHEST_VALUE, DataError, ExperienceBuffer, Units, read_bounds
from lib.literature import Benchmark
from lib.problems import initial_buffer
from lib.scm import Intervention, Task
from lib.surrogate import observed_task
from lib.system import DeploymentConfig, TrainedACBOSystem, deploy_trained_system


HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "pretrained" / "acbo.eqx"
MAX_REMAINING = 1_000_000


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

    Raises `DataError` for more columns than the system takes, for a target that is no column, for
    bounds in another unit than the data, and where nothing may be set.
    """
    if len(names) > (most := DeploymentConfig.buckets[-1]):
        raise DataError(
            f"{config.data}: {len(names)} variables, at most {most} are supported: leave out "
            "columns that cannot matter"
        )
    if config.target not in names:
        raise DataError(
            f"{config.data}: no column '{config.target}' to use as target; the "
            f"variables are {', '.join(names)}"
        )
    task = observed_task(buffer, names.index(config.target))
    low, high = (
        np.array([float(units.written(i, x)) for i, x in enumerate(np.asarray(ends))])
        for ends in (task.low, task.high)
    )
    if config.bounds is not None:
        low, high = read_bounds(config.bounds, names)
        far = (low < high) & (units.far(low) | units.far(high))
        if far.any():
            raise DataError(
                f"{config.bounds}: the range of '{names[int(far.argmax())]}' ends more than "
                f"{FARTHEST_VALUE:,.0f} deviations from what was observed: check its unit"
            )
        first, last = (
            jnp.asarray(units.deviations(np.where(low < high, ends, units.shift)))
            for ends in (low, high)
        )
        task = Task(task.target, first, last, task.var_mask)
    if not bool(task.candidates.any()):
        raise DataError(
            f"{config.bounds or config.data}: no variable may be intervened on: give "
            f"one besides '{config.target}' a range"
        )
    return task, low, high


def suggest(config: Suggest) -> dict:
    """Answer for one data set; prints it and returns it. Raises `DataError` as `from_csv`,
    `read_bounds` and `read_task` do, and where the answer is not finite.
    """
    names, buffer, units = ExperienceBuffer.from_csv(config.data)
    task, low, high = read_task(config, names, buffer, units)
    system = TrainedACBOSystem.load(config.system)
    deployed = deploy_trained_system(system, DeploymentConfig(config.objective))
    said = jax.device_get(deployed(buffer, task, config.remaining))

    numbers = said.experiment, said.action, said.marginals, said.grid, said.mean, said.std
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers)):
        raise DataError(
            f"{config.data}: the answer is not finite: look for cells far from the others, and for "
            "columns in different units"
        )

    # --- back to the columns' own units and digits ---
    target = int(task.target)
    shift, spread = units.shift, units.spread
    # the columns', but not the sixteen of a computed number: float32 has a millionth of a deviation
    digits = [
        min(d, 6 - math.floor(math.log10(s))) for d, s in zip(units.digits, spread, strict=True)
    ]

    def effect(variable, value, mean="predicted") -> dict:
        """do(variable = value) as a person reads it: the value with its column's digits, or more
        where the range has none with so few, and what is predicted there. Predictions get two
        digits more than their column, or a narrow band would be rounded away.
        """
        i = int(variable)
        raw = float(np.clip(shift[i] + spread[i] * float(value), low[i], high[i]))
        rounded = (round(raw, d) + 0.0 for d in itertools.count(digits[i]))  # + 0: no -0
        written = next(one for one in rounded if low[i] <= one <= high[i])
        at, grid = (written - shift[i]) / spread[i], said.grid[i]
        y, std = (float(np.interp(at, grid, curve[i])) for curve in (said.mean, said.std))
        return {
            "variable": names[i],
            "value": written,
            mean: round(float(shift[target] + spread[target] * y), digits[target] + 2) + 0.0,
            "std": round(float(spread[target] * std), digits[target] + 2),
        }

    sign = -1.0 if config.objective == "max" else 1.0
    settable = np.flatnonzero(np.asarray(task.candidates))
    best = (sign * said.mean).argmin(1)
    effects = [effect(i, said.grid[i, best[i]], "mean") for i in settable]
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
        "best_effects": sorted(effects, key=lambda one: sign * one["mean"]),
    }
    print(json.dumps(answer, allow_nan=False) if config.json else as_text(answer))
    return answer


def as_text(answer: dict) -> str:
    """The answer for a person, with the digits that the JSON has."""

    def text(number: float) -> str:
        return repr(number).removesuffix(".0")

    target, parents = answer["target"], answer["parents"].items()
    sets = ([f"{{{', '.join(s['parents'])}}}", s["probability"]] for s in answer["parent_sets"])
    effects = [
        [e["variable"], text(e["value"]), text(e["mean"]), f"+- {text(float(f'{band:.2g}'))}"]
        for e in answer["best_effects"]
        for band in (1.645 * e["std"],)
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
        setting = f"{what} set {one['variable']} = {text(one['value'])}"
        parts.append(f"{setting}   (predicted {target} {text(one['predicted'])})")
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
