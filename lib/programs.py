"""Programs that are traced once for all processes: beside the compiled ones, in the folder of the
compilation cache, lies what was traced, as `jax.export` writes it.
"""

import contextlib
import functools as ft
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.export import deserialize, export

from lib.artifacts import ArtifactError, code_digest, stored


def compiled(function: Callable, given: tuple, static: tuple, quickly: bool = False) -> Any:
    """`function(*given, *static)`, compiled, or `quickly` compiled and then slower; given are trees
    of arrays, returned arrays in lists, tuples and dictionaries.
    """
    leaves, structure = jax.tree.flatten(given)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return program(function, structure, shapes, static, quickly)(*leaves)


@ft.cache
def program(function: Callable, structure, shapes: tuple, static: tuple, quickly: bool) -> Callable:
    """The program of `compiled`, which takes leaves. Its file is of this code, version of JAX,
    device, shapes and settings alone; one that is damaged is removed, and the next process writes
    it anew. Without a folder, and where it cannot be written, each process traces.
    """

    def flat(*leaves):
        return function(*jax.tree.unflatten(structure, leaves), *static)

    def traced():
        return {"program": np.frombuffer(export(jax.jit(flat))(*shapes).serialize(), np.uint8)}

    call, folder = flat, jax.config.values["jax_compilation_cache_dir"]
    if folder:
        by = code_digest(), jax.__version__, jax.default_backend(), function.__qualname__
        mark = hashlib.sha256(repr((*by, structure, shapes, static)).encode()).hexdigest()
        path = Path(folder) / f"traced-{mark}.npz"
        with contextlib.suppress(OSError):
            try:
                packed = stored(path, mark, traced, config={}, seed=0)["program"].tobytes()
                call = deserialize(bytearray(packed)).call
            except ArtifactError:
                path.unlink()
    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0} if quickly else {})
