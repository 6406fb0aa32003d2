"""Metrics on cases worked out by hand, and against brute-force formulas."""

import csv
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from jaxtyping import TypeCheckError

from lib import metrics


def test_summarise_is_the_t_interval():
    values = np.random.default_rng(1).normal(size=20)
    test = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(metrics.summarise(values), [values.mean(), test.low, test.high])
    assert metrics.summarise(np.array([5.0])) == (5.0, -np.inf, np.inf)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (lambda: metrics.summarise(np.array([])), "at least one number"),
        (lambda: metrics.summarise(np.array([1.0, np.nan])), "at least one number"),
        (lambda: metrics.bootstrap_pooled(metrics.auroc, ALL * 0.5, ~ALL, ALL), "both outcomes"),
        (lambda: metrics.bootstrap_pooled(metrics.auroc, ALL * np.nan, ALL, ALL), "NaN"),
        (lambda: metrics.best_threshold(ALL * 0.5, ~ALL, ALL), "no true parent"),
        (lambda: metrics.normalised_regret([0, 0], np.array([0.0, -1.0]), [0, 0]), "1 problem"),
        (
            lambda: metrics.render(RECORDS, "success"),
            "no records for 'success'; there are records for optimisation, literature",
        ),
        (lambda: metrics.write_results(Path("nowhere"), RECORDS[:1] * 2, 7), "two records"),
        (lambda: metrics.write_results(Path("nowhere"), [NOT_A_NUMBER], 7), "not a result"),
    ],
)
def test_what_has_no_answer_is_refused(refused, said):
    with pytest.raises(ValueError, match=said):
        refused()
    assert not Path("nowhere").exists()


def test_cells_are_of_a_table_that_there_is():
    with pytest.raises(TypeCheckError, match="optimization"):
        metrics.cells("optimization", "d=5", "acbo", {"regret": 0.1}, 1)


@pytest.mark.parametrize(
    ("warm", "ratio"),
    [
        (np.linspace(0.0, 1.0, 101), 1.0),
        (2.0 * (np.arange(101) >= 20), 0.2),
        (np.linspace(1.0, 2.0, 101), 0.0),  # before any training
        (np.linspace(-1.0, 0.0, 101), 1.0),  # never
    ],
)
def test_convergence_ratio(warm, ratio):
    assert metrics.convergence_ratio(warm, np.linspace(0.0, 1.0, 101)) == ratio


def test_bootstrap_agrees_with_t_for_a_mean():
    values = np.random.default_rng(2).normal(size=200)
    estimate = metrics.bootstrap(lambda v: float(v.mean()), values)
    np.testing.assert_allclose(estimate, metrics.summarise(values), atol=0.02)
    assert metrics.bootstrap(lambda v: float(v.mean()), values) == estimate


TRUTH = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]], bool)
# the true parent in the last row's fourth place does not count
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool)
ALL = np.ones((2, 2), bool)


def test_parent_f1_by_hand():
    said = np.array([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 1]], bool)
    # TP 1, FP 1, FN 1; nothing to find; TP 1
    np.testing.assert_allclose(metrics.parent_f1(said, TRUTH, MASK), [0.5, 1.0, 1.0])
    pooled = metrics.bootstrap_pooled(metrics.f1, said, TRUTH, MASK)
    assert pooled.value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert pooled.low <= pooled.value <= pooled.high
    assert metrics.f1(~TRUTH[0], TRUTH[0]) == 0.0


