"""Files that the stages hand to each other, checkpoints, and training logs. One seed, one result,
on one machine; only the log holds times.

Artifacts, checkpoints and stored results are one kind of file: a header (`HEADER_FIELDS`) and the
leaves of a tree. `.eqx` and `.ckpt` are one line of JSON, the header, then the leaves in order, as
`.npy` blocks; `.npz` is the leaves as arrays under their names, plus the same JSON as a unicode
scalar named `header`, read with `allow_pickle=False`. All are written under a temporary name and
then renamed, so a file that exists is complete. Loaders raise `ArtifactError` instead of returning
something else than what was saved.
"""

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np


SCHEMA = 2  # 2: the checksum covers the header
HEADER_FIELDS = (
    *("schema", "stage", "config", "hyperparameters", "seed", "step"),
    *("parents", "versions", "code", "metrics", "checksum"),
)
REMEDY = {
    "demos": "make it again with `python 01_extract_demos.py`",
    "surrogate": "make it again with `python 02_train_surrogate.py`",
    "policy": "make it again with `python 03_warmstart_acquisition.py`",
    "curves": "make it again with `python 03_warmstart_acquisition.py`",
    "acbo": "make it again with `python 04_train_e2e.py`",
    "evaluation": "make it again with `python 05_evaluate.py`",
    "checkpoint": "delete it to start its stage from the beginning",
}


class ArtifactError(ValueError):
    """A file cannot be used, or must not be written; the message names the file, what is wrong and
    the command that remakes it.
    """

    def __init__(self, path: Path, problem: str, stage: str | None = None):
        remedy = REMEDY.get(path.stem if stage is None else stage)
        super().__init__(f"{path}: {problem}" + (f": {remedy}" if remedy else ""))


def save(path: Path, tree: Any, **about: Any) -> None:
    """Write the leaves of `tree` to `path`, an `.npz` file or another (see above); `about` as
    `make_header` takes it. No leaf may be a typed key, and none of an `.npz` be named `header`.

    Raises `ArtifactError` if a leaf holds NaN, and `ValueError` for an unknown stage: nothing is
    written then.
    """
    header = make_header(**about)
    for where, leaf in jax.tree.leaves_with_path(tree):
        if eqx.is_inexact_array_like(leaf) and np.isnan(leaf).any():
            raise ArtifactError(
                path,
                f"not written, NaN in {jax.tree_util.keystr(where)}: training has "
                "diverged, or the data are damaged",
            )
    replace_file(path, pack(path.suffix, header, tree))


