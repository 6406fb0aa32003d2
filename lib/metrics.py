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
from jaxtyping import Array, Bool, Float, Shaped
from matplotlib import color_sequences
from matplotlib.figure import Figure

from lib.artifacts import replace_file


HostArray = np.ndarray | Array
Scores = Float[HostArray, "batch vars"]
Flags = Bool[HostArray, "batch vars"]
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


def summarise(values: Shaped[HostArray, " n"]) -> Estimate:
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


def paired_difference(a: Shaped[HostArray, " n"], b: Shaped[HostArray, " m"]) -> Estimate:
    """Mean of a - b, where entry i of both is the same problem."""
    if len(a) != len(b):
        raise ValueError(f"not paired: {len(a)} and {len(b)} problems")
    return summarise(np.asarray(a, float) - np.asarray(b, float))


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
# `[batch, vars]` arrays; `mask` marks the variables that count (not the target, not padding)


class ParentF1(NamedTuple):
    """`mean`: mean of the F1 of single problems; `pooled`: F1 of all decisions together;
    `per_problem[batch]`.
    """

    mean: Estimate
    pooled: Estimate
    per_problem: Float[np.ndarray, " batch"]


def parent_f1(said: Flags, truth: Flags, mask: Flags) -> ParentF1:
    """F1 = 2 TP / (2 TP + FP + FN) of decisions `said` against true parents; 1 where there is
    nothing to find and nothing was said.
    """
    said, truth, mask = (np.asarray(x, bool) for x in (said, truth, mask))
    counts = np.stack([(x & mask).sum(1) for x in (said & truth, said, truth)], 1)
    per_problem = f1_of(*counts.T)
    pooled_f1 = bootstrap(lambda c: float(f1_of(*c.sum(0))), counts)
    return ParentF1(summarise(per_problem), pooled_f1, per_problem)


def f1_of(hits, said, parents) -> Float[np.ndarray, "*shape"]:
    """F1 from how many of those said are parents, and how many were said and are parents."""
    total = said + parents
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def best_threshold(scores: Scores, truth: Flags, mask: Flags) -> float:
    """The threshold t for which `scores >= t` has the largest mean F1 over problems, the figure
    that tables show: choose it on validation problems. Lies halfway between two scores.

    Raises `ValueError` if no variable is a true parent, or for NaN among the scores.
    """
    score, label = pooled(scores, truth, mask)
    if not label.any():
        raise ValueError("no true parent among these problems: no threshold is better than another")
    problem = np.nonzero(np.asarray(mask, bool))[0]
    order = np.argsort(-score, kind="stable")
    score, label, problem = score[order], label[order], problem[order]
    # of the sum of F1 over problems, when the next decision is said too
    change = np.zeros(len(score))
    for p in np.unique(problem):
        own = problem == p
        hits, said = np.append(0, label[own].cumsum()), np.arange(own.sum() + 1)
        change[own] = np.diff(f1_of(hits, said, label[own].sum()))
    last = np.append(score[:-1] > score[1:], True)  # equal scores are said together
    best = int(np.argmax(np.where(last, change.cumsum(), -np.inf)))
    return float(score[best] if best + 1 == len(score) else 0.5 * (score[best] + score[best + 1]))


def auroc(scores: Scores, truth: Flags, mask: Flags) -> Estimate:
    """Probability that a parent scores above a non-parent, pooled over problems; ties count one
    half (Mann-Whitney).
    """

    def statistic(score, label):
        positive, negative = label.sum(), (~label).sum()
        if positive == 0 or negative == 0:
            return np.nan
        return (scipy.stats.rankdata(score)[label].sum() - positive * (positive + 1) / 2) / (
            positive * negative
        )

    return bootstrap_pooled(statistic, scores, truth, mask)


def average_precision(scores: Scores, truth: Flags, mask: Flags) -> Estimate:
    """Area under the precision-recall steps, sum of (recall_k - recall_(k-1)) precision_k over
    distinct scores, pooled over problems.
    """

    def statistic(score, label):
        if not label.any():
            return np.nan
        order = np.argsort(-score, kind="stable")
        score, label = score[order], label[order]
        last = np.append(score[:-1] > score[1:], True)
        found, said = label.cumsum()[last], np.arange(1, len(label) + 1)[last]
        return float(np.sum(np.diff(found, prepend=0) * found / said) / label.sum())

    return bootstrap_pooled(statistic, scores, truth, mask)


