"""What all training loops share: a module with its optimiser, batches, and the loop itself, which
may be stopped and goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from tqdm import tqdm

from lib.artifacts import cut_log, fingerprint, load, resumable, save, write_log


class Learner(NamedTuple):
    """A module in training, whose leaves are all weights, and the state of its optimiser."""

    module: Any
    optimiser: optax.OptState

    @staticmethod
    def of(module: Any, optimiser: optax.GradientTransformation) -> "Learner":
        """A module before its first step."""
        return Learner(module, optimiser.init(module))

    def descend(
        self, optimiser: optax.GradientTransformation, loss: Callable[[Any], tuple[jax.Array, Any]]
    ) -> tuple["Learner", Any]:
        """One gradient step on `loss(module) -> (loss, metrics)`; returns the metrics too."""
        gradients, metrics = jax.grad(loss, has_aux=True)(self.module)
        updates, state = optimiser.update(gradients, self.optimiser, self.module)
        return Learner(optax.apply_updates(self.module, updates), state), metrics


def clipped_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam on gradients whose norm is at most one."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def moving_average(average: Any, module: Any, decay: float) -> Any:
    """The average of a module's weights after one more step."""
    return optax.incremental_update(module, average, 1.0 - decay)


def merged(tree: Any) -> Any:
    """The two leading axes of every array as one."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def joined(parts: Sequence[Any]) -> Any:
    """Batches one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def drawn(key: jax.Array, examples: Any, count: int) -> Any:
    """`count` of the examples (leading axis), with replacement."""
    rows = jr.randint(key, (count,), 0, len(jax.tree.leaves(examples)[0]))
    return jax.tree.map(lambda leaf: leaf[rows], examples)


class Progress:
    """Checkpoint and log of a stage: `<folder>/<name>.ckpt` and `<folder>/logs/<name>.jsonl`.

    An unfinished run is resumed if the bytes of `script`, of `lib` and of the files in `parents`,
    and `config`, are the same. `header` is the part of an artifact's header that needs no result.
    """

    def __init__(
        self, folder: Path, name: str, script: str, config: Any, parents: Sequence[Path] = ()
    ):
        self.checkpoint = folder / f"{name}.ckpt"
        self.log_path = folder / "logs" / f"{name}.jsonl"
        self.fingerprint = fingerprint(script, config, parents)
        self.header: dict[str, Any] = dict(config=asdict(config), seed=config.seed, parents=parents)

    def resume(self, state: Any) -> tuple[Any, int, list[dict[str, Any]]]:
        """The checkpoint's state, its step and the log's records up to it, if the checkpoint is of
        the same fingerprint; otherwise `state`, 0 and none, and the log begins anew.
        """
        step = 0
        if resumable(self.checkpoint, "checkpoint", self.fingerprint):
            state, header = load(self.checkpoint, "checkpoint", lambda _: state)
            step = header["step"]
        elif self.checkpoint.exists():
            print(f"{self.checkpoint} is of other settings, inputs or code: starting anew")
        return state, step, cut_log(self.log_path, step)

    def keep(self, step: int, state: Any) -> None:
        """Replace the checkpoint."""
        about = self.header | {"parents": ()}  # they are in the fingerprint
        mark = {"fingerprint": self.fingerprint}
        save(self.checkpoint, state, stage="checkpoint", hyperparameters=mark, step=step, **about)

    def finish(self) -> None:
        """Delete the checkpoint, once the results are written."""
        self.checkpoint.unlink(missing_ok=True)


def train(
    name: str,
    advance: Callable[[Any, int, int], tuple[Any, dict[str, Any]]],
    state: Any,
    total: int,
    *,
    chunk: int = 1,
    checkpoint_every: int,
    shown: Mapping[str, str],
    progress: Progress | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """The state after `total` steps, and all records of the run; where `progress` has a checkpoint,
    on from there.

    `advance(state, step, count)` does `count` steps, at most `chunk`, from a state in which `step`
    are done, and returns the next state and a record of numbers or arrays, which is logged. The
    state is kept whenever a multiple of `checkpoint_every` has passed, but at the end. `shown`
    gives names of records by their labels on the progress bar.
    """
    start, records = 0, []
    if progress:
        state, start, records = progress.resume(state)
    with tqdm(desc=name, initial=start, total=total) as bar:
        for step in range(start, total, chunk):
            done = min(step + chunk, total)
            state, record = advance(state, step, done - step)
            record = {key: np.asarray(value).tolist() for key, value in record.items()}
            records.append({"step": done, **record})
            bar.update(done - step)
            if set(shown.values()) <= record.keys():
                bar.set_postfix({label: record[key] for label, key in shown.items()})
            if progress:
                write_log(progress.log_path, done, record)
                if done // checkpoint_every > step // checkpoint_every and done < total:
                    # after the log: a kill in between leaves a line too many, which `resume` drops
                    progress.keep(done, state)
    return state, records
