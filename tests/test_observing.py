"""Results added to a person's file: the file keeps its form, is never half written, loses nothing
under two hands, and takes nothing that does not fit; and experiments that commands make.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lib.observing import made_by, observe, row_of, with_row
from lib.table import DataError, read_table


ROOT = Path(__file__).parents[1]
PLAIN = "a,b,y,intervened\n1,2.5,3,\n2,1.5,4,a\n"
GERMAN = "\ufeffa;b;y;intervened\r\n1;2,5;3;\r\n2;1,5;4;a\r\n"
FORMS = {
    "plain": (PLAIN, "utf-8", "3,0.5,5,b\n"),
    "no last line end": (PLAIN[:-1], "utf-8", "\n3,0.5,5,b\n"),
    "german": (GERMAN, "utf-8", "3;0,5;5;b\r\n"),
    "utf-16": (PLAIN.replace(",", "\t"), "utf-16", "3\t0.5\t5\tb\n"),
    "latin": (PLAIN.replace("a,b", "ä,b").replace(",a\n", ",ä\n"), "cp1252", "3,0.5,5,b\n"),
    "comments": ("# made by hand\n" + PLAIN, "utf-8", "3,0.5,5,b\n"),
    "separator told": ("sep=;\n" + PLAIN.replace(",", ";"), "utf-8", "3;0.5;5;b\n"),
    "names in front": ("intervened,a,b,y\n,1,2.5,3\na,2,1.5,4\n", "utf-8", "b,3,0.5,5\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_keeps_its_form(tmp_path, form):
    text, encoding, line = FORMS[form]
    path = tmp_path / "data.csv"
    path.write_bytes(text.encode(encoding))
    first = "ä" if form == "latin" else "a"
    row = {first: 3, "B": 0.5, "y": 5, "intervened": ["b"]}
    written = observe(path, row)
    assert path.read_bytes() == (text + line).encode(encoding)
    assert written == len((text + line).splitlines()) and not list(tmp_path.glob("*.tmp"))


def test_a_row_comes_before_a_footer_and_a_column_is_made_where_there_is_none(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,y\n1,2\n3,4\n\nmean,3\n")
    observe(path, {"a": 5, "y": None})
    assert path.read_text() == "a,y\n1,2\n3,4\n5,\n\nmean,3\n"
    observe(path, {"a": 6, "y": 7, "intervened": "a"})
    assert path.read_text() == "a,y,intervened\n1,2,\n3,4,\n5,,\n6,7,a\n\nmean,3\n"
    assert read_table(path).acted == ["", "", "", "a"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"a": 1, "b": 2}, "no value of y: null"),
        ({"a": 1, "b": 2, "y": 3, "c": 4}, "'c' is no column; the columns are a, b, y"),
        ({"a": 1, "b": 2, "y": "high"}, "column 'y': 'high' is no number"),
        ({"a": 1, "b": 2, "y": 1e31}, "column 'y': '1e+31' is no number"),
        ({"a": 1, "b": 2, "y": float("nan")}, "column 'y': 'nan' is no number"),
        ({"a": 1, "b": 2, "y": 3, "intervened": "a;q"}, "column 'intervened': 'q' is no column"),
        ({"a": 1, "b": None, "y": 3, "intervened": "b"}, "column 'b': it was set, but"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, row, said):
    path = tmp_path / "data.csv"
    path.write_text(PLAIN)
    for write in (
        lambda: observe(path, row),
        lambda: with_row({"a": [1], "b": [2], "y": [3]}, row),
    ):
        with pytest.raises(DataError, match="new row") as refused:
            write()
        assert said in str(refused.value) and "\n" not in str(refused.value)
    assert path.read_text() == PLAIN


def test_a_variable_may_be_called_as_a_mark_is(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("X,N,intervened\n1,2,\n2,1,N\n1,1,0\n")
    observe(path, {"X": 3, "N": 4, "intervened": "X"})
    assert read_table(path).acted == ["", "N", "0", "X"]
    assert read_table(path).num_experiments == 2


def test_marks_of_set_rows_are_refused_where_names_are_needed(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(PLAIN.replace(",a\n", ",1\n"))
    with pytest.raises(DataError, match="say 0 or 1"):
        observe(path, {"a": 1, "b": 2, "y": 3, "intervened": "a"})


def test_a_row_that_would_change_how_others_are_read_is_refused(tmp_path):
    """1.234 and 2.345 are thousands beside 3,5 or decimals alone."""
    path = tmp_path / "data.csv"
    path.write_text('a,y\n"1,234",2\n"2,345",4\n')
    with pytest.raises(DataError, match="would change how others are read"):
        observe(path, {"a": "3,5", "y": 1})


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "data.csv"
    path.write_text(PLAIN)

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device.*nothing was changed"):
        observe(path, {"a": 1, "b": 2, "y": 3})
    assert path.read_text() == PLAIN and [p.name for p in tmp_path.iterdir()] == ["data.csv"]


def test_two_at_once_lose_nothing(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(PLAIN)
    code = (
        "import sys; from pathlib import Path; from lib.observing import observe\n"
        "for i in range(25): observe(Path(sys.argv[1]), {'a': i, 'b': sys.argv[2], 'y': 1})"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, path, name], cwd=ROOT)
        for name in ("10", "20")
    ]
    assert [one.wait() for one in both] == [0, 0]
    rows = [tuple(row[:2]) for row in read_table(path).rows[2:]]
    assert sorted(rows) == sorted((f"{i}", b) for i in range(25) for b in ("10", "20"))


def command(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def test_a_command_gets_the_setting_and_its_row_is_taken():
    code = "import json, sys; print(json.dumps({**json.loads(sys.stdin.readline()), 'y': 2}))"
    assert made_by(command(code), {"a": 1.5}, 60.0) == {"a": 1.5, "y": 2}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("no-such-command", "cannot be started"),
        ("'", "cannot be started"),
        (command("import sys; sys.exit(3)"), "failed with status 3"),
        (command(""), "printed nothing"),
        (command("print('warming up')"), "'warming up' is no JSON object"),
        (command("print('[1, 2]')"), "is no JSON object"),
        (command("print('{\"y\": NaN}')"), "NaN is no JSON: write null"),
        (command("import time; time.sleep(60)"), "no answer within 0.5 seconds: raise --timeout"),
    ],
)
def test_an_experiment_that_fails_says_what_happened(told, said):
    with pytest.raises(DataError, match="--experiment") as refused:
        made_by(told, {}, 0.5 if "sleep" in told else 60.0)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_hanging_command_started_ends_with_it(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(DataError, match="no answer"):
        made_by(command(code), {}, 1.0)
    subprocess.run(["sleep", "4"], check=True)
    assert not (tmp_path / "late").exists()


def test_a_row_is_a_json_object():
    assert row_of(json.dumps({"a": None}), "--row") == {"a": None}
    with pytest.raises(DataError, match="--row: 'a=1' is no JSON object"):
        row_of("a=1", "--row")
