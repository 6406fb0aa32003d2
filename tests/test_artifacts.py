"""Artifacts come back as they were saved or not at all; the same content gives the same bytes."""

import dataclasses
import functools as ft
import hashlib
import io
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
    cut_log,
    digest,
    fingerprint,
    load,
    read_header,
    read_log,
    resumable,
    save,
    stored,
    write_log,
)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    sizes: tuple[int, ...] = (5, 8)
    out: Path = Path("somewhere")


def build(hyperparameters):
    return eqx.nn.MLP(2, 3, hyperparameters["width"], 1, key=jr.key(0))


ABOUT = {
    "config": dataclasses.asdict(Config()),
    "hyperparameters": {"width": 4},
    "seed": 1,
    "step": 3,
    "metrics": {"loss": np.float32(0.5)},
}
MODULE = eqx.nn.MLP(2, 3, 4, 1, key=jr.key(7))
ARRAYS = {
    "values": np.arange(6, dtype=np.float32).reshape(2, 3),
    "sets": np.eye(2, dtype=bool),
    "names": np.array(["X", "Y"]),
}
FIVE = np.float32(5).tobytes()  # the last of these values
# of both kinds of file: what is saved, what loads it, and what finds the header in its bytes
CONTENT = {"surrogate.eqx": MODULE, "demos.npz": ARRAYS}
LOAD = {
    "surrogate.eqx": ft.partial(load, stage="surrogate", build=build),
    "demos.npz": ft.partial(load, stage="demos"),
}
HEADER = {
    "surrogate.eqx": lambda raw: raw.partition(b"\n")[0],
    "demos.npz": lambda raw: str(np.load(io.BytesIO(raw), allow_pickle=False)["header"]),
}


def write(path, content=None, **changes):
    """An artifact of the kind that its name says, with what is changed in its header."""
    content = CONTENT[path.name] if content is None else content
    save(path, content, **ABOUT | {"stage": path.stem} | changes)


@pytest.fixture
def saved(tmp_path, request):
    write(path := tmp_path / getattr(request, "param", "surrogate.eqx"))
    return path


@pytest.mark.parametrize("saved", CONTENT, indirect=True)
def test_what_was_saved_is_what_is_loaded_and_the_same_content_gives_the_same_bytes(saved):
    path, content = saved.parent / "new" / saved.name, CONTENT[saved.name]
    write(path, parents=[saved])
    loaded, header = LOAD[path.name](path)
    assert set(header) == set(HEADER_FIELDS) and read_header(path) == header
    assert json.loads(HEADER[path.name](path.read_bytes())) == header
    assert header["parents"] == {saved.name: hashlib.sha256(saved.read_bytes()).hexdigest()}
    assert header["config"] == {"steps": 3, "sizes": [5, 8]}  # no path
    assert header["metrics"] == {"loss": 0.5} and header["seed"] == 1 and header["step"] == 3
    assert header["versions"] == {m.__name__: m.__version__ for m in (jax, eqx, np)}
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays
    trees = (eqx.filter(tree, eqx.is_array_like) for tree in (loaded, content))
    for (name, one), (place, two) in zip(*map(jax.tree.leaves_with_path, trees), strict=True):
        assert name == place and one.dtype == two.dtype and np.array_equal(one, two)
    write(path)
    assert path.read_bytes() == saved.read_bytes() and digest(path) == digest(saved)
    write(path, seed=2)
    assert digest(path) != digest(saved)


def cut(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])


def put_folder(path):
    path.unlink()
    path.mkdir()


def flip(path, after=b"", offset=-9):
    """Change one bit, `offset` bytes from the last place that reads `after`."""
    content = bytearray(path.read_bytes())
    content[content.rindex(after) + offset] ^= 1
    path.write_bytes(content)


def edit_array(path):
    """The zip is whole, only the checksum tells."""
    with np.load(path) as file:
        content = dict(file)
    content["values"][0, 0] = 9
    np.savez(path, **content)


def edit_header(path, **changes):
    line, leaves = path.read_bytes().split(b"\n", 1)
    header = {k: v for k, v in (json.loads(line) | changes).items() if v is not None}
    path.write_bytes(json.dumps(header).encode() + b"\n" + leaves)


