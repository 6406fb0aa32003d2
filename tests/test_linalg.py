"""Factors, solves and inverses against numpy and scipy, one matrix at a time and under `vmap`, with
their gradients.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lib.linalg import (
    backward_solve,
    cholesky,
    forward_solve,
    inverse_and_log_det,
    positive_inverse,
    positive_solve,
)


BATCH, DIM, COLUMNS = 3, 6, 2
RNG = np.random.default_rng(0)
ROOTS, SLOPES = RNG.normal(size=(BATCH, DIM, DIM + 4)), RNG.normal(size=(BATCH, DIM, DIM))
MATRICES = ROOTS @ ROOTS.swapaxes(1, 2) / DIM + 0.5 * np.eye(DIM)
FACTORS = np.linalg.cholesky(MATRICES)
RIGHTS, RIGHT_SLOPES = RNG.normal(size=(2, BATCH, DIM, COLUMNS))
# arguments, and the directions of their derivatives: symmetric or triangular as they are
MATRIX = MATRICES, SLOPES + SLOPES.swapaxes(1, 2)
FACTOR, RIGHT = (FACTORS, np.tril(SLOPES)), (RIGHTS, RIGHT_SLOPES)
solve_lower = ft.partial(scipy.linalg.solve_triangular, lower=True)
CASES = {
    "cholesky": (cholesky, np.linalg.cholesky, MATRIX),
    "forward_solve": (forward_solve, solve_lower, FACTOR, RIGHT),
    "backward_solve": (backward_solve, ft.partial(solve_lower, trans=1), FACTOR, RIGHT),
    "positive_solve": (positive_solve, np.linalg.solve, MATRIX, RIGHT),
    "inverse": (lambda m: inverse_and_log_det(m)[0], np.linalg.inv, MATRIX),
    "log_det": (lambda m: inverse_and_log_det(m)[1], lambda m: np.linalg.slogdet(m)[1], MATRIX),
    "positive_inverse": (positive_inverse, np.linalg.inv, MATRIX),
}


def single(array):
    return jnp.asarray(array, jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_values_and_directional_derivatives(name):
    """One matrix by itself; and under `vmap` forward mode along a symmetric (or triangular)
    direction, against central differences in float64.
    """
    function, oracle, *pairs = CASES[name]
    arguments, directions = zip(*pairs, strict=True)

    def moved(i, step):
        return oracle(*(a[i] + step * d[i] for a, d in pairs))

    found = jax.jit(function)(*(single(a[0]) for a in arguments))
    np.testing.assert_allclose(found, moved(0, 0.0), atol=5e-4, rtol=5e-4)
    expected = [(moved(i, 1e-5) - moved(i, -1e-5)) / 2e-5 for i in range(BATCH)]
    _, slope = jax.jit(jax.vmap(lambda a, d: jax.jvp(function, a, d)))(
        tuple(map(single, arguments)), tuple(map(single, directions))
    )
    np.testing.assert_allclose(slope, expected, atol=2e-3, rtol=2e-3)


def test_a_batch_of_one_argument_and_of_two_nested_axes():
    """`vmap` over the right-hand side alone, and over a grid of matrices."""
    shared = jax.jit(jax.vmap(positive_solve, (None, 0)))(single(MATRICES[0]), single(RIGHTS))
    np.testing.assert_allclose(shared, np.linalg.solve(MATRICES[0][None], RIGHTS), atol=5e-4)
    scales = np.array([1.0, 2.0])
    nested = jax.jit(jax.vmap(lambda s: jax.vmap(cholesky)(s * single(MATRICES))))(single(scales))
    expected = np.sqrt(scales)[:, None, None, None] * FACTORS[None]
    np.testing.assert_allclose(nested, expected, atol=5e-4)


def test_reverse_mode_through_the_sweeps():
    """d (b' A^-1 b) / dA = -x x' and / db = 2 x with x = A^-1 b: the networks are trained through
    this inverse.
    """
    b = RIGHTS[:, :, 0]
    x = np.linalg.solve(MATRICES, b[:, :, None])[:, :, 0]
    form = jax.grad(lambda m, b: b @ positive_inverse(m) @ b, argnums=(0, 1))
    by_matrix, by_right = jax.jit(jax.vmap(form))(single(MATRICES), single(b))
    symmetric = (by_matrix + by_matrix.swapaxes(1, 2)) / 2
    np.testing.assert_allclose(symmetric, -x[:, :, None] * x[:, None, :], atol=2e-3)
    np.testing.assert_allclose(by_right, 2 * x, atol=2e-3)


def test_an_indefinite_matrix_has_no_factor():
    factors = jax.jit(jax.vmap(cholesky))(
        single(np.stack([MATRICES[0], MATRICES[0] - 10 * np.eye(DIM), MATRICES[1]]))
    )
    assert np.isfinite(np.tril(factors)[[0, 2]]).all()
    assert np.isnan(np.diagonal(factors[1])).any()


def test_scales_far_apart():
    """Variances over ten orders of magnitude, as unstandardised columns have them."""
    scale = np.logspace(-5, 5, DIM)
    matrix = single(scale[:, None] ** 0.5 * MATRICES[0] * scale[None] ** 0.5)
    inverse, log_det = inverse_and_log_det(matrix)
    for found in (positive_inverse(matrix), inverse):
        unscaled = scale[:, None] ** 0.5 * np.asarray(found) * scale[None] ** 0.5
        np.testing.assert_allclose(unscaled, np.linalg.inv(MATRICES[0]), atol=5e-3)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(MATRICES[0])[1], atol=5e-3)