def expected_calibration_error(
    probs: Scores, truth: Flags, mask: Flags, bins: int = 10
) -> Estimate:
    """Mean over decisions of |share of parents - mean probability| of the decision's bin; `bins`
    equal bins of [0, 1] (Naeini et al., AAAI 2015).
    """

    def statistic(prob, label):
        index = np.minimum((prob * bins).astype(int), bins - 1)
        # (share - mean probability) times the number in the bin
        gap = np.bincount(index, label.astype(float) - prob, bins)
        return float(np.abs(gap).sum() / len(prob)) if len(prob) else np.nan

    return bootstrap_pooled(statistic, probs, truth, mask)


def bootstrap_pooled(statistic, scores, truth, mask) -> Estimate:
    """`statistic(score, label)` of all decisions together, resampled over problems."""
    data = (np.asarray(x, kind) for x, kind in ((scores, float), (truth, bool), (mask, bool)))
    return bootstrap(lambda *problems: statistic(*pooled(*problems)), *data)


def pooled(scores, truth, mask) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of all variables that count, as vectors; raises `ValueError` for NaN among
    them.
    """
    mask = np.asarray(mask, bool)
    score = np.asarray(scores, float)[mask]
    if np.isnan(score).any():
        raise ValueError("NaN among the scores")
    return score, np.asarray(truth, bool)[mask]


# --- optimisation: noise-free expected outcomes, minimised ---


def normalised_regret(mean_outcome, optimum, baseline) -> Float[np.ndarray, "*shape"]:
    """(E[Y | do chosen] - y*) / (E[Y] - y*): 0 at the optimum, 1 for doing nothing, above 1 for
    harm. `ValueError` where doing nothing is best.
    """
    mean_outcome, optimum, baseline = (
        np.asarray(x, float) for x in (mean_outcome, optimum, baseline)
    )
    room = baseline - optimum
    if np.any(room <= 0):
        raise ValueError(
            f"no room for improvement in {int((room <= 0).sum())} problem(s): E[Y] "
            "must lie above y*"
        )
    return np.asarray((mean_outcome - optimum) / room)


# --- training ---


def convergence_ratio(returns: Float[HostArray, "runs checkpoints"]) -> float:
    """Training that the warm start needs to reach what the cold start ends with, as a share of the
    whole; 1 if it never does.

    `returns[2, checkpoints]`: warm, cold; equally far apart, the first before any training.
    """
    warm, cold = np.asarray(returns, float)
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
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    script = Path(sys.argv[0]).resolve()
    command = [str(script.relative_to(root)) if root in script.parents else script.name]
    device = jax.devices()[0].device_kind
    return (
        f"`python {shlex.join(command + sys.argv[1:])}`, commit `{commit}`, seed {seed}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {device}"
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
    text = json.dumps(rows, indent=1, allow_nan=False) + "\n"
    replace_file(folder / "metrics.json", text.encode())
    for table in dict.fromkeys(r.table for r in records):
        header = "task,method,metric,value,low,high,n,unit\n"
        lines = [
            f'"{r.task}","{r.method}","{r.metric}",{r.value!r},{r.low!r},{r.high!r},{r.n},'
            f'"{r.unit}"\n'
            for r in records
            if r.table == table
        ]
        files = {
            "md": f"{render(records, table)}\n\n{stamp(seed)}\n",
            "tex": render(records, table, "latex") + "\n",
            "csv": header + "".join(lines),
        }
        for suffix, text in files.items():
            replace_file(folder / f"{table}.{suffix}", text.encode())


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
        methods = dict.fromkeys(r.method for r in part)
        found = {(r.method, name(r)): cell(r) for r in part}
        rows = [[method, *(found.get((method, n), "") for n in names)] for method in methods]
        return typeset(rows, ["method", *names])

    if table == "success":
        return typeset(
            [[r.metric, r.task, r.method, cell(r), str(r.n), r.unit] for r in chosen],
            ["criterion", "task", "method", "value", "n", "unit"],
        )
    if len({r.metric for r in chosen}) == 1:
        return grid(chosen, lambda r: r.task)
    heading = "% {}\n" if style.startswith("latex") else "**{}**\n\n"
    parts = {
        task: [r for r in chosen if r.task == task]
        for task in dict.fromkeys(r.task for r in chosen)
    }
    return "\n\n".join(
        heading.format(task) + grid(part, lambda r: r.metric + (f" ({r.unit})" if r.unit else ""))
        for task, part in parts.items()
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
    unit = "simple regret (share of the possible improvement)"
    axes.set(xlabel="experiments", ylabel=unit, title=title, ylim=(0, None))
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)
