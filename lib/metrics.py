"""Numbers with 95 % intervals over problems, and the tables made of them. Host side: plain numpy,
deterministic.

Every interval is over independent problems (SCMs), never over steps or variables of one problem.
"""

import functools as ft
import json
import os
import platform
import shlex
import subprocess
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import scipy.stats
import tabulate
from jaxtyping import Bool, Float, Shaped
from matplotlib import color_sequences
from matplotlib.figure import Figure

from lib.artifacts import replace_file


Scores = Float[np.ndarray, "batch vars"]
Flags = Bool[np.ndarray, "batch vars"]
NUM_RESAMPLES = 2000
Table = Literal[
    "success",
    "surrogate",
    "effects",
    "fidelity",
    "optimisation",
    "literature",
    "transfer",
    "ablation",
    "world",
]


@dataclass(frozen=True)
class Record:
    """One cell of the results: `value` with its 95 % interval [`low`, `high`] over `n` problems, in
    `unit`.
    """

    table: str
    task: str
    method: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    unit: str


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


# --- intervals ---


def summarise(values: Shaped[np.ndarray, " n"]) -> Estimate:
    """Mean over problems with its t interval; a single problem has the interval [-inf, inf]. Raises
    `ValueError` for no values or for NaN.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or len(values) == 0 or np.isnan(values).any():
        raise ValueError(
            "need a vector of at least one number without NaN, got shape "
            f"{values.shape} with {int(np.isnan(values).sum())} NaN"
        )
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Estimate(mean, -np.inf, np.inf)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


def bootstrap(statistic: Callable[..., float], *data: np.ndarray) -> Estimate:
    """A statistic of whole arrays `data` (leading axis: problems), with the percentile interval
    over resampled problems; always the same resamples.

    Resamples in which the statistic does not exist (NaN) are left out; raises `ValueError` where it
    does not exist on the data themselves.
    """
    n = len(data[0])
    value = float(statistic(*data))
    if np.isnan(value):
        raise ValueError("the statistic does not exist on these problems: both outcomes must occur")
    rng = np.random.default_rng(0)
    resamples = np.array(
        [statistic(*(d[index] for d in data)) for index in rng.integers(0, n, (NUM_RESAMPLES, n))]
    )
    low, high = np.percentile(resamples[~np.isnan(resamples)], [2.5, 97.5])
    return Estimate(value, float(low), float(high))


# --- structure ---
# decisions, one per variable that counts (not the target, not padding), as vectors; or `[batch,
# vars]` arrays, whose `mask` marks those variables


def f1(predicted: np.ndarray, truth: np.ndarray, axis: int | None = None) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of the parents `predicted`, zeros and ones, against the true
    ones; 1 where there is nothing to find and nothing was predicted.
    """
    total = predicted.sum(axis) + truth.sum(axis)
    return np.where(total > 0, 2 * (predicted * truth).sum(axis) / np.maximum(total, 1), 1.0)


def parent_f1(predicted: Flags, truth: Flags, mask: Flags) -> Float[np.ndarray, " batch"]:
    """The `f1` of every problem."""
    return f1(predicted & mask, truth & mask, axis=1)


def best_threshold(scores: Scores, truth: Flags, mask: Flags) -> float:
    """The threshold t for which `scores >= t` has the largest mean F1 over problems, the figure
    that tables show: choose it on validation problems. Lies halfway between two scores.

    Raises `ValueError` if no variable is a true parent, or for NaN among the scores.
    """
    score, label = pooled(scores, truth, mask)
    if not label.any():
        raise ValueError("no true parent among these problems: no threshold is better than another")
    thresholds = np.unique(score)[::-1]
    best = np.argmax([parent_f1(scores >= t, truth, mask).mean() for t in thresholds])
    return float(thresholds[best : best + 2].mean())


