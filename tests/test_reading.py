"""A file that a person wrote: what is read, what is left out and said, and what is refused."""

import csv
import re

import numpy as np
import pytest

from lib.buffer import MIN_OBSERVATIONS
from lib.cleaning import apart, isolated
from lib.knowledge import within
from lib.reading import read_experiments
from lib.table import (
    DataError,
    decimal_comma,
    decimals,
    number_of,
    plain,
    read_bounds,
    read_table,
)


RNG = np.random.default_rng(0)
NUMBERS = np.round(np.column_stack([RNG.normal(60, 5, 30), RNG.normal(4, 1, 30)]), 2)
OUTCOMES = np.round(20 + 5 * NUMBERS[:, 1] + RNG.normal(size=30), 1)
SET = ["", *[""] * 25, "heat", "heat", "dose", "dose"]
ROWS = [
    [f"{a:.2f}", f"{b:.2f}", f"{y:.1f}", s]
    for (a, b), y, s in zip(NUMBERS, OUTCOMES, SET, strict=True)
]
HEADER = ["heat", "dose", "yield", "intervened"]


def changed(cells, header=HEADER):
    """The plain file with some cells replaced: `{(row, column): text}`, rows counted from 0."""
    rows = [list(row) for row in ROWS]
    for (r, i), text in cells.items():
        rows[r][i] = text
    return [header, *rows]


