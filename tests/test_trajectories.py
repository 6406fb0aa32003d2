"""Demonstrations: stored and loaded, checked against edits, split and augmented without leaks, and
cut into examples that hold no later rows.

Recorded runs of the original are those of `recorded.py`.
"""

import importlib
import types
from unittest.mock import Mock

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from recorded import each_case, linear_system, read_case

from lib.artifacts import ArtifactError, load, save
from lib.expert import Demonstration, ExpertRun, check_expert_input, run_parent_scale
from lib.expert_posterior import ParentScaleConfig
from lib.imitation import extract_acquisition_training_data
from lib.problems import DataDesign, draw_problem
from lib.scm import Intervention, value_grid
from lib.scm_prior import SCMPrior
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig
from lib.synthetic import MECHANISMS, NOISES
from lib.training import joined
from lib.trajectories import (
    augment_expert_demonstrations,
    check_trajectory,
    expert_demonstration,
    extract_expert_demonstrations,
    extract_expert_trajectory,
    extract_multiple_trajectories,
    improvements,
    load_trajectories,
    take,
    transform,
    validate_demonstration_quality,
    validate_trajectory_consistency,
)


BATCH, NUM_VARS, NUM_OBS, STEPS, BINS = 5, 5, 30, 3, 5
PRIOR = SCMPrior(max_vars=NUM_VARS, min_size=3, max_size=4)  # always a place without a variable
CONFIG = ParentScaleConfig(
    num_obs=NUM_OBS, num_steps=STEPS, num_bins=BINS, num_features=10, num_bootstraps=4
)
CAPACITY, DESIGN = NUM_OBS + NUM_VARS + STEPS, DataDesign(NUM_OBS, NUM_OBS, 1, num_steps=STEPS)


@pytest.fixture(scope="module")
def trajectories():
    """Runs of the expert on random models (leading axis)."""

    def make(key):
        problem_key, expert_key = jr.split(key)
        scms, _, buffers = jax.vmap(lambda k: draw_problem(k, PRIOR, DESIGN, BINS))(
            jr.split(problem_key, BATCH)
        )
        return extract_multiple_trajectories(jr.split(expert_key, BATCH), scms, buffers, CONFIG)

    return jax.jit(make)(jr.key(0))


@jax.jit
def both_checks(trajectories):
    """Every check of a batch, and the summary that the scripts use."""
    checks = jax.vmap(lambda one: check_trajectory(one, CONFIG))(trajectories)
    return checks, validate_trajectory_consistency(trajectories, CONFIG)


def validate(trajectories):
    checks, consistent = both_checks(trajectories)
    assert (consistent == np.all(list(checks.values()), axis=0)).all()
    return checks


def edit(tree, where, change):
    return eqx.tree_at(where, tree, change(where(tree)))


def put(at, value):
    return lambda array: array.at[at].set(value)


# --- what a run says ---


def test_rewards_are_improvements_on_the_best_outcome_so_far(trajectories):
    for i in range(BATCH):
        one = take(trajectories, np.array(i))
        first, target = int(one.num_initial), int(one.scm.target)
        values, intervened = np.asarray(one.buffer.values), np.asarray(one.buffer.intervened)
        seen = [values[r, target] for r in range(first) if intervened[r].any()]
        for t in range(STEPS):
            np.testing.assert_allclose(
                one.reward[t], max(min(seen) - float(one.outcome[t]), 0.0), atol=1e-6
            )
            seen.append(float(one.outcome[t]))
    assert (trajectories.reward > 0).any() and (trajectories.reward == 0).any()
    # without an earlier intervention there is nothing to improve on
    alone = improvements(one.buffer, jnp.array(0), one.scm.target, one.outcome)
    assert alone[0] == 0 and np.allclose(alone.sum(), one.outcome[0] - one.outcome.min(), atol=1e-6)


def test_the_state_before_a_step_holds_the_rows_before_it(trajectories):
    one = take(trajectories, np.array(0))
    first = int(one.num_initial)
    for t in range(STEPS):
        step, known = one.step(t), first + t
        assert step.buffer.size == known
        for now, final in zip(*map(jax.tree.leaves, (step.buffer, one.buffer)), strict=True):
            assert (now[:known] == final[:known]).all() and not now[known:].any()
        assert (step.posterior.log_probs == one.log_probs[t]).all()
        assert step.posterior.target == one.scm.target and step.step_number == t
        assert step.value == one.value[t] and step.reward == one.reward[t]
        row = one.buffer.values[known]
        assert row[step.variable] == step.value and row[one.scm.target] == step.outcome


