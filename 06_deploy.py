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

import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tabulate import tabulate

from lib import settings
from lib.buffer import FARTHEST_VALUE, DataError, ExperienceBuffer, Units, read_bounds
from lib.check import CheckConfig
from lib.literature import Benchmark
from lib.problems import initial_buffer
from lib.scm import Intervention, Task
from lib.surrogate import observed_task
from lib.system import BUCKETS, DeploymentConfig, TrainedACBOSystem, deploy_trained_system


HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "pretrained" / "acbo.eqx"
MAX_REMAINING = 1_000_000
VERSION = "1"  # of the answer's format
REASONS = (  # for an experiment: of another setting than the one to recommend, or of that
    "may turn out better than what is recommended now",
    "the best setting known: one more outcome tells whether it is",
)


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
    worth: float = 0.02
    """Gain from which one more experiment is worth it, in deviations of the target."""

    def __post_init__(self):
        if not 1 <= self.remaining <= MAX_REMAINING:
            raise DataError(
                f"--remaining {self.remaining}: give the experiments that you can "
                f"still afford, 1 to {MAX_REMAINING}"
            )
        if not (math.isfinite(self.worth) and self.worth >= 0):
            raise DataError(f"--worth {self.worth}: give a number of at least 0")


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
    """Tune the policy by GRPO at every state, scored by what an experiment is expected to gain."""
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
    if len(names) > BUCKETS[-1]:
        raise DataError(
            f"{config.data}: {len(names)} variables, at most {BUCKETS[-1]} are supported: leave "
            "out columns that cannot matter"
        )
    if config.target not in names:
        raise DataError(
            f"{config.data}: no column '{config.target}' to use as target; the "
            f"variables are {', '.join(names)}"
        )
    task = observed_task(buffer, names.index(config.target))
    low, high = (
        np.array([units.written(i, x) for i, x in enumerate(np.asarray(ends))])
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
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(said._replace(parent_sets=()))):
        raise DataError(
            f"{config.data}: the answer is not finite: look for cells far from the others, and for "
            "columns in different units"
        )

    answer = in_own_units(config, names, buffer, units, task, low, high, said)
    print(json.dumps(answer, allow_nan=False) if config.json else as_text(answer))
    return answer


def in_own_units(config, names, buffer, units, task, low, high, said) -> dict:
    """What the system `said`, in the columns' own units and digits; `low` and `high` `[vars]` are
    the ends of the ranges.
    """
    target, shift, spread = int(task.target), units.shift, units.spread
    # the columns', but not the sixteen of a computed number: float32 has a millionth of a deviation
    digits = [
        min(d, 6 - math.floor(math.log10(s))) for d, s in zip(units.digits, spread, strict=True)
    ]

    def outcomes(numbers) -> dict:
        """Predictions get two digits more than their column, or a narrow band would be rounded
        away.
        """
        raw = shift[target] + spread[target] * np.array(numbers, float)
        rounded = (round(y, digits[target] + 2) + 0.0 for y in raw.tolist())  # + 0: no -0
        return dict(zip(("predicted", "low", "high"), rounded, strict=True))

    def effect(i, value) -> dict:
        """do(variable i = value) as a person reads it: the value with its column's digits, or more
        where the range has none with so few, and what is predicted there.
        """
        raw = float(np.clip(shift[i] + spread[i] * float(value), low[i], high[i]))
        rounded = (round(raw, d) + 0.0 for d in itertools.count(digits[i]))
        written = next(one for one in rounded if low[i] <= one <= high[i])
        at = (written - shift[i]) / spread[i]
        curves = [np.interp(at, said.grid[i], s[i]) for s in (said.mean, said.low, said.high)]
        return {"settings": {names[i]: written}, **outcomes(curves)}

    sign = -1.0 if config.objective == "max" else 1.0
    settable = np.flatnonzero(np.asarray(task.candidates))
    best = (sign * said.mean).argmin(1)
    effects = [effect(i, said.grid[i, best[i]]) for i in settable]
    lowest = min(settable, key=lambda i: sign * said.mean[i, best[i]])
    nothing = outcomes(said.nothing)
    action = {"settings": {}, **nothing} if said.action[0] < 0 else effect(*said.action)
    tried, value = said.experiment
    nearest = np.abs(said.grid[tried] - value).argmin()
    gain, most = (float(spread[target] * g) for g in (said.gain[tried, nearest], said.gain.max()))
    surrogate, flat = (float(weight[settable].mean()) for weight in said.weights)
    surfaces = (
        (surrogate, "the surrogate's"),
        (flat, "the flat"),
        (1 - surrogate - flat, "their own"),
    )
    check = {
        "experiments": int(said.experiments),
        "in_band": int(said.in_band),
        "widened_by": round(float(said.widened_by), 2),
        "surface": max(surfaces)[1],
        "surrogate_weight": round(surrogate, 3),
    }
    return {
        "target": config.target,
        "objective": config.objective,
        "nothing": nothing,
        "recommended_action": action
        | {"probability_better_than_nothing": round(float(said.better[lowest, best[lowest]]), 3)},
        "next_experiment": effect(*said.experiment)
        | {
            "expected_gain": round(gain, digits[target] + 2),
            "reason": REASONS[said.experiment == said.action],
        },
        "stop": {
            "expected_gain": round(most, digits[target] + 2),
            "worth_it": most > config.worth * float(spread[target] * said.spread),
        },
        "parents": {
            names[i]: float(said.marginals[i])
            for i in np.argsort(-said.marginals[: len(names)])
            if i != target
        },
        "parent_sets": [
            {"parents": sorted(members), "probability": p}
            for members, p in said.parent_sets.to_dict(names).items()
        ],
        "best_effects": sorted(effects, key=lambda one: sign * one["predicted"]),
        "check": check,
        "notes": [],
        "warnings": warnings_of(names, buffer, task, check),
        "version": VERSION,
        "system": config.system.name,
        "data_sha256": hashlib.sha256(config.data.read_bytes()).hexdigest(),
    }


