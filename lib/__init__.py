"""Mathematics and modules of amortised causal Bayesian optimisation (ACBO); the numbered scripts
hold loops, flags and printing. The design documents that docstrings cite by their file names are
described in reference/documents.md; lib/documents.py has their names.
"""
