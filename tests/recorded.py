"""Recorded runs of the original PARENT_SCALE code: those in `cases`, or those in the folder that
PARENT_SCALE_CASES names.

Of the ten in `cases` none may be missing. Of another folder every `.npz` file of this naming is a
case. `cases/README.md` has the format.
"""

import functools as ft
import os
from fnmatch import fnmatch
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lib.synthetic import MECHANISMS, NOISES, SyntheticSCM, index_of


FOLDER = Path(os.environ.get("PARENT_SCALE_CASES") or Path(__file__).parent / "cases")
OURS = FOLDER.resolve() == Path(__file__).resolve().parent / "cases"
NAMES = (
    "d10_linear_dr1_s0_T30",
    "d10_linear_dr1_s1_T10",
    "d10_nonlinear_dr1_s0_T30",
    "d10_nonlinear_dr1_s1_T10",
    "d5_linear_dr0_s0_T10",
    "d5_linear_dr1_s0_T30",
    "d5_linear_dr1_s1_T10",
    "d5_nonlinear_dr0_s0_T10",
    "d5_nonlinear_dr1_s0_T30",
    "d5_nonlinear_dr1_s1_T10",
)
if not OURS:
    NAMES = tuple(sorted(path.stem for path in FOLDER.glob("d*_*linear_dr[01]_s*_T*.npz")))
    if not NAMES:
        raise FileNotFoundError(f"no recorded run in the folder of PARENT_SCALE_CASES ({FOLDER})")


def each_case(pattern="*"):
    """Parametrises a test by the names of the recorded runs that match `pattern`."""
    return pytest.mark.parametrize("name", [name for name in NAMES if fnmatch(name, pattern)])


@ft.cache
def read_case(name):
    """The arrays of a recorded run by name. One that another folder does not hold is skipped."""
    if name not in NAMES:
        pytest.skip(f"no recorded run {name} in the folder of PARENT_SCALE_CASES ({FOLDER.name})")
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def linear_system(case) -> SyntheticSCM:
    """The system of a recorded linear run, in raw units."""
    d, topo = len(case["topo"]), case["topo"]
    low, high = case["search_range"].T.astype(np.float32)
    return SyntheticSCM(
        family=jnp.int32(0),
        order=jnp.asarray(topo, jnp.int32),
        adjacency=jnp.asarray(case["adjacency"][topo][:, topo] != 0),
        mechanism=jnp.full(d, index_of("linear", MECHANISMS)),
        noise_kind=jnp.full(d, index_of("gaussian", NOISES)),
        weights=jnp.asarray(case["weights"][topo][:, topo], jnp.float32),
        frequencies=jnp.zeros((d, d, 1)),
        phases=jnp.zeros((d, 1)),
        amplitudes=jnp.zeros((d, 1)),
        noise_scale=jnp.asarray(case["noise_sigma"][topo], jnp.float32),
        shift=jnp.zeros(d),
        spread=jnp.ones(d),
        target=jnp.array(int(case["target"])),
        low=jnp.asarray(low),
        high=jnp.asarray(high),
        var_mask=jnp.ones(d, bool),
        hidden=jnp.zeros(d, bool),
    )
