"""The scripts as a person runs them, at a size that only shows that they work: chained,
interrupted, resumed, and given bad input.

`make smoke` runs the evaluation; here it would be mostly compilation.
"""

import functools as ft
import importlib
import json
import runpy
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest.mock import Mock

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lib.training
from lib import documents, settings
from lib.accuracy import accuracy
from lib.artifacts import ArtifactError, load, read_header, read_log
from lib.check import check
from lib.graphs import FAMILIES
from lib.grpo import GRPOConfig
from lib.imitation import ImitationConfig
from lib.policy import AcquisitionState, PolicyConfig
from lib.posterior import ParentSetPosterior
from lib.problems import DataDesign, draw_problems
from lib.reading import read_experiments
from lib.scm_prior import WORLD, SCMPrior, inherit
from lib.surrogate import SurrogateConfig
from lib.synthetic import MECHANISMS, Mechanism, index_of
from lib.system import (
    Answer,
    TrainedACBOSystem,
    deploy_trained_system,
    load_policy,
    load_surrogate,
)
from lib.table import DataError
from lib.trajectories import load_trajectories


ROOT = Path(__file__).parent.parent
PRIOR = SCMPrior(max_vars=3, max_size=3)
DESIGN = DataDesign(min_obs=20, max_obs=24, per_variable=0, max_interventions=8)
CAMPAIGN = DataDesign(min_obs=20, max_obs=20, per_variable=1, num_steps=2)
SURROGATE = SurrogateConfig(
    model_hidden_dim=8, model_n_layers=1, num_heads=2, head_dim=4, num_components=2, num_bins=6
)
GRPO = GRPOConfig(group_size=3)
*STAGES, EVALUATE, DEPLOY = (
    importlib.import_module(path.stem) for path in sorted(ROOT.glob("0?_*.py"))
)
EXAMPLE, BOUNDS = (ROOT / "examples" / name for name in ("experiments.csv", "bounds.csv"))


def configs(folder: Path, prior: SCMPrior = PRIOR) -> list:
    """The smallest settings of every stage; only the first is told another `prior`."""
    return [
        STAGES[0].Config(
            folder,
            prior=prior,
            num_models=6,
            num_obs=20,
            per_variable=1,
            num_steps=5,
            num_bins=6,
            batch=3,
            max_posterior_entropy=9.0,
        ),
        STAGES[1].Config(
            folder,
            prior=PRIOR,
            design=DESIGN,
            model=SURROGATE,
            steps=5,
            warmup_steps=1,
            buckets=(STAGES[1].Bucket(3, 2),),
            buffers_per_model=2,
            demos_per_step=2,
            chunk=2,
            evaluate_every=3,
            checkpoint_every=2,
        ),
        STAGES[2].Config(
            folder,
            prior=PRIOR,
            campaign=CAMPAIGN,
            policy=PolicyConfig(policy_hidden_dim=8, policy_n_layers=1),
            imitation=ImitationConfig(imitation_epochs=1),
            grpo=GRPO,
            iterations=3,
            problems_per_iteration=2,
            validation_problems=2,
            multimodal_share=0.0,
            checkpoint_every=1,
        ),
        STAGES[3].Config(
            folder,
            prior=PRIOR,
            design=DESIGN,
            campaign=CAMPAIGN,
            levels=1,
            grpo=GRPO,
            rounds=3,
            problems_per_round=2,
            surrogate_steps=1,
            models_per_step=2,
            checkpoint_every=1,
        ),
    ]


@pytest.fixture(scope="module")
def own():
    """A prior of one's own, with a mechanism that the project does not have."""
    MECHANISMS["wedge"] = Mechanism(lambda z: jnp.abs(z) - 1.0)
    yield replace(PRIOR, mechanisms=("wedge", "polynomial"), max_range=3.0)
    del MECHANISMS["wedge"]


