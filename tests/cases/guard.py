"""What two commits give on fixed inputs: a change that is to change nothing is held to it.

    .venv/bin/python tests/cases/guard.py --against main                this tree against a commit
    .venv/bin/python tests/cases/guard.py --against main answer stages  some of its parts only

Both run here, one after the other, the commit from a worktree of its own, because another
processor or another version of XLA rounds otherwise: numbers kept from elsewhere would be no test.
Status 1 beyond 1e-5. Compared are: posterior, effects and policy of the shipped weights on the ten
data sets of shipped.npz; losses, norms of the gradients and what two steps leave of toy runs of
stages 1 to 4; rewards of a group; an expert's run; a campaign of every method; an answer of
`suggest`. Numbers of training agree to 1e-4: other programs round otherwise, and a step divides by
such numbers. So do those of an answer, which are rounded: a last digit turns. Some eight minutes
for each of the two from an empty cache; no part of the checks that every commit has to pass.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path


os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of it
ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "artifacts" / "cache"))
sys.path.insert(0, str(ROOT))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from lib.buffer import ExperienceBuffer
from lib.expert import run_parent_scale
from lib.expert_posterior import ParentScaleConfig
from lib.grpo import GRPOConfig, Simulator, collect_campaign, grpo_loss
from lib.imitation import ImitationConfig
from lib.methods import METHODS, play
from lib.problems import (
    CampaignDesign,
    DataDesign,
    draw_problems,
    held_out_problems,
    sample_examples,
)
from lib.rewards import RewardConfig
from lib.scm import Task
from lib.scm_prior import SCMPrior
from lib.surrogate import mean_losses
from lib.system import TrainedACBOSystem


STORED = Path(__file__).parent / "guard.npz"
TRAINING = ("stage", "gradient")  # names that begin so: tolerance 1e-4
SHIPPED = TrainedACBOSystem.load(ROOT / "pretrained" / "acbo.eqx")


def shifts(policy):
    """Weights that add one number to all logits (those of steps done and left are among the direct
    ones): their gradient is rounding, of which Adam makes whole steps.
    """
    return policy.score[1].bias, policy.direct.bias, policy.direct.weight


def norms(tree) -> np.ndarray:
    """The norm of every array in a tree."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return np.array([float(jnp.linalg.norm(leaf)) for leaf in leaves])


def shipped() -> dict:
    """Posterior, effects and policy of the shipped system on ten stored data sets."""
    with np.load(ROOT / "tests" / "cases" / "shipped.npz") as file:
        inputs = {n.removeprefix("in/"): file[n] for n in file.files if n.startswith("in/")}

    @eqx.filter_jit
    def read(one):
        buffer = ExperienceBuffer(one["values"], one["intervened"], one["valid"])
        state = SHIPPED.state(buffer, Task(one["target"], one["low"], one["high"], one["var_mask"]))
        probabilities = jnp.exp(SHIPPED.policy(state).logits)
        return {
            "marginals": state.output.marginals(),
            "effect_mean": state.output.effect_mean,
            "effect_std": state.output.effect_std,
            "probs": state.posterior.probs,
            "policy": probabilities,
        }

    return jax.lax.map(read, jax.tree.map(jnp.asarray, inputs))


def stages() -> dict:
    """Toy runs of stages 1 to 4: what they log, and the norms of the weights that they write."""
    with tempfile.TemporaryDirectory() as folder:
        return toy_run(Path(folder) / "toy")


def toy_run(folder: Path) -> dict:
    """The same, in `folder`."""
    found = {}
    changes = {
        "01_extract_demos": dict(num_models=4, num_steps=3, min_trajectory_length=3),
        "02_train_surrogate": dict(steps=2, warmup_steps=1),
        "03_warmstart_acquisition": dict(iterations=2),
        "04_train_e2e": dict(rounds=2, levels=2),
    }
    logs = {"01": "demos", "02": "surrogate", "03": "policy", "04": "acbo"}

    def run(name, folder, prefix="", **change):
        script = importlib.import_module(name)
        config = replace(script.PRESETS["smoke"][1], folder=folder, **change)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.main(config)
        for line in (folder / "logs" / f"{logs[name[:2]]}.jsonl").read_text().splitlines():
            record = json.loads(line)
            step = record.pop("step")
            del record["time"]
            for key, value in record.items():
                found[f"stage {name[:2]}/{step}/{prefix}{key}"] = np.array(value)

    for name, change in changes.items():
        if name[:2] != "03":
            run(name, folder, **change)
            continue
        run(name, folder, "warm_", **change)
        (folder / "cold").mkdir()
        shutil.copy(folder / "surrogate.eqx", folder / "cold")
        alone = ImitationConfig(use_behavioral_cloning=False)
        run(name, folder / "cold", "cold_", imitation=alone, **change)
    system = TrainedACBOSystem.load(folder / "acbo.eqx")
    return found | {
        "stage 04/surrogate": norms(system.surrogate),
        "stage 04/policy": norms(eqx.tree_at(shifts, system.policy, (None,) * 3)),
    }


