"""Demonstrations: stored and loaded, checked against edits, split and augmented without leaks, and cut into examples that hold no later rows."""

import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lib.trajectories
from lib.artifacts import ArtifactError, save_arrays
from lib.parent_scale import ParentScaleConfig
from lib.scm import MECHANISMS, NOISES, Intervention, value_grid
from lib.scm_prior import SCMPrior, sample_problem
from lib.surrogate import ParentSetPredictionModel, SurrogateConfig
from lib.trajectories import (
    augment_expert_demonstrations,
    check_trajectory,
    expert_demonstration,
    extract_acquisition_training_data,
    extract_expert_demonstrations,
    extract_multiple_trajectories,
    extract_surrogate_training_data,
    join,
    load_trajectories,
    take,
    to_arrays,
    transform,
    validate_demonstration_quality,
    validate_trajectory_consistency,
)


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BATCH, NUM_VARS, NUM_OBS, STEPS, BINS = 5, 5, 30, 3, 5
PRIOR = SCMPrior(max_vars=NUM_VARS, min_size=3, max_size=4)  # always a place without a variable
CONFIG = ParentScaleConfig(num_obs=NUM_OBS, num_steps=STEPS, num_bins=BINS, num_features=10, num_bootstraps=4)
CAPACITY = NUM_OBS + NUM_VARS + STEPS


@pytest.fixture(scope="module")
def trajectories():
    """Runs of the expert on random models (leading axis)."""

    def make(key):
        problem_key, expert_key = jr.split(key)
        scms, buffers = jax.vmap(lambda k: sample_problem(k, PRIOR, NUM_OBS, 1, CAPACITY))(jr.split(problem_key, BATCH))
        return extract_multiple_trajectories(jr.split(expert_key, BATCH), scms, buffers, CONFIG)

    return jax.jit(make, compiler_options=FAST)(jr.key(0))


@pytest.fixture(scope="module")
def validate():
    """Every check of a batch, after comparing them with the summary that the scripts use."""

    def both(trajectories):
        return jax.vmap(lambda one: check_trajectory(one, CONFIG))(trajectories), validate_trajectory_consistency(trajectories, CONFIG)

    run = jax.jit(both, compiler_options=FAST)

    def checked(trajectories):
        checks, consistent = run(trajectories)
        assert (consistent == np.all(checks, axis=0)).all()
        return checks

    return checked


@pytest.fixture(scope="module")
def copies(trajectories):
    """One renamed and flipped copy of every run."""
    augment = jax.jit(lambda t, key: augment_expert_demonstrations(t, 2, key=key), compiler_options=FAST)
    both = augment(trajectories, jr.key(1))
    assert eqx.tree_equal(take(both, np.arange(BATCH)), trajectories)  # the originals come first, as they are
    return take(both, np.arange(BATCH, 2 * BATCH))


def edit(trajectories, where, change):
    return eqx.tree_at(where, trajectories, change(where(trajectories)))


# --- what a run says ---


def test_rewards_are_improvements_on_the_best_outcome_so_far(trajectories):
    for i in range(BATCH):
        one = take(trajectories, np.array(i))
        first, target = int(one.num_initial), int(one.scm.target)
        values, intervened = np.asarray(one.buffer.values), np.asarray(one.buffer.intervened)
        seen = [values[r, target] for r in range(first) if intervened[r].any()]
        for t in range(STEPS):
            np.testing.assert_allclose(one.reward[t], max(min(seen) - float(one.outcome[t]), 0.0), atol=1e-6)
            seen.append(float(one.outcome[t]))
    assert (trajectories.reward > 0).any() and (trajectories.reward == 0).any()