@pytest.fixture(scope="module")
def finished(own, tmp_path_factory):
    """A folder in which the four stages of training have run."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    for stage, config in zip(STAGES, configs(folder, own), strict=True):
        stage.main(config)
    return folder


LOGGED = {"demos": [1, 2], "surrogate": [2, 4, 5], "policy": [1, 2, 3], "acbo": [1, 2, 3]}


def test_every_stage_writes_what_it_says(finished, own):
    headers = {path.name: read_header(path) for path in finished.iterdir() if path.is_file()}
    products = "demos.npz surrogate.eqx policy.eqx bc_policy.eqx curves.npz acbo.eqx"
    assert set(headers) == set(products.split())
    assert all(one["seed"] == 0 and one["metrics"] is not None for one in headers.values())
    logs = {name: read_log(finished / "logs" / f"{name}.jsonl") for name in LOGGED}
    assert {name: [record["step"] for record in log] for name, log in logs.items()} == LOGGED
    curves = load(finished / "curves.npz", "curves")[0]
    assert curves["reward"].shape == (3,) and curves["validation"].shape == (4, 2)
    # neither the number of steps nor the interval of evaluations is a multiple of a chunk
    assert headers["surrogate.eqx"]["step"] == 5
    assert ["validation_set_nll" in one for one in logs["surrogate"]] == [False, True, True]
    # the first stage counts what it kept by kind
    metrics = headers["demos.npz"]["metrics"]
    assert sum(record["failures"] for record in logs["demos"]) == metrics["failures"]
    for part in metrics["yield"].values():
        for count in ("models", "kept"):
            assert sum(label[count] for label in part.values()) == metrics[count]
    labels = {kind: set(part) for kind, part in metrics["yield"].items()}
    assert labels.keys() == {"family", "mechanism", "variables"} and labels["variables"] == {"3"}
    assert labels["family"] <= set(own.families) and labels["mechanism"] <= set(own.mechanisms)


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_the_surrogate_is_trained_in_the_wide_world_all_else_in_the_narrow_one(preset):
    """Whatever the preset, and though demonstrations of the narrow one are inherited from."""
    wide, narrow = tuple(WORLD.values()), (0.0,) * len(WORLD)
    for stage, shares in zip(STAGES, (narrow, wide, narrow, wide), strict=True):
        prior = stage.PRESETS[preset][1].prior
        made = {"config": {"prior": asdict(PRIOR)}}
        assert prior.shares == shares and inherit(prior, made).shares == shares
    assert EVALUATE.PRESETS[preset][1].prior.shares == narrow


def test_a_model_knows_the_family_of_its_graph():
    """Chains and forks are told apart by their edges."""
    prior = SCMPrior(max_vars=4, min_size=4, max_size=4, families=("chain", "fork"))
    scms = draw_problems(jr.key(0), 8, prior, DESIGN, 2).scm
    family = np.array(list(FAMILIES))[scms.family]
    assert set(family) == set(prior.families)
    chain, fork = np.eye(4, k=1, dtype=bool), np.outer(np.arange(4) == 0, np.arange(4) > 0)
    assert (scms.adjacency == np.where((family == "chain")[:, None, None], chain, fork)).all()


@pytest.mark.parametrize(
    "stage, product",
    [*enumerate(("demos.npz", "surrogate.eqx", "policy.eqx", "acbo.eqx"))],
)
def test_a_stage_killed_and_started_again_ends_byte_for_byte_the_same(
    finished, own, monkeypatch, stage, product
):
    before, config = (finished / product).read_bytes(), configs(finished, own)[stage]
    real, main = lib.training.save, STAGES[stage].main

    def save_and_die(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    (finished / product).unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lib.training, "save", save_and_die)
        main(config)
    assert not (finished / product).exists()
    assert main(config) == finished / product
    assert (finished / product).read_bytes() == before


def test_the_documents_functions_give_what_the_scripts_give(finished):
    """To rounding and what follows from it: a step of training moves a weight by at most .001."""
    demos, header = load_trajectories(finished / "demos.npz", "train")
    _, second, third, fourth = (
        replace(config, prior=inherit(config.prior, header)) for config in configs(finished)
    )
    system = documents.train_complete_acbo_system(demos, SURROGATE, third, second, config=fourth)
    written = TrainedACBOSystem.load(finished / "acbo.eqx")
    for one, two in zip(jax.tree.leaves(system), jax.tree.leaves(written), strict=True):
        np.testing.assert_allclose(one, two, atol=0.02)


def test_a_stage_refuses_what_an_earlier_stage_did_not_write(finished, tmp_path):
    for name in ("surrogate.eqx", "policy.eqx"):
        shutil.copy(finished / "policy.eqx", tmp_path / name)
    with pytest.raises(ArtifactError, match="surrogate.eqx.*02_train_surrogate.py"):
        STAGES[3].main(configs(tmp_path)[3])


def test_a_prior_of_ones_own_reaches_the_evaluation(finished, own, monkeypatch):
    """Only stage 1 is told; a later stage that is told something else does that."""
    kinds = {int(index_of(name, MECHANISMS)) for name in own.mechanisms}
    demos = load_trajectories(finished / "demos.npz", "train")[0]
    assert set(np.unique(demos.scm.mechanism)) == kinds
    for name in ("demos.npz", "surrogate.eqx", "policy.eqx", "acbo.eqx"):
        found = read_header(finished / name)["config"]["prior"]
        assert (found["mechanisms"], found["max_range"]) == (["wedge", "polynomial"], 3.0), name
    other = replace(PRIOR, noises=("uniform",))
    assert inherit(other, read_header(finished / "demos.npz")) == other
    scores = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(EVALUATE, "structure_scores", scores)
    with pytest.raises(InterruptedError):
        EVALUATE.main(EVALUATE.Config(finished, sizes=(3,), num_problems=12))
    problems = scores.call_args.args[1]
    assert set(np.unique(problems.scm.mechanism)) == kinds
    assert problems.scm.high.max() <= 3.0


def test_evaluation_names_the_artifact_that_is_missing(tmp_path):
    with pytest.raises(ArtifactError, match="policy.eqx.*03_warmstart_acquisition.py"):
        EVALUATE.main(EVALUATE.Config(tmp_path))


EXPERIMENTS = "dose,heat,yield,intervened\n4,1.1,7.9,dose\n0,1.2,0.4,dose\n" + "".join(
    f"{i % 5},{i % 3 + 0.1 * i},{2 * (i % 5) + 0.3 * (i % 4)},\n" for i in range(12)
)
NORMAL = np.random.default_rng(0).normal(size=(20, 2)).tolist()
NAMES = "a,b,yield,intervened\n"
LARGE = NAMES + "".join(f"{1e25 * a:.6e},{b:.3f},{1e25 * (a + b):.6e},\n" for a, b in NORMAL)
FAR = NAMES + "".join(f"{a:.3f},{b:.3f},{a + b:.3f},\n" for a, b in NORMAL)
FAR += "4e5,0,1,a\n0,-4e5,1,b\n"
WIDE = "".join(f"v{i}," for i in range(128)) + "b,intervened\n"
WIDE += "".join(
    ",".join(f"{x:.3f}" for x in row) + ",\n"
    for row in np.random.default_rng(1).normal(size=(20, 129))
)


def suggest(data, target="yield", **options):
    if "target_value" not in options:
        options = {"objective": "min"} | options
    return DEPLOY.suggest(DEPLOY.Suggest(data, target, **options))


def test_suggest_answers_within_the_range(finished, tmp_path, capsys):
    data, ranges, system = tmp_path / "data.csv", tmp_path / "bounds.csv", finished / "acbo.eqx"
    data.write_text(EXPERIMENTS)
    answer = suggest(data, objective="max", system=system, json=True)
    assert json.loads(capsys.readouterr().out) == answer
    ((name, value),) = answer["next_experiment"]["settings"].items()
    assert -1e-5 <= value <= {"dose": 4, "heat": 3.1}[name] + 1e-5
    assert set(answer["parents"]) == {"dose", "heat"}
    assert all(0 <= p <= 1 for p in answer["parents"].values())
    ranges.write_text("variable,low,high\nheat,1,2\n")
    chosen = suggest(data, bounds=ranges, system=system)["next_experiment"]
    assert list(chosen["settings"]) == ["heat"] and 1 <= chosen["settings"]["heat"] <= 2
    assert "heat" in capsys.readouterr().out


def test_what_is_known_of_edges_is_answered_with(finished, tmp_path):
    data, system = tmp_path / "data.csv", finished / "acbo.eqx"
    data.write_text(EXPERIMENTS)
    plain = suggest(data, system=system)
    sure = suggest(data, system=system, require=("dose",), forbid=("heat",))
    assert sure["parents"] == {"dose": pytest.approx(1), "heat": pytest.approx(0, abs=1e-6)}
    assert [one["parents"] for one in sure["parent_sets"]] == [["dose"]]
    beside = suggest(data, system=system, forbid=("heat -> dose",))
    assert all(one["best_effects"] != plain["best_effects"] for one in (sure, beside))
    assert suggest(data, system=system, tiers={"dose": 1, "yield": 1}) == plain


def test_demo_scores_the_recommended_action(finished, capsys):
    scores = DEPLOY.demo(DEPLOY.Demo(steps=2, num_obs=20, system=finished / "acbo.eqx"))
    assert len(scores) == 1 and -2.2 < scores[0] < 0.6
    assert "optimum -2.17" in capsys.readouterr().out


def test_the_shipped_system_answers_from_any_folder(tmp_path, monkeypatch, capsys):
    """The README's first command, without `--system`, from a folder that holds nothing."""
    monkeypatch.chdir(tmp_path)
    best = suggest(EXAMPLE, objective="max", bounds=BOUNDS)["recommended_action"]
    assert list(best["settings"]) == ["catalyst"] and 6 < best["settings"]["catalyst"] < 8
    assert "Next experiment" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["data", "bounds", "system"])