def warnings_of(names, buffer, task, check) -> list[str]:
    """What limits the answer, each in one sentence."""
    done, in_band = check["experiments"], check["in_band"]
    observed = np.asarray(buffer.values, float)[np.asarray(buffer.observational)]
    ends = np.stack([task.low, task.high])
    reach = np.abs(ends - observed.mean(0)).max(0) / observed.std(0)
    limits = [
        (
            len(buffer.valid) < 2 * len(names),
            f"{len(buffer.valid)} rows for {len(names)} columns: so few rows cannot tell which "
            "column matters",
        ),
        (
            not done,
            "no experiment to check against: what looks like an effect may have a common cause "
            "that is not in the file",
        ),
        (
            in_band < 0.7 * done,
            f"{done - in_band} of {done} experiments lay outside the 90 % band predicted "
            "for them: be wary of what no experiment has shown yet",
        ),
        *(
            (
                reach[i] > CheckConfig.far,
                f"'{names[i]}': its range reaches {reach[i]:.0f} deviations from what was "
                "observed: the surrogate was not trained on such and counts for less there",
            )
            for i in np.flatnonzero(np.asarray(task.candidates))
        ),
    ]
    return [sentence for holds, sentence in limits if holds]


def text(number: float) -> str:
    """A number with the digits that it has."""
    return repr(number).removesuffix(".0")


def as_text(answer: dict) -> str:
    """The answer for a person, with the digits that the JSON has."""
    target, check, stop = answer["target"], answer["check"], answer["stop"]
    best, following = answer["recommended_action"], answer["next_experiment"]

    def setting(one: dict) -> list[str]:
        """Variable, value, and what is expected of it."""
        name, value = next(iter(one["settings"].items()), ("(nothing)", None))
        chosen = "" if value is None else text(value)
        return [name, chosen, text(one["predicted"]), f"{text(one['low'])} to {text(one['high'])}"]

    def sentence(one: dict) -> str:
        name, value, predicted, band = setting(one)
        chosen = f"set {name} = {value}" if value else "set nothing"
        return f"{chosen}   ({target} {predicted} expected, {band})"

    effects = *answer["best_effects"], {"settings": {}, **answer["nothing"]}
    tables = {
        (f"parent of {target}?", "probability"): [
            [name, f"{p:.2f}"] for name, p in answer["parents"].items()
        ],
        ("most probable parent sets", "probability"): [
            [f"{{{', '.join(one['parents'])}}}", f"{one['probability']:.2f}"]
            for one in answer["parent_sets"]
        ],
        ("set", "to", f"expected {target}", "90 % band"): [setting(one) for one in effects],
    }
    parts = [
        *(tabulate(rows, headers=head, disable_numparse=True) for head, rows in tables.items()),
        f"Check: {check['in_band']} of {check['experiments']} experiments in their 90 % band when "
        f"predicted; {check['surface']} surface is believed most (surrogate "
        f"{text(check['surrogate_weight'])}), bands {text(check['widened_by'])} times as wide.",
        *(f"Note: {one}." for one in answer["notes"]),
        *(f"Warning: {one}." for one in answer["warnings"]),
        f"Next experiment:    {sentence(following)}\n{' ' * 20}{following['reason']}; expected "
        f"gain {text(following['expected_gain'])}",
        f"Best action so far: {sentence(best)}\n{' ' * 20}"
        f"{'' if best['settings'] else 'no setting gains enough for what it risks; the best is '}"
        f"better than nothing with probability {text(best['probability_better_than_nothing'])}",
    ]
    if not stop["worth_it"]:
        parts.append(
            f"Stop: one more experiment is expected to gain {text(stop['expected_gain'])} at most; "
            "the noise of an outcome is what is left."
        )
    return "\n\n".join(parts)


def demo(config: Demo) -> list[float]:
    """Campaigns on a benchmark: prints every experiment of the first and the score of each; returns
    E[Y | do(recommended)] per seed.
    """
    system, num_vars = TrainedACBOSystem.load(config.system), BUCKETS[0]
    scm, nothing = Benchmark(config.benchmark, num_vars), Intervention.none(num_vars)
    optimum = scm.optimum()
    print(
        f"{config.benchmark}: optimum {float(optimum.mean):.3f} at "
        f"{scm.names[int(optimum.variable)]} = {float(optimum.value):.3f}, "
        f"doing nothing {float(scm.mean_outcome(nothing)):.3f}"
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
        chosen, action = "to set nothing", nothing
        if variable >= 0:
            chosen = f"{scm.names[variable]} = {value:.3f}"
            action = Intervention.single(variable, value, num_vars)
        scores.append(float(scm.mean_outcome(action)))
        print(
            f"seed {seed}: after {config.steps} experiments recommends {chosen}, "
            f"E[Y | do] = {scores[-1]:.3f}"
        )
    return scores


if __name__ == "__main__":
    with settings.errors_for_people():
        settings.use_compilation_cache(HERE / "artifacts" / "cache")
        commands = {"suggest": Suggest, "demo": Demo}
        chosen = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        suggest(chosen) if isinstance(chosen, Suggest) else demo(chosen)
