"""What a system said of a person's file, in the person's own units and words."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri
from tabulate import tabulate

from lib.buffer import ExperienceBuffer
from lib.check import CheckConfig
from lib.reading import Experience
from lib.scm import Intervention, Task
from lib.table import told
from lib.units import rounded


MOST_TRIED = 64  # experiments with what is recommended that are left out in turn
SURPRISE = 0.05  # probability below which what the user knows is against the data
VERSION = "1"  # of the answer's format
REASONS = (  # for an experiment: of another setting than the one to recommend, or of that
    "may turn out better than what is recommended now",
    "the best setting known: one more outcome tells whether it is",
)


def imagined(buffer, said, experiments, target: int) -> ExperienceBuffer:
    """The rows, and some experiments that gave what each is expected to."""
    for variable, value in experiments:
        outcome = np.interp(value, said.grid[variable], said.mean[variable])
        row = jnp.mean(buffer.values, 0).at[variable].set(value).at[target].set(outcome)
        action = Intervention.single(jnp.array(variable), jnp.array(value), len(row))
        buffer = buffer.grow(1).add_intervention(action, row)
    return buffer


def largest(grid: np.ndarray, worth: np.ndarray) -> tuple[int, float]:
    """The variable and the value on its grid of most worth, both `[vars, points]`."""
    i, b = np.unravel_index(worth.argmax(), worth.shape)
    return int(i), float(grid[i, b])


def elsewhere(data: Experience, asked, ahead: list):
    """The answer; where its experiment is one of those `ahead`, or costs differ, with that of the
    largest gain per cost, more than a step of the grid away from all that are ahead.
    """
    (variable, value), grid, count = asked.experiment, asked.grid, len(data.names)
    costs = np.array([data.bounds[i].cost if i in data.bounds else 1.0 for i in range(count)])
    candidates, taken = np.asarray(data.task.candidates), np.zeros(grid.shape, bool)
    for i, x in ((int(i), x) for i, x in ahead if candidates[i]):
        same = [data.value(i, v) == data.value(i, x) for v in grid[i]]
        taken[i] |= same | (np.abs(grid[i] - x) <= 1.01 * (grid[i, 1] - grid[i, 0]))
    own = taken[variable, np.abs(grid[variable] - value).argmin()]
    free = candidates[:, None] & ~taken[:count]
    if not free.any() or (not own and (costs == costs[0]).all()):
        return asked
    worth = np.where(free, asked.gain[:count] / costs[:, None], -1.0)
    return asked._replace(experiment=largest(grid, worth))


def within_lots(data: Experience, ask: Callable[[ExperienceBuffer], Any]) -> list[str]:
    """What would be recommended within each column that looks like lots."""
    found, target = [], data.target
    for name, lot in data.lots:
        outcome = data.buffer.values[:, target]
        mean = (np.bincount(lot, outcome) / np.bincount(lot))[lot]
        values = data.buffer.values.at[:, target].set(outcome - mean + outcome.mean())
        i, best = ask(replace(data.buffer, values=values)).action
        setting = data.setting(int(i), data.value(int(i), best)) if i >= 0 else {}
        found.append(
            f"'{name}' looks like a lot or a batch, between which '{data.names[target]}' differs "
            "more than within: if it is one, within it the recommendation would be to set "
            + (" ".join(f"{name} = {text(to)}" for name, to in setting.items()) or "nothing")
        )
    return found


def resting_on_one(data: Experience, said, ask: Callable[[ExperienceBuffer], Any]) -> list[str]:
    """Which experiments with what is recommended decide alone: without one of them another variable
    would be.
    """
    flags, chosen = np.asarray(data.buffer.intervened), int(said.action[0])
    own = np.flatnonzero((flags.sum(1) == 1) & flags[:, chosen] & (chosen >= 0))[:MOST_TRIED]
    others = [int(ask(data.buffer.only(jnp.arange(len(flags)) != row)).action[0]) for row in own]
    return [
        f"without row {data.lines[row]} the recommendation would be to set {data.names[other]}: "
        "look at that row"
        for row, other in zip(own, others, strict=True)
        if other not in (chosen, -1)
    ]


def toward(said, goal: float, task: Task):
    """The answer for a target that is to come to `goal`, a deviation: the setting whose predicted
    mean is nearest, unless doing nothing is as near, and the experiment that is expected to bring
    it the most nearer.
    """
    nodes = ndtri((np.arange(64) + 0.5) / 64) / 3.29  # in widths of a band of 90 %
    away = np.abs(said.mean[..., None] + (said.high - said.low)[..., None] * nodes - goal)
    allowed = np.isin(np.arange(len(said.mean)), np.flatnonzero(task.candidates))[:, None]
    idle, miss = np.abs(said.nothing[0] - goal), np.abs(said.mean - goal)
    i, b = np.unravel_index(np.where(allowed, miss, np.inf).argmin(), miss.shape)
    pays = away[i, b].mean() < idle
    action, best = ((i, said.grid[i, b]), miss[i, b]) if pays else ((-1, 0.0), idle)
    gain = np.where(allowed, np.maximum(best - away, 0.0).mean(-1), 0.0)
    experiment, better = largest(said.grid, gain), (away < idle).mean(-1)
    return said._replace(action=action, experiment=experiment, gain=gain, better=better)


class Predictions(NamedTuple):
    """What a system `said` of the target, in the columns' own units and digits."""

    data: Experience
    said: Any

    def written(self, outcome: float) -> float:
        """With two digits more than the column's, or a narrow band would be rounded away."""
        return next(rounded(outcome, self.data.units.shown[self.data.target] + 2))

    def outcomes(self, *deviations) -> dict:
        """Mean and band of the target, within what it can be; of logarithms, the median."""
        raw = [self.data.units.one(self.data.target).raw(x).item() for x in deviations]
        kept = np.clip(raw, *self.data.ends).tolist()
        return dict(zip(("predicted", "low", "high"), map(self.written, kept), strict=True))

    def gain(self, deviations: np.floating, predicted: float) -> float:
        """A gain in the target's unit: of logarithms, that on a value that is `predicted`."""
        units, target = self.data.units, self.data.target
        share = float(units.spread[target] * deviations)
        return self.written(abs(predicted) * math.expm1(share) if units.logs[target] else share)

    def effect(self, i, value) -> dict:
        """do(variable i = value) as a person reads it, and what is predicted there."""
        said, written = self.said, self.data.value(int(i), value)
        at = self.data.units.one(int(i)).exact(written).item()
        here = [np.interp(at, said.grid[i], s[i]) for s in (said.mean, said.low, said.high)]
        return {"settings": self.data.setting(int(i), written), **self.outcomes(*here)}

    def curve(self, i) -> dict:
        """Predictions over the range of variable i."""
        said, written = self.said, self.data.units.written
        each = [
            {"values": written(i, value), **self.outcomes(*point)}
            for value, *point in zip(
                said.grid[i], said.mean[i], said.low[i], said.high[i], strict=True
            )
        ]
        return {key: [one[key] for one in each] for key in each[0]}


