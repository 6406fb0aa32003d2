"""The same from Python, and campaigns with a command: whatever holds the table, one answer; what
was stopped goes on as if it had not been.
"""

import importlib
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import acbo
from lib.table import DataError, columns_in, read_table


ROOT = Path(__file__).parents[1]
EXAMPLE, BOUNDS = ROOT / "examples" / "experiments.csv", ROOT / "examples" / "bounds.csv"
RANGES = {"temperature": (45, 75), "catalyst": (2, 8), "stirring": (100, 300)}
DEPLOY = importlib.import_module("06_deploy")


@pytest.fixture(scope="module")
def system():
    return acbo.load()


@pytest.fixture(scope="module")
def frame():
    return pd.read_csv(EXAMPLE)


def without_digest(suggestion):
    return {key: part for key, part in suggestion.answer.items() if key != "data_sha256"}


def test_whatever_holds_the_table_the_answer_is_the_same(system, frame):
    filled = frame.fillna("")
    fields = filled.to_records(index=False)
    lists = {name: filled[name].tolist() for name in filled}
    asked = [
        system.ask(EXAMPLE, "yield", "max", bounds=BOUNDS),
        system.ask(str(EXAMPLE), "yield", "max", bounds=RANGES),
        *(system.ask(t, "yield", "max", bounds=RANGES) for t in (frame, lists, fields)),
    ]
    assert asked[0].settings and "Next experiment" in str(asked[0])
    assert all(without_digest(one) == without_digest(asked[0]) for one in asked[1:])
    assert asked[0].answer == DEPLOY.suggest(DEPLOY.Suggest(EXAMPLE, "yield", "max", BOUNDS))


def test_what_is_told_is_the_last_row(system, frame, tmp_path):
    measured = {"temperature": 61.3, "stirring": 301, "impurity": 1.9, "yield": 60.2}
    path = tmp_path / "data.csv"
    path.write_text(EXAMPLE.read_text())
    suggestion = system.ask(frame, "yield", "max", bounds=RANGES)
    (name, value) = next(iter(suggestion.settings.items()))
    table = system.tell(suggestion, measured)
    assert len(frame) == 46 and {len(column) for column in table.values()} == {47}
    last = {key: column[-1] for key, column in table.items()}
    assert last == {**measured, name: value, "intervened": name}
    of_file = system.ask(path, "yield", "max", bounds=RANGES)
    assert system.tell(of_file, measured) == path
    again = (system.ask(t, "yield", "max", bounds=RANGES) for t in (path, table))
    assert len({str(one) for one in again}) == 1
    del measured["yield"]
    with pytest.raises(DataError, match="table, new row: no value of yield"):
        system.tell(suggestion, measured)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (3, "int is no table"),
        (np.zeros((3, 3)), "ndarray is no table"),
        ({"a": [1], "y": [1, 2]}, "columns of different length"),
        ({"a": [1, 2], "b": [1, 2]}, "no column 'y'"),
        ({}, "empty"),
        ("missing.csv", "no such file"),
    ],
)
def test_what_is_no_table_is_refused(system, table, said):
    with pytest.raises(DataError, match=said):
        system.ask(table, "y", "min")
    with pytest.raises(DataError, match="one of them"):
        system.ask(table, "y")


def test_several_names_and_nothing_are_cells():
    table = {"a": np.float32([0.1, 2]), "intervened": [("a", "b"), None]}
    assert columns_in(table)["intervened"] == [("a", "b"), None]
    read = read_table({**table, "b": [1, 2]})
    assert read.rows == [["0.1", "1"], ["2.0", "2"]] and read.acted == ["a;b", ""]


LAB = """
import json, pathlib, sys, zlib
import numpy as np
sys.path[:0] = [{examples!r}]
import plant
asked = sys.stdin.readline()
calls = pathlib.Path({calls!r})
count = len(calls.read_text()) if calls.exists() else 0
calls.write_text("x" * (count + 1))
if count in {failing}:
    sys.exit(1)
row = plant.rows(np.random.default_rng(zlib.crc32(open({data!r}, "rb").read())), json.loads(asked))
print(json.dumps(dict(zip(plant.NAMES, row[0].round(3).tolist()))))
"""


def campaign(folder, failing=()):
    """A campaign of three experiments, started anew when one of these calls fails."""
    folder.mkdir()
    data, lab = folder / "data.csv", folder / "lab.py"
    data.write_text(EXAMPLE.read_text())
    where = dict(examples=str(ROOT / "examples"), data=str(data), calls=str(folder / "calls"))
    lab.write_text(LAB.format(failing=failing, **where))
    config = DEPLOY.Run(
        *(data, "yield", "max", BOUNDS), experiment=shlex.join([sys.executable, str(lab)]), until=9
    )
    for _ in failing:
        with pytest.raises(DataError, match="failed with status 1"):
            DEPLOY.run(config)
    DEPLOY.run(config)
    return data


def test_a_campaign_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, capsys):
    whole = campaign(tmp_path / "whole")
    said = capsys.readouterr().out
    assert [line[:3] for line in said.splitlines()[:3]] == ["7/9", "8/9", "9/9"]
    assert "Best action so far" in said
    assert whole.read_text() == campaign(tmp_path / "stopped", (0, 2)).read_text()
    assert read_table(whole).num_experiments == 9 and len(whole.read_text().splitlines()) == 50


def test_examples_are_what_they_say(capsys):
    examples = ROOT / "examples"
    plant = runpy.run_path(str(examples / "plant.py"))
    assert plant["data"](np.random.default_rng(3)) + "\n" == EXAMPLE.read_text()
    bench = runpy.run_path(str(examples / "bench.py"))
    nothing = plant["rows"](np.random.default_rng(0), {}, 100_000)[:, -1].mean()
    assert bench["main"](budget=3) > nothing + 1
    assert capsys.readouterr().out.count("set {") <= 3
