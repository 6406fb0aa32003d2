"""The scripts as a person runs them, at a size that only shows that they work: chained,
interrupted, resumed, and given bad input.

`make smoke` runs the evaluation; here it would be mostly compilation.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from lib.artifacts import ArtifactError, load_arrays, read_header
from lib.buffer import DataError
from lib.grpo import CampaignDesign, GRPOConfig
from lib.policy import PolicyConfig
from lib.scm_prior import FAMILIES, DataDesign, SCMPrior, sample_problem
from lib.surrogate import SurrogateConfig
from lib.system import load_surrogate
from lib.trajectories import extract_acquisition_training_data, join, load_trajectories


ROOT = Path(__file__).parent.parent
PRIOR = SCMPrior(max_vars=3, max_size=3)
DESIGN = DataDesign(min_obs=20, max_obs=24, max_interventions=8)
CAMPAIGN = CampaignDesign(min_obs=20, max_obs=20, per_variable=1, num_steps=2)
SURROGATE = SurrogateConfig(
    model_hidden_dim=8, model_n_layers=1, num_products=4, num_components=2, num_bins=6
)
GRPO = GRPOConfig(group_size=3)


def script(name: str):
    """A numbered script as a module."""
    found = importlib.util.spec_from_file_location(name[3:-3], ROOT / name)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


STAGES = [
    script(name)
    for name in (
        "01_extract_demos.py",
        "02_train_surrogate.py",
        "03_warmstart_acquisition.py",
        "04_train_e2e.py",
    )
]
EVALUATE = script("05_evaluate.py")
DEPLOY = script("06_deploy.py")


def configs(folder: Path) -> list:
    """The smallest settings of every stage."""
    demos, surrogate, policy, e2e = (
        STAGES[0].Config,
        STAGES[1].Config,
        STAGES[2].AcquisitionConfig,
        STAGES[3].Config,
    )
    return [
        demos(
            folder,
            prior=PRIOR,
            num_models=6,
            num_obs=20,
            per_variable=1,
            num_steps=5,
            num_bins=6,
            batch=3,
            max_posterior_entropy=9.0,
        ),
        surrogate(
            folder,
            prior=PRIOR,
            design=DESIGN,
            model=SURROGATE,
            steps=6,
            warmup_steps=1,
            buckets=(STAGES[1].Bucket(3, 2),),
            buffers_per_model=2,
            demos_per_step=2,
            chunk=2,
            evaluate_every=4,
            checkpoint_every=2,
        ),
        policy(
            folder,
            prior=PRIOR,
            campaign=CAMPAIGN,
            policy=PolicyConfig(policy_hidden_dim=8, policy_n_layers=1),
            imitation=STAGES[2].ImitationConfig(imitation_epochs=1),
            grpo=GRPO,
            iterations=3,
            problems_per_iteration=2,
            validation_problems=2,
            multimodal_share=0.0,
            checkpoint_every=1,
        ),
        e2e(
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
def finished(tmp_path_factory):
    """A folder in which the four stages of training have run."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    for stage, config in zip(STAGES, configs(folder), strict=True):
        stage.main(config)
    return folder


