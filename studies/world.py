"""Systems outside the narrow world: their first answers on every suite of problems (`SUITES` of
lib/problems.py), with the check and without (surrogates of stage 2 only without), beside methods
that learned nothing.

    python studies/world.py --systems pretrained/acbo.eqx artifacts/hour/surrogate.eqx --expert 30

Models of 3 to 8 variables, `num_obs` observations and two interventions per variable, where the
suite does not say otherwise. Methods and figures see only what is kept in `<folder>/<suite>.npz`,
and a file that is there is not drawn again: given it, an older `lib` answers the same problems.

`regret` is 0 for the best single setting and 1 for doing nothing, over the problems in which .25
deviations can be gained; `above first's` its paired difference to the first system, checked or not;
`worse` the share of recommendations that are worse than doing nothing by .05 deviations; `wild`
that of those whose true effect is more than 3 standard deviations of their band from the predicted
one; `cover` that of effects inside their 90 % bands; `claims` that of answers that promise a gain
beyond the band where it is below .02 deviations; `parent F1` and `false parents` are of variables
with a marginal above .5, the latter a number. Deviations are Y's over observational rows. Intervals
are 95 %, over problems. In the suites `told_parent` and `told_other` one edge into Y is told, a
true or a false one, of problems of `old`: `others' F1` is that of all other variables as parents,
`contradicted` the share in which the probability untold is below .05, as an answer would say. `bo`
and the expert start from the fewest observational rows that a problem of the suite has, if there
are ten.
"""

import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from lib import baselines, problems, settings
from lib.answer import SURPRISE
from lib.artifacts import read_header, replace_file
from lib.buffer import MIN_OBSERVATIONS, ExperienceBuffer
from lib.check import PROCESSES, check
from lib.expert import run_gp_ei, run_parent_scale
from lib.expert_posterior import ParentScaleConfig
from lib.metrics import (
    Record,
    cells,
    normalised_regret,
    parent_f1,
    render,
    summarise,
    write_results,
)
from lib.scm import AbstractSCM, value_grid
from lib.scm_prior import SCMPrior
from lib.surrogate import ParentSetPredictionModel
from lib.system import TrainedACBOSystem, load_surrogate


NUM_BINS, HALF_BAND, UNCHECKED, UNTOLD = 16, 1.645, " unchecked", " untold"
HINTS = "told_parent", "told_other"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Config:
    """Settings of the study."""

    systems: tuple[Path, ...] = (Path("pretrained/acbo.eqx"),)
    """Artifacts of stage 4 or 2; differences are to the first."""
    suites: tuple[str, ...] = (
        *("old", "hidden", "quiet", "rows", "inert"),
        *("copies", "feedback", "designed", "mixed", *HINTS),
    )
    """Kinds of problems."""
    num_problems: int = 300
    """Problems of each kind."""
    num_obs: int = 50
    """Observational rows."""
    expert: int = 0
    """The first problems of each kind that the expert plays too; it is slow."""
    seed: int = 8_000_113
    """Seed of the problems; no other script has it."""
    folder: Path = Path("artifacts/studies/world")
    """Where problems and tables go."""

    def __post_init__(self):
        settings.validate(self)


class Recorded(AbstractSCM):
    """What a file keeps of a model: it can be judged by, not sampled."""

    target: Int[Array, ""]
    low: Float[Array, " vars"]
    high: Float[Array, " vars"]
    var_mask: Bool[Array, " vars"]
    parents: Bool[Array, " vars"]
    effects: Float[Array, "vars bins"]
    baseline: Float[Array, ""]
    names: tuple[str, ...] = ()
    known: Int[Array, "vars vars"] | None = None

    @property
    def task(self):
        task = super().task
        return task if self.known is None else replace(task, known=self.known)

    def draw_noise(self, key, num_samples):
        return jnp.zeros((num_samples, len(self.low)))

    def simulate(self, noise, intervention):
        return noise

    def reference_noise(self):
        return self.draw_noise(jr.key(0), 1)


def stored(name: str, config: Config) -> Arrays:
    """The problems of a suite (leading axis `problems`), drawn if there is no file of them."""
    path = config.folder / f"{name}.npz"
    if not path.exists():
        design = problems.DataDesign(config.num_obs, config.num_obs)
        kind, key = problems.suite(name, SCMPrior(), design), settings.stage_key(config.seed, name)
        scm, truth, buffer = problems.draw_problems(key, config.num_problems, *kind, NUM_BINS)
        task = {k: getattr(scm, k) for k in ("target", "low", "high", "var_mask")}
        content = io.BytesIO()
        np.savez_compressed(content, **jax.device_get(vars(buffer) | vars(truth) | task))
        replace_file(path, content.getvalue())
    with np.load(path) as file:
        return {key: file[key][: config.num_problems] for key in file.files}


