"""What the scripts share before they start."""

import re
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.random as jr
import numpy as np
import pytest

from lib.artifacts import ArtifactError
from lib.settings import errors_for_people, preset_arguments, stage_key, use_compilation_cache
from lib.table import DataError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "small"),
        ("--steps 10", "small --steps 10"),
        ("paper --steps 10", "paper --steps 10"),
        ("hour", "hour"),
        ("--help", "--help"),
        ("smoke -h", "smoke -h"),
        ("--steps 10 --help", "--steps 10 --help"),
    ],
)
def test_preset_arguments(monkeypatch, given, expected):
    monkeypatch.setattr("sys.argv", ["script.py", *given.split()])
    assert preset_arguments() == expected.split()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        *(
            (error, 2, f"error: {re.escape(str(error))}\n")
            for error in (DataError("data.csv, row 3: wrong"), ArtifactError(Path("x"), "wrong"))
        ),
        (KeyboardInterrupt(), 130, r"(?s).*checkpoint.*"),
    ],
)
def test_errors_of_people_are_one_line_and_interrupts_have_a_status(error, status, said, capsys):
    with pytest.raises(SystemExit) as leaving, errors_for_people():
        raise error
    assert leaving.value.code == status and re.fullmatch(said, capsys.readouterr().err)


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), errors_for_people():
        raise ZeroDivisionError


def test_compilation_cache_goes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # the Makefile's
    monkeypatch.setattr(jax.config, "update", update := Mock())
    use_compilation_cache(tmp_path / "cache")
    update.assert_any_call("jax_compilation_cache_dir", str((tmp_path / "cache").resolve()))


def test_stages_and_uses_have_keys_of_their_own():
    """None of them is what another stage splits off or folds in, although all start at the same
    seed.
    """
    stages = "demos", "surrogate", "policy", "acbo", "evaluation"
    keys = [stage_key(0, stage, use) for stage in stages for use in ("problems", "play")]
    every = [one for key in (jr.key(0), *keys) for one in (key, *jr.split(key, 64))]
    numbers = np.stack([jr.key_data(key) for key in every])
    assert len(np.unique(numbers, axis=0)) == len(numbers)
    assert (jr.key_data(stage_key(0, "demos", "play")) == jr.key_data(keys[1])).all()
