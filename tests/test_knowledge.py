"""What a person knows beside the data."""

import numpy as np
import pytest

from lib.answer import warnings_of
from lib.knowledge import known_edges, within
from lib.reading import read_experiments
from lib.table import DataError, read_bounds


RNG = np.random.default_rng(0)


@pytest.fixture
def data(tmp_path):
    """Columns a, b, 2-c around 1, 2 and 3, and the target y; ranges 0 to 4 for the three."""
    numbers = RNG.normal([1.0, 2.0, 3.0, 0.0], 0.1, (30, 4))
    rows = "".join(",".join(f"{x:.3f}" for x in row) + ",\n" for row in numbers)
    (tmp_path / "data.csv").write_text("a,b,2-c,y,intervened\n" + rows)
    ranges = "variable,low,high,levels\na,0,4,0;1;2;3\nb,0,4,\n2-c,0,4,\n"
    (tmp_path / "bounds.csv").write_text(ranges)
    return read_experiments(tmp_path / "data.csv", "y", read_bounds(tmp_path / "bounds.csv"))


@pytest.mark.parametrize(
    ("limit", "low", "high"),
    [
        ("a + b + 2-c <= 8", (0, 0, 0), (3, 4, 4)),
        ("2a - b >= -1", (0.5, 0, 0), (4, 3, 4)),
        ("A<=2.5", (0, 0, 0), (2.5, 4, 4)),
        ("a + b = 3", (0, 0, 0), (None, None, 4)),
        ("a =< 2.5", (0, 0, 0), (2.5, 4, 4)),
        ("2 2-c + a ≤ 7 ml", (0, 0, 0), (1, 4, 3)),
    ],
)
def test_a_limit_narrows_ranges_others_being_as_usual(data, limit, low, high):
    found = within(data, [limit])
    for i in range(3):
        settable = bool(found.task.candidates[i])
        assert settable == (high[i] is not None)
        if settable:
            assert (found.low[i], found.high[i]) == pytest.approx((low[i], high[i]), abs=0.1)
            ends = found.units.one(i).raw(np.array([[found.task.low[i]], [found.task.high[i]]]))
            assert ends[:, 0] == pytest.approx([found.low[i], found.high[i]], abs=1e-4)
            assert all(found.low[i] <= value <= found.high[i] for value in found.bounds[i].values)


def test_tiers_leave_out_what_comes_later(data, tmp_path):
    (tmp_path / "tiers.csv").write_text("variable;tier\na;1\nb;3\n2-C;2\ny;2\n")
    found = known_edges(data, ["a"], ["2-c"], tmp_path / "tiers.csv")
    # from a tier (rows a, b, 2-c, y) to an earlier one there is no edge; 2-c and y share theirs
    expected = [[0, 0, 0, 1], [-1, 0, -1, -1], [-1, 0, 0, -1], [-1, 0, 0, 0]]
    assert np.asarray(found.task.known).tolist() == expected
    assert np.asarray(found.task.candidates).tolist() == [True, False, True, False]
    # of a variable without a tier nothing is known
    some = known_edges(data, [], [], {"a": 2, "y": 1}).task
    assert np.argwhere(np.asarray(some.known)).tolist() == [[0, 3]] and some.known[0, 3] == -1


def test_edges_are_read_with_and_without_the_target(data):
    found = known_edges(data, ["A->b", "2-C"], [" b -> 2-c ", "b", "y -> a"], None).task
    expected = [[0, 1, 0, 0], [0, 0, -1, -1], [0, 0, 0, 1], [-1, 0, 0, 0]]
    assert np.asarray(found.known).tolist() == expected
    # nothing known, or tiers that say nothing, is as if nothing had been asked
    assert known_edges(data, [], [], None).task.known is None
    assert known_edges(data, [], [], {"a": 1, "y": 1}).task.known is None


def test_what_the_data_contradict_is_said(data):
    told = known_edges(data, ["a", "b", "2-c -> a"], ["2-c"], None)
    check = {"experiments": 0, "in_band": 0}

    def said(data, untold):
        return [one for one in warnings_of(data, check, np.array(untold)) if "is said to" in one]

    assert said(told, [0.012, 0.06, 0.99, 0.0]) == [
        "'a' is said to be a parent of 'y', but the data contradict it: without being told so its "
        "probability is 0.01",
        "'2-c' is said to be no parent of 'y', but the data contradict it: without being told so "
        "its probability is 0.99",
    ]
    assert not said(told, [0.9, 0.06, 0.94, 0.0]) and not said(data, [0.0, 0.0, 1.0, 0.0])


def test_limits_between_the_levels_leave_none(data):
    found = within(data, ["a >= 1.2", "a <= 1.8"])
    assert np.asarray(found.task.candidates).tolist() == [False, True, True, False]


@pytest.mark.parametrize("limits", [["a + b + 2-c = 6"], ["a <= 1", "a >= 2", "b + 2-c = 5"]])
def test_where_no_setting_is_left_the_data_are_blocked(data, limits):
    assert "forbids every setting" in within(data, limits).blocked and not data.blocked


@pytest.mark.parametrize(
    ("require", "forbid", "tiers", "limits", "said"),
    [
        (["d"], [], None, [], "--require: 'd' is none of the variables a, b, 2-c"),
        ([], ["y"], None, [], "--forbid: 'y' is none"),
        (["a"], ["a"], None, [], "--require: a -> y: cannot be there and be forbidden"),
        (["a"], [], "variable,tier\na,2\ny,1\n", [], "--require: a -> y: cannot be there"),
        (["b -> a"], [], "variable,tier\na,1\nb,2\ny,2\n", [], "b -> a: cannot be .* by tiers"),
        (["a -> b", "b -> a"], [], None, [], "a -> b: is part of a cycle: .*\n.*b -> a: is"),
        (["a -> b", "b", "y -> a"], [], None, [], "y -> a: is part of a cycle"),
        (["a -> d"], [], None, [], "--require: 'd' is none of the variables a, b, 2-c, y"),
        ([], ["a -> a"], None, [], "--forbid: 'a' is none of the variables b, 2-c, y"),
        ([], ["a -> b -> y"], None, [], "'b -> y' is none"),
        ([], ["-> b"], None, [], "--forbid: '' is none of the variables a, 2-c, y"),
        ([], [], "variable,tier\na,1\n", [], "'y' is not listed"),
        ([], [], "variable,tier\na,x\ny,1\n", [], "row 2: 'a', 'x'"),
        ([], [], "name,tier\na,1\n", [], "row 1: write variable,tier"),
        ([], [], None, ["a + b"], "write a sum and its limit"),
        ([], [], None, ["a + d <= 1"], "'a \\+ d' is no sum of numbers times variables"),
        ([], [], None, ["a b <= 1"], "'a b' is no sum"),
        ([], [], None, ["a <= <3"], "write a sum and its limit"),
    ],
)
def test_what_does_not_fit_is_refused(data, tmp_path, require, forbid, tiers, limits, said):
    if tiers:
        (tmp_path / "tiers.csv").write_text(tiers)
    with pytest.raises(DataError, match=said):
        known_edges(within(data, limits), require, forbid, tiers and tmp_path / "tiers.csv")