def test_the_state_before_a_step_holds_the_rows_before_it(trajectories):
    one = take(trajectories, np.array(0))
    first = int(one.num_initial)
    for t in range(STEPS):
        step = one.step(t)
        known = first + t
        assert step.buffer.valid[:known].all() and not step.buffer.valid[known:].any()
        assert (step.buffer.values[:known] == one.buffer.values[:known]).all() and not step.buffer.values[known:].any()
        assert (step.buffer.intervened[:known] == one.buffer.intervened[:known]).all() and not step.buffer.intervened[known:].any()
        assert (step.posterior.log_probs == one.log_probs[t]).all() and step.posterior.target == one.scm.target
        assert step.step_number == t and step.value == one.value[t] and step.reward == one.reward[t]
        assert one.buffer.values[known, step.variable] == step.value and one.buffer.values[known, one.scm.target] == step.outcome


def test_a_demonstration_gets_room_and_steps(monkeypatch, trajectories):
    """`expert_demonstration` asks the expert for exactly these experiments, in a buffer with as much more room."""
    asked = {}

    def expert(key, scm, buffer, config):
        asked.update(buffer=buffer, config=config)
        return types.SimpleNamespace(buffer=buffer)

    monkeypatch.setattr(lib.trajectories, "run_parent_scale", expert)
    one = take(trajectories, np.array(0))
    buffer = expert_demonstration(one.scm, one.buffer, 7, CONFIG, key=jr.key(0))
    assert asked["config"].num_steps == 7 and asked["config"].num_obs == NUM_OBS
    assert buffer.valid.shape[0] == CAPACITY + 7 and buffer.size == one.buffer.size


# --- validation ---


def test_runs_of_the_expert_are_consistent(trajectories, validate):
    for name, holds in validate(trajectories)._asdict().items():
        assert holds.all(), name


