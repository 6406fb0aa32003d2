"""A campaign in Python on the simulated plant, from the data in this folder:

python examples/bench.py
"""

import csv
import sys
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE)]

import plant  # noqa: E402

import acbo  # noqa: E402


def main(budget: int = 8, seed: int = 0) -> float:
    """Makes `budget` experiments; returns the mean yield of what is recommended at the end."""
    rng, system = np.random.default_rng(seed), acbo.load()
    with open(HERE / "experiments.csv") as file:
        rows = list(csv.DictReader(file))
    table = {name: [row[name] for row in rows] for name in rows[0]}
    for left in range(budget, 0, -1):
        suggestion = system.ask(table, "yield", "max", bounds=plant.RANGES, remaining=left)
        if not suggestion.answer["stop"]["worth_it"]:
            break
        (row,) = plant.rows(rng, suggestion.settings)
        table = system.tell(suggestion, dict(zip(plant.NAMES, row, strict=True)))
        print(f"set {suggestion.settings}: yield {table['yield'][-1]:.1f}")
    answer = system.ask(table, "yield", "max", bounds=plant.RANGES).answer
    best = answer["recommended_action"]["settings"]
    truth = [plant.rows(rng, one, 100_000)[:, -1].mean() for one in ({}, best)]
    print(f"doing nothing {truth[0]:.1f}, recommended {best or 'nothing'} {truth[1]:.1f}")
    return truth[1]


if __name__ == "__main__":
    main()