def in_own_units(question, data, said, following) -> dict:
    """What the system `said`, in the columns' own units and digits, and the experiments of the
    answers `following`.
    """
    names, predictions = data.names, Predictions(data, said)

    def worse(outcome, goal):
        """What is to be small: the outcome, its negative, or its distance from a goal."""
        return {"min": outcome, "max": -outcome}.get(question.objective, np.abs(outcome - goal))

    settable, goal = np.flatnonzero(data.task.candidates), question.target_value or 0.0
    cells = worse(said.mean, data.units.one(data.target).exact(goal))
    effects = [predictions.effect(i, said.grid[i, cells[i].argmin()]) for i in settable]
    lowest = min(settable, key=lambda i: cells[i].min())
    better = float(said.better[lowest, cells[lowest].argmin()])
    nothing = predictions.outcomes(*said.nothing)
    idle = {"settings": {}, **nothing}
    action = idle if said.action[0] < 0 else predictions.effect(*said.action)

    def experiment(asked) -> dict:
        """The next experiment of an answer, what it is expected to gain, and why."""
        tried, value = asked.experiment
        gain = asked.gain[tried, np.abs(asked.grid[tried] - value).argmin()]
        about = {
            "expected_gain": predictions.gain(gain, action["predicted"]),
            "reason": REASONS[asked.experiment == said.action],
        }
        return predictions.effect(tried, value) | about

    most = following[0].gain.max()
    surrogate, flat = (float(weight[settable].mean()) for weight in said.weights)
    believed = {"the surrogate's": surrogate, "the flat": flat, "their own": 1 - surrogate - flat}
    check = {
        "experiments": int(said.experiments),
        "in_band": int(said.in_band),
        "widened_by": round(float(said.widened_by), 2),
        "surface": max(believed, key=believed.__getitem__),
        "surrogate_weight": round(surrogate, 3),
    }
    answer = {
        "target": names[data.target],
        "objective": question.objective or "value",
        "nothing": nothing,
        "recommended_action": action | {"probability_better_than_nothing": round(better, 3)},
        "next_experiment": experiment(following[0]),
        "stop": {
            "expected_gain": predictions.gain(most, action["predicted"]),
            "worth_it": bool(most > question.worth * said.spread),
        },
        "parents": {
            names[i]: float(said.marginals[i])
            for i in np.argsort(-said.marginals[: len(names)])
            if i != data.target
        },
        "parent_sets": [
            {"parents": sorted(members), "probability": p}
            for members, p in said.parent_sets.to_dict(names).items()
            if p > 1e-6
        ],
        "best_effects": sorted(effects, key=lambda one: worse(one["predicted"], goal)),
        "check": check,
        "notes": data.notes,
        "warnings": warnings_of(data, check, said.untold),
        "version": VERSION,
        "data_sha256": data.sha256,
    }
    if data.blocked:
        answer |= {
            "recommended_action": idle | {"probability_better_than_nothing": 0.0},
            "next_experiment": idle | {"expected_gain": 0.0, "reason": data.blocked},
            "stop": {"expected_gain": 0.0, "worth_it": False},
            "best_effects": [],
        }
    elif question.batch > 1:
        each = [experiment(asked) for asked in following]
        settings = [one["settings"] for one in each]  # again the same, where all have been chosen
        answer["batch"] = [one for i, one in enumerate(each) if settings.index(settings[i]) == i]
    if question.curves:
        answer["curves"] = {names[i]: predictions.curve(i) for i in settable}
    return answer


