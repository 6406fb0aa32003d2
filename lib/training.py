"""What all training loops share: a module with its optimiser, a scan over gradient steps, and the
files of a run that may be stopped and goes on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax

from lib.artifacts import cut_log, fingerprint, load_checkpoint, save_checkpoint, write_log


class Learner(NamedTuple):
    """A module in training, and the state of its optimiser."""

    module: Any
    optimiser: optax.OptState

    @staticmethod
    def of(module: eqx.Module, optimiser: optax.GradientTransformation) -> "Learner":
        """A module before its first step."""
        return Learner(module, optimiser.init(eqx.filter(module, eqx.is_array)))

    def descend(
        self, optimiser: optax.GradientTransformation, loss: Callable[[Any], tuple[jax.Array, Any]]
    ) -> tuple["Learner", Any]:
        """One gradient step on `loss(module) -> (loss, metrics)`; returns the metrics too."""
        (_, metrics), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(self.module)
        weights = eqx.filter(self.module, eqx.is_array)
        updates, state = optimiser.update(gradients, self.optimiser, weights)
        return Learner(eqx.apply_updates(self.module, updates), state), metrics


def filter_scan(step: Callable, carry: Any, inputs: Any = None, length: int | None = None):
    """`jax.lax.scan` whose carry may hold what is not an array, such as the shape of a module."""
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def body(dynamic, one):
        carry, out = step(eqx.combine(dynamic, static), one)
        return eqx.filter(carry, eqx.is_array), out

    dynamic, outputs = jax.lax.scan(body, dynamic, inputs, length)
    return eqx.combine(dynamic, static), outputs


def clipped_adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam on gradients whose norm is at most one."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def moving_average(average: Any, module: Any, decay: float) -> Any:
    """The average of a module's weights after one more step."""
    return jax.tree.map(
        lambda a, b: decay * a + (1.0 - decay) * b if eqx.is_array(a) else a, average, module
    )


class Progress:
    """Checkpoint and log of a stage: `<folder>/<name>.ckpt` and `<folder>/logs/<name>.jsonl`.

    What was begun goes on if `script`, `lib`, `config` and the files in `parents` are the same.
    """

    def __init__(
        self, folder: Path, name: str, script: str, config: Any, parents: Sequence[Path] = ()
    ):
        self.checkpoint = folder / f"{name}.ckpt"
        self.log_path = folder / "logs" / f"{name}.jsonl"
        self.fingerprint = fingerprint(script, config, parents)

    def resume(self, state: Any) -> tuple[Any, int]:
        """The state of the checkpoint and its step, or `state` and 0; the log goes on there."""
        state, start = load_checkpoint(self.checkpoint, state, self.fingerprint) or (state, 0)
        cut_log(self.log_path, start)
        return state, start

    def keep(self, step: int, metrics: dict[str, Any], state: Any = None) -> None:
        """A line of the log, and a checkpoint if there is a `state`."""
        if state is not None:
            save_checkpoint(self.checkpoint, state, fingerprint=self.fingerprint, step=step)
        write_log(self.log_path, step, metrics)

    def finish(self) -> None:
        """The results are written: the checkpoint goes."""
        self.checkpoint.unlink(missing_ok=True)
