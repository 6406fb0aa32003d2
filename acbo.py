"""The trained system in three lines of Python: ask what to try next, tell what came of it.

    system = acbo.load()
    suggestion = system.ask("examples/experiments.csv", "yield", objective="max")
    system.tell(suggestion, {"temperature": 61.3, "catalyst": 8, ..., "yield": 66.2})

`print(suggestion)` is what `06_deploy.py suggest` prints, `suggestion.answer` what it prints with
`--json`; `suggestion.settings` is what to set, such as `{"catalyst": 8.0}`. Tables are paths of
CSV files, dicts of columns, numpy arrays with named fields, or data frames (whatever speaks the
interchange protocol): a column per variable, a row per experiment, and a column `intervened` that
names what was set by hand, empty for an observation. The folder of this file must be on the path.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lib.answer import (
    as_text,
    elsewhere,
    imagined,
    in_own_units,
    resting_on_one,
    toward,
    within_lots,
)
from lib.buffer import ExperienceBuffer
from lib.knowledge import known_edges, within
from lib.observing import observe, with_row
from lib.reading import Experience, Scale, read_experiments
from lib.system import BUCKETS, DeploymentConfig, TrainedACBOSystem, deploy_trained_system
from lib.table import INTERVENED, demand, read_bounds, refuse, told


SHIPPED = Path(__file__).resolve().parent / "pretrained" / "acbo.eqx"
MAX_REMAINING = 1_000_000
MAX_BATCH = 64


@dataclass(frozen=True)
class Question:
    """What is asked about a table."""

    data: Any
    """Table of experiments."""
    target: str
    """Column to optimise."""
    objective: Literal["min", "max"] | None = None
    """Make the target small or large (or give target_value)."""
    bounds: Any = None
    """Ranges of intervention: a table (variable,low,high), or a dict of names and (low, high)."""
    remaining: int = 10
    """Experiments that you can still afford, this one included."""
    worth: float = 0.02
    """Gain from which one more experiment is worth it, in deviations of the target."""
    outcome_scale: Scale = "auto"
    """Whether the target is worked in logarithms; auto: where it is positive and spans decades."""
    target_value: float | None = None
    """Bring the target to this value instead."""
    require: tuple[str, ...] = ()
    """A variable known to be a parent of the target, or an edge "a -> b"; may be repeated."""
    forbid: tuple[str, ...] = ()
    """A variable known to be none, or an edge "a -> b" known to be absent; may be repeated."""
    tiers: Any = None
    """Tiers, causes before effects: a table (variable,tier), or a dict of names and numbers."""
    constraint: tuple[str, ...] = ()
    """A limit such as "a + 2 b <= 1", others being at their usual values; may be repeated."""
    batch: int = 1
    """Experiments to run side by side."""
    curves: bool = False
    """Also give the whole predicted curve of every variable that can be set."""

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

    def read(self) -> tuple[Experience, float]:
        """The table and all that is known beside it: data with ranges and known edges, and what the
        target is to come to, a deviation.
        """
        bounds = () if self.bounds is None else read_bounds(self.bounds)
        data = read_experiments(self.data, self.target, bounds, self.outcome_scale)
        data = within(data, self.constraint)
        data = known_edges(data, self.require, self.forbid, self.tiers)
        goal = data.units.one(data.target).exact(self.target_value or 0.0).item()
        demand(
            self.target_value is None or math.isfinite(goal),
            f"--target-value {self.target_value}: give a number that '{self.target}' can have",
        )
        return data, goal


class Suggestion(NamedTuple):
    """An answer, the question, and the data as they were read."""

    question: Question
    data: Experience
    answer: dict[str, Any]

    @property
    def settings(self) -> dict[str, float | str]:
        """What to set in the next experiment, by name; empty where nothing can be set."""
        return self.answer["next_experiment"]["settings"]

    def __str__(self) -> str:
        return as_text(self.answer)


class System(NamedTuple):
    """A trained system that answers about tables."""

    trained: TrainedACBOSystem
    name: str

    def ask(
        self,
        data: Any,
        target: str,
        objective: Literal["min", "max"] | None = None,
        **options: Any,
    ) -> Suggestion:
        """The next experiment, and all else that the system has to say; `options` as in `Question`.
        Raises `DataError`, a `ValueError`, with a line for each thing that is wrong.
        """
        return self.answer(Question(data, target, objective, **options))

    def tell(self, suggestion: Suggestion, row: Mapping[str, Any]) -> Any:
        """Add what came of a suggested experiment to the table that was asked about: a file is
        written to and its path returned, of columns in memory a dict with one row more.

        `row` has a value for every column, None where it was not measured; of what was set, the
        suggestion's if left out. Raises `DataError` as `lib.observing.observe` does.
        """
        settings, data = suggestion.settings, suggestion.question.data
        row = {**settings, INTERVENED: list(settings), **row}
        if not isinstance(data, (str, Path)):
            return with_row(data, row)
        observe(Path(data), row)
        return data

    def answer(self, question: Question) -> Suggestion:
        """As `ask`."""
        data, goal = question.read()
        demand(
            len(data.names) <= BUCKETS[-1],
            f"{data.where}: {len(data.names)} variables, at most {BUCKETS[-1]} are supported: "
            "leave out columns that cannot matter",
        )
        deployed = deploy_trained_system(
            self.trained, DeploymentConfig(question.objective or "min")
        )

        def ask(buffer: ExperienceBuffer):
            asked = jax.device_get(deployed(buffer, data.task, question.remaining))
            return asked if question.target_value is None else toward(asked, goal, data.task)

        said = ask(data.buffer)
        demand(
            all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(said._replace(parent_sets=()))),
            f"{data.where}: the answer is not finite: look for cells far from the others, and for "
            "columns in different units",
        )
        following = []
        for _ in range(question.batch):
            ahead = [*data.planned, *(asked.experiment for asked in following)]
            asked = ask(imagined(data.buffer, said, ahead, data.target)) if ahead else said
            following.append(elsewhere(data, asked, ahead))
        answer: dict[str, Any] = in_own_units(question, data, said, following)
        answer["system"] = self.name
        if not data.blocked:
            answer["warnings"] += resting_on_one(data, said, ask) + within_lots(data, ask)
        return Suggestion(question, data, answer)


def load(path: str | Path = SHIPPED) -> System:
    """The system that comes with this file, or another that stage 4 made. Raises `ArtifactError`
    where that cannot be read.
    """
    return System(TrainedACBOSystem.load(path), Path(path).name)
