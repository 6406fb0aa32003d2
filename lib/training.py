"""What all training loops share: a module with its optimiser, batches, and the loop itself, which
may be stopped and goes on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
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


def drawn(key: jax.Array, examples: Any, count: int) -> Any:
    """`count` of the examples (leading axis), with replacement."""
    rows = jr.randint(key, (count,), 0, len(jax.tree.leaves(examples)[0]))
    return jax.tree.map(lambda leaf: leaf[rows], examples)


class Progress:
    """Checkpoint and log of a stage: `<folder>/<name>.ckpt` and `<folder>/logs/<name>.jsonl`.

    What was begun goes on if `script`, `lib`, `config` and the files in `parents` are the same.
    `header` is the part of an artifact's header that needs no result.
    """

    def __init__(
        self, folder: Path, name: str, script: str, config: Any, parents: Sequence[Path] = ()
    ):
        self.checkpoint = folder / f"{name}.ckpt"
        self.log_path = folder / "logs" / f"{name}.jsonl"
        self.fingerprint = fingerprint(script, config, parents)
        self.header: dict[str, Any] = dict(config=asdict(config), seed=config.seed, parents=parents)

    def resume(self, state: Any) -> tuple[Any, int]:
        """The state of the checkpoint and its step, or `state` and 0; the log goes on there."""
        header = {"step": 0}
        if resumable(self.checkpoint, "checkpoint", self.fingerprint):
            state, header = load(self.checkpoint, "checkpoint", lambda _: state)
        cut_log(self.log_path, header["step"])
        return state, header["step"]

    def keep(self, step: int, metrics: dict[str, Any], state: Any = None) -> None:
        """A line of the log, then a checkpoint if there is a `state`: a kill in between leaves a
        line too many, which `resume` drops, and not one too few.
        """
        write_log(self.log_path, step, metrics)
        if state is not None:
            save(
                self.checkpoint,
                state,
                stage="checkpoint",
                hyperparameters={"fingerprint": self.fingerprint},
                step=step,
                **self.header | {"parents": ()},  # they are in the fingerprint
            )

    def finish(self) -> None:
        """The results are written: the checkpoint goes."""
        self.checkpoint.unlink(missing_ok=True)


def train(
    name: str,
    steps: Callable[[Any, int], Iterable[tuple[int, Any, dict[str, Any]]]],
    state: Any,
    total: int,
    every: int,
    shown: Mapping[str, str],
    progress: Progress | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """The state after at most `total` steps, and what was logged.

    `steps(state, start)` goes on from a state in which `start` steps are done, which is that of a
    checkpoint of `progress` if there is one; it yields, now and then, how many steps are done, the
    state and a record. Every record is logged; the state is kept when a multiple of `every` has
    passed, but at the end. `shown` gives names of records by their labels on the bar.
    """
    begun, before = progress.resume(state) if progress else (state, 0)
    records = []
    with tqdm(desc=name, initial=before, total=total) as bar:
        for done, state, record in steps(begun, before):
            records.append({"step": done, **record})
            bar.update(done - before)
            if set(shown.values()) <= record.keys():
                bar.set_postfix({label: float(record[key]) for label, key in shown.items()})
            if progress:
                due = done // every > before // every and done < total
                progress.keep(done, record, state if due else None)
            before = done
    return state, records
