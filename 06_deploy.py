"""Stage 6: the trained system at work, without the expert and without ground truth.

The next experiment for data of your own, and a whole campaign on a system whose truth is known:

    python 06_deploy.py suggest --data experiments.csv --target Y --objective min
    python 06_deploy.py report --data experiments.csv --target Y --objective min --out report.html
    python 06_deploy.py demo --benchmark toy --seeds 3

Data: one row per experiment, one column per variable, and a column `intervened` that names what was
set by hand in that row (empty for an observation); `lib/reading.py` says what else is read. Ranges
(`--bounds`): a CSV with columns variable,low,high and perhaps step, levels, scale or cost; a
variable that it does not list is never intervened on. Without it, each variable within what it was
set to, or seen at. Bad input ends with a line for each thing that is wrong, and exit status 2.
The same question gets the same answer: nothing is drawn. `--version` says which system answers.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import numpy as np
import tyro
from tabulate import tabulate
from tyro.conf import UseAppendAction

from lib import settings
from lib.answer import (
    VERSION,
    as_text,
    elsewhere,
    imagined,
    in_own_units,
    resting_on_one,
    toward,
    within_lots,
)
from lib.artifacts import digest
from lib.buffer import ExperienceBuffer
from lib.knowledge import known_edges, within
from lib.literature import Benchmark
from lib.problems import DataDesign, draw_data
from lib.reading import Scale, read_experiments
from lib.scm import Intervention
from lib.system import BUCKETS, DeploymentConfig, TrainedACBOSystem, deploy_trained_system
from lib.table import demand, read_bounds, refuse, told


HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "pretrained" / "acbo.eqx"
MAX_REMAINING = 1_000_000
MAX_BATCH = 64


@dataclass(frozen=True)
class Suggest:
    """Read experiments, print likely parents, expected effects and the next experiment."""

    data: Path
    """CSV of experiments."""
    target: str
    """Column to optimise."""
    objective: Literal["min", "max"] | None = None
    """Make the target small or large (or give --target-value)."""
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
    outcome_scale: Scale = "auto"
    """Whether the target is worked in logarithms; auto: where it is positive and spans decades."""
    target_value: float | None = None
    """Bring the target to this value instead."""
    require: UseAppendAction[tuple[str, ...]] = ()
    """A variable that is known to be a parent of the target; may be repeated."""
    forbid: UseAppendAction[tuple[str, ...]] = ()
    """A variable that is known to be none; may be repeated."""
    tiers: Path | None = None
    """CSV of tiers (variable,tier): causes before effects."""
    constraint: UseAppendAction[tuple[str, ...]] = ()
    """A limit such as "a + 2 b <= 1", others being at their usual values; may be repeated."""
    batch: int = 1
    """Experiments to run side by side."""
    curves: bool = False
    """Also give the whole predicted curve of every variable that can be set (with --json)."""

    def __post_init__(self):
        refuse(
            told(
                (
                    not 1 <= self.remaining <= MAX_REMAINING,
                    f"--remaining {self.remaining}: give the experiments that you can "
                    f"still afford, 1 to {MAX_REMAINING}",
                ),
                (
                    (self.objective is None) == (self.target_value is None),
                    "give --objective min, --objective max or --target-value, one of them",
                ),
                (
                    not 1 <= self.batch <= MAX_BATCH,
                    f"--batch {self.batch}: give a number from 1 to {MAX_BATCH}",
                ),
                (
                    not (math.isfinite(self.worth) and self.worth >= 0),
                    f"--worth {self.worth}: give a number of at least 0",
                ),
            )
        )


@dataclass(frozen=True)
class Report(Suggest):
    """Answer as `suggest` does, and write it as a page for people, with figures."""

    out: Path = Path("report.html")
    """HTML page to write; its figures are written beside it as a PNG."""

    def __post_init__(self):
        super().__post_init__()
        demand(
            self.out.suffix.lower() in (".html", ".htm"),
            f"--out {self.out}: give a name that ends in .html",
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
    """Tune the policy by GRPO at every state, scored by what an experiment is expected to gain."""
    system: Path = SHIPPED
    """Trained system; the default is the one that comes with this script."""

    def __post_init__(self):
        settings.check(self)


def suggest(config: Suggest) -> dict:
    """Answer for one data set; prints it and returns it. Raises `DataError` as `read_experiments`
    and `read_bounds` do, for more columns than the system takes, and where the answer is not
    finite.
    """
    bounds = read_bounds(config.bounds) if config.bounds else ()
    data = read_experiments(config.data, config.target, bounds, config.outcome_scale)
    demand(
        len(data.names) <= BUCKETS[-1],
        f"{config.data}: {len(data.names)} variables, at most {BUCKETS[-1]} are supported: "
        "leave out columns that cannot matter",
    )
    data, edges = known_edges(
        within(data, config.constraint), config.require, config.forbid, config.tiers
    )
    goal = data.units.one(data.target).exact(config.target_value or 0.0).item()
    demand(
        config.target_value is None or math.isfinite(goal),
        f"--target-value {config.target_value}: give a number that '{config.target}' can have",
    )
    deployed = deploy_trained_system(
        TrainedACBOSystem.load(config.system), DeploymentConfig(config.objective or "min")
    )

    def ask(buffer: ExperienceBuffer):
        asked = jax.device_get(deployed(buffer, data.task, config.remaining, *edges))
        return asked if config.target_value is None else toward(asked, goal, data.task)

    said = ask(data.buffer)
    demand(
        all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(said._replace(parent_sets=()))),
        f"{config.data}: the answer is not finite: look for cells far from the others, and for "
        "columns in different units",
    )
    following = []
    for _ in range(config.batch):
        ahead = [*data.planned, *(asked.experiment for asked in following)]
        asked = ask(imagined(data.buffer, said, ahead, data.target)) if ahead else said
        following.append(elsewhere(data, asked, ahead))
    answer = in_own_units(config, data, said, following)
    if not data.blocked:
        answer["warnings"] += resting_on_one(data, said, ask) + within_lots(data, ask)
    print(json.dumps(answer, allow_nan=False) if config.json else as_text(answer))
    return answer


def report(config: Report) -> dict:
    """Answer for one data set as `suggest` does, and write the page; returns the answer. Raises
    `DataError` also where the page cannot be written.
    """
    from lib.report import Story, write  # here: the other commands need no matplotlib

    answer = suggest(replace(config, curves=True))
    bounds = read_bounds(config.bounds) if config.bounds else ()
    data = read_experiments(config.data, config.target, bounds, config.outcome_scale)
    data, _ = known_edges(
        within(data, config.constraint), config.require, config.forbid, config.tiers
    )
    beside = write(config.out, Story(data, answer, asdict(config)))
    print(f"page: {config.out}, its figures: {beside}", file=sys.stderr)
    return answer


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
    design = DataDesign(config.num_obs, config.num_obs, config.per_variable)
    first = eqx.filter_jit(lambda key: draw_data(key, scm, design))
    scores = []
    for seed in range(config.seeds):
        data_key, play_key = (settings.stage_key(seed, "demo", use) for use in ("data", "play"))
        result = system.run_optimization(
            scm, config.steps, config.online, buffer=first(data_key), key=play_key
        )
        if seed == 0:
            columns = {
                "step": range(1, config.steps + 1),
                "set": [scm.names[i] for i in result.variable.tolist()],
                "to": result.value.tolist(),
                "outcome": result.outcome.tolist(),
            }
            print(tabulate(columns, headers="keys", floatfmt=".3f"))
        variable, value = int(result.recommended_variable[-1]), float(result.recommended_value[-1])
        setting = f"{scm.names[variable]} = {value:.3f}" if variable >= 0 else "to set nothing"
        action = Intervention.single(variable, value, num_vars) if variable >= 0 else nothing
        scores.append(float(scm.mean_outcome(action)))
        print(
            f"seed {seed}: after {config.steps} experiments recommends {setting}, "
            f"E[Y | do] = {scores[-1]:.3f}"
        )
    return scores


if __name__ == "__main__":
    with settings.errors_for_people():
        if sys.argv[1:] == ["--version"]:
            print(f"answers of format {VERSION} by {SHIPPED.name}, {digest(SHIPPED)[:12]}")
            sys.exit()
        settings.use_compilation_cache(HERE / "artifacts" / "cache")
        commands = {"suggest": Suggest, "report": Report, "demo": Demo}
        chosen = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        {Suggest: suggest, Report: report, Demo: demo}[type(chosen)](chosen)