@pytest.mark.parametrize("name", ["loop", "file/a", "a" * 300, "a\0b", "missing"])
def test_suggest_ends_in_one_line_where_a_path_leads_nowhere(tmp_path, capsys, option, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    paths = {"data": EXAMPLE, "bounds": BOUNDS} | {option: tmp_path / name}
    with pytest.raises(SystemExit) as end, settings.errors_for_people():
        suggest(target="yield", **paths)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"error: {tmp_path / name}: ")


def as_stub(monkeypatch, share, slope=1.0):
    """A system that wants the first variable at `share` of its range, and says that the target's
    deviation is `slope` times that of any variable.
    """

    def deployed(buffer, task, *_):
        low, high = (np.asarray(end)[:, None] for end in (task.low, task.high))
        grid = (low + (high - low) * np.linspace(0, 1, 5, dtype=np.float32)).astype(np.float32)
        choice = np.array(0), low[0, 0] + np.float32(share) * (high - low)[0, 0]
        with np.errstate(invalid="ignore"):
            num_vars, mean, band = len(grid), slope * grid, 0.1 + abs(grid)
        sets = ParentSetPosterior(task.target, jnp.zeros((1, num_vars), bool), jnp.zeros(1))
        half = np.full_like(grid, 0.5)
        nothing, one, weights = (0.0, -0.1, 0.1), np.float32(1.0), np.full(num_vars, 0.5)
        surface = grid, mean, mean - band, mean + band, half, half, nothing, one
        none = np.zeros(num_vars)
        said = choice, choice, none, none, sets, *surface, 2, 1, one, (weights, weights)
        return Answer(*said)

    monkeypatch.setattr("acbo.deploy_trained_system", lambda *_: deployed)