def test_a_demonstration_is_the_run(trajectories):
    one = edit(take(trajectories, np.array(0)), lambda t: t.failures, lambda _: jnp.array(7))
    shared = {name: getattr(one, name) for name in Demonstration.__dataclass_fields__}
    nothing = jnp.zeros(STEPS + 1, int)
    run = ExpertRun(**shared, recommended_variable=nothing, recommended_value=nothing.astype(float))
    again = extract_expert_trajectory(run, one.scm, jr.wrap_key_data(one.key_data))
    assert eqx.tree_equal(again, one)


def test_a_demonstration_gets_room_and_steps(monkeypatch, trajectories):
    """`expert_demonstration` asks the expert for exactly these experiments, in a buffer with as
    much more room.
    """
    expert = Mock(side_effect=lambda key, scm, buffer, config: types.SimpleNamespace(buffer=buffer))
    monkeypatch.setattr("lib.trajectories.run_parent_scale", expert)
    one = take(trajectories, np.array(0))
    buffer = expert_demonstration(one.scm, one.buffer, 7, config=CONFIG, key=jr.key(0))
    *_, config = expert.call_args.args
    assert config.num_steps == 7 and config.num_obs == NUM_OBS
    assert buffer.valid.shape[0] == CAPACITY + 7 and buffer.size == one.buffer.size


# --- what the expert can start from ---


@pytest.fixture
def start(trajectories):
    """A model, and the buffer that the expert was given."""
    one = take(trajectories, np.array(0))
    return one.scm, one.buffer_before(0)


def test_what_the_expert_was_given_is_accepted(start):
    scm, buffer = start
    other = int(np.flatnonzero(scm.task.possible_parents)[0])
    constant = buffer.values.at[:NUM_OBS, other].set(2.0)
    free = jnp.where(buffer.valid[:, None], buffer.values, jnp.nan)
    for values in (buffer.values, constant, free):
        check_expert_input(scm, eqx.tree_at(lambda b: b.values, buffer, values), CONFIG)


