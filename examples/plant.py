"""A simulated plant, for the campaigns of this folder and of the README.

    echo '{"catalyst": 7}' | python examples/plant.py         one row; {}: nothing is set
    echo '{"catalyst": 7}' | python examples/plant.py truth   the mean yield, without noise
    python examples/plant.py data                             the file examples/experiments.csv

Operators stir faster where they dose more catalyst, but stirring does nothing; heat makes impurity.
So the yield goes with stirring and catalyst alike, of which one is its cause.
"""

import json
import sys

import numpy as np


NAMES = "temperature", "catalyst", "stirring", "impurity", "yield"
DIGITS = 1, 2, 0, 2, 1
RANGES = {"temperature": (45, 75), "catalyst": (2, 8), "stirring": (100, 300)}


def rows(rng: np.random.Generator, settings: dict[str, float], count: int = 1) -> np.ndarray:
    """`count` rows `[rows, 5]` with these variables set, others as they come."""
    noise = rng.standard_normal((5, count))

    def do(name: str, natural: np.ndarray) -> np.ndarray:
        return np.full(count, float(settings[name])) if name in settings else natural

    temperature = do("temperature", 62 + 6.5 * noise[0])
    catalyst = do("catalyst", 4.9 + 0.8 * noise[1])
    stirring = do("stirring", 40 * catalyst + 18 * noise[2])
    impurity = do("impurity", 2.2 + 0.08 * (temperature - 62) + 0.45 * noise[3])
    mean = 59 - 0.9 * (catalyst - 7) ** 2 - 0.02 * (temperature - 66) ** 2 - 3 * (impurity - 2)
    return np.stack([temperature, catalyst, stirring, impurity, mean + 1.5 * noise[4]], 1)


def written(row: np.ndarray) -> list[str]:
    """The cells of a row."""
    return [f"{value:.{digits}f}" for value, digits in zip(row, DIGITS, strict=True)]


def data(rng: np.random.Generator) -> str:
    """Forty observations, and two experiments on each variable that can be set, as a CSV."""
    lines = [",".join([*NAMES, "intervened"])]
    lines += [",".join([*written(row), ""]) for row in rows(rng, {}, 40)]
    for name, (low, high) in RANGES.items():
        for share in rng.uniform(0, 0.5, 2) + [0, 0.5]:
            row = rows(rng, {name: low + share * (high - low)})[0]
            lines.append(",".join([*written(row), name]))
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["data"]:
        print(data(np.random.default_rng(3)))
    else:
        asked = json.loads(sys.stdin.readline())
        if sys.argv[1:] == ["truth"]:
            print(f"{rows(np.random.default_rng(0), asked, 1_000_000)[:, -1].mean():.2f}")
        else:
            cells = written(rows(np.random.default_rng(), asked)[0])
            print(json.dumps(dict(zip(NAMES, map(float, cells), strict=True))))
