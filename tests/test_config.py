"""What the scripts share before they start."""

from pathlib import Path

import jax
import pytest

from lib.artifacts import ArtifactError
from lib.buffer import DataError
from lib.config import errors_for_people, preset_arguments, use_compilation_cache


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["small"]),
        (["--steps", "10"], ["small", "--steps", "10"]),
        (["paper", "--steps", "10"], ["paper", "--steps", "10"]),
        (["hour"], ["hour"]),
        (["--help"], ["--help"]),
        (["smoke", "-h"], ["smoke", "-h"]),
        (["--steps", "10", "--help"], ["--steps", "10", "--help"]),
    ],
)
def test_preset_arguments(given, expected):
    before = list(given)
    assert preset_arguments(given) == expected
    assert given == before


@pytest.mark.parametrize("error", [DataError("data.csv, row 3: wrong"), ArtifactError(Path("x.eqx"), "wrong")])
def test_errors_of_people_are_one_line(error, capsys):
    with pytest.raises(SystemExit) as leaving, errors_for_people():
        raise error
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {error}\n"


def test_an_interrupt_leaves_with_its_own_status(capsys):
    with pytest.raises(SystemExit) as leaving, errors_for_people():
        raise KeyboardInterrupt
    assert leaving.value.code == 130 and "checkpoint" in capsys.readouterr().err


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), errors_for_people():
        raise ZeroDivisionError


def test_compilation_cache_goes_where_it_is_told(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        use_compilation_cache(tmp_path / "cache")
        assert jax.config.jax_compilation_cache_dir == str((tmp_path / "cache").resolve())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