def load(
    path: Path, stage: str, build: Callable[[dict[str, Any]], Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """What `path` holds, and its header: of an `.npz`, the arrays by name; of another file, the
    tree that `build(hyperparameters)` makes, its leaves replaced.

    Raises `ArtifactError` if the file is missing, truncated, edited, of another stage or schema, or
    has other shapes than `build` gives.
    """
    header, content, sealed = read_file(path, stage)
    schema, found = header.get("schema"), header.get("stage")
    for right, problem in (
        (schema == SCHEMA, f"wrong schema: the file has {schema}, this code reads {SCHEMA}"),
        *((name in header, f"edited: its header lacks '{name}'") for name in HEADER_FIELDS),
        (found == stage, f"wrong stage: the file holds '{found}', '{stage}' is needed"),
        (sealed, "truncated or edited: its header and content do not match its checksum"),
    ):
        if not right:
            raise ArtifactError(path, problem, stage)
    if build is None:
        return content, header
    stream = io.BytesIO(content)
    try:
        # shapes only: nothing is initialised to be thrown away
        like = eqx.filter_eval_shape(lambda: build(header["hyperparameters"]))
        tree = eqx.tree_deserialise_leaves(stream, like, read_leaf)
        if stream.read(1):
            raise EOFError("it holds more leaves")
    except (KeyError, TypeError, ValueError, RuntimeError, EOFError) as error:
        raise ArtifactError(
            path, f"wrong shapes or hyperparameters for this version of the code ({error})", stage
        ) from error
    return tree, header


def read_leaf(stream: io.BytesIO, leaf: Any) -> Any:
    """The next leaf, an array wherever `leaf` is the shape of one; unlike Equinox's own it compiles
    nothing.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.device_put(np.load(stream))
    return eqx.default_deserialise_filter_spec(stream, leaf)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file of any stage and schema; `ArtifactError` if there is none."""
    return read_file(path, None)[0]


def digest(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal. Raises `ArtifactError` if it is missing."""
    return hashlib.sha256(read_bytes(path, None)).hexdigest()


# --- what goes on after a stop ---


def fingerprint(script: str | Path, config: Any, parents: Sequence[Path] = ()) -> str:
    """SHA-256 of what a stage's result depends on: the bytes of its `script` and of all of `lib`,
    its config (a dataclass, paths left out), the files it reads, and the versions in use. Finished
    artifacts are loaded whatever code wrote them; only what is half done must not go on with other
    code.
    """
    about = make_header(
        stage="checkpoint",
        config=dataclasses.asdict(config),
        hyperparameters={"files": [digest(path) for path in (Path(script), *parents)]},
        seed=0,
    )
    return hashlib.sha256(encode(about)).hexdigest()


def resumable(path: Path, stage: str, mark: str) -> bool:
    """Whether an earlier run with the same fingerprint left a file at `path`: what was stopped goes
    on where it was. `ArtifactError` if its header cannot be read.
    """
    header = read_file(path, stage)[0] if path.exists() else {}
    return header.get("hyperparameters") == {"fingerprint": mark}


def stored(
    path: Path, mark: str, compute: Callable[[], Mapping[str, Any]], **header: Any
) -> dict[str, np.ndarray]:
    """The arrays of `compute()`, or those that an earlier run with the same `mark` left at `path`.
    `header` is the rest of what `make_header` takes.
    """
    if not resumable(path, "evaluation", mark):
        save(path, compute(), stage="evaluation", hyperparameters={"fingerprint": mark}, **header)
    return load(path, "evaluation")[0]


def code_digest() -> str:
    """SHA-256 over the bytes of all of `lib`."""
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    ).hexdigest()


def cut_log(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Keep of a training log the records up to step `resume_step`, that of the checkpoint from
    which training resumes (0: none, it starts anew), and return them, without their times. What a
    stopped run logged after its checkpoint, it will log again.
    """
    kept = read_log(path) if resume_step > 0 and path.exists() else []
    kept = [record for record in kept if record["step"] <= resume_step]
    replace_file(path, b"".join(encode(record) + b"\n" for record in kept))
    return [{key: value for key, value in record.items() if key != "time"} for record in kept]


def write_log(path: Path, step: int, metrics: Mapping[str, Any]) -> None:
    """Append one line of JSON: `step`, the metrics, and `time` (seconds since 1970, the one place
    for wall-clock times). Raises `ArtifactError` if a metric is not finite: the run has diverged,
    or the metric divides by zero.
    """
    for name, value in metrics.items():
        if not np.isfinite(value).all():
            raise ArtifactError(path, f"not written, step {step}: {name} is {value}")
    with open(path, "ab") as file:
        file.write(encode({"step": step, **metrics, "time": round(time.time(), 3)}) + b"\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete records of a training log, in order."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


# --- the header ---


def make_header(
    *,
    stage: str,
    config: Mapping[str, Any],
    seed: int,
    hyperparameters: Mapping[str, Any] = {},
    step: int = 0,
    metrics: Mapping[str, Any] = {},
    parents: Sequence[Path] = (),
) -> dict[str, Any]:
    """The header of a file (`HEADER_FIELDS`), its checksum still empty, from what a script says of
    it. `hyperparameters` is what `load` needs to build a tree of the same shape; `parents` are the
    artifacts that it was made from. Fields of `config` that are paths are left out: where a file
    lies is no part of what it holds. `ValueError` for a stage that no script makes.
    """
    if stage not in REMEDY:
        raise ValueError(f"unknown stage '{stage}'; the stages are {', '.join(REMEDY)}")
    return {
        "schema": SCHEMA,
        "stage": stage,
        "config": {name: value for name, value in config.items() if not isinstance(value, Path)},
        "hyperparameters": hyperparameters,
        "seed": seed,
        "step": step,
        "parents": {path.name: digest(path) for path in parents},
        # the libraries that decide the numbers
        "versions": {module.__name__: module.__version__ for module in (jax, eqx, np)},
        "code": code_digest(),
        "metrics": metrics,
        "checksum": "",
    }


def encode(content: Mapping[str, Any]) -> bytes:
    """One line of JSON, arrays as lists; NaN and infinity, which JSON lacks, raise `ValueError`."""
    return json.dumps(
        content, sort_keys=True, allow_nan=False, default=methodcaller("tolist")
    ).encode()


def seal(header: Mapping[str, Any], content: bytes | Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The header with its checksum, SHA-256 over all its other entries and the content: an edited
    setting is found like an edited weight. Of arrays, over their names, dtypes, shapes and values,
    whatever the order in the file.
    """
    if not isinstance(content, bytes):
        content = b"".join(
            f"{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes()
            for name, array in sorted(content.items())
        )
        content = hashlib.sha256(content).hexdigest().encode()
    said = encode({name: value for name, value in header.items() if name != "checksum"})
    return {**header, "checksum": hashlib.sha256(said + b"\n" + content).hexdigest()}


# --- bytes ---


def pack(suffix: str, header: dict[str, Any], tree: Any) -> bytes:
    """The bytes of a file: of an `.npz`, or of the line with the header and the leaves in order."""
    stream = io.BytesIO()
    if suffix != ".npz":
        eqx.tree_serialise_leaves(stream, tree)
        return encode(seal(header, stream.getvalue())) + b"\n" + stream.getvalue()
    arrays = {
        jax.tree_util.keystr(where, simple=True, separator="/"): np.asarray(leaf)
        for where, leaf in jax.tree.leaves_with_path(tree)
    }
    text = encode(seal(header, arrays)).decode()
    np.savez(stream, header=np.asarray(text), allow_pickle=False, **arrays)
    return stream.getvalue()


def unpack(suffix: str, packed: bytes) -> tuple[str, Any]:
    """The text of a header and the content: the arrays of an `.npz` by name, or the bytes of the
    leaves.
    """
    if suffix != ".npz":
        line, _, leaves = packed.partition(b"\n")
        return line.decode(), leaves
    arrays = dict(np.load(io.BytesIO(packed), allow_pickle=False))
    return str(arrays.pop("header")), arrays


def read_file(path: Path, stage: str | None) -> tuple[dict[str, Any], Any, bool]:
    """The header of a file, its content as `unpack` gives it, and whether the checksum is right;
    `ArtifactError` where there is no header.
    """
    packed = read_bytes(path, stage)
    try:
        text, content = unpack(path.suffix, packed)
        header = dict(json.loads(text))
        return header, content, seal(header, content) == header
    except Exception as error:  # numpy, zipfile, zlib and json raise a dozen kinds
        raise ArtifactError(
            path,
            f"truncated or edited: not a whole {path.suffix} file, or its header cannot be read",
            stage,
        ) from error


def read_bytes(path: Path, stage: str | None) -> bytes:
    """The bytes of a file; `ArtifactError` where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(path, "missing", stage) from None
    except (OSError, ValueError) as error:  # a directory, a loop of links, a name with a NUL byte
        problem = f"cannot be read ({getattr(error, 'strerror', error)})"
        raise ArtifactError(path, problem, stage) from None


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: a killed process leaves the old file or the new
    one, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
