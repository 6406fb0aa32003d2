"""Mathematics and modules of amortised causal Bayesian optimisation; the numbered scripts hold loops, flags and printing."""

import os


# jaxlib's batched LAPACK kernels hold one thread of XLA's CPU pool while they wait for others: on a machine with two cores, two such kernels that run at the same
# time wait for each other for ever. A pool larger than the number of kernels that can run at once removes the deadlock; it must be set before jax starts.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
