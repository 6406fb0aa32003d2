"""What every script shares before it starts: presets on the command line, the compilation cache,
and errors meant for people.
"""

import contextlib
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.random as jr

from lib.artifacts import ArtifactError
from lib.table import DataError


# without 64-bit integers a larger one would lose its upper half, and two seeds give one result
LARGEST_SEED = 2**32 - 1
# and what is 0 by default
MAY_BE_ZERO = ("per_variable", "max_interventions", "warmup_steps", "demos_per_step")
MAY_BE_EMPTY = ("literature", "exploration_sizes", "band_sizes", "rivals", "shift_sizes")


def stage_key(seed: int, *names: str) -> jax.Array:
    """The random key of one use, such as `stage_key(0, "surrogate", "problems")`: other names give
    other numbers, in every stage.

    `jr.split(key, n)[i]` equals `jr.fold_in(key, i)`, so a key must not be both split and folded,
    nor shared by two stages.
    """
    key = jr.key(seed)
    for name in names:
        key = jr.fold_in(key, zlib.crc32(name.encode()))
    return key


def validate(config: Any) -> None:
    """Raise `ValueError`, which the command line prints as one line, for a setting that cannot be
    meant; also of settings within `config`.

    Counts are at least 1 (0 in `MAY_BE_ZERO` and where 0 is the default) and fit 32 bits, seeds are
    whole numbers of 32 bits, no number is negative, infinite or NaN, and no list is empty save in
    `MAY_BE_EMPTY`. What depends on several settings is checked by the class itself.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if value == () and field.name not in MAY_BE_EMPTY:
            raise ValueError(f"{field.name}: give at least one")
        for one in value if isinstance(value, tuple) else (value,):
            least = 0 if field.name in MAY_BE_ZERO or field.default == 0 else 1
            if is_dataclass(one):
                validate(one)
            if isinstance(one, bool) or not isinstance(one, (int, float)):
                continue
            if field.name.endswith("seed"):
                fits, needed = 0 <= one <= LARGEST_SEED, f"between 0 and {LARGEST_SEED}"
            elif isinstance(one, int):
                fits, needed = least <= one < 2**31, f"at least {least} and below 2^31"
            else:
                fits, needed = 0 <= one < math.inf, "a finite number, not negative"
            if not fits:
                raise ValueError(f"{field.name} = {one} must be {needed}")


# what each preset is for, and the most variables of its systems
PRESETS = {
    "smoke": ("seconds, for CI", 8),
    "small": ("the default: what `make run` runs, on 2 CPU cores", 8),
    "hour": ("larger systems, more steps: hours on 2 CPU cores", 10),
    "paper": ("sizes of the design documents, for one GPU; never run whole", 20),
}


def presets(config: Callable[..., Any], **changes: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """A script's `config` for every preset, as tyro's `overridable_config_cli` takes them: its
    folder and the sizes of its prior follow from the preset, the rest are the script's `changes`.
    """
    prior = config().prior
    return {
        name: (
            about,
            config(
                Path("artifacts") / name,
                prior=replace(prior, max_vars=size, max_size=size),
                **changes.get(name, {}),
            ),
        )
        for name, (about, size) in PRESETS.items()
    }


def preset_arguments() -> list[str]:
    """The command line's arguments, with the preset `small` put first where none is named:
    `--steps 10` means `small --steps 10`.
    """
    arguments = sys.argv[1:]
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    if asks_for_help or (arguments and not arguments[0].startswith("-")):
        return arguments
    return ["small", *arguments]


def user_cache() -> Path:
    """Where a person's programs keep what can be made again (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "acbo"


def use_compilation_cache(folder: Path) -> None:
    """Compile fast, and keep compiled programs under `folder` (or where JAX_COMPILATION_CACHE_DIR
    says): a second run, and another stage with the same program, skips compilation.

    On the CPU, XLA's older emitter of kernels compiles a campaign with its rewards in 13.8 s
    instead of 34.5 s (jax 0.10.2, one core, as the tests compile it), and its code is as fast (a
    GRPO iteration in 2.6 and 2.5 s). XLA reads the flag with the first program, so this comes
    before it. Where `folder` cannot be written, as in a read-only checkout, programs are compiled
    anew in every process.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def errors_for_people() -> Iterator[None]:
    """Print bad data, a bad artifact or an impossible setting as one line and leave with status 2;
    bugs keep their traceback.
    """
    try:
        yield
    except (ArtifactError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
