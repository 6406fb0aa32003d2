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
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

import equinox as eqx
import jax
import jax.tree_util as jtu
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


class About(TypedDict):
    """What a script says of an artifact. `hyperparameters` is what `load_module` needs to build a
    module of the same shape; `parents` are the artifacts that it was made from. Fields of `config`
    that are paths are left out: where a file lies is no part of what it holds.
    """

    stage: str
    config: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    seed: int
    step: int
    parents: NotRequired[Sequence[Path]]
    metrics: Mapping[str, Any]


def save_module(path: Path | str, module: eqx.Module, **about: Unpack[About]) -> None:
    """Write `module` to the `.eqx` file `path`.

    Raises `ArtifactError` if a leaf holds NaN, and `ValueError` for an unknown stage.
    """
    write_leaves(Path(path), module, make_header(about))


def load_module(
    path: Path | str, stage: str, build: Callable[[dict[str, Any]], Any]
) -> tuple[Any, dict[str, Any]]:
    """The module in `path` and its header; `build(hyperparameters)` makes a module of the right
    shape, whose leaves are then replaced.

    Raises `ArtifactError` if the file is missing, truncated, edited, of another stage or schema, or
    has other shapes than `build` gives.
    """
    path = Path(path)
    header, payload = split(path, stage)
    verify(path, header, payload, stage)
    try:
        # shapes only: nothing is initialised to be thrown away
        like = eqx.filter_eval_shape(lambda: build(header["hyperparameters"]))
    except (TypeError, KeyError) as error:
        raise ArtifactError(
            path, f"its hyperparameters do not fit this version of the code ({error})", stage
        ) from error
    return deserialise(path, payload, like, stage), header


def save_arrays(path: Path | str, arrays: Mapping[str, Any], **about: Unpack[About]) -> None:
    """Write named arrays to the `.npz` file `path`; errors as for `save_module`. The name `header`
    is taken.
    """
    if "header" in arrays:
        raise ValueError("'header' is the name of the header itself: call the array something else")
    path = Path(path)
    host = {name: np.asarray(array) for name, array in arrays.items()}
    refuse_nan(path, host)
    header = make_header(about)
    header["checksum"] = checksum(header, array_checksum(host).encode())
    stream = io.BytesIO()
    np.savez(stream, header=np.asarray(encode(header).decode()), allow_pickle=False, **host)
    replace_file(path, stream.getvalue())


def load_arrays(path: Path | str, stage: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays in `path` by name, and its header. `ArtifactError` if the file is missing,
    truncated, edited, or of another stage or schema.
    """
    path = Path(path)
    arrays = read_npz(path, stage)
    header = parse_header(path, str(arrays.pop("header", "")), stage)
    verify(path, header, array_checksum(arrays).encode(), stage)
    return arrays, header


def read_header(path: Path | str) -> dict[str, Any]:
    """The header of an artifact of any stage and schema, without its payload. Raises
    `ArtifactError` if there is none.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return parse_header(path, str(read_npz(path, None, only="header").get("header", "")), None)
    return split(path, None)[0]


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
        "config": plain(dataclasses.asdict(config)),
        "parents": [digest(path) for path in parents],
        "versions": versions(),
    }
    return hashlib.sha256(encode(content)).hexdigest()


def stored(
    path: Path, mark: str, compute: Callable[[], Mapping[str, Any]], **header: Any
) -> dict[str, np.ndarray]:
    """The arrays of `compute()`, or those that an earlier run with the same `mark` left at `path`:
    what was stopped goes on where it was. `header` as `save_arrays` takes it.
    """
    made_by = {"fingerprint": mark}
    if path.exists() and read_header(path)["hyperparameters"] == made_by:
        return load_arrays(path, "evaluation")[0]
    arrays = {name: np.asarray(value) for name, value in compute().items()}
    header |= dict(stage="evaluation", hyperparameters=made_by, step=0, metrics={})
    save_arrays(path, arrays, **header)
    return arrays


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
    header, payload = split(path, None)
    if header.get("fingerprint") != fingerprint:
        return None
    if checksum(header, payload) != header.get("checksum"):
        raise ArtifactError(
            path,
            "the checkpoint is truncated or was edited; delete it to start "
            "the stage from the beginning",
        )
    return deserialise(path, payload, like, None), header["step"]


class TrainingLog:
    """JSON lines, one record per `write`: `step`, the metrics, and `time` (seconds since 1970, the
    one place for wall-clock times).

    `resume_step` is the number of steps that the resumed checkpoint has done, 0 for a new run.
    Records of later steps, and a line that a kill cut short, are dropped, so a run that was stopped
    and resumed ends with the records of one that was not.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        kept = (
            [record for record in read_log(path) if record["step"] <= resume_step]
            if resume_step > 0 and path.exists()
            else []
        )
        replace_file(path, b"".join(encode(record) + b"\n" for record in kept))

    def write(self, *, step: int, **metrics: Any) -> None:
        """Append one record. Raises `ValueError` if a metric is not finite: the run has diverged,
        or the metric divides by zero.
        """
        record = plain({"step": step, **metrics, "time": round(time.time(), 3)})
        wrong = [
            name
            for name, value in record.items()
            if isinstance(value, float) and not np.isfinite(value)
        ]
        if wrong:
            raise ValueError(f"{self.path}, step {step}: {wrong[0]} is {record[wrong[0]]}")
        with open(self.path, "ab") as file:
            file.write(encode(record) + b"\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete records of a `TrainingLog`, in order."""
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


