"""The buffer as a value, and as a file that a person wrote: every complaint names file, row and
column.
"""

import csv
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lib.buffer import (
    MIN_OBSERVATIONS,
    MOST_DECIMALS,
    DataError,
    ExperienceBuffer,
    decimals,
    parse_number,
    read_bounds,
    read_table,
)
from lib.scm import Intervention


def test_adding_returns_a_new_buffer():
    empty = ExperienceBuffer.empty(3, 4)
    one = empty.add_observation(jnp.array([1.0, 2.0, 3.0]))
    two = one.add_intervention(Intervention.single(1, 5.0, 3), jnp.array([4.0, 5.0, 6.0]))
    assert (empty.size, one.size, two.size) == (0, 1, 2)
    assert not empty.values.any() and not one.values[1].any()
    assert two.values[:2].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert two.intervened.sum(0).tolist() == [0, 1, 0]
    assert two.observational.tolist() == [True, False, False, False]
    with pytest.raises(AttributeError):
        two.valid = two.valid  # pyright: ignore


def test_grow_adds_free_places_only():
    buffer = ExperienceBuffer.empty(2, 1).add_observation(jnp.array([1.0, 2.0])).grow(2)
    assert buffer.values.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]] and buffer.size == 1
    assert buffer.add_observation(jnp.array([3.0, 4.0])).values[1].tolist() == [3.0, 4.0]


def test_first_is_what_was_known_then():
    one = ExperienceBuffer.empty(2, 3).add_observation(jnp.array([1.0, 2.0]))
    two = one.add_intervention(Intervention.single(0, 3.0, 2), jnp.array([3.0, 4.0]))
    for count, known in ((1, one), (2, two), (9, two)):
        assert eqx.tree_equal(two.first(count), known)


def test_a_full_buffer_raises():
    full = ExperienceBuffer.empty(2, 1).add_observation(jnp.zeros(2))
    with pytest.raises(ValueError, match="full"):
        full.add_observation(jnp.ones(2))
    assert full.values.tolist() == [[0.0, 0.0]]


def test_adding_inside_jit():
    add = jax.jit(lambda buffer, row: buffer.add_observation(row))
    one = ExperienceBuffer.empty(2, 3).add_observation(jnp.ones(2))
    assert add(one, jnp.array([3.0, 4.0])).values.tolist() == [[1.0, 1.0], [3.0, 4.0], [0.0, 0.0]]


GOOD = ["a,b,intervened", *(f"{i},{i * i}," for i in range(MIN_OBSERVATIONS)), "3,5,a"]


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_good_file(tmp_path):
    names, buffer, units = ExperienceBuffer.from_csv(
        write(tmp_path / "good.csv", [" a , b ,intervened", *GOOD[1:], "", " , , "])
    )
    assert names == ("a", "b")
    assert buffer.size == MIN_OBSERVATIONS + 1 and buffer.observational.sum() == MIN_OBSERVATIONS
    assert units.raw(buffer.values)[2].tolist() == [2.0, 4.0] and buffer.intervened[
        -1
    ].tolist() == [True, False]


def test_the_intervened_column_may_stand_anywhere(tmp_path):
    lines = [",".join(np.array(line.split(","))[[2, 0, 1]]) for line in GOOD]
    names, buffer, units = ExperienceBuffer.from_csv(write(tmp_path / "good.csv", lines))
    assert (
        names == ("a", "b")
        and units.raw(buffer.values)[2].tolist() == [2.0, 4.0]
        and buffer.intervened[-1].tolist() == [True, False]
    )


def replaced(line, text):
    return [*GOOD[:line], text, *GOOD[line + 1 :]]


