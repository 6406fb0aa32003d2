"""Positive definite systems: Cholesky factors and solves, one matrix at a time under `vmap`, and an
inverse for many small matrices at once.

jaxlib's batched LAPACK kernels hold a thread of XLA's CPU pool while they wait for the others: on
two cores two such kernels wait for each other for ever (seen with jaxlib 0.10.2). Called one by one
they neither wait nor cost more: for the sizes here, 10 to 200, a call takes longer than the loop
around it.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap


@sequential_vmap
def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower factor of a positive definite `matrix[dim, dim]`; nan if it is not."""
    return jnp.linalg.cholesky(matrix)


@sequential_vmap
def forward_solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    """x of `factor x = right[dim, columns]`, `factor` lower triangular."""
    return jax.scipy.linalg.solve_triangular(factor, right, lower=True)


@sequential_vmap
def backward_solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    """x of `factor' x = right[dim, columns]`, `factor` lower triangular."""
    return jax.scipy.linalg.solve_triangular(factor, right, lower=True, trans=1)


@sequential_vmap
def positive_solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """x of `matrix x = right[dim, columns]`, `matrix` positive definite."""
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), right)


@sequential_vmap
def inverse_and_log_det(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse of a positive definite `matrix[dim, dim]`, and the logarithm of its determinant."""
    factor = jnp.linalg.cholesky(matrix)
    inverse = jax.scipy.linalg.cho_solve(
        (factor, True), jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    )
    return inverse, 2 * jnp.log(jnp.diagonal(factor)).sum()


def positive_inverse(matrix: jax.Array) -> jax.Array:
    """Inverse of a small symmetric positive definite matrix by Gauss-Jordan sweeps, for which such
    matrices need no pivoting.

    Plain array operations, which `vmap` turns into wide ones: the choice for many matrices of up to
    some 60 columns.
    """
    return positive_inverse_and_log_det(matrix)[0]


def positive_inverse_and_log_det(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`positive_inverse`, and the logarithm of the determinant."""

    def sweep(k, swept):
        m, log_det = swept
        pivot, column = m[k, k], m[:, k]
        row = m[k] / pivot
        m = (m - column[:, None] * row[None]).at[k].set(row).at[:, k].set(-column / pivot)
        return m.at[k, k].set(1.0 / pivot), log_det + jnp.log(pivot)

    return jax.lax.fori_loop(0, len(matrix), sweep, (matrix, jnp.zeros((), matrix.dtype)))