def hinted(known: Arrays, truly: bool, seed: int) -> Arrays:
    """The problems in which Y has a parent and another variable is none, with one of the former
    (if `truly`) or of the latter told to be a parent; in tens, for `in_batches`.
    """
    others = known["var_mask"] & (np.arange(known["var_mask"].shape[1]) != known["target"][:, None])
    kinds = known["parents"], others & ~known["parents"]
    both = np.flatnonzero(kinds[0].any(1) & kinds[1].any(1))
    both = both[: max(len(both) // 10 * 10, 1)]
    u = np.random.default_rng(seed).random(others.shape)
    which = np.argmax(u * (kinds[0] if truly else kinds[1]), axis=1)[both]
    known = {name: values[both] for name, values in known.items()}
    edges = np.zeros((len(both), *2 * others.shape[1:]), np.int32)
    edges[np.arange(len(both)), which, known["target"]] = 1
    return known | {"known": edges}


def outcome(scm: Recorded, variable, value, *surface: Float[Array, "vars bins"]) -> dict:
    """What setting a variable (-1: none) does, true effects linear between stored ones; with a
    `surface`, mean and ends of the band, also what is predicted, and the share of effects inside.
    """
    bins, can = value_grid(scm.low, scm.high, NUM_BINS)[variable], scm.candidates[:, None]
    at = [jnp.interp(value, bins, table[variable]) for table in (scm.effects, *surface)]
    found = {"reached": jnp.where(variable < 0, scm.baseline, at[0]), "acts": variable >= 0}
    if surface:
        inside = can & (surface[1] <= scm.effects) & (scm.effects <= surface[2])
        found["cover"] = inside.sum() / (NUM_BINS * can.sum())
        found |= {"mean": at[1], "std": (at[3] - at[2]) / (2 * HALF_BAND)}
    return found


@eqx.filter_jit
def play(
    surrogates: dict, alone: tuple[str, ...], given: tuple, most: int, num_obs: int, expert: int
) -> dict:
    """The `outcome` of every method (leading axis `problems`) from `given` models and buffers, with
    at most `most` experiments in each, and what it believes of parents; without the check of
    surrogates that are `alone`; of the expert's family from `num_obs` observational rows, of the
    expert itself on the first `expert` problems.
    """

    def by_check(scm, checked):
        ends = checked.belief.quantile(0.05), checked.belief.quantile(0.95)
        return outcome(scm, *checked.recommended(), checked.belief.mean, *ends)

    def by_expert(method, scm, buffer):
        few = buffer.only(~buffer.observational | (jnp.cumsum(buffer.observational) <= num_obs))
        front = jnp.argsort(~few.valid, stable=True)[: num_obs + most]
        few = jax.tree.map(lambda leaf: leaf[front], few)
        run = method(jr.key(0), scm, few, ParentScaleConfig(num_obs, 0))
        return run, outcome(scm, run.recommended_variable[0], run.recommended_value[0])

    def cheap(problem):
        scm, buffer = problem
        found = {"additive_ridge": outcome(scm, *baselines.additive_ridge(buffer, scm.task))}
        if num_obs >= MIN_OBSERVATIONS:
            found["bo"] = by_expert(run_gp_ei, scm, buffer)[1]
        some = next(iter(surrogates.values()))  # which one does not matter: it has no weight
        processes = check(some, buffer, scm.task, most, PROCESSES)
        found["gaussian_processes"] = by_check(scm, processes)
        for name, surrogate in surrogates.items():
            checked = None if name in alone else check(surrogate, buffer, scm.task, most)
            output = checked.output if checked else surrogate.predict(buffer, scm.task)
            half, parents = HALF_BAND * output.effect_std, {"marginals": output.marginals()}
            surface = output.effect_mean, output.effect_mean - half, output.effect_mean + half
            believed = outcome(scm, *output.best(), *surface) | parents
            if checked is None:
                found[name] = believed
            else:
                found |= {name: by_check(scm, checked) | parents, name + UNCHECKED: believed}
        return found

    def slow(problem):
        run, found = by_expert(run_parent_scale, *problem)
        return found | {"marginals": run.posterior(problem[0].target, 0).marginals()}

    found = problems.in_batches(cheap, given)
    if expert and num_obs >= MIN_OBSERVATIONS:
        first = jax.tree.map(lambda leaf: leaf[:expert], given)
        found["parent_scale"] = problems.in_batches(slow, first)
    return found


def judge(said: Arrays, known: Arrays, least_gain: float = 0.25) -> Arrays:
    """Figures of one method by name, each `[problems]`, on the first of the `known` problems, as
    many as it has an `outcome` of; regret is NaN where less than `least_gain` can be gained.
    """
    reached = said["reached"]
    known = {key: values[: len(reached)] for key, values in known.items()}
    y = np.take_along_axis(known["values"], known["target"][:, None, None], 2)[..., 0]
    rows = known["valid"] & ~known["intervened"].any(2)
    rows = np.where(rows.sum(1, keepdims=True) > 1, rows, known["valid"])
    usual, unit = y.mean(1, where=rows), y.std(1, where=rows)
    nothing, best = known["baseline"], known["effects"].min((1, 2))
    pays, regret = nothing - best >= least_gain * unit, np.full(len(unit), np.nan)
    regret[pays] = normalised_regret(reached[pays], best[pays], nothing[pays])
    found = {"regret": regret, "worse": reached - nothing > 0.05 * unit}
    if "std" in said:
        promises = usual - said["mean"] > HALF_BAND * said["std"] + 0.02 * unit
        found["wild"] = said["acts"] & (np.abs(reached - said["mean"]) > 3 * said["std"])
        found["cover"] = said["cover"]
        found["claims"] = said["acts"] & promises & (nothing - reached < 0.02 * unit)
    if "marginals" in said:
        believed, exists = said["marginals"] > 0.5, known["var_mask"]
        found["parent F1"] = parent_f1(believed, known["parents"], exists)
        found["false parents"] = (believed & ~known["parents"]).sum(1)
        if "known" in known:
            told = known["known"].any(2)
            rest = exists & ~told
            found["others' F1"] = parent_f1(believed, known["parents"], rest)
            found["contradicted"] = (told & (said["marginals"] < SURPRISE)).any(1)
    return found


def measure(name: str, surrogates: dict, alone: tuple[str, ...], config: Config) -> list[Record]:
    """All records of one suite."""
    known, first = stored("old" if name in HINTS else name, config), next(iter(surrogates))
    if name in HINTS:
        known = hinted(known, name == HINTS[0], config.seed)
    model: dict[str, Any] = {key: jnp.asarray(values) for key, values in known.items()}
    rows = [model.pop(key) for key in ("values", "intervened", "valid")]
    given = Recorded(**model), jax.vmap(ExperienceBuffer)(*rows)
    observed = (known["valid"] & ~known["intervened"].any(2)).sum(1)
    most = known["valid"].shape[1] - int(observed.max())  # places for experiments
    sizes = most, int(observed.min())
    said = jax.device_get(play(surrogates, alone, given, *sizes, config.expert))
    if name in HINTS:
        plain = play(surrogates, alone, (replace(given[0], known=None), given[1]), *sizes, 0)
        ours = [method for method in plain if method.removesuffix(UNCHECKED) in surrogates]
        said |= {method + UNTOLD: jax.device_get(plain[method]) for method in ours}
    least_gain = np.inf if name == "inert" else 0.25
    figures = {method: judge(answers, known, least_gain) for method, answers in said.items()}
    records = []
    for method, found in figures.items():
        rival = first + UNCHECKED * (UNCHECKED in method and first not in alone)
        if method != rival:
            ours = figures[rival]["regret"][: len(found["regret"])]
            found = {"regret": found["regret"], "above first's": found["regret"] - ours} | found
        for figure, values in found.items():
            defined = values[~np.isnan(values)]
            if len(defined):
                records += cells("world", name, method, {figure: summarise(defined)}, len(defined))
    return records


def surrogate_in(path: Path) -> tuple[ParentSetPredictionModel, bool]:
    """That of a system, or one of its own, and whether it is one."""
    if read_header(path)["stage"] == "surrogate":
        return load_surrogate(path)[0], True
    return TrainedACBOSystem.load(path).surrogate, False


def main(config: Config) -> Path:
    """Play every suite, print and write the table; returns the folder."""
    settings.use_compilation_cache(Path("artifacts/cache"))
    systems = {path.with_suffix("").as_posix(): surrogate_in(path) for path in config.systems}
    surrogates = {name: surrogate for name, (surrogate, _) in systems.items()}
    alone = tuple(name for name, (_, own) in systems.items() if own)
    records = []
    for name in tqdm(config.suites, desc="suites"):
        records += measure(name, surrogates, alone, config)
    write_results(config.folder, records, config.seed)
    print(render(records, "world"))
    return config.folder


if __name__ == "__main__":
    with settings.errors_for_people():
        main(tyro.cli(Config, description=__doc__))
