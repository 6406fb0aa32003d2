"""The literature's systems: optima as stated, equations against plain numpy, interventions and
padding.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.special import expit

from lib.literature import Benchmark
from lib.scm import Intervention
from studies.expert import BENCHMARKS  # with the one that only it plays


def toy(rng, n, do):
    x = do.get("X", rng.normal(size=n))
    z = do.get("Z", 4 + np.exp(-x) + rng.normal(size=n))
    return {"X": x, "Z": z, "Y": np.cos(z) - np.exp(-z / 20) + rng.normal(size=n)}


def graph4(rng, n, do):
    x = rng.normal(size=n)
    z = 1.5 * np.tanh(x) + rng.normal(size=n)
    t = do.get("T", np.cos(x) + np.exp(-x) + rng.normal(size=n))
    return {"X": x, "Z": z, "T": t, "Y": z**2 + np.sin(t) + rng.normal(size=n)}


def epidemiology(rng, n, do):
    b, t = rng.uniform(-1, 1, n), do.get("T", rng.uniform(4, 8, n))
    viral = expit(0.5 * t + b)
    r = do.get("R", 4 + viral * t)
    return {
        "B": b,
        "T": t,
        "L": viral,
        "R": r,
        "Y": 0.5 + np.cos(4 * t) + np.sin(-viral + 2 * r) + b + rng.normal(size=n),
    }


def healthcare(rng, n, do):
    age = rng.uniform(55, 75, n)
    bmi = rng.normal(27 - 0.01 * age, np.sqrt(0.7))
    a = do.get("Aspirin", expit(-8 + 0.1 * age + 0.03 * bmi))
    s = do.get("Statin", expit(-13 + 0.1 * age + 0.2 * bmi))
    c = expit(2.2 - 0.05 * age + 0.01 * bmi - 0.04 * s + 0.02 * a)
    y = rng.normal(6.8 + 0.04 * age + 0.15 * bmi - 0.6 * s + 0.55 * a + c, np.sqrt(0.4))
    return {"Age": age, "BMI": bmi, "Aspirin": a, "Statin": s, "Cancer": c, "Y": y}


EQUATIONS = {
    "toy": toy,
    "graph4": graph4,
    "epidemiology": epidemiology,
    "healthcare": healthcare,
}
OPTIMA = {
    "toy": ("Z", -3.20, -2.1718),
    "graph4": ("T", -np.pi / 2, 0.8872),
    "epidemiology": ("T", 5.495, -1.4377),
    "healthcare": ("Statin", 1.0, 13.2494),
}
# joint optima first; what is observed; other interventions
STATED = {
    "toy": [
        ({"Z": -3.2}, -2.1718),
        ({}, -0.661),
        ({"Z": 3.07}, -1.85),
        ({"X": -1.68}, -1.23),
    ],
    "graph4": [({"T": 1.5 * np.pi}, 0.8872), ({}, 2.184)],
    "epidemiology": [({"T": 7.08, "R": 5.98}, -1.4995), ({}, 0.646), ({"R": 5.98}, -0.45)],
    "healthcare": [
        ({"Aspirin": 0.0, "Statin": 1.0}, 13.060),
        ({}, 13.711),
        ({"Aspirin": 0.0}, 13.52),
    ],
}
JOINT = {name: cases[0][0] for name, cases in STATED.items()}
RANGES = {
    "toy": {"X": (-5, 5), "Z": (-5.5, 13)},
    "graph4": {"T": (-2, 8)},
    "epidemiology": {"T": (4, 8), "R": (5, 15)},
    "healthcare": {"Aspirin": (0, 1), "Statin": (0, 1)},
}
NUM_SLOTS = 8
mean_outcome = jax.jit(lambda scm, intervention: scm.mean_outcome(intervention))


def setting(scm, do):
    mask = jnp.array([name in do for name in scm.names])
    return Intervention(mask, jnp.array([do.get(name, 0.0) for name in scm.names]))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_optima_and_means_as_stated(name):
    scm, (best, at, lowest) = Benchmark(name), OPTIMA[name]
    variable, value, mean = jax.jit(lambda scm: scm.optimum())(scm)
    assert scm.names[int(variable)] == best and abs(float(value) - at) < 0.02
    assert abs(float(mean) - lowest) < 0.003
    for place, (do, expected) in enumerate(STATED[name]):
        found = float(mean_outcome(scm, setting(scm, do)))
        assert abs(found - expected) < (0.006 if place else 0.003)
    assert f"{lowest:.3f}" in (BENCHMARKS[name].equations.__doc__ or "")


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("intervene", [False, True])
def test_samples_agree_with_the_equations(name, intervene):
    """Means, deviations and correlations of 40,000 rows, against a separate implementation in
    numpy; z-scores below 5.
    """
    scm, n, do = Benchmark(name), 40_000, JOINT[name] if intervene else {}
    sample = jax.jit(lambda key, i: scm.sample(key, i, n))
    rows = np.asarray(sample(jr.key(3), setting(scm, do)), float)
    columns = EQUATIONS[name](np.random.default_rng(0), n, do).values()
    expected = np.stack([np.broadcast_to(column, n) for column in columns], 1)
    for moment in (lambda x: x, lambda x: x[:, :1] * x, lambda x: np.tanh(x) * x[:, -1:]):
        a, b = moment(rows), moment(expected)
        error = np.abs(a.mean(0) - b.mean(0))
        assert np.all(error <= 5 * np.sqrt((a.var(0) + b.var(0)) / n) + 1e-4 * np.abs(b.mean(0)))
    for variable, value in do.items():
        np.testing.assert_allclose(rows[:, scm.names.index(variable)], value, rtol=1e-6)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_parents_ranges_and_target(name):
    """A variable is a parent if and only if moving it, with all others held, moves the target."""
    scm = Benchmark(name, NUM_SLOTS)
    named = zip(scm.names, scm.candidates, scm.low, scm.high, strict=False)
    assert {n: (low, high) for n, can, low, high in named if can} == RANGES[name]
    assert scm.names[int(scm.target)] == "Y" == scm.names[-1]
    centre = scm.sample(jr.key(0), Intervention.none(NUM_SLOTS), 64).mean(0)
    held = jnp.arange(NUM_SLOTS) != scm.target
    for i in range(int(scm.target)):
        one, two = (
            mean_outcome(scm, Intervention(held, centre.at[i].add(shift))) for shift in (-0.3, 0.3)
        )
        assert (abs(float(one - two)) > 1e-3) == bool(scm.parents[i])


def test_reference_noise_is_fixed():
    a, b = Benchmark("toy"), Benchmark("toy")
    assert jnp.array_equal(a.reference_noise(), b.reference_noise())
    assert jnp.array_equal(a.reference_noise(), jax.jit(lambda scm: scm.reference_noise())(a))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_padding_leaves_means_alone(name):
    scm, wide = Benchmark(name), Benchmark(name, 9)
    do, size = setting(scm, JOINT[name]), len(scm.names)
    padded = Intervention(*(jnp.pad(leaf, (0, 9 - size)) for leaf in jax.tree.leaves(do)))
    rows = wide.sample(jr.key(0), padded, 20)
    assert rows.shape == (20, 9) and not rows[:, size:].any() and not wide.candidates[size:].any()
    means = mean_outcome(wide, padded), mean_outcome(scm, do)
    np.testing.assert_allclose(*means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("toys",),
            "unknown benchmark 'toys'; choose from toy, epidemiology, healthcare, graph4",
        ),
        (("healthcare", 5), "healthcare has 6 variables: they do not fit in 5"),
    ],
)
def test_errors(arguments, said):
    with pytest.raises(ValueError, match=said):
        Benchmark(*arguments)