def auroc(score: Float[np.ndarray, " n"], label: Bool[np.ndarray, " n"]) -> float:
    """Probability that a parent scores above a non-parent; ties count one half (Mann-Whitney). NaN
    unless there are both.
    """
    positive, negative = label.sum(), (~label).sum()
    if positive == 0 or negative == 0:
        return np.nan
    above = scipy.stats.rankdata(score)[label].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def average_precision(score: Float[np.ndarray, " n"], label: Bool[np.ndarray, " n"]) -> float:
    """Area under the precision-recall steps, sum of (recall_k - recall_(k-1)) precision_k over
    distinct scores. NaN without a parent.
    """
    if not label.any():
        return np.nan
    order = np.argsort(-score, kind="stable")
    score, label = score[order], label[order]
    last = np.append(score[:-1] > score[1:], True)  # equal scores are one threshold
    found, predicted = label.cumsum()[last], np.arange(1, len(label) + 1)[last]
    return float(np.sum(np.diff(found, prepend=0) * found / predicted) / label.sum())


def calibration_error(prob: Float[np.ndarray, " n"], label: Bool[np.ndarray, " n"]) -> float:
    """Mean over decisions of |share of parents - mean probability| of the decision's bin; ten equal
    bins of [0, 1] (Naeini et al., AAAI 2015).
    """
    index = np.minimum((prob * 10).astype(int), 9)
    # (share - mean probability) times the number in the bin
    gap = np.bincount(index, label.astype(float) - prob, 10)
    return float(np.abs(gap).sum() / len(prob))


def bootstrap_pooled(statistic, scores, truth, mask) -> Estimate:
    """`statistic(score, label)` of all decisions together, resampled over problems."""
    return bootstrap(lambda *problems: statistic(*pooled(*problems)), scores, truth, mask)


