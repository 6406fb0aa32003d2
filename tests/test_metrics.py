"""Metrics on cases worked out by hand, and against brute-force formulas."""

import csv
import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import scipy.stats
from jaxtyping import TypeCheckError

from lib import metrics


def test_summarise_by_hand():
    value, low, high = metrics.summarise(np.array([1.0, 2.0, 3.0]))
    assert value == 2.0
    half = 4.302652729911275 / np.sqrt(3)  # t quantile with two degrees of freedom, deviation 1
    np.testing.assert_allclose([low, high], [2 - half, 2 + half])
    assert metrics.summarise(np.array([5.0])) == (5.0, -np.inf, np.inf)
    for wrong in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="at least one number"):
            metrics.summarise(wrong)


def test_convergence_ratio():
    cold = np.linspace(0.0, 1.0, 101)
    assert metrics.convergence_ratio(np.stack([cold, cold])) == 1.0
    assert (
        metrics.convergence_ratio(np.stack([np.where(np.arange(101) < 20, 0.0, 2.0), cold])) == 0.2
    )
    assert metrics.convergence_ratio(np.stack([cold + 1, cold])) == 0.0  # before any training
    assert metrics.convergence_ratio(np.stack([cold - 1, cold])) == 1.0  # never


def test_summarise_covers():
    rng = np.random.default_rng(0)
    estimates = [metrics.summarise(rng.normal(3.0, 2.0, 12)) for _ in range(1000)]
    covered = np.mean([e.low <= 3.0 <= e.high for e in estimates])
    assert abs(covered - 0.95) < 5 * np.sqrt(0.95 * 0.05 / 1000)


def test_paired_difference():
    common = np.linspace(0, 100, 20)
    noise = np.random.default_rng(1).normal(size=20)
    value, low, high = metrics.paired_difference(common + 1 + 0.1 * noise, common)
    test = scipy.stats.ttest_rel(common + 1 + 0.1 * noise, common).confidence_interval(0.95)
    np.testing.assert_allclose([low, high], [test.low, test.high])
    assert low < 1.0 < high and high - low < 0.2 and value == pytest.approx(1 + 0.1 * noise.mean())
    with pytest.raises(ValueError, match="not paired: 2 and 3"):
        metrics.paired_difference(np.zeros(2), np.zeros(3))


def test_bootstrap_agrees_with_t_for_a_mean():
    values = np.random.default_rng(2).normal(size=200)
    estimate = metrics.bootstrap(lambda v: float(v.mean()), values)
    np.testing.assert_allclose(estimate, metrics.summarise(values), atol=0.02)
    assert metrics.bootstrap(lambda v: float(v.mean()), values) == estimate


TRUTH = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]], bool)
# the true parent in the last row's fourth place does not count
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool)


def test_parent_f1_by_hand():
    said = np.array([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 1]], bool)
    result = metrics.parent_f1(said, TRUTH, MASK)
    # TP 1, FP 1, FN 1; nothing to find; TP 1
    np.testing.assert_allclose(result.per_problem, [0.5, 1.0, 1.0])
    assert result.mean.value == pytest.approx(2.5 / 3)
    assert result.pooled.value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert result.pooled.low <= result.pooled.value <= result.pooled.high
    assert metrics.parent_f1(~TRUTH[:1], TRUTH[:1], MASK[:1]).pooled.value == 0.0