def test_every_stage_writes_what_it_says(finished):
    for name in (
        "demos.npz",
        "surrogate.eqx",
        "policy.eqx",
        "bc_policy.eqx",
        "curves.npz",
        "acbo.eqx",
    ):
        header = read_header(finished / name)
        assert header["seed"] == 0 and header["metrics"] is not None
    for name, count in (("demos", 2), ("surrogate", 3), ("policy", 3), ("e2e", 3)):
        lines = [
            json.loads(line)
            for line in (finished / "logs" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert len(lines) == count and [line["step"] for line in lines] == sorted(
            line["step"] for line in lines
        )
    assert not list(finished.glob("*.ckpt"))


def test_the_first_stage_counts_what_it_kept_by_kind(finished):
    metrics = read_header(finished / "demos.npz")["metrics"]
    assert set(metrics["yield"]) == {"family", "mechanism", "variables"}
    for kind, part in metrics["yield"].items():
        for count in ("models", "kept"):
            assert sum(label[count] for label in part.values()) == metrics[count], kind
    assert set(metrics["yield"]["family"]) <= set(PRIOR.families) and set(
        metrics["yield"]["variables"]
    ) == {"3"}
    lines = [
        json.loads(line) for line in (finished / "logs" / "demos.jsonl").read_text().splitlines()
    ]
    assert sum(line["failures"] for line in lines) == metrics["failures"]


def test_the_first_stage_knows_the_family_of_every_model():
    """Its problems are those of `sample_problem`, and chains and forks are told apart by their
    edges.
    """
    config = dataclasses.replace(
        configs(Path())[0],
        prior=SCMPrior(max_vars=4, min_size=4, max_size=4, families=("chain", "fork")),
        batch=8,
    )
    scms, families, buffers = STAGES[0].draw_batch(jr.key(0), config)
    same = jax.jit(jax.vmap(lambda key: sample_problem(key, config.prior, 20, 1, 29)))(
        jr.split(jr.key(0), 8)
    )
    for one, two in zip(jax.tree.leaves((scms, buffers)), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    edges = {
        "chain": np.eye(4, k=1, dtype=bool),
        "fork": np.outer(np.arange(4) == 0, np.arange(4) > 0),
    }
    names = [FAMILIES[i] for i in np.asarray(families)]
    assert set(names) == set(edges)
    for name, adjacency in zip(names, np.asarray(scms.adjacency), strict=True):
        assert (adjacency == edges[name]).all()


@pytest.mark.parametrize(
    "stage, product", [(1, "surrogate.eqx"), (2, "policy.eqx"), (3, "acbo.eqx")]
)
def test_a_stage_killed_and_started_again_ends_byte_for_byte_the_same(
    finished, monkeypatch, stage, product
):
    # beside the other, to share its compiled programs
    folder = finished.parent / f"killed {product}"
    folder.mkdir()
    for file in finished.glob("*.[ne]*"):
        if file.name != product:
            (folder / file.name).write_bytes(file.read_bytes())
    module = STAGES[stage]
    config = dataclasses.replace(configs(folder)[stage])
    real = module.save_checkpoint

    def save_and_die(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            module.main(config)
    assert not (folder / product).exists()
    module.main(config)
    assert (folder / product).read_bytes() == (finished / product).read_bytes()


def test_rules_on_the_surface_as_teachers(finished):
    stage, surrogate = STAGES[2], load_surrogate(finished / "surrogate.eqx")[0]
    demos = join(
        [load_trajectories(finished / "demos.npz", part)[0] for part in ("train", "validation")]
    )
    examples = extract_acquisition_training_data(demos, surrogate)
    allowed, cells = (
        np.asarray(jax.vmap(lambda task: task.candidates)(examples.state.task)),
        np.arange(examples.variable.size),
    )
    for teacher in ("expected_improvement", "thompson"):
        lesson = stage.taught(jr.key(0), examples, teacher)
        variable, surface = np.asarray(lesson.variable), np.asarray(lesson.surface)
        assert (
            allowed[cells, variable].all()
            and (surface[~allowed] == 0).all()
            and (surface >= 0).all()
        )
        if teacher == "thompson":
            np.testing.assert_allclose(surface.sum((1, 2)), stage.THOMPSON_DRAWS)
            assert (surface[cells, variable].sum(1) > 0).all()
        else:
            np.testing.assert_array_equal(surface[cells, variable].max(1), surface.max((1, 2)))


def test_a_stage_refuses_what_an_earlier_stage_did_not_write(finished, tmp_path):
    (tmp_path / "surrogate.eqx").write_bytes((finished / "policy.eqx").read_bytes())
    (tmp_path / "policy.eqx").write_bytes((finished / "policy.eqx").read_bytes())
    with pytest.raises(ArtifactError, match="surrogate.eqx.*02_train_surrogate.py"):
        STAGES[3].main(configs(tmp_path)[3])


def test_evaluation_names_the_artifact_that_is_missing(tmp_path):
    with pytest.raises(ArtifactError, match="policy.eqx.*03_warmstart_acquisition.py"):
        EVALUATE.main(EVALUATE.Config(tmp_path))


def experiments(path: Path, *, bad: str = "") -> Path:
    """Twelve observations and two interventions on `dose`; `bad` replaces the cell in row 5, column
    `yield`.
    """
    rows = [
        f"{i % 5},{i % 3 + 0.1 * i},{bad if bad and i == 3 else 2 * (i % 5) + 0.3 * (i % 4)},"
        for i in range(12)
    ]
    path.write_text(
        "\n".join(["dose,heat,yield,intervened", *rows, "4,1.1,7.9,dose", "0,1.2,0.4,dose"]) + "\n"
    )
    return path


def test_suggest_answers_within_the_range(finished, tmp_path, capsys):
    data = experiments(tmp_path / "experiments.csv")
    answer = DEPLOY.suggest(
        DEPLOY.Suggest(data, "yield", objective="max", system=finished / "acbo.eqx", json=True)
    )
    assert json.loads(capsys.readouterr().out) == answer
    assert answer["next_experiment"]["variable"] in ("dose", "heat")
    ranges = {"dose": (0, 4), "heat": (0, 3.1)}
    low, high = ranges[answer["next_experiment"]["variable"]]
    assert low - 1e-5 <= answer["next_experiment"]["value"] <= high + 1e-5
    assert set(answer["parents"]) == {"dose", "heat"} and all(
        0 <= p <= 1 for p in answer["parents"].values()
    )
    (tmp_path / "bounds.csv").write_text("variable,low,high\nheat,1,2\n")
    bounded = DEPLOY.suggest(
        DEPLOY.Suggest(data, "yield", bounds=tmp_path / "bounds.csv", system=finished / "acbo.eqx")
    )
    assert (
        bounded["next_experiment"]["variable"] == "heat"
        and 1 <= bounded["next_experiment"]["value"] <= 2
    )
    assert "heat" in capsys.readouterr().out


@pytest.mark.parametrize(
    "cell, said",
    [
        ("x", "row 5, column 'yield': 'x' is not a number"),
        ("nan", "row 5, column 'yield'"),
        ("inf", "row 5"),
    ],
)
def test_suggest_refuses_bad_cells(finished, tmp_path, cell, said):
    with pytest.raises(DataError, match=said):
        DEPLOY.suggest(
            DEPLOY.Suggest(
                experiments(tmp_path / "bad.csv", bad=cell), "yield", system=finished / "acbo.eqx"
            )
        )


def test_suggest_refuses_an_unknown_target(finished, tmp_path):
    with pytest.raises(DataError, match="no column 'profit'.*dose, heat, yield"):
        DEPLOY.suggest(
            DEPLOY.Suggest(
                experiments(tmp_path / "experiments.csv"), "profit", system=finished / "acbo.eqx"
            )
        )


def test_demo_scores_the_recommended_action(finished, capsys):
    scores = DEPLOY.demo(DEPLOY.Demo(steps=2, num_obs=20, system=finished / "acbo.eqx"))
    assert len(scores) == 1 and -2.2 < scores[0] < 0.6
    assert "optimum -2.17" in capsys.readouterr().out


def test_the_shipped_system_answers_from_any_folder(tmp_path, monkeypatch, capsys):
    """The README's first command, without `--system`, from a folder that holds nothing."""
    monkeypatch.chdir(tmp_path)
    examples = ROOT / "examples"
    answer = DEPLOY.suggest(
        DEPLOY.Suggest(
            examples / "experiments.csv", "yield", objective="max", bounds=examples / "bounds.csv"
        )
    )
    assert (
        answer["recommended_action"]["variable"] == "catalyst"
        and answer["recommended_action"]["value"] > 7
    )
    assert "Next experiment" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("remaining", [0, -5, 2**31, 10**20])
def test_suggest_refuses_an_impossible_number_of_experiments(tmp_path, remaining):
    with pytest.raises(DataError, match="--remaining"):
        DEPLOY.Suggest(tmp_path / "experiments.csv", "yield", remaining=remaining)


def test_the_policy_is_told_how_many_experiments_were_made(finished, tmp_path):
    names, buffer, _ = DEPLOY.ExperienceBuffer.from_csv(experiments(tmp_path / "experiments.csv"))
    wide, task = DEPLOY.padded(buffer, DEPLOY.observed_task(buffer, names.index("yield")))
    state = DEPLOY.decide(
        DEPLOY.TrainedACBOSystem.load(finished / "acbo.eqx"), wide, task, jax.numpy.array(3)
    )[0]
    assert state.step == 2 and state.steps_left == 3


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        (0, {"num_models": 0}, "num_models = 0 must be at least 1"),
        (0, {"num_models": 2}, "num_models = 2 cannot be split"),
        (1, {"steps": 0}, "steps = 0 must be at least 1"),
        (1, {"steps": -1}, "steps = -1"),
        (1, {"learning_rate": float("nan")}, "learning_rate = nan"),
        (2, {"seed": 10**20}, "seed = 1000"),
        (2, {"checkpoint_every": 2}, "iterations = 3 must be a multiple"),
        (3, {"rounds": -1}, "rounds = -1"),
        (3, {"seed": -1}, "seed = -1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(stage, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(configs(Path())[stage], **changes)


def test_settings_of_evaluation_and_demo_that_cannot_be_meant_are_refused():
    for settings in (
        {"num_problems": 0},
        {"literature_seeds": 0},
        {"sizes": (0,)},
        {"transfer_size": 1},
        {"seed": 2**32},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            EVALUATE.Config(**settings)
    for settings in ({"seeds": 0}, {"steps": -1}, {"num_obs": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DEPLOY.Demo(**settings)


def test_training_takes_as_many_steps_as_it_was_told(finished):
    """Neither the number of steps nor the interval of evaluations is a multiple of a chunk."""
    folder = finished.parent / "uneven"
    folder.mkdir()
    (folder / "demos.npz").write_bytes((finished / "demos.npz").read_bytes())
    STAGES[1].main(dataclasses.replace(configs(folder)[1], steps=5, evaluate_every=3))
    assert read_header(folder / "surrogate.eqx")["step"] == 5
    lines = [
        json.loads(line) for line in (folder / "logs" / "surrogate.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert ["validation_set_nll" in line for line in lines] == [False, True, True]


def test_without_a_clone_there_is_no_warm_start_to_compare(finished):
    folder = finished.parent / "cold only"
    folder.mkdir()
    for name in ("surrogate.eqx", "bc_policy.eqx"):  # a clone that an earlier run left
        (folder / name).write_bytes((finished / name).read_bytes())
    imitation = STAGES[2].ImitationConfig(use_behavioral_cloning=False)
    STAGES[2].main(dataclasses.replace(configs(folder)[2], imitation=imitation))
    curves, header = load_arrays(folder / "curves.npz", "curves")
    assert len(curves["validation"]) == 1 and header["hyperparameters"]["runs"] == ["cold"]
    assert not (folder / "bc_policy.eqx").exists()


def test_validation_figures_have_no_unit(finished):
    config = configs(finished)[1]
    model = load_surrogate(finished / "surrogate.eqx")[0]
    drawn = STAGES[1].draw_chunk(jr.key(0), jax.numpy.array(0), 2, config)
    (batch,) = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), drawn)
    is_target = jax.numpy.arange(batch.parents.shape[1])[None] == batch.task.target[:, None]
    scaled = batch.buffer.values * jax.numpy.where(is_target, 1000.0, 1.0)[:, None]
    other = batch._replace(
        buffer=eqx.tree_at(lambda buffer: buffer.values, batch.buffer, scaled),
        effects=1000.0 * batch.effects,
    )
    one, two = (STAGES[1].evaluate(model, (examples,)) for examples in (batch, other))
    assert one["validation_regret"] > 0
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_units_do_not_matter(tmp_path):
    """Temperature times 2^30, catalyst times 2^-30, the target with an offset of 2^20: the same
    answer, in these units.
    """
    factor = {"temperature": 2.0**30, "catalyst": 2.0**-30}

    def converted(path, column):
        header, *rows = [line.split(",") for line in path.read_text().splitlines()]
        for row in rows:
            for i, name in enumerate(header):
                unit = factor.get(row[0] if column else name, 1.0)
                if (not column or i > 0) and name != "intervened":
                    row[i] = repr(float(row[i]) * unit + (2.0**20 if name == "yield" else 0.0))
        (tmp_path / path.name).write_text(
            "\n".join(",".join(row) for row in [header, *rows]) + "\n"
        )
        return tmp_path / path.name

    data, bounds = ROOT / "examples" / "experiments.csv", ROOT / "examples" / "bounds.csv"
    plain = DEPLOY.suggest(DEPLOY.Suggest(data, "yield", objective="max", bounds=bounds))
    other = DEPLOY.suggest(
        DEPLOY.Suggest(
            converted(data, False), "yield", objective="max", bounds=converted(bounds, True)
        )
    )
    for action in ("next_experiment", "recommended_action"):
        one, two = plain[action], other[action]
        assert one["variable"] == two["variable"]
        assert two["value"] == pytest.approx(
            one["value"] * factor.get(one["variable"], 1.0), rel=0.01
        )
        assert two["predicted"] - 2.0**20 == pytest.approx(one["predicted"], abs=0.1) and two[
            "std"
        ] == pytest.approx(one["std"], abs=0.05)
    assert other["parents"] == pytest.approx(plain["parents"], abs=0.02)


def test_large_numbers_are_answered_with_numbers(tmp_path):
    """Values of 1e25 once gave infinity; ranges in another unit than the data are refused."""
    rng = np.random.default_rng(0)
    rows = [f"{1e25 * a:.6e},{b:.3f},{1e25 * (a + b):.6e}," for a, b in rng.normal(size=(20, 2))]
    (tmp_path / "large.csv").write_text("\n".join(["a,b,y,intervened", *rows]) + "\n")
    answer = DEPLOY.suggest(DEPLOY.Suggest(tmp_path / "large.csv", "y"))
    assert all(np.isfinite([e["value"], e["mean"], e["std"]]).all() for e in answer["best_effects"])
    (tmp_path / "bounds.csv").write_text("variable,low,high\nb,-1e20,1e20\n")
    with pytest.raises(DataError, match="'b' ends .* deviations from what was observed"):
        DEPLOY.suggest(DEPLOY.Suggest(tmp_path / "large.csv", "y", bounds=tmp_path / "bounds.csv"))


@pytest.mark.parametrize(
    "study",
    sorted([*(ROOT / "benchmarks").glob("*.py"), ROOT / "studies" / "weights.py"]),
    ids=lambda path: path.stem,
)
def test_studies_refuse_counts_that_cannot_be_meant(study):
    found = importlib.util.spec_from_file_location(f"study_{study.stem}", study)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    given = {"systems": (Path("acbo.eqx"),)} if study.stem == "weights" else {}
    counts = [
        field.name
        for field in dataclasses.fields(module.Config)
        if field.type is int and not field.name.endswith("seed")
    ]
    assert counts
    for name in counts:
        with pytest.raises(ValueError, match=name):
            module.Config(**given, **{name: -1})
