"""Files that the stages hand to each other, checkpoints, and training logs. One seed, one result,
on one machine; only the log holds times.

An artifact has a header (`HEADER_FIELDS`). `.eqx` is one line of JSON, the header, then the leaves
of a module; `.npz` is named arrays plus the same JSON as a unicode scalar named `header`, read with
`allow_pickle=False`. Both are written under a temporary name and then renamed, so a file that
exists is complete. Loaders raise `ArtifactError` instead of returning something else than what was
saved.
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
REMAKE = {
    "demos": "python 01_extract_demos.py",
    "surrogate": "python 02_train_surrogate.py",
    "policy": "python 03_warmstart_acquisition.py",
    "curves": "python 03_warmstart_acquisition.py",
    "acbo": "python 04_train_e2e.py",
    "evaluation": "python 05_evaluate.py",
}


class ArtifactError(ValueError):
    """A file cannot be used, or must not be written; the message names the file, what is wrong and
    the command that remakes it.
    """

    def __init__(self, path: Path, problem: str, stage: str | None = None):
        command = REMAKE.get(path.stem if stage is None else stage)
        super().__init__(
            f"{path}: {problem}" + (f": make it again with `{command}`" if command else "")
        )


def save_module(path: Path, module: eqx.Module, **about: Any) -> None:
    """Write `module` to the `.eqx` file `path`; `about` as `make_header` takes it.

    Raises `ArtifactError` if a leaf holds NaN, and `ValueError` for an unknown stage.
    """
    write_leaves(path, module, make_header(**about))


def load_module(
    path: Path, stage: str, build: Callable[[dict[str, Any]], Any]
) -> tuple[Any, dict[str, Any]]:
    """The module in `path` and its header; `build(hyperparameters)` makes a module of the right
    shape, whose leaves are then replaced.

    Raises `ArtifactError` if the file is missing, truncated, edited, of another stage or schema, or
    has other shapes than `build` gives.
    """
    header, leaves = read_artifact(path, stage)
    try:
        # shapes only: nothing is initialised to be thrown away
        like = eqx.filter_eval_shape(lambda: build(header["hyperparameters"]))
    except (TypeError, KeyError) as error:
        raise ArtifactError(
            path, f"its hyperparameters do not fit this version of the code ({error})", stage
        ) from error
    return deserialise(path, leaves, like, stage), header


def save_arrays(path: Path, arrays: Mapping[str, Any], **about: Any) -> None:
    """Write named arrays to the `.npz` file `path`; errors as for `save_module`. The name `header`
    is taken.
    """
    host = {name: np.asarray(array) for name, array in arrays.items()}
    refuse_nan(path, host)
    header = make_header(**about)
    header["checksum"] = checksum(header, host)
    stream = io.BytesIO()
    np.savez(stream, header=np.asarray(encode(header).decode()), allow_pickle=False, **host)
    replace_file(path, stream.getvalue())


def load_arrays(path: Path, stage: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays in `path` by name, and its header. `ArtifactError` if the file is missing,
    truncated, edited, or of another stage or schema.
    """
    header, arrays = read_artifact(path, stage)
    return arrays, header


def read_header(path: Path) -> dict[str, Any]:
    """The header of an artifact of any stage and schema; `ArtifactError` if there is none."""
    return read_file(path, None)[0]


