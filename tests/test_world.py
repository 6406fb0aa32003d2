"""Suites of problems draw what they are called, and the study that plays them judges as by hand."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lib.artifacts import save
from lib.problems import DATA, SUITES, DataDesign, draw_problems, suite
from lib.scm_prior import WORLD, SCMPrior
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig
from studies.world import HINTS, NUM_BINS, Config, Recorded, hinted, judge, main, outcome


SMALL = Path(__file__).parents[1] / "pretrained" / "acbo_small.eqx"


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_draws_what_it_is_called_and_nothing_else(name):
    prior = SCMPrior(max_vars=5, min_size=4, max_size=5, **WORLD)
    kind = suite(name, prior, DataDesign(12, 12, per_variable=1, **DATA))
    scm, truth, buffer = jax.device_get(draw_problems(jr.key(0), 8, *kind, 5))
    exists = np.arange(5) < (scm.var_mask | scm.hidden).sum(1, keepdims=True)
    quietest = scm.noise_scale.min(1, where=exists, initial=np.inf)
    loudest = scm.noise_scale.max(1, where=exists, initial=0.0)
    # what is not quiet has a deviation of one
    seen = np.where(scm.var_mask, buffer.values[:, :12].std(1), 1.0)
    quiet = (name != "rows") & (seen.min(1) < 0.45)
    special = {
        "hidden": scm.hidden.any(1),
        "quiet": quiet,
        "rows": buffer.valid.sum(1) >= 300,
        "inert": truth.baseline - truth.effects.min((1, 2)) < 0.5,
        "copies": (loudest > 10.01 * quietest) & ~quiet,  # it is otherwise 10 at most
        "feedback": np.tril(scm.adjacency).any((1, 2)),
        "designed": (buffer.intervened.sum(2) > 1).any(1),
        "mixed": (scm.noise_kind > 0).any(1),
    }
    assert set(special) | {"old"} == set(SUITES) == set(Config().suites) - set(HINTS)
    assert {kind for kind, models in special.items() if models.mean() > 0.5} == {name} - {"old"}


def test_a_suite_has_a_name():
    with pytest.raises(ValueError, match="unknown suite 'new': choose from old, hidden"):
        suite("new", SCMPrior(), DataDesign())


def test_an_outcome_lies_between_the_stored_effects():
    """Y is variable 1; the effect of setting variable 0 to v, from 0 to 15, is v^2 at whole v."""
    effects = jnp.stack([jnp.arange(NUM_BINS) ** 2.0, jnp.full(NUM_BINS, jnp.inf)])
    scm = Recorded(
        *(jnp.array(1), jnp.zeros(2), jnp.array([15.0, 0.0]), jnp.ones(2, bool)),
        *(jnp.array([True, False]), effects, jnp.array(7.0)),
    )
    mean, half = jnp.where(effects < 50, effects, 0.0) + 1.0, 1.645
    found = outcome(scm, jnp.array(0), jnp.array(2.5), mean, mean - half, mean + half)
    numbers = [found[name] for name in ("reached", "mean", "std", "cover")]
    # the squares of 0 to 7 are below 50
    np.testing.assert_allclose(numbers, [6.5, 7.5, 1.0, 0.5], rtol=1e-5)
    assert found["acts"]
    nothing = outcome(scm, jnp.array(-1), jnp.array(2.5))
    assert nothing["reached"] == 7.0 and not nothing["acts"]


def test_figures_by_hand():
    """Five problems, Y variable 1, two observations -1 and 1 of it (deviation 1), E[Y] 0, the best
    effect -2, in the last one -.2; the third row is an experiment, the fourth is free.
    """
    rows = np.array([[0.0, -1.0], [0.0, 1.0], [3.0, 50.0], [9.0, 9.0]])
    known = {
        "values": np.tile(rows, (5, 1, 1)),
        "intervened": np.tile([[False] * 2, [False] * 2, [True, False], [False] * 2], (5, 1, 1)),
        "valid": np.tile([True, True, True, False], (5, 1)),
        "target": np.ones(5, int),
        "var_mask": np.tile([True, True], (5, 1)),
        "parents": np.tile([False, False], (5, 1)),
        "baseline": np.zeros(5),
        "effects": np.tile(np.array([[-2.0, 1.0], [np.inf, np.inf]]), (5, 1, 1)),
    }
    known["effects"][4, 0, 0] = -0.2
    said = {
        # the best; half of it; harm that was promised to be gain; nothing; a small gain
        "reached": np.array([-2.0, -1.0, 0.1, 0.0, -0.1]),
        "acts": np.array([True, True, True, False, True]),
        "mean": np.array([-1.0, -1.0, -2.0, -2.0, -0.1]),
        "std": np.array([0.3, 0.4, 1.0, 0.5, 0.1]),
        "cover": np.full(5, 0.9),
        "marginals": np.array([[0.6, 0.6], [0.4, 0.6], [0.1, 0.1], [0.5, 0.0], [1.0, 0.0]]),
    }
    found = judge(said, known)
    np.testing.assert_allclose(found["regret"], [0.0, 0.5, 1.05, 1.0, np.nan])
    np.testing.assert_array_equal(found["worse"], [False, False, True, False, False])
    np.testing.assert_array_equal(found["wild"], [True, False, False, False, False])
    np.testing.assert_array_equal(found["claims"], [False, False, True, False, False])
    np.testing.assert_array_equal(found["false parents"], [2, 1, 0, 0, 1])
    np.testing.assert_array_equal(found["parent F1"], [0, 0, 1, 1, 0])  # 1: none, and none said
    assert set(judge({k: said[k][:2] for k in ("reached", "acts")}, known)) == {"regret", "worse"}


def test_what_was_drawn_is_played_again(tmp_path):
    """The same figures from the files, whatever the seed; regret only where there is a gain."""
    sizes = SurrogateConfig(8, 1, num_heads=2, head_dim=4, num_components=2)
    surrogate = eqx.filter_jit(ParentSetPredictionModel)(sizes, key=jr.key(1))
    path, about = tmp_path / "some.eqx", dict(stage="surrogate", config={}, seed=0)
    save(path, surrogate, hyperparameters=sizes.hyperparameters, **about)
    settings = dict(suites=("old", "inert"), num_problems=4, num_obs=12, folder=tmp_path)
    first, again = (
        json.loads((main(Config((SMALL, path), seed=s, **settings)) / "metrics.json").read_text())
        for s in (1, 2)
    )
    assert first == again and {r["n"] for r in first if r["metric"] != "regret"} == {4}
    system, alone = (p.with_suffix("").as_posix() for p in (SMALL, path))
    methods = {system, system + " unchecked", alone}
    methods |= {"additive_ridge", "gaussian_processes", "bo"}
    for name, figures in (("old", {"regret", "worse", "above first's"}), ("inert", {"worse"})):
        cells = {(r["method"], r["metric"]) for r in first if r["task"] == name}
        assert {method for method, _ in cells} == methods
        assert {metric for method, metric in cells if method == "bo"} == figures
        assert (system, "above first's") not in cells and (system, "cover") in cells
        assert ((alone, "above first's") in cells) == (name == "old")


def test_a_hint_is_one_edge_into_the_target_true_or_false():
    """Y is variable 1 with the parent 0, in the second problem without; variable 3 is padding."""
    known = {
        "var_mask": np.tile([True, True, True, False], (2, 1)),
        "target": np.ones(2, int),
        "parents": np.array([[True, False, False, False], [False] * 4]),
    }
    for truly, variable in ((True, 0), (False, 2)):
        found = hinted(known, truly, 0)
        assert found["known"].shape == (1, 4, 4) and found["known"].sum() == 1
        assert found["known"][0, variable, 1] == 1
