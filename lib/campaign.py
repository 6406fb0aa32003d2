"""The loop that every campaign is: decide, experiment, learn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from lib.buffer import ExperienceBuffer, nan_unless
from lib.scm import AbstractSCM, Intervention, experiment_key


Choice = tuple[Int[Array, ""], Float[Array, ""]]  # a variable and the value to set it to


def run_campaign(
    key: Key[Array, ""],
    scm: AbstractSCM,
    buffer: ExperienceBuffer,
    num_steps: int,
    decide: Callable[[Key[Array, ""], ExperienceBuffer, Any, Int[Array, ""]], tuple[Choice, Any]],
    *,
    state: Any = None,
    update: Callable[[Any, Int[Array, ""], Float[Array, "rows vars"]], Any] = lambda *_: None,
    num_rows: int = 1,
) -> tuple[ExperienceBuffer, Any, tuple[Int[Array, " steps"], Float[Array, " steps"]], Any]:
    """`num_steps` experiments with any method: the final buffer and state, the variables and values
    that were set, and what the method reported before the first experiment and after each
    (leading axis `steps + 1`).

    `decide(key, buffer, state, t)` returns the next experiment and a report; `update(state, t,
    rows)` what the method keeps beside the buffer, after the outcome: `num_rows` rows, of which the
    first enters the buffer. The noise of experiment t is that of `experiment_key(key, t)`, so
    methods run with the same key are paired. The buffer needs `num_steps` free rows behind its
    valid rows: `ValueError` if it has fewer; where only a traced program can tell, every number of
    the result is nan.
    """
    method_key, num_vars = jr.fold_in(key, 0), scm.var_mask.shape[0]
    start, fits = buffer.size, buffer.has_room(num_steps)

    def step(known, t):
        buffer, state = known
        choice, report = decide(jr.fold_in(method_key, t), buffer, state, t)

        def experiment():
            intervention = Intervention.single(*choice, num_vars)
            rows = scm.sample(experiment_key(key, t), intervention, num_rows)
            return buffer.write(start + t, intervention, rows[0]), update(state, t, rows)

        # the pass after the last experiment only looks
        return jax.lax.cond(t < num_steps, experiment, lambda: known), (choice, report)

    known, (choices, reports) = jax.lax.scan(step, (buffer, state), jnp.arange(num_steps + 1))
    made = jax.tree.map(lambda leaf: leaf[:-1], choices)
    return nan_unless(fits, (*known, made, reports))
