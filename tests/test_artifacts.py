"""Artifacts come back as they were saved or not at all; the same content gives the same bytes."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

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
    said = {
        "stage": "surrogate",
        "config": dataclasses.asdict(Config()),
        "hyperparameters": {"width": 4},
        "seed": 1,
        "step": 3,
        "parents": [],
        "metrics": {"loss": np.float32(0.5)},
    }
    save_module(path, module, **said | changes)
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


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "surrogate.eqx")
    return tmp_path / "surrogate.eqx"


@pytest.fixture
def demos(tmp_path):
    save_demos(tmp_path / "demos.npz")
    return tmp_path / "demos.npz"


@pytest.mark.parametrize("kind", [Path, str])
def test_module_round_trip(tmp_path, demos, kind):
    path = tmp_path / "new" / "surrogate.eqx"
    module = save(kind(path), parents=[demos])
    loaded, header = load_module(kind(path), "surrogate", build)
    assert eqx.tree_equal(eqx.filter(loaded, eqx.is_array), eqx.filter(module, eqx.is_array))
    assert set(header) == set(HEADER_FIELDS)
    assert header["parents"] == {"demos.npz": hashlib.sha256(demos.read_bytes()).hexdigest()}
    assert header["config"] == {"steps": 3, "sizes": [5, 8]}  # no path
    assert header["metrics"] == {"loss": 0.5} and header["seed"] == 1 and header["step"] == 3
    assert header["versions"] == {
        "jax": jax.__version__,
        "equinox": eqx.__version__,
        "numpy": np.__version__,
    }
    assert read_header(kind(path)) == header
    line, payload = path.read_bytes().split(b"\n", 1)
    assert json.loads(line) == header and header["checksum"] == checksum(header, payload)
    assert [p.name for p in path.parent.iterdir()] == ["surrogate.eqx"]  # no temporary file stays


@pytest.mark.parametrize("kind", [Path, str])
def test_array_round_trip(demos, kind):
    save_demos(kind(demos))
    arrays, header = load_arrays(kind(demos), "demos")
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)
    assert read_header(kind(demos)) == header
    with np.load(demos, allow_pickle=False) as file:
        assert file["header"].shape == () and json.loads(str(file["header"])) == header


def test_same_content_same_bytes(tmp_path, saved, demos):
    for save_one, first in ((save, saved), (save_demos, demos)):
        save_one(second := tmp_path / "again" / first.name)
        assert first.read_bytes() == second.read_bytes() and digest(first) == digest(second)
    save(tmp_path / "c.eqx", seed=2)
    assert digest(tmp_path / "c.eqx") != digest(saved)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9 if path.suffix == ".eqx" else path.read_bytes().index(np.float32(5).tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["surrogate.eqx", "demos.npz"])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, name, fraction):
    load, path = damaged(tmp_path / name), tmp_path / name
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
def test_edited_foreign_and_missing(tmp_path, name, command):
    load, path = damaged(tmp_path / name), tmp_path / name
    for damage, said in (
        (flip, ".*edited"),
        (lambda path: path.write_bytes(b"something else\n" * 10), ""),
        (Path.unlink, ": missing"),
    ):
        damage(path)
        with pytest.raises(ArtifactError, match=f"{name}{said}.*{command}"):
            load()
    with pytest.raises(ArtifactError, match=f"{name}: missing.*{command}"):
        digest(path)


def test_edited_array_is_found_by_checksum(demos):
    """A consistent `.npz` whose arrays were changed: the zip is whole, only the checksum tells."""
    with np.load(demos) as file:
        content = dict(file)
    content["values"][0, 0] = 9
    np.savez(demos, **content)
    with pytest.raises(ArtifactError, match="checksum"):
        load_arrays(demos, "demos")


def test_an_array_file_with_an_edited_flag_is_refused(demos):
    content = bytearray(demos.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1  # "encrypted"
    demos.write_bytes(content)
    with pytest.raises(ArtifactError, match="truncated or edited"):
        load_arrays(demos, "demos")


def rewrite_header(path, **changes):
    line, payload = path.read_bytes().split(b"\n", 1)
    header = json.loads(line) | changes
    path.write_bytes(
        json.dumps({k: v for k, v in header.items() if v is not None}).encode() + b"\n" + payload
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 0}, "wrong schema: the file has 0, this code reads 2"),
        ({"seed": None}, "lacks 'seed'"),
        ({"hyperparameters": {"width": 5}}, "edited.*02_train"),
        ({"config": {"mixed_precision": True}}, "edited.*02_train"),
        ({"seed": 2}, "edited.*02_train"),
    ],
)
def test_an_edited_header_is_found(saved, changes, said):
    rewrite_header(saved, **changes)
    with pytest.raises(ArtifactError, match=said):
        load_module(saved, "surrogate", build)


@pytest.mark.parametrize(
    ("stage", "make", "error", "said"),
    [
        ("policy", build, ArtifactError, "wrong stage.*'surrogate'.*'policy'.*03_warmstart"),
        ("polcy", build, ValueError, "unknown stage 'polcy'.*demos, surrogate, policy"),
        ("surrogate", lambda h: h["depth"], ArtifactError, "hyperparameters.*depth"),
        *(
            ("surrogate", make, ArtifactError, "surrogate.eqx: wrong shapes.*02_train")
            for make in (
                lambda h: eqx.nn.MLP(2, 3, 5, 1, key=jr.key(0)),
                lambda h: eqx.nn.MLP(2, 3, 4, 2, key=jr.key(0)),
                lambda h: eqx.nn.Linear(2, 4, key=jr.key(0)),
            )
        ),
    ],
)
def test_wrong_stage_hyperparameters_and_shapes(saved, stage, make, error, said):
    with pytest.raises(error, match=said):
        load_module(saved, stage, make)


BROKEN = eqx.tree_at(
    lambda m: m.layers[1].bias, build({"width": 4}), jnp.array([0.0, jnp.nan, 0.0])
)


@pytest.mark.parametrize(
    ("write", "error", "said"),
    [
        (lambda path: save(path, BROKEN), ArtifactError, r"NaN in .*layers\[1\].bias"),
        (lambda p: save_demos(p, {"values": np.full(2, np.nan)}), ArtifactError, "NaN in .*values"),
        (lambda p: save_checkpoint(p, BROKEN, fingerprint="a", step=1), ArtifactError, "NaN"),
        (lambda path: save(path, metrics={"loss": float("nan")}), ValueError, "JSON"),
        (lambda path: save(path, stage="polcy"), ValueError, "unknown stage 'polcy'"),
        (lambda path: save_demos(path, {"header": np.zeros(2)}), ValueError, "'header'"),
    ],
)
def test_what_cannot_be_read_again_is_not_written(tmp_path, write, error, said):
    with pytest.raises(error, match=said):
        write(tmp_path / "surrogate.eqx")
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    full = Mock(side_effect=OSError("no space left"))
    monkeypatch.setattr("lib.artifacts.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save(saved, seed=2)
    assert saved.read_bytes() == before


def test_checkpoints(tmp_path):
    path = tmp_path / "run.ckpt"
    tree = {"model": build({"width": 4}), "count": jnp.array(3), "best": jnp.inf}
    assert load_checkpoint(path, tree, "mine") is None
    save_checkpoint(path, tree, fingerprint="mine", step=5)
    loaded = load_checkpoint(path, tree, "mine")
    assert loaded is not None and loaded[1] == 5
    assert eqx.tree_equal(*(eqx.filter(t, eqx.is_array_like) for t in (loaded[0], tree)))
    assert load_checkpoint(path, tree, "other") is None
    with pytest.raises(ArtifactError, match="wrong shapes"):
        load_checkpoint(path, tree["model"], "mine")
    for damage in (
        lambda copy: rewrite_header(copy, step=7),
        lambda copy: rewrite_header(copy, step=-3),
        flip,
    ):
        damage(shutil.copy(path, tmp_path / "damaged.eqx"))
        with pytest.raises(ArtifactError, match="delete it"):
            load_checkpoint(tmp_path / "damaged.eqx", tree, "mine")


def test_what_is_half_done_does_not_go_on_with_other_code_settings_or_parents(
    tmp_path, monkeypatch, saved, demos
):
    """A changed script or file of `lib` changes the fingerprint, and so do settings other than
    paths and what a parent holds; a finished artifact is loaded all the same.
    """
    script, method = tmp_path / "02_train.py", tmp_path / "lib" / "method.py"
    method.parent.mkdir()
    for path in (script, method):
        path.write_text("steps = 3\n")
    monkeypatch.setattr("lib.artifacts.__file__", str(method.with_name("artifacts.py")))
    copy = [shutil.copy(demos, tmp_path / "copy.npz")]
    same = fingerprint(script, Config(), [demos])
    assert same == fingerprint(script, Config(out=Path("elsewhere")), copy)
    found = {same, fingerprint(script, Config(steps=4), copy)}
    for path in (method, script):
        path.write_text("steps = 4\n")
        found.add(fingerprint(script, Config(), copy))
    save_demos(demos, ARRAYS | {"more": np.ones(1)})
    assert len(found | {fingerprint(script, Config(), [demos])}) == 5
    load_module(saved, "surrogate", build)


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


HEADERS = {
    "NaN": '{"step": NaN}',
    "infinity": '{"step": -Infinity}',
    "beyond float64": '{"step": 1e999}',
    "5,000 digits": '{"step": %s}' % ("1" * 5000),
    "brackets": "[" * 100_000,
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_no_json_are_refused(tmp_path, case):
    module, demos = tmp_path / "surrogate.eqx", tmp_path / "demos.npz"
    module.write_text(HEADERS[case] + "\n")
    np.savez(demos, header=np.asarray(HEADERS[case]))
    for load in (
        lambda: load_module(module, "surrogate", build),
        lambda: load_arrays(demos, "demos"),
        lambda: read_header(demos),
        lambda: load_checkpoint(module, {}, "mine"),
    ):
        with pytest.raises(ArtifactError, match="header cannot be read"):
            load()


@pytest.mark.parametrize("name", ["loop.eqx", "folder.eqx", "file/a.eqx", "a" * 300, "a\0.eqx"])
def test_what_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "loop.eqx").symlink_to(tmp_path / "loop.eqx")
    (tmp_path / "folder.eqx").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=f"{name}: cannot be read .[^.\n]+.: make it again"):
        load_module(tmp_path / name, "surrogate", build)


@pytest.mark.parametrize("kind", [Path, str])
def test_what_is_missing_is_named(tmp_path, kind):
    with pytest.raises(ArtifactError, match="no.eqx: missing"):
        load_module(kind(tmp_path / "no.eqx"), "surrogate", build)