def numbers_of(answer) -> list[float]:
    actions = answer["next_experiment"], answer["recommended_action"], *answer["best_effects"]
    return [x for one in actions for x in (*one["settings"].values(), one["predicted"], one["low"])]


def test_text_has_the_digits_of_the_json(tmp_path, monkeypatch, capsys):
    """With four digits a speed of 23554 was "2.355e+04" and a yield of 1000058.3 "1e+06"."""
    data = tmp_path / "data.csv"
    rows = [f"{23554 + 100 * a:.0f},{b:.2f},{1e6 + a + b:.1f},\n" for a, b in NORMAL]
    data.write_text("rpm,b,yield,intervened\n" + "".join(rows))
    as_stub(monkeypatch, 0.4)
    answer = suggest(data, json=True)
    assert json.loads(capsys.readouterr().out) == answer == suggest(data)
    text = capsys.readouterr().out
    assert "e+" not in text and ".0 " not in text
    for number in numbers_of(answer):
        assert number > 1e4 or abs(number) < 10
        assert f" {number:.15g} " in text.replace(")", " ")


def test_computed_columns_are_answered_without_the_noise_of_float32(tmp_path, monkeypatch):
    numbers = np.random.default_rng(0).random((20, 2)).tolist()
    rows = [f"{a!r},{b!r},{a + b!r},\n" for a, b in numbers]
    (tmp_path / "data.csv").write_text(NAMES + "".join(rows))
    as_stub(monkeypatch, 0.5)
    one = suggest(tmp_path / "data.csv")["next_experiment"]
    assert len(str(one["settings"]["a"])) <= 9 and len(str(one["predicted"])) <= 12


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_without_bounds_the_ends_of_a_range_have_the_columns_digits(monkeypatch, share):
    rows = [line.split(",") for line in EXAMPLE.read_text().splitlines()[1:]]
    tried = [float(row[0]) for row in rows if row[-1] == "temperature"]
    as_stub(monkeypatch, share)
    (value,) = suggest(EXAMPLE)["next_experiment"]["settings"].values()
    assert value == round(min(tried) + share * (max(tried) - min(tried)), 1)