BAD = {
    "no intervened column": (["a,b", *("1,2" for _ in range(12))], ["intervened"]),
    "unknown intervened variable": (
        replaced(11, "3,5,c"),
        ["row 12", "'intervened'", "'c'", "a, b"],
    ),
    "not a number": (replaced(3, "2,four,"), ["row 4", "'b'", "'four'"]),
    "empty cell": (replaced(3, "2,,"), ["row 4", "'b'", "''"]),
    "NaN": (replaced(4, "nan,9,"), ["row 5", "'a'", "nan"]),
    "infinite": (replaced(5, "4,inf,"), ["row 6", "'b'", "inf"]),
    "too large for float32": (replaced(5, "4,-1e39,"), ["row 6", "'b'", "-1e39"]),
    "duplicate column": (["a,a,intervened", *GOOD[1:]], ["row 1", "'a'"]),
    "unnamed column": (["a,,intervened", *GOOD[1:]], ["row 1", "''"]),
    "ragged row": (replaced(6, "5,25"), ["row 7", "2 cells", "3 columns"]),
    "too few observations": (GOOD[:4], ["3 observational rows", "10"]),
    "zero variance": (
        [GOOD[0], *(f"{i},7," for i in range(12)), "1,8,a"],
        ["'b'", "zero variance"],
    ),
    "name with a separator": (["a;b,b,intervened", *GOOD[1:]], ["row 1", "'a;b'", "rename"]),
    "far out": (replaced(11, "1e30,5,a"), ["row 12", "'a'", "'1e30'", "typing error", "unit"]),
    "one variable": (["a,intervened", *(f"{i}," for i in range(12))], ["1 variable"]),
    "empty file": ([""], ["empty"]),
    "header only": (GOOD[:1], ["0 observational rows"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_say_where_and_what(tmp_path, case):
    lines, words = BAD[case]
    path = write(tmp_path / "bad.csv", lines)
    with pytest.raises(DataError) as error:
        ExperienceBuffer.from_csv(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_row_numbers_are_those_of_the_file(tmp_path):
    """A blank line above the bad row still counts, as it does in any editor."""
    with pytest.raises(DataError, match="row 6"):
        ExperienceBuffer.from_csv(
            write(tmp_path / "bad.csv", [*GOOD[:3], "", *replaced(4, "x,9,")[3:]])
        )


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            ExperienceBuffer.from_csv(path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="binary.csv.*UTF-8"):
        ExperienceBuffer.from_csv(tmp_path / "binary.csv")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    (tmp_path / "excel.csv").write_text("\ufeffa,b\n1,2\n", encoding="utf-8")
    assert read_table(tmp_path / "excel.csv") == (["a", "b"], [(2, ["1", "2"])])


def test_parse_number(tmp_path):
    assert parse_number(" -1.5e3 ", tmp_path, 2, "a") == -1500.0
    for cell in ("", "1,5", "nan", "-inf", "1e31"):
        with pytest.raises(DataError, match="row 7, column 'speed'"):
            parse_number(cell, tmp_path / "x.csv", 7, "speed")


def test_read_bounds(tmp_path):
    low, high = read_bounds(
        write(tmp_path / "bounds.csv", ["variable,low,high", "b,-1,2.5"]), ("a", "b", "y")
    )
    # unlisted: no range
    assert low.tolist() == [0.0, -1.0, 0.0] and high.tolist() == [0.0, 2.5, 0.0]


BAD_BOUNDS = {
    "other header": (["name,low,high", "a,0,1"], ["row 1", "name, low, high", "variable,low,high"]),
    "unknown variable": (
        ["variable,low,high", "a,0,1", "c,0,1"],
        ["row 3", "'variable'", "'c'", "a, b"],
    ),
    "not a number": (["variable,low,high", "a,zero,1"], ["row 2", "'low'", "'zero'"]),
    "infinite": (["variable,low,high", "a,0,inf"], ["row 2", "'high'", "inf"]),
    "no width": (["variable,low,high", "a,0,1", "b,2,2"], ["row 3", "'low' and 'high'", "2"]),
    "ragged": (["variable,low,high", "a,0"], ["row 2", "2 cells"]),
}


@pytest.mark.parametrize("case", BAD_BOUNDS)
def test_bad_bounds_say_where_and_what(tmp_path, case):
    lines, words = BAD_BOUNDS[case]
    path = write(tmp_path / "bounds.csv", lines)
    with pytest.raises(DataError) as error:
        read_bounds(path, ("a", "b"))
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_bounds_listed_twice_are_refused(tmp_path):
    with pytest.raises(DataError, match="row 3.*'a'"):
        read_bounds(
            write(tmp_path / "bounds.csv", ["variable,low,high", "a,0,1", "a,0,2"]), ("a", "b")
        )


def test_a_short_row_is_refused():
    buffer = ExperienceBuffer.empty(3, 2)
    write = inspect.unwrap(ExperienceBuffer.write)  # without the run-time shape checks of the tests
    for row in (jnp.ones(1), jnp.array(2.0), jnp.ones(4)):
        with pytest.raises(ValueError, match="the outcome has shape"):
            write(buffer, 0, Intervention.none(3), row)
    with pytest.raises(ValueError, match="the intervention has shape"):
        buffer.add_intervention(Intervention.single(0, 1.0, 2), jnp.ones(3))


def test_values_are_written_as_they_were_read(tmp_path):
    """With the columns' own digits, where float32 seen in float64 would show noise; with more where
    a value needs them.
    """
    rng = np.random.default_rng(0)
    lines = ["a,b,c,d,e,intervened"]
    for t, x, y in zip(rng.integers(400, 800, 50), *rng.normal(size=(2, 50)), strict=True):
        lines.append(f"{t / 10},{x:.3f},{2e4 + 1e3 * y:.0f},{2 + y % 7:.4f}E+25,{1e13 + t:.0f},")
    lines[-1] = "0.0,0.000,-70000,0E+21,10000000000000,a;c"
    _, buffer, units = ExperienceBuffer.from_csv(write(tmp_path / "data.csv", lines))
    assert buffer.intervened[-1].tolist() == [True, False, True, False, False]

    def written(row):
        return [units.written(i, value) for i, value in enumerate(np.asarray(row))]

    for line, row in zip(lines[1:], buffer.values, strict=True):
        assert line.split(",")[:-1] == written(row)
    more = buffer.values[0] + 1 / 3
    found = units.deviations(np.array(written(more), float))
    np.testing.assert_array_equal(found[:4], more[:4])
    np.testing.assert_allclose(found[4], more[4], atol=1e-4)  # float64 has no more


def test_names_are_read_or_refused(tmp_path):
    rows = jr.normal(jr.key(0), (MIN_OBSERVATIONS + 1, 3))

    def read(names):
        with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "intervened"])
            writer.writerows([*row, ""] for row in rows[:-1].tolist())
            writer.writerow([*rows[-1].tolist(), ";".join(names[:2])])
        return ExperienceBuffer.from_csv(tmp_path / "data.csv")

    for names in (
        ("a,b", "a", 'say "b"'),
        ('"', ",", "dose (mg)  per day"),
        ("Ausbeute in µg", "温度", "e\u0301"),
        ("two\nlines", "a\rb", "1e5"),
    ):
        found = read(names)
        assert found.names == names
        assert found.buffer.intervened[-1].tolist() == [True, True, False]
    for names, problem in (
        (("a;b", "a", "b"), "'a;b' holds ';'"),
        (("a", "", "b"), "'' is empty"),
        (("a", "b", "a"), "'a' is .* used twice"),
        (("a", "b", "intervened"), "'intervened' is .* used twice"),
    ):
        with pytest.raises(DataError, match=problem):
            read(names)


@pytest.mark.parametrize("name", ["loop", "file/a.csv", "a" * 300, "a\0b"])
@pytest.mark.parametrize("read", [ExperienceBuffer.from_csv, lambda path: read_bounds(path, ())])
def test_paths_that_lead_nowhere(tmp_path, name, read):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{name}: cannot be read as CSV .[^.\n]+.: give a file"):
        read(tmp_path / name)


def test_columns_are_constant_only_where_float64_cannot_tell(tmp_path):
    def read(cells):
        lines = ["a,b,intervened", *(f"{cell},{i}," for i, cell in enumerate(cells))]
        return ExperienceBuffer.from_csv(write(tmp_path / "data.csv", lines))

    for scale, offset in ((1.0, 10**13), (1e-200, 0.0), (1e-312, 0.0), (1e28, 0.0)):
        cells = [repr(offset + scale * i) for i in range(1, 13)]
        _, buffer, units = read(cells)
        np.testing.assert_allclose(np.diff(buffer.values[:, 0]), scale / units.spread[0], rtol=1e-5)
    for cells in ([0.1] * 12, [1e16 + i % 3 for i in range(12)], [0] * 12, ["1e-400", "0"] * 6):
        with pytest.raises(DataError, match="'a': zero variance"):
            read(cells)


def test_cells_far_from_their_column_are_refused(tmp_path):
    """Where deviations in float32 would be infinite, and before: a million deviations."""
    cells = [f"{1e-12 * (i % 4)}" for i in range(12)]  # deviation about 1.1e-12
    for far, refused in (("1e30", True), ("-1e-5", True), ("1.5e-6", True), ("0.5e-6", False)):
        lines = ["a,b,intervened", *(f"{cell},{i}," for i, cell in enumerate(cells)), f"{far},3,a"]
        path = write(tmp_path / "data.csv", lines)
        if refused:
            with pytest.raises(DataError, match=f"row 14, column 'a': '{far}'.*1,000,000 dev"):
                ExperienceBuffer.from_csv(path)
        else:
            assert np.isfinite(ExperienceBuffer.from_csv(path).buffer.values).all()


def test_no_unit_is_too_small_and_no_offset_too_large(tmp_path):
    """The same deviations whatever the unit, and the digits of the file in what is written."""
    numbers = np.round(np.random.default_rng(0).normal(size=(MIN_OBSERVATIONS + 2, 2)), 3)

    def read(scale, offset, name):
        lines = ["a,b,intervened", *(f"{offset + scale * a:.17g},{b}," for a, b in numbers)]
        _, buffer, units = ExperienceBuffer.from_csv(write(tmp_path / name, lines))
        return (
            units.raw(buffer.values)[:, 0],
            np.asarray(buffer.values)[:, 0] * units.spread[0] / scale,
            units,
        )

    for scale, offset in (
        (2.0**-80, 0.0),
        (1e-9, 0.0),
        (1.0, 2.0**26),
        (2.0**60, 0.0),
        (1e25, 0.0),
    ):
        raw, values, units = read(scale, offset, "units.csv")
        np.testing.assert_allclose((raw - offset) / scale, numbers[:, 0], atol=1e-5)
        np.testing.assert_allclose(
            values - values.mean(), numbers[:, 0] - numbers[:, 0].mean(), atol=1e-5
        )
    assert read(1.0, 0.0, "units.csv")[2].digits[1] == 3
    assert [decimals(cell) for cell in ("1.50", "12", "6.000738e+10", " -3e-9 ")] == [2, 0, -4, 9]
    assert [decimals(cell) for cell in ("1e-9999", f"0e{10**20}")] == [MOST_DECIMALS, 0]