def write(path, lines, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    return path


def read(tmp_path, lines, target="yield", bounds=(), **how):
    path = write(tmp_path / "data.csv", lines, **how)
    return read_experiments(path, target, bounds)


def bounds_of(tmp_path, *lines):
    (tmp_path / "bounds.csv").write_text("\n".join(lines) + "\n")
    return read_bounds(tmp_path / "bounds.csv")


def comma(rows):
    return [rows[0], *([cell.replace(".", ",") for cell in row] for row in rows[1:])]


def every(i, edit):
    """The plain file with a column edited."""
    return [HEADER, *([*row[:i], edit(row[i]), *row[i + 1 :]] for row in ROWS)]


SAME = {  # the plain file, otherwise written: rows, how they are written, what is said
    "plain": (changed({}), {}, None),
    "semicolons and decimal commas": (comma(changed({})), {"delimiter": ";"}, "decimal commas"),
    "decimal commas in quotes": (comma(changed({})), {}, "decimal commas"),
    "tabs": (changed({}), {"delimiter": "\t"}, None),
    "byte-order mark": (changed({}), {"encoding": "utf-8-sig"}, None),
    "Excel's unicode text": (changed({}), {"delimiter": "\t", "encoding": "utf-16"}, None),
    "cp1252": (every(0, lambda x: x + " °C"), {"encoding": "cp1252"}, None),
    "comments": ([["# made by"], ["# a meter"], *changed({})], {}, "rows 1, 2: read as comments"),
    "units": ([HEADER, ["C", "g", "%", ""], *ROWS], {}, "row 2: holds no number, read as units"),
    "footer": ([*changed({}), ["Mean", "60", "4", "40"], ["(30 rows)"]], {}, "a summary"),
    "empty columns": ([[*HEADER, "", ""], *([*row, "", ""] for row in ROWS)], {}, None),
    "blank lines": ([HEADER, [], *ROWS[:9], ["", "", "", ""], *ROWS[9:]], {}, None),
    "blanks in cells": ([[f" {x} " for x in row] for row in changed({})], {}, None),
    "capitals": ([["heat", "dose", "yield", "Intervened"], *every(3, str.upper)[1:]], {}, None),
    "per cent": (every(1, lambda x: x + " %"), {}, None),
    "errors": (every(2, lambda x: x + " ± 0.5"), {}, None),
    "thousands": (
        every(0, lambda x: f"{float(x) * 1000:,.0f}"),
        {},
        "commas in numbers: read as thousands",
    ),
}


@pytest.mark.parametrize(("lines", "how", "said"), SAME.values(), ids=SAME)
def test_the_same_file_otherwise_written(tmp_path, lines, how, said):
    found = read(tmp_path, lines, **how)
    assert found.names == ("heat", "dose", "yield") and found.target == 2
    factor = np.array([1000.0 if said and "thousands" in said else 1.0, 1.0, 1.0])
    raw = found.units.raw(found.buffer.values) / factor
    np.testing.assert_allclose(raw, np.column_stack([NUMBERS, OUTCOMES]), atol=1e-4)
    flags = np.asarray(found.buffer.intervened)
    assert flags.sum(0).tolist() == [2, 2, 0] and flags[26:].any(1).all()
    assert any(said in note for note in found.notes) if said else found.notes == []


@pytest.mark.parametrize(
    ("cell", "comma", "number"),
    [
        ("1,890", False, 1890.0),
        ("1,890", True, 1.89),
        ("1.890", True, 1890.0),
        ("0,125", False, 0.125),
        ("1.234.567,8", False, 1234567.8),
        ("1'234", False, 1234.0),
        ("1 234,5", True, 1234.5),
        ("-.5", False, -0.5),
        ("−2", False, -2.0),
        ("6.0e+10", False, 6e10),
        ("<0.05", False, 0.05),
        ("53 +- 1", False, 53.0),
        ("12 mg/L", False, 12.0),
        *((text, False, np.nan) for text in ("1e31", "2026-11-20", "10:30", "inf", "four", "A1")),
    ],
)
def test_numbers(cell, comma, number):
    np.testing.assert_equal(number_of(cell, comma)[0], number)


def test_decimals():
    cells = "1.50", "12", "6.000738e+10", "-3e-9", "1e-9999", f"0e{10**20}"
    assert [decimals(plain(cell, False)) for cell in cells] == [2, 0, -4, 9, 9999, 0]


SAID = {  # rows, rows and names that are kept, words of the note
    "failed and pending": (
        changed({(3, 2): "failed", (7, 2): "", (9, 2): "n/a"}),
        27,
        HEADER[:3],
        "3 rows without a result in 'yield' .*: rows 5, 9, 11",
    ),
    "missing cells": (changed({(3, 0): "", (5, 1): "NA"}), 28, HEADER[:3], "missing in rows 5, 7"),
    "missing in an experiment": (changed({(28, 0): ""}), 30, HEADER[:3], "median stands in"),
    "a word among numbers": (changed({(3, 0): "x"}), 29, HEADER[:3], "row 5: 'x' is no number"),
    "sentinel": (
        changed({(3, 2): "-999", (8, 2): "-999.0"}),
        28,
        HEADER[:3],
        "rows 5, 10: '-999' stands for no value",
    ),
    "slip in an observation": (changed({(3, 2): "4140"}), 29, HEADER[:3], "row 5: 'yield' = 4140"),
    "slip in another column": (changed({(3, 0): "6100"}), 29, HEADER[:3], "row 5: 'heat' = 6100"),
    "slip in an experiment": (changed({(28, 2): "4140"}), 29, HEADER[:3], "row 30: 'yield' = 4140"),
    "text": (
        [["id", *HEADER], *([f"s{i}", *row] for i, row in enumerate(ROWS))],
        30,
        HEADER[:3],
        "'id': text that is no number",
    ),
    "levels": (
        [["site", *HEADER], *(["abc"[i % 3], *row] for i, row in enumerate(ROWS))],
        30,
        ["site = a", "site = b", "site = c", *HEADER[:3]],
        "'site': read as levels .a, b, c.",
    ),
    "constant": ([["lot", *HEADER], *(["7", *row] for row in ROWS)], 30, HEADER[:3], "'lot': cons"),
    "a copy": (
        [["K", *HEADER], *([f"{float(row[0]) + 273.15}", *row] for row in ROWS)],
        30,
        HEADER[:3],
        "'K' says the same as 'heat'",
    ),
    "mostly missing": (
        [["x", *HEADER], *([str(i) if i % 3 else "", *row] for i, row in enumerate(ROWS))],
        30,
        HEADER[:3],
        "'x': more than a quarter",
    ),
    "a counter": (
        [["run", *HEADER], *([str(i), *row] for i, row in enumerate(ROWS))],
        30,
        ["run", *HEADER[:3]],
        "'run': counts or names the rows",
    ),
    "several units": (changed({(i, 0): f"{i}.5 C" for i in range(9)}), 30, HEADER[:3], None),
    "unknown values": (changed({(26, 3): "heat?"}), 29, HEADER[:3], "row 28: what was set"),
    "limits": (changed({(3, 2): "<41"}), 30, HEADER[:3], "row 5: '<41' is a limit"),
    "no column of settings": (
        [row[:3] for row in changed({})],
        30,
        HEADER[:3],
        "is read as an obs",
    ),
    "cells beyond": ([*changed({}), ["60", "4", "40", "", "x"]], 31, HEADER[:3], "row 32: cells r"),
    "no last cell": ([*changed({}), ["60", "4", "40"]], 31, HEADER[:3], None),
    "a title": ([["Trial 7"], *changed({})], 30, HEADER[:3], "row 1: above the header"),
    "one 999": (changed({(28, 2): "99"}), 30, HEADER[:3], None),
    "a breakthrough": (changed({(28, 2): "420"}), 30, HEADER[:3], "row 30: .* no typing error"),
    "what was set is missing": (changed({(28, 1): ""}), 29, HEADER[:3], "row 30: the value that"),
    "levels called none": (
        [["salt", *HEADER], *(["none" if i % 2 else "much", *row] for i, row in enumerate(ROWS))],
        30,
        ["salt = none", *HEADER[:3]],
        "'salt': read as levels",
    ),
    "an order": (
        [["StdOrder", *HEADER], *([str(7 * i % 31), *row] for i, row in enumerate(ROWS, 1))],
        30,
        ["StdOrder", *HEADER[:3]],
        "'StdOrder': counts or names",
    ),
    "a ramp": (changed({(i, 0): f"{50 + i / 4:.2f}" for i in range(26)}), 30, HEADER[:3], None),
    "a broken row": ([*changed({}), ["1", "2"]], 30, HEADER[:3], "row 32 has 2 cells for 4 col"),
    "a drift": (
        changed({(i, 2): f"{40 + i + i % 3:.1f}" for i in range(30)}),
        30,
        HEADER[:3],
        "drifts along the rows .*: taken out, to what it is in the last row",
    ),
    "shifted by one row": (
        changed({(i + 1, 2): row[1] for i, row in enumerate(ROWS[:-1])} | {(0, 2): "4.1"}),
        30,
        HEADER[:3],
        "'dose' of the row before explains",
    ),
    "below a limit": (changed({(3, 0): "<LOD", (8, 0): "BDL"}), 30, HEADER[:3], "'<LOD' is below"),
    "a unit here and there": (changed({(3, 0): "61 C"}), 30, HEADER[:3], "has no unit, read as C"),
    "units that clash": (
        [["x", *HEADER], *([f"{i % 7} {'m' if i % 2 else 'cm'}", *r] for i, r in enumerate(ROWS))],
        30,
        HEADER[:3],
        "'x': numbers with several units",
    ),
    "replicates": (
        [["x", *HEADER], *([str(i % 3), "60", "4", *row[2:]] for i, row in enumerate(ROWS))],
        30,
        ["x", "yield"],
        "27 rows are replicates of others: outcomes of one setting have a standard deviation of",
    ),
    "settings that moved together": (
        [
            HEADER[:3],
            *([a, f"{float(a) / 10 + i % 3 / 9:.2f}", y] for i, (a, _, y, _) in enumerate(ROWS)),
        ],
        30,
        HEADER[:3],
        "'heat' and 'dose' moved together",
    ),
    "twice the same": ([*changed({}), ROWS[3]], 31, HEADER[:3], "row 32: the same in every column"),
    "units however spelled": (
        changed({(i, 0): f"61.{i} {'mL' if i % 2 else 'ml'}" for i in range(9)}),
        30,
        HEADER[:3],
        None,
    ),
    "letters of significance": (
        changed({(i, 2): f"4{i}.5{'abc'[i % 3]}" for i in range(9)}),
        30,
        HEADER[:3],
        None,
    ),
    "thousands with a k": (
        changed({(i, 1): f"{i % 5 + 1}.{i % 7}k" if i % 2 else f"{900 + i}" for i in range(30)}),
        30,
        HEADER[:3],
        None,
    ),
    "an arm called intervention": (
        [
            ["Intervention", "age", "yield"],
            *([str(i % 2), *row[1:3]] for i, row in enumerate(ROWS)),
        ],
        30,
        ["Intervention", "age", "yield"],
        "no column 'intervened'",
    ),
    "blanks in words": (
        [["note", *HEADER], *([("ok", "late", "")[i % 3], *r] for i, r in enumerate(ROWS))],
        30,
        ["note = late", "note = ok", *HEADER[:3]],
        "'note': nobody set it",
    ),
    "another name for it": (changed({}, [*HEADER[:3], "Interventions"]), 30, HEADER[:3], None),
    "a sum": (
        changed({(i, 1): f"{100 - float(row[0]):.2f}" for i, row in enumerate(ROWS)}),
        30,
        ["heat", "yield"],
        "says the same",
    ),
}


@pytest.mark.parametrize(("lines", "count", "names", "said"), SAID.values(), ids=SAID)
def test_what_is_left_out_or_assumed_is_said(tmp_path, lines, count, names, said):
    found = read(tmp_path, lines)
    assert found.names == tuple(names) and found.buffer.size == count == len(found.lines)
    assert np.isfinite(found.buffer.values).all()
    assert said is None or any(re.search(said, note) for note in found.notes)


def test_a_drift_is_taken_out(tmp_path):
    """Rows fall by 2 each: all are brought to the last."""
    lines = changed({(i, 2): f"{y - 2 * i:.1f}" for i, y in enumerate(OUTCOMES)})
    drifted, still = read(tmp_path, lines), read(tmp_path, changed({}))
    found, known = (d.units.raw(np.asarray(d.buffer.values))[:, 2] for d in (drifted, still))
    assert np.abs(found - known + 2 * 29).max() < 2
    ordered = sorted(changed({})[1:], key=lambda row: float(row[2]))
    assert not any("drift" in note for note in read(tmp_path, [HEADER, *ordered]).notes)


@pytest.mark.parametrize("kind", ["cycle", "search", "walk", "arms"])
def test_what_is_no_drift_stays(tmp_path, kind):
    """A design in cycles, a search that comes nearer to its peak, a random walk, arms in turn."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        x, z = rng.normal(size=(2, 60))
        if kind == "search":
            x, z = (6 + np.exp(-np.arange(60) / 15) * one for one in (3 * x, 5 + z))
        y = -((x - 6) ** 2) - (z - 6) ** 2 + rng.normal(size=60)
        if kind == "cycle":
            x = np.tile([0.0, 10.0, 20.0], 20)
            y = 30 - (x - 10) ** 2 / 10 + rng.normal(size=60)
        elif kind == "walk":
            y = np.cumsum(rng.normal(size=60))
        elif kind == "arms":
            y = np.repeat([0, 5, 10], 20) + rng.normal(size=60)
        arms = np.repeat(["a", "b", "c"], 20) if kind == "arms" else ["a", "b"] * 30
        columns = (x.round(2), z.round(2), arms, y.round(2))
        rows = np.column_stack([np.asarray(column, str) for column in columns]).tolist()
        notes = " ".join(read(tmp_path, [["x", "z", "arm", "yield"], *rows]).notes)
        assert "taken out" not in notes and "shifted" not in notes


def test_lots_are_noticed(tmp_path):
    """Runs of ten rows, of which the second is higher by 30."""
    rows = [["L1", *row] if i < 10 else ["L2", *row] for i, row in enumerate(changed({})[1:], 0)]
    rows = [[lot, a, b, f"{float(y) + 30 * (lot == 'L2'):.1f}", s] for lot, a, b, y, s in rows]
    ((name, lot),) = read(tmp_path, [["charge", *HEADER], *rows]).lots
    assert name == "charge" and lot.tolist() == [0] * 10 + [1] * 20
    assert not read(tmp_path, [["charge", *HEADER], *rows[::3], *rows[1::3], *rows[2::3]]).lots


@pytest.mark.parametrize("words", ["ab", "abc"])
def test_words_can_be_set(tmp_path, words):
    rows = [[words[i % len(words)], *row] for i, row in enumerate(changed({})[1:])]
    table = [["salt", *HEADER], *rows]
    assert "salt" not in {name for name, _ in settable(read(tmp_path, table))}
    rows[-1][-1] = "salt"
    found = settable(read(tmp_path, table))
    assert {value for name, value in found if name == "salt"} == set(words)
    listed = bounds_of(tmp_path, "variable,low,high,levels", "salt,,,b", "dose,1,2,")
    found = settable(read(tmp_path, table, bounds=listed))
    assert {value for name, value in found if name == "salt"} == {"b"}
    for levels in ("ZNCL;b", "d"):
        with pytest.raises(DataError, match="row 2, column 'levels': '(ZNCL|d)' is none of a, b"):
            bounds = bounds_of(tmp_path, "variable,low,high,levels", f"salt,,,{levels}")
            read(tmp_path, table, bounds=bounds)
    listed = bounds_of(tmp_path, "variable,low,high,levels", "Salt,,,B", "dose,1,2,")
    assert ("salt", "b") in settable(read(tmp_path, table, bounds=listed))
    with pytest.raises(DataError, match="row 2, columns 'low' and 'high': give the range of 'dos"):
        read(tmp_path, table, bounds=bounds_of(tmp_path, "variable,low,high", "dose,,"))


def settable(data):
    """Settings at the ends of all ranges."""
    return {
        setting
        for i in np.flatnonzero(data.task.candidates)
        for end in (data.task.low[i], data.task.high[i])
        for setting in data.setting(int(i), data.value(int(i), float(end))).items()
    }


def test_three_parts_that_sum_to_one(tmp_path):
    parts = RNG.dirichlet([2.0, 2.0, 2.0], 30)
    rows = [
        [*(f"{x:.3f}" for x in row), y, ""] for row, (_, _, y, _) in zip(parts, ROWS, strict=True)
    ]
    notes = read(tmp_path, [["a", "b", "c", "yield", "intervened"], *rows]).notes
    assert notes == ["'a', 'b', 'c' always sum to 1: one of them cannot be set alone"]


def test_marks_and_stars_tell_what_was_set(tmp_path):
    """1 where a row was set: the variable that left its usual value is the one."""
    marked = changed({(r, 3): "1" if SET[r] else "0" for r in range(30)})
    for r, i, value in ((26, 1, "80"), (27, 1, "40"), (28, 2, "9"), (29, 2, "0.1")):
        marked[r + 1][i - 1] = value
    assert np.asarray(read(tmp_path, marked).buffer.intervened)[26:].argmax(1).tolist() == [
        0,
        0,
        1,
        1,
    ]
    both = np.asarray(
        read(tmp_path, changed({(26, 3): "*", (27, 3): "heat; dose"})).buffer.intervened
    )
    assert both[26:28].tolist() == [[True, True, False]] * 2


def test_designs_have_no_observations(tmp_path):
    """Every knob set in every row, or knobs that stand still until they are set."""
    joined = read(tmp_path, every(3, lambda _: "heat;dose"))
    still = [[*(row if SET[i] else ["60.00", "4.00", row[2], ""])] for i, row in enumerate(ROWS)]
    for r, (i, value) in zip(
        range(26, 30), ((0, "60.00"), (0, "60.00"), (1, "4.00"), (1, "4.00")), strict=True
    ):
        still[r][1 - i] = value
    for found, said in (
        (joined, "few rows are obs"),
        (read(tmp_path, [HEADER, *still]), "constant"),
    ):
        assert not found.buffer.intervened.any() and found.buffer.size == 30
        assert any(said in note for note in found.notes)


def test_a_pending_experiment_is_planned(tmp_path):
    found = read(tmp_path, [*changed({}), ["", "5.00", "", "dose"]])
    ((variable, value),) = found.planned
    assert variable == 1 and found.units.one(1).raw(np.array([value])) == pytest.approx(5.0)


def test_decades_are_worked_in_logarithms(tmp_path):
    """A setting by its range, an outcome by what it spans; a scale in the bounds says otherwise."""
    doses = 10.0 ** RNG.uniform(-6, -1, 30)
    counts = np.round(np.exp(RNG.normal(9.0, 2.0, 30)))
    rows = [
        [a, f"{d:.3e}", f"{c:.0f}", s] for (a, *_, s), d, c in zip(ROWS, doses, counts, strict=True)
    ]
    ranges = ["variable,low,high,scale", "heat,40,80,", "dose,1e-6,1e-1,"]
    found = read(tmp_path, [HEADER, *rows], bounds=bounds_of(tmp_path, *ranges))
    assert found.units.logs.tolist() == [False, True, True] and found.ends[0] == 0.0
    np.testing.assert_allclose(found.units.raw(found.buffer.values)[:, 1], doses, rtol=1e-3)
    middle = found.units.written(1, np.mean([found.task.low[1], found.task.high[1]]))
    assert middle == pytest.approx(10**-3.5, rel=0.02)
    linear = read(
        tmp_path, [HEADER, *rows], bounds=bounds_of(tmp_path, *ranges[:2], ranges[2] + "linear")
    )
    assert linear.units.logs.tolist() == [False, False, True]
    with pytest.raises(DataError, match="0 or below"):
        bounds = bounds_of(tmp_path, ranges[0], "dose,0,1,log")
        read(tmp_path, [HEADER, *rows], bounds=bounds)


@pytest.mark.parametrize(
    ("name", "outcomes", "ends"),
    [
        ("yield_pct", [90, 100, 95], (0.0, 100.0)),
        ("count", [3, 8, 1], (0.0, np.inf)),
        ("x", [0.5, 0.0, 1.0], (0.0, np.inf)),
        ("x", [0.5, 0.1, 1.0], (-np.inf, np.inf)),
        ("rate, %", [50, 120, 70], (0.0, np.inf)),
    ],
)
def test_the_ends_of_what_an_outcome_can_be(tmp_path, name, outcomes, ends):
    rows = [[*row[:2], str(outcomes[i % 3]), ""] for i, row in enumerate(ROWS)]
    assert read(tmp_path, [["heat", "dose", name, "intervened"], *rows], name).ends == ends


def test_ranges_without_bounds_are_what_was_set_or_seen(tmp_path):
    found = read(
        tmp_path, changed({(26, 0): "50.00", (27, 0): "70.00", (28, 1): "9", (29, 1): "9"})
    )
    assert (found.low[0], found.high[0]) == (50.0, 70.0)
    assert found.low[1] == found.high[1] == 9.0 and found.task.low[1] < found.task.high[1]
    observed = read(tmp_path, every(3, lambda _: ""))
    assert (observed.low[1], observed.high[1]) == (NUMBERS[:, 1].min(), NUMBERS[:, 1].max())


def test_bounds_have_steps_levels_and_single_values(tmp_path):
    bounds = bounds_of(
        tmp_path,
        "Variable;low;high;step;levels",
        "a;1;6;2;",
        "b;0;10;;0|5|10",
        "c;3,5;3,5;;",
        "d;-1;2,5;;",
    )
    assert [b.values for b in bounds] == [(1.0, 3.0, 5.0), (0.0, 5.0, 10.0), (3.5,), ()]
    assert (bounds[3].low, bounds[3].high) == (-1.0, 2.5)


def test_values_far_outside_are_found_in_both_scales():
    few = np.array([1.0, 2.0, 3.0, 2.5, 1.5, 2.2, 1.8, 2.1, 1.2, 2.9, 2000.0, np.nan])
    assert isolated(few).tolist() == [False] * 10 + [True, False]
    assert apart(few[:11], 10.0, 4.0).sum() == 1
    assert not isolated(np.exp(np.random.default_rng(1).normal(0.0, 2.0, 200))).any()


GOOD = ["a,b,intervened", *(f"{i % 7},{i * i}," for i in range(MIN_OBSERVATIONS)), "3,5,a"]


def replaced(line, text):
    return [*GOOD[:line], text, *GOOD[line + 1 :]]


REFUSED = {
    "the target set by hand": (replaced(11, "3,5,b"), ["row 12", "'b' is the target"]),
    "unknown variables": (
        [*replaced(11, "3,5,c"), "3,6,d"],
        ["row 12, column 'intervened': 'c' is not", "row 13, column 'intervened': 'd' is", "a, b"],
    ),
    "duplicate column": (["a,a,intervened", *GOOD[1:]], ["row 1", "'a'", "used twice"]),
    "ragged rows": (
        [*replaced(6, "5"), "1"],
        ["row 7 has 1 cells", "3 columns", "row 13 has 1 cells"],
    ),
    "too few rows": (GOOD[:4], ["3 rows can be used", "10 are needed"]),
    "constant target": ([GOOD[0], *(f"{i % 5},7," for i in range(12))], ["must vary", "constant"]),
    "far out": (replaced(11, "3e13,5,a"), ["row 12", "'a'", "1,000,000 dev", "typing error"]),
    "a separator in a name": (
        ['"a;b",b,intervened', *GOOD[1:]],
        ["row 1", "'a;b' holds", "rename"],
    ),
    "no such target": (["a,c,intervened", *GOOD[1:]], ["no column 'b'", "a, c"]),
    "words for numbers": (["a,b,intervened", *["1,x,"] * 12], ["column 'b': holds no numbers"]),
    "units": (
        ["a,b,intervened", *(f"{i},{i % 4} {('mg', 'g')[i % 2]}," for i in range(12))],
        ["column 'b': numbers with several units (g, mg)"],
    ),
    "empty file": ([""], ["empty"]),
    "header only": (GOOD[:1], ["no rows below the header"]),
}
BAD_BOUNDS = {
    "other header": (["name,low,high", "a,0,1"], ["row 1", "name, low, high", "variable,low,high"]),
    "several": (
        ["variable,low,high", "a,zero,1", "b,2,1", "a,0,inf"],
        ["row 2, column 'low': 'zero'", "row 3, columns 'low'", "row 4, column 'high': 'inf'"],
    ),
    "ragged": (["variable,low,high", "a,0"], ["row 2 has 2 cells"]),
    "scale": (["variable,low,high,scale", "a,0,1,cubic"], ["row 2, column 'scale': 'cubic'"]),
}
UNFIT_BOUNDS = {
    "unknown variable": (["a,0,1", "c,0,1"], ["row 3", "'c' is not in the data", "a, b"]),
    "listed twice": (["a,0,1", "A,0,2"], ["row 3", "'A' has a range already"]),
    "another unit": (["a,0,1e20"], ["row 2", "'a' ends more than 1,000,000 deviations"]),
    "only the target": (["b,0,1"], ["no variable may be intervened on"]),
}


@pytest.mark.parametrize(
    ("data", "bounds", "words"),
    [
        *((lines, None, words) for lines, words in REFUSED.values()),
        *((GOOD, lines, words) for lines, words in BAD_BOUNDS.values()),
        *((GOOD, ["variable,low,high", *lines], words) for lines, words in UNFIT_BOUNDS.values()),
    ],
    ids=[*REFUSED, *(f"bounds, {case}" for case in (*BAD_BOUNDS, *UNFIT_BOUNDS))],
)
def test_bad_files_say_where_and_what(tmp_path, data, bounds, words):
    """All that is wrong at once, a line each, every line with its file."""
    path = tmp_path / "data.csv"
    path.write_text("\n".join(data) + "\n")
    with pytest.raises(DataError) as error:
        read_experiments(path, "b", bounds_of(tmp_path, *bounds) if bounds else ())
    said = str(error.value)
    assert all(word in said for word in words), said
    assert all(str(tmp_path) in line for line in said.splitlines())


def test_values_are_written_as_they_were_read(tmp_path):
    """With the columns' own digits, where float32 seen in float64 would show noise; with more where
    a value needs them.
    """
    rng = np.random.default_rng(0)
    lines = [["a", "b", "c", "d", "e", "intervened"]]
    for t, x, y in zip(rng.integers(400, 800, 50), *rng.normal(size=(2, 50)), strict=True):
        cells = f"{t / 10}", f"{x:.3f}", f"{2e4 + 1e3 * y:.0f}", f"{2 + y % 7:.4f}E+25"
        lines.append([*cells, f"{1e13 + (t * t) % 997:.0f}", ""])
    lines[-1] = ["0.0", "0.000", "-70000", "0E+21", "10000000000000", "a;c"]
    found = read(tmp_path, lines, "b")
    assert found.buffer.intervened[-1].tolist() == [True, False, True, False, False]

    def written(row):
        return [found.units.written(i, value) for i, value in enumerate(np.asarray(row))]

    for cells, row in zip(lines[1:], found.buffer.values, strict=True):
        assert [float(cell) for cell in cells[:-1]] == written(row)
    more = found.buffer.values[0] + 1 / 3
    again = found.units.deviations(np.array(written(more)))
    np.testing.assert_array_equal(again[:4], more[:4])
    np.testing.assert_allclose(again[4], more[4], atol=1e-4)  # float64 has no more


@pytest.mark.parametrize(
    "names",
    [
        ("a,b", "a", 'say "b"'),
        ('"', ",", "dose (mg)  per day"),
        ("Ausbeute in µg", "温度", "e\u0301"),
        ("two\nlines", "a\rb", "1e5"),
    ],
)
def test_names_are_read(tmp_path, names):
    *rows, last = np.random.default_rng(0).normal(size=(MIN_OBSERVATIONS + 1, 3)).tolist()
    lines = [[*names, "intervened"], *([*row, ""] for row in rows), [*last, ";".join(names[:2])]]
    found = read(tmp_path, lines, names[2])
    assert found.names == names and found.buffer.intervened[-1].tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["loop", "file/a.csv", "a" * 300, "a\0b", "missing", "folder"])
@pytest.mark.parametrize("use", [lambda path: read_experiments(path, "b"), read_bounds])
def test_paths_that_lead_nowhere(tmp_path, name, use):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    problem = r"no such file|cannot be read as CSV .[^.\n]+.: give a file of comma-separated UTF-8"
    with pytest.raises(DataError, match=f"{name}: ({problem})"):
        use(tmp_path / name)


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1.0, 1e13), (1e-200, 0.0), (1e28, 0.0), (2.0**-80, 0.0), (1.0, 2.0**26), (1e-9, 5.0)],
)
def test_no_unit_is_too_small_and_no_offset_too_large(tmp_path, scale, offset):
    """The same deviations whatever the unit, and the digits of the file in what is written."""
    numbers = np.round(np.random.default_rng(0).normal(size=(MIN_OBSERVATIONS + 2, 2)), 3)
    lines = [[f"{offset + scale * a:.17g}", str(b), ""] for a, b in numbers]
    found = read(tmp_path, [["a", "b", "intervened"], *lines], "b")
    values = np.asarray(found.buffer.values)[:, 0] * found.units.spread[0] / scale
    centred = numbers[:, 0] - numbers[:, 0].mean()
    np.testing.assert_allclose(values - values.mean(), centred, atol=2e-3 if offset > 1e9 else 1e-5)
    assert found.units.digits[1] == 3


PIECES = [
    "",
    ",",
    ";",
    "\n",
    "\r\n",
    "\t",
    '"',
    "'",
    "#",
    "NaN",
    "-999",
    "1e40",
    "1e-40",
    "<",
    "±",
    "%",
    "*",
]
PIECES += [
    "?",
    "\0",
    "\ufeff",
    "é",
    "0",
    "9",
    "-",
    "+",
    ".",
    "a" * 3000,
    "heat",
    "intervened",
    "\x1b[31m",
]


@pytest.mark.parametrize("seed", range(60))
def test_a_spoilt_file_is_read_or_refused(tmp_path, seed):
    """Cells, lines and bytes of the file, its bounds and a limit changed at random: finite
    numbers, or lines that say what is wrong.
    """
    rng, texts = np.random.default_rng(seed), {}
    limit = "heat + 2 dose <= 90"
    ranges = "variable,low,high,step\nheat,40,80,\ndose,1,7,0.5\n"
    plainly = "\n".join(",".join(row) for row in changed({})) + "\n"
    for name, text in (("data.csv", plainly), ("bounds.csv", ranges), ("limit", limit)):
        most = {"data.csv": 4, "bounds.csv": 2, "limit": 1 + (seed % 4 == 3)}[name]
        for _ in range(rng.integers(0, most)):
            at, length = rng.integers(0, len(text)), rng.integers(0, (2, 2, 12, 200)[seed % 4])
            piece = PIECES[rng.integers(0, len(PIECES))] if rng.random() < 0.8 else text[at:][:40]
            text = text[:at] + piece + text[at + length :]
        texts[name] = text
        (tmp_path / name).write_bytes(
            text.encode(("utf-8", "utf-8", "utf-16", "cp1252")[seed % 4], "replace")
        )
    try:
        found = read_experiments(
            tmp_path / "data.csv", "yield", read_bounds(tmp_path / "bounds.csv")
        )
        found = within(found, [texts["limit"]])
    except DataError as error:
        assert all(line.strip() for line in str(error).splitlines())
    else:
        numbers = found.buffer.values, found.task.low, found.task.high, found.low, found.high
        ordered = (found.low <= found.high)[np.asarray(found.task.candidates)]
        assert all(np.isfinite(x).all() for x in numbers) and ordered.all()


@pytest.mark.parametrize(
    ("cells", "delimiter", "values"),
    [
        (["0,870", "1,240", "12,5"], ";", [0.87, 1.24, 12.5]),
        (["875", "1,050", "990"], "\t", [875.0, 1050.0, 990.0]),
        (["875", "1.050", "990"], ";", [875.0, 1050.0, 990.0]),
        (["1.050.000", "2.000.000", "1.500.000"], ";", [1.05e6, 2e6, 1.5e6]),
        (["45 46", "47", "48"], ",", [np.nan, 47.0, 48.0]),
    ],
)
def test_marks_of_thousands_and_of_decimals_by_column(tmp_path, cells, delimiter, values):
    """Beside a column with decimal points, or dates that are no numbers."""
    rows = [[cells[i % 3], f"0{i % 9 + 1}.11.2026", row[2]] for i, row in enumerate(ROWS)]
    path = write(tmp_path / "data.csv", [["x", "day", "yield"], *rows], delimiter)
    table = read_table(path)
    found = [
        number_of(cell, decimal_comma([row[0] for row in table.rows], table.comma))[0]
        for cell in cells
    ]
    np.testing.assert_equal(found, values)


def test_variables_called_like_marks(tmp_path):
    """N is a variable, not "no"; and what bounds list is all that is set, even if left out."""
    lines = [["N", "x", "yield", "intervened"], *ROWS]
    for r, name in ((26, "N"), (27, "N"), (28, "x"), (29, "x")):
        lines[r + 1] = [*ROWS[r][:3], name]
    assert read(tmp_path, lines).buffer.intervened.sum(0).tolist() == [2, 2, 0]
    bounds = bounds_of(tmp_path, "variable,low,high", "lot,1,9")
    with pytest.raises(DataError, match="no variable may be intervened on"):
        read(tmp_path, [["lot", *HEADER], *(["7", *row] for row in ROWS)], bounds=bounds)


def test_a_cause_without_noise_stays(tmp_path):
    exact = changed({(i, 2): f"{2 * float(row[1]) + 1:.2f}" for i, row in enumerate(ROWS)})
    found = read(tmp_path, exact)
    assert found.names == ("heat", "dose", "yield")
    assert found.buffer.intervened.sum(0).tolist() == [2, 2, 0]


def test_all_rows_marked_are_a_design(tmp_path):
    found = read(tmp_path, every(3, lambda _: "1"))
    assert found.buffer.size == 30 and not found.buffer.intervened.any()