@pytest.mark.parametrize(
    ("bounds", "share", "value"),
    [
        ((0.2, 0.8), 0.0, 0.2),
        ((0.2, 0.8), 0.05, 0.2),
        ((0.2, 0.8), 0.5, 0.5),
        ((0.2, 0.8), 1.0, 0.8),
        ((0.21, 0.24), 0.3, 0.22),
        ((-0.3, 1.2), 0.1, 0.0),
        ((0.0, 1.0), 0.7, 1.0),
        ((-0.3, 1.2), 0.9, 1.0),
    ],
)
def test_a_prediction_is_of_the_setting_that_is_printed(
    tmp_path, monkeypatch, capsys, bounds, share, value
):
    """`a` is 0 or 1: rounded to that inside the bounds, with more digits where they exclude it."""
    rows = [f"{i % 2},{i % 5},{i % 2 + i % 3 - 1:.1f},\n" for i in range(16)]
    data, ranges = tmp_path / "data.csv", tmp_path / "bounds.csv"
    data.write_text(NAMES + "".join(rows))
    ranges.write_text("variable,low,high\na,{},{}\n".format(*bounds))
    as_stub(monkeypatch, share, slope=2.0)
    one = suggest(data, bounds=ranges)["next_experiment"]
    units = read_experiments(data, "yield").units
    at = (value - units.shift[0]) / units.spread[0]
    nodes = (np.linspace(*bounds, 5) - units.shift[0]) / units.spread[0]
    low = np.interp(at, nodes, 2 * nodes - 0.1 - abs(nodes))
    expected = units.shift[2] + units.spread[2] * np.array([2 * at, low])
    assert [one["predicted"], one["low"]] == pytest.approx(expected, abs=1e-3)
    assert one["settings"] == {"a": value} and str(one["settings"]["a"]) != "-0.0"
    assert f"set a = {value:.15g} " in capsys.readouterr().out


