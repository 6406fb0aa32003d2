"""The check (`lib/check.py`) in the simulator that its surrogate was trained on, outside, and what
each of its parts contributes to both.

    python studies/check.py --num-problems 300

In the simulator all play the same problems with the same noise, from 50 or 200 observations and two
interventions per variable. `regret@t` is the simple regret (0 the best single intervention, 1 doing
nothing) of what is recommended after t experiments, with paired differences from `acbo_unchecked`
and `surrogate_ei`; `bands` the share of true effects inside the 90 % bands of the first answer;
`worse` and `nothing` the shares of last recommendations that are worse than doing nothing by .02
deviations of the target, and that are doing nothing. Outside it is `suggest` that answers, on the
systems of `studies/field`, whose figures `studies/field/run.py` explains. Intervals are 95 %, over
problems; outside, over systems.
"""

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from tqdm import tqdm

from lib import settings
from lib.check import BELIEFS, PROCESSES, CheckConfig, check
from lib.methods import OptimizationScenario, make_method
from lib.metrics import Record, cells, normalised_regret, render, summarise, write_results
from lib.problems import in_batches, optima
from lib.scm import Intervention
from lib.scm_prior import SCMPrior
from lib.system import TrainedACBOSystem, deploy_trained_system


field = importlib.import_module("studies.field.run")
SYSTEMS = field.module_of("field_systems", field.HERE / "systems.py").SYSTEMS
PARTS = {
    "no flat effects": replace(BELIEFS, flat_prob=0.0, no_effects_prob=0.0),
    "no world without effects": replace(BELIEFS, no_effects_prob=0.0),
    "ranges of any length": replace(BELIEFS, far_std=np.inf),
    "no outliers": replace(BELIEFS, outlier_prob=0.0),
    "no anchor": replace(BELIEFS, anchor_std=np.inf),
    "nothing only if its mean is lower": replace(BELIEFS, least_gain_ratio=0.0),
    "the policy alone chooses": replace(BELIEFS, least_gain_share=0.0),
    "the gain alone chooses": replace(BELIEFS, least_gain_share=1.0),
}
# the surrogate alone, as the check has it: its bands are those of `acbo_unchecked`
UNCHECKED = replace(
    PROCESSES, wrong_shares=(0.0,), far_std=np.inf, least_gain_ratio=0.0, least_gain_share=0.0
)
BEFORE = {"acbo_unchecked": UNCHECKED, "gaussian_processes": PROCESSES}


@dataclass(frozen=True)
class Config:
    """Settings of the study."""

    system: Path = Path("pretrained/acbo.eqx")
    """A trained system."""
    sizes: tuple[int, ...] = (5, 8)
    """Numbers of variables."""
    num_obs: tuple[int, ...] = (50, 200)
    """Observational rows at the start."""
    num_problems: int = 300
    """Held-out problems of each kind."""
    num_steps: int = 10
    """Experiments per campaign."""
    field_seeds: int = 4
    """First data sets of each system outside."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Those of `studies/field/systems.py`."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Parts to leave out, one at a time."""
    seed: int = 7_000_003
    """Seed of problems and noise; no other script has it."""
    folder: Path = Path("artifacts/studies/check")
    """Where tables go."""

    def __post_init__(self):
        settings.validate(self)


@eqx.filter_jit
def campaigns(name: str, system, beliefs: CheckConfig, keys, problems, num_obs: int, steps: int):
    """True E[Y | do] of each recommendation `[batch, steps + 1]`, whether the last is to do nothing
    `[batch]`, and the share of effects inside the bands of the first answer `[batch]`.
    """

    def one(inputs):
        key, problem = inputs
        scm, buffer = problem.scm, problem.buffer
        most = buffer.valid.shape[0] - num_obs
        if name in BEFORE or name == "surrogate_ei":
            result = make_method(name, system, num_obs, steps)(key, scm, buffer)
        else:
            result = system.play(key, scm, buffer, steps, beliefs=beliefs, most=most)
        size = len(scm.low)
        reached = jax.vmap(lambda i, v: scm.mean_outcome(Intervention.single(i, v, size)))(
            result.recommended_variable, result.recommended_value
        )
        belief = check(system.surrogate, buffer, scm.task, most, beliefs).belief
        effects, can = problem.truth.effects, scm.candidates[:, None]
        inside = (belief.quantile(0.05) <= effects) & (effects <= belief.quantile(0.95))
        share = jnp.where(can, inside, 0).sum() / jnp.where(can, jnp.ones_like(effects), 0).sum()
        return reached, result.recommended_variable[-1] < 0, share

    return in_batches(one, (keys, problems))