def pooled(
    scores: np.ndarray, truth: np.ndarray, mask: np.ndarray
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Scores and labels of all variables that count, as vectors; raises `ValueError` for NaN among
    them.
    """
    score = np.asarray(scores[mask], float)
    if np.isnan(score).any():
        raise ValueError("NaN among the scores")
    return score, truth[mask]


# --- optimisation: noise-free expected outcomes, minimised ---


def normalised_regret(mean_outcome, optimum, baseline) -> Float[np.ndarray, "*shape"]:
    """(E[Y | do chosen] - y*) / (E[Y] - y*): 0 at the optimum, 1 for doing nothing, above 1 for
    harm. `ValueError` where doing nothing is best.
    """
    reached, best, nothing = (np.asarray(x, float) for x in (mean_outcome, optimum, baseline))
    without = int((nothing <= best).sum())
    if without:
        raise ValueError(f"no room for improvement in {without} problem(s): E[Y] must lie above y*")
    return np.asarray((reached - best) / (nothing - best))


# --- training ---


def convergence_ratio(
    warm: Float[np.ndarray, " checkpoints"], cold: Float[np.ndarray, " checkpoints"]
) -> float:
    """Training that the warm start needs to reach what the cold start ends with, as a share of the
    whole; 1 if it never does. Both are what validation gave at checkpoints that are equally far
    apart, the first before any training.
    """
    reached = np.flatnonzero(warm >= cold[-1])
    return float(reached[0] / (len(warm) - 1)) if len(reached) else 1.0


# --- time ---


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall-clock seconds of a call, the first (compiling) one left out."""
    times = timeit.repeat(lambda: jax.block_until_ready(call()), number=1, repeat=repeats + 1)
    return float(np.median(times[1:]))


# --- tables ---


def cells(
    table: Table,
    task: str,
    method: str,
    figures: Mapping[str, Estimate | float],
    n: int,
    unit: str = "",
) -> list[Record]:
    """A record per metric in `figures`; a bare number is a single measurement, without interval."""
    estimates = {
        metric: figure if isinstance(figure, Estimate) else Estimate(figure, -np.inf, np.inf)
        for metric, figure in figures.items()
    }
    return [Record(table, task, method, name, *e, n, unit) for name, e in estimates.items()]


def stamp(seed: int) -> str:
    """Where a table comes from, in one line: command, commit, seed and machine."""
    root, script = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve()
    named = str(script.relative_to(root)) if root in script.parents else script.name
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return (
        f"`python {shlex.join([named, *sys.argv[1:]])}`, commit `{commit}`, seed {seed}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"
    )


def write_results(folder: Path, records: Sequence[Record], seed: int) -> None:
    """Write `metrics.json`, the list of all records, and every table as `<table>.md` (with its
    `stamp`), `.csv` and `.tex` in `folder`. Each file is replaced at once.

    Raises `ValueError` for a cell that occurs twice, and for NaN; an infinite bound becomes null in
    JSON.
    """
    seen = set()
    for record in records:
        cell = (record.table, record.task, record.method, record.metric)
        if cell in seen:
            raise ValueError(f"two records for {cell}")
        if np.isnan([record.value, record.low, record.high]).any() or np.isinf(record.value):
            raise ValueError(
                f"{cell}: {record.value} [{record.low}, {record.high}] is not a result"
            )
        seen.add(cell)
    rows = [
        {k: None if isinstance(v, float) and np.isinf(v) else v for k, v in asdict(r).items()}
        for r in records
    ]
    files = {"metrics.json": json.dumps(rows, indent=1, allow_nan=False) + "\n"}
    for table in dict.fromkeys(r.table for r in records):
        lines = [
            f'"{r.task}","{r.method}","{r.metric}",{r.value!r},{r.low!r},{r.high!r},{r.n},'
            f'"{r.unit}"\n'
            for r in records
            if r.table == table
        ]
        files |= {
            f"{table}.md": f"{render(records, table)}\n\n{stamp(seed)}\n",
            f"{table}.tex": render(records, table, "latex") + "\n",
            f"{table}.csv": "task,method,metric,value,low,high,n,unit\n" + "".join(lines),
        }
    for name, text in files.items():
        replace_file(folder / name, text.encode())


def render(records: Sequence[Record], table: str, style: str = "github") -> str:
    """One table, cells `value [low, high]`. `style` is one of tabulate's (default: Markdown).

    `success` is a list, a row per record. Otherwise a row per method; columns are tasks if there is
    one metric, else metrics, in a part per task. Rows, columns and parts are in the order in which
    they first occur. Raises `ValueError` for a table without records.
    """
    chosen = [r for r in records if r.table == table]
    if not chosen:
        raise ValueError(
            f"no records for '{table}'; there are records for "
            f"{', '.join(dict.fromkeys(r.table for r in records)) or 'nothing'}"
        )

    typeset = ft.partial(tabulate.tabulate, tablefmt=style, disable_numparse=True)

    def grid(part, name):
        names = dict.fromkeys(name(r) for r in part)
        found = {(r.method, name(r)): cell(r) for r in part}
        methods = dict.fromkeys(r.method for r in part)
        rows = [[method, *(found.get((method, n), "") for n in names)] for method in methods]
        return typeset(rows, ["method", *names])

    if table == "success":
        return typeset(
            [[r.metric, r.task, r.method, cell(r), str(r.n), r.unit] for r in chosen],
            ["criterion", "task", "method", "value", "n", "unit"],
        )
    if len({r.metric for r in chosen}) == 1:
        return grid(chosen, lambda r: r.task)
    heading = "% {}\n" if style == "latex" else "**{}**\n\n"
    return "\n\n".join(
        heading.format(task)
        + grid(
            [r for r in chosen if r.task == task],
            lambda r: r.metric + (f" ({r.unit})" if r.unit else ""),
        )
        for task in dict.fromkeys(r.task for r in chosen)
    )


def cell(record: Record) -> str:
    """`value [low, high]` to three significant digits; the value alone without an interval."""
    value, low, high = (f"{v:.3g}" for v in (record.value, record.low, record.high))
    return value if np.isinf(record.low) and np.isinf(record.high) else f"{value} [{low}, {high}]"


def draw_regret(regret: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Mean simple regret against experiments, with 95 % bands for the deployed system."""
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(regret, color_sequences["tab20"], strict=False)) | {"acbo": "black"}
    for name, values in regret.items():
        steps, mean, label = np.arange(values.shape[1]), values.mean(0), f"{name} (n={len(values)})"
        width = 2.5 if name == "acbo" else 1.3
        axes.plot(steps, mean, label=label, color=colours[name], linewidth=width)
        if name == "acbo":
            half = 1.96 * values.std(0) / np.sqrt(len(values))
            axes.fill_between(steps, mean - half, mean + half, color="black", alpha=0.15)
    axes.set(
        xlabel="experiments",
        ylabel="simple regret (share of the possible improvement)",
        title=title,
        ylim=(0, None),
    )
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)