def test_what_is_asked_for_changes_the_answer(tmp_path, capsys):
    """On the example, where catalyst 6.8 is best: each of these would fail without its flag."""
    plain = suggest(EXAMPLE, objective="max", bounds=BOUNDS)
    base = plain["nothing"]["predicted"]

    def ask(lines=None, **how):
        if lines:
            (tmp_path / "bounds.csv").write_text("\n".join(lines) + "\n")
        how = {"bounds": tmp_path / "bounds.csv" if lines else BOUNDS, "objective": "max"} | how
        return suggest(EXAMPLE, **how)

    near = ask(objective=None, target_value=base + 4.0)
    assert (
        near["objective"] == "value" and abs(near["recommended_action"]["predicted"] - base - 4) < 1
    )
    idle = ask(objective=None, target_value=base)["recommended_action"]
    assert idle["settings"] == {}
    parents = ask(require=("stirring",), forbid=("catalyst",))
    assert parents["parents"]["stirring"] > 1 - 1e-6 and parents["parents"]["catalyst"] < 1e-6
    assert all("stirring" in one["parents"] for one in parents["parent_sets"])
    assert any("'catalyst' is said to be no parent" in one for one in parents["warnings"])
    (tmp_path / "tiers.csv").write_text("variable,tier\ncatalyst,3\nyield,2\n")
    later = ask(tiers=tmp_path / "tiers.csv")
    assert "catalyst" not in {name for one in later["best_effects"] for name in one["settings"]}
    limited = ask(constraint=("catalyst <= 6",))["best_effects"]
    assert max(one["settings"].get("catalyst", 0) for one in limited) == pytest.approx(6, abs=0.1)
    rows = ["variable,low,high,levels,cost", "temperature,45,75,,1", "catalyst,2,8,3;5;6.5,1e9"]
    dear = ask(rows)
    assert dear["recommended_action"]["settings"] == {"catalyst": 6.5}
    assert "temperature" in dear["next_experiment"]["settings"]
    mixed = ask(constraint=("catalyst + temperature + stirring = 300",), batch=2)
    for one in (mixed["recommended_action"], mixed["next_experiment"]):
        assert one["settings"] == {} and one["predicted"] == mixed["nothing"]["predicted"]
    assert not mixed["stop"]["worth_it"] and mixed["best_effects"] == []
    few = ask(["variable,low,high,levels", "catalyst,2,8,3;5"], batch=4)["batch"]
    assert sorted(one["settings"]["catalyst"] for one in few) == [3, 5]
    several = ask(batch=3, curves=True)
    chosen = [tuple(one["settings"].items()) for one in several["batch"]]
    assert len(set(chosen)) == 3 and several["batch"][0] == several["next_experiment"]
    curve = several["curves"]["catalyst"]
    assert curve["values"] == sorted(curve["values"]) and len(curve["low"]) == 16
    assert "At the same time" in capsys.readouterr().out


def test_version_says_which_system_answers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["06_deploy.py", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "06_deploy.py"), run_name="__main__")
    assert left.value.code is None and "format 1 by acbo.eqx, " in capsys.readouterr().out


@pytest.mark.parametrize("lots", [False, True])
def test_words_are_set_and_lots_looked_within(tmp_path, capsys, lots):
    """Of three salts, of which one is set in every row, kcl is best by 8; the second half of the
    rows, or the second lot, is lower by 30.
    """
    rng, rows = np.random.default_rng(0), ["salt,heat,yield,intervened" + ",charge" * lots]
    for i in range(48):
        salt, heat = ("kcl", "nabr", "nacl")[i % 3], rng.normal(60, 5)
        outcome = 40 + 8 * (salt == "kcl") - 30 * lots * (i > 23) + rng.normal()
        acted = "salt" if i % 24 > 18 else ""
        rows.append(f"{salt},{heat:.1f},{outcome:.1f},{acted}" + f",{'ab'[i > 23]}" * lots)
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    found = suggest(tmp_path / "data.csv", objective="max")
    assert found["recommended_action"]["settings"] == {"salt": "kcl"} or lots
    assert "salt = kcl" in capsys.readouterr().out
    assert lots == any("'charge' looks like a lot" in one for one in found["warnings"])


@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_that_is_not_finite_is_an_error(monkeypatch, capsys, as_json):
    for share, slope in ((0.5, np.nan), (0.5, np.inf), (np.nan, 1.0)):
        as_stub(monkeypatch, share, slope)
        with pytest.raises(DataError, match="experiments.csv: the answer is not finite"):
            suggest(EXAMPLE, json=as_json)
    assert capsys.readouterr().out == ""