def inside_simulator(system, size, num_obs, players, config) -> list[Record]:
    """The players on one kind of problem."""
    prior = SCMPrior(max_vars=max(size, 8), min_size=size, max_size=size)
    kind = OptimizationScenario(f"d={size}, {num_obs} rows", prior, num_obs, 2, config.num_steps)
    draw_key, play_key = (
        settings.stage_key(config.seed, "check", use, kind.name) for use in ("draw", "play")
    )
    bins = system.surrogate.config.num_bins
    problems = kind.draw(draw_key, config.num_problems, bins)
    best = optima(problems.scm)
    keys, baseline = jr.split(play_key, config.num_problems), np.asarray(problems.truth.baseline)
    targets = problems.scm.target[:, None, None]
    outcome = jnp.take_along_axis(problems.buffer.values, targets, axis=2)[:, :num_obs, 0]
    spread = np.asarray(jnp.std(outcome, axis=1))
    records, regrets = [], {}

    def after(regret):
        steps = [t for t in (0, 1, 5, 10) if t <= config.num_steps]
        return {f"regret@{t}": summarise(regret[:, t]) for t in steps}

    for name, beliefs in tqdm(players.items(), desc=kind.name):
        played = campaigns(name, system, beliefs, keys, problems, num_obs, config.num_steps)
        reached, nothing, bands = jax.device_get(played)
        regrets[name] = normalised_regret(reached, best[:, None], baseline[:, None])
        figures = after(regrets[name]) | {
            "bands": summarise(bands),
            "nothing": summarise(nothing),
            "worse": summarise(reached[:, -1] > baseline + 0.02 * spread),
        }
        records += cells("optimisation", kind.name, name, figures, len(keys))
    for rival in ("acbo_unchecked", "surrogate_ei"):
        for name in [name for name in regrets if name not in (rival, "surrogate_ei")]:
            part, above = f"{kind.name}/above {rival}'s, paired", regrets[name] - regrets[rival]
            records += cells("optimisation", part, name, after(above), len(keys))
    return records


class Remembered:
    """A system of `studies/field` that computes each of its truths once, whoever asks."""

    def __init__(self, system):
        self.system, self.known = system, {}

    def __getattr__(self, name):
        found = getattr(self.system, name)
        if name not in ("data", "mean", "best"):
            return found

        def answer(*given):
            key = name, repr(given)
            if key not in self.known:
                self.known[key] = found(*given)
            return self.known[key]

        return answer


def outside(players, config) -> list[Record]:
    """The players' first answers on the systems of `studies/field`."""
    deploy, records = field.project(), []
    systems = [Remembered(SYSTEMS[name]) for name in config.systems]
    for name, beliefs in tqdm(players.items(), desc="outside"):
        deploy.deploy_trained_system = lambda system, config, beliefs=beliefs: (
            deploy_trained_system(system, replace(config, beliefs=beliefs))
        )
        rows = []
        for system in systems:
            each = [
                field.play(deploy, system, s, 0, config.system) for s in range(config.field_seeds)
            ]
            rows.append({key: field.middle([one[key] for one in each]) for key in each[0]})
        columns = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
        known = {key: values[~np.isnan(values)] for key, values in columns.items()}
        figures = {key: summarise(values) for key, values in known.items() if len(values)}
        records += cells("ablation", "outside, first answer", name, figures, len(rows))
    return records


def main(config: Config) -> Path:
    """Measure, print and write the tables; returns the folder."""
    settings.use_compilation_cache(Path("artifacts/cache"))
    system = TrainedACBOSystem.load(config.system)
    records, parts = [], {name: PARTS[name] for name in config.parts}
    for size in config.sizes:
        for num_obs in config.num_obs:
            players = {**BEFORE, "surrogate_ei": UNCHECKED, "acbo": BELIEFS}
            if (size, num_obs) == (config.sizes[-1], config.num_obs[0]):
                players |= parts
            records += inside_simulator(system, size, num_obs, players, config)
    records += outside({**BEFORE, "acbo": BELIEFS, **parts}, config)
    write_results(config.folder, records, config.seed)
    for table in ("optimisation", "ablation"):
        print(render(records, table), end="\n\n")
    return config.folder


if __name__ == "__main__":
    with settings.errors_for_people():
        main(tyro.cli(Config, description=__doc__))