# --- the header ---


def make_header(about: About) -> dict[str, Any]:
    """The header of an artifact, as plain JSON types (`HEADER_FIELDS`), its checksum still empty.
    `ValueError` for a stage that no script makes.
    """
    known_stage(about["stage"])
    made_from = {path.name: digest(path) for path in about.get("parents", ())}
    code = {"versions": versions(), "code": code_digest()}
    return plain({**about, "schema": SCHEMA, "parents": made_from, **code, "checksum": ""})


def known_stage(stage: str) -> None:
    if stage not in REMAKE:
        raise ValueError(f"unknown stage '{stage}'; the stages are {', '.join(REMAKE)}")


def versions() -> dict[str, str]:
    """The libraries that decide the numbers."""
    return {"jax": jax.__version__, "equinox": eqx.__version__, "numpy": np.__version__}


def plain(value: Any) -> Any:
    """`value` in JSON types: arrays become lists, tuples lists, and dictionary entries that are
    paths are left out.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if not isinstance(v, Path)}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    return value


def encode(content: dict[str, Any]) -> bytes:
    """One line of JSON; NaN and infinity, which JSON lacks, raise `ValueError`."""
    return json.dumps(content, sort_keys=True, allow_nan=False).encode()


def parse_header(path: Path, text: str, stage: str | None) -> dict[str, Any]:
    try:
        header = json.loads(text)
        encode(header)  # nan and infinity, which Python reads, are no JSON
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise ArtifactError(
            path, "truncated, edited, or not an artifact: its header cannot be read", stage
        ) from error
    if not isinstance(header, dict):
        raise ArtifactError(path, "not an artifact: its header is not a JSON object", stage)
    return header


def verify(path: Path, header: dict[str, Any], payload: bytes, stage: str) -> None:
    """Raise `ArtifactError` unless the file is whole, unedited, and of this stage and schema."""
    known_stage(stage)
    found, missing = header.get("schema"), [name for name in HEADER_FIELDS if name not in header]
    if found != SCHEMA:
        problem = f"wrong schema: the file has {found}, this code reads {SCHEMA}"
    elif missing:
        problem = f"edited, or not an artifact: its header lacks '{missing[0]}'"
    elif header["stage"] != stage:
        problem = f"wrong stage: the file holds '{header['stage']}', '{stage}' is needed"
    elif checksum(header, payload) != header["checksum"]:
        problem = "truncated or edited: its header and content do not match its checksum"
    else:
        return
    raise ArtifactError(path, problem, stage)


def checksum(header: Mapping[str, Any], payload: bytes) -> str:
    """SHA-256 over the header, its own entry `checksum` left out, and the payload: an edited
    setting is found like an edited weight.
    """
    return hashlib.sha256(
        encode({k: v for k, v in header.items() if k != "checksum"}) + b"\n" + payload
    ).hexdigest()


# --- bytes ---


def write_leaves(path: Path, tree: Any, header: dict[str, Any]) -> None:
    """Write the header with its checksum, then the leaves of `tree`, in order, as `.npy` blocks."""
    refuse_nan(path, tree)
    stream = io.BytesIO()
    eqx.tree_serialise_leaves(stream, tree)
    header |= {"checksum": checksum(header, stream.getvalue())}
    replace_file(path, encode(header) + b"\n" + stream.getvalue())


def deserialise(path: Path, payload: bytes, like: Any, stage: str | None) -> Any:
    """`like` with the leaves in `payload`, which must have the same number, shapes and dtypes."""
    stream = io.BytesIO(payload)
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
    for where, leaf in jtu.tree_leaves_with_path(tree):
        if eqx.is_inexact_array_like(leaf) and np.isnan(np.asarray(leaf)).any():
            raise ArtifactError(
                path,
                f"not written, NaN in {jtu.keystr(where)}: training has "
                "diverged, or the data are damaged",
            )


def array_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever the order in the file."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        found.update(
            f"{name} {array.dtype.str} {array.shape} ".encode()
            + np.ascontiguousarray(array).tobytes()
        )
    return found.hexdigest()


def read_bytes(path: Path, stage: str | None) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(path, "missing", stage) from None
    except (OSError, ValueError) as error:  # a directory, a loop of links, a name with a NUL byte
        problem = f"cannot be read ({getattr(error, 'strerror', error)})"
        raise ArtifactError(path, problem, stage) from None


def split(path: Path, stage: str | None) -> tuple[dict[str, Any], bytes]:
    """Header and payload of an `.eqx` file or a checkpoint."""
    line, newline, payload = read_bytes(path, stage).partition(b"\n")
    if not newline:
        raise ArtifactError(path, "truncated, or not an artifact: its header has no end", stage)
    return parse_header(path, line.decode(errors="replace"), stage), payload


def read_npz(path: Path, stage: str | None, only: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, or the one named `only` if it is there."""
    stream = io.BytesIO(read_bytes(path, stage))
    try:
        with np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if only in (None, name)}
    except (
        *(zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, TypeError),
        RuntimeError,  # an edited flag: "encrypted", or a compression that zipfile does not know
    ) as error:
        raise ArtifactError(
            path, f"truncated or edited: not a complete .npz file ({error})", stage
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: a killed process leaves the old file or the new
    one, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