def test_a_file_starts_a_campaign(finished, tmp_path):
    """Its experiments are no steps: in training a campaign starts at 0 with some in the buffer."""
    (tmp_path / "data.csv").write_text(EXPERIMENTS)
    data = read_experiments(tmp_path / "data.csv", "yield")
    buffer, task = data.buffer, data.task
    system = TrainedACBOSystem.load(finished / "acbo.eqx")
    wide, task_of = buffer.widen(5).grow(128 - len(buffer.valid)), task.widen(5)

    @eqx.filter_jit
    def decide():
        checked = check(system.surrogate, wide, task_of, 16)
        state = AcquisitionState(wide, checked.averaged, jnp.array(0), jnp.array(3))
        return checked.choose(system.policy(state).logits), checked.recommended()

    (variable, value), (action, _) = decide()
    found = deploy_trained_system(system)(buffer, task, 3)
    assert found.experiment[0] == variable and abs(found.experiment[1] - value) < 1e-5
    assert found.action[0] == action


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (0, {"num_models": 0}, "num_models = 0 must be at least 1"),
        (0, {"num_models": 2}, "num_models = 2 cannot be split"),
        (0, {"num_obs": 3}, "num_obs = 3: the expert needs at least 10"),
        (1, {"steps": 0}, "steps = 0 must be at least 1"),
        (1, {"steps": -1}, "steps = -1"),
        (1, {"learning_rate": float("nan")}, "learning_rate = nan"),
        (2, {"seed": 10**20}, "seed = 1000"),
        (2, {"checkpoint_every": 2}, "iterations = 3 must be a multiple"),
        (GRPOConfig, {"group_size": 1}, "group_size = 1 must be at least 2"),
        (3, {"rounds": -1}, "rounds = -1"),
        (3, {"seed": -1}, "seed = -1"),
        *((EVALUATE.Config, {n: 0}, n) for n in ("num_problems", "literature_seeds")),
        *((EVALUATE.Config, {n: ()}, n) for n in ("sizes", "methods")),
        (EVALUATE.Config, {"sizes": (0,)}, "sizes"),
        (EVALUATE.Config, {"transfer_size": 1}, "transfer_size"),
        (EVALUATE.Config, {"num_obs": 9}, "num_obs"),
        (EVALUATE.Config, {"seed": 2**32}, "seed"),
        *((DEPLOY.Demo, {n: v}, n) for n, v in (("seeds", 0), ("steps", -1), ("num_obs", 0))),
        *(
            (ft.partial(DEPLOY.Suggest, EXAMPLE, "yield", "min"), {"remaining": n}, "--remaining")
            for n in (0, -5, 2**31, 10**20)
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config, changes, said):
    make = config if callable(config) else ft.partial(replace, configs(Path())[config])
    with pytest.raises(ValueError, match=said):
        make(**changes)


def test_the_policy_holds_the_span_of_what_training_showed(finished):
    """Of progress: 0 to 1 steps done and 1 to 2 left; of all features: no more than was seen."""
    policy = load_policy(finished / "policy.eqx")[0]
    low, high = np.exp(3.0 * np.asarray(policy.span[:, 6:8])) - 1.0
    np.testing.assert_allclose([low, high], [[1.0, 0.0], [2.0, 1.0]], atol=1e-5)
    assert (policy.span[0] <= policy.span[1]).all() and (jnp.abs(policy.span) <= 10.0).all()
    acbo = TrainedACBOSystem.load(finished / "acbo.eqx").policy
    for other in (load_policy(finished / "bc_policy.eqx")[0], acbo):
        np.testing.assert_allclose(other.span, policy.span, atol=1e-5)


def test_without_a_clone_there_is_no_warm_start_to_compare(finished):
    folder = finished.parent / "cold only"
    folder.mkdir()
    for name in ("surrogate.eqx", "bc_policy.eqx"):  # a clone that an earlier run left
        shutil.copy(finished / name, folder)
    alone = ImitationConfig(use_behavioral_cloning=False)
    STAGES[2].main(replace(configs(folder)[2], imitation=alone))
    assert len(load(folder / "curves.npz", "curves")[0]["validation"]) == 4
    assert not (folder / "bc_policy.eqx").exists()