def digest(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal. Raises `ArtifactError` if it is missing."""
    return hashlib.sha256(read_bytes(path, None)).hexdigest()


# --- checkpoints and logs of a running stage ---


def fingerprint(script: str | Path, config: Any, parents: Sequence[Path] = ()) -> str:
    """SHA-256 of what a stage's result depends on: the bytes of its `script` and of all of `lib`,
    its config (a dataclass, paths left out), the files it reads, and the versions in use. Finished
    artifacts are loaded whatever code wrote them; only what is half done must not go on with other
    code.
    """
    content = {
        "schema": SCHEMA,
        "code": [digest(Path(script)), code_digest()],
        "config": without_paths(dataclasses.asdict(config)),
        "parents": [digest(path) for path in parents],
        "versions": versions(),
    }
    return hashlib.sha256(encode(content)).hexdigest()


def stored(
    path: Path, mark: str, compute: Callable[[], Mapping[str, Any]], **header: Any
) -> dict[str, np.ndarray]:
    """The arrays of `compute()`, or those that an earlier run with the same `mark` left at `path`:
    what was stopped goes on where it was. `header` is the rest of what `make_header` takes.
    """
    header |= dict(stage="evaluation", hyperparameters={"fingerprint": mark}, step=0, metrics={})
    if not path.exists() or read_header(path)["hyperparameters"] != header["hyperparameters"]:
        save_arrays(path, compute(), **header)
    return load_arrays(path, "evaluation")[0]


def code_digest() -> str:
    """SHA-256 over the bytes of all of `lib`."""
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    ).hexdigest()


def save_checkpoint(path: Path, tree: Any, *, fingerprint: str, step: int) -> None:
    """Replace the checkpoint at `path` by `tree`, a pytree without typed keys (store the seed, and
    fold the step in). `ArtifactError` for NaN.
    """
    write_leaves(path, tree, {"schema": SCHEMA, "fingerprint": fingerprint, "step": int(step)})


def load_checkpoint(path: Path, like: Any, fingerprint: str) -> tuple[Any, int] | None:
    """The checkpoint at `path`, in the form of `like`, and how many steps it has done; None if
    there is none, or if it belongs to another config, other inputs, other code or other versions.

    Raises `ArtifactError` if it is damaged: a killed run never leaves half a file, so something
    else changed it.
    """
    if not path.exists():
        return None
    header, leaves = read_file(path, None)
    if header.get("fingerprint") != fingerprint:
        return None
    if checksum(header, leaves) != header.get("checksum"):
        raise ArtifactError(
            path,
            "the checkpoint is truncated or was edited; delete it to start "
            "the stage from the beginning",
        )
    return deserialise(path, leaves, like, None), header["step"]


def cut_log(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Begin a training log, or go on with that of a run that was stopped: records of steps after
    `resume_step`, which the resumed checkpoint has done (0: a new run), are dropped, and so is a
    line that a kill cut short. So the log ends with the records of a run that was not stopped;
    returns those that there are, without their time.
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
    hyperparameters: Mapping[str, Any],
    seed: int,
    step: int,
    metrics: Mapping[str, Any],
    parents: Sequence[Path] = (),
) -> dict[str, Any]:
    """The header of an artifact (`HEADER_FIELDS`), its checksum still empty, from what a script
    says of it. `hyperparameters` is what `load_module` needs to build a module of the same shape;
    `parents` are the artifacts that it was made from. Fields of `config` that are paths are left
    out: where a file lies is no part of what it holds. `ValueError` for a stage that no script
    makes.
    """
    if stage not in REMAKE:
        raise ValueError(f"unknown stage '{stage}'; the stages are {', '.join(REMAKE)}")
    return {
        "schema": SCHEMA,
        "stage": stage,
        "config": without_paths(config),
        "hyperparameters": hyperparameters,
        "seed": seed,
        "step": step,
        "parents": {path.name: digest(path) for path in parents},
        "versions": versions(),
        "code": code_digest(),
        "metrics": metrics,
        "checksum": "",
    }


def versions() -> dict[str, str]:
    """The libraries that decide the numbers."""
    return {"jax": jax.__version__, "equinox": eqx.__version__, "numpy": np.__version__}


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are no paths."""
    return {name: value for name, value in config.items() if not isinstance(value, Path)}


def encode(content: Mapping[str, Any]) -> bytes:
    """One line of JSON, arrays as lists; NaN and infinity, which JSON lacks, raise `ValueError`."""
    return json.dumps(
        content, sort_keys=True, allow_nan=False, default=methodcaller("tolist")
    ).encode()


def checksum(header: Mapping[str, Any], content: bytes | Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the header, its own entry `checksum` left out, and the content: an edited
    setting is found like an edited weight. Of arrays, over their names, dtypes, shapes and values,
    whatever the order in the file.
    """
    if not isinstance(content, bytes):
        found = hashlib.sha256()
        for name, array in sorted(content.items()):
            found.update(f"{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes())
        content = found.hexdigest().encode()
    said = encode({k: v for k, v in header.items() if k != "checksum"})
    return hashlib.sha256(said + b"\n" + content).hexdigest()


# --- bytes ---


def write_leaves(path: Path, tree: Any, header: dict[str, Any]) -> None:
    """Write the header with its checksum, then the leaves of `tree`, in order, as `.npy` blocks."""
    refuse_nan(path, tree)
    stream = io.BytesIO()
    eqx.tree_serialise_leaves(stream, tree)
    header["checksum"] = checksum(header, stream.getvalue())
    replace_file(path, encode(header) + b"\n" + stream.getvalue())


def deserialise(path: Path, leaves: bytes, like: Any, stage: str | None) -> Any:
    """`like` with these leaves, which must have the same number, shapes and dtypes."""
    stream = io.BytesIO(leaves)
    try:
        tree = eqx.tree_deserialise_leaves(stream, like)
    except (RuntimeError, ValueError, EOFError) as error:
        raise ArtifactError(
            path,
            f"wrong shapes: it holds other leaves than this version of the code ({error})",
            stage,
        ) from error
    if stream.read(1):
        raise ArtifactError(
            path, "wrong shapes: it holds more leaves than this version of the code", stage
        )
    return tree


def refuse_nan(path: Path, tree: Any) -> None:
    """Raise `ArtifactError` where a number of the tree is NaN: nothing is written then."""
    for where, leaf in jax.tree.leaves_with_path(tree):
        if eqx.is_inexact_array_like(leaf) and np.isnan(leaf).any():
            raise ArtifactError(
                path,
                f"not written, NaN in {jax.tree_util.keystr(where)}: training has "
                "diverged, or the data are damaged",
            )


def read_artifact(path: Path, stage: str) -> tuple[dict[str, Any], Any]:
    """`read_file`, and an `ArtifactError` unless it is whole, unedited, and of this stage and
    schema.
    """
    header, content = read_file(path, stage)
    schema, found = header.get("schema"), header.get("stage")
    lacking = next((name for name in HEADER_FIELDS if name not in header), None)
    edited = checksum(header, content) != header.get("checksum")
    for wrong, problem in (
        (schema != SCHEMA, f"wrong schema: the file has {schema}, this code reads {SCHEMA}"),
        (lacking, f"edited, or not an artifact: its header lacks '{lacking}'"),
        (found != stage, f"wrong stage: the file holds '{found}', '{stage}' is needed"),
        (edited, "truncated or edited: its header and content do not match its checksum"),
    ):
        if wrong:
            raise ArtifactError(path, problem, stage)
    return header, content


def read_bytes(path: Path, stage: str | None) -> bytes:
    """The bytes of a file; `ArtifactError` where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(path, "missing", stage) from None
    except (OSError, ValueError) as error:  # a directory, a loop of links, a name with a NUL byte
        problem = f"cannot be read ({getattr(error, 'strerror', error)})"
        raise ArtifactError(path, problem, stage) from None


def read_file(path: Path, stage: str | None) -> tuple[dict[str, Any], Any]:
    """The header of a file and its content: the bytes of the leaves, or the arrays of an `.npz`."""
    content = read_bytes(path, stage)
    if path.suffix == ".npz":
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                content = dict(file)
        except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for damaged bytes
            raise ArtifactError(
                path, f"truncated or edited: not a complete .npz file ({error})", stage
            ) from error
        text = str(content.pop("header", ""))
    else:
        line, newline, content = content.partition(b"\n")
        if not newline:
            raise ArtifactError(path, "truncated, or not an artifact: its header has no end", stage)
        text = line.decode(errors="replace")
    try:
        header = dict(json.loads(text))
        encode(header)  # nan and infinity, which Python reads, are no JSON
    except (TypeError, ValueError, RecursionError) as error:  # also a number of too many digits
        raise ArtifactError(
            path, "truncated, edited, or not an artifact: its header cannot be read", stage
        ) from error
    return header, content


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: a killed process leaves the old file or the new
    one, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
