"""Mathematics and modules of amortised causal Bayesian optimisation; the numbered scripts hold
loops, flags and printing.
"""