def gradients() -> dict:
    """Losses and gradients of the shipped surrogate and policy; rewards of a group."""
    prior = SCMPrior(max_vars=6, max_size=6)
    bins = SHIPPED.surrogate.config.num_bins
    examples = sample_examples(jr.key(1), prior, DataDesign(max_obs=60), bins)
    problems = draw_problems(jr.key(2), 2, prior, CampaignDesign(num_steps=2), bins)
    config, rewards = GRPOConfig(), RewardConfig()

    @eqx.filter_jit
    def surrogate(model):
        def loss(model):
            losses = mean_losses(model, [examples], None)
            return losses.parent_nll + losses.effect_nll, losses

        return eqx.filter_value_and_grad(loss, has_aux=True)(model)

    @eqx.filter_jit
    def policy(model):
        def one(key, problem):
            simulator = Simulator(SHIPPED.surrogate, problem.scm, problem.truth, rewards)
            return collect_campaign(key, simulator, model, problem.buffer, 2, config)[0]

        groups = jax.vmap(one)(jr.split(jr.key(3), 2), problems)
        groups = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)

        def loss(model):
            return grpo_loss(model, SHIPPED.policy, groups, replace(config, kl_weight=0.1))

        return eqx.filter_value_and_grad(loss, has_aux=True)(model), groups

    (_, losses), gradient = surrogate(SHIPPED.surrogate)
    ((_, metrics), policy_gradient), groups = policy(SHIPPED.policy)
    return {
        "gradient/surrogate": norms(gradient),
        "gradient/policy": norms(policy_gradient),
        "gradient/losses": np.array([losses.parent_nll, losses.effect_nll]),
        "gradient/metrics": np.array(list(metrics)),
        "rewards": jnp.stack(
            [
                groups.reward.optimization,
                groups.reward.structure_discovery,
                groups.reward.parent_intervention,
                groups.reward.total,
            ]
        ),
        "candidates": groups.value,
    }


def campaigns() -> dict:
    """The expert's beliefs and choices, and what every method recommends after each experiment."""
    prior = SCMPrior(max_vars=5, min_size=5, max_size=5)
    design = CampaignDesign(40, 40, 2, 3)
    problems, optima = held_out_problems(
        jr.key(4), 2, prior, design, SHIPPED.surrogate.config.num_bins
    )
    keys = jr.split(jr.key(5), 2)
    found = {"optima": optima}
    for name in METHODS:
        played = play(name, SHIPPED, keys, problems.scm, problems.buffer, num_obs=40, num_steps=3)
        found[f"method/{name}"] = played["recommended"]
    first = jax.tree.map(lambda leaf: leaf[0], problems)
    config = ParentScaleConfig(num_obs=40, num_steps=3)
    run = eqx.filter_jit(run_parent_scale)(keys[0], first.scm, first.buffer, config)
    return found | {
        "expert/probs": jnp.exp(run.log_probs),
        "expert/surface": run.surface,
        "expert/value": run.value,
        "expert/outcome": run.outcome,
    }


def answer() -> dict:
    """Numbers of the shipped system's answer on the example."""
    script = importlib.import_module("06_deploy")
    folder = ROOT / "examples"
    with contextlib.redirect_stdout(io.StringIO()):
        found = script.suggest(
            script.Suggest(
                folder / "experiments.csv", "yield", objective="max", bounds=folder / "bounds.csv"
            )
        )
    numbers, names = {}, sorted(found["parents"])
    numbers["suggest/parents"] = np.array([found["parents"][n] for n in names])
    for name in ("next_experiment", "recommended_action"):
        action = found[name]
        values = *action["settings"].values(), *(action[k] for k in ("predicted", "low", "high"))
        numbers[f"suggest/{name}"] = np.array(values)
    return numbers


PARTS = {
    "shipped": shipped,
    "gradients": gradients,
    "campaigns": campaigns,
    "answer": answer,
    "stages": stages,
}
PREFIXES = {
    "gradients": ("gradient", "rewards", "candidates"),
    "campaigns": ("optima", "method", "expert"),
    "answer": ("suggest",),
    "stages": ("stage",),
}


def part_of(name: str) -> str:
    """Which part of the guard an array is from."""
    return next((part for part, starts in PREFIXES.items() if name.startswith(starts)), "shipped")


def store(parts: list[str]) -> Path:
    """Compute `parts` in this tree and write them beside this file."""
    found = {}
    for part in parts:
        found |= {name: np.asarray(value) for name, value in PARTS[part]().items()}
    np.savez_compressed(STORED, **found)
    return STORED


def of_commit(commit: str, parts: list[str]) -> dict[str, np.ndarray]:
    """What the guard of `commit` gives, by its own code."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            there = tree / "tests" / "cases" / "guard.py"
            subprocess.run([sys.executable, str(there), "--store", *parts], check=True, cwd=tree)
            with np.load(there.with_suffix(".npz")) as file:
                return {n: file[n] for n in file.files if part_of(n) in parts}
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> int:
    """Print the largest differences; how many lie beyond their tolerance."""
    worst = []
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now:
            worst.append((np.inf, 0.0, name + (" is gone" if name in before else " is new")))
            continue
        a, b = before[name].astype(float), now[name].astype(float)
        same = a.shape == b.shape and np.array_equal(np.isfinite(a), np.isfinite(b))
        finite = np.isfinite(a)
        scale = 1.0 + np.abs(a[finite])
        error = np.max(np.abs(a[finite] - b[finite]) / scale, initial=0.0) if same else np.inf
        worst.append((error, 1e-4 if name.startswith((*TRAINING, "suggest")) else 1e-5, name))
    worst.sort(reverse=True)
    for error, allowed, name in worst[:12]:
        print(f"{error:.1e}  {name}" + ("" if error <= allowed else "  BEYOND"))
    bad = sum(error > allowed for error, allowed, _ in worst)
    print(f"{len(worst)} compared, {bad} beyond their tolerance")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if left out")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", metavar="COMMIT", help="compare with this commit")
    what.add_argument("--store", action="store_true", help=f"write {STORED.name} only")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    parts = args.parts or list(PARTS)
    before = {} if args.store else of_commit(args.against, parts)
    with np.load(store(parts)) as file:
        now = dict(file)
    return 0 if args.store else int(compare(before, now) > 0)


if __name__ == "__main__":
    sys.exit(main())
