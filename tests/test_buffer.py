"""The buffer as a value, and as a file that a person wrote: every complaint names file, row and
column.
"""

import csv
import inspect

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from lib.buffer import MIN_OBSERVATIONS, DataError, ExperienceBuffer, decimals, read_bounds
from lib.scm import Intervention


def test_adding_returns_a_new_buffer_and_first_is_what_was_known_then():
    empty = ExperienceBuffer.empty(3, 4)
    one = empty.add_intervention(Intervention.none(3), jnp.array([1.0, 2.0, 3.0]))
    two = one.add_intervention(Intervention.single(1, 5.0, 3), jnp.array([4.0, 5.0, 6.0]))
    assert (empty.size, one.size, two.size) == (0, 1, 2)
    assert not empty.values.any() and not one.values[1].any()
    assert two.values[:2].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert two.intervened.sum(0).tolist() == [0, 1, 0]
    assert two.observational.tolist() == [True, False, False, False]
    for count, known in ((0, empty), (1, one), (2, two), (9, two)):
        assert eqx.tree_equal(two.first(count), known)
    with pytest.raises(AttributeError):
        two.valid = two.valid  # pyright: ignore


def test_a_full_buffer_raises_and_grow_adds_free_places():
    nothing, add = Intervention.none(2), ExperienceBuffer.add_intervention
    full = add(ExperienceBuffer.empty(2, 1), nothing, jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="full"):
        add(full, nothing, jnp.ones(2))
    assert full.values.tolist() == [[1.0, 2.0]] and full.grow(2).size == 1
    for one in (add, eqx.filter_jit(add)):
        more = one(full.grow(2), nothing, jnp.array([3.0, 4.0]))
        assert more.values.tolist() == [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]] and more.size == 2


GOOD = ["a,b,intervened", *(f"{i},{i * i}," for i in range(MIN_OBSERVATIONS)), "3,5,a"]


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "lines",
    [
        [" a , b ,intervened", *GOOD[1:], "", " , , "],
        ["\ufeff" + GOOD[0], *GOOD[1:]],  # a byte-order mark is not part of a name
        [",".join(np.array(line.split(","))[[2, 0, 1]]) for line in GOOD],
        [*GOOD[:3], " 0.2e1 ,4,", *GOOD[4:]],
    ],
)
def test_a_good_file(tmp_path, lines):
    names, buffer, units = ExperienceBuffer.from_csv(write(tmp_path / "good.csv", lines))
    assert names == ("a", "b")
    assert buffer.size == MIN_OBSERVATIONS + 1 and buffer.observational.sum() == MIN_OBSERVATIONS
    assert units.raw(buffer.values)[2].tolist() == [2.0, 4.0]
    assert buffer.intervened[-1].tolist() == [True, False]


def replaced(line, text):
    return [*GOOD[:line], text, *GOOD[line + 1 :]]


def with_first(cells, *last):
    """A file whose first column has these cells."""
    return ["a,b,intervened", *(f"{a},{i}," for i, a in enumerate(cells)), *last]


SMALL = [1e-12 * (i % 4) for i in range(12)]  # deviation about 1.1e-12
BAD = {
    "no intervened column": (["a,b", *("1,2" for _ in range(12))], ["intervened"]),
    "unknown intervened variable": (
        replaced(11, "3,5,c"),
        ["row 12", "'intervened'", "'c'", "a, b"],
    ),
    "not a number": (replaced(3, "2,four,"), ["row 4", "'b'", "'four'"]),
    "decimal comma": (replaced(3, '"1,5",4,'), ["row 4", "'a'", "'1,5'"]),
    "below a blank line": (["", *replaced(3, "2,four,")], ["row 5", "'b'", "'four'"]),
    "empty cell": (replaced(3, "2,,"), ["row 4", "'b'", "''"]),
    "NaN": (replaced(4, "nan,9,"), ["row 5", "'a'", "nan"]),
    "infinite": (replaced(5, "4,-inf,"), ["row 6", "'b'", "-inf"]),
    "too large for float32": (replaced(5, "4,-1e39,"), ["row 6", "'b'", "-1e39"]),
    "duplicate column": (["a,a,intervened", *GOOD[1:]], ["row 1", "'a'", "used twice"]),
    "a column called intervened": (
        ["a,intervened,intervened", *GOOD[1:]],
        ["row 1", "'intervened' is ", "used twice"],
    ),
    "unnamed column": (["a,,intervened", *GOOD[1:]], ["row 1", "'' is empty"]),
    "ragged row": (replaced(6, "5,25"), ["row 7", "2 cells", "3 columns"]),
    "too few observations": (GOOD[:4], ["3 observational rows", "10"]),
    "zero variance": (
        [GOOD[0], *(f"{i},7," for i in range(12)), "1,8,a"],
        ["'b'", "zero variance"],
    ),
    **{
        f"zero variance, {cells[:2]}": (with_first(cells), ["'a'", "zero variance"])
        for cells in ([0.1] * 12, [1e16 + i % 3 for i in range(12)], [0] * 12, ["1e-400", 0] * 6)
    },
    # where deviations in float32 would be infinite, and before: a million deviations
    **{
        f"{cell} among small": (
            with_first(SMALL, f"{cell},3,a"),
            ["row 14, column 'a'", f"'{cell}'", "1,000,000 dev"],
        )
        for cell in ("1e30", "-1e-5", "1.5e-6")
    },
    "name with a separator": (["a;b,b,intervened", *GOOD[1:]], ["row 1", "'a;b' holds", "rename"]),
    "far out": (replaced(11, "1e30,5,a"), ["row 12", "'a'", "'1e30'", "typing error", "unit"]),
    "one variable": (["a,intervened", *(f"{i}," for i in range(12))], ["1 variable"]),
    "empty file": ([""], ["empty"]),
    "header only": (GOOD[:1], ["0 observational rows"]),
}


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
    "listed twice": (["variable,low,high", "a,0,1", "a,0,2"], ["row 3", "'a'"]),
    "ragged": (["variable,low,high", "a,0"], ["row 2", "2 cells"]),
}