def random_scores(seed, batch=30):
    """Informative scores, rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    truth, mask = rng.random((batch, 6)) < 0.3, rng.random((batch, 6)) < 0.8
    return np.clip(np.round(0.4 * truth + 0.6 * rng.random((batch, 6)), 1), 0, 1), truth, mask


def test_auroc_counts_pairs():
    scores, truth, mask = random_scores(3)
    positive, negative = scores[mask & truth], scores[mask & ~truth]
    pairs = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    estimate = metrics.bootstrap_pooled(metrics.auroc, scores, truth, mask)
    assert estimate.value == pytest.approx(pairs.mean())
    assert 0.5 < estimate.low < estimate.value < estimate.high <= 1.0
    # what is masked has no say
    other = np.where(mask, scores, 9.0)
    assert metrics.bootstrap_pooled(metrics.auroc, other, truth, mask) == estimate
    for score, wanted in ((truth * 1.0, 1.0), (np.ones(truth.shape), 0.5)):
        assert metrics.auroc(score[mask], truth[mask]) == wanted


def test_average_precision():
    scores, truth = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0], bool)
    assert metrics.average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    scores, truth, mask = random_scores(4)
    score, label, area, recall = scores[mask], truth[mask], 0.0, 0.0
    for t in np.unique(score)[::-1]:
        said = score >= t
        now = label[said].sum() / label.sum()
        area, recall = area + (now - recall) * label[said].mean(), now
    assert metrics.average_precision(score, label) == pytest.approx(area)


# one variable, a parent, at .3; ten variables, the parent at .9, the others at .5. All said: F1
# 1 and 2 / 11; above .5: 0 and 1. All decisions together: 4 / 13 and 2 / 3
TWO = np.array([[0.3] + [0.0] * 9, [0.9] + [0.5] * 9])
FIRST = np.arange(10)[None].repeat(2, 0) == 0


@pytest.mark.parametrize(
    ("scores", "truth", "mask", "threshold"),
    [
        (np.array([[0.2, 0.6, 0.9]]), np.array([[0, 1, 1]], bool), np.ones((1, 3), bool), 0.4),
        (np.array([[0.2, 0.6]]), np.ones((1, 2), bool), np.ones((1, 2), bool), 0.2),
        (TWO, FIRST, np.array([[1] + [0] * 9, [1] * 10], bool), 0.3),
    ],
)
def test_best_threshold_by_hand(scores, truth, mask, threshold):
    assert metrics.best_threshold(scores, truth, mask) == pytest.approx(threshold)


def test_best_threshold_beats_every_other():
    scores, truth, mask = random_scores(5)

    def shown(threshold):  # in tables
        return metrics.parent_f1(scores >= threshold, truth, mask).mean()

    chosen = metrics.best_threshold(scores, truth, mask)
    assert shown(chosen) == pytest.approx(max(map(shown, np.linspace(0, 1, 21))))


def test_calibration_error_by_hand():
    probs, truth = np.array([0.05, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1], bool)
    # first bin: 2 decisions, half true, mean .05; last bin: 2 decisions, all true, mean .975
    found = metrics.calibration_error(probs, truth)
    assert found == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)
    rng = np.random.default_rng(6)
    probs = rng.random(2000)
    truth = rng.random(2000) < probs
    assert metrics.calibration_error(probs, truth) < 0.05
    assert metrics.calibration_error(probs, ~truth) > 0.4


def test_normalised_regret():
    found = metrics.normalised_regret([-2.0, 0.0, 1.0, -1.0], -2.0, 0.0)
    np.testing.assert_allclose(found, [0.0, 1.0, 1.5, 0.5])


RECORDS = [
    metrics.Record("optimisation", "d=10", "random", "regret", 0.98765, 0.9, 1.05, 100, ""),
    metrics.Record("optimisation", "d=10", "acbo", "regret", 0.1, 0.05, 0.15, 100, ""),
    metrics.Record("optimisation", "d=10/nonlinear", "acbo", "time", 12.0, 11.0, 13.0, 100, "ms"),
    metrics.Record("literature", "toy", "acbo", "gap", 0.9, -np.inf, np.inf, 1, ""),
]
NOT_A_NUMBER = replace(RECORDS[0], value=float("nan"))
SPEEDUP = metrics.Record("success", "d=8", "acbo", "speedup", 120.0, -np.inf, np.inf, 1, "times")


def rows_of(markdown):
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]


def test_render():
    text = metrics.render(RECORDS, "optimisation")
    assert text.startswith("**d=10**\n") and "\n**d=10/nonlinear**\n" in text
    assert [line for line in rows_of(text) if line[0].strip("-:")] == [
        ["method", "regret"],
        ["random", "0.988 [0.9, 1.05]"],
        ["acbo", "0.1 [0.05, 0.15]"],
        ["method", "time (ms)"],
        ["acbo", "12 [11, 13]"],
    ]
    one_metric = [replace(r, metric="regret", unit="") for r in RECORDS]
    lines = rows_of(metrics.render(one_metric, "optimisation"))
    assert lines[0] == ["method", "d=10", "d=10/nonlinear"]
    assert lines[2] == ["random", "0.988 [0.9, 1.05]", ""]
    lines = rows_of(metrics.render([SPEEDUP], "success"))
    assert lines[2] == ["speedup", "d=8", "acbo", "120", "1", "times"]


def test_write_results(tmp_path):
    folder = tmp_path / "results"
    metrics.write_results(folder, RECORDS, 7)
    assert {p.name for p in folder.iterdir()} == {"metrics.json"} | {
        f"{t}.{s}" for t in ("optimisation", "literature") for s in ("md", "csv", "tex")
    }
    rows = json.loads((folder / "metrics.json").read_text())
    assert [list(row) for row in rows] == [[f.name for f in fields(metrics.Record)]] * 4
    assert rows[0] == asdict(RECORDS[0]) and rows[3]["low"] is None
    table = list(csv.DictReader((folder / "optimisation.csv").read_text().splitlines()))
    assert [float(row["value"]) for row in table] == [0.98765, 0.1, 12.0]
    assert table[2]["unit"] == "ms"
    text = (folder / "optimisation.md").read_text()
    assert text.startswith(metrics.render(RECORDS, "optimisation") + "\n")
    assert "commit `" in text and "seed 7" in text
    latex = (folder / "optimisation.tex").read_text()
    assert latex.startswith("% d=10\n\\begin{tabular}") and "0.988 [0.9, 1.05]" in latex
