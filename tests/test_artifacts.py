"""Artifacts come back as they were saved or not at all; the same content gives the same bytes."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lib.artifacts import (
    HEADER_FIELDS,
    ArtifactError,
    TrainingLog,
    checksum,
    digest,
    fingerprint,
    load_arrays,
    load_checkpoint,
    load_module,
    read_header,
    read_log,
    save_arrays,
    save_checkpoint,
    save_module,
)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    sizes: tuple[int, ...] = (5, 8)
    out: Path = Path("somewhere")


def build(hyperparameters):
    return eqx.nn.MLP(2, 3, hyperparameters["width"], 1, key=jr.key(0))


def save(path, module=None, **changes):
    module = eqx.nn.MLP(2, 3, 4, 1, key=jr.key(7)) if module is None else module
    config = dataclasses.asdict(Config())
    arguments: dict[str, Any] = {
        "stage": "surrogate",
        "config": config,
        "hyperparameters": {"width": 4},
        "seed": 1,
        "step": 3,
        "parents": [],
    }
    arguments |= {"metrics": {"loss": np.float32(0.5)}} | changes
    save_module(path, module, **arguments)
    return module


ARRAYS = {
    "values": np.arange(6, dtype=np.float32).reshape(2, 3),
    "sets": np.eye(2, dtype=bool),
    "names": np.array(["X", "Y"]),
}


def save_demos(path, arrays=ARRAYS):
    save_arrays(
        path,
        arrays,
        stage="demos",
        config={"steps": 3},
        hyperparameters={},
        seed=1,
        step=0,
        parents=[],
        metrics={},
    )


def test_module_round_trip(tmp_path):
    parent, path = tmp_path / "demos.npz", tmp_path / "new" / "surrogate.eqx"
    save_demos(parent)
    module = save(path, parents=[parent])
    loaded, header = load_module(path, "surrogate", build)
    assert eqx.tree_equal(eqx.filter(loaded, eqx.is_array), eqx.filter(module, eqx.is_array))
    assert set(header) == set(HEADER_FIELDS)
    assert header["parents"] == {"demos.npz": hashlib.sha256(parent.read_bytes()).hexdigest()}
    assert header["config"] == {"steps": 3, "sizes": [5, 8]}  # no path
    assert header["metrics"] == {"loss": 0.5} and header["seed"] == 1 and header["step"] == 3
    assert header["versions"] == {
        "jax": jax.__version__,
        "equinox": eqx.__version__,
        "numpy": np.__version__,
    }
    assert read_header(path) == header
    line, payload = path.read_bytes().split(b"\n", 1)
    assert json.loads(line) == header and header["checksum"] == checksum(header, payload)
    assert [p.name for p in path.parent.iterdir()] == ["surrogate.eqx"]  # no temporary file stays


def test_array_round_trip(tmp_path):
    path = tmp_path / "demos.npz"
    save_demos(path)
    arrays, header = load_arrays(path, "demos")
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)
    assert read_header(path) == header
    with np.load(path, allow_pickle=False) as file:
        assert file["header"].shape == () and json.loads(str(file["header"])) == header
    with pytest.raises(ValueError, match="'header'"):
        save_demos(path, {"header": np.zeros(2)})


def test_same_content_same_bytes(tmp_path):
    for save_one, name in ((save, "surrogate.eqx"), (save_demos, "demos.npz")):
        first, second = tmp_path / "a" / name, tmp_path / "b" / name
        save_one(first)
        save_one(second)
        assert first.read_bytes() == second.read_bytes() and digest(first) == digest(second)
    save(tmp_path / "c.eqx", seed=2)
    assert digest(tmp_path / "c.eqx") != digest(tmp_path / "a" / "surrogate.eqx")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9 if path.suffix == ".eqx" else path.read_bytes().index(np.float32(5).tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["surrogate.eqx", "demos.npz"])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, name, fraction):
    path = tmp_path / name
    load = damaged(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ArtifactError, match="truncated"):
        load()


def damaged(path):
    """Save an artifact and return what loads it."""
    if path.suffix == ".eqx":
        save(path)
        return lambda: load_module(path, "surrogate", build)
    save_demos(path)
    return lambda: load_arrays(path, "demos")


@pytest.mark.parametrize(
    "name,command",
    [("surrogate.eqx", "02_train_surrogate.py"), ("demos.npz", "01_extract_demos.py")],
)
def test_edited_missing_and_foreign(tmp_path, name, command):
    path = tmp_path / name
    load = damaged(path)
    flip(path)
    with pytest.raises(ArtifactError, match=f"{name}.*edited.*{command}"):
        load()
    path.write_bytes(b"something else\n" * 10)
    with pytest.raises(ArtifactError, match=f"{name}.*{command}"):
        load()
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing.*{command}"):
        load()
    with pytest.raises(ArtifactError, match=f"{name}: missing.*{command}"):
        digest(path)


def test_edited_array_is_found_by_checksum(tmp_path):
    """A consistent `.npz` whose arrays were changed: the zip is whole, only the checksum tells."""
    path = tmp_path / "demos.npz"
    save_demos(path)
    with np.load(path) as file:
        content = dict(file)
    content["values"][0, 0] = 9
    np.savez(path, **content)
    with pytest.raises(ArtifactError, match="checksum"):
        load_arrays(path, "demos")


def rewrite_header(path, **changes):
    line, payload = path.read_bytes().split(b"\n", 1)
    header = json.loads(line) | changes
    path.write_bytes(
        json.dumps({k: v for k, v in header.items() if v is not None}).encode() + b"\n" + payload
    )


def test_wrong_stage_schema_shapes(tmp_path):
    path = tmp_path / "surrogate.eqx"
    save(path)
    with pytest.raises(ArtifactError, match="wrong stage.*'surrogate'.*'policy'.*03_warmstart"):
        load_module(path, "policy", build)
    with pytest.raises(ValueError, match="unknown stage 'polcy'.*demos, surrogate, policy"):
        load_module(path, "polcy", build)
    with pytest.raises(ValueError, match="unknown stage 'polcy'"):
        save(path, stage="polcy")
    key = jr.key(0)
    for wrong in (
        lambda h: eqx.nn.MLP(2, 3, 5, 1, key=key),
        lambda h: eqx.nn.MLP(2, 3, 4, 2, key=key),
        lambda h: eqx.nn.Linear(2, 4, key=key),
    ):
        with pytest.raises(ArtifactError, match="surrogate.eqx: wrong shapes.*02_train"):
            load_module(path, "surrogate", wrong)
    with pytest.raises(ArtifactError, match="hyperparameters.*depth"):
        load_module(path, "surrogate", lambda h: h["depth"])
    rewrite_header(path, schema=0)
    with pytest.raises(ArtifactError, match="wrong schema: the file has 0, this code reads 2"):
        load_module(path, "surrogate", build)
    rewrite_header(path, schema=2, seed=None)
    with pytest.raises(ArtifactError, match="lacks 'seed'"):
        load_module(path, "surrogate", build)


def test_nan_is_not_written(tmp_path):
    broken = eqx.tree_at(
        lambda m: m.layers[1].bias, build({"width": 4}), jnp.array([0.0, jnp.nan, 0.0])
    )
    with pytest.raises(ArtifactError, match=r"NaN in .*layers\[1\].bias"):
        save(tmp_path / "surrogate.eqx", broken)
    with pytest.raises(ArtifactError, match="NaN in .*values"):
        save_demos(tmp_path / "demos.npz", {"values": np.array([np.nan])})
    with pytest.raises(ArtifactError, match="NaN"):
        save_checkpoint(tmp_path / "checkpoint", broken, fingerprint="a", step=1)
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "surrogate.eqx", metrics={"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "surrogate.eqx"
    save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("lib.artifacts.os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(path, seed=2)
    assert path.read_bytes() == before


def test_checkpoints(tmp_path):
    path, tree = (
        tmp_path / "run.ckpt",
        {"model": build({"width": 4}), "count": jnp.array(3), "best": jnp.inf},
    )
    assert load_checkpoint(path, tree, "mine") is None
    save_checkpoint(path, tree, fingerprint="mine", step=5)
    loaded = load_checkpoint(path, tree, "mine")
    assert loaded is not None and loaded[1] == 5
    assert eqx.tree_equal(
        eqx.filter(loaded[0], eqx.is_array_like), eqx.filter(tree, eqx.is_array_like)
    )
    assert load_checkpoint(path, tree, "other") is None
    with pytest.raises(ArtifactError, match="wrong shapes"):
        load_checkpoint(path, tree["model"], "mine")
    for step in (7, -3):
        rewrite_header(shutil.copy(path, tmp_path / "step.ckpt"), step=step)
        with pytest.raises(ArtifactError, match="delete it"):
            load_checkpoint(tmp_path / "step.ckpt", tree, "mine")
    flip(path.rename(tmp_path / "run.eqx"))
    with pytest.raises(ArtifactError, match="delete it"):
        load_checkpoint(tmp_path / "run.eqx", tree, "mine")


def test_fingerprint(tmp_path):
    parent = tmp_path / "demos.npz"
    save_demos(parent)
    script = tmp_path / "02_train.py"
    script.write_text("steps = 3\n")
    same = fingerprint(script, Config(), [parent])
    assert same == fingerprint(
        script, Config(out=Path("elsewhere")), [shutil.copy(parent, tmp_path / "copy.npz")]
    )
    assert same != fingerprint(script, Config(steps=4), [parent])
    save_demos(parent, ARRAYS | {"more": np.ones(1)})
    assert same != fingerprint(script, Config(), [parent])


def test_what_is_half_done_does_not_go_on_with_other_code(tmp_path, monkeypatch):
    """A changed script or file of `lib` changes the fingerprint; a finished artifact is loaded all
    the same.
    """
    script, library = tmp_path / "02_train.py", tmp_path / "lib"
    library.mkdir()
    script.write_text("steps = 3\n")
    (library / "method.py").write_text("rate = 1\n")
    monkeypatch.setattr("lib.artifacts.__file__", str(library / "artifacts.py"))
    first = fingerprint(script, Config())
    (library / "method.py").write_text("rate = 2\n")
    second = fingerprint(script, Config())
    script.write_text("steps = 4\n")
    assert len({first, second, fingerprint(script, Config())}) == 3
    save(tmp_path / "surrogate.eqx")
    (library / "method.py").write_text("rate = 3\n")
    load_module(tmp_path / "surrogate.eqx", "surrogate", build)


def steps_and_losses(path):
    return [(record["step"], record["loss"]) for record in read_log(path)]


def test_log_resumes_as_if_never_killed(tmp_path):
    path = tmp_path / "logs" / "surrogate.jsonl"
    log = TrainingLog(path, 0)
    for step in range(5):
        log.write(step=step, loss=jnp.float32(step / 4))
    whole = steps_and_losses(path)
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    log = TrainingLog(path, 2)
    assert steps_and_losses(path) == whole[:3]
    for step in range(3, 5):
        log.write(step=step, loss=step / 4)
    assert steps_and_losses(path) == whole
    assert all(record["time"] > 1.7e9 for record in read_log(path))
    with pytest.raises(ValueError, match="step 5: loss is nan"):
        log.write(step=5, loss=jnp.nan)
    TrainingLog(path, 0)
    assert read_log(path) == []


def test_an_edited_header_is_found(tmp_path):
    path = tmp_path / "surrogate.eqx"
    save(path)
    for changes in (
        {"hyperparameters": {"width": 5}},
        {"config": {"mixed_precision": True}},
        {"seed": 2},
    ):
        before = path.read_bytes()
        rewrite_header(path, **changes)
        with pytest.raises(ArtifactError, match="edited.*02_train"):
            load_module(path, "surrogate", build)
        path.write_bytes(before)
    load_module(path, "surrogate", build)


HEADERS = {
    "NaN": '{"step": NaN}',
    "infinity": '{"step": -Infinity}',
    "beyond float64": '{"step": 1e999}',
    "5,000 digits": '{"step": %s}' % ("1" * 5000),
    "brackets": "[" * 100_000,
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_no_json_are_refused(tmp_path, case):
    (tmp_path / "surrogate.eqx").write_text(HEADERS[case] + "\n")
    np.savez(tmp_path / "demos.npz", header=np.asarray(HEADERS[case]))
    for load in (
        lambda: load_module(tmp_path / "surrogate.eqx", "surrogate", build),
        lambda: load_arrays(tmp_path / "demos.npz", "demos"),
        lambda: read_header(tmp_path / "demos.npz"),
        lambda: load_checkpoint(tmp_path / "surrogate.eqx", {}, "mine"),
    ):
        with pytest.raises(ArtifactError, match="header cannot be read"):
            load()


def test_an_array_file_with_an_edited_flag_is_refused(tmp_path):
    path = tmp_path / "demos.npz"
    save_demos(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1  # "encrypted"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="truncated or edited"):
        load_arrays(path, "demos")


@pytest.mark.parametrize("name", ["loop.eqx", "folder.eqx", "file/a.eqx", "a" * 300, "a\0.eqx"])
def test_what_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "loop.eqx").symlink_to(tmp_path / "loop.eqx")
    (tmp_path / "folder.eqx").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=f"{name}: cannot be read .[^.\n]+.: make it again"):
        load_module(tmp_path / name, "surrogate", build)


def test_paths_may_be_strings(tmp_path):
    module, path = build({"width": 4}), str(tmp_path / "surrogate.eqx")
    save(path, module)
    assert eqx.tree_equal(load_module(path, "surrogate", build)[0], module)
    assert read_header(path)["stage"] == "surrogate"
    save_demos(path := str(tmp_path / "demos.npz"))
    assert set(load_arrays(path, "demos")[0]) == set(ARRAYS) and read_header(path)["seed"] == 1
    with pytest.raises(ArtifactError, match="no.eqx: missing"):
        load_module(str(tmp_path / "no.eqx"), "surrogate", build)
