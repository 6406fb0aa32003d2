"""Stage 6: the trained system at work, without the expert and without ground truth.

The next experiment for data of your own; a result added to them; a whole campaign with a command
that makes the experiments; a page to look at and to send; a campaign whose truth is known:

    python 06_deploy.py suggest --data experiments.csv --target yield --objective max
    python 06_deploy.py observe --data experiments.csv --row '{"catalyst": 8, "yield": 66, ...}'
    python 06_deploy.py run --data experiments.csv --target yield --objective max --experiment ./lab
    python 06_deploy.py report --data experiments.csv --target yield --objective max
    python 06_deploy.py demo --benchmark toy --seeds 3

Data: one row per experiment, one column per variable, and a column `intervened` that names what was
set by hand in that row (empty for an observation); `lib/reading.py` says what else is read. Ranges
(`--bounds`): a CSV with columns variable,low,high and perhaps step, levels, scale or cost; a
variable that it does not list is never intervened on. Without it, each variable within what it was
set to, or seen at. Bad input ends with a line for each thing that is wrong, and exit status 2.
The same question gets the same answer: nothing is drawn. `--version` says which system answers.
`acbo.py` is the same from Python.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import equinox as eqx
import tyro
from tabulate import tabulate

import acbo
from lib import settings
from lib.answer import VERSION, text
from lib.artifacts import digest
from lib.literature import Benchmark
from lib.observing import made_by, observe, row_of
from lib.problems import DataDesign, draw_data
from lib.scm import Intervention
from lib.system import BUCKETS, TrainedACBOSystem
from lib.table import INTERVENED, demand, find, read_table, refuse, told


@dataclass(frozen=True)
class Suggest(acbo.Question):
    """Read experiments, print likely parents, expected effects and the next experiment.

    python 06_deploy.py suggest --data experiments.csv --target yield --objective max
    """

    data: Path
    """CSV of experiments."""
    bounds: Path | None = None
    """CSV of ranges of intervention (variable,low,high)."""
    tiers: Path | None = None
    """CSV of tiers (variable,tier): causes before effects."""
    system: Path = acbo.SHIPPED
    """Trained system; the default is the one that comes with this script."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Observe:
    """Add a result behind the last row of a file of experiments.

    python 06_deploy.py observe --data experiments.csv --row '{"intervened": "catalyst", "catalyst":
    8, "temperature": 61.3, "stirring": 190, "impurity": 1.8, "yield": 66.2}'
    """

    data: Path
    """CSV of experiments."""
    row: str
    """JSON object: each column's value (null: not measured), in `intervened` the names of what was
    set by hand.
    """


@dataclass(frozen=True)
class Run(Suggest):
    """Suggest, have a command make the experiment, write its result, and again.

    python 06_deploy.py run --data experiments.csv --target yield --objective max
    --experiment "python examples/plant.py" --until 20

    The file is all that is kept: stopped and started again, it goes on. `--remaining` is what is
    left `--until` then.
    """

    experiment: str = ""
    """Command that reads one JSON object from standard input, what to set ({} for nothing), and
    prints one with a value for every column.
    """
    until: int = 20
    """Experiments in the file at the end: rows in which something was set."""
    timeout: float = 3600.0
    """Seconds that an experiment may take."""

    def __post_init__(self):
        super().__post_init__()
        refuse(
            told(
                (not self.experiment.strip(), "--experiment: give a command that makes one"),
                (not self.timeout > 0, f"--timeout {self.timeout}: give a number above 0"),
                (self.batch > 1, "--batch: a command makes one experiment after the other"),
                (self.until < 1, f"--until {self.until}: give a number of at least 1"),
            )
        )


@dataclass(frozen=True)
class Report(Suggest):
    """Suggest, and write the answer as a page for people, with figures.

    python 06_deploy.py report --data experiments.csv --target yield --objective max
    """

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
    """Play whole campaigns on a benchmark whose truth is known, and score what is recommended.

    python 06_deploy.py demo --benchmark toy --seeds 3
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
    """Tune the policy by GRPO at every state, scored by what an experiment is expected to gain."""
    system: Path = acbo.SHIPPED
    """Trained system; the default is the one that comes with this script."""

    def __post_init__(self):
        settings.validate(self)


def suggest(config: Suggest) -> dict:
    """Answer for one data set; prints it and returns it. Raises `DataError` as `acbo.System.ask`
    does.
    """
    return printed(acbo.load(config.system).answer(config), config)


def printed(suggestion: acbo.Suggestion, config: Suggest) -> dict:
    """Print a suggestion as it is asked for; returns the answer."""
    answer = suggestion.answer
    print(json.dumps(answer, allow_nan=False) if config.json else suggestion)
    return answer


def observe_row(config: Observe) -> None:
    """Add a result to a file; raises `DataError` as `lib.observing.observe` does."""
    line = observe(config.data, row_of(config.row, "--row"))
    print(f"{config.data}: written as row {line}")


def run(config: Run) -> None:
    """A campaign with experiments that a command makes, one line each. Raises `DataError` as
    `suggest` does, and where an experiment fails; the file then holds all that came before.
    """
    system = acbo.load(config.system)
    while True:
        done = read_table(config.data).num_experiments
        suggestion = system.answer(replace(config, remaining=max(config.until - done, 1)))
        if done >= config.until or not suggestion.settings:  # the answer says why none is made
            break
        said = suggestion.answer["next_experiment"]
        row = made_by(config.experiment, suggestion.settings, config.timeout)
        # whatever the command calls it, it is an experiment: `until` counts it
        system.tell(suggestion, {**row, INTERVENED: list(suggestion.settings)})
        setting = ", ".join(f"{name} = {text(to)}" for name, to in suggestion.settings.items())
        target = suggestion.answer["target"]
        outcome = {find(name, [target]): value for name, value in row.items()}[target]
        print(
            f"{done + 1}/{config.until}  {setting}:  {target} {outcome}, expected "
            f"{text(said['low'])} to {text(said['high'])}",
            flush=True,
        )
    printed(suggestion, config)


def report(config: Report) -> dict:
    """Answer for one data set, printed and written as a page; raises `DataError` as `suggest` does,
    and where the page cannot be written.
    """
    # here: the other commands need no matplotlib
    from lib.figures import Story
    from lib.report import write

    suggestion = acbo.load(config.system).answer(replace(config, curves=True))
    beside = write(config.out, Story(suggestion.data, suggestion.answer, asdict(config)))
    print(f"page: {config.out}, its figures: {beside}", file=sys.stderr)
    return printed(suggestion, config)


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
            shipped = acbo.SHIPPED
            print(f"answers of format {VERSION} by {shipped.name}, {digest(shipped)[:12]}")
            sys.exit()
        settings.use_compilation_cache(settings.user_cache())
        commands = {
            "suggest": (Suggest, suggest),
            "report": (Report, report),
            "observe": (Observe, observe_row),
            "run": (Run, run),
            "demo": (Demo, demo),
        }
        chosen = tyro.extras.subcommand_cli_from_dict(
            {name: config for name, (config, _) in commands.items()},
            description=__doc__,
            config=(tyro.conf.UseAppendAction,),
        )
        dict(commands.values())[type(chosen)](chosen)