@pytest.mark.parametrize(
    ("read", "lines", "words"),
    [
        *((ExperienceBuffer.from_csv, *case) for case in BAD.values()),
        *((lambda path: read_bounds(path, ("a", "b")), *case) for case in BAD_BOUNDS.values()),
    ],
    ids=[*BAD, *(f"bounds, {case}" for case in BAD_BOUNDS)],
)
def test_bad_files_say_where_and_what(tmp_path, read, lines, words):
    path = write(tmp_path / "bad.csv", lines)
    with pytest.raises(DataError) as error:
        read(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


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
        assert [float(cell) for cell in line.split(",")[:-1]] == written(row)
    more = buffer.values[0] + 1 / 3
    found = units.deviations(np.array(written(more)))
    np.testing.assert_array_equal(found[:4], more[:4])
    np.testing.assert_allclose(found[4], more[4], atol=1e-4)  # float64 has no more


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
    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "intervened"])
        writer.writerows([*([*row, ""] for row in rows), [*last, ";".join(names[:2])]])
    found, buffer, _ = ExperienceBuffer.from_csv(tmp_path / "data.csv")
    assert found == names and buffer.intervened[-1].tolist() == [True, True, False]


@pytest.mark.parametrize(
    "name", ["loop", "file/a.csv", "a" * 300, "a\0b", "missing", "folder", "bytes"]
)
@pytest.mark.parametrize("read", [ExperienceBuffer.from_csv, lambda path: read_bounds(path, ())])
def test_paths_that_lead_nowhere(tmp_path, name, read):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x01")
    problem = r"no such file|cannot be read as CSV .[^.\n]+.: give a file of comma-separated UTF-8"
    with pytest.raises(DataError, match=f"{name}: ({problem})"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("scale", "offset"), [(1.0, 10**13), (1e-200, 0.0), (1e-312, 0.0), (1e28, 0.0)]
)
def test_columns_vary_wherever_float64_can_tell(tmp_path, scale, offset):
    lines = with_first([offset + scale * i for i in range(1, 13)])
    _, buffer, units = ExperienceBuffer.from_csv(write(tmp_path / "data.csv", lines))
    np.testing.assert_allclose(np.diff(buffer.values[:, 0]), scale / units.spread[0], rtol=1e-5)


def test_a_cell_half_a_million_deviations_away_is_read(tmp_path):
    path = write(tmp_path / "data.csv", with_first(SMALL, "0.5e-6,3,a"))
    assert np.isfinite(ExperienceBuffer.from_csv(path)[1].values).all()


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(2.0**-80, 0.0), (1e-9, 0.0), (1.0, 2.0**26), (2.0**60, 0.0), (1e25, 0.0)],
)
def test_no_unit_is_too_small_and_no_offset_too_large(tmp_path, scale, offset):
    """The same deviations whatever the unit, and the digits of the file in what is written."""
    numbers = np.round(np.random.default_rng(0).normal(size=(MIN_OBSERVATIONS + 2, 2)), 3)
    lines = ["a,b,intervened", *(f"{offset + scale * a:.17g},{b}," for a, b in numbers)]
    _, buffer, units = ExperienceBuffer.from_csv(write(tmp_path / "units.csv", lines))
    raw = (units.raw(buffer.values)[:, 0] - offset) / scale
    values = np.asarray(buffer.values)[:, 0] * units.spread[0] / scale
    np.testing.assert_allclose(raw, numbers[:, 0], atol=1e-5)
    centred = numbers[:, 0] - numbers[:, 0].mean()
    np.testing.assert_allclose(values - values.mean(), centred, atol=1e-5)
    assert units.digits[1] == 3


def test_decimals():
    cells = "1.50", "12", "6.000738e+10", " -3e-9 ", "1e-9999", f"0e{10**20}"
    assert [decimals(cell) for cell in cells] == [2, 0, -4, 9, 9999, 0]
