"""Every study at toy size: it runs from its `Config`, and its tables have the rows they should."""

import importlib
import json
import runpy
from pathlib import Path

import pytest


SHIPPED = Path(__file__).resolve().parents[1] / "pretrained" / "acbo_small.eqx"
TOY = {
    "surrogate": dict(system=SHIPPED, sizes=(3,), shift_sizes=(), num_problems=8, num_obs=20),
    "policy": dict(
        systems=(SHIPPED, SHIPPED),  # one program serves both
        sizes=(3,),
        exploration_sizes=(),
        rivals=("surrogate_ei", "random"),
        num_problems=6,
        num_steps=1,
        band_sizes=(3,),
        band_problems=4,
    ),
    "check": dict(
        system=SHIPPED,
        sizes=(3,),
        num_obs=(20,),
        num_problems=3,
        num_steps=1,
        field_seeds=1,
        systems=("chain_12_rows",),
        parts=("no anchor",),
    ),
    "expert": dict(systems=("toy",), seeds=2, num_obs=20, num_steps=2),
    "fidelity": dict(steps=1, num_problems=4, num_obs=12, few_obs=12),
}
SMALL = "--model.model-hidden-dim 8 --model.model-n-layers 1 --chunk 1 --design.max-obs 30"
ROWS = {  # table, task, method
    "surrogate": {
        ("surrogate", "d=3", "f_test"),
        ("surrogate", "d=3/beliefs and effects", "acbo"),
        ("surrogate", "d=3/first experiment", "additive_ridge"),
    },
    "policy": {
        ("optimisation", "d=3", "acbo_small"),
        ("optimisation", "d=3/regret above acbo's, paired", "surrogate_ei"),
        ("effects", "d=3", "acbo"),
    },
    "check": {
        ("optimisation", "d=3, 20 rows", "no anchor"),
        ("optimisation", "d=3, 20 rows/above acbo_unchecked's, paired", "acbo"),
        ("ablation", "outside, first answer", "no anchor"),
    },
    "expert": {
        ("literature", "toy", "cbo_known_graph"),
        ("literature", "toy", "published CBO-U (n = 10)"),
    },
    "fidelity": {
        ("fidelity", "d=3", "enumeration"),
        ("fidelity", "d=4, 12 rows", "difference"),
        ("fidelity", "two variables, observations only", "acbo"),
    },
}


@pytest.mark.parametrize("study", TOY)
def test_a_study_at_toy_size(study, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the training that it starts
    module = importlib.import_module(f"studies.{study}")
    if study == "fidelity":
        monkeypatch.setattr(module, "ENUMERATED", f"{module.ENUMERATED} {SMALL}")
    if study == "check":  # every method is a program of its own: one before the check will do
        monkeypatch.delitem(module.BEFORE, "gaussian_processes")
    folder = module.main(module.Config(**TOY[study], folder=tmp_path))
    records = json.loads((folder / "metrics.json").read_text())
    assert {(r["table"], r["task"], r["method"]) for r in records} >= ROWS[study]
    table = next(iter(ROWS[study]))[0]
    assert "commit `" in (folder / f"{table}.md").read_text()  # says how it was made
    for r in records:
        assert r["low"] is None or r["low"] <= r["value"] <= r["high"]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("run", ["--seeds", "0"], "--seeds must be at least 1"),
        ("run", ["--asks", "-1"], "--asks at least 0"),
        ("run", ["--systems", "chain", "nowhere"], "nowhere: choose from chain"),
        ("run", ["--systems"], "none named"),
        ("run", ["--system", "nowhere.eqx"], "nowhere.eqx: no such file"),
        ("cases", ["--folder", "nowhere"], "nowhere: no such folder"),
        ("cases", ["--folder", ".", "--system", "nowhere.eqx"], "nowhere.eqx: no such file"),
    ],
)
def test_the_field_refuses_what_cannot_be_meant(script, arguments, said, monkeypatch, capsys):
    path = SHIPPED.parents[1] / "studies" / "field" / f"{script}.py"
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert said in capsys.readouterr().err