def random_scores(seed, batch=30):
    """Informative scores, rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    truth, mask = rng.random((batch, 6)) < 0.3, rng.random((batch, 6)) < 0.8
    return np.clip(np.round(0.4 * truth + 0.6 * rng.random((batch, 6)), 1), 0, 1), truth, mask


def test_auroc_counts_pairs():
    scores, truth, mask = random_scores(3)
    positive, negative = scores[mask & truth], scores[mask & ~truth]
    pairs = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    estimate = metrics.auroc(scores, truth, mask)
    assert estimate.value == pytest.approx(pairs.mean())
    assert 0.5 < estimate.low < estimate.value < estimate.high <= 1.0
    assert (
        metrics.auroc(np.where(mask, scores, 9.0), truth, mask) == estimate
    )  # what is masked has no say
    assert (
        metrics.auroc(truth.astype(float), truth, mask).value == 1.0
        and metrics.auroc(np.ones_like(scores), truth, mask).value == 0.5
    )
    with pytest.raises(ValueError, match="both outcomes"):
        metrics.auroc(scores, np.zeros_like(truth), mask)
    with pytest.raises(ValueError, match="NaN"):
        metrics.auroc(np.full_like(scores, np.nan), truth, mask)


def test_average_precision():
    scores, truth = np.array([[0.9, 0.8, 0.7, 0.6]]), np.array([[1, 0, 1, 0]], bool)
    assert metrics.average_precision(scores, truth, np.ones_like(truth)).value == pytest.approx(
        (1 + 2 / 3) / 2
    )
    scores, truth, mask = random_scores(4)
    area, recall = 0.0, 0.0
    for t in np.unique(scores[mask])[::-1]:
        said = (scores >= t) & mask
        now = (said & truth).sum() / (mask & truth).sum()
        area, recall = area + (now - recall) * (said & truth).sum() / said.sum(), now
    assert metrics.average_precision(scores, truth, mask).value == pytest.approx(area)


def test_best_threshold_beats_every_other():
    scores, truth, mask = random_scores(5)
    chosen = metrics.best_threshold(scores, truth, mask)
    # what tables show
    best = max(
        metrics.parent_f1(scores >= t, truth, mask).mean.value for t in np.linspace(0, 1, 21)
    )
    assert metrics.parent_f1(scores >= chosen, truth, mask).mean.value == pytest.approx(best)
    assert metrics.best_threshold(
        np.array([[0.2, 0.6, 0.9]]), np.array([[0, 1, 1]], bool), np.ones((1, 3), bool)
    ) == pytest.approx(0.4)
    assert metrics.best_threshold(
        np.array([[0.2, 0.6]]), np.ones((1, 2), bool), np.ones((1, 2), bool)
    ) == pytest.approx(0.2)
    # one variable, a parent, at .3; ten variables, the parent at .9, the others at .5. All said: F1
    # 1 and 2 / 11; above .5: 0 and 1. All decisions together: 4 / 13 and 2 / 3
    scores = np.array([[0.3] + [0.0] * 9, [0.9] + [0.5] * 9])
    mask = np.array([[1] + [0] * 9, [1] * 10], bool)
    truth = np.arange(10)[None].repeat(2, 0) == 0
    assert metrics.best_threshold(scores, truth, mask) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no true parent"):
        metrics.best_threshold(scores, np.zeros_like(truth), mask)


def test_calibration_error_by_hand():
    probs = np.array([[0.05, 0.05, 0.95, 1.0, 0.5]])
    truth = np.array([[0, 1, 1, 1, 0]], bool)
    mask = np.array([[1, 1, 1, 1, 0]], bool)
    # first bin: 2 decisions, half true, mean .05; last bin: 2 decisions, all true, mean .975
    assert metrics.expected_calibration_error(probs, truth, mask).value == pytest.approx(
        (2 * 0.45 + 2 * 0.025) / 4
    )
    rng = np.random.default_rng(6)
    probs = rng.random((4000, 5))
    truth = rng.random((4000, 5)) < probs
    assert (
        metrics.expected_calibration_error(
            probs[:400], truth[:400], np.ones_like(truth[:400])
        ).value
        < 0.05
    )
    assert (
        metrics.expected_calibration_error(
            probs[:400], ~truth[:400], np.ones_like(truth[:400])
        ).value
        > 0.4
    )


def test_normalised_regret():
    np.testing.assert_allclose(
        metrics.normalised_regret([-2.0, 0.0, 1.0, -1.0], -2.0, 0.0), [0.0, 1.0, 1.5, 0.5]
    )
    with pytest.raises(ValueError, match="1 problem"):
        metrics.normalised_regret(np.zeros(2), np.array([0.0, -1.0]), np.array([0.0, 0.0]))


def make_records():
    return [
        metrics.Record("optimisation", "d=10", "random", "regret", 0.98765, 0.9, 1.05, 100, ""),
        metrics.Record("optimisation", "d=10", "acbo", "regret", 0.1, 0.05, 0.15, 100, ""),
        metrics.Record(
            "optimisation", "d=10/nonlinear", "acbo", "time", 12.0, 11.0, 13.0, 100, "ms"
        ),
        metrics.Record("literature", "toy", "acbo", "gap", 0.9, -np.inf, np.inf, 1, ""),
    ]


def rows_of(markdown):
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]


def test_render():
    text = metrics.render(make_records(), "optimisation")
    assert text.startswith("**d=10**\n") and "\n**d=10/nonlinear**\n" in text
    lines = rows_of(text)
    assert (
        lines[0] == ["method", "regret"]
        and lines[2] == ["random", "0.988 [0.9, 1.05]"]
        and lines[3] == ["acbo", "0.1 [0.05, 0.15]"]
    )
    assert lines[4] == ["method", "time (ms)"] and lines[6] == ["acbo", "12 [11, 13]"]
    one_metric = [replace(r, metric="regret", unit="") for r in make_records()]
    lines = rows_of(metrics.render(one_metric, "optimisation"))
    assert lines[0] == ["method", "d=10", "d=10/nonlinear"] and lines[2] == [
        "random",
        "0.988 [0.9, 1.05]",
        "",
    ]
    success = [
        metrics.Record("success", "d=8", "acbo", "speedup", 120.0, -np.inf, np.inf, 1, "times")
    ]
    assert rows_of(metrics.render(success, "success"))[2] == [
        "speedup",
        "d=8",
        "acbo",
        "120",
        "1",
        "times",
    ]
    with pytest.raises(
        ValueError, match="no records for 'success'; there are records for optimisation, literature"
    ):
        metrics.render(make_records(), "success")


def test_write_results(tmp_path):
    records = make_records()
    metrics.write_results(tmp_path / "results", records, 7)
    folder = tmp_path / "results"
    assert {p.name for p in folder.iterdir()} == {"metrics.json"} | {
        f"{t}.{s}" for t in ("optimisation", "literature") for s in ("md", "csv", "tex")
    }
    rows = json.loads((folder / "metrics.json").read_text())
    assert [list(row) for row in rows] == [[f.name for f in fields(metrics.Record)]] * 4
    assert rows[0] == asdict(records[0]) and rows[3]["low"] is None
    with open(folder / "optimisation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["value"]) for row in table] == [0.98765, 0.1, 12.0] and table[2][
        "unit"
    ] == "ms"
    table = (folder / "optimisation.md").read_text()
    assert table.startswith(metrics.render(records, "optimisation") + "\n")
    assert "commit `" in table and "seed 7" in table
    latex = (folder / "optimisation.tex").read_text()
    assert latex.startswith("% d=10\n\\begin{tabular}") and "0.988 [0.9, 1.05]" in latex


def test_write_results_refuses(tmp_path):
    record = make_records()[0]
    for records, message in (
        ([record, record], "two records"),
        ([replace(record, value=float("nan"))], "not a result"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.write_results(tmp_path, records, 7)
    assert not list(tmp_path.iterdir())


def test_cells_are_of_a_table_that_there_is():
    with pytest.raises(TypeCheckError, match="optimization"):
        metrics.cells("optimization", "d=5", "acbo", {"regret": 0.1}, 1)