def test_validation_figures_have_no_unit(finished):
    config = configs(finished)[1]
    model = load_surrogate(finished / "surrogate.eqx")[0]
    drawn = STAGES[1].draw_chunk(jr.key(0), jnp.array(0), 2, config)
    (batch,) = lib.training.merged(drawn)
    is_target = jnp.arange(3)[None] == batch.scm.target[:, None]
    scaled = batch.buffer.values * jnp.where(is_target, 1000.0, 1.0)[:, None]
    buffer = eqx.tree_at(lambda buffer: buffer.values, batch.buffer, scaled)
    truth = eqx.tree_at(lambda truth: truth.effects, batch.truth, 1000.0 * batch.truth.effects)
    other = batch._replace(buffer=buffer, truth=truth)
    one, two = (accuracy(model, (problems,)) for problems in (batch, other))
    assert one["validation_regret"] > 0
    assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_units_do_not_matter(tmp_path):
    """Temperature times 2^30, catalyst times 2^-30, the target with an offset of 2^20: the same
    answer, in these units.
    """
    factor, offset = {"temperature": 2.0**30, "catalyst": 2.0**-30}, {"yield": 2.0**20}
    data, ranges = tmp_path / EXAMPLE.name, tmp_path / BOUNDS.name
    header, *rows = [line.split(",") for line in EXAMPLE.read_text().splitlines()]
    for row in rows:
        for i, name in enumerate(header[:-1]):
            row[i] = repr(float(row[i]) * factor.get(name, 1.0) + offset.get(name, 0.0))
    data.write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    header, *rows = [line.split(",") for line in BOUNDS.read_text().splitlines()]
    rows = [[n, *(repr(float(end) * factor.get(n, 1.0)) for end in ends)] for n, *ends in rows]
    ranges.write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    plain = suggest(EXAMPLE, objective="max", bounds=BOUNDS)
    other = suggest(data, objective="max", bounds=ranges)
    for action in ("next_experiment", "recommended_action"):
        one, two = plain[action], other[action]
        wanted = {k: v * factor.get(k, 1.0) for k, v in one["settings"].items()}
        assert two["settings"] == pytest.approx(wanted, rel=0.01)
        ends = "predicted", "low", "high"
        assert [two[n] - 2.0**20 for n in ends] == pytest.approx([one[n] for n in ends], abs=0.1)
    assert other["parents"] == pytest.approx(plain["parents"], abs=0.02)


@pytest.mark.parametrize("table", [LARGE, FAR], ids=["large", "far"])
def test_large_numbers_and_cells_far_out_are_answered_with_numbers(tmp_path, table):
    """Values of 1e25 once gave infinity."""
    (tmp_path / "data.csv").write_text(table)
    assert np.isfinite(numbers_of(suggest(tmp_path / "data.csv"))).all()


@pytest.mark.parametrize(
    ("table", "target", "end", "said"),
    [
        (FAR + "4e6,0,1,a\n", "yield", 1, "row 24, column 'a': 4000000 is more than 1,000,000"),
        (LARGE, "yield", 1e20, "'b' ends .* deviations from what was observed"),
        (LARGE, "profit", 1, "no column 'profit'.*a, b, yield"),
        (WIDE, "v0", 1, "129 variables, at most 128"),
    ],
    ids=["cell", "range", "target", "wide"],
)
def test_suggest_refuses_what_is_far_out_unknown_or_too_much(tmp_path, table, target, end, said):
    (tmp_path / "data.csv").write_text(table)
    (tmp_path / "bounds.csv").write_text(f"variable,low,high\nb,-{end},{end}\n")
    with pytest.raises(DataError, match=said):
        suggest(tmp_path / "data.csv", target, bounds=tmp_path / "bounds.csv")


@pytest.mark.parametrize("study", ["expert", "fidelity", "policy", "surrogate"])
def test_studies_refuse_counts_that_cannot_be_meant(study):
    config = importlib.import_module(f"studies.{study}").Config
    counts = [f.name for f in fields(config) if f.type is int and not f.name.endswith("seed")]
    assert counts
    lists = {"systems", "sizes"} & {f.name for f in fields(config)}
    for name, value in (*((name, -1) for name in counts), *((name, ()) for name in lists)):
        with pytest.raises(ValueError, match=name if value else f"{name}: give at least one"):
            config(**{name: value})