@pytest.mark.parametrize(
    ("saved", "damage", "said"),
    [
        *(
            (name, damage, f"{name}: .*{said}.*{command}")
            for name, command in (("surrogate.eqx", "02_train"), ("demos.npz", "01_extract"))
            for damage, said in (
                *((ft.partial(cut, fraction=f), "truncated") for f in (0.0, 0.02, 0.5, 0.9, 0.999)),
                (lambda path: path.write_bytes(b"something else\n" * 10), ""),
                (Path.unlink, "missing"),
                (put_folder, r"cannot be read \([^.\n]+\): make it again"),
            )
        ),
        *(
            ("surrogate.eqx", damage, f"{said}.*02_train_surrogate.py")
            for damage, said in (
                (flip, "truncated or edited.*checksum"),
                (
                    ft.partial(edit_header, schema=0),
                    "wrong schema: the file has 0, this .* reads 2",
                ),
                (ft.partial(edit_header, seed=None), "lacks 'seed'"),
                (ft.partial(edit_header, hyperparameters={"width": 5}), "edited"),
                (ft.partial(edit_header, config={"mixed_precision": True}), "edited"),
                (ft.partial(edit_header, seed=2), "edited"),
            )
        ),
        *(
            ("demos.npz", damage, f"truncated or edited.*{said}.*01_extract_demos.py")
            for damage, said in (
                (ft.partial(flip, after=FIVE, offset=0), ".npz"),
                (ft.partial(flip, after=b"PK\1\2", offset=8), ".npz"),  # the flag "encrypted"
                (edit_array, "checksum"),
            )
        ),
    ],
    indirect=["saved"],
)
def test_what_is_damaged_foreign_or_missing_is_refused(saved, damage, said):
    damage(saved)
    with pytest.raises(ArtifactError, match=said):
        LOAD[saved.name](saved)


@pytest.mark.parametrize(
    ("stage", "make", "said"),
    [
        ("policy", build, "wrong stage.*'surrogate'.*'policy'.*03_warmstart"),
        ("surrogate", lambda h: h["depth"], "hyperparameters.*depth"),
        *(
            ("surrogate", make, "surrogate.eqx: wrong shapes.*02_train")
            for make in (
                lambda h: eqx.nn.MLP(2, 3, 5, 1, key=jr.key(0)),
                lambda h: eqx.nn.MLP(2, 3, 4, 2, key=jr.key(0)),
                lambda h: eqx.nn.Linear(2, 4, key=jr.key(0)),
            )
        ),
    ],
)
def test_wrong_stage_hyperparameters_and_shapes(saved, stage, make, said):
    with pytest.raises(ArtifactError, match=said):
        load(saved, stage, make)


BROKEN = eqx.tree_at(lambda m: m.layers[1].bias, MODULE, jnp.array([0.0, jnp.nan, 0.0]))


@pytest.mark.parametrize(
    ("attempt", "error", "said"),
    [
        (lambda p: write(p / "surrogate.eqx", BROKEN), ArtifactError, r"NaN in .*layers\[1\].bias"),
        (lambda p: write(p / "demos.npz", {"x": np.full(2, np.nan)}), ArtifactError, "NaN in .*x"),
        (lambda p: write(p / "a.ckpt", BROKEN, stage="checkpoint"), ArtifactError, "NaN"),
        (lambda p: write(p / "surrogate.eqx", metrics={"loss": np.nan}), ValueError, "JSON"),
        (lambda p: write(p / "surrogate.eqx", stage="polcy"), ValueError, "unknown stage 'polcy'"),
        (
            lambda p: write(p / "surrogate.eqx", parents=[p / "demos.npz"]),
            ArtifactError,
            "demos.npz: missing.*01_extract_demos.py",
        ),
    ],
)
def test_what_cannot_be_read_again_is_not_written(tmp_path, attempt, error, said):
    with pytest.raises(error, match=said):
        attempt(tmp_path)
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write(saved, seed=2)
    assert saved.read_bytes() == before