FAR = 25.0
EDITS = {
    "outcome": ("recorded", lambda t: edit(t, lambda t: t.outcome, lambda a: a.at[:, 1].add(0.5))),
    "value": ("recorded", lambda t: edit(t, lambda t: t.value, lambda a: a.at[:, 0].multiply(0.5).at[:, 0].add(0.1))),
    "variable": ("in_range", lambda t: edit(t, lambda t: t.variable, lambda a: jnp.broadcast_to(t.scm.target[:, None], a.shape))),
    "value out of range": ("in_range", lambda t: edit(t, lambda t: t.value, lambda a: a.at[:, 2].set(FAR))),
    "posterior": ("replayed", lambda t: edit(t, lambda t: t.log_probs, lambda a: jnp.log(0.8 * jnp.exp(a) + 0.2 / a.shape[-1]))),
    "not normalised": ("normalised", lambda t: edit(t, lambda t: t.log_probs, lambda a: a.at[:, -1].add(0.01))),
    "surface": ("finite", lambda t: edit(t, lambda t: t.surface, lambda a: a.at[:, 0, 0, 0].set(jnp.nan))),
    "key": ("replayed", lambda t: edit(t, lambda t: t.key_data, lambda a: a + 1)),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_runs_are_refused(trajectories, validate, name):
    check, change = EDITS[name]
    checks = validate(change(trajectories))
    refused = ~np.asarray(getattr(checks, check))
    assert refused.any() if name == "key" else refused.all()  # one certain set is certain with any features
    assert (np.asarray(checks.normalised) == (check != "normalised")).all()


def test_an_outcome_edited_in_both_places_no_longer_explains_the_posterior(trajectories, validate):
    """Recorded as it stands in the data, but the stored belief does not follow from it."""
    rows = np.asarray(trajectories.num_initial)[:, None] + np.arange(STEPS)[None]
    everyone, targets = np.arange(BATCH)[:, None], np.asarray(trajectories.scm.target)[:, None]
    moved = edit(trajectories, lambda t: t.outcome, lambda a: a + 8.0)
    moved = edit(moved, lambda t: t.buffer.values, lambda a: a.at[everyone, rows, targets].add(8.0))
    checks = validate(moved)
    assert checks.recorded.all() and checks.finite.all()
    assert not checks.replayed.all()


def test_quality_is_length_and_final_entropy(trajectories):
    entropies = np.array([0.0, 1.0, 1.9, 2.1, 2.7])
    places = 16
    uniform = np.maximum(np.round(np.exp(entropies)), 1).astype(int)  # the last belief: this many equally probable sets
    last = np.where(np.arange(places)[None] < uniform[:, None], -np.log(uniform)[:, None], -np.inf)
    first = np.broadcast_to(np.where(np.arange(places) == 0, 0.0, -np.inf), last.shape)
    log_probs = jnp.asarray(np.stack([first, first, first, last], 1), jnp.float32)
    beliefs = eqx.tree_at(lambda t: (t.sets, t.log_probs), trajectories, (jnp.zeros((BATCH, places, NUM_VARS), bool), log_probs))
    expected = np.log(uniform) <= 2.0
    assert 0 < expected.sum() < BATCH
    assert (np.asarray(validate_demonstration_quality(beliefs, STEPS)) == expected).all()
    assert (np.asarray(validate_demonstration_quality(beliefs, STEPS, 0.5)) == (np.log(uniform) <= 0.5)).all()
    assert not validate_demonstration_quality(beliefs, STEPS + 1).any()


# --- splitting and augmentation ---


def keys_of(trajectories):
    """What tells one model's run from another's, and what its copies keep."""
    return {tuple(key) for key in np.asarray(trajectories.key_data).tolist()}


def test_no_model_is_on_both_sides(trajectories):
    train, validation = extract_expert_demonstrations(trajectories, 0.4)
    assert (train.variable.shape[0], validation.variable.shape[0]) == (3, 2)
    augmented = jax.jit(lambda t, key: augment_expert_demonstrations(t, 3, key=key), compiler_options=FAST)(train, jr.key(2))
    assert augmented.variable.shape[0] == 9
    assert len(keys_of(trajectories)) == BATCH and keys_of(augmented) == keys_of(train)
    assert not keys_of(augmented) & keys_of(validation) and keys_of(train) | keys_of(validation) == keys_of(trajectories)
    scales = np.asarray(augmented.scm.noise_scale), np.asarray(validation.scm.noise_scale)  # the same in a copy
    assert not (scales[0][:, None] == scales[1][None]).any()


@pytest.mark.parametrize("split", [0.0, 0.05, 0.95, 1.0])
def test_a_split_with_an_empty_side_is_refused(trajectories, split):
    with pytest.raises(ValueError, match="5 demonstrations cannot be split"):
        extract_expert_demonstrations(trajectories, split)


def renaming(original, copy):
    """`old[j]` is the original's name of the copy's variable j, `sign[j]` its sign, both read off the data."""
    rows = int(original.buffer.size)
    before, after = (np.asarray(t.buffer.values)[:rows] for t in (original, copy))
    old, sign = np.arange(NUM_VARS), np.ones(NUM_VARS)
    for j in np.flatnonzero(np.asarray(copy.scm.var_mask)):
        matches = [(i, s) for i in range(NUM_VARS) for s in (1.0, -1.0) if (after[:, j] == s * before[:, i]).all()]
        assert len(matches) == 1
        old[j], sign[j] = matches[0]
    assert sorted(old) == list(range(NUM_VARS))
    return old, sign


@pytest.fixture(scope="module")
def pairs(trajectories, copies):
    found = []
    for i in range(BATCH):
        original, copy = (take(t, np.array(i)) for t in (trajectories, copies))
        found.append((original, copy, *renaming(original, copy)))
    return found


def test_copies_are_renamed_and_flipped(pairs):
    assert any((old != np.arange(NUM_VARS)).any() for _, _, old, _ in pairs)
    assert any((sign < 0).any() for *_, sign in pairs)
    for original, copy, old, sign in pairs:
        target = int(copy.scm.target)
        assert old[target] == original.scm.target and sign[target] == 1
        assert (np.asarray(copy.scm.var_mask) == np.asarray(original.scm.var_mask)).all()  # places without a variable stay at the end
        assert not copy.buffer.values[:, ~np.asarray(copy.scm.var_mask)].any()
        assert (copy.outcome == original.outcome).all() and (copy.reward == original.reward).all()
        assert (np.asarray(copy.buffer.intervened) == np.asarray(original.buffer.intervened)[:, old]).all()


def test_the_belief_of_a_copy_is_about_the_same_sets(pairs):
    for original, copy, old, _ in pairs:
        assert (np.asarray(copy.sets) == np.asarray(original.sets)[:, old]).all() and (copy.log_probs == original.log_probs).all()
        assert (np.asarray(copy.scm.parents) == np.asarray(original.scm.parents)[old]).all()
        for t in (0, STEPS):
            one, two = original.posterior(t), copy.posterior(t)
            np.testing.assert_allclose(two.marginals(), np.asarray(one.marginals())[old], atol=1e-6)
            np.testing.assert_allclose(two.log_prob(copy.scm.parents), one.log_prob(original.scm.parents), atol=1e-5)


def test_choices_and_surfaces_of_a_copy_are_the_originals(pairs):
    for original, copy, old, sign in pairs:
        low, high = np.asarray(original.scm.low)[old], np.asarray(original.scm.high)[old]
        low, high = np.where(sign > 0, low, -high), np.where(sign > 0, high, -low)
        np.testing.assert_array_equal(np.asarray(copy.scm.low), low)
        np.testing.assert_array_equal(np.asarray(copy.scm.high), high)
        assert (old[np.asarray(copy.variable)] == np.asarray(original.variable)).all()
        assert (np.asarray(copy.value) == sign[np.asarray(copy.variable)] * np.asarray(original.value)).all()
        grids = (np.asarray(value_grid(t.scm.low, t.scm.high, BINS)) for t in (original, copy))
        before, after = grids
        for j in range(NUM_VARS):
            here = np.argsort(sign[j] * after[j], kind="stable")  # the copy's values in the order of the original's
            np.testing.assert_allclose(sign[j] * after[j][here], before[old[j]], atol=1e-5)
            assert (np.asarray(copy.surface)[:, j, here] == np.asarray(original.surface)[:, old[j]]).all()


def test_the_model_of_a_copy_is_the_same_system(trajectories):
    """The same noise gives the same rows, renamed and flipped, observed and under do; so E[Y | do] agrees. For every mechanism and kind of noise."""
    noise, kinds = jr.normal(jr.key(3), (16, NUM_VARS)), np.arange(len(MECHANISMS) * len(NOISES))

    def simulate(scm, variable, value):
        do = Intervention.single(variable, value, NUM_VARS)
        return scm.simulate(noise, Intervention.none(NUM_VARS)), scm.simulate(noise, do), scm.mean_outcome(do)

    run = jax.jit(jax.vmap(simulate), compiler_options=FAST)
    changes = jnp.asarray(kinds // len(NOISES)), jnp.asarray(kinds % len(NOISES))
    originals = edit(take(trajectories, kinds % BATCH), lambda t: (t.scm.mechanism, t.scm.noise_kind), lambda _: changes)
    copies = jax.jit(jax.vmap(transform), compiler_options=FAST)(jr.split(jr.key(1), len(kinds)), originals)
    before, after = (jax.device_get(run(t.scm, t.variable[:, 0], t.value[:, 0])) for t in (originals, copies))
    flipped = 0
    for i in kinds:
        old, sign = renaming(take(originals, np.array(i)), take(copies, np.array(i)))
        flipped += (sign < 0).any()
        for rows, renamed in zip(before[:2], after[:2], strict=True):
            np.testing.assert_allclose(renamed[i], sign[None] * rows[i][:, old], atol=1e-4, rtol=1e-5)
        np.testing.assert_allclose(after[2][i], before[2][i], atol=1e-4)
    assert flipped > len(kinds) // 2
    assert np.abs(before[1] - before[0]).max() > 0.1


# --- files ---


def save(path, trajectories, **changes):
    arrays = to_arrays(trajectories, "train") | changes
    save_arrays(path, arrays, stage="demos", config={}, hyperparameters={}, seed=0, step=1, metrics={})


def test_what_is_stored_is_what_is_loaded(tmp_path, trajectories):
    path = tmp_path / "demos.npz"
    save(path, trajectories)
    loaded, header = load_trajectories(path, "train")
    assert eqx.tree_equal(loaded, trajectories)
    assert header["stage"] == "demos"
    assert all(name.startswith("train/") for name in to_arrays(trajectories, "train"))
    with pytest.raises(ArtifactError, match="it holds no.*validation/"):
        load_trajectories(path, "validation")


def test_join_undoes_take(trajectories):
    parts = [take(trajectories, np.array(rows)) for rows in ([0, 1], [2, 3, 4])]
    assert eqx.tree_equal(join(parts), trajectories)


# --- what students learn from ---


def test_surrogate_examples_pair_data_with_the_belief_they_led_to(trajectories):
    capacity = CAPACITY + 4
    run = jax.jit(lambda t: extract_surrogate_training_data(t, capacity), compiler_options=FAST)
    examples = run(trajectories)
    count = BATCH * (STEPS + 1)
    assert examples.buffer.values.shape == (count, capacity, NUM_VARS) and examples.posterior.log_probs.shape[0] == count
    for i in range(BATCH):
        for t in range(STEPS + 1):
            buffer, task, posterior = (jax.tree.map(lambda leaf, n=i * (STEPS + 1) + t: leaf[n], part) for part in examples)
            one = take(trajectories, np.array(i))
            known = int(one.num_initial) + t
            assert buffer.size == known and buffer.valid[:known].all()
            assert (buffer.values[:known] == one.buffer.values[:known]).all() and not buffer.values[known:].any()
            assert (buffer.intervened[:known] == one.buffer.intervened[:known]).all() and not buffer.intervened[known:].any()
            assert eqx.tree_equal(posterior, one.posterior(t)) and eqx.tree_equal(task, one.scm.task)


def test_acquisition_states_do_not_know_what_came_of_the_choice(trajectories):
    """State t is the same whatever rows t and later hold, and not the same without row t - 1."""
    sizes = SurrogateConfig(model_hidden_dim=8, model_n_layers=1, num_heads=2, num_moments=3, num_components=2, num_bins=BINS)
    run = jax.jit(lambda t: extract_acquisition_training_data(t, ParentSetPredictionModel(sizes, key=jr.key(4))), compiler_options=FAST)
    examples = run(trajectories)
    assert examples.variable.shape == (BATCH * STEPS,) and examples.surface.shape == (BATCH * STEPS, NUM_VARS, BINS)
    for name in ("variable", "value", "surface"):
        assert (getattr(examples, name) == getattr(trajectories, name).reshape(BATCH * STEPS, *getattr(trajectories, name).shape[2:])).all()
    assert (examples.state.step == np.tile(np.arange(STEPS), BATCH)).all()
    assert (examples.state.step + examples.state.steps_left == STEPS).all()
    sizes_seen = examples.state.buffer.valid.sum(1).reshape(BATCH, STEPS)
    assert (np.asarray(sizes_seen) == np.asarray(trajectories.num_initial)[:, None] + np.arange(STEPS)).all()
    everyone, row = np.arange(BATCH), np.asarray(trajectories.num_initial) + 1  # what the second experiment gave
    changed = run(edit(trajectories, lambda t: t.buffer.values, lambda a: a.at[everyone, row].add(3.0)))
    for before, after in zip(jax.tree.leaves(examples.state), jax.tree.leaves(changed.state), strict=True):
        before, after = (np.asarray(a).reshape(BATCH, STEPS, -1) for a in (before, after))
        np.testing.assert_array_equal(before[:, :2], after[:, :2])
    means = (np.asarray(e.state.output.effect_mean).reshape(BATCH, STEPS, -1) for e in (examples, changed))
    before, after = means
    assert (before[:, 2] != after[:, 2]).any(1).all()