UNUSABLE = {  # what the message says: where a model and a buffer are changed, and how
    "row 4 of the buffer is free or interventional.*num_obs = 30": (
        lambda s, b: b.intervened,
        put((4, 0), True),
    ),
    "row 29 of the buffer is free": (lambda s, b: b.valid, put(slice(29, None), False)),
    "row 3 of the buffer, X1: nan is not a finite number": (
        lambda s, b: b.values,
        put((3, 1), jnp.nan),
    ),
    "the target X[0-4] is constant over the 30 observational rows": (
        lambda s, b: b.values,
        put(slice(NUM_OBS), 1.0),
    ),
    "X2 may be set from 9.0 to .*: give finite numbers": (lambda s, b: s.low, put(2, 9.0)),
    "X2 may be set from nan": (lambda s, b: s.low, put(2, jnp.nan)),
    "no variable but the target": (lambda s, b: (s.low, s.high), lambda ends: (ends[0],) * 2),
    "use grow()": (lambda s, b: b.valid, jnp.ones_like),
    "noise_scale of X.* is not finite": (lambda s, b: s.noise_scale, lambda a: a * jnp.nan),
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_what_the_expert_cannot_start_from_is_refused(start, message):
    where, change = UNUSABLE[message]
    given = *edit(start, lambda pair: where(*pair), change), CONFIG
    for refuses in (check_expert_input, lambda *given: run_parent_scale(jr.key(0), *given)):
        with pytest.raises(ValueError, match=message):
            refuses(*given)


def test_a_demonstration_from_unusable_data_is_refused_and_a_traced_one_cannot_be(start):
    (scm, buffer), key = start, jr.key(0)
    flat = edit(buffer, lambda b: b.values, jnp.zeros_like)

    def demonstrate(buffer):
        return expert_demonstration(scm, buffer, 2, config=CONFIG, key=key)

    with pytest.raises(ValueError, match="constant"):
        demonstrate(flat)
    eqx.filter_eval_shape(demonstrate, flat)
    with pytest.raises(ValueError, match="constant"):  # a constant of the program
        eqx.filter_eval_shape(lambda: run_parent_scale(key, scm, flat, CONFIG))


# --- runs of the original code ---


@each_case("*_linear_*")
def test_a_recorded_run_is_of_our_model(name):
    """Its rows are draws of the linear system that the tests make of it."""
    observed = read_case(name)["obs"]
    scm = linear_system(read_case(name))
    drawn = np.asarray(scm.sample(jr.key(0), Intervention.none(observed.shape[1]), 4000))
    error = 5 * observed.std(0) / np.sqrt(len(observed))
    assert (np.abs(observed.mean(0) - drawn.mean(0)) < error).all()
    np.testing.assert_allclose(drawn.std(0), observed.std(0), rtol=0.25)


# --- validation ---


def test_runs_of_the_expert_are_consistent(trajectories):
    for name, holds in validate(trajectories).items():
        assert holds.all(), name


FAR = 25.0
EDITS = {  # field: the check that finds it, the change
    "outcome": ("recorded", lambda t, a: a.at[:, 1].add(0.5)),
    "value": ("recorded", lambda t, a: a.at[:, 0].multiply(0.5).at[:, 0].add(0.1)),
    "variable": ("in_range", lambda t, a: jnp.broadcast_to(t.scm.target[:, None], a.shape)),
    "value ": ("in_range", lambda t, a: a.at[:, 2].set(FAR)),
    "log_probs": ("replayed", lambda t, a: jnp.log(0.8 * jnp.exp(a) + 0.2 / a.shape[-1])),
    "log_probs ": ("normalised", lambda t, a: a.at[:, -1].add(0.01)),
    "surface": ("finite", lambda t, a: a.at[:, 0, 0, 0].set(jnp.nan)),
    "key_data": ("replayed", lambda t, a: a + 1),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_runs_are_refused(trajectories, name):
    (check, change), field = EDITS[name], name.strip()
    checks = validate(
        edit(trajectories, lambda t: getattr(t, field), lambda a: change(trajectories, a))
    )
    # one certain set is certain with any features
    assert not checks[check].all() if field == "key_data" else not checks[check].any()
    assert (checks["normalised"] == (check != "normalised")).all()


def test_an_outcome_edited_in_both_places_no_longer_explains_the_posterior(trajectories):
    """Recorded as it stands in the data, but the stored belief does not follow from it."""
    rows = np.asarray(trajectories.num_initial)[:, None] + np.arange(STEPS)[None]
    everyone, targets = np.arange(BATCH)[:, None], np.asarray(trajectories.scm.target)[:, None]
    moved = edit(trajectories, lambda t: t.outcome, lambda a: a + 8.0)
    moved = edit(moved, lambda t: t.buffer.values, lambda a: a.at[everyone, rows, targets].add(8.0))
    checks = validate(moved)
    assert checks["recorded"].all() and checks["finite"].all() and not checks["replayed"].all()


def test_quality_is_length_and_final_entropy(trajectories):
    # the last belief: this many equally probable sets
    uniform, places = np.array([1, 3, 7, 8, 15]), 16
    last = np.where(np.arange(places) < uniform[:, None], -np.log(uniform)[:, None], -np.inf)
    first = np.broadcast_to(np.where(np.arange(places) == 0, 0.0, -np.inf), last.shape)
    log_probs = jnp.asarray(np.stack([first, first, first, last], 1), jnp.float32)
    beliefs = edit(
        trajectories,
        lambda t: (t.sets, t.log_probs),
        lambda _: (jnp.zeros((BATCH, places, NUM_VARS), bool), log_probs),
    )
    for most, entropy in (((), 2.0), ((0.5,), 0.5)):
        good = validate_demonstration_quality(beliefs, STEPS, *most)
        assert (good == (np.log(uniform) <= entropy)).all() and 0 < good.sum() < BATCH
    assert not validate_demonstration_quality(beliefs, STEPS + 1).any()


# --- splitting and augmentation ---


def keys_of(trajectories):
    """What tells one model's run from another's, and what its copies keep."""
    return {tuple(key) for key in np.asarray(trajectories.key_data).tolist()}


def test_no_model_is_on_both_sides(trajectories):
    train, validation = extract_expert_demonstrations(trajectories, 0.4)
    augmented = augment_expert_demonstrations(train, 3, key=jr.key(2))
    assert [len(t.variable) for t in (train, validation, augmented)] == [3, 2, 9]
    assert len(keys_of(trajectories)) == BATCH and keys_of(augmented) == keys_of(train)
    assert not keys_of(augmented) & keys_of(validation)
    assert keys_of(train) | keys_of(validation) == keys_of(trajectories)
    # the same in a copy, and every model has its own
    scales = np.asarray(augmented.scm.noise_scale), np.asarray(validation.scm.noise_scale)
    assert not (scales[0][:, None] == scales[1][None]).any()


@pytest.mark.parametrize("split", [0.0, 0.05, 0.95, 1.0])
def test_a_split_with_an_empty_side_is_refused(trajectories, split):
    with pytest.raises(ValueError, match="5 demonstrations cannot be split"):
        extract_expert_demonstrations(trajectories, split)


def renaming(original, copy):
    """`old[j]` is the original's name of the copy's variable j, `sign[j]` its sign, both read off
    the data.
    """
    before, after = (np.asarray(t.buffer.values)[: int(t.buffer.size)] for t in (original, copy))
    old, sign = np.arange(NUM_VARS), np.ones(NUM_VARS)
    for j in np.flatnonzero(np.asarray(copy.scm.var_mask)):
        same = (after[:, j, None, None] == before[:, :, None] * np.array([1.0, -1.0])).all(0)
        ((old[j], flipped),) = np.argwhere(same)
        sign[j] = 1.0 - 2.0 * flipped
    assert sorted(old) == list(range(NUM_VARS))
    return old, sign


@pytest.fixture(scope="module")
def pairs(trajectories):
    """Every run, a renamed and flipped copy of it, and how it is renamed."""
    augmented = augment_expert_demonstrations(trajectories, 2, key=jr.key(1))
    # the originals come first, as they are
    assert eqx.tree_equal(take(augmented, np.arange(BATCH)), trajectories)
    both = [[take(augmented, np.array(i + part)) for part in (0, BATCH)] for i in range(BATCH)]
    return [(*pair, *renaming(*pair)) for pair in both]


def test_copies_are_renamed_and_flipped(pairs):
    assert any((old != np.arange(NUM_VARS)).any() for _, _, old, _ in pairs)
    assert any((sign < 0).any() for *_, sign in pairs)
    for original, copy, old, sign in pairs:
        target, exists = int(copy.scm.target), np.asarray(copy.scm.var_mask)
        assert old[target] == original.scm.target and sign[target] == 1
        # places without a variable stay at the end
        assert (exists == original.scm.var_mask).all()
        assert not copy.buffer.values[:, ~exists].any()
        assert (copy.outcome == original.outcome).all() and (copy.reward == original.reward).all()
        assert (copy.buffer.intervened == original.buffer.intervened[:, old]).all()


def test_the_belief_of_a_copy_is_about_the_same_sets(pairs):
    for original, copy, old, _ in pairs:
        assert (copy.sets == original.sets[:, old]).all()
        assert (copy.log_probs == original.log_probs).all()
        assert (copy.scm.parents == original.scm.parents[old]).all()
        for t in (0, STEPS):
            one, two = original.posterior(t), copy.posterior(t)
            np.testing.assert_allclose(two.marginals(), one.marginals()[old], atol=1e-6)
            np.testing.assert_allclose(
                two.log_prob(copy.scm.parents), one.log_prob(original.scm.parents), atol=1e-5
            )


def test_choices_and_surfaces_of_a_copy_are_the_originals(pairs):
    for original, copy, old, sign in pairs:
        ends = np.stack([original.scm.low, original.scm.high])[:, old] * sign
        np.testing.assert_array_equal(np.stack([copy.scm.low, copy.scm.high]), np.sort(ends, 0))
        assert (old[np.asarray(copy.variable)] == original.variable).all()
        assert (copy.value == sign[np.asarray(copy.variable)] * original.value).all()
        before, after = (
            np.asarray(value_grid(t.scm.low, t.scm.high, BINS)) for t in (original, copy)
        )
        for j in range(NUM_VARS):
            # the copy's values in the order of the original's
            here = np.argsort(sign[j] * after[j], kind="stable")
            np.testing.assert_allclose(sign[j] * after[j][here], before[old[j]], atol=1e-5)
            assert (copy.surface[:, j, here] == original.surface[:, old[j]]).all()


def test_the_model_of_a_copy_is_the_same_system(trajectories):
    """The same noise gives the same rows, renamed and flipped, observed and under do; so E[Y | do]
    agrees. For every mechanism and kind of noise.
    """
    noise, kinds = jr.normal(jr.key(3), (16, NUM_VARS)), np.arange(len(MECHANISMS) * len(NOISES))

    @jax.jit
    @jax.vmap
    def simulate(one):
        do = Intervention.single(one.variable[0], one.value[0], NUM_VARS)
        rows = [one.scm.simulate(noise, d) for d in (Intervention.none(NUM_VARS), do)]
        return jnp.stack(rows), one.scm.mean_outcome(do)

    originals = edit(
        take(trajectories, kinds % BATCH),
        lambda t: (t.scm.mechanism, t.scm.noise_kind),
        lambda _: tuple(
            jnp.asarray(np.repeat(kind[:, None], NUM_VARS, 1))
            for kind in divmod(kinds, len(NOISES))
        ),
    )
    copies = jax.jit(jax.vmap(transform))(jr.split(jr.key(1), len(kinds)), originals)
    before, after = (jax.device_get(simulate(t)) for t in (originals, copies))
    flipped = 0
    for i in kinds:
        old, sign = renaming(take(originals, np.array(i)), take(copies, np.array(i)))
        flipped += (sign < 0).any()
        expected = sign * before[0][i][..., old]
        np.testing.assert_allclose(after[0][i], expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(after[1], before[1], atol=1e-4)
    assert flipped > len(kinds) // 2
    assert np.abs(before[0][:, 1] - before[0][:, 0]).max() > 0.1


# --- files ---


def test_what_is_stored_is_what_is_loaded(tmp_path, trajectories):
    path = tmp_path / "demos.npz"
    save(path, {"train": trajectories}, stage="demos", config={}, seed=0)
    with np.load(path, allow_pickle=False) as file:
        assert all(name.startswith("train/") for name in set(file) - {"header"})
        assert (file["train/scm/weights"] == trajectories.scm.weights).all()
    loaded, header = load_trajectories(path, "train")
    assert eqx.tree_equal(loaded, trajectories) and header["stage"] == "demos"
    with pytest.raises(ArtifactError, match="it holds no.*validation/"):
        load_trajectories(path, "validation")
    del (arrays := load(path, "demos")[0])["train/scm/low"]  # of another version of the code
    save(path, arrays, stage="demos", config={}, seed=0)
    with pytest.raises(ArtifactError, match="it holds no.*train/scm/low.*01_extract"):
        load_trajectories(path, "train")


def test_join_undoes_take(trajectories):
    parts = [take(trajectories, np.array(rows)) for rows in ([0, 1], [2, 3, 4])]
    assert eqx.tree_equal(joined(parts), trajectories)


# --- what students learn from ---


def test_surrogate_examples_pair_data_with_the_belief_they_led_to(trajectories):
    capacity, count = CAPACITY + 4, BATCH * (STEPS + 1)
    extract = importlib.import_module("02_train_surrogate").extract_surrogate_training_data
    examples = jax.jit(extract, static_argnums=1)(trajectories, capacity)
    assert examples.buffer.values.shape == (count, capacity, NUM_VARS)
    assert len(examples.posterior.log_probs) == count
    tight = eqx.filter_eval_shape(extract, trajectories, 1)
    # demonstrations longer than the students' data are not cut
    assert tight.buffer.values.shape == (count, CAPACITY, NUM_VARS)
    for number, (i, t) in enumerate(np.ndindex(BATCH, STEPS + 1)):
        buffer, task, posterior = jax.tree.map(lambda leaf, n=number: leaf[n], examples)
        one = take(trajectories, np.array(i))
        assert eqx.tree_equal(buffer, one.buffer_before(t).grow(4))
        assert eqx.tree_equal(posterior, one.posterior(t)) and eqx.tree_equal(task, one.scm.task)


def test_acquisition_states_do_not_know_what_came_of_the_choice(trajectories):
    """State t is the same whatever rows t and later hold, and not the same without row t - 1."""
    sizes = SurrogateConfig(
        model_hidden_dim=8,
        model_n_layers=1,
        num_heads=2,
        head_dim=4,
        num_components=2,
        num_bins=BINS,
    )
    model = ParentSetPredictionModel(sizes, key=jr.key(4))
    run = jax.jit(lambda t: extract_acquisition_training_data(t, model))
    examples = run(trajectories)
    assert examples.variable.shape == (BATCH * STEPS,)
    assert examples.surface.shape == (BATCH * STEPS, NUM_VARS, BINS)
    for name in ("variable", "value", "surface"):
        given, made = getattr(examples, name), getattr(trajectories, name)
        assert (given == made.reshape(given.shape)).all()
    assert (examples.state.step == np.tile(np.arange(STEPS), BATCH)).all()
    assert (examples.state.step + examples.state.steps_left == STEPS).all()
    first, seen = np.asarray(trajectories.num_initial), examples.state.buffer.valid.sum(1)
    assert (seen.reshape(BATCH, STEPS) == first[:, None] + np.arange(STEPS)).all()
    # what the second experiment gave
    everyone, row = np.arange(BATCH), first + 1
    changed = run(
        edit(trajectories, lambda t: t.buffer.values, lambda a: a.at[everyone, row].add(3.0))
    )

    def by_step(leaf):
        return np.asarray(leaf).reshape(BATCH, STEPS, -1)

    for leaves in zip(*(jax.tree.leaves(e.state) for e in (examples, changed)), strict=True):
        before, after = map(by_step, leaves)
        np.testing.assert_array_equal(before[:, :2], after[:, :2])
    before, after = (by_step(e.state.output.effect_mean) for e in (examples, changed))
    assert (before[:, 2] != after[:, 2]).any(1).all()
