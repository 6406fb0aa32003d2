"""The buffer as a value."""

import inspect

import equinox as eqx
import jax.numpy as jnp
import pytest

from lib.buffer import ExperienceBuffer
from lib.scm import Intervention


def test_adding_returns_a_new_buffer_and_first_is_what_was_known_then():
    empty = ExperienceBuffer.empty(3, 4)
    one = empty.add_intervention(Intervention.none(3), jnp.array([1.0, 2.0, 3.0]))
    two = one.add_intervention(Intervention.single(1, 5.0, 3), jnp.array([4.0, 5.0, 6.0]))
    assert (empty.size, one.size, two.size) == (0, 1, 2)
    assert not empty.values.any() and not one.values[1].any()
    assert two.values[:2].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert two.intervened.sum(0).tolist() == [0, 1, 0]
    assert two.observational.tolist() == [True, False, False, False]
    for count, known in ((0, empty), (1, one), (2, two), (9, two)):
        assert eqx.tree_equal(two.first(count), known)
    with pytest.raises(AttributeError):
        two.valid = two.valid  # pyright: ignore


def test_a_full_buffer_raises_and_grow_adds_free_places():
    nothing, add = Intervention.none(2), ExperienceBuffer.add_intervention
    full = add(ExperienceBuffer.empty(2, 1), nothing, jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="full"):
        add(full, nothing, jnp.ones(2))
    assert full.values.tolist() == [[1.0, 2.0]] and full.grow(2).size == 1
    for one in (add, eqx.filter_jit(add)):
        more = one(full.grow(2), nothing, jnp.array([3.0, 4.0]))
        assert more.values.tolist() == [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]] and more.size == 2


def test_a_short_row_is_refused():
    buffer = ExperienceBuffer.empty(3, 2)
    write = inspect.unwrap(ExperienceBuffer.write)  # without the run-time shape checks of the tests
    for row in (jnp.ones(1), jnp.array(2.0), jnp.ones(4)):
        with pytest.raises(ValueError, match="the outcome has shape"):
            write(buffer, 0, Intervention.none(3), row)
    with pytest.raises(ValueError, match="the intervention has shape"):
        buffer.add_intervention(Intervention.single(0, 1.0, 2), jnp.ones(3))