def warnings_of(data, check, untold) -> list[str]:
    """What limits the answer, each in one sentence; `untold[vars]` are the probabilities of the
    target's parents if no edge were known.
    """
    names, buffer, task = data.names, data.buffer, data.task
    done, in_band, settable = check["experiments"], check["in_band"], np.asarray(task.candidates)
    observed = np.asarray(buffer.values, float)[np.asarray(buffer.observational)]
    away = np.abs(np.stack([task.low, task.high]) - observed.mean(0)).max(0)
    reach = away / np.maximum(observed.std(0), 1e-6)
    tried = np.asarray(buffer.intervened.any(0)) | [i in data.bounds for i in range(len(names))]
    known = np.zeros(len(names)) if task.known is None else np.asarray(task.known)[:, data.target]
    return told(
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
                settable[i] and not tried[i],
                f"'{name}' was never set: its range is what was seen of it",
            )
            for i, name in enumerate(names)
        ),
        *(
            (
                settable[i] and reach[i] > CheckConfig.far_std,
                f"'{name}': its range reaches {reach[i]:.0f} deviations from what was "
                "observed, and the surrogate counts for less there",
            )
            for i, name in enumerate(names)
        ),
        *(
            (
                known[i] * (0.5 - untold[i]) > 0.5 - SURPRISE,
                f"'{name}' is said to be {'a' if known[i] > 0 else 'no'} parent of "
                f"'{names[data.target]}', but the data contradict it: without being told so its "
                f"probability is {untold[i]:.2f}",
            )
            for i, name in enumerate(names)
        ),
        (data.blocked, f"{data.blocked}: none is suggested"),
    )


def text(value: float | str) -> str:
    """A number with the digits that it has, or a word."""
    return value if isinstance(value, str) else repr(value).removesuffix(".0")


def as_text(answer: dict) -> str:
    """The answer for a person, with the digits that the JSON has."""
    target, check, stop = answer["target"], answer["check"], answer["stop"]
    best, following = answer["recommended_action"], answer["next_experiment"]

    def setting(one: dict) -> list[str]:
        """Variable, value, and what is expected of it."""
        name, value = next(iter(one["settings"].items()), ("(nothing)", ""))
        low, high, mean = (text(one[key]) for key in ("low", "high", "predicted"))
        return [name, text(value), mean, f"{low} to {high}"]

    def sentence(one: dict) -> str:
        name, value, predicted, band = setting(one)
        chosen = f"set {name} = {value}" if value else "set nothing"
        return f"{chosen}   ({target} {predicted} expected, {band})"

    tables = {
        (f"parent of {target}?", "probability"): [
            [name, f"{p:.2f}"] for name, p in answer["parents"].items()
        ],
        ("most probable parent sets", "probability"): [
            [f"{{{', '.join(one['parents'])}}}", f"{one['probability']:.2f}"]
            for one in answer["parent_sets"]
        ],
        ("set", "to", f"expected {target}", "90 % band"): [
            setting(one) for one in (*answer["best_effects"], {"settings": {}, **answer["nothing"]})
        ],
    }
    parts = (
        *(tabulate(rows, headers=head, disable_numparse=True) for head, rows in tables.items()),
        f"Check: {check['in_band']} of {check['experiments']} experiments in their 90 % band when "
        f"predicted; {check['surface']} surface is believed most (surrogate "
        f"{text(check['surrogate_weight'])}), bands {text(check['widened_by'])} times as wide.",
        *(f"Note: {one}." for one in answer["notes"]),
        *(f"Warning: {one}." for one in answer["warnings"]),
        f"Next experiment:    {sentence(following)}\n{' ' * 20}{following['reason']}; expected "
        f"gain {text(following['expected_gain'])}",
        *(f"At the same time:   {sentence(one)}" for one in answer.get("batch", [])[1:]),
        f"Best action so far: {sentence(best)}\n{' ' * 20}"
        f"{'' if best['settings'] else 'no setting gains enough for what it risks; the best is '}"
        f"better than nothing with probability {text(best['probability_better_than_nothing'])}",
        *told(
            (
                not stop["worth_it"],
                f"Stop: one more experiment is expected to gain {text(stop['expected_gain'])} at "
                "most; the noise of an outcome is what is left.",
            )
        ),
    )
    return "\n\n".join(parts)