def test_checkpoints(tmp_path):
    path, same = tmp_path / "run.ckpt", ft.partial(resumable, stage="checkpoint", mark="mine")
    tree = {"model": MODULE, "count": jnp.array(3), "best": jnp.inf}
    assert not same(path)
    mine = {"fingerprint": "mine"}
    write(path, tree, stage="checkpoint", hyperparameters=mine, step=5)
    assert same(path) and not resumable(path, "checkpoint", "other")
    found, header = load(path, "checkpoint", lambda _: tree)
    assert header["step"] == 5 and header["hyperparameters"] == mine
    assert eqx.tree_equal(*(eqx.filter(t, eqx.is_array_like) for t in (found, tree)))
    with pytest.raises(ArtifactError, match="wrong shapes.*delete it"):
        load(path, "checkpoint", lambda _: MODULE)
    for damage in (ft.partial(edit_header, step=7), ft.partial(edit_header, step=-3), flip):
        damage(copy := shutil.copy(path, tmp_path / "damaged.ckpt"))
        with pytest.raises(ArtifactError, match="delete it"):
            load(copy, "checkpoint", lambda _: tree)
    cut(path, 0.01)
    with pytest.raises(ArtifactError, match="truncated.*delete it"):
        same(path)


def test_results_are_stored_once_for_each_fingerprint(tmp_path):
    path, compute = tmp_path / "raw" / "acbo_d5.npz", Mock(return_value=ARRAYS)
    for mark, calls in (("mine", 1), ("mine", 1), ("other", 2)):
        found = stored(path, mark, compute, config={}, seed=0)
        assert compute.call_count == calls and found.keys() == ARRAYS.keys()
        assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())
    assert read_header(path)["stage"] == "evaluation"
    edit_array(path)
    with pytest.raises(ArtifactError, match="checksum.*05_evaluate.py"):
        stored(path, "other", compute, config={}, seed=0)


def test_what_is_half_done_does_not_go_on_with_other_code_settings_or_parents(
    tmp_path, monkeypatch, saved
):
    """A changed script or file of `lib` changes the fingerprint, and so do settings other than
    paths and what a parent holds; a finished artifact is loaded all the same.
    """
    script, method = tmp_path / "02_train.py", tmp_path / "lib" / "method.py"
    method.parent.mkdir()
    for path in (script, method):
        path.write_text("steps = 3\n")
    monkeypatch.setattr("lib.artifacts.__file__", str(method.with_name("artifacts.py")))
    copy = [shutil.copy(saved, tmp_path / "copy.eqx")]
    same = fingerprint(script, Config(), [saved])
    assert same == fingerprint(script, Config(out=Path("elsewhere")), copy)
    found = {same, fingerprint(script, Config(steps=4), copy)}
    for path in (method, script):
        path.write_text("steps = 4\n")
        found.add(fingerprint(script, Config(), copy))
    LOAD[saved.name](saved)
    write(saved, seed=2)
    assert len(found | {fingerprint(script, Config(), [saved])}) == 5


def test_log_resumes_as_if_never_killed(tmp_path, monkeypatch):
    path = tmp_path / "logs" / "surrogate.jsonl"
    monkeypatch.setattr("time.time", lambda: 1.8e9)
    cut_log(path, 0)
    for step in range(5):
        write_log(path, step, {"loss": jnp.float32(step / 4)})
    whole = read_log(path)
    assert whole[3] == {"step": 3, "loss": 0.75, "time": 1.8e9}
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    cut_log(path, 2)
    assert read_log(path) == whole[:3]
    for step in range(3, 5):
        write_log(path, step, {"loss": step / 4})
    assert read_log(path) == whole
    with pytest.raises(ValueError, match="step 5: loss is nan"):
        write_log(path, 5, {"loss": jnp.nan})
    cut_log(path, 0)
    assert read_log(path) == []


HEADERS = {
    "NaN": '{"step": NaN}',
    "infinity": '{"step": -Infinity}',
    "beyond float64": '{"step": 1e999}',
    "5,000 digits": '{"step": %s}' % ("1" * 5000),
    "brackets": "[" * 100_000,
    "no object": "7",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_are_no_json_are_refused(tmp_path, header):
    module, demos = tmp_path / "surrogate.eqx", tmp_path / "demos.npz"
    module.write_text(header + "\n")
    np.savez(demos, header=np.asarray(header))
    for path in (module, demos):
        with pytest.raises(ArtifactError, match="header cannot be read"):
            LOAD[path.name](path)
