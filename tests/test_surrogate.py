"""The surrogate: exact probabilities, symmetries, indifference to padding and units, and one batch
that it can learn by heart.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from lib import surrogate
from lib.buffer import ExperienceBuffer
from lib.posterior import ParentSetPosterior
from lib.problems import DataDesign, GroundTruth, Problem, draw_problem
from lib.scm import Task
from lib.scm_prior import SCMPrior
from lib.sums import Summary
from lib.system import TrainedACBOSystem
from lib.training import Learner


CONFIG = surrogate.SurrogateConfig(
    model_hidden_dim=16, model_n_layers=2, num_heads=2, head_dim=4, num_components=2, num_bins=5
)
REAL, SLOTS, ROWS, VALID, TARGET = 6, 8, 32, 26, 2  # six variables in eight slots, six rows free
FILLED = np.arange(ROWS) < VALID
# every parent set of variable 2
SETS = np.array(
    [[m[0], m[1], 0, m[2], m[3], m[4], 0, 0] for m in itertools.product((0, 1), repeat=5)], bool
)


@pytest.fixture(scope="module")
def model():
    return eqx.filter_jit(surrogate.ParentSetPredictionModel)(CONFIG, key=jr.key(0))


def make_data(seed):
    """Correlated rows of six variables in numpy: a third of them interventional, zeros beyond six
    variables and in free rows.
    """
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(ROWS, REAL)) @ (np.eye(REAL) + 0.4 * rng.normal(size=(REAL, REAL)))
    intervened = np.zeros((ROWS, REAL), bool)
    intervened[np.arange(18, VALID), rng.integers(0, REAL, VALID - 18)] = True
    ends = rng.uniform(1.0, 3.0, (2, REAL)) * np.array([[-1.0], [1.0]])
    values[intervened] = rng.uniform(-1.0, 1.0, intervened.sum())
    values[VALID:] = 0.0
    return values, intervened, ends, TARGET


def build(data, slots=SLOTS, valid=FILLED):
    values, intervened, ends, target = data
    buffer = ExperienceBuffer(
        jnp.asarray(values, jnp.float32), jnp.asarray(intervened), jnp.asarray(valid)
    )
    task = Task(jnp.array(target), *jnp.asarray(ends, jnp.float32), jnp.ones(REAL, bool))
    return buffer.widen(slots - REAL), task.widen(slots - REAL)


def stack(pairs):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pairs)


BASE = make_data(0)
PERMUTATION = np.array([3, 0, 5, 1, 4, 2])
FREE = ~FILLED[:, None]


def rescaled(data, scale, shift):
    values, intervened, ends, target = data
    scaled = np.where(FREE, 0.0, values * scale + shift)
    return scaled, intervened, ends * scale + shift, target


IS_TARGET = np.arange(REAL) == TARGET
OTHERS = np.where(IS_TARGET, 0.0, np.linspace(-2.0, 3.0, REAL))
ROW_ORDER = np.random.default_rng(9).permutation(ROWS)


def noisy_padding(buffer, task):
    """Nonsense in the values, flags and ranges of variables that do not exist."""
    there = task.var_mask
    spoilt = ExperienceBuffer(
        jnp.where(there[None], buffer.values, 7.0),
        buffer.intervened | (~there[None] & ~buffer.observational[:, None]),
        buffer.valid,
    )
    ends = jnp.where(there, task.low, -5.0), jnp.where(there, task.high, 5.0)
    return spoilt, Task(task.target, *ends, task.var_mask)


VARIANTS = {
    "base": build(BASE),
    "variables": build(
        (
            *(columns[:, PERMUTATION] for columns in BASE[:3]),
            PERMUTATION.tolist().index(TARGET),
        )
    ),
    "rows": build((BASE[0][ROW_ORDER], BASE[1][ROW_ORDER], *BASE[2:]), valid=FILLED[ROW_ORDER]),
    "free rows": build((np.where(FREE, 1e3, BASE[0]), FREE | BASE[1], *BASE[2:])),
    "padding": noisy_padding(*build(BASE)),
    "units": build(rescaled(BASE, np.exp(OTHERS), 3.0 * OTHERS)),
    "target units": build(rescaled(BASE, 1.0 + 3.0 * IS_TARGET, -7.0 * IS_TARGET)),
    "other data": build(make_data(1)),
}


@pytest.fixture(scope="module")
def outputs(model):
    predict = eqx.filter_jit(lambda *problems: jax.vmap(model.predict)(*problems))
    batch = jax.device_get(predict(*stack(VARIANTS.values())))
    return {
        name: jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), batch)
        for i, name in enumerate(VARIANTS)
    }


def assert_same(a, b, order=slice(None, REAL)):
    """Equal in everything that anyone may look at, for the variables that exist (in `order`)."""
    usable = np.asarray(a.task.candidates)[order]
    for name in ("tokens", "statistics", "effect_mean", "effect_std"):
        left, right = np.asarray(getattr(a, name))[order], np.asarray(getattr(b, name))[:REAL]
        rows = usable if name != "tokens" else slice(None)
        np.testing.assert_allclose(left[rows], right[rows], atol=1e-4, rtol=1e-4, err_msg=name)
    for one, other in (
        (a.logits[:, order], b.logits[:, :REAL]),
        (a.log_weights, b.log_weights),
        (a.marginals()[order], b.marginals()[:REAL]),
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_log_prob_sums_to_one_over_all_sets_and_agrees_with_marginals(outputs):
    """And the mixture is not a product of marginals."""
    output = outputs["base"]
    probs = np.exp(jax.vmap(output.log_prob)(jnp.asarray(SETS)))
    np.testing.assert_allclose(probs.sum(), 1.0, atol=1e-5)
    np.testing.assert_allclose(probs @ SETS, output.marginals(), atol=1e-5)
    assert output.marginals()[TARGET] == 0 and not output.marginals()[REAL:].any()
    assert jnp.abs(output.logits[0] - output.logits[1])[:REAL].max() > 1e-3


def test_posterior_lists_every_set_of_five_candidates_or_those_of_the_likely_parents(outputs):
    output = outputs["base"]
    posterior, shorter = output.posterior(), output.posterior(num_free=2)
    np.testing.assert_allclose([posterior.probs.sum(), shorter.probs.sum()], 1.0, atol=1e-5)
    each, exact = (jax.vmap(of.log_prob)(jnp.asarray(SETS)) for of in (posterior, output))
    np.testing.assert_allclose(each, exact, atol=1e-4)
    np.testing.assert_allclose(posterior.marginals(), output.marginals(), atol=1e-5)
    assert not (posterior.sets & ~output.task.possible_parents[None])[posterior.probs > 0].any()
    likely = np.argsort(-np.asarray(output.marginals()))[:2]
    assert set(np.flatnonzero(shorter.sets.any(0))) == set(likely) and len(shorter.sets) == 4


def test_what_is_known_of_parents_conditions_the_posterior_exactly(outputs):
    """One is a parent and one is not: the sets that agree, in proportion to what they were."""
    output, sets = outputs["base"], jnp.asarray(SETS)
    first, second = np.flatnonzero(output.task.possible_parents)[:2]
    yes, no = jnp.arange(SLOTS) == int(first), jnp.arange(SLOTS) == int(second)
    known = output.given(yes, no)
    agree = sets[:, jnp.argmax(yes)] & ~sets[:, jnp.argmax(no)]
    before = np.where(agree, np.exp(jax.vmap(output.log_prob)(sets)), 0.0)
    after = np.exp(jax.vmap(known.log_prob)(sets))
    np.testing.assert_allclose(after, before / before.sum(), atol=1e-5)
    np.testing.assert_allclose(known.marginals()[np.array([first, second])], [1.0, 0.0], atol=1e-5)


def test_edges_that_are_known_are_certain_and_move_with_their_variables(model, outputs):
    """And where none is, the answer is that without knowledge."""
    known, order = np.zeros((SLOTS, SLOTS), int), np.r_[PERMUTATION, REAL:SLOTS]
    known[[0, 4, 1, 3], [TARGET, TARGET, 3, 5]] = 1, -1, 1, -1
    each = ("base", 0 * known), ("base", known), ("variables", known[order][:, order])
    problems = [
        (VARIANTS[name][0], replace(VARIANTS[name][1], known=jnp.asarray(k))) for name, k in each
    ]
    predict = eqx.filter_jit(lambda *problems: jax.vmap(model.predict)(*problems))
    found = jax.device_get(predict(*stack(problems)))
    none, told, moved = (
        jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), found) for i in range(3)
    )
    assert_same(outputs["base"], none)
    assert_same(told, moved, PERMUTATION)
    np.testing.assert_allclose(told.marginals()[np.array([0, 4])], [1.0, 0.0], atol=1e-6)
    assert 0.01 < told.marginals()[1] < 0.99
    assert jnp.abs(told.effect_mean - none.effect_mean)[1].max() > 1e-3


@pytest.mark.parametrize("variant", ["rows", "free rows", "padding", "units"])
def test_order_of_rows_free_rows_padding_and_units_of_other_variables_do_not_matter(
    outputs, variant
):
    assert_same(outputs["base"], outputs[variant])


def test_permuting_variables_permutes_everything_and_data_matter(outputs):
    assert_same(outputs["base"], outputs["variables"], PERMUTATION)
    assert jnp.abs(outputs["other data"].logits - outputs["base"].logits)[:, :REAL].max() > 1e-2


def test_rows_added_one_by_one_give_what_encoding_them_gives(model, outputs):
    """The last four interventional rows of `BASE` arrive after the others were summed."""
    buffer, task = VARIANTS["base"]
    fewer = build(BASE, valid=np.arange(ROWS) < VALID - 4)
    summary, add = eqx.filter_jit(Summary.of)(*fewer, CONFIG.num_bins), eqx.filter_jit(Summary.add)
    for row in range(VALID - 4, VALID):
        summary = add(summary, jax.tree.map(lambda leaf, i=row: leaf[i : i + 1], buffer), task)
    assert_same(outputs["base"], eqx.filter_jit(model.predict)(summary, task))


def test_twelve_slots_give_what_eight_give(model, outputs):
    wide, names = eqx.filter_jit(model.predict)(*build(BASE, 12)), tuple("abcdefghijkl")
    assert_same(outputs["base"], wide)
    few, many = (one.posterior().to_dict(names) for one in (outputs["base"], wide))
    assert all(abs(few[members] - many.get(members, 0.0)) < 1e-4 for members in few)


def test_units_of_the_target_scale_effects_and_nothing_else(outputs):
    base, scaled = outputs["base"], outputs["target units"]
    usable = base.task.candidates
    mean, std = 4.0 * base.effect_mean - 7.0, 4.0 * base.effect_std
    np.testing.assert_allclose(mean[usable], scaled.effect_mean[usable], atol=1e-3)
    np.testing.assert_allclose(std[usable], scaled.effect_std[usable], rtol=1e-3)
    np.testing.assert_allclose(base.marginals(), scaled.marginals(), atol=1e-4)
    np.testing.assert_allclose(4.0 * base.spread, scaled.spread, rtol=1e-4)


def test_blocks_differ_at_initialisation(model):
    one, other = (jax.tree.leaves(eqx.filter(block, eqx.is_array)) for block in model.blocks)
    assert all((a != b).any() for a, b in zip(one, other, strict=True))


def test_a_block_knows_neither_the_order_of_variables_nor_those_that_do_not_exist():
    """In float64, but for the softmax, which JAX's attention takes in float32."""
    with jax.enable_x64(True):
        pairs = np.random.default_rng(2).normal(size=(SLOTS, SLOTS, 8))
        block = surrogate.Block(8, 2, 4, key=jr.key(0))
        block = jax.tree.map(lambda leaf: leaf.astype(float) if eqx.is_array(leaf) else leaf, block)
        call = eqx.filter_jit(lambda pairs: block(pairs, jnp.arange(len(pairs)) < REAL))
        order, whole = np.ix_(PERMUTATION, PERMUTATION), np.asarray(call(jnp.asarray(pairs)))
        alone = np.asarray(call(jnp.asarray(pairs[:REAL, :REAL])))
        moved = np.asarray(call(jnp.asarray(pairs[:REAL, :REAL][order])))
    assert whole.dtype == np.float64 and np.abs(alone - pairs[:REAL, :REAL]).min() > 0
    np.testing.assert_allclose(whole[:REAL, :REAL], alone, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(moved, alone[order], rtol=1e-7, atol=1e-7)


def test_mixed_precision_changes_digits_only(outputs):
    # the same weights
    half = eqx.filter_jit(surrogate.ParentSetPredictionModel)(
        replace(CONFIG, mixed_precision=True), key=jr.key(0)
    )
    rounded = eqx.filter_jit(half.predict)(*VARIANTS["base"])
    difference = jnp.abs(rounded.logits - outputs["base"].logits)[:, :REAL].max()
    assert 0 < difference < 0.05 and rounded.logits.dtype == jnp.float32


def test_best_is_the_lowest_candidate(outputs):
    output = outputs["base"]
    mean = np.zeros((SLOTS, CONFIG.num_bins), np.float32)
    # target and padding do not count
    mean[4, 1], mean[TARGET, 0], mean[SLOTS - 1, 0] = -1.0, -5.0, -9.0
    variable, value = eqx.tree_at(lambda o: o.effect_mean, output, jnp.asarray(mean)).best()
    assert variable == 4
    np.testing.assert_allclose(value, output.grid[4, 1], atol=1e-6)


def test_losses_and_divergences_from_the_expert_of_known_cases(outputs):
    output, sets = outputs["base"], jnp.asarray(SETS[[5, 0]])
    usable, parents = np.asarray(output.task.candidates), sets[0]
    effects = jnp.where(usable[:, None], output.effect_mean + output.effect_std, jnp.inf)
    parent_nll, effect_nll = surrogate.surrogate_losses(output, parents, effects)
    expected = 0.5 + np.log(np.asarray(output.effect_std / output.spread)[usable]).mean()
    np.testing.assert_allclose(effect_nll, expected, atol=1e-4)
    np.testing.assert_allclose(parent_nll, -output.log_prob(parents), atol=1e-6)
    np.testing.assert_allclose(surrogate.expert_kl(output, output.posterior()), 0.0, atol=1e-4)
    sure = ParentSetPosterior(output.task.target, sets, jnp.array([0.0, -jnp.inf]))
    np.testing.assert_allclose(surrogate.expert_kl(output, sure), parent_nll, atol=1e-5)


def test_observed_task_spans_the_filled_rows():
    buffer = ExperienceBuffer(
        jnp.array([[1.0, -2.0], [3.0, 5.0], [99.0, 99.0]]),
        jnp.zeros((3, 2), bool),
        jnp.array([True, True, False]),
    )
    task = surrogate.observed_task(buffer, 1)
    assert task.low.tolist() == [1.0, -2.0] and task.high.tolist() == [3.0, 5.0]
    assert task.var_mask.all() and task.target == 1


def random_effects(seed, count):
    """One number for all values of a variable, infinite for those that cannot be set."""
    drawn = np.random.default_rng(seed).normal(size=(count, 1, CONFIG.num_bins))
    allowed = VARIANTS["base"][1].candidates[:, None]
    return jnp.asarray(np.where(allowed, drawn, np.inf), jnp.float32)


class Public(eqx.Module):
    """A system of which only the public part is known."""

    task: Task


def with_truth(problems, parents, effects) -> Problem:
    """A batch of hand-made data sets and tasks, with this truth."""
    buffers, tasks = stack(problems)
    truth = jax.vmap(lambda e, p: GroundTruth(e, jnp.zeros(()), p))(effects, parents)
    return Problem(Public(tasks), truth, buffers)


def test_one_batch_is_learnt_by_heart(model):
    """Updates are finite, also on constant columns and with infinite entries in the effect table,
    and lower both losses.
    """
    constant = np.where(np.arange(REAL) == 1, 3.0, BASE[0]), *BASE[1:]
    problems = [build(data) for data in (*map(make_data, range(5)), constant)]
    problems.append(build(BASE, valid=np.arange(ROWS) < 2))
    parents = jnp.asarray(SETS[np.random.default_rng(1).integers(0, 32, 7)])
    batch = with_truth(problems, parents, random_effects(1, 7))
    narrow = jax.tree.map(lambda leaf: leaf[:2], batch)  # a second bucket, of the same width here
    optimiser = optax.adam(3e-3)
    step = eqx.filter_jit(
        lambda learner: surrogate.surrogate_step(
            learner, optimiser, (batch, narrow), None, surrogate.LossWeights()
        )
    )
    learner, first = step(Learner.of(model, optimiser))
    for _ in range(59):
        learner, last = step(learner)
    weights = eqx.filter(learner.module, eqx.is_array)  # what is not finite once would stay so
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    assert last.parent_nll < 0.5 * first.parent_nll
    assert last.effect_nll < first.effect_nll - 0.5


def test_mean_losses_are_over_examples_not_over_buckets(model):
    """A bucket of three and one of a single example weigh three to one; the expert's states have a
    mean of their own.
    """
    problems = [build(make_data(seed)) for seed in range(4)]
    whole = with_truth(problems, jnp.asarray(SETS[[3, 8, 1, 30]]), random_effects(2, 4))
    problems = stack(problems)
    parts = [jax.tree.map(lambda leaf, r=r: leaf[r], whole) for r in (slice(0, 3), slice(3, 4))]
    expert = eqx.filter_jit(jax.vmap(lambda b, t: model.predict(b, t).posterior()))(*problems)
    demos = surrogate.SurrogateTrainingExample(*problems, expert)
    losses = eqx.filter_jit(surrogate.mean_losses)
    together, apart = losses(model, [whole], None), losses(model, parts, demos)
    np.testing.assert_allclose(together.parent_nll, apart.parent_nll, rtol=1e-4)
    np.testing.assert_allclose(together.effect_nll, apart.effect_nll, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(apart.expert_kl, 0.0, atol=1e-4)
    assert float(together.expert_kl) == 0.0


# --- the weights that ship ---


@pytest.fixture(scope="module")
def answers():
    """`(buffers, tasks) -> outputs, entropies` of the weights that ship, batched."""
    system = TrainedACBOSystem.load(Path(__file__).parents[1] / "pretrained" / "acbo.eqx")

    def one(buffer, task):
        output = system.surrogate.predict(buffer, task)
        return output, output.posterior().entropy()

    return eqx.filter_jit(jax.vmap(one))


def test_more_rows_of_the_same_system_lower_the_entropy(answers):
    """Of 32 problems of eight variables: up to 200 observational rows and two interventions per
    variable, the same every time.
    """

    def one(key):
        scm, _, buffer = draw_problem(key, SCMPrior(min_size=8), DataDesign(200, 200), 2)
        return buffer, scm.task

    buffers, tasks = jax.jit(lambda keys: jax.lax.map(one, keys))(jr.split(jr.key(5), 32))
    row = jnp.arange(216)
    cut = jax.vmap(ExperienceBuffer.only, (0, None))
    entropy = [
        np.asarray(answers(cut(buffers, (row < count) | (row >= 200)), tasks)[1])
        for count in (20, 60, 200)
    ]
    for fall in -np.diff(entropy, axis=0):
        assert fall.mean() > 2 * fall.std(ddof=1) / np.sqrt(len(fall))


@pytest.mark.parametrize("num_vars", [2, 50])
def test_shipped_weights_take_any_size_and_awkward_values(answers, num_vars):
    """Few rows or none, constant columns, values of 1e6, nothing but interventions; all with
    padding.
    """
    values = np.random.default_rng(num_vars).normal(size=(64, num_vars)).astype(np.float32)
    constant = np.where(np.arange(num_vars) < 2, np.float32(3.0), values)  # so is the target
    ends = np.full((2, num_vars), [[-2.0], [2.0]], np.float32)
    observed = np.zeros_like(values, bool)
    alien = observed | (np.arange(num_vars) == 1)
    problems = [
        (
            ExperienceBuffer(*map(jnp.asarray, (rows, intervened, np.arange(64) < count))).widen(2),
            Task(jnp.array(0), *jnp.asarray(unit * ends), jnp.ones(num_vars, bool)).widen(2),
        )
        for rows, intervened, unit, count in (
            (values, observed, 1.0, 64),
            (values, observed, 1.0, 2),
            (values, observed, 1.0, 1),
            (values, observed, 1.0, 0),
            (constant, observed, 1.0, 64),
            (values * 1e6, observed, 1e6, 64),
            (values + np.float32(1e6), observed, 1.0, 64),
            (values, alien, 1.0, 64),
            (constant, alien, 1.0, 64),
        )
    ]
    outputs, entropy = answers(*stack(problems))
    numbers = eqx.filter(outputs, eqx.is_inexact_array)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((numbers, entropy)))
    assert (outputs.effect_std > 0).all()
    np.testing.assert_allclose(np.exp(outputs.log_weights).sum(-1), 1.0, atol=1e-5)
    marginals = jax.vmap(surrogate.SurrogateOutput.marginals)(outputs)
    assert ((marginals >= 0) & (marginals <= 1)).all()
